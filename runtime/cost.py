"""What a plan costs before anything is run: multiply-accumulates, and bytes of features."""

from collections import Counter
from collections.abc import Collection, Mapping

from engines import DTYPES
from engines.manifest import Manifest
from engines.shapes import resolve
from runtime.plan import NOISE
from runtime.schedule import Schedule
from runtime.work import Work, lay_out

__all__ = ["feature_bytes", "macs_of", "peak_bytes", "relative_macs"]


def macs_of(manifest: Manifest, segments: Collection[str]) -> int:
    """Multiply-accumulates of segments, by name, for one row at the bundle's first size."""
    macs = {unit.name: unit.macs for unit in manifest.units}
    return sum(macs[unit] for segment in manifest.segments if segment.name in segments for unit in segment.units)


def relative_macs(schedule: Schedule, full: str | None = None, changed: bool = True) -> float:
    """MACs of a schedule as a share of running all of one UNet at every step.

    Args:
        schedule: of any plan.
        full: name of the UNet to compare with; by default the last one that runs.
        changed: whether adaptive rules are taken to compute afresh at every step, or never where they may inherit.
    """
    steps = schedule.all_steps(changed)
    reference = schedule.unets[full or steps[-1].unet]
    kinds = Counter((step.unet, schedule.work(step).ran) for step in steps)
    total = sum(count * macs_of(schedule.unets[unet], ran) for (unet, ran), count in kinds.items())
    return total / (macs_of(reference, lay_out(reference, frozenset({NOISE})).ran) * len(steps))


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
        peak = max(peak, _work_peak(manifest, schedule.work(step), cached, sizes))
        cached = (cached | step.keep) & schedule.read_later(step.index)
    return peak


def _work_peak(manifest: Manifest, work: Work, cached: set[str], sizes: Mapping[str, int]) -> int:
    """Go through a step's segments as ``Network.run`` does: a feature lives from its segment to its last reader."""
    held = sum(feature_bytes(manifest, name, sizes) for name in cached)
    alive: set[str] = set()
    peak = held
    for segment, spent in zip(work.segments, work.spent, strict=True):
        alive |= set(segment.outputs)
        peak = max(peak, held + sum(feature_bytes(manifest, name, sizes) for name in alive))
        alive -= set(spent)
    return peak
