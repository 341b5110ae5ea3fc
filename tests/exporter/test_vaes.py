"""Bundles with another VAE, and with an AutoencoderTiny (TAESD): latents and pictures are those of diffusers with it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engines import Bundle, make_engine
from exporter import BuildError, BuildOptions, SourceError, build
from runtime import Pipeline
from tests.support.commands import Command, assert_refused
from tests.support.diffusers_pipelines import NEGATIVE, PROMPT, SEED, latents, mask, picture, pipeline_of
from tests.support.sources import save_source, small_vae, tiny_vae
from tests.support.unets import relative_error, small_unet
from tuning.training.teacher import Teacher

FakeTrace = Callable[..., list[str]]
pytestmark = pytest.mark.shared_pieces


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_source(tmp_path_factory.mktemp("plain") / "source", small_unet("two stages", mid_block_type=None))


@pytest.fixture(scope="module")
def vaes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {"another": small_vae(seed=5, scaling_factor=0.7), "tiny": tiny_vae()}


@pytest.fixture(scope="module")
def pipelines(source: Path, vaes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pipeline]:
    """Bundles with each VAE, loaded."""
    folder = tmp_path_factory.mktemp("bundles")
    made: dict[str, Pipeline] = {}

    def of(name: str) -> Pipeline:
        if name not in made:
            vaes[name].save_pretrained(folder / f"vae-{name}")
            options = BuildOptions(
                source=str(source), vae=str(folder / f"vae-{name}"), granularity=None, plans=("full",), out=folder / name
            )
            made[name] = Pipeline(build(options)[0], make_engine("onnxruntime"))
        return made[name]

    return of


def given(kind: str) -> dict[str, Any]:
    image: dict[str, Any] = {"image": picture(32, 32), "strength": 0.7} if kind != "text" else {}
    return {"steps": 4, "guidance_scale": 3.0} | image | ({"mask": mask(32, 32)} if kind == "inpaint" else {})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "image", "inpaint"])
@pytest.mark.parametrize("name", ["another", "tiny"])
def test_latents_and_pictures_are_those_of_diffusers(
    source: Path, vaes: dict[str, Any], pipelines: Callable[[str], Pipeline], name: str, kind: str
) -> None:
    wanted, settings = pipeline_of(source, kind, vae=vaes[name]), given(kind)
    made = pipelines(name).generate(PROMPT, NEGATIVE, seed=SEED, scheduler="ddim", **settings)
    size = {"height": 32, "width": 32} if kind == "inpaint" else {}  # of itself it takes the model's size, not the picture's
    expected = latents(wanted, **size, **settings)
    assert relative_error(made.latents, expected) < 1e-4
    with torch.no_grad():
        decoded = vaes[name].decode(expected / vaes[name].config.scaling_factor).sample
    (pixels,) = wanted.image_processor.postprocess(decoded)
    if kind != "inpaint":  # there the runtime puts the pixels that are kept back
        assert np.abs(np.asarray(made.image, int) - np.asarray(pixels, int)).max() <= 1


@pytest.mark.slow
def test_several_pictures_of_one_with_a_tiny_vae(
    source: Path, vaes: dict[str, Any], pipelines: Callable[[str], Pipeline]
) -> None:
    settings = given("image")
    made = pipelines("tiny").generate(PROMPT, NEGATIVE, seed=SEED, num_images=2, scheduler="ddim", **settings)
    expected = latents(pipeline_of(source, "image", vae=vaes["tiny"]), images=2, **settings)
    assert relative_error(made.latents, expected) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["another", "tiny"])
def test_verify_knows_which_vae_it_is(exporter: Command, pipelines: Callable[[str], Pipeline], name: str) -> None:
    bundle = pipelines(name).bundle
    outcome = exporter("verify", bundle.folder, "--sizes", "16x16")
    assert outcome.code == 0
    assert any("all within 0.0001" in line for line in outcome.out)
    assert bundle.manifest.vae is not None
    assert f"VAE of {bundle.manifest.vae}" in exporter("inspect", bundle.folder).out
    assert f"--vae {bundle.manifest.vae}" in bundle.rebuild_command()
    assert any("its scaling factor is 0.7" in note for note in bundle.manifest.notes) == (name == "another")


@pytest.mark.slow
def test_a_tiny_vae_in_a_source_and_in_half_precision(source: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(source, tmp_path / "own"))
    shutil.rmtree(own / "vae")
    tiny_vae().save_pretrained(own / "vae")
    options = BuildOptions(source=str(own), granularity=None, plans=("full",), vae_precision="fp16", out=tmp_path / "bundle")
    bundle, _ = build(options)
    assert bundle.manifest.vae is None
    sample = torch.rand(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    runs = Pipeline(bundle, make_engine("onnxruntime")).network
    with torch.no_grad():
        wanted = tiny_vae().decode(sample).sample
    assert relative_error(runs.compute("vae_decoder", {"latents": sample}), wanted) < 5e-3
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        encoded = tiny_vae().encode(pixels).latents
    assert relative_error(runs.compute("vae_encoder", {"image": pixels}), encoded) < 5e-3


def test_a_source_without_a_vae_of_its_own(source: Path, tmp_path: Path, fake_trace: FakeTrace) -> None:
    fake_trace()
    own = Path(shutil.copytree(source, tmp_path / "own"))
    shutil.rmtree(own / "vae")
    small_vae(seed=5).save_pretrained(tmp_path / "vae")
    with pytest.raises(SourceError, match="vae is missing"):
        build(BuildOptions(source=str(own), out=tmp_path / "none"))
    bundle, _ = build(BuildOptions(source=str(own), vae=str(tmp_path / "vae"), out=tmp_path / "bundle"))
    assert bundle.manifest.notes == ()


@pytest.mark.slow
def test_only_the_vae_is_built_again(source: Path, tmp_path: Path, fake_trace: FakeTrace, caches: Path) -> None:
    traced = fake_trace()
    build(BuildOptions(source=str(source), out=tmp_path / "first", fresh=True))
    small_vae(seed=6).save_pretrained(tmp_path / "vae")
    traced.clear()
    options = BuildOptions(source=str(source), vae=str(tmp_path / "vae"), out=tmp_path / "second")
    build(options)
    assert traced == ["vae_decoder", "vae_encoder"]
    assert not build(options)[1]
    small_vae(seed=7).save_pretrained(tmp_path / "vae")
    with pytest.raises(BuildError, match="exists and is kept"):
        build(options)


def test_a_vae_that_does_not_fit_is_refused(
    exporter: Command, source: Path, tmp_path: Path, fake_trace: FakeTrace, here: Path
) -> None:
    traced = fake_trace()
    small_vae(latent_channels=8).save_pretrained(tmp_path / "vae")
    refused = exporter("build", "--source", source, "--vae", tmp_path / "vae")
    assert_refused(refused, "VAE", "its latents have 8 channels, and the source's UNet takes 4")
    assert_refused(exporter("build", "--source", source, "--vae", "nowhere"), "VAE nowhere: ", "no such folder")
    assert not traced
    assert list(here.rglob("*")) == []


def test_a_teacher_with_a_tiny_vae(source: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(source, tmp_path / "own"))
    shutil.rmtree(own / "vae")
    tiny_vae().save_pretrained(own / "vae")
    teacher, pixels = Teacher.load(str(own)), torch.zeros(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(teacher.encode(pixels), tiny_vae().encode(pixels).latents)
    assert teacher.decode(teacher.encode(pixels)).shape == pixels.shape


def test_the_manifest_may_give_latents_in_place_of_their_distribution(
    source: Path, tmp_path: Path, fake_trace: FakeTrace
) -> None:
    fake_trace()
    tiny_vae().save_pretrained(tmp_path / "vae")
    bundle, _ = build(BuildOptions(source=str(source), vae=str(tmp_path / "vae"), out=tmp_path / "bundle"))
    assert bundle.manifest.features["vae_encoder"].shape == ("images", 4, "height", "width")
    Bundle.open(bundle.folder).check_complete()
