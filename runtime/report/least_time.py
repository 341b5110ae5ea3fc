"""The least time that a plan can take on a card, from what its segments compute and move: a bound, not a promise.

A segment takes at least as long as its multiply-accumulates at the card's full rate, and as its bytes at the full speed of the
card's memory: the longer of both (the roofline model, Williams, Waterman and Patterson 2009). Segments run one after another.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from engines import DTYPES, Manifest, Segment
from engines.bundle.names import NOISE, TEXT, VAE, VAE_DECODER, VAE_ENCODER
from engines.bundle.shapes import resolve
from runtime.errors import PlanError
from runtime.plans.checks import check_runs
from runtime.plans.presets import PRESETS, find_plan
from runtime.plans.schedule import Schedule
from runtime.plans.subgraph import subgraph_for
from runtime.report.cards import Card
from runtime.report.cost import from_to, macs_of

__all__ = ["Bound", "Traffic", "border_bytes", "least_time", "weight_bytes"]

PAYS = 0.95
"""A plan that takes a larger share of the time of `full` than this, at best, is said not to pay."""
_WIDTH = {"fp32": 4, "fp16": 2, "bf16": 2}

Traffic = Callable[[Manifest, Segment, Mapping[str, int]], int]
"""Bytes of activations that a segment moves, for given values of ``batch``, ``images``, ``height`` and ``width``."""


@dataclass(frozen=True)
class Bound:
    """The least seconds of something: for its arithmetic, for its memory, and (the sum over segments of the longer) in all."""

    arithmetic: float
    memory: float
    seconds: float

    def __add__(self, other: "Bound") -> "Bound":
        return Bound(self.arithmetic + other.arithmetic, self.memory + other.memory, self.seconds + other.seconds)

    @property
    def by(self) -> str:
        """The resource that is waited for longer."""
        return "memory" if self.memory > self.arithmetic else "arithmetic"


def weight_bytes(manifest: Manifest, segment: Segment) -> int:
    """Bytes of a segment's weights, each read once."""
    parameters = sum(unit.parameters for unit in manifest.units if unit.name in segment.units)
    return parameters * _WIDTH[manifest.precision_of(segment)]


def border_bytes(manifest: Manifest, segment: Segment, sizes: Mapping[str, int]) -> int:
    """The bytes that a segment moves at least: its inputs, read once, and its outputs, written once."""
    features = (manifest.features[name] for name in (*segment.inputs, *segment.outputs))
    return sum(prod(resolve(feature.shape, sizes)) * DTYPES[feature.dtype].itemsize for feature in features)


