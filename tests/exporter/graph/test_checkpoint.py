"""What a build reads of every kind of source: the UNet of each variant, in pieces as well as whole, and what identifies it."""

from __future__ import annotations

import copy
import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextModel

import tuning
from engines.bundle.folder import sha256
from exporter.errors import SourceError
from exporter.graph.checkpoint import Checkpoint, open_source
from tests.support.commands import Command
from tests.support.reference import MINI
from tuning.checkpoints.compvis_layout import single_file_state
from tuning.checkpoints.folder import save_part
from tuning.checkpoints.source import Source
from tuning.training.teacher import Teacher


@pytest.fixture(scope="module")
def single_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model as a single file."""
    parts = {
        "unet": UNet2DConditionModel.from_pretrained(MINI, subfolder="unet"),
        "vae": AutoencoderKL.from_pretrained(MINI, subfolder="vae"),
        "text_encoder": CLIPTextModel.from_pretrained(MINI / "text_encoder"),
    }
    path = tmp_path_factory.mktemp("single") / "mini.safetensors"
    save_file({name: weight.contiguous() for name, weight in single_file_state(parts).items()}, path)
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model without its stored variants."""
    folder = tmp_path_factory.mktemp("plain") / "model"
    return Path(shutil.copytree(MINI, folder, ignore=shutil.ignore_patterns("unet_*", "training")))


@pytest.fixture(scope="module")
def original() -> UNet2DConditionModel:
    """The embedded model's UNet. Not to be changed."""
    return tuning.load_unet(MINI / "unet")


@pytest.fixture(scope="module")
def cut_out(original: UNet2DConditionModel) -> Callable[[str], UNet2DConditionModel]:
    """What a recipe makes of it, once. Not to be changed."""
    return functools.cache(lambda variant: tuning.assemble(original, tuning.recipe(variant)))


def assert_is(checkpoint: Checkpoint, variant: str, wanted: UNet2DConditionModel) -> None:
    """Skeleton, whole UNet, and two takes of a part of its weights each."""
    skeleton, unet, state = checkpoint.skeleton("unet", variant), checkpoint.unet(variant), wanted.state_dict()
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert (skeleton.training, unet.training) == (False, False)
    assert skeleton.state_dict().keys() == unet.state_dict().keys() == state.keys()
    assert all(torch.equal(weight, state[name]) for name, weight in unet.state_dict().items())
    names = list(state)
    for some in (names[1::2], names[::2]):
        taken = checkpoint.weights("unet", variant).take(some, torch.float32)
        assert all(torch.equal(weight, state[name]) for name, weight in taken.items())
    inputs = torch.ones(1, 4, 8, 8), torch.tensor([3.0]), torch.ones(1, 32, wanted.config.cross_attention_dim)
    with torch.no_grad():
        assert torch.equal(unet(*inputs).sample, wanted.eval()(*inputs).sample)


@pytest.mark.parametrize("variant", ["original", "assembled", "bk-tiny", "condconv"])
def test_stored_variants(variant: str) -> None:
    folder = MINI / ("unet" if variant == "original" else f"unet_{variant}")
    assert_is(open_source("mini", variant), variant, tuning.load_unet(folder))
    assert open_source("mini", variant).is_distilled(variant)


@pytest.mark.parametrize("kind", ["folder", "single file"])
@pytest.mark.parametrize("variant", ["assembled", "bk-base", "bk-tiny", "condconv"])
def test_variants_that_are_cut_out_when_they_are_needed(
    plain: Path, single_file: Path, cut_out: Callable[[str], UNet2DConditionModel], kind: str, variant: str
) -> None:
    source, config = (plain, None) if kind == "folder" else (single_file, MINI)
    checkpoint = open_source(str(source), variant, config=config)
    assert_is(checkpoint, variant, cut_out(variant))
    assert not checkpoint.is_distilled(variant)


def test_a_unet_from_elsewhere(single_file: Path, cut_out: Callable[[str], UNet2DConditionModel], tmp_path: Path) -> None:
    unet = copy.deepcopy(cut_out("assembled"))
    with torch.no_grad():
        for weight in unet.parameters():
            weight.mul_(0.9)
    save_part(unet, tmp_path / "own", torch.float32)
    checkpoint = open_source(str(single_file), "assembled", tmp_path / "own", MINI)
    assert_is(checkpoint, "assembled", unet)
    with pytest.raises(SourceError, match="own is no original UNet of"):
        open_source(str(single_file), "original", tmp_path / "own", MINI).skeleton("unet", "original")


