"""Configurations in all the forms that diffusers takes, and those that nobody should: read as it reads them, or one line."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from transformers import CLIPTextModel

from engines.errors import UserError
from tests.support.sources import save_source
from tests.support.unets import TEXT_WIDTH
from tuning.checkpoints.configs import check_kinds, latent_size, text_width
from tuning.checkpoints.find_source import find_source
from tuning.errors import TuningError

PARTS = ("unet", "vae", "text_encoder")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint. Not to be changed."""
    return save_source(tmp_path_factory.mktemp("configs") / "whole")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return shutil.copytree(whole, tmp_path / "copy")


def change(folder: Path, file: str, **changes: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def read_all(folder: Path) -> None:
    """All that a build does before it traces anything."""
    source = find_source(str(folder))
    source.check_fit()
    for part in PARTS:
        source.weights(part)


# Forms that diffusers takes


@pytest.mark.parametrize(("given", "size"), [(16, (16, 16)), ([16, 24], (16, 24)), (None, (64, 64))])
def test_the_size_of_latents(folder: Path, given: Any, size: tuple[int, int]) -> None:
    change(folder, "unet/config.json", sample_size=given)
    read_all(folder)
    skeleton: Any = find_source(str(folder)).skeleton("unet")
    assert latent_size(skeleton.config) == size


@pytest.mark.parametrize(("given", "length"), [(16, 16), (77, 32), (None, 32), (-1, 32)])
def test_prompts_are_as_long_as_diffusers_pads_them(folder: Path, given: int | None, length: int) -> None:
    """Of the tokenizer, not of the text encoder, which may have more positions than are used."""
    change(folder, "tokenizer/tokenizer_config.json", model_max_length=given)
    source = find_source(str(folder))
    skeleton: Any = source.skeleton("text_encoder")
    assert source.text_length(skeleton.config) == length


def test_a_text_width_for_every_block(folder: Path) -> None:
    """The numbers of the UNet are diffusers' own on the same folder."""
    change(folder, "unet/config.json", cross_attention_dim=[TEXT_WIDTH, TEXT_WIDTH])
    read_all(folder)
    unet = find_source(str(folder)).model("unet")
    assert text_width(unet.config) == TEXT_WIDTH
    theirs = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").eval()
    inputs = torch.ones(1, 4, 8, 8), torch.tensor(3), torch.ones(1, 5, TEXT_WIDTH)
    with torch.no_grad():
        assert torch.equal(unet(*inputs).sample, theirs(*inputs).sample)


# What is refused before anything is made


@pytest.mark.parametrize(("file", "changes", "says"), [
    ("unet/config.json", {"sample_size": "64"}, "sample_size = '64'; it is a side in latents, a pair of them, or null"),
    ("unet/config.json", {"sample_size": 8.5}, "sample_size = 8.5; it is a side in latents"),
    ("unet/config.json", {"sample_size": {"height": 8}}, "sample_size"),
    ("unet/config.json", {"sample_size": [8, 8, 8]}, "sample_size"),
    ("unet/config.json", {"sample_size": 10**6}, "sample_size"),
    ("unet/config.json", {"norm_eps": "tiny"}, "norm_eps is 'tiny', no number"),
    ("unet/config.json", {"layers_per_block": 10**9}, "layers_per_block is 1000000000"),
    ("unet/config.json", {"transformer_layers_per_block": 5000}, "transformer_layers_per_block is 5000, and its weights are"),
    ("unet/config.json", {"block_out_channels": [8, 2**40]}, "block_out_channels"),
    ("unet/config.json", {"down_block_types": ["DownBlock2D"] * 100_000}, "describes some 100000 layers"),
    ("unet/config.json", {"unet_heirloom": {"version": 3}}, "holds no UNet in the diffusers layout"),
    ("vae/config.json", {"latent_channels": 2**33}, "latent_channels is 8589934592"),
    ("vae/config.json", {"scaling_factor": 0}, "its scaling_factor is 0, and must be more than 0"),
    ("vae/config.json", {"scaling_factor": None}, "scaling_factor is None, no number"),
    ("vae/config.json", {"_class_name": "AsymmetricAutoencoderKL"}, "AutoencoderKL and AutoencoderTiny are the only kinds"),
    ("text_encoder/config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    ("text_encoder/config.json", {"max_position_embeddings": 10**9}, "max_position_embeddings is 1000000000"),
    ("text_encoder/config.json", {"use_attention_mask": True}, "it has use_attention_mask, with which padding is not read"),
    ("text_encoder/config.json", {"model_type": "t5"}, "it is of the kind 't5', and CLIP is the only kind of text encoder"),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")  # fmt: skip
def test_configurations_that_no_model_has(folder: Path, file: str, changes: dict[str, Any], says: str) -> None:
    change(folder, file, **changes)
    with pytest.raises(TuningError) as caught:
        read_all(folder)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_another_embedding_of_time(folder: Path) -> None:
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"), time_embedding_type="fourier")
    shutil.rmtree(folder / "unet")
    unet.save_pretrained(folder / "unet")
    with pytest.raises(TuningError, match=r"its UNet has time_embedding_type = 'fourier', not 'positional'"):
        read_all(folder)


def test_a_unet_that_gives_more_than_it_takes(folder: Path) -> None:
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"), out_channels=8)
    shutil.rmtree(folder / "unet")
    unet.save_pretrained(folder / "unet")
    with pytest.raises(TuningError, match="its UNet takes 4 channels and gives 8, and latents have 4"):
        read_all(folder)


@pytest.mark.parametrize("changes", [{"in_channels": 4, "out_channels": 4}, {"out_channels": 1}])
def test_a_vae_for_other_pictures_than_coloured_ones(tmp_path: Path, changes: dict[str, int]) -> None:
    folder = save_source(tmp_path / "grey", **changes)
    with pytest.raises(TuningError, match="its VAE takes pictures of . channels and gives ., and pictures have 3"):
        read_all(folder)


def save_tiny(folder: Path) -> None:
    AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
                    num_decoder_blocks=(1, 1)).save_pretrained(folder / "vae")  # fmt: skip


def test_a_tiny_autoencoder(folder: Path) -> None:
    shutil.rmtree(folder / "vae")
    save_tiny(folder)
    read_all(folder)
    change(folder, "vae/config.json", _class_name="AsymmetricAutoencoderKL")
    with pytest.raises(TuningError, match="AutoencoderKL and AutoencoderTiny are the only kinds of VAE that can be built"):
        read_all(folder)
    for changes, says in (
        ({"upsampling_scaling_factor": 3}, "with upsampling by 3; a picture must come back in its own size"),
        ({"num_encoder_blocks": [1, 10**6]}, "num_encoder_blocks is"),
        ({"decoder_block_out_channels": [8, 10**6]}, "decoder_block_out_channels is"),
        ({"encoder_block_out_channels": [8], "num_encoder_blocks": [1]}, "its encoder has 1 stages, its decoder 2"),
    ):
        change(folder, "vae/config.json", _class_name="AutoencoderTiny", **changes)
        with pytest.raises(TuningError, match=says):
            read_all(folder)
        shutil.rmtree(folder / "vae")
        save_tiny(folder)


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_weights_of_another_size_are_seen_before_they_are_read(folder: Path, part: str) -> None:
    kind: Any = {"vae": AutoencoderKL, "text_encoder": CLIPTextModel}[part]
    model = kind.from_pretrained(folder / part)
    model.save_pretrained(folder / "other")
    wider: dict[str, Any] = {"block_out_channels": [4, 4]} if part == "vae" else {"intermediate_size": 16}
    change(folder, f"{part}/config.json", **wider)
    with pytest.raises(TuningError, match="the weights are not those of its configuration"):
        find_source(str(folder)).weights(part)


def test_every_committed_configuration_is_of_the_kinds_that_diffusers_has() -> None:
    found = sorted(Path("models").glob("*/unet*/config.json")) + sorted(Path("models").glob("*/vae/config.json"))
    for path in found:
        check_kinds(json.loads(path.read_text()), UNet2DConditionModel if "unet" in path.parent.name else AutoencoderKL)
    assert len(found) >= 8


# A seeded campaign

VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 3, 10**9, 2**63, 10**30, 1.5, float("inf"), float("nan"), "", "x", "\ud800", [], [0, 0], [2**40] * 2,
    [8, 8, 8, 8], ["a"], {}, {"a": 1}, [None], [[1]], [1] * 1000,
)  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_mutated_configurations_are_read_or_refused_in_one_line(folder: Path, seed: int) -> None:
    rng = random.Random(seed)
    refused: list[str] = []
    for _ in range(15):
        file = folder / rng.choice(PARTS) / "config.json"
        before = file.read_text()
        config = json.loads(before)
        config[rng.choice(sorted(config))] = rng.choice(VALUES)
        file.write_text(json.dumps(config))
        try:
            read_all(folder)
        except UserError as error:
            refused.append(str(error))
        file.write_text(before)
    assert len(refused) > 3
    assert not [message for message in refused if "\n" in message]
