"""``python -m exporter verify --bisect``."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from engines import Bundle, UserError, make_engine
from exporter.verification.bisect import Bisection, Culprit, bisect

__all__ = ["bisect_command"]


def bisect_command(folder: Path, engine: str, segment: str, sizes: Sequence[tuple[int, int]], console: Console) -> bool:
    """Bisect a segment, print what was found, and say whether all is within what is allowed.

    Args:
        folder: the bundle.
        engine: the name of what runs the segment.
        segment: its name.
        sizes: none or one picture size (height, width) in pixels.
        console: where to print.

    Raises:
        UserError: several sizes; and as ``bisect``.
    """
    if len(sizes) > 1:
        raise UserError(f"got {len(sizes)} sizes; --bisect looks at one, such as --sizes {sizes[0][0]}x{sizes[0][1]}")
    found = bisect(Bundle.open(folder), make_engine(engine), segment, sizes[0] if sizes else None)
    for line in _lines(found):
        console.print(line, highlight=False, soft_wrap=True)
    return found.culprit is None and max(found.graph_error, found.engine_error) <= found.setting.tolerance


def _lines(found: Bisection) -> list[str]:
    setting = found.setting
    bisected = max(deviation.error for deviation in found.outputs.values())
    return [
        f"segment {setting.segment}, {setting.height}x{setting.width}, images: {setting.images}; largest errors of its outputs, "
        f"relative to the maximum (allowed: {setting.tolerance:g})",
        f"  the ONNX file in ONNX Runtime, float32, against torch: {found.graph_error:.1e}",
        f"  the bundle's {setting.engine} against torch: {found.engine_error:.1e}",
        f"  {setting.engine}, made for this comparison, against ONNX Runtime: {bisected:.1e}",
        *_verdict(found),
    ]


def _verdict(found: Bisection) -> list[str]:
    setting, culprit = found.setting, found.culprit
    if culprit is not None:
        return [*_named(culprit), f"found in {found.runs} runs of both"]
    if found.graph_error > setting.tolerance:
        return ["the ONNX file computes something else than the model, on any engine: trace it anew with build --force"]
    if found.engine_error > setting.tolerance:
        return [
            f"only the bundle's own engine departs: it was compiled otherwise, or for another card than {setting.engine}'s here"
        ]
    return ["no layer departs"]


def _named(culprit: Culprit) -> list[str]:
    layer, read = culprit.layer, culprit.inputs
    inputs = ", ".join(f"{name} {error:.1e}" for name, error in read.items()) or "only what the segment is given"
    off = f"whose tensor {layer.tensor} is off by {culprit.deviation.error:.1e}"
    if culprit.fused_over is not None:
        return [
            f"a kernel that is fused over tensor {culprit.fused_over} is wrong: with that tensor put out, all is right",
            f"the fault shows first in {layer.name} ({layer.operator}), {off}",
        ]
    return [
        f"the first layer that departs: {layer.name} ({layer.operator}), {off}",
        f"what it reads is within what is allowed: {inputs}",
    ]
