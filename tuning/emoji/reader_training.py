"""Stage `reader` of the emoji training: cross entropy of concept and style on real pictures of training pairs only."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tuning.emoji.concepts import STYLES
from tuning.emoji.reader import READER, Reader, right, save_reader
from tuning.emoji.run import Log, Rates, Run, autocast, due
from tuning.emoji.textures import Textures

__all__ = ["train_reader"]

_SMOOTHING, _STYLE_WEIGHT = 0.1, 0.3
_NOISE = 0.1
_SETTLING = 60  # batches that the averaged weights' running means are taken from
_MARKS = tuple(i / 10 for i in range(1, 10))


def _spoilt(pictures: Tensor, rng: random.Random) -> Tensor:
    """Pictures with noise, now and then blurred as an autoencoder blurs, and mirrored."""
    noise = torch.rand(len(pictures), 1, 1, 1, device=pictures.device) * torch.randn_like(pictures)
    pictures = pictures + _NOISE * noise
    if rng.random() < 0.3:
        pictures = functional.interpolate(functional.avg_pool2d(pictures, 2), scale_factor=2, mode="bilinear")
    return pictures.flip(-1) if rng.random() < 0.5 else pictures


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
    """Trains the reader, logs how right it is on real pictures held back, and writes it into the model folder."""
    concept, style = data.labels(data.train)
    reader = Reader(len(data.concepts), len(STYLES), widths).to(data.device)
    # On a CPU torch 2.13 frees memory twice in the backward pass of a narrow reader whose weights lie channels last.
    layout = torch.channels_last if data.device.type == "cuda" else torch.contiguous_format
    reader.to(memory_format=layout)  # type: ignore[call-overload]
    rates = Rates(3e-3, fall=0.8, weight_decay=0.05, average=0.998)
    run = Run(reader, rates, out / "checkpoints" / "reader.pt", **bounds)
    rng, shown = random.Random(f"reader {run.step}"), set[float]()
    for progress in run.steps():
        rows = [rng.randrange(len(data.train)) for _ in range(batch)]
        pictures = _spoilt(data.draw(rows, rng)[0], rng)
        at = torch.tensor(rows, device=data.device)
        with autocast(data.device):
            concepts, styles = reader(pictures.contiguous(memory_format=layout))
        loss = functional.cross_entropy(concepts.float(), concept[at], label_smoothing=_SMOOTHING)
        loss = loss + _STYLE_WEIGHT * functional.cross_entropy(styles.float(), style[at])
        run.update(loss)
        if due(progress, _MARKS, shown):
            log(step=run.step, loss=round(float(loss.detach()), 4))
    with run.averaged():
        _settle(reader, data, batch, settling)
        log(step=run.step, held_back=_held_back(reader, data))
        save_reader(reader, data.concepts, STYLES, out / READER)


@torch.no_grad()
def _settle(reader: Reader, data: Textures, batch: int, batches: int) -> None:
    """Running means and variances of the averaged weights' own activations."""
    rng = random.Random("settle")
    reader.train()
    for _ in range(batches):
        reader(data.batch(batch, rng))


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
