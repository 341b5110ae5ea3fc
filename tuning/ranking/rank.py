"""Which units cost the most time for the least error, and a recipe chosen by it.

The paper (A-SDM, arXiv 2406.00210) prunes layers without saying how it chose them. Here: every removal's share of the UNet's
time, and the error of the prediction that it causes before any distillation, both measured; then, greedily, always the removal
with the least added error for the time it saves, errors measured anew after each, until the UNet is as fast as asked for. Among
removals that add next to nothing (see `NOTHING`) the one that saves the most time is next.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from tuning.errors import TuningError
from tuning.ranking.candidates import Candidate, gone_units, recipe_of, skeleton
from tuning.ranking.timing import UnitTimes
from tuning.ranking.trajectories import Points
from tuning.surgery.assembly import assemble
from tuning.surgery.recipes import Recipe

__all__ = ["NOTHING", "Chosen", "Errors", "Ranked", "check_names", "choose", "rank"]

NOTHING = 0.05
"""Errors below this share of the prediction's mean square are not told apart: distillation repairs far larger ones."""
_ROWS, _POSITIONS = 64, 1 << 16  # of one forward pass, at most


@dataclass(frozen=True)
class Ranked:
    """A removal with its share of the UNet's time, the spread of that, and the error it causes on its own."""

    candidate: Candidate
    share: float
    spread: float
    error: float

    @property
    def price(self) -> float:
        """Error per share of time saved."""
        return max(self.error, NOTHING) / self.share


@dataclass(frozen=True)
class Chosen:
    """One step of the selection: what goes in it, the error of all that has gone by then, and the UNet's speed-up by then."""

    name: str
    remove: tuple[str, ...]
    error: float
    speedup: float


class Errors:
    """Relative mean squared errors of the prediction: what a recipe changes, as a share of the whole UNet's mean square."""

    def __init__(self, unet: UNet2DConditionModel, points: Points) -> None:
        self._unet, self._points = unet, points
        self._expected = self._predict(unet)

    @torch.no_grad()
    def _predict(self, unet: UNet2DConditionModel) -> Tensor:
        p = self._points
        rows = min(_ROWS, max(1, _POSITIONS // p.latents[0, 0].numel()))
        parts = [slice(at, at + rows) for at in range(0, len(p), rows)]
        return torch.cat([unet(p.latents[part], p.timesteps[part], p.states[part]).sample for part in parts])

    def of(self, recipe: Recipe) -> float:
        """The error of the UNet without what the recipe removes."""
        made = self._predict(assemble(self._unet, recipe, share=True))
        return float((made - self._expected).square().mean() / self._expected.square().mean())


def check_names(found: Sequence[Candidate], times: UnitTimes, source: str, timed: str) -> None:
    """Raise TuningError unless the UNet that was timed has every unit that may go."""
    missing = sorted(unit for candidate in found for unit in candidate.units if unit not in times.shares)
    if missing:
        raise TuningError(
            f"{timed} has no {missing[0]}, which {source} has: a UNet's times hold only for one with the same units"
        )


def rank(found: Sequence[Candidate], errors: Errors, times: UnitTimes, tick: Callable[[], None] = lambda: None) -> list[Ranked]:
    """Every candidate with its time and error, cheapest error for the time first."""
    ranked = []
    for candidate in found:
        error = errors.of(recipe_of(candidate.remove))
        spread = sum(times.spreads[unit] for unit in candidate.units)
        ranked.append(Ranked(candidate, _share(candidate.units, times), spread, error))
        tick()
    return sorted(ranked, key=lambda each: each.price)


def _share(units: frozenset[str], times: UnitTimes) -> float:
    return sum(times.shares[unit] for unit in units)


def choose(
    unet: UNet2DConditionModel,
    found: Sequence[Candidate],
    errors: Errors,
    times: UnitTimes,
    speedup: float,
    tick: Callable[[str], None] = lambda name: None,
) -> list[Chosen]:
    """Removals, one after another, until the UNet is `speedup` times as fast by the times of its units.

    Raises:
        TuningError: everything that can go is gone before.
    """
    bare = skeleton(unet)
    chosen: list[Chosen] = []
    left, error, reached = list(found), 0.0, 1.0
    taken: tuple[str, ...] = ()
    gone: frozenset[str] = frozenset()
    while reached < speedup:
        options: list[tuple[float, int, Candidate, float, frozenset[str]]] = []
        fitting = list(_fitting(bare, left, taken, gone, times))
        for candidate, recipe, units, saved in fitting:
            now = errors.of(recipe)
            options.append((max(now - error, NOTHING) / saved, len(options), candidate, now, units))
            tick(f"{len(chosen)} gone, {reached:.2f}x")
        if not options:
            raise TuningError(
                f"speed-up {speedup:g}: with all removals the UNet is only {reached:.2f} times as fast; ask for less"
            )
        _, _, picked, error, gone = min(options, key=lambda option: option[:2])
        left = [candidate for candidate, *_ in fitting]  # what has gone stays away: what does not fit now never will
        taken, reached = (*taken, *picked.remove), 1 / (1 - _share(gone, times))
        chosen.append(Chosen(picked.name, picked.remove, error, reached))
    return chosen


def _fitting(
    bare: UNet2DConditionModel, left: Sequence[Candidate], taken: tuple[str, ...], gone: frozenset[str], times: UnitTimes
) -> Iterator[tuple[Candidate, Recipe, frozenset[str], float]]:
    """Candidates that can go after what is gone: with the recipe of all, its units, and the share of time that it saves more."""
    for candidate in left:
        recipe = recipe_of((*taken, *candidate.remove))
        try:
            units = gone_units(bare, recipe)
        except TuningError:
            continue
        saved = _share(units - gone, times)
        if saved > 0:
            yield candidate, recipe, units, saved
