"""Benchmarks on UNets with random weights: what they time is what they say, on a UNet that is small."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.speed import full_size, onnx_runtime, partition, prompt_reuse
from benchmarks.speed.full_size import TOKENS, export, features_of, measured_units, random_inputs, spread, take_turns
from engines import Segment, make_engine
from engines.bundle.manifest import Feature
from engines.bundle.names import TEXT
from engines.ort.engine import OnnxRuntime
from exporter.graph.shapes_and_macs import infer_shapes_and_macs
from exporter.segments.trace import trace
from tests.support.unets import TEXT_WIDTH, small_unet

SIZES = {"batch": 2, "height": 8, "width": 8}


def test_keys_and_values_are_those_of_every_cross_attention() -> None:
    unet = small_unet("uneven")
    module = prompt_reuse.KeysAndValues(unet)
    text = torch.randn(2, TOKENS, TEXT_WIDTH)
    seen: list[torch.Tensor] = []
    names = [f"{name}.{part}" for name, _ in unet.named_modules() if name.endswith("attn2") for part in ("to_k", "to_v")]
    handles = [unet.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(output)) for name in names]
    with torch.no_grad():
        made = module(text)
        seen.clear()
        unet(torch.randn(2, 4, 8, 8), 500, encoder_hidden_states=text)
    for handle in handles:
        handle.remove()
    # In another order, but all of them.
    assert len(made) == len(seen) == 2 * 9
    found = sorted((tuple(t.shape), round(float(t.sum()), 3)) for t in made)
    assert found == sorted((tuple(t.shape), round(float(t.sum()), 3)) for t in seen)


def test_macs_of_the_projections_are_those_that_are_counted() -> None:
    from engines import Unit

    module = prompt_reuse.KeysAndValues(small_unet("uneven"))

    class Joined(torch.nn.Module):
        def forward(self, text: torch.Tensor) -> torch.Tensor:
            return torch.cat([tensor.flatten() for tensor in module(text)])[None]

    features = {TEXT: features_of(small_unet("uneven"))[TEXT]}
    (unit,), _ = infer_shapes_and_macs(
        [Unit(name="all", kind="all", inputs=(TEXT,))], {"all": Joined()}, features, {"height": 8, "width": 8}
    )
    assert module.macs() == unit.macs


def test_units_that_are_alike_are_counted_together() -> None:
    units, features, _ = measured_units(small_unet("uneven"), 8)
    counts = prompt_reuse.alike(units, features, SIZES)
    assert sum(counts.values()) == len(units)
    assert len(counts) < len(units)
    by_name = {unit.name: unit for unit in units}
    total = sum(count * by_name[name].macs for name, count in counts.items())
    assert total == sum(unit.macs for unit in units)


def test_turns_are_taken_and_the_first_round_does_not_count() -> None:
    calls: list[str] = []
    seconds = take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b"] * 3
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0}


def test_random_inputs_have_the_shapes_of_features() -> None:
    inputs = random_inputs(("sample", "timestep", TEXT), features_of(small_unet("uneven")), SIZES)
    assert {name: tuple(tensor.shape) for name, tensor in inputs.items()} == {
        "sample": (2, 4, 8, 8), "timestep": (1,), TEXT: (2, TOKENS, TEXT_WIDTH)
    }  # fmt: skip
    assert inputs["timestep"].item() == 500


class Twice(torch.nn.Module):
    def forward(self, *features: torch.Tensor) -> tuple[torch.Tensor]:
        return (2 * features[0],)


def test_segments_that_are_traced_are_not_traced_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unet, names = small_unet("uneven"), ("sample", "two", "four", "eight")
    features = dict.fromkeys(names, Feature(dtype="float32", shape=("batch", 4, "height", "width")))
    parts = [(Segment(name=b, units=(), inputs=(a,), outputs=(b,)), Twice()) for a, b in pairwise(names)]
    traced: list[str] = []

    def failing(segment: Segment, *rest: Any) -> object:
        traced.append(segment.name)
        if traced == ["two", "four"]:
            rest[-1].write_text("half a fi")
            raise KeyboardInterrupt
        return trace(segment, *rest)

    monkeypatch.setattr(full_size, "trace", failing)
    with pytest.raises(KeyboardInterrupt):
        export(tmp_path / "bundle", unet, parts, (), features)
    assert {path.name for path in (tmp_path / "bundle" / "segments").iterdir()} == {"two.onnx", "two.onnx.data"}
    bundle = export(tmp_path / "bundle", unet, parts, (), features)
    assert traced == ["two", "four", "four", "eight"]
    x = torch.randn(1, 4, 8, 8)
    assert torch.equal(make_engine("onnxruntime").load(bundle, bundle.manifest.segment("eight")).run({"four": x})["eight"], 2 * x)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the traced files of both benchmarks, of a small UNet in the place of SD 1.5's, with attention at its ends."""
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partition, "random_unet", lambda source: small_unet("two stages", mid_block_type=None))
        partition.make_bundles("random:sd15", 8, folder / "sd15")
    return folder


@pytest.mark.slow
def test_the_cut_bundle_and_the_files_in_one_piece_predict_the_same(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    partition.main(["--side", "8", "--rounds", "2", "--work", str(work), "--out", str(tmp_path / "out.json")])
    written: dict[str, Any] = json.loads((tmp_path / "out.json").read_text())
    assert set(written["seconds"]) == {"whole", "full", "merged", "inherit"}
    assert set(written["ratios"]) == {"full / whole", "inherit / merged", "inherit / full"}
    assert 0 < written["settings"]["largest difference of predictions"] < 1e-3
    assert written["settings"]["segments"] == ["stem", "down.0-up.1", "up.1-head"]
    assert "full / whole" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("warm_commands")
def test_settings_of_onnx_runtime(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = {name: onnx_runtime.SETTINGS[name] for name in ("as traced, no arena", "the same, one pool")}
    monkeypatch.setattr(onnx_runtime, "SETTINGS", chosen)
    arguments = ["--side", "8", "--rounds", "2", "--processes", "1", "--work", str(work), "--out", str(tmp_path / "out.json")]
    onnx_runtime.main(arguments)
    written: dict[str, Any] = json.loads((tmp_path / "out.json").read_text())
    assert {latents: list(group) for latents, group in written["latents"].items()} == {
        "8x8": list(chosen), "16x16": ["as traced, no arena"]
    }  # fmt: skip
    for name, figures in written["latents"]["8x8"].items():
        assert figures["clock"] == ("process_time" if chosen[name].threads == 1 else "perf_counter")
        assert figures["seconds"]["chain"]["median"] > 0
        assert 0 < figures["chain / whole"]["low"] <= figures["chain / whole"]["median"]
        assert 0.1 < figures["gigabytes"] < 4
    assert "the same, one pool" in capsys.readouterr().out


def test_the_engine_has_the_settings_that_are_said_to_be_its_own() -> None:
    own, same = OnnxRuntime(1)._options(), onnx_runtime._Engine(onnx_runtime.SETTINGS["fused, shared arena"])._options()
    assert own.use_per_session_threads == same.use_per_session_threads
    assert own.enable_mem_pattern == same.enable_mem_pattern
    for key in ("session.use_env_allocators", "session.intra_op.allow_spinning"):
        assert own.get_session_config_entry(key) == same.get_session_config_entry(key)
