"""LoRA files: each form adds what it was written to add, and what is none of ours is refused in one line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel

from tests.support.diffusers_pipelines import pipeline_of
from tests.support.loras import FORMS, add, save_lora
from tests.support.sources import save_source
from tests.support.unets import small_unet
from tuning.checkpoints.find_source import find_source
from tuning.errors import TuningError
from tuning.loras.fused_weights import fused
from tuning.loras.layers import read_lora
from tuning.loras.lora import Lora

PARTS = ("unet", "text_encoder")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_source(tmp_path_factory.mktemp("source") / "tiny")


def models_of(folder: Path) -> dict[str, Any]:
    return {
        "unet": UNet2DConditionModel.from_pretrained(folder, subfolder="unet"),
        "text_encoder": CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
    }


@pytest.fixture(scope="module")
def models(folder: Path) -> dict[str, Any]:
    """Not to be changed."""
    return models_of(folder)


def fuse(folder: Path, *loras: Lora) -> dict[str, dict[str, Tensor]]:
    source = find_source(str(folder))
    unet: Any = source.skeleton("unet")
    files = [read_lora(lora, unet.config) for lora in loras]
    weights = {part: fused(source.weights(part), files, part) for part in PARTS}
    return {part: found.take(found.shapes, torch.float32) for part, found in weights.items()}


def assert_same(made: dict[str, dict[str, Tensor]], wanted: dict[str, Any]) -> None:
    for part, state in made.items():
        for name, weight in wanted[part].state_dict().items():
            assert torch.allclose(state[name], weight, atol=1e-6), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (2.0, -0.7)])
def test_every_form_adds_what_it_was_written_to_add(
    folder: Path, models: dict[str, Any], tmp_path: Path, form: str, alpha: float | None, scale: float
) -> None:
    if form == "old diffusers" and alpha is not None:
        alpha = None  # it has no place for one
    path, wanted = tmp_path / "x.safetensors", models_of(folder)
    added = save_lora(path, models, form, alpha=alpha)
    assert len(added) >= 24
    add(wanted, added, scale)
    assert_same(fuse(folder, Lora(path, scale)), wanted)


def test_kernels_and_time_embeddings_are_layers_too(folder: Path, models: dict[str, Any], tmp_path: Path) -> None:
    path, wanted = tmp_path / "locon.safetensors", models_of(folder)
    unet = {"unet": models["unet"]}
    added = save_lora(path, unet, only=r"resnets|samplers|conv_in|conv_out|time_embedding", alpha=1.0, dtype=torch.float16)
    kinds = {name.split(".")[-2] for name in added}
    assert kinds == {"conv1", "conv2", "conv", "conv_in", "conv_out", "conv_shortcut", "time_emb_proj", "linear_1", "linear_2"}
    add(wanted, added)
    assert_same(fuse(folder, Lora(path)), wanted)


def test_several_add_up(folder: Path, models: dict[str, Any], tmp_path: Path) -> None:
    wanted, loras = models_of(folder), []
    for seed, (form, scale) in enumerate([("kohya", 0.5), ("peft", 1.0), ("kohya", 0.0)]):
        loras.append(Lora(tmp_path / f"{seed}.safetensors", scale))
        add(wanted, save_lora(loras[-1].path, models, form, seed=seed, rank=seed + 1), scale)
    assert_same(fuse(folder, *loras), wanted)


def test_alphas_of_their_own_and_ranks_of_their_own(folder: Path, models: dict[str, Any], tmp_path: Path) -> None:
    one, other, path, wanted = tmp_path / "a", tmp_path / "b", tmp_path / "both.safetensors", models_of(folder)
    add(wanted, save_lora(one, models, only=r"attn1|self_attn", rank=2, alpha=1.0))
    add(wanted, save_lora(other, models, only=r"attn2|mlp", rank=4, alpha=8.0))
    save_file(load_file(one) | load_file(other), path)
    assert_same(fuse(folder, Lora(path)), wanted)


def test_pefts_patterns_of_alphas(folder: Path, models: dict[str, Any], tmp_path: Path) -> None:
    path, wanted, unet = tmp_path / "x.safetensors", models_of(folder), {"unet": models["unet"]}
    added = save_lora(path, unet, "peft", rank=4)
    settings = {"unet.r": 4, "unet.lora_alpha": 2, "unet.alpha_pattern": {"to_q": 8, "^mid_block.attentions.0.proj_in": 1}}
    save_file(load_file(path), path, {"lora_adapter_metadata": json.dumps(settings | {"unet.use_rslora": True})})
    for name, change in added.items():
        alpha = 8 if ".to_q." in name else 1 if "mid_block.attentions.0.proj_in" in name else 2
        change *= alpha / 4**0.5
    add(wanted, added)
    assert_same(fuse(folder, Lora(path)), wanted)


@pytest.mark.parametrize("form", FORMS)
def test_it_is_what_diffusers_fuses(folder: Path, models: dict[str, Any], tmp_path: Path, form: str) -> None:
    """Where peft is installed, which diffusers needs for it."""
    pytest.importorskip("peft")
    path = tmp_path / "x.safetensors"
    save_lora(path, models, form, alpha=None if form == "old diffusers" else 2.0)
    made = fuse(folder, Lora(path, 0.6))
    pipe = pipeline_of(folder)
    pipe.load_lora_weights(tmp_path, weight_name=path.name)
    pipe.fuse_lora(lora_scale=0.6)
    pipe.unload_lora_weights()
    assert_same(made, pipe.components)


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("x.safetensors", "x.safetensors", 1.0),
        ("x.safetensors:0.5", "x.safetensors", 0.5),
        ("a/x.safetensors:-2", "a/x.safetensors", -2.0),
        (r"C:\x.safetensors", r"C:\x.safetensors", 1.0),
        (r"C:\x.safetensors:0.5", r"C:\x.safetensors", 0.5),
        ("style: ink.safetensors", "style: ink.safetensors", 1.0),
        ("style: ink.safetensors:1e-1", "style: ink.safetensors", 0.1),
        ("there.safetensors:2", "there.safetensors:2", 1.0),
        ("~/x.safetensors:0.5", f"{os.path.expanduser('~')}/x.safetensors", 0.5),
    ],
)
def test_how_a_file_and_its_scale_are_read(
    text: str, path: str, scale: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.safetensors:2").touch()
    assert Lora.parse(text) == Lora(Path(path), scale)


@pytest.mark.parametrize("scale", ["", "strong", "0,5", "0.5.1"])
def test_a_scale_that_is_no_number(scale: str) -> None:
    with pytest.raises(
        TuningError, match=rf"its scale '{scale}' is no number; write FILE or FILE:SCALE, such as x.safetensors:0.8"
    ):
        Lora.parse(f"x.safetensors:{scale}")


@pytest.mark.parametrize("scale", ["nan", "inf", "-inf"])
def test_a_scale_that_is_not_finite(scale: str) -> None:
    with pytest.raises(TuningError, match=f"its scale is {scale}; give a finite number"):
        Lora.parse(f"x.safetensors:{scale}").check()


def test_files_that_are_not_opened(tmp_path: Path) -> None:
    for name, content in (("x.pt", b"pickle"), ("x.ckpt", b"pickle"), ("x.txt", b"a")):
        (tmp_path / name).write_bytes(content)
    for name, message in (
        ("gone.safetensors", "no such file; write FILE.safetensors or FILE.safetensors:SCALE"),
        ("x.pt", "is a pickle, which can run code when it is read; .*weights_only=True"),
        ("x.ckpt", "is a pickle"),
        ("x.txt", "is a file of another kind than .safetensors"),
        ("", "is a folder; name the .safetensors file in it"),
    ):
        with pytest.raises(TuningError, match=message) as caught:
            Lora(tmp_path / name).check()
        assert "\n" not in str(caught.value)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(TuningError, match="is no regular file"):
        Lora(tmp_path / "x.safetensors").check()


def changed(state: dict[str, Tensor], change: str) -> dict[str, Tensor]:
    """A LoRA of kohya's with one thing wrong."""
    up = next(name for name in state if name.endswith("lora_up.weight"))
    stem = up.removesuffix(".lora_up.weight")
    down = f"{stem}.lora_down.weight"
    changes: dict[str, dict[str, Tensor]] = {
        "nan": {up: torch.full_like(state[up], torch.nan)},
        "whole numbers": {up: torch.ones_like(state[up], dtype=torch.int32)},
        "rank": {up: torch.zeros(len(state[up]), 7)},
        "rank 0": {up: torch.zeros(len(state[up]), 0), down: torch.zeros(0, state[down].shape[1])},
        "flat": {up: torch.zeros(7)},
        "width": {down: torch.zeros(3, 77)},
        "stranger": {
            f"lora_unet_down_blocks_9_attentions_0_proj_in.lora_{way}.weight": torch.zeros(3, 3) for way in ("up", "down")
        },
        "alpha": {f"{stem}.alpha": torch.zeros(2)},
        "lone alpha": {"lora_unet_mid_block_nothing.alpha": torch.zeros(())},
        "sdxl": {"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.zeros(3, 3)},
        "dora": {f"{stem}.dora_scale": torch.zeros(3)},
        "tucker": {f"{stem}.lora_mid.weight": torch.zeros(3, 3, 3, 3)},
        "loha": {f"{stem}.hada_w1_a": torch.zeros(3, 3)},
        "difference": {f"{stem}.diff": torch.zeros(3, 3)},
        "no names": {"lora_unet_input_blocks_x_1_y.lora_down.weight": torch.zeros(3, 3)},
    }
    if change == "no names at all":
        return {
            name.replace("down_blocks", "input_blocks").replace("mid_b", "").replace("up_b", ""): t for name, t in state.items()
        }
    if change == "half":
        return {name: tensor for name, tensor in state.items() if name != up}
    return state | changes[change]


MISTAKES = {
    "nan": "holds what is no finite floating-point number",
    "whole numbers": "holds what is no finite floating-point number",
    "rank": r"are \(\d+, 7\) and \(3, \d+\), and a layer's have one rank",
    "rank 0": "a layer's have one rank",
    "flat": "a layer's have one rank",
    "width": r"it has \(\d+, 3\) and \(3, 77\), and the source's is \(\d+, \d+",
    "stranger": r"1 of its \d+ unet layers match no layer of the source \(the first: down_blocks.9.attentions.0.proj_in\)",
    "alpha": r"is \(2,\), and must be one number",
    "lone alpha": "lora_unet_mid_block_nothing.alpha belongs to no layer of it",
    "sdxl": "is for SDXL: it has layers for a second text encoder",
    "dora": r"is a DoRA \(.*\), and only LoRA and LoCon are supported",
    "tucker": "is a LoCon in Tucker's form",
    "loha": "is a LoHa",
    "difference": "is a difference of whole weights",
    "half": "names that diffusers cannot read|has no counterpart",
    "no names": r"1 of its \d+ tensors match no layer of the source \(the first: lora_unet_input_blocks_x",
    "no names at all": "has names that diffusers cannot read|have names that diffusers cannot read",
}


@pytest.mark.parametrize("change", MISTAKES)
def test_what_is_no_lora_for_the_source(folder: Path, models: dict[str, Any], tmp_path: Path, change: str) -> None:
    path = tmp_path / "x.safetensors"
    save_lora(path, models)
    save_file(changed(load_file(path), change), path)
    with pytest.raises(TuningError, match=MISTAKES[change]) as caught:
        fuse(folder, Lora(path))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_file_of_something_else(folder: Path, models: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for content, message in (
        (models["unet"].state_dict(), r"is no LoRA: no tensor's name has lora in it \(the first: "),
        ({}, r"is no LoRA: .*\(the first: none\)"),
        ({"lora": torch.zeros(2)}, r"1 of its 1 tensors match no layer of the source \(the first: lora\)"),
    ):
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, path)
        with pytest.raises(TuningError, match=message):
            fuse(folder, Lora(path))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(TuningError, match="cannot be read .*; get the file again"):
        fuse(folder, Lora(path))


@pytest.mark.parametrize(("width", "family"), [(24, "24"), (768, r"768 \(Stable Diffusion 1.x\)"), (2048, r"2048 \(SDXL\)")])
def test_a_lora_for_another_family(folder: Path, tmp_path: Path, width: int, family: str) -> None:
    path = tmp_path / "x.safetensors"
    save_lora(path, {"unet": small_unet("two stages", cross_attention_dim=width)}, only="attn2")
    with pytest.raises(TuningError, match=f"is for a UNet that reads text of width {family}, and the source's reads 16"):
        fuse(folder, Lora(path))


@pytest.mark.parametrize(
    "settings", ["[", "[]", "[" * 100_000, {"unet.use_dora": True}, {"unet.lora_alpha": "much"}, {"unet.alpha_pattern": 3}]
)
def test_a_header_that_cannot_be_read(folder: Path, models: dict[str, Any], tmp_path: Path, settings: Any) -> None:
    path = tmp_path / "x.safetensors"
    save_lora(path, {"unet": models["unet"]}, "peft")
    text = settings if isinstance(settings, str) else json.dumps(settings)
    save_file(load_file(path), path, {"lora_adapter_metadata": text})
    with pytest.raises(TuningError, match="header") as caught:
        fuse(folder, Lora(path))
    assert "\n" not in str(caught.value)
