"""The least time of a plan on a card, against sums by hand; cards by their names; where bytes are counted from."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from engines import Bundle, EngineError, Manifest, Segment
from engines.bundle.manifest import Compiled
from engines.tensorrt.engine import TensorRTRTX
from engines.tensorrt.kernels import CompiledKernels, Kernel
from runtime import RequestError, Schedule
from runtime.plans.presets import find_plan
from runtime.report import traffic
from runtime.report.cards import CARDS, Card, find_card
from runtime.report.least_time import border_bytes, least_time, weight_bytes
from runtime.report.traffic import at_best, traffic_for
from tests.support.unets import manifest_of, small_unet

SIZES = {"batch": 2, "height": 8, "width": 8}
TIMESTEPS = [float(t) for t in range(900, 0, -150)]
CARD = Card("made-up", "sm89", bandwidth=1.0, half=2.0, single=0.01)


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return manifest_of(small_unet("two stages"))


def by_hand(manifest: Manifest, segment: Segment) -> float:
    """A segment in float32: two rows at the bundle's own size."""
    units = [unit for unit in manifest.units if unit.name in segment.units]
    shapes = {"batch": 2, "height": 8, "width": 8, "height/2": 4, "width/2": 4}
    numbers = sum(unit.parameters for unit in units)
    for name in (*segment.inputs, *segment.outputs):
        count = 1
        for dim in manifest.features[name].shape:
            count *= dim if isinstance(dim, int) else shapes[dim]
        numbers += count
    return max(2 * 2 * sum(unit.macs for unit in units) / 0.01e12, 4 * numbers / 1e9)


def test_times_are_those_by_hand(manifest: Manifest) -> None:
    schedule = Schedule(find_plan("deepcache:3"), {"original": manifest}, TIMESTEPS)
    table, lines, _ = least_time(schedule, CARD, SIZES, images=1)
    assert table.row_count == 2
    kind, count, least, share = (list(table.columns[number].cells) for number in (1, 2, 5, 6))
    assert (kind, count) == (["key", "inherit"], ["2", "4"])
    seconds = [sum(by_hand(manifest, segment) for segment in schedule.subgraph(step).segments) for step in schedule.all_steps()]
    assert least == [f"{1000 * seconds[0]:.3f}", f"{1000 * seconds[1]:.3f}"]
    assert share == ["1.000", f"{seconds[1] / seconds[0]:.3f}"]
    assert lines[0].startswith(f"at best {1000 * sum(seconds):.2f} ms in all")
    assert lines[0].endswith(f"{6 * seconds[0] / sum(seconds):.2f} times as fast as full")


def test_what_binds_and_which_plans_stop_paying(manifest: Manifest) -> None:
    schedule = Schedule(find_plan("block:3"), {"original": manifest}, TIMESTEPS)
    slow_memory, slow_arithmetic = Card("m", "sm89", 1e-3, 1e6, 1e6), Card("a", "sm89", 1e6, 1e-3, 1e-3)
    for card, bound in ((slow_memory, "memory"), (slow_arithmetic, "arithmetic")):
        table, lines, _ = least_time(schedule, card, SIZES, images=1)
        assert set(table.columns[7].cells) == {bound}
        assert "block:3 0." in lines[1]

    def outermost(manifest: Manifest, segment: Segment, sizes: Any) -> int:
        """All bytes are moved where every plan has to compute."""
        return 10**9 if "head" in segment.units else 0

    _, lines, _ = least_time(schedule, slow_memory, SIZES, images=1, traffic=outermost)
    assert lines[2].startswith("plans that do not pay there (above 0.95): block:3 1.00")


