"""Another VAE than a source's own: from every place that one comes from, tensor by tensor; and those that do not fit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file, save_file

from tests.support.sources import save_source, small_vae, tiny_vae
from tuning.checkpoints.compvis_layout import vae_state
from tuning.checkpoints.find_source import SD15
from tuning.checkpoints.vae import Vae, find_vae
from tuning.checkpoints.weights import materialize
from tuning.errors import TuningError

OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_source(tmp_path_factory.mktemp("source") / "source")


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return small_vae(seed=5)


def read(vae: Vae) -> Any:
    return materialize(vae.skeleton(), vae.weights())


def assert_is(made: Any, wanted: Any) -> None:
    assert type(made) is type(wanted)
    assert made.state_dict().keys() == wanted.state_dict().keys()
    for name, weight in wanted.state_dict().items():
        assert torch.equal(made.state_dict()[name], weight), name


def saved(state: dict[str, torch.Tensor], path: Path) -> str:
    save_file({name: weight.contiguous() for name, weight in state.items()}, path)
    return str(path)


def test_a_folder_of_a_vae_and_of_a_checkpoint(source: Path, vae: AutoencoderKL, tmp_path: Path) -> None:
    vae.save_pretrained(tmp_path / "whole" / "vae")
    for folder in (tmp_path / "whole", tmp_path / "whole" / "vae"):
        found = find_vae(str(folder), source / "vae")
        assert_is(read(found), vae)
        assert sorted(path.name for path in found.files()) == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_a_repository_of_the_hub(source: Path, vae: AutoencoderKL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vae.save_pretrained(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_args, **_more: str(tmp_path))
    assert_is(read(find_vae("a/vae", source / "vae")), vae)


@pytest.mark.parametrize("form", ["diffusers", "old diffusers", "CompVis", "CompVis alone"])
def test_a_single_file(source: Path, vae: AutoencoderKL, tmp_path: Path, form: str) -> None:
    state = dict(vae.state_dict())
    if form.startswith("CompVis"):
        state = {name.removeprefix("first_stage_model." * ("alone" in form)): found for name, found in vae_state(vae).items()}
        state |= {"model_ema.decay": torch.zeros(()), "loss.logvar": torch.zeros(())}
    elif form == "old diffusers":
        for new, old in OLD.items():
            state = {name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): weight for name, weight in state.items()}
        assert any("proj_attn" in name for name in state)
    found = find_vae(saved(state, tmp_path / "x.safetensors"), source / "vae")
    assert_is(read(found), vae)
    assert [path.name for path in found.files()] == ["x.safetensors", "config.json"]


def test_a_tiny_one_in_a_folder_and_a_file(source: Path, tmp_path: Path) -> None:
    tiny_vae().save_pretrained(tmp_path / "tiny")
    assert_is(read(find_vae(str(tmp_path / "tiny"), source / "vae")), tiny_vae())
    torch.manual_seed(0)
    usual = AutoencoderTiny()
    path = saved(usual.state_dict(), tmp_path / "taesd.safetensors")
    assert_is(read(find_vae(path, source / "vae")), usual)


def test_a_file_for_a_source_with_a_tiny_one_has_the_usual_configuration(tmp_path: Path, vae: AutoencoderKL) -> None:
    tiny_vae().save_pretrained(tmp_path / "vae")
    found = find_vae(saved(vae.state_dict(), tmp_path / "x.safetensors"), tmp_path / "vae")
    with pytest.raises(TuningError, match=rf"x.safetensors.* {SD15 / 'vae'}"):
        read(found)


def test_those_that_do_not_fit(source: Path, tmp_path: Path) -> None:
    unet: Any = type("Config", (), {"in_channels": 4})
    own = source / "vae"
    for name, changes, message in (
        ("more", {"latent_channels": 16}, "its latents have 16 channels, and the source's UNet takes 4"),
        ("deeper", {"block_out_channels": (8, 8, 8)}, "a latent of it is 4 pixels wide, and one of the source's own VAE 2"),
    ):
        small_vae(**changes).save_pretrained(tmp_path / name)
        with pytest.raises(TuningError, match=f"^VAE .*{name}: {message}"):
            find_vae(str(tmp_path / name), own).check_fit(unet, own)
    small_vae(scaling_factor=0.13).save_pretrained(tmp_path / "other")
    other = find_vae(str(tmp_path / "other"), own)
    other.check_fit(unet, own)
    assert "its scaling factor is 0.13, and the source's own VAE has 0.5; if pictures are grey" in str(other.note(own))
    assert find_vae(str(source), own).note(own) is None
    assert other.note(tmp_path / "none") is None


def test_what_is_no_vae(source: Path, vae: AutoencoderKL, tmp_path: Path) -> None:
    own, pickle, unet = source / "vae", tmp_path / "x.pt", source / "unet" / "diffusion_pytorch_model.safetensors"
    pickle.write_bytes(b"x")
    wide = tmp_path / "wide.safetensors"
    saved(dict(small_vae(block_out_channels=(16, 16)).state_dict()), wide)
    nested = tmp_path / "int.safetensors"
    saved({name: (weight * 9).int() for name, weight in vae.state_dict().items()}, nested)
    shutil.copytree(source, tmp_path / "broken")
    (tmp_path / "broken" / "vae" / "config.json").write_text("{")
    for name, message in (
        ("nowhere", "no such folder"),
        (str(tmp_path / "gone.safetensors"), "no such file"),
        (str(pickle), "is a pickle, which can run code"),
        (str(unet), "holds no VAE: no tensor is called encoder.down"),
        (str(wide), r"is not what .*vae describes \(.*\); give a diffusers folder with its config.json"),
        (str(nested), "weights are floating-point numbers"),
        (str(source / "unet"), "AutoencoderKL and AutoencoderTiny are the only kinds|cannot be read"),
        (str(tmp_path / "broken"), "cannot be read"),
    ):
        with pytest.raises(TuningError, match=message) as caught:
            read(find_vae(name, own))
        assert "\n" not in str(caught.value)
        assert "VAE" in str(caught.value) or name == str(nested)


def test_a_damaged_file(source: Path, vae: AutoencoderKL, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    saved(dict(vae.state_dict()), path)
    state = load_file(path)
    del state["decoder.conv_out.weight"]
    saved(state, path)
    with pytest.raises(TuningError, match="decoder.conv_out.weight is missing"):
        read(find_vae(str(path), source / "vae"))
