"""Stage `reader` of the emoji training: cross entropy of concept and style on real pictures of training pairs only.

Half of a batch keeps its own colours, which styles are known by, and teaches both; the other half is tinted, spoilt and mixed,
and teaches concepts alone. It begins from the reader in `out`, where there is one.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tuning.emoji.concepts import STYLES
from tuning.emoji.pictures import Textures
from tuning.emoji.reader import READER, Reader, load_reader, right, save_reader
from tuning.emoji.run import Log, Rates, Run, autocast, due
from tuning.emoji.views import mixed, views

__all__ = ["train_reader"]

_SMOOTHING, _STYLE_WEIGHT = 0.1, 0.6
_SETTLING = 60  # batches that the averaged weights' running means are taken from
_MARKS = tuple(i / 20 for i in range(1, 20))
_EXPORTS = tuple(i / 5 for i in range(1, 5))


def train_reader(
    data: Textures,
    out: Path,
    log: Log,
    batch: int,
    *,
    widths: tuple[int, ...] = (32, 64, 128, 192),
    settling: int = _SETTLING,
    **bounds: Any,
) -> None:
    """Trains the reader, logs how right it is on real pictures held back, and writes it into the model folder, now and then."""
    labels = data.labels(data.train)
    reader = load_reader(out / READER)[0] if (out / READER).exists() else Reader(len(data.concepts), len(STYLES), widths)
    # On a CPU torch 2.13 frees memory twice in the backward pass of a narrow reader whose weights lie channels last.
    layout = torch.channels_last if data.device.type == "cuda" else torch.contiguous_format
    reader.train().to(data.device, memory_format=layout)  # type: ignore[call-overload]
    run = Run(reader, Rates(3e-3, fall=0.9, weight_decay=0.05, average=0.998), out / "checkpoints" / "reader.pt", **bounds)
    rng, shown, exported = random.Random(f"reader {run.step}"), set[float](), {m for m in _EXPORTS if run.progress >= m}
    for progress in run.steps():
        rows = [rng.randrange(len(data.train)) for _ in range(batch)]
        at = torch.tensor(rows, device=data.device)
        clear = batch // 2
        textures = data.textures(rows)
        spoilt, other, share = mixed(views(textures[clear:]))
        pictures = torch.cat([views(textures[:clear], own_colours=True), spoilt])
        with autocast(data.device):
            concepts, styles = reader.read(pictures.contiguous(memory_format=layout))
        concept, style = (names[at] for names in labels)
        loss = _loss(concepts[:clear], concept[:clear]) + _STYLE_WEIGHT * _loss(styles[:clear], style[:clear])
        found, first = concepts[clear:], concept[clear:]
        loss = loss + share * _loss(found, first) + (1 - share) * _loss(found, first[other])
        run.update(loss)
        if due(progress, _MARKS, shown):
            log(step=run.step, pictures=(run.step + 1) * batch, loss=round(float(loss.detach()), 4))
        if due(progress, _EXPORTS, exported):
            _export(run, reader, data, out, log, batch, settling)
    _export(run, reader, data, out, log, batch, settling)


def _loss(scores: Tensor, wanted: Tensor) -> Tensor:
    return functional.cross_entropy(scores.float(), wanted, label_smoothing=_SMOOTHING)


def _export(run: Run, reader: Reader, data: Textures, out: Path, log: Log, batch: int, settling: int) -> None:
    """Writes the reader with the averaged weights, and logs how right it is on pairs held back."""
    with run.averaged():
        kept = {name: value.clone() for name, value in reader.named_buffers()}
        _settle(reader, data, batch, settling)
        log(step=run.step, held_back=_held_back(reader, data))
        save_reader(reader, data.concepts, STYLES, out / READER)
        reader.train()
        for name, value in reader.named_buffers():
            value.copy_(kept[name])


@torch.no_grad()
def _settle(reader: Reader, data: Textures, batch: int, batches: int) -> None:
    """Running means and variances of the averaged weights' own activations."""
    rng = random.Random("settle")
    reader.train()
    for _ in range(batches):
        reader.read(views(data.textures([rng.randrange(len(data.train)) for _ in range(batch)]), own_colours=True))


@torch.no_grad()
def _held_back(reader: Reader, data: Textures) -> dict[str, float]:
    reader.eval()
    concepts, styles = (torch.cat(scores) for scores in zip(*map(reader, data.held_back().split(64)), strict=True))
    concept, style = data.labels(data.held)
    return _shares(
        {"concept_top1": right(concepts, concept), "concept_top5": right(concepts, concept, 5), "style": right(styles, style)}
    )


def _shares(values: dict[str, Sequence[bool]]) -> dict[str, float]:
    return {name: round(sum(each) / len(each), 4) for name, each in values.items()}
