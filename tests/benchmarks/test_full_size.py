"""Benchmarks on UNets with random weights: what they time is what they say, on a UNet that is small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import partition, prompt_reuse
from benchmarks.full_size import TOKENS, features_of, measured_units, random_inputs, spread, take_turns
from exporter.measure import measure
from exporter.topology import TEXT
from tests.unets import TEXT_WIDTH, small_unet

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
    (unit,), _ = measure([Unit(name="all", kind="all", inputs=(TEXT,))], {"all": Joined()}, features, {"height": 8, "width": 8})
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


@pytest.mark.slow
def test_the_cut_bundle_and_the_files_in_one_piece_predict_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(partition, "random_unet", lambda source: small_unet("two stages"))
    arguments = ["--side", "8", "--rounds", "2", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out.json")]
    partition.main(arguments)
    written: dict[str, Any] = json.loads((tmp_path / "out.json").read_text())
    assert set(written["seconds"]) == {"whole", "full", "merged", "inherit"}
    assert set(written["ratios"]) == {"full / whole", "inherit / merged", "inherit / full"}
    assert 0 < written["settings"]["largest difference of predictions"] < 1e-3
    assert written["settings"]["segments"] == ["stem", "down.0-up.1", "up.1-head"]
    assert "full / whole" in capsys.readouterr().out
    # What was traced is found again.
    monkeypatch.setattr(partition, "random_unet", None)
    partition.main(arguments)
