"""What a plan costs is known before it runs: MACs, and the peak of memory for features."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from engines import Manifest
from engines.bundle.shapes import resolve
from exporter.graph.partition import Granularity
from runtime import Executor, Plan, Rule, Schedule
from runtime.execution.executor import LoadedBundle
from runtime.images.prediction_spaces import PredictionSpaces
from runtime.pipeline import Pipeline
from runtime.plans.key_steps import Uniform
from runtime.plans.presets import find_plan
from runtime.report.cost import feature_bytes, peak_bytes, relative_macs
from runtime.report.explain import explain, in_order, plot
from tests.support.unets import TEXT_WIDTH, TOKENS, shared_network

TIMESTEPS = [float(t) for t in range(900, 0, -150)]
SIZES = {"batch": 2, "height": 16, "width": 24}
VARIANTS = "assembled", "original"


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def network_for(plan: str | Plan) -> tuple[LoadedBundle, Manifest]:
    network = shared_network("uneven", "layer", plan)
    return network, network.manifest


class Counting:
    """A runner that counts the bytes of what it made, as long as anybody holds them."""

    def __init__(self, runner: Any, ledger: dict[str, int]) -> None:
        self._runner, self._ledger, self.synchronize = runner, ledger, runner.synchronize

    def run(self, inputs: Any) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = self._runner.run(inputs)
        for tensor in outputs.values():
            size = tensor.numel() * tensor.element_size()
            self._ledger["now"] += size
            weakref.finalize(tensor, self._give_back, size)
        self._ledger["peak"] = max(self._ledger["peak"], self._ledger["now"])
        return outputs

    def _give_back(self, size: int) -> None:
        self._ledger["now"] -= size


def measured_peak(schedule: Schedule, networks: dict[str, Any], samples: list[Tensor]) -> int:
    """The most bytes of features that were alive at once in a call that is given these samples."""
    ledger = {"now": 0, "peak": 0}
    counting = {
        name: LoadedBundle(network.manifest, {key: Counting(runner, ledger) for key, runner in network.runners.items()})  # type: ignore[misc]
        for name, network in networks.items()
    }
    shape = resolve(next(iter(networks.values())).manifest.features["text_encoder"].shape, {"batch": 2})
    spaces = PredictionSpaces(torch.linspace(0.99, 0.01, 1000), "epsilon")
    executor, text = Executor(counting, schedule, spaces=spaces), torch.randn(shape)
    for index, sample in enumerate(samples):
        prediction, _ = executor.step(index, sample, torch.tensor([5.0]), text)
        del prediction
    assert ledger["now"] == 0
    return ledger["peak"]


@pytest.mark.parametrize("name", ["full", "block:2", "block:3", "deepcache:2", "unit:2", "block:3+unit:2"])
def test_planned_peak_of_features_is_the_measured_one(name: str) -> None:
    plan = find_plan(name)
    network, manifest = network_for(name)
    schedule = Schedule(plan, {"one": manifest}, TIMESTEPS)
    measured = measured_peak(schedule, {"one": network}, [torch.randn(2, 4, 16, 24)] * len(TIMESTEPS))
    # Features are counted exactly, so nothing is lost but what a view may hold.
    assert measured == pytest.approx(peak_bytes(schedule, SIZES), rel=0.01)


@pytest.mark.parametrize("name", ["forecast:2", "guide:2", "skip:2", "forecast:2+guide:3", "skip:3+deepcache:2+guide:4"])
def test_planned_peak_with_forecasts_and_halves(name: str) -> None:
    """What a forecast makes, and halves put together, is counted by the plan but not here, where engines alone are watched."""
    plan = find_plan(name)
    network, manifest = network_for(name)
    schedule = Schedule(plan, {"one": manifest}, TIMESTEPS, guided=True)
    measured = measured_peak(schedule, {"one": network}, [torch.randn(2, 4, 16, 24)] * len(TIMESTEPS))
    most = sum(feature_bytes(manifest, name, SIZES) for name in schedule.subgraph(schedule.resolve(1)).cached_inputs)
    assert peak_bytes(schedule, SIZES) - most <= measured <= 1.01 * peak_bytes(schedule, SIZES)


@pytest.mark.parametrize("name", ["full", "block:2", "deepcache:3", "adaptive:0.3"])
def test_planned_peak_of_features_is_that_of_an_engine(mini_pipeline: Pipeline, name: str) -> None:
    schedule = mini_pipeline.schedule(find_plan(name), TIMESTEPS)
    samples = [torch.randn(2, 4, 8, 16) for _ in TIMESTEPS]
    measured = measured_peak(schedule, {"original": mini_pipeline.network}, samples)
    assert measured == pytest.approx(peak_bytes(schedule, {"batch": 2, "height": 8, "width": 16}), rel=0.01)


@pytest.mark.parametrize("name", ["adaptive:0.3", "adaptive:0.3+deepcache:2", "unit:3+adaptive:0.3"])
@pytest.mark.parametrize("granularity", ["layer", None])
def test_planned_peak_of_an_adaptive_plan_holds_however_it_is_decided(name: str, granularity: Granularity | None) -> None:
    """What decides a step is computed while all of the cache is held; the plan's peak is that of the dearest decisions."""
    plan, network = find_plan(name), shared_network("uneven", granularity, name)
    schedule = Schedule(plan, {"one": network.manifest}, TIMESTEPS)
    same, new = torch.randn(2, 4, 16, 24), [torch.randn(2, 4, 16, 24) for _ in TIMESTEPS]
    changing = {"never": [same] * len(new), "always": new, "at times": [new[index // 2] for index in range(len(new))]}
    measured = [measured_peak(schedule, {"one": network}, samples) for samples in changing.values()]
    assert max(measured) == pytest.approx(peak_bytes(schedule, SIZES), rel=0.01)


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("name", ["switch:0.5", "switch:0.5+block:3", "switch:0.5+adaptive:0.3"])
@pytest.mark.parametrize("models", [("no mid", "uneven"), ("uneven", "no mid")], ids=str)
def test_planned_peak_of_a_switch_is_the_measured_one(models: tuple[str, str], name: str, carry: bool) -> None:
    plan = find_plan(name).model_copy(update={"carry": carry})
    networks = {variant: shared_network(model, "layer", name) for variant, model in zip(VARIANTS, models, strict=True)}
    schedule = Schedule(plan, {variant: network.manifest for variant, network in networks.items()}, TIMESTEPS)
    same, new = torch.randn(2, 4, 16, 24), [torch.randn(2, 4, 16, 24) for _ in TIMESTEPS]
    measured = [measured_peak(schedule, networks, samples) for samples in ([same] * len(new), new)]
    assert max(measured) == pytest.approx(peak_bytes(schedule, SIZES), rel=0.01)


def test_nothing_is_held_after_the_last_step_that_reads_it() -> None:
    plan = find_plan("block:2")
    network, manifest = network_for("block:2")
    ledger = {"now": 0, "peak": 0}
    counting: Any = {key: Counting(runner, ledger) for key, runner in network.runners.items()}
    executor = Executor({"one": LoadedBundle(manifest, counting)}, Schedule(plan, {"one": manifest}, TIMESTEPS))
    sample, text = torch.randn(1, 4, 8, 8), torch.randn(1, TOKENS, TEXT_WIDTH)
    held = []
    for index in range(len(TIMESTEPS)):
        prediction, _ = executor.step(index, sample, torch.tensor([5.0]), text)
        del prediction
        held.append(ledger["now"])
    kept = 24 * 8 * 8 * 4  # up.1.sampler: channels x height x width x bytes
    assert held == [kept, 0, kept, 0, kept, 0]


def test_relative_macs_by_hand() -> None:
    plan = find_plan("deepcache:3")
    _, manifest = network_for("deepcache:3")
    schedule = Schedule(plan, {"one": manifest}, TIMESTEPS)
    macs = {unit.name: unit.macs for unit in manifest.units}
    whole = sum(macs.values())
    shallow = sum(macs[name] for name in macs if name in {"time", "stem", "head"} or name.startswith("up.2.layer.2"))
    assert relative_macs(schedule) == pytest.approx((2 * whole + 4 * shallow) / (6 * whole))
    full = Schedule(find_plan("full"), {"one": manifest}, TIMESTEPS)
    assert relative_macs(full) == 1
    assert relative_macs(Schedule(find_plan("guide:2"), {"one": manifest}, TIMESTEPS, guided=True)) == pytest.approx(0.75)
    assert relative_macs(Schedule(find_plan("guide:2"), {"one": manifest}, TIMESTEPS)) == 1
    assert relative_macs(Schedule(find_plan("skip:2"), {"one": manifest}, TIMESTEPS)) == pytest.approx(4 / 6)


def test_a_plan_is_explained_step_by_step_and_drawn(tmp_path: Path) -> None:
    plan = Plan(name="mine", rules=(Rule(units=("up.1",), when=Uniform(every=2)),))
    network, manifest = network_for(plan)
    schedule = Schedule(plan, {"one": manifest}, TIMESTEPS)
    table, summary = explain(schedule, {"one": network}, SIZES)
    assert table.row_count == 6
    kinds = list(table.columns[2].cells)
    assert kinds == ["key", "inherit"] * 3
    assert list(table.columns[4].cells) == ["", "up.1.sampler"] * 3
    assert f"over 6 steps, UNet MACs {relative_macs(schedule, sizes=SIZES):.2f} and predicted time 0." in summary
    assert "features between segments take at most" in summary
    assert "what an engine needs inside a segment comes on top" in summary
    assert drawn(schedule, tmp_path / "plan.png") >= {COMPUTED, INHERITED, SKIPPED}


def test_an_adaptive_plan_is_explained_from_the_least_to_the_most(tmp_path: Path) -> None:
    plan = find_plan("adaptive:0.3")
    network, manifest = network_for(plan)
    schedule = Schedule(plan, {"one": manifest}, TIMESTEPS)
    table, summary = explain(schedule, {"one": network}, SIZES)
    assert list(table.columns[2].cells) == ["key"] + ["as decided"] * 5
    assert f"UNet MACs {relative_macs(schedule, changed=False, sizes=SIZES):.2f} to 1.00 and predicted time 0." in summary
    assert " to 1.00 of full; " in summary
    assert summary.endswith("steps of kind 'as decided' are shown as key steps, and may inherit")
    assert drawn(schedule, tmp_path / "plan.png") >= {COMPUTED, DECIDED}


COMPUTED, INHERITED, SKIPPED, DECIDED = (0x2F, 0x66, 0x90), (0xF2, 0xB1, 0x34), (0xE8, 0xE8, 0xE8), (0x7F, 0xB0, 0x69)


def drawn(schedule: Schedule, path: Path) -> set[Any]:
    """The colours in a plan's picture."""
    plot(schedule, path)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return {colour for _, colour in picture.convert("RGB").getcolors(1 << 20) or []}


def test_units_of_two_unets_stand_in_their_order() -> None:
    small, large = ["stem", "down.0", "up.0.attention", "up.1", "head"], ["stem", "down.0", "down.1", "up.0", "up.1", "head"]
    expected = ["stem", "down.0", "up.0.attention", "down.1", "up.0", "up.1", "head"]
    assert in_order([small, large]) == in_order([large, small]) == expected
    assert in_order([small]) == small
