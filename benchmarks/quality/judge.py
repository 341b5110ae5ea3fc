"""The worth of the emoji model's pictures: whether its reader finds what was asked for, and how far sets of pictures lie apart.

The reader learnt from real pictures of training pairs alone. Distances are taken in its pooled features, which tell emoji apart;
they compare with each other, not with published ones.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import runtime
from engines import UserError
from engines.support.files import real_path
from engines.support.records import one_line
from tuning.checkpoints.find_source import named_path
from tuning.emoji.concepts import Pair
from tuning.emoji.pairs import load_pairs, some_pairs
from tuning.emoji.reader import READER, Reader, load_reader, right
from tuning.mini.data import to_tensor

__all__ = [
    "MEASURES", "Answers", "Figures", "Judge", "check_source", "difference", "distances", "draw_prompts", "shares", "tensor_of",
    "wilson",
]  # fmt: skip

MEASURES = ("concept_top1", "concept_top5", "style", "concept_and_style")
Answers = dict[str, list[bool]]
"""Of each of MEASURES, whether each picture is right."""
Figures = dict[str, dict[str, float]]
_AT_A_TIME = 50
_SUBSETS, _MOST_IN_SUBSET = 50, 100


def wilson(hits: int, of: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval (Wilson 1927) of a share: never outside 0 to 1, and of some width even where all are right."""
    share, spread = hits / of, z * z / of
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / of + spread / (4 * of)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def shares(answers: Answers) -> Figures:
    """Of each of MEASURES the share of right pictures, with how many, and its interval."""
    return {name: _figures(sum(each), len(each)) for name, each in answers.items()}


def difference(answers: Sequence[bool], others: Sequence[bool]) -> dict[str, float]:
    """By how much the share of right answers exceeds that of others about the same prompts and noise, with its interval of 95 %.

    The standard error is that of the mean of the pairs' differences.
    """
    apart = np.subtract(answers, others, dtype=float)
    mean, error = float(apart.mean()), 1.96 * float(apart.std()) / math.sqrt(len(apart))
    return {name: round(value, 4) for name, value in (("mean", mean), ("low", mean - error), ("high", mean + error))}


def _figures(hits: int, of: int) -> dict[str, float]:
    low, high = wilson(hits, of)
    return {"right": hits, "of": of, "share": round(hits / of, 4), "low": round(low, 4), "high": round(high, 4)}


@dataclass(frozen=True)
class Judge:
    """The reader of a model folder, and the pairs that the model learnt (`seen`) and did not learn (`held`)."""

    reader: Reader
    concepts: tuple[str, ...]
    styles: tuple[str, ...]
    seen: tuple[Pair, ...]
    held: tuple[Pair, ...]

    @classmethod
    def of(cls, model: Path) -> "Judge":
        """Raises TuningError where the folder has no reader, or does not say which pairs were learnt."""
        reader, concepts, styles = load_reader(model / READER)
        seen, held = load_pairs(model)
        return cls(reader, tuple(concepts), tuple(styles), tuple(seen), tuple(held))

    def asked(self, count: int, key: str = "judged") -> list[Pair]:
        """So many pairs drawn by the key, one seen and one held back in turns for as long as there are both."""
        held = some_pairs(self.held, count // 2, key)
        seen = some_pairs(self.seen, count - len(held), key)
        turns = [pair for two in zip(seen, held, strict=False) for pair in two]
        return turns + seen[len(held) :]

    def title(self, pair: Pair) -> str:
        """A pair's prompt, with a note where training never saw the pair."""
        return f"{pair.prompt} (held back)" if pair in self.held else pair.prompt

    @torch.no_grad()
    def _scores(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of concepts and of styles in pictures (n, 3, 128, 128) in [-1, 1]."""
        scored = [self.reader(part) for part in pictures.split(_AT_A_TIME)]
        return torch.cat([c for c, _ in scored]), torch.cat([s for _, s in scored])

    def agrees(self, pictures: Tensor, others: Tensor) -> list[bool]:
        """Whether the reader finds one concept in each picture (n, 3, 128, 128) in [-1, 1] and in its other, right or not."""
        return right(self._scores(pictures)[0], self._scores(others)[0].argmax(1))

    def answers(self, pictures: Tensor, pairs: Sequence[Pair]) -> Answers:
        """By measure, whether each of the pictures (n, 3, 128, 128) in [-1, 1] is right; they were asked for by these pairs."""
        concepts = torch.tensor([self.concepts.index(pair.concept) for pair in pairs])
        styles = torch.tensor([self.styles.index(pair.style) for pair in pairs])
        found = self._scores(pictures)
        first, style = right(found[0], concepts), right(found[1], styles)
        both = [a and b for a, b in zip(first, style, strict=True)]
        return dict(zip(MEASURES, (first, right(found[0], concepts, 5), style, both), strict=True))


def check_source(source: str, bundle: Path, model: Path) -> None:
    """Raises UserError where a bundle was built from another source than the model whose reader judges it."""
    if real_path(named_path(source)) != real_path(model):
        raise UserError(
            f"{bundle} was built from {one_line(source, 100)}, and the reader is that of {model}: name the bundle's model with "
            "--model, or another bundle with --bundle"
        )


def tensor_of(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures (n, 3, height, width) in [-1, 1]."""
    return to_tensor(np.stack([np.asarray(picture.convert("RGB")) for picture in pictures]))


def draw_prompts(
    bundle: Path, prompts: Sequence[str], *, plan: str | Path = "full", steps: int, guidance: float
) -> list[Image.Image]:
    """A picture of each prompt; the noise follows from its position, so that plans and variants start alike."""
    pictures: list[Image.Image] = []
    for at in range(0, len(prompts), _AT_A_TIME):
        made = runtime.generate(
            [*prompts[at : at + _AT_A_TIME]],
            steps=steps, guidance_scale=guidance, seed=at, plan=plan, bundle=bundle,
        )  # fmt: skip
        pictures += made.images
    return pictures


class _Features(nn.Module):
    """Pictures in [-1, 1] -> (n, features), as torchmetrics asks for features."""

    def __init__(self, reader: Reader) -> None:
        super().__init__()
        self.reader, self.num_features = reader, reader.concept.in_features

    def forward(self, pictures: Tensor) -> Tensor:
        return self.reader.features(pictures)


@torch.no_grad()
def distances(reader: Reader, real: Tensor, sets: Sequence[Tensor]) -> list[dict[str, float]]:
    """Of each set of pictures (n, 3, 128, 128) in [-1, 1] the distances to the real ones, in the reader's features.

    `frechet` (Heusel et al., arXiv 1706.08500) grows as a set gets smaller: compare sets of one size. `kernel` (Binkowski et al.,
    arXiv 1801.01401) does not; it is a mean over random subsets, here times 1,000.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    features = _Features(reader)
    size = min(_MOST_IN_SUBSET, len(real), *map(len, sets))
    frechet = FrechetInceptionDistance(features, reset_real_features=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it keeps all features
        kernel = KernelInceptionDistance(features, subsets=_SUBSETS, subset_size=size, reset_real_features=False)
    for part in real.split(_AT_A_TIME):
        frechet.update(part, real=True)
        kernel.update(part, real=True)
    found = []
    for some in sets:
        frechet.reset()
        kernel.reset()
        for part in some.split(_AT_A_TIME):
            frechet.update(part, real=False)
            kernel.update(part, real=False)
        torch.manual_seed(0)  # of the subsets
        near = float(kernel.compute()[0])
        found.append({"frechet": round(float(frechet.compute()), 3), "kernel": round(1000 * near, 2)})
    return found
