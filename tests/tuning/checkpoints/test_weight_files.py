"""Which files are the weights: what diffusers reads of the same folder, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.sources import save_source
from tuning.__main__ import main as tuning_command
from tuning.checkpoints.find_source import find_source, open_unet
from tuning.checkpoints.folder import load_unet
from tuning.checkpoints.weight_files import find_weights, variants_in
from tuning.errors import TuningError
from tuning.training.teacher import Teacher

PARTS = ("unet", "vae", "text_encoder")
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
UNET_FILE = "diffusion_pytorch_model.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 1234\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as diffusers saves it: weights without a variant, and others as fp16. Not to be changed."""
    folder = tmp_path_factory.mktemp("whole")
    made = save_source(folder / "made")
    models = {part: find_source(str(made)).model(part) for part in PARTS}
    pipeline = StableDiffusionPipeline(
        **models,
        tokenizer=_tokenizer(made),
        scheduler=_scheduler(made),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "both")
    for model in models.values():
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1.5)
    pipeline.to(torch.float16).save_pretrained(folder / "both", variant="fp16")
    return folder / "both"


def _tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder / "tokenizer")


def _scheduler(folder: Path) -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler.from_pretrained(folder / "scheduler")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return shutil.copytree(whole, tmp_path / "copy")


@pytest.fixture
def half(folder: Path) -> Path:
    """A copy that has fp16 files only, as some repositories are."""
    for part, stem in STEMS.items():
        (folder / part / f"{stem}.safetensors").unlink()
    return folder


def of_diffusers(folder: Path, variant: str | None) -> dict[str, dict[str, Tensor]]:
    """The weights of each part as diffusers' pipeline has them, float32."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, variant=variant)
    return {part: getattr(pipeline, part).state_dict() for part in PARTS}


def assert_as_diffusers(folder: Path, variant: str | None = None, theirs: str | None = None) -> None:
    """What a source has of our ``variant`` is what diffusers' pipeline has of ``theirs``."""
    wanted, source = of_diffusers(folder, theirs), find_source(str(folder), variant=variant)
    for part in PARTS:
        found = source.model(part).state_dict()
        assert found.keys() == wanted[part].keys()
        assert all(torch.equal(weight, wanted[part][name]) for name, weight in found.items()), part


