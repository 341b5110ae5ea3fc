"""The graph of units, derived from any UNet of the family: the mini model's, SD 1.5's on the meta device, and odd ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

import tuning
from engines.bundle.manifest import Feature
from exporter import SourceError, topology
from exporter.graph.shapes_and_macs import infer_shapes_and_macs
from exporter.graph.topology import block_of, depth_factor
from exporter.graph.unit_modules import unit_module
from tests.support.reference import MINI
from tests.support.unets import (
    SD15,
    TEXT_WIDTH,
    TOKENS,
    TOPOLOGIES,
    manifest_of,
    relative_error,
    segment_module,
    small_unet,
    unet_inputs,
)


def meta_unet(config: dict[str, Any]) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**config)


def inputs_of(unet: UNet2DConditionModel) -> dict[str, tuple[str, ...]]:
    """What each unit reads; a ResNet's or transformer's branch and sum are taken together."""
    units = {unit.name: unit.inputs for unit in topology(unet)}
    together = {}
    for name, inputs in units.items():
        branch = f"{name}.branch"
        if branch in units:
            assert inputs == (*units[branch][:-1], branch)
        if not name.endswith(".branch"):
            together[name] = units.get(branch, inputs)
    return together


def test_the_mini_model() -> None:
    config = dict(UNet2DConditionModel.load_config(MINI / "unet"))
    inputs = inputs_of(meta_unet({name: value for name, value in config.items() if not name.startswith("_")}))
    assert list(inputs)[:9] == [
        "time",
        "stem",
        "down.0.layer.0.resnet",
        "down.0.layer.0.attention",
        "down.0.layer.1.resnet",
        "down.0.layer.1.attention",
        "down.0.sampler",
        "down.1.layer.0.resnet",
        "down.1.layer.0.attention",
    ]
    assert len(inputs) == 47
    assert inputs["time"] == ("timestep",)
    assert inputs["stem"] == ("sample",)
    assert inputs["down.0.layer.0.resnet"] == ("stem", "time")
    assert inputs["down.0.layer.0.attention"] == ("down.0.layer.0.resnet", "text_encoder")
    assert inputs["down.0.sampler"] == ("down.0.layer.1.attention",)
    assert inputs["down.3.layer.0.resnet"] == ("down.2.sampler", "time")
    assert inputs["mid.layer.0.resnet"] == ("down.3.layer.1.resnet", "time")
    assert inputs["mid.layer.1.resnet"] == ("mid.layer.0.attention", "time")
    # Skips come back in the order opposite to the one in which they were made; a transformer's output replaces its ResNet's.
    skips = {name: inputs[name][1] for name in inputs if name.startswith("up.") and name.endswith("resnet")}
    assert skips == {
        "up.0.layer.0.resnet": "down.3.layer.1.resnet",
        "up.0.layer.1.resnet": "down.3.layer.0.resnet",
        "up.0.layer.2.resnet": "down.2.sampler",
        "up.1.layer.0.resnet": "down.2.layer.1.attention",
        "up.1.layer.1.resnet": "down.2.layer.0.attention",
        "up.1.layer.2.resnet": "down.1.sampler",
        "up.2.layer.0.resnet": "down.1.layer.1.attention",
        "up.2.layer.1.resnet": "down.1.layer.0.attention",
        "up.2.layer.2.resnet": "down.0.sampler",
        "up.3.layer.0.resnet": "down.0.layer.1.attention",
        "up.3.layer.1.resnet": "down.0.layer.0.attention",
        "up.3.layer.2.resnet": "stem",
    }
    assert inputs["head"] == ("up.3.layer.2.attention",)


# Per block of SD 1.5: parameters in millions, and multiply-accumulates in thousands of millions at 64x64 latents with 77 tokens,
# of the layers and (second) of attention's products; counted block by block with hooks on the layers, apart from this code.
SD15_BLOCKS = {
    "stem": (2.1, 0.05),
    "down.0": (10.5, 32.9 + 21.9),
    "down.1": (36.8, 31.3 + 2.9),
    "down.2": (140.0, 31.4 + 0.4),
    "down.3": (62.3, 3.8),
    "mid": (97.0, 6.0),
    "up.0": (162.2, 12.9),
    "up.1": (258.3, 75.1 + 0.7),
    "up.2": (71.4, 79.1 + 4.3),
    "up.3": (18.8, 66.0 + 32.8),
    "head": (0.01, 0.05),
}


def test_sd15_on_the_meta_device() -> None:
    unet = meta_unet(SD15)
    units = topology(unet)
    assert len(units) == 47 + 22 + 16, "each ResNet and each transformer is a branch and a sum"
    modules = {unit.name: unit_module(unet, unit.name) for unit in units}
    owned = [id(parameter) for module in modules.values() for parameter in module.parameters()]
    assert sorted(owned) == sorted(map(id, unet.parameters())), "every parameter belongs to exactly one unit"
    inputs = unet_inputs(unet) | {"text_encoder": Feature(dtype="float32", shape=("batch", 77, 768))}
    with torch.device("meta"):
        measured, features = infer_shapes_and_macs(units, modules, inputs, {"height": 64, "width": 64})
    assert sum(unit.parameters for unit in measured) == 859_520_964
    for block, (parameters, macs) in SD15_BLOCKS.items():
        inside = [unit for unit in measured if block_of(unit.name) == block]
        # The figures above are rounded to their last digit.
        assert sum(unit.parameters for unit in inside) / 1e6 == pytest.approx(parameters, abs=0.051)
        assert sum(unit.macs for unit in inside) / 1e9 == pytest.approx(macs, rel=0.015, abs=0.051)
    assert features["down.2.sampler"].shape == ("batch", 1280, "height/8", "width/8")
    assert features["up.2.sampler"].shape == ("batch", 640, "height", "width")
    assert features["time"].shape == (1, 1280)
    assert depth_factor(unet) == 8
    with torch.device("meta"):
        elsewhere, _ = infer_shapes_and_macs(units, modules, inputs, {"height": 96, "width": 40})
    area = 96 * 40 / 64**2
    for unit, counted in zip(measured, elsewhere, strict=True):
        assert unit.macs_at(area) == pytest.approx(counted.macs), unit.name
    assert measured[0].macs_fixed == measured[0].macs, "the time is the same at every size"
    quadratic = sum(unit.macs_quadratic for unit in measured)
    assert {unit.kind for unit in measured if unit.macs_quadratic} == {"attention branch"}
    # Scores and sums of self-attention: twice the squared pixels times the channels, in five, five, five and one transformers.
    assert quadratic == 2 * (5 * 4096**2 * 320 + 5 * 1024**2 * 640 + 5 * 256**2 * 1280 + 64**2 * 1280)


def test_no_mid_block_and_one_layer_per_block() -> None:
    unet = small_unet("no mid")
    inputs = inputs_of(unet)
    assert not [name for name in inputs if name.startswith("mid")]
    assert inputs["up.0.layer.0.resnet"] == ("down.2.layer.0.resnet", "down.2.layer.0.resnet", "time")
    assert inputs["up.0.layer.1.resnet"] == ("up.0.layer.0.resnet", "down.1.sampler", "time")
    assert inputs["up.2.layer.1.resnet"] == ("up.2.layer.0.attention", "stem", "time")
    assert depth_factor(unet) == 4


def test_uneven_layers() -> None:
    inputs = inputs_of(small_unet("uneven"))
    layers = {block: len({name.split(".")[3] for name in inputs if name.startswith(f"{block}.layer")})
              for block in ("down.0", "down.1", "down.2", "up.0", "up.1", "up.2")}  # fmt: skip
    assert layers == {"down.0": 2, "down.1": 1, "down.2": 2, "up.0": 3, "up.1": 2, "up.2": 3}
    assert inputs["up.1.layer.0.resnet"] == ("up.0.sampler", "down.1.layer.0.attention", "time")
    assert inputs["up.1.layer.1.resnet"] == ("up.1.layer.0.attention", "down.0.sampler", "time")


def test_a_mid_block_without_attention() -> None:
    unet = small_unet("two stages", mid_block_type="UNetMidBlock2D")
    inputs = inputs_of(unet)
    assert [name for name in inputs if name.startswith("mid")] == ["mid.layer.0.resnet"]
    assert inputs["mid.layer.0.resnet"] == ("down.1.layer.0.resnet", "time")


def test_layers_that_lost_their_attention_alone() -> None:
    gone = ("down.0.layer.1.attention", "mid.layer.0.attention", "up.1.layer.0.attention")
    unet = tuning.assemble(small_unet("uneven"), tuning.Recipe(name="bare", remove=gone))
    inputs = inputs_of(unet)
    assert not set(gone) & set(inputs)
    assert inputs["down.0.sampler"] == ("down.0.layer.1.resnet",)
    assert inputs["mid.layer.1.resnet"] == ("mid.layer.0.resnet", "time")
    assert inputs["up.1.layer.1.resnet"] == ("up.1.layer.0.resnet", "down.0.sampler", "time")
    assert inputs["up.2.layer.0.resnet"] == ("up.1.sampler", "down.0.layer.1.resnet", "time")
    manifest = manifest_of(unet)
    given = torch.randn(2, 4, 8, 8), torch.tensor([500.0]), torch.randn(2, TOKENS, TEXT_WIDTH)
    features = dict(zip(("sample", "timestep", "text_encoder"), given, strict=True))
    with torch.no_grad():
        for segment in manifest.segments:
            made = segment_module(unet, manifest, segment)(*(features[name] for name in segment.inputs))
            features |= dict(zip(segment.outputs, made, strict=True))
        expected = unet(given[0], given[1], given[2]).sample
    assert relative_error(features["head"], expected) < 1e-5, "the order of sums aside"


@pytest.mark.parametrize("model", list(TOPOLOGIES))
def test_units_can_run_in_their_order_and_share_no_parameter(model: str) -> None:
    unet = small_unet(model)
    there = {"sample", "timestep", "text_encoder"}
    for unit in topology(unet):
        assert set(unit.inputs) <= there
        assert unit.name not in there
        there.add(unit.name)
    owned = [id(weight) for unit in topology(unet) for weight in unit_module(unet, unit.name).parameters()]
    assert sorted(owned) == sorted(map(id, unet.parameters()))


REFUSED: list[tuple[dict[str, Any], str]] = [
    # SDXL's
    (
        {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64},
        "addition_embed_type = 'text_time'",
    ),
    ({"class_embed_type": "timestep"}, "class_embed_type = 'timestep'"),
    ({"num_class_embeds": 10}, "num_class_embeds = 10"),
    ({"encoder_hid_dim": 32}, "encoder_hid_dim = 32"),
    # LCM's
    ({"time_cond_proj_dim": 16}, "time_cond_proj_dim = 16"),
    ({"center_input_sample": True}, "center_input_sample = True"),
    # DeepFloyd IF's and Kandinsky's
    ({"down_block_types": ("SimpleCrossAttnDownBlock2D", "DownBlock2D")}, "SimpleCrossAttnDownBlock2D; supported blocks: "),
    ({"up_block_types": ("AttnUpBlock2D", "CrossAttnUpBlock2D")}, "AttnUpBlock2D"),
    ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "UNetMidBlock2DSimpleCrossAttn"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_other_families_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError) as refusal:
        topology(small_unet("two stages", **changes))
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)
