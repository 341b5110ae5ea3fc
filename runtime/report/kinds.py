"""The steps of a call summed up by kind: how many there were, what they ran, and how long one took."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from runtime.execution.executor import LoadedBundle, StepRecord
from runtime.report.explain import listed

__all__ = ["Kind", "kinds_of", "segment_counts"]


@dataclass(frozen=True)
class Kind:
    """Steps that ran the same segments of the same UNet; ``steps`` are their numbers, ``milliseconds`` the median of one."""

    unet: str
    name: str
    steps: tuple[int, ...]
    ran: tuple[str, ...]
    inherited: tuple[str, ...]
    milliseconds: float

    @property
    def count(self) -> int:
        """How many steps are of this kind."""
        return len(self.steps)

    def segments(self, of: int) -> str:
        """Which segments ran, of so many: by name where they are few."""
        if len(self.ran) == of:
            return f"all {of}"
        return f"{len(self.ran)} of {of}: {listed(self.ran)}" if len(self.ran) <= 5 else f"{len(self.ran)} of {of}"


def segment_counts(networks: Mapping[str, LoadedBundle]) -> dict[str, int]:
    """Of each UNet that is loaded, how many segments it has."""
    return {name: len(loaded.manifest.unet_segments) for name, loaded in networks.items()}


def kinds_of(records: Sequence[StepRecord]) -> list[Kind]:
    """The kinds of step of a call, in the order in which they first came. On a GPU this waits until the steps have been done."""
    groups: dict[tuple[str, str, tuple[str, ...], tuple[str, ...]], list[StepRecord]] = {}
    for record in records:
        groups.setdefault((record.unet, record.kind, record.ran, record.inherited), []).append(record)
    return [
        Kind(unet, kind, tuple(record.index for record in group), ran, inherited, _median(group))
        for (unet, kind, ran, inherited), group in groups.items()
    ]


def _median(records: Sequence[StepRecord]) -> float:
    return 1000 * statistics.median(record.seconds for record in records)
