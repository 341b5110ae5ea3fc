"""What single files say of themselves: which weights are averaged ones, and whether the UNet predicts the noise or v."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextModel

from engines import Bundle
from exporter import BuildOptions, build
from runtime.images.schedulers import SCHEDULERS, make_scheduler
from tests.exporter.conftest import fake_trace  # noqa: F401  a fixture
from tests.support.sources import save_source
from tests.support.unets import small_unet
from tuning.checkpoints.compvis_layout import single_file_state
from tuning.checkpoints.find_source import SD15, find_source
from tuning.checkpoints.prediction import read_prediction
from tuning.errors import TuningError
from tuning.training.teacher import Teacher

FakeTrace = Callable[..., list[str]]
UNET = "model.diffusion_model."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two layers a block, so that its UNet has more than 100 tensors, which diffusers takes for a sign."""
    return save_source(tmp_path_factory.mktemp("source") / "tiny", small_unet("two stages", layers_per_block=2))


@pytest.fixture(scope="module")
def state(folder: Path) -> dict[str, Tensor]:
    """The same as a single file's tensors."""
    parts = {
        "unet": UNet2DConditionModel.from_pretrained(folder, subfolder="unet"),
        "vae": AutoencoderKL.from_pretrained(folder, subfolder="vae"),
        "text_encoder": CLIPTextModel.from_pretrained(folder / "text_encoder"),
    }
    return {name: weight.contiguous() for name, weight in single_file_state(parts).items()}