@pytest.mark.parametrize("variant", ["original", "assembled"])
def test_random_variants(original: UNet2DConditionModel, variant: str) -> None:
    checkpoint = open_source(f"random:{MINI / 'unet' / 'config.json'}", variant, config=MINI)
    assert checkpoint.folder == MINI
    drawn = checkpoint.unet("original")
    assert_is(checkpoint, variant, tuning.assemble(drawn, tuning.recipe(variant)))
    assert not torch.equal(drawn.conv_in.weight, original.conv_in.weight)


def test_text_encoder_and_vae(single_file: Path) -> None:
    checkpoints = open_source("mini", "original"), open_source(str(single_file), "original", config=MINI)
    for made, other in zip(*((c.vae(), c.text_encoder()) for c in checkpoints), strict=True):
        assert not made.training
        assert all(torch.equal(weight, other.state_dict()[name]) for name, weight in made.state_dict().items())


@pytest.mark.slow
def test_a_single_file_is_built_and_verified(exporter: Command, tiny_source: Path, tmp_path: Path) -> None:
    parts = {
        "unet": UNet2DConditionModel.from_pretrained(tiny_source, subfolder="unet"),
        "vae": AutoencoderKL.from_pretrained(tiny_source, subfolder="vae"),
        "text_encoder": CLIPTextModel.from_pretrained(tiny_source / "text_encoder"),
    }
    path = tmp_path / "tiny.safetensors"
    save_file({name: weight.contiguous() for name, weight in single_file_state(parts).items()}, path)
    bundle = tmp_path / "bundle"
    assert exporter("build", "--source", path, "--config", tiny_source, "--plan", "full", "--out", bundle).code == 0
    verified = exporter("verify", bundle, "--sizes", "16x16")
    assert verified.code == 0
    assert any("all within 0.0001" in line for line in verified.out)


def test_the_module_of_a_part_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For all that a teacher needs of it, or the check of a build's weights."""
    made: list[str] = []
    skeleton = Source.skeleton

    def counted(source: Source, part: str) -> nn.Module:
        made.append(part)
        return skeleton(source, part)

    monkeypatch.setattr(Source, "skeleton", counted)
    teacher = Teacher.load("mini")
    assert sorted(made) == ["text_encoder", "unet", "vae"]
    assert not any(weight.is_meta for part in (teacher.unet, teacher.text, teacher.vae) for weight in part.parameters())
    made.clear()
    open_source("mini", "original").check_weights("original")
    assert sorted(made) == ["text_encoder", "unet", "vae"]


def test_fingerprints(plain: Path, single_file: Path, tmp_path: Path) -> None:
    """They follow what is read, and nothing else."""
    moved = Path(shutil.copytree(plain, tmp_path / "moved"))
    assert fingerprint(moved) == fingerprint(plain)
    (moved / "unet" / "config.json").write_text((plain / "unet" / "config.json").read_text() + "\n")
    assert fingerprint(moved) != fingerprint(plain)
    one = shutil.copyfile(single_file, tmp_path / single_file.name)
    assert fingerprint(one, MINI) == fingerprint(single_file, MINI)
    one.write_bytes(one.read_bytes()[:-1] + b"\x01")
    assert fingerprint(one, MINI) != fingerprint(single_file, MINI)
    random = [fingerprint(f"random:{name}") for name in ("sd15", "sd21", "bk-base", "bk-small")]
    assert len(set(random)) == 4


def fingerprint(source: object, config: Path | None = None) -> str:
    return open_source(str(source), "original", config=config).fingerprint("original")


def test_a_fingerprint_takes_hashes_that_are_known(plain: Path) -> None:
    asked: list[Path] = []

    def digest(path: Path) -> str:
        asked.append(path)
        return sha256(path)

    checkpoint = open_source(str(plain), "original")
    assert checkpoint.fingerprint("original", digest) == checkpoint.fingerprint("original")
    assert {path.parent.name for path in asked} == {"unet", "vae", "text_encoder", "tokenizer", "scheduler"}


def test_errors_name_the_source(plain: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(plain, tmp_path / "broken"))
    (broken / "unet" / "config.json").write_text("{}")
    with pytest.raises(SourceError, match="^source .*broken: .*holds no UNet in the diffusers layout"):
        open_source(str(broken), "original").skeleton("unet", "original")
    with pytest.raises(SourceError, match="^unknown source 'nowhere'"):
        open_source("nowhere", "original")
    shallow = open_source(str(save_shallow(plain, tmp_path / "shallow")), "assembled")
    with pytest.raises(SourceError, match="has no assembled UNet, and none can be made of its UNet: recipe assembled: "):
        shallow.weights("unet", "assembled")


def save_shallow(plain: Path, folder: Path) -> Path:
    """A checkpoint whose UNet is too small for the recipe."""
    shutil.copytree(plain, folder)
    shutil.rmtree(folder / "unet")
    unet = tuning.assemble(tuning.load_unet(plain / "unet"), tuning.recipe("bk-base"))
    save_part(unet, folder / "unet")
    return folder