def test_cards_are_known_by_their_names() -> None:
    assert find_card("RTX 4090") is find_card("rtx4090")
    assert len({card.name for card in CARDS}) == len(CARDS) >= 10
    with pytest.raises(RequestError, match=r"unknown card 'rtx9090'; choose one of rtx2080ti, .*h100"):
        find_card("rtx9090")
    card = find_card("rtx4090")
    assert (card.flops("fp16"), card.flops("bf16"), card.flops("fp32")) == (330.3e12, 330.3e12, 82.6e12)


def test_weights_count_in_their_precision(manifest: Manifest) -> None:
    segment = manifest.unet_segments[0]
    half = manifest.model_copy(update={"precision": "fp16"})
    assert weight_bytes(manifest, segment) == 2 * weight_bytes(half, segment) > 0


class Compiler(TensorRTRTX):
    """TensorRT-RTX without its package: every segment becomes one kernel of 30 bytes."""

    def __init__(self) -> None:
        pass

    def check_targets(self, targets: Any) -> tuple[str, ...]:
        if targets == ("sm90",):
            raise EngineError("sm90 is unknown")
        return tuple(targets)

    def kernels(self, traced: Any, profile: Any, targets: Any) -> CompiledKernels:
        assert targets == ("sm89",)
        assert all(isinstance(side, int) for shape in profile.optimum.values() for side in shape)
        return CompiledKernels((Kernel("k", "kgen", 10, 20, frozenset()),), 0)

    def version(self) -> str:
        return "1.7"


def test_kernels_are_counted_where_there_are_engines(manifest: Manifest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(traffic, "make_engine", lambda name: Compiler())
    found, how = traffic_for({"original": Bundle(tmp_path, manifest)}, CARD)
    assert found is border_bytes
    assert "has no tensorrt-rtx engines" in how

    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], [])), tmp_path / "file")
    compiled = {"tensorrt-rtx": Compiled(files=(), version="1.7")}
    segments = tuple(segment.model_copy(update={"engines": compiled, "onnx": ("file",)}) for segment in manifest.segments)
    bundle = SimpleNamespace(manifest=manifest.model_copy(update={"segments": segments}), path=lambda file: tmp_path / file)
    found, how = traffic_for({"original": bundle}, CARD)  # type: ignore[dict-item]
    assert found(bundle.manifest, segments[0], SIZES) == 30
    assert "kernels of tensorrt-rtx 1.7" in how
    found, how = traffic_for({"original": bundle}, find_card("h100"))  # type: ignore[dict-item]
    assert found is border_bytes
    assert "sm90 is unknown" in how


def test_a_card_that_the_compiler_refuses_a_segment_for(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All bytes are then those of the borders: of one kind, and said so."""
    refused = iter((30, None))

    def kernels(engine: Compiler, traced: Any, profile: Any, targets: Any) -> CompiledKernels:
        if next(refused, None) is None:
            raise EngineError("segment down.0: it cannot build it\nfor sm75")
        return CompiledKernels((Kernel("k", "kgen", 10, 20, frozenset()),), 0)

    monkeypatch.setattr(Compiler, "kernels", kernels)
    monkeypatch.setattr(traffic, "make_engine", lambda name: Compiler())
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setattr(traffic, "checked_onnx", lambda bundle, files: tmp_path / "file")
    compiled = {"tensorrt-rtx": Compiled(files=(), version="1.7")}
    segments = tuple(segment.model_copy(update={"engines": compiled}) for segment in manifest.segments)
    bundle = Bundle(tmp_path, manifest.model_copy(update={"segments": segments}))
    schedule = Schedule(find_plan("deepcache:3"), {"original": bundle.manifest}, TIMESTEPS)
    _, lines, told = at_best(schedule, {"original": bundle}, find_card("t4"), SIZES, 1)
    _, expected, _ = least_time(schedule, find_card("t4"), SIZES, 1)
    assert lines[:-1] == expected[:-1]
    assert "own inputs and outputs, moved once (kernels cannot be counted: segment down.0: it cannot build it" in lines[-1]
    assert told["how"] == lines[-1]
    assert "\n" not in lines[-1]
