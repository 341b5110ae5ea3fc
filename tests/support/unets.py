"""Small UNets with random weights and other topologies than the embedded model's, and networks of live modules over them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from engines import Manifest, Segment
from engines.bundle.manifest import Feature
from engines.bundle.names import SAMPLE, TEXT, TIMESTEP
from engines.torch_program import ModuleRunner
from exporter.graph.attention_parts import asks_for_parts
from exporter.graph.partition import Granularity, partition
from exporter.graph.topology import depth_factor, topology
from exporter.graph.unit_modules import SegmentModule, unit_module
from runtime.execution.executor import LoadedBundle
from runtime.plans.plan import Plan
from runtime.plans.presets import find_plan
from tests.support.remembered import infer_shapes_and_macs

TEXT_WIDTH, TOKENS = 16, 5

_THREE_STAGES = {
    "block_out_channels": (16, 24, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
TOPOLOGIES: dict[str, dict[str, Any]] = {
    # BK-SDM-Small's shape: one layer per block, no mid block.
    "no mid": {**_THREE_STAGES, "layers_per_block": 1, "mid_block_type": None},
    "uneven": {**_THREE_STAGES, "layers_per_block": (2, 1, 2)},
    "two stages": {
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
}
SD15: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}


def small_unet(name: str, **changes: Any) -> UNet2DConditionModel:
    """One of ``TOPOLOGIES``, seeded; ``changes`` are further configuration."""
    torch.manual_seed(0)
    small = {"sample_size": 8, "cross_attention_dim": TEXT_WIDTH, "norm_num_groups": 8, "attention_head_dim": 2}
    return UNet2DConditionModel(**{**small, **TOPOLOGIES[name], **changes}).eval()


def unet_inputs(unet: UNet2DConditionModel) -> dict[str, Feature]:
    """The features that the UNet is given."""
    width = unet.config.cross_attention_dim
    return {
        SAMPLE: Feature(dtype="float32", shape=("batch", unet.config.in_channels, "height", "width")),
        TIMESTEP: Feature(dtype="float32", shape=(1,)),
        TEXT: Feature(dtype="float32", shape=("batch", TOKENS, width)),
    }


def manifest_of(
    unet: UNet2DConditionModel,
    granularity: Granularity | None = "block",
    plans: Sequence[str | Plan] = ("block:2", "deepcache:2"),
) -> Manifest:
    """The manifest of a bundle that has this UNet and nothing else, and no files."""
    found = [find_plan(plan) for plan in plans]
    in_parts = asks_for_parts(found, [unit.name for unit in topology(unet)])
    units = topology(unet, in_parts)
    modules = {unit.name: unit_module(unet, unit.name, in_parts) for unit in units}
    side = unet.config.sample_size
    measured, features = infer_shapes_and_macs(units, modules, unet_inputs(unet), {"height": side, "width": side})
    return make_manifest(
        units=tuple(measured),
        segments=partition(units, granularity, found),
        features=features,
        sizes=((8 * side, 8 * side),),
        size_multiple=8 * depth_factor(unet),
    )


def make_manifest(**fields: Any) -> Manifest:
    """A manifest with the given fields; the rest do not matter."""
    rest = {
        "key": "0" * 64,
        "variant": "original",
        "source": "test",
        "source_sha256": "1" * 64,
        "precision": "fp32",
        "sizes": ((64, 64),),
        "max_images": 4,
        "latent_channels": 4,
        "vae_scale": 8,
        "size_multiple": 64,
        "text_length": TOKENS,
        "vocabulary": 100,
        "features": {},
        "units": (),
        "segments": (),
        "files": (),
        "made_with": {},
    }
    return Manifest(**{**rest, **fields})


def segment_module(unet: UNet2DConditionModel, manifest: Manifest, segment: Segment) -> SegmentModule:
    """The live torch module of a segment."""
    units = [unit for unit in manifest.units if unit.name in segment.units]
    in_parts = any(unit.kind == "cross-attention" for unit in manifest.units)
    modules = {name: unit_module(unet, name, in_parts) for name in segment.units}
    return SegmentModule(units, modules, segment.inputs, segment.outputs)


def live_network(unet: UNet2DConditionModel, manifest: Manifest) -> LoadedBundle:
    """The UNet's segments as live torch modules."""
    runners = {
        segment.name: ModuleRunner(segment, manifest.features, segment_module(unet, manifest, segment))
        for segment in manifest.segments
    }
    return LoadedBundle(manifest, runners)


@cache
def shared_unet(name: str) -> UNet2DConditionModel:
    """``small_unet(name)``, made once for all tests. Not to be changed."""
    return small_unet(name)


@cache
def shared_network(name: str, granularity: Granularity | None, *plans: str | Plan) -> LoadedBundle:
    """The live network of ``shared_unet(name)``, cut for these plans; once for all tests."""
    unet = shared_unet(name)
    return live_network(unet, manifest_of(unet, granularity, plans))


def relative_error(made: Tensor, reference: Tensor) -> float:
    """The largest difference, relative to the reference's largest value."""
    assert made.shape == reference.shape
    return float((made - reference).abs().max() / reference.abs().max())


def written_manifest(manifest: Manifest, folder: Path, **changes: Any) -> Path:
    """A bundle's folder with nothing in it but the manifest, changed as asked."""
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(manifest.model_copy(update=changes).model_dump_json())
    return folder