def shard(file: Path, parts: int = 3) -> Path:
    """Split a file of weights into shards with an index, as save_pretrained does; the file goes."""
    state = load_file(file)
    names: dict[str, str] = {}
    stem = file.name.removesuffix(".safetensors")
    for i in range(parts):
        name = f"{stem}-{i + 1:05}-of-{parts:05}.safetensors"
        part = {key: state[key] for key in sorted(state)[i::parts]}
        save_file(part, file.with_name(name), {"format": "pt"})
        names |= dict.fromkeys(part, name)
    file.unlink()
    index = file.with_name(f"{file.name}.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return index


# The rule


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_of_two_variants_the_one_that_was_asked_for(whole: Path, variant: str | None) -> None:
    assert_as_diffusers(whole, variant, variant)
    files = [path.name for part in PARTS for path in find_source(str(whole), variant=variant).files(part)]
    assert [name for name in files if "fp16" in name] == ([name for name in files if "safetensors" in name] if variant else [])


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_tuning_reads_the_variant_that_was_asked_for(whole: Path, tmp_path: Path, variant: str | None) -> None:
    wanted = of_diffusers(whole, variant)
    teacher = Teacher.load(str(whole), variant)
    options = [] if variant is None else ["--variant-files", variant]
    assemble = ["assemble", "--source", str(whole), "--recipe", "original", "--precision", "fp32", "--out", str(tmp_path / "a")]
    tuning_command([*assemble, *options])
    for unet in (
        open_unet(str(whole), variant).unet(),  # as rank reads it
        open_unet(str(whole / "unet"), variant).unet(),
        teacher.unet,  # as distill and latents read it
        load_unet(tmp_path / "a"),
    ):
        assert all(torch.equal(weight, wanted["unet"][name]) for name, weight in unet.state_dict().items())
    assert all(torch.equal(weight, wanted["vae"][name]) for name, weight in teacher.vae.state_dict().items())


def test_a_variant_that_no_part_has(whole: Path) -> None:
    """A name that was misspelt would be without effect."""
    for find in (find_source, open_unet):
        with pytest.raises(TuningError, match=r"has no weights of the variant 'fp61' \(variants that it has: fp16\)"):
            find(str(whole), variant="fp61")


@pytest.mark.parametrize("source", ["random:sd15", "model.safetensors"])
def test_variants_are_of_folders(source: str) -> None:
    with pytest.raises(TuningError, match="has no files in variants: leave --variant-files out"):
        open_unet(source, "fp16")


def test_the_only_variant_is_read_unasked(half: Path) -> None:
    assert_as_diffusers(half, theirs="fp16")
    assert all(
        torch.equal(w, v)
        for w, v in zip(load_unet(half / "unet").parameters(), open_unet(str(half)).unet().parameters(), strict=True)
    )


def test_a_part_without_the_variant_is_read_as_it_is(folder: Path) -> None:
    (folder / "vae" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    assert_as_diffusers(folder, "fp16", "fp16")


def test_a_variant_in_shards(folder: Path) -> None:
    """The names are those of diffusers' own save_pretrained."""
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", variant="fp16", torch_dtype=torch.float16)
    shutil.rmtree(folder / "unet")
    unet.save_pretrained(folder / "unet", variant="fp16", max_shard_size="20KB")
    assert len(find_weights(folder / "unet").files) > 2
    assert find_weights(folder / "unet").variant == "fp16"
    assert_as_diffusers(folder, "fp16", "fp16")
    (folder / "vae" / UNET_FILE).unlink()
    (folder / "text_encoder" / "model.safetensors").unlink()
    assert_as_diffusers(folder, theirs="fp16")


def test_the_index_goes_before_a_file_and_before_stale_shards(folder: Path) -> None:
    state = load_file(folder / "unet" / UNET_FILE)
    stale = {name: torch.zeros_like(weight) for name, weight in state.items()}
    shard(folder / "unet" / UNET_FILE)
    save_file(stale, folder / "unet" / "diffusion_pytorch_model-00001-of-00001.safetensors", {"format": "pt"})
    save_file(stale, folder / "unet" / "diffusion_pytorch_model-00004-of-00004.safetensors", {"format": "pt"})
    assert_as_diffusers(folder)
    save_file(stale, folder / "unet" / UNET_FILE, {"format": "pt"})
    assert_as_diffusers(folder)


def test_a_text_encoders_file_goes_before_its_index(folder: Path) -> None:
    """transformers reads text encoders, and looks for the one file first."""
    file = folder / "text_encoder" / "model.safetensors"
    state = load_file(file)
    shard(file)
    assert_as_diffusers(folder)
    save_file({name: torch.zeros_like(weight) for name, weight in state.items()}, file, {"format": "pt"})
    assert_as_diffusers(folder)
    assert find_source(str(folder)).model("text_encoder").state_dict()["final_layer_norm.weight"].abs().max() == 0


def test_names_of_variants() -> None:
    names = [
        "m.safetensors", "m.fp16.safetensors", "m.non_ema.safetensors", "m.bf16-00001-of-00002.safetensors",
        "m.safetensors.index.bf16.json", "m-00001-of-00002.safetensors", "m.bin", "other.safetensors", "m.safetensors.index.json",
    ]  # fmt: skip
    assert variants_in(names, "m") == [None, "bf16", "fp16", "non_ema"]
    assert variants_in(["m-00001-of-00002.safetensors", "m.fp16-00001-of-00002.safetensors"], "m") == []


# What is not needed is not read


def test_pointers_and_rubbish_that_are_not_needed_block_nothing(folder: Path) -> None:
    for part, stem in STEMS.items():
        for name in (f"{stem}.fp16.safetensors", f"{stem}.non_ema.safetensors", f"{stem}-00001-of-00002.safetensors"):
            (folder / part / name).write_text(POINTER)
        (folder / part / f"{stem}.bin").write_text(POINTER)
        os.mkfifo(folder / part / "pipe")
    assert_as_diffusers(folder)


@pytest.mark.parametrize("name", ["unet/" + UNET_FILE, "vae/" + UNET_FILE, "text_encoder/model.safetensors", "vae/config.json",
                                  "tokenizer/tokenizer.json"])  # fmt: skip
def test_a_pointer_and_a_pipe_in_place_of_what_is_needed(folder: Path, name: str) -> None:
    path = folder / name
    path.write_text(POINTER)
    with pytest.raises(TuningError, match=rf"{name} is a Git LFS pointer, not the file itself; fetch it with: git lfs pull"):
        find_source(str(folder))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(TuningError, match=rf"{name} is no regular file; get it again"):
        find_source(str(folder))


def test_a_pipe_in_place_of_a_single_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(TuningError, match="is neither a file nor a folder"):
        find_source(str(tmp_path / "model.safetensors"))


# Mistakes


def without(folder: Path) -> None:
    (folder / "unet" / UNET_FILE).rename(folder / "unet" / "diffusion_pytorch_model.bf16.safetensors")


def renamed(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    (folder / "unet" / UNET_FILE).rename(folder / "unet" / "pytorch_lora_weights.safetensors")


def no_index(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    shard(folder / "unet" / UNET_FILE).unlink()


def no_shard(folder: Path) -> None:
    shard(folder / "unet" / UNET_FILE)
    (folder / "unet" / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()


def outside(folder: Path) -> None:
    shard(folder / "unet" / UNET_FILE)
    (folder / "unet" / INDEX).write_text('{"weight_map": {"conv_in.weight": "../vae/diffusion_pytorch_model.safetensors"}}')


def damaged(folder: Path) -> None:
    shard(folder / "unet" / UNET_FILE)
    (folder / "unet" / INDEX).write_text('{"weight_map": ["a"]}')


def no_json(folder: Path) -> None:
    shard(folder / "unet" / UNET_FILE)
    (folder / "unet" / INDEX).write_text('{"weight_map": {')


@pytest.mark.parametrize(("spoil", "says"), [
    (without, "has its weights in several variants only: bf16, fp16; name one of them with --variant-files"),
    (renamed, r"has pytorch_lora_weights\.safetensors, but no diffusion_pytorch_model\.safetensors"),
    (no_index, r"has shards such as diffusion_pytorch_model-00001-of-00003\.safetensors without their index"),
    (no_shard, r"diffusion_pytorch_model-00002-of-00003\.safetensors is missing; get it again"),
    (outside, r"is no index of safetensors files \(.*it names '\.\./vae"),
    (damaged, "is no index of safetensors files"),
    (no_json, "cannot be read as JSON"),
], ids=lambda value: getattr(value, "__name__", ""))  # fmt: skip
def test_mistakes(folder: Path, spoil: Callable[[Path], None], says: str) -> None:
    spoil(folder)
    with pytest.raises(TuningError, match=says) as caught:
        find_source(str(folder))
    assert "\n" not in str(caught.value)


def test_a_variant_that_is_not_there(half: Path) -> None:
    with pytest.raises(TuningError, match=r"has no weights of the variant bf16; choose from: fp16"):
        find_source(str(half), variant="bf16")
    with pytest.raises(TuningError, match="has no files in variants: leave --variant-files out"):
        find_source("random:sd15", variant="fp16")


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("text_encoder", "text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight"),
        ("vae", "decoder.mid_block.attentions.0.to_q.lora_magnitude_vector.default.weight"),
        ("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.up.weight"),
        ("unet", "mid_block.resnets.0.conv1.hada_w1_a"),
    ],
)
def test_what_other_programs_call_a_lora(folder: Path, part: str, name: str) -> None:
    path = next((folder / part).glob("*.safetensors"))
    save_file(load_file(path) | {name: torch.zeros(2, 2)}, path)
    with pytest.raises(TuningError, match=rf"holds a LoRA that was not fused \({name}\)"):
        find_source(str(folder))


def test_a_lora_that_was_not_fused(folder: Path) -> None:
    path = folder / "unet" / UNET_FILE
    state = load_file(path)
    name = next(name for name in state if name.endswith("to_q.weight"))
    layer = name.removesuffix("weight")
    state[f"{layer}base_layer.weight"] = state.pop(name)
    save_file(state | {f"{layer}lora_A.default.weight": torch.zeros(2, 8)}, path)
    with pytest.raises(TuningError, match=r"holds a LoRA that was not fused \(.*base_layer.*pipe\.fuse_lora\(\)"):
        find_source(str(folder))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.uint8])
def test_weights_that_are_no_floating_point_numbers(folder: Path, part: str, dtype: torch.dtype) -> None:
    path = folder / part / f"{STEMS[part]}.safetensors"
    state = load_file(path)
    name = next(iter(state))
    save_file(state | {name: state[name].to(dtype)}, path)
    with pytest.raises(TuningError, match=rf"holds {str(dtype).removeprefix('torch.')}, and weights are floating-point numbers"):
        find_source(str(folder))


# The hub


def test_a_hub_id_fetches_the_variant_that_there_is(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [path.relative_to(half).as_posix() for path in half.rglob("*") if path.is_file()]
    names += ["vae/diffusion_pytorch_model.bin", "v1-5-pruned.safetensors", "README.md"]
    fetched: list[str] = []

    def snapshot(_source: str, *, allow_patterns: list[str]) -> str:
        fetched.extend(name for name in names if any(fnmatch(name, pattern) for pattern in allow_patterns))
        return str(half)

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda _api, _source: names)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert find_source("a/b").model("unet").dtype == torch.float32
    assert sorted(name for name in fetched if not name.endswith((".json", ".txt"))) == [
        "text_encoder/model.fp16.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    ]  # fmt: skip
    names += ["unet/" + UNET_FILE]
    fetched.clear()
    find_source("a/b")
    assert [name for name in fetched if name.startswith("unet/d")] == ["unet/" + UNET_FILE]
    fetched.clear()
    find_source("a/b", variant="fp16")
    assert [name for name in fetched if name.startswith("unet/d")] == ["unet/diffusion_pytorch_model.fp16.safetensors"]