class _Bounds:
    """The least times of segments on a card."""

    def __init__(self, card: Card, sizes: Mapping[str, int], traffic: Traffic) -> None:
        self._card, self._sizes, self._traffic = card, {"images": 1, **sizes}, traffic
        self._known: dict[tuple[str, str, bool], Bound] = {}

    def of(self, manifest: Manifest, names: Sequence[str], half: bool = False) -> Bound:
        """Of segments, one after another; with ``half``, of half of the rows."""
        for name in names:
            if (manifest.variant, name, half) not in self._known:
                self._known[manifest.variant, name, half] = self._of_segment(manifest, name, half)
        return sum((self._known[manifest.variant, name, half] for name in names), Bound(0, 0, 0))

    def _of_segment(self, manifest: Manifest, name: str, half: bool) -> Bound:
        segment, card = manifest.segment(name), self._card
        sizes = {**self._sizes, "batch": self._sizes["batch"] // 2} if half else self._sizes
        rows = 1 if VAE.issuperset(segment.units) else sizes["batch"]
        moved = self._traffic(manifest, segment, sizes) + weight_bytes(manifest, segment)
        arithmetic = 2 * rows * macs_of(manifest, [name], sizes) / card.flops(manifest.precision_of(segment))
        memory = moved / (1e9 * card.bandwidth)
        return Bound(arithmetic, memory, max(arithmetic, memory))


def least_time(
    schedule: Schedule,
    card: Card,
    sizes: Mapping[str, int],
    images: int,
    traffic: Traffic = border_bytes,
    counted: str = "",
    encodes: bool = False,
) -> tuple[Table, list[str], dict[str, Any]]:
    """The table of kinds of step with their least times; lines on the picture and on other plans; and all of it in JSON's terms.

    Steps that are decided while they run are shown as computing afresh; sums go from the least to the most. Other plans are
    compared by the least.

    Args:
        schedule: a plan laid out.
        card: where it is to run.
        sizes: ``batch`` (rows of a UNet call), and ``height`` and ``width`` of the latents.
        images: pictures of the call.
        traffic: tells the bytes of a segment's activations.
        counted: how these were counted, in words.
        encodes: whether the call starts from a picture, which the VAE encodes once.
    """
    bounds, last = _Bounds(card, sizes, traffic), schedule.unets[schedule.all_steps()[-1].unet]
    full = bounds.of(last, subgraph_for(last, frozenset({NOISE})).segment_names)
    table = Table(title=f"plan {schedule.plan.name} on a {card.name}, at best", box=SIMPLE)
    for name in ("UNet", "kind", "steps", "MACs\nms", "bytes\nms", "least\nms", "of\nfull", "bound by"):
        table.add_column(name, justify="left" if name in {"UNet", "kind", "bound by"} else "right", no_wrap=True)
    kinds = []
    for (unet, kind, _), (count, bound) in _kinds(schedule, bounds).items():
        numbers = [1000 * seconds for seconds in (bound.arithmetic, bound.memory, bound.seconds)]
        share = bound.seconds / full.seconds
        table.add_row(unet, kind, str(count), *(f"{number:.3f}" for number in numbers), f"{share:.3f}", bound.by)
        times = dict(zip(("macs_ms", "bytes_ms", "least_ms"), numbers, strict=True))
        kinds.append({"unet": unet, "kind": kind, "steps": count, **times, "of_full": share, "bound_by": bound.by})
    rest, how = _text_and_vae(last, bounds, images, encodes), _how(card, last, sizes, counted)
    unet_ms = [1e3 * _unet_time(schedule, bounds, changed) for changed in (False, True)]
    shares = _shares(schedule, bounds, full)
    told = {
        "plan": schedule.plan.name,
        "card": asdict(card),
        "kinds": kinds,
        "unet_ms": unet_ms,
        "unet_ms_of_full": 1e3 * full.seconds * schedule.steps,
        "text_and_vae_ms": 1e3 * rest.seconds,
        "other_plans_of_full": shares,
        "how": how,
    }
    parts = "text encoder and VAE" if not encodes else "text encoder and VAE (encoder and decoder)"
    return table, [_sums(unet_ms, full.seconds * schedule.steps, rest, parts), *_others(shares), how], told


def _kinds(schedule: Schedule, bounds: _Bounds) -> dict[tuple[str, str, tuple[str, ...]], tuple[int, Bound]]:
    """How many steps of each kind there are, and the least time of one; adaptive rules are taken to compute afresh."""
    found: Counter[tuple[str, str, tuple[str, ...], bool]] = Counter()
    for step in schedule.all_steps():
        names = tuple(schedule.subgraph(step).segment_names)
        found[step.unet, step.kind, names, step.half] += 1
    return {
        (unet, kind, names): (count, bounds.of(schedule.unets[unet], names, half))
        for (unet, kind, names, half), count in found.items()
    }


def _text_and_vae(manifest: Manifest, bounds: _Bounds, images: int, encodes: bool) -> Bound:
    """The text encoder, once; the VAE's decoder, picture by picture; and its encoder, once, for a call from a picture."""
    there = {name for segment in manifest.segments for name in segment.units}
    if not {TEXT, VAE_DECODER} <= there:
        return Bound(0, 0, 0)
    times = {TEXT: 1, VAE_ENCODER: int(encodes), VAE_DECODER: images}
    runs = [[segment.name] * times[unit] for unit in times for segment in manifest.segments if unit in segment.units]
    return bounds.of(manifest, [name for names in runs for name in names])


def _unet_time(schedule: Schedule, bounds: _Bounds, changed: bool) -> float:
    steps = schedule.all_steps(changed)
    return sum(bounds.of(schedule.unets[step.unet], schedule.subgraph(step).segment_names, step.half).seconds for step in steps)


def _sums(unet_ms: Sequence[float], whole: float, rest: Bound, parts: str) -> str:
    least, most = (ms / 1e3 for ms in unet_ms)
    picture, unet = (from_to(1e3 * (least + more), 1e3 * (most + more), digits=2) for more in (rest.seconds, 0.0))
    slower, faster = ((whole + rest.seconds) / (seconds + rest.seconds) for seconds in (most, least))
    return (
        f"at best {picture} ms in all: the UNet's steps {unet} ms (full: {1e3 * whole:.2f}), {parts} "
        f"{1e3 * rest.seconds:.2f} ms; {from_to(slower, faster, digits=2)} times as fast as full"
    )


def _shares(schedule: Schedule, bounds: _Bounds, full: Bound) -> dict[str, float]:
    """The least times of other plans that these segments can run, relative to ``full``."""
    shares = {preset.example: _share(preset.example, schedule, bounds, full) for preset in PRESETS.values()}
    return {name: share for name, share in shares.items() if share is not None}


def _others(shares: Mapping[str, float]) -> Iterator[str]:
    """What other plans save: where memory binds, fewer MACs are not less time."""
    pays, fails = ([f"{name} {share:.2f}" for name, share in shares.items() if (share <= PAYS) is good] for good in (True, False))
    yield f"the UNet's steps at best, full being 1: {', '.join(pays) or 'no other plan saves any'}"
    if fails:
        yield f"plans that do not pay there (above {PAYS:g}): {', '.join(fails)}"


def _share(name: str, schedule: Schedule, bounds: _Bounds, full: Bound) -> float | None:
    """A plan's least time with these UNets relative to ``full``; None where it is that, or they cannot run it."""
    if name == "full":
        return None
    try:
        other = Schedule(find_plan(name), schedule.unets, schedule.timesteps, guided=schedule.with_guidance)
        check_runs(other)
        return _unet_time(other, bounds, changed=False) / (full.seconds * schedule.steps)
    except PlanError:
        return None


def _how(card: Card, manifest: Manifest, sizes: Mapping[str, int], counted: str) -> str:
    height, width = (sizes[name] * manifest.vae_scale for name in ("height", "width"))
    rate = card.flops(manifest.precision) / 1e12
    return (
        f"a bound, not a promise: the longer of MACs at {rate:g} TFLOPS and bytes at {card.bandwidth:g} GB/s, segment by "
        f"segment, {sizes['batch']} rows at {height}x{width}, {manifest.precision}; bytes are weights and {counted}"
    )
