"""Checkpoints from strangers: what configurations may ask of libraries beside the model itself is not done."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from engines.support.tokenizers import load_clip_tokenizer
from tests.engines.test_pt2 import Trap
from tests.security.test_manifests import at_most
from tests.support.sources import save_source
from tests.tuning.checkpoints.test_weight_files import shard
from tuning.checkpoints.find_source import find_source
from tuning.errors import TuningError

TOKENS = torch.tensor([[1, 5, 7, 2]])
CONFIGS = Path("models").resolve()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint. Not to be changed."""
    return save_source(tmp_path_factory.mktemp("strangers") / "whole")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return shutil.copytree(whole, tmp_path / "copy")


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def states(text: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = text.eval()(TOKENS).last_hidden_state
    return found


@pytest.mark.parametrize(
    "asked",
    [
        {"attn_implementation": "kernels-community/flash-attn2"},
        {"_attn_implementation": "flash_attention_2"},
        {"auto_map": {"AutoModel": "code.Model"}, "architectures": ["Model"]},
        {"return_dict": False},
        {"dtype": "float16"},
    ],
)
def test_what_is_not_of_the_model_is_not_done(folder: Path, asked: dict[str, Any]) -> None:
    """An attention from a hub would be fetched and run."""
    wanted = states(CLIPTextModel.from_pretrained(folder, subfolder="text_encoder"))
    change(folder / "text_encoder" / "config.json", **asked)
    text = find_source(str(folder)).model("text_encoder")
    assert text.config._attn_implementation == "sdpa"
    assert torch.equal(states(text), wanted)


def test_the_text_encoder_in_the_configuration_of_all_of_clip(folder: Path) -> None:
    path = folder / "text_encoder" / "config.json"
    inner = json.loads(path.read_text())
    path.write_text(json.dumps({"model_type": "clip", "text_config": inner, "hidden_size": 7, "projection_dim": 16}))
    wanted = states(CLIPTextModel.from_pretrained(folder, subfolder="text_encoder"))
    assert torch.equal(states(find_source(str(folder)).model("text_encoder")), wanted)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_quantized_weights_are_refused_before_a_package_for_them_is_looked_for(folder: Path, part: str) -> None:
    change(folder / part / "config.json", quantization_config={"quant_method": "gguf"})
    with pytest.raises(TuningError, match="it describes quantized weights"):
        find_source(str(folder)).weights(part)


# transformers_weights


def halved(path: Path, other: Path) -> None:
    save_file({name: weight / 2 for name, weight in load_file(path).items()}, other, {"format": "pt"})


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_that_the_configuration_names_are_those_that_transformers_reads(folder: Path, sharded: bool) -> None:
    part = folder / "text_encoder"
    halved(part / "model.safetensors", part / "other.safetensors")
    named = shard(part / "other.safetensors").name if sharded else "other.safetensors"
    change(part / "config.json", transformers_weights=named)
    wanted = states(CLIPTextModel.from_pretrained(folder, subfolder="text_encoder"))
    source = find_source(str(folder))
    assert torch.equal(states(source.model("text_encoder")), wanted)
    read = [path.name for path in source.files("text_encoder")]
    assert named in read, "a build tells by its hash whether it is up to date"
    assert "model.safetensors" not in read


@pytest.mark.parametrize("named", ["adapter_model.bin", "../unet/x.safetensors", "a/b.safetensors", "model.gguf", 3, ["a"]])
def test_weights_that_may_not_be_named(folder: Path, tmp_path: Path, named: Any) -> None:
    """transformers opens a pickle of the first name."""
    (folder / "text_encoder" / "adapter_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "witness")))
    change(folder / "text_encoder" / "config.json", transformers_weights=named)
    with pytest.raises(TuningError, match="it may name a .safetensors file beside it") as caught:
        find_source(str(folder)).model("text_encoder")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "witness").exists()


# Tokenizers


def a_pipe(place: Path) -> str:
    os.mkfifo(place)
    return str(place)


def another_vocabulary(place: Path) -> str:
    place.write_text(json.dumps({"a": 0}))
    return str(place)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("key", ["gguf_file", "vocab_file", "merges_file", "tokenizer_file", "tokenizer_object", "vocab"])
@pytest.mark.parametrize("elsewhere", [a_pipe, another_vocabulary])
def test_files_elsewhere_that_a_tokenizers_configuration_names_are_not_read(
    folder: Path, tmp_path: Path, key: str, fast: bool, elsewhere: Callable[[Path], str]
) -> None:
    if not fast:
        (folder / "tokenizer" / "tokenizer.json").unlink()
    wanted = CLIPTokenizer.from_pretrained(folder / "tokenizer")("a red star").input_ids
    change(folder / "tokenizer" / "tokenizer_config.json", **{key: elsewhere(tmp_path / "elsewhere")})
    with at_most(60):
        assert load_clip_tokenizer(folder / "tokenizer")("a red star").input_ids == wanted


@pytest.mark.parametrize("length", ["a", -1, None, [5], 0, True, 1.5])
def test_a_length_that_is_none(folder: Path, length: Any) -> None:
    change(folder / "tokenizer" / "tokenizer_config.json", model_max_length=length)
    assert len(load_clip_tokenizer(folder / "tokenizer")("a red star", verbose=False).input_ids) > 2


@pytest.mark.parametrize("family", ["sd15", "sd21", "mini", "emoji"])
def test_tokenizers_are_those_of_transformers(family: str) -> None:
    theirs, ours = (load(CONFIGS / family / "tokenizer") for load in (CLIPTokenizer.from_pretrained, load_clip_tokenizer))
    for prompt in ("a red star", "", "Weiß, \u661f! " * 60):
        options: Any = {"padding": "max_length", "truncation": True}
        assert ours(prompt, **options).input_ids == theirs(prompt, **options).input_ids


def test_a_tokenizer_of_another_text_encoder(folder: Path) -> None:
    source = find_source(str(folder))
    text = source.model("text_encoder")
    change(folder / "tokenizer" / "tokenizer_config.json", model_max_length=10**9)
    assert source.tokenizer(text.config).model_max_length == text.config.max_position_embeddings
    shutil.rmtree(folder / "tokenizer")
    shutil.copytree(CONFIGS / "sd15" / "tokenizer", folder / "tokenizer")
    with pytest.raises(
        TuningError, match=r"tokenizer cannot be read \(its numbers go up to 49407, and the text encoder knows 636"
    ):
        source.tokenizer(text.config)


@pytest.mark.parametrize("broken", ["{}", "", '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}'])
def test_a_tokenizer_that_does_not_work_is_found_before_anything_is_traced(folder: Path, broken: str) -> None:
    (folder / "tokenizer" / "tokenizer.json").write_text(broken)
    source = find_source(str(folder))
    text: Any = source.skeleton("text_encoder")
    with pytest.raises(TuningError, match="tokenizer cannot be read") as caught:
        source.tokenizer(text.config)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_cannot_pad_is_found_before_anything_is_traced(folder: Path) -> None:
    change(folder / "tokenizer" / "tokenizer_config.json", pad_token=None)
    source = find_source(str(folder))
    text: Any = source.skeleton("text_encoder")
    with pytest.raises(TuningError, match="tokenizer cannot be read .*padding token"):
        source.tokenizer(text.config)
