"""The cost of a plan before anything is run: multiply-accumulates, and bytes of features."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from functools import cache, partial

from engines import DTYPES
from engines.bundle.manifest import Manifest
from engines.bundle.names import NOISE
from engines.bundle.shapes import resolve
from runtime.plans.retention import Retention
from runtime.plans.schedule import Schedule, Step
from runtime.plans.subgraph import Subgraph, subgraph_for

__all__ = ["feature_bytes", "from_to", "full_macs", "macs_of", "peak_bytes", "relative_macs", "share_of_rows"]


def macs_of(manifest: Manifest, segments: Collection[str], sizes: Mapping[str, int] | None = None) -> float:
    """Multiply-accumulates of segments, by name, for one row; at ``height`` and ``width`` of the latents, or the first size."""
    area = 1.0
    if sizes is not None:
        height, width = (side // manifest.vae_scale for side in manifest.sizes[0])
        area = sizes["height"] * sizes["width"] / (height * width)
    macs = {unit.name: unit.macs_at(area) for unit in manifest.units}
    return sum(macs[unit] for segment in manifest.segments if segment.name in segments for unit in segment.units)


def full_macs(manifest: Manifest, sizes: Mapping[str, int] | None = None) -> float:
    """Multiply-accumulates of a step that runs all of the UNet, for one row; sizes as ``macs_of``."""
    return macs_of(manifest, subgraph_for(manifest, frozenset({NOISE})).segment_names, sizes)


def relative_macs(
    schedule: Schedule, full: str | None = None, changed: bool = True, sizes: Mapping[str, int] | None = None
) -> float:
    """MACs of a schedule as a share of running all of one UNet at every step.

    Args:
        schedule: of any plan.
        full: name of the UNet to compare with; by default the last one that runs.
        changed: whether adaptive rules are taken to compute afresh at every step, or never where they may inherit.
        sizes: ``height`` and ``width`` of the latents; by default those of each bundle's first size.
    """
    steps = schedule.all_steps(changed)
    reference = schedule.unets[full or steps[-1].unet]
    kinds = Counter((step.unet, schedule.subgraph(step).segment_names, step.half) for step in steps)
    total = sum(
        count * share_of_rows(half) * macs_of(schedule.unets[unet], ran, sizes) for (unet, ran, half), count in kinds.items()
    )
    return total / (full_macs(reference, sizes) * len(steps))


def share_of_rows(half: bool) -> float:
    """Of the rows of a step with guidance, those that it evaluates."""
    return 0.5 if half else 1.0


def from_to(least: float, most: float, digits: int = 3) -> str:
    """A range as tables have it; one number where both ends are written alike."""
    texts = f"{least:.{digits}f}", f"{most:.{digits}f}"
    return texts[0] if texts[0] == texts[1] else " to ".join(texts)


def feature_bytes(manifest: Manifest, name: str, sizes: Mapping[str, int]) -> int:
    """Size of a feature, for given values of ``batch``, ``height`` and ``width``."""
    feature = manifest.features[name]
    count = DTYPES[feature.dtype].itemsize
    for side in resolve(feature.shape, sizes):
        count *= side
    return count


def peak_bytes(schedule: Schedule, sizes: Mapping[str, int]) -> int:
    """The most bytes of features, cached ones included, that are alive at once between the segments of any step.

    Where a step is decided while it runs, it is the more of both. What an engine needs inside a segment comes on top of it. Graph
    inputs (latents, text) are not counted.
    """
    cached, peak = Retention[int](schedule), 0

    @cache  # asked for thousands of times, of some hundred features
    def bytes_of(unet: str, name: str, half: bool) -> int:
        rows = {**sizes, "batch": sizes["batch"] // 2} if half else sizes
        return feature_bytes(schedule.unets[unet], name, rows)

    for index in range(schedule.steps):
        decisions = [schedule.resolve(index, changed) for changed in (False, True)]
        size = partial(_bytes_in_step, schedule, decisions[0], bytes_of)
        made, probed = _made_by_probe(schedule, index, size)
        peak = max(peak, _total(cached) + probed)
        for step in decisions if decisions[0] != decisions[1] else decisions[:1]:
            # What a step refreshes is freed as soon as the step is resolved.
            during = cached.copy()
            during.make_room(step)
            subgraph = schedule.subgraph(step, made)
            put_together = sum(size(name) for name in subgraph.cached_inputs if during.is_made(step, name))
            peak = max(peak, _total(during) + put_together + _subgraph_peak(subgraph, made, size))
        key = decisions[-1]
        cached.make_room(key)
        for name in key.keep | decisions[0].keep:
            cached.add(key, name, size(name))
        cached.end(index)
    return peak


def _total(cached: Retention[int]) -> int:
    return sum(entry.value for _, entry in cached)


def _bytes_in_step(schedule: Schedule, step: Step, bytes_of: Callable[[str, str, bool], int], name: str) -> int:
    """Size of a feature with the rows that a step evaluates."""
    return bytes_of(step.unet, name, schedule.is_half(step, name))


def _made_by_probe(schedule: Schedule, index: int, size: Callable[[str], int]) -> tuple[frozenset[str], int]:
    """The features that a step has made when it is resolved, and their bytes: none is freed before."""
    threshold = schedule.pending_threshold(index)
    if threshold is None:
        return frozenset(), 0
    segments = schedule.probe(index, threshold).segments
    probed = frozenset(name for segment in segments for name in segment.outputs)
    made = probed.union(*(segment.outputs for segment in schedule.common_prefix(index, probed)))
    return made, sum(map(size, made))


def _subgraph_peak(subgraph: Subgraph, made: frozenset[str], size: Callable[[str], int]) -> int:
    """Go through a step's segments as ``LoadedBundle.run`` does: a feature lives from its segment to its last reader."""
    alive = set(made)
    peak = sum(map(size, alive))
    for segment, freed in zip(subgraph.segments, subgraph.frees, strict=True):
        alive |= set(segment.outputs)
        peak = max(peak, sum(map(size, alive)))
        alive -= set(freed)
    return peak
