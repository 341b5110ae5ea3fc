"""How the bytes that segments move are counted: from the kernels that TensorRT-RTX makes of them, or else from their borders."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from engines import Bundle, EngineError, Manifest, Profile, Segment, Traced, make_engine
from engines.bundle.shapes import resolve
from engines.onnx_file import checked_onnx
from runtime.plans.schedule import Schedule
from runtime.report.cards import Card
from runtime.report.least_time import Traffic, border_bytes, least_time

__all__ = ["at_best", "traffic_for"]

_ENGINE = "tensorrt-rtx"
_BORDERS = "each segment's own inputs and outputs, moved once"


class _Uncountable(Exception):
    """The compiler makes nothing of a segment for the card; says why, in words."""


def at_best(
    schedule: Schedule, bundles: Mapping[str, Bundle], card: Card, sizes: Mapping[str, int], images: int, *, encodes: bool = False
) -> tuple[Table, list[str], dict[str, Any]]:
    """The least time of a plan on a card, with bytes as ``traffic_for`` counts them.

    Where the compiler refuses a segment for the card, such as one in single precision for a T4, all segments are counted by
    their borders: sums of both kinds would compare nothing.

    Args:
        schedule: a plan laid out.
        bundles: by the name of their UNet.
        card: where it is to run.
        sizes: ``batch`` (rows of a UNet call), and ``height`` and ``width`` of the latents.
        images: pictures of the call.
        encodes: whether the call starts from a picture.
    """
    traffic, counted = traffic_for(bundles, card)
    try:
        return least_time(schedule, card, sizes, images, traffic, counted, encodes)
    except _Uncountable as error:
        counted = f"{_BORDERS} (kernels cannot be counted: {error})"
        return least_time(schedule, card, sizes, images, border_bytes, counted, encodes)


def traffic_for(bundles: Mapping[str, Bundle], card: Card) -> tuple[Traffic, str]:
    """A function that tells the bytes of a segment's activations on a card, and how, in words.

    With TensorRT-RTX engines in the bundles, segments are compiled for the card and their kernels counted, which takes seconds
    for each and no GPU. Without, or where the compiler does not know the card, they are what no engine can do without.

    Args:
        bundles: by the name of their UNet.
        card: whose kernels.
    """
    if not all(_ENGINE in segment.engines for bundle in bundles.values() for segment in bundle.manifest.segments):
        return border_bytes, f"{_BORDERS} (the bundle has no {_ENGINE} engines whose kernels could be counted)"
    try:
        engine: Any = make_engine(_ENGINE)
        targets = engine.check_targets((card.target,))
    except EngineError as error:
        return border_bytes, f"{_BORDERS} (kernels cannot be counted: {error.line})"

    def count(manifest: Manifest, segment: Segment, sizes: Mapping[str, int]) -> int:
        path = checked_onnx(bundles[manifest.variant], segment.onnx)
        shapes = {name: resolve(manifest.features[name].shape, sizes) for name in segment.inputs}
        try:
            moved: int = engine.kernels(Traced(segment, path), Profile(shapes, shapes, shapes), targets).bytes_moved
        except EngineError as error:
            raise _Uncountable(error.line) from error
        except ValueError as error:
            raise _Uncountable(f"segment {segment.name}: {error}") from error
        return moved

    return count, f"what all kernels of {_ENGINE} {engine.version()} read and write of activations, with no help from caches"
