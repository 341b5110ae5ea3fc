"""What a plan costs before anything is run: multiply-accumulates, and bytes of features."""

from collections.abc import Mapping
from functools import cache

from engines import DTYPES
from engines.manifest import Manifest
from engines.shapes import resolve
from runtime.demand import demand
from runtime.schedule import TEXT, Schedule, Step

__all__ = ["feature_bytes", "peak_bytes", "relative_macs", "step_macs"]


def step_macs(manifest: Manifest, step: Step) -> int:
    """Multiply-accumulates of the segments that a step runs, for one row at the bundle's first size."""
    macs = {unit.name: unit.macs for unit in manifest.units}
    running = demand(manifest.segments, step.wanted, step.inherited | {TEXT})
    return sum(macs[unit] for segment in running for unit in segment.units)


def relative_macs(schedule: Schedule, full: str | None = None) -> float:
    """MACs of a schedule as a share of running all of one UNet at every step.

    Args:
        schedule: adaptive rules are taken to compute afresh at every step.
        full: name of the UNet to compare with; by default the last one that runs.
    """
    steps = schedule.all_steps()
    reference = schedule.unets[full or steps[-1].unet]

    @cache
    def cost(unet: str, inherited: frozenset[str], keep: frozenset[str]) -> int:
        return step_macs(schedule.unets[unet], Step(0, unet, True, inherited, keep))

    whole = step_macs(reference, Step(0, "", True))
    return sum(cost(step.unet, step.inherited, step.keep) for step in steps) / (whole * len(steps))


def feature_bytes(manifest: Manifest, name: str, sizes: Mapping[str, int]) -> int:
    """Size of a feature, for given values of ``batch``, ``height`` and ``width``."""
    feature = manifest.features[name]
    count = DTYPES[feature.dtype].itemsize
    for side in resolve(feature.shape, sizes):
        count *= side
    return count


def peak_bytes(schedule: Schedule, sizes: Mapping[str, int]) -> int:
    """The most bytes of features, cached ones included, that are alive at once between the segments of any step.

    What an engine needs inside a segment comes on top of it. Graph inputs (latents, text) are not counted.
    """
    cached: set[str] = set()
    peak = 0
    for step in schedule.all_steps():
        manifest = schedule.unets[step.unet]
        cached -= step.keep
        peak = max(peak, _step_peak(manifest, step, cached, sizes))
        cached = (cached | step.keep) & schedule.read_later(step.index)
    return peak


def _step_peak(manifest: Manifest, step: Step, cached: set[str], sizes: Mapping[str, int]) -> int:
    """Walk a step's segments as ``Network.run`` does: a feature lives from its segment to its last reader."""
    running = demand(manifest.segments, step.wanted, step.inherited | {TEXT})
    last_read = {name: segment.name for segment in running for name in segment.inputs}
    held = sum(feature_bytes(manifest, name, sizes) for name in cached)
    alive: set[str] = set()
    peak = held
    for segment in running:
        alive |= set(segment.outputs)
        peak = max(peak, held + sum(feature_bytes(manifest, name, sizes) for name in alive))
        alive = {name for name in alive if name in step.wanted or last_read.get(name, segment.name) != segment.name}
    return peak
