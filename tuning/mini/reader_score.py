"""Compares what a picture shows with what was asked for, attribute by attribute: a picture's score and a model's accuracy."""

from collections.abc import Iterable, Sequence

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from tuning.mini.data import to_bytes
from tuning.mini.reader_rules import Seen, SeenObject, read
from tuning.mini.scenes import PLACES, Asked, AskedObject, Scene, held_back_prompts, parse
from tuning.training.sampling import sample
from tuning.training.teacher import Teacher

__all__ = ["ATTRIBUTES", "GUIDANCE", "accuracy", "asked_of", "judge", "read_captions", "read_scenes", "shares"]

GUIDANCE = 3.0  # what `mini`'s pictures look best with

ATTRIBUTES = ("count", "colour", "shape", "size", "place", "background")


def asked_of(scene: Scene) -> Asked:
    """A scene as a request for all of its attributes (sizes only where there is one object: pairs have one size)."""
    single = len(scene.objects) == 1
    objects = tuple(AskedObject(o.colour, o.shape, o.size if single else None, o.place) for o in scene.objects)
    return Asked(objects, scene.background)


def _order(obj: AskedObject) -> tuple[int, int]:
    return PLACES[obj.place] if obj.place else (0, 0)


def _pairs(asked: Asked, seen: Seen) -> list[tuple[AskedObject, SeenObject]]:
    """Matches asked with seen objects: by place where the caption gives places, else by the best match of all."""
    wanted, found = list(asked.objects), list(seen.objects)
    if len(wanted) == 1:
        return list(zip(wanted, found, strict=True))
    if all(o.place for o in wanted):
        horizontal = abs(found[0].x - found[1].x) > abs(found[0].y - found[1].y)
        found.sort(key=lambda o: o.x if horizontal else o.y)
        return list(zip(sorted(wanted, key=_order), found, strict=True))

    def agreement(order: list[SeenObject]) -> int:
        return sum((w.colour == f.colour) + (w.shape == f.shape) for w, f in zip(wanted, order, strict=True))

    mirrored = found[::-1]
    best = mirrored if agreement(mirrored) > agreement(found) else found
    return list(zip(wanted, best, strict=True))


def judge(asked: Asked, seen: Seen) -> dict[str, bool]:
    """Whether each attribute is right. What was not asked for is right; with a wrong count the objects' are wrong."""
    right = dict.fromkeys(ATTRIBUTES, True)
    right["background"] = asked.background in (None, seen.background)
    right["count"] = len(asked.objects) == len(seen.objects) > 0
    if not right["count"]:
        return right | {"colour": False, "shape": False, "size": False, "place": False}
    for want, found in _pairs(asked, seen):
        right["colour"] &= want.colour == found.colour
        right["shape"] &= want.shape == found.shape
        right["size"] &= want.size in (None, found.size)
        right["place"] &= want.place in (None, found.place)
    return right


def shares(judgements: Iterable[dict[str, bool]]) -> dict[str, float]:
    """The share of pictures right in each attribute, and in all of them ("all")."""
    rows = list(judgements)
    result = {name: sum(row[name] for row in rows) / len(rows) for name in ATTRIBUTES}
    return result | {"all": sum(all(row.values()) for row in rows) / len(rows)}


def _read(asked: Sequence[Asked], pictures: Tensor) -> dict[str, float]:
    return shares([judge(want, read(seen)) for want, seen in zip(asked, to_bytes(pictures), strict=True)])


def read_scenes(scenes: Sequence[Scene], pictures: Tensor) -> dict[str, float]:
    """The share of pictures (n, 3, h, w) in [-1, 1] that show their scene, by attribute and in all."""
    return _read([asked_of(scene) for scene in scenes], pictures)


def read_captions(captions: Sequence[str], pictures: Tensor) -> dict[str, float]:
    """The share of pictures (n, 3, h, w) in [-1, 1] that show what their caption asks for."""
    return _read([parse(text) for text in captions], pictures)


def accuracy(unet: UNet2DConditionModel, model: Teacher, *, count: int = 64, seed: int = 1, steps: int = 20) -> dict[str, float]:
    """The share of held-back prompts right in each attribute by the rule reader, as figures for the training log.

    `seed` 1 is the list for validation: the published figures use the list of seed 0.
    """
    prompts = held_back_prompts(count, seed)
    parts = [sample(unet, model, prompts[at : at + 64], guidance=GUIDANCE, steps=steps, seed=at) for at in range(0, count, 64)]
    return {f"right_{name}": share for name, share in read_captions(prompts, torch.cat(parts)).items()}
