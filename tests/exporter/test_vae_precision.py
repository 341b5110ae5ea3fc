"""A VAE that overflows in half precision is found by `verify`, and is right in a precision of its own, beside a UNet in half."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from engines import Bundle, EngineError, make_engine
from engines.bundle.names import LATENTS, VAE_DECODER
from exporter import BuildOptions, build
from runtime.execution.loaded_bundle import LoadedBundle
from tests.support.commands import Command, assert_refused
from tests.support.sources import save_source
from tests.support.unets import small_unet

FP32 = 1e-4
"""Sums in another order; a wrong weight or scale gives far above 1e-3."""
BF16 = 4e-2
"""bfloat16 keeps 8 bits: 4e-3 for each rounding, and some layers add theirs up."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose decoder works with numbers of some 300,000, which its norms bring back into range.

    Its UNet has attention in its mid block alone: it is traced fastest.
    """
    unet = small_unet("two stages", down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    folder = save_source(tmp_path_factory.mktemp("large") / "source", unet)
    path = next((folder / "vae").glob("*.safetensors"))
    weights = load_file(path)
    weights["decoder.conv_in.weight"] *= 1e5
    save_file(weights, path, {"format": "pt"})
    return folder


def options(source: Path, folder: Path, precision: str | None) -> BuildOptions:
    """In as few segments as there can be."""
    return BuildOptions(
        source=str(source), precision="fp16", vae_precision=precision, engines=("torch",), out=folder, force=True,  # type: ignore[arg-type]
        granularity=None, plans=("full",),
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle in half precision, VAE and all. Not to be changed."""
    return build(options(source, tmp_path_factory.mktemp("half") / "bundle", None))[0].folder


def decoded(bundle: Bundle, latents: Tensor) -> Tensor:
    return LoadedBundle.load(bundle, make_engine("torch")).compute(VAE_DECODER, {LATENTS: latents})


@pytest.mark.slow
def test_an_overflow_is_found_and_the_advice_mends_it(source: Path, folder: Path, exporter: Command, tmp_path: Path) -> None:
    half = Bundle.open(folder)
    found = exporter("verify", folder, "--engine", "torch", "--sizes", "16x16", "--steps", "0")
    assert found.code == 1
    (advice,) = (line for line in found.out if "overflows" in line)
    assert advice.startswith("vae_decoder overflows in fp16: decoder.")
    assert "--precision fp16 --vae-precision fp32" in advice

    command = advice.partition("python -m exporter ")[2].split()
    assert command[-3:] == ["--force", "--out", str(folder)]
    shutil.copytree(folder, tmp_path / "wide")
    built = exporter(*command[:-1], tmp_path / "wide")
    assert built.code == 0
    assert "fp16, VAE fp32" in " ".join(" ".join(built.out).split())
    wide = Bundle.open(tmp_path / "wide")
    assert wide.manifest.vae_precision == "fp32"
    for one, other in zip(half.manifest.segments, wide.manifest.segments, strict=True):
        assert (one.key == other.key) == (not one.name.startswith("vae")), "only the VAE is another"

    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    vae = AutoencoderKL.from_pretrained(source / "vae")
    with torch.no_grad():
        reference = vae.decode(latents / vae.config.scaling_factor).sample
    assert not torch.isfinite(decoded(half, latents)).all()
    assert torch.allclose(decoded(wide, latents), reference, rtol=0, atol=FP32 * float(reference.abs().max()))
    good = exporter("verify", wide.folder, "--engine", "torch", "--sizes", "16x16", "--steps", "0")
    assert (good.code, [line for line in good.out if "overflows" in line]) == (0, [])


@pytest.mark.slow
def test_bfloat16_has_the_range(source: Path, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "bundle")
    bundle, _ = build(options(source, tmp_path / "bundle", "bf16"))
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    vae = AutoencoderKL.from_pretrained(source / "vae")
    with torch.no_grad():
        reference = vae.decode(latents / vae.config.scaling_factor).sample
    error = float((decoded(bundle, latents) - reference).abs().max() / reference.abs().max())
    assert FP32 < error < BF16, "it is bfloat16"
    segment = bundle.manifest.segment("vae_decoder")
    assert bundle.manifest.precision_of(segment) == "bf16"
    assert bundle.manifest.precision_of(bundle.manifest.segment("text_encoder")) == "fp16"
    with pytest.raises(EngineError, match=r"vae_decoder .* computes in bfloat16, which engine onnxruntime does not; .* torch"):
        make_engine("onnxruntime").load(bundle, segment)


def test_what_cannot_be_is_one_line(source: Path, exporter: Command, tmp_path: Path) -> None:
    build = ("build", "--source", source, "--out", tmp_path / "bundle", "--vae-precision")
    assert_refused(exporter(*build, "fp8"), "'fp8'", "fp32, bf16, fp16")
    assert_refused(exporter(*build, "bf16"), "onnxruntime does not compute in it", "--vae-precision fp32")
    assert not (tmp_path / "bundle").exists()
