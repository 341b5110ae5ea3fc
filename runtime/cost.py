"""What a plan costs, in multiply-accumulates, before anything is run."""

from collections.abc import Sequence

from engines.manifest import Manifest
from runtime.demand import demand
from runtime.plan import NOISE, Step

__all__ = ["relative_macs"]


def relative_macs(schedule: Sequence[Step], manifest: Manifest) -> float:
    """MACs of the UNet segments that a schedule runs, as a share of running all of them at every step."""
    macs = {unit.name: unit.macs for unit in manifest.units}
    given = {"text_encoder"}

    def cost(inherited: frozenset[str]) -> int:
        running = demand(manifest.segments, [NOISE], inherited | given)
        return sum(macs[unit] for segment in running for unit in segment.units)

    return sum(cost(step.inherited) for step in schedule) / (cost(frozenset()) * len(schedule))
