"""Transformers cut into parts: the same arithmetic, weights and MACs as in one piece, and only where a plan asks for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from engines import Bundle, make_engine
from exporter import BuildOptions, SourceError, build, topology, verify
from exporter.graph.attention_parts import asks_for_parts
from exporter.graph.unit_modules import paths_of, unit_module
from runtime import Plan, Rule, find_plan
from runtime.plans.key_steps import Explicit, Threshold
from tests.support.sources import save_source
from tests.support.unets import TEXT_WIDTH, TOKENS, manifest_of, relative_error, small_unet

PARTS = ("input", "self.branch", "self", "cross.branch", "cross", "branch")


@pytest.mark.parametrize("linear", [False, True])
def test_the_parts_of_a_transformer_are_the_whole(linear: bool) -> None:
    unet = small_unet("two stages", use_linear_projection=linear)
    whole = [unit for unit in topology(unet) if unit.name.endswith(".attention.branch")]
    torch.manual_seed(3)
    for unit in whole:
        parts = [part for part in topology(unet, in_parts=True) if part.name.startswith(unit.name.removesuffix("branch"))]
        assert [part.name for part in parts] == [unit.name.removesuffix("branch") + part for part in PARTS]
        x = torch.randn(2, unet.get_submodule(paths_of(unet, unit.name)[0]).in_channels, 4, 6)
        features = {unit.inputs[0]: x, "text_encoder": torch.randn(2, TOKENS, TEXT_WIDTH)}
        with torch.no_grad():
            expected = unit_module(unet, unit.name)(x, features["text_encoder"])
            for part in parts:
                features[part.name] = unit_module(unet, part.name, in_parts=True)(*(features[name] for name in part.inputs))
        assert relative_error(features[unit.name], expected) < 1e-6  # the same operations, some on transposed memory


def test_parts_have_the_weights_and_macs_of_the_whole() -> None:
    unet = small_unet("uneven")
    whole, parts = (manifest_of(unet, plans=["block:2", plan]) for plan in ("deepcache:2", "tgate:0.5"))
    owned = [
        id(weight)
        for unit in topology(unet, in_parts=True)
        for weight in unit_module(unet, unit.name, in_parts=True).parameters()
    ]
    assert sorted(owned) == sorted(map(id, unet.parameters())), "every weight is in one unit"
    for field in ("macs", "macs_fixed", "macs_quadratic", "parameters"):
        sums = [sum(getattr(unit, field) for unit in manifest.units) for manifest in (whole, parts)]
        assert sums[0] == sums[1], field
    kinds = {field: {unit.kind for unit in parts.units if getattr(unit, field)} for field in ("macs_fixed", "macs_quadratic")}
    assert kinds == {
        "macs_fixed": {"time", "resnet branch", "cross-attention branch"},
        "macs_quadratic": {"self-attention branch"},
    }
    assert all(parts.features[name] == feature for name, feature in whole.features.items()), "features keep names and shapes"


def test_every_weight_of_a_part_is_under_its_paths() -> None:
    unet = small_unet("two stages")
    for unit in topology(unet, in_parts=True):
        paths = paths_of(unet, unit.name, in_parts=True)
        inside = {id(weight) for path in paths for weight in unet.get_submodule(path).parameters()}
        own = {id(weight) for weight in unit_module(unet, unit.name, in_parts=True).parameters()}
        assert own <= inside
        assert own == inside or not unit.name.startswith("down.0.layer.0.attention."), "no more is read than is needed"


UNITS = tuple(unit.name for unit in topology(small_unet("two stages")))
ASKING = {
    "tgate:0.4": True,
    "full": False,
    "unit:2+deepcache:3": False,
    "*.attention": False,
    "*": False,
    "*.branch": False,
    "*.attention.self": True,
    "up.*.attention.cross.branch": True,
    "down.0.layer.0.attention.input": True,
    "down.7.layer.0.attention.input": False,
    # Counted among all blocks, of which the first on the way up and the last on the way down have no attention.
    "up.-1.layer.0.attention.cross": True,
    "up.-2.layer.0.attention.cross": False,
    "down.-1.layer.0.attention.cross": False,
}


@pytest.mark.parametrize("name", list(ASKING))
def test_only_plans_that_name_a_part_ask_for_parts(name: str) -> None:
    given = find_plan(name) if name[0].isalpha() and not name.startswith("up") and not name.startswith("down") else None
    plan = given or Plan(name="own", rules=(Rule(units=(name,), when=Explicit(steps=(0,))),))
    assert asks_for_parts([find_plan("block:2"), plan], UNITS) is ASKING[name]


def test_an_adaptive_rule_may_compare_a_part() -> None:
    when = Threshold(above=0.1, feature="down.0.layer.0.attention.self")
    plan = Plan(name="own", rules=(Rule(units=("up.-2",), when=when),))
    assert asks_for_parts([plan], UNITS)
    given_out = {name for segment in manifest_of(small_unet("two stages"), plans=[plan]).segments for name in segment.outputs}
    assert when.feature in given_out


@pytest.mark.parametrize("changes", [{"transformer_layers_per_block": 2}, {"only_cross_attention": True}])
def test_transformers_of_another_form_are_not_cut(changes: dict[str, Any]) -> None:
    with pytest.raises(SourceError, match=r"down\.0\.layer\.0\.attention is not one block of self-attention"):
        manifest_of(small_unet("two stages", **changes), plans=["tgate:0.5"])


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A small checkpoint, partitioned for one plan that names parts and one that skips attentions whole."""
    folder = tmp_path_factory.mktemp("parts")
    source = str(save_source(folder / "source"))
    options = replace(BuildOptions(), source=source, granularity=None, plans=("tgate:0.5", "unit:2"), out=folder / "bundle")
    return build(options)[0]


@pytest.mark.shared_pieces
def test_a_bundle_in_parts_is_the_torch_model(cut: Bundle) -> None:
    found = list(verify(cut, make_engine("onnxruntime")))
    outputs = {name for segment in cut.manifest.segments for name in segment.outputs}
    assert {"down.0.layer.0.attention.cross.branch", "down.0.layer.0.attention.branch"} <= outputs
    assert max(comparison.error for comparison in found) < 1e-4  # float32; a wrong feature gives more than 1e-3


def test_other_builds_have_the_units_they_had() -> None:
    names = [unit.name for unit in manifest_of(small_unet("two stages"), "unit", ["unit:2"]).units]
    assert not [name for name in names if name.endswith((".cross", ".self", ".input", "cross.branch"))]
    assert len(names) == len(set(names))