def averaged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The UNet's weights as CompVis' LitEma calls them."""
    ours = {
        f"model_ema.{name.partition('.')[2].replace('.', '')}": weight for name, weight in state.items() if name.startswith(UNET)
    }
    return ours | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7, dtype=torch.int32)}


def of_others(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight for name, weight in state.items() if not name.startswith(UNET)}


def test_averaged_weights_alone_are_read_as_diffusers_extracts_them(
    folder: Path, state: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    save_file(of_others(state) | averaged(state), path)
    source = find_source(str(path), folder)
    unet: Any = source.skeleton("unet")
    plain = {name: torch.zeros_like(weight) for name, weight in state.items() if name.startswith(UNET)}
    wanted = convert_ldm_unet_checkpoint(plain | averaged(state), unet.config, extract_ema=True)
    taken = source.weights("unet").take(wanted, torch.float32)
    assert taken.keys() == unet.state_dict().keys()
    assert all(torch.equal(taken[name], weight) for name, weight in wanted.items())
    assert source.notes() == [f"source {path}: its UNet's weights are averaged ones (model_ema.), the only ones that it has"]


def test_of_both_the_plain_ones_are_read(folder: Path, state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(state | {name: torch.zeros_like(weight) for name, weight in averaged(state).items()}, path)
    source = find_source(str(path), folder)
    taken = source.weights("unet").take(["conv_in.weight"], torch.float32)
    assert torch.equal(taken["conv_in.weight"], state[f"{UNET}input_blocks.0.0.weight"])
    assert source.notes() == []


def test_the_family_of_averaged_weights(folder: Path, state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(of_others(state) | averaged(state), path)
    with pytest.raises(TuningError, match="its UNet reads text of width 16, neither"):
        find_source(str(path))


@pytest.mark.parametrize("change", ["missing", "stranger", "whole numbers"])
def test_averaged_weights_of_another_unet(folder: Path, state: dict[str, Tensor], tmp_path: Path, change: str) -> None:
    path, found = tmp_path / "x.safetensors", averaged(state)
    name = "model_ema.diffusion_modelinput_blocks00weight"
    if change == "missing":
        del found[name]
    elif change == "stranger":
        found["model_ema.diffusion_modellabel_emb00weight"] = torch.zeros(2)
    else:
        found[name] = found[name].int()
    save_file(of_others(state) | found, path)
    messages = {"missing": "conv_in.weight is missing", "stranger": "it has no model_ema.diffusion_modellabel_emb00weight"}
    with pytest.raises(TuningError, match=messages.get(change, "weights are floating-point numbers")):
        find_source(str(path), folder).weights("unet")


# Prediction

SAID: list[tuple[dict[str, str], tuple[str, ...], dict[str, Any], str]] = [
    ({}, (), {}, ""),
    (
        {"modelspec.prediction_type": "v"},
        (),
        {"prediction_type": "v_prediction"},
        "its UNet predicts v (modelspec.prediction_type in",
    ),
    ({"modelspec.prediction_type": "v_prediction"}, (), {"prediction_type": "v_prediction"}, "predicts v"),
    ({"modelspec.predict_key": "epsilon"}, (), {"prediction_type": "epsilon"}, "predicts the noise (modelspec.predict_key in"),
    ({"modelspec.predict_key": "V"}, (), {"prediction_type": "v_prediction"}, "predicts v"),
    ({}, ("v_pred",), {"prediction_type": "v_prediction"}, "predicts v (it has a tensor v_pred)"),
    ({"modelspec.prediction_type": "epsilon"}, ("v_pred",), {"prediction_type": "v_prediction"}, "it has a tensor v_pred"),
    (
        {},
        ("v_pred", "ztsnr"),
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        "trained with noise up to a signal of zero (ztsnr)",
    ),
    ({"modelspec.prediction_type": "flow"}, (), {}, "'flow', which is neither epsilon nor v and is not followed"),
    ({"modelspec.architecture": "stable-diffusion-v1"}, ("ztsnr",), {}, ""),
]


def write(state: dict[str, Tensor], path: Path, header: dict[str, str], names: tuple[str, ...]) -> Path:
    save_file(state | {name: torch.zeros(0) for name in names}, path, header)
    return path


@pytest.mark.parametrize(("header", "names", "changes", "note"), SAID)
def test_what_a_file_says(
    tmp_path: Path, header: dict[str, str], names: tuple[str, ...], changes: dict[str, Any], note: str
) -> None:
    found = read_prediction(write({"x": torch.zeros(1)}, tmp_path / "x.safetensors", header, names))
    assert (found.scheduler_changes if found else {}) == changes
    assert note in str(found or "")


@pytest.mark.slow
def test_the_scheduler_of_a_file_that_predicts_v(
    folder: Path,
    state: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fake_trace: FakeTrace,  # noqa: F811
) -> None:
    """In the bundle, for a teacher, and not where a folder was named whose scheduler says another thing."""
    path = write(state, tmp_path / "x.safetensors", {}, ("v_pred", "ztsnr"))
    fake_trace()
    monkeypatch.setattr("tuning.checkpoints.find_source._family_of", lambda *given: folder)
    bundle, _ = build(BuildOptions(source=str(path), out=tmp_path / "bundle"))
    assert bundle.manifest.notes == (
        f"source {path}: its UNet predicts v (it has a tensor v_pred), trained with noise up to a signal of zero (ztsnr)",
    )
    own = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    wanted = own | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    assert json.loads((bundle.folder / "scheduler" / "scheduler_config.json").read_text()) == wanted
    Bundle.open(bundle.folder).check()
    for name in SCHEDULERS:
        assert make_scheduler(name, bundle.folder / "scheduler", 4).config.prediction_type == "v_prediction"
    assert Teacher.load(str(path)).schedule.config.prediction_type == "v_prediction"
    configured = find_source(str(path), folder)
    assert configured.scheduler_config() == own
    assert configured.notes()[0].endswith("(the scheduler is that of --config)")


def test_a_family_whose_scheduler_says_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stable Diffusion 2's 512-pixel model predicts the noise, and has the shape of the one that predicts v."""
    state = {f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(1, 1024)}
    path = write(state, tmp_path / "x.safetensors", {"modelspec.prediction_type": "epsilon"}, ())
    source = find_source(str(path))
    assert source.folder == SD15.with_name("sd21")
    assert source.scheduler_config()["prediction_type"] == "epsilon"
