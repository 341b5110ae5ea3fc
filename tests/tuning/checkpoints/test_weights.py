"""Weights a few at a time: the very tensors that the model's own library loads, from whatever a checkpoint is kept in."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from tests.support.reference import MINI
from tests.support.unets import small_unet
from tuning.checkpoints.compvis_layout import single_file_state, unet_state
from tuning.checkpoints.find_source import find_source, open_unet
from tuning.checkpoints.folder import unet_weights
from tuning.checkpoints.weights import RandomWeights, materialize, mmap_safetensors, shapes_of
from tuning.errors import TuningError

PARTS = ("unet", "vae", "text_encoder")
CONFIGS = MINI.parent


@pytest.fixture(scope="module")
def originals() -> dict[str, Any]:
    """The embedded model as its libraries load it, float32."""
    return {
        "unet": UNet2DConditionModel.from_pretrained(MINI, subfolder="unet").float(),
        "vae": AutoencoderKL.from_pretrained(MINI, subfolder="vae").float(),
        "text_encoder": CLIPTextModel.from_pretrained(MINI / "text_encoder", dtype=torch.float32),
    }


@pytest.fixture(scope="module")
def single_files(originals: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model as single files: fp32, fp16, and with a text encoder as Stable Diffusion 2.x has it."""
    folder = tmp_path_factory.mktemp("single")
    state = single_file_state(originals)
    save(state, folder / "fp32.safetensors")
    save(
        {name: weight.half() if weight.is_floating_point() else weight for name, weight in state.items()},
        folder / "fp16.safetensors",
    )
    save(single_file_state(originals, open_clip=True), folder / "open_clip.safetensors")
    averaged = {f"model_ema.{name.replace('.', '')}": torch.zeros_like(weight) for name, weight in state.items()}
    save(state | averaged, folder / "averaged.safetensors")
    return folder


def save(state: dict[str, Tensor], path: Path) -> None:
    save_file({name: weight.contiguous() for name, weight in state.items()}, path)


def save_folder(folder: Path, dtype: torch.dtype, **options: Any) -> Path:
    """The embedded model, saved anew by its libraries."""
    shutil.copytree(MINI, folder, ignore=shutil.ignore_patterns("unet*", "vae", "text_encoder", "training"))
    for part, kind in zip(PARTS, (UNet2DConditionModel, AutoencoderKL, CLIPTextModel), strict=True):
        model = kind.from_pretrained(MINI / part, dtype=dtype) if part == "text_encoder" else kind.from_pretrained(MINI / part)
        model.to(dtype).save_pretrained(folder / part, **options)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, saved anew in float32. Not to be changed."""
    return save_folder(tmp_path_factory.mktemp("saved") / "saved", torch.float32)


@pytest.fixture
def saved_copy(saved: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(saved, tmp_path / "saved"))


def assert_same(source: Any, originals: dict[str, Any], dtype: torch.dtype = torch.float32) -> None:
    for part, model in originals.items():
        taken = source.weights(part).take(model.state_dict(), dtype)
        assert taken.keys() == model.state_dict().keys() == source.skeleton(part).state_dict().keys()
        for name, weight in model.state_dict().items():
            assert torch.equal(taken[name], weight.to(dtype)), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "500KB"}], ids=["whole", "sharded"])
def test_a_diffusers_folder(originals: dict[str, Any], tmp_path: Path, dtype: torch.dtype, options: dict[str, Any]) -> None:
    folder = save_folder(tmp_path / "saved", dtype, **options)
    assert (len(list(folder.rglob("*.safetensors"))) > 3) == bool(options)
    assert_same(find_source(str(folder)), originals)


@pytest.mark.parametrize("name", ["fp32", "fp16", "open_clip", "averaged"])
def test_a_single_file(originals: dict[str, Any], single_files: Path, name: str) -> None:
    assert_same(find_source(str(single_files / f"{name}.safetensors"), MINI), originals)


def test_a_single_file_as_diffusers_reads_it(single_files: Path) -> None:
    path = single_files / "fp32.safetensors"
    unet = UNet2DConditionModel.from_single_file(str(path), config=str(MINI), subfolder="unet", local_files_only=True)
    vae = AutoencoderKL.from_single_file(str(path), config=str(MINI), subfolder="vae", local_files_only=True)
    source = find_source(str(path), MINI)
    for part, model in (("unet", unet), ("vae", vae)):
        taken = source.weights(part).take(model.state_dict(), torch.float32)
        assert all(torch.equal(taken[name], weight) for name, weight in model.state_dict().items())


def test_old_names_in_a_folder(originals: dict[str, Any], saved_copy: Path) -> None:
    """Stable Diffusion 1.5's VAE on the hub has the attention names of an older diffusers, its text encoder a prefix."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for part, file, rename in (
        ("vae", "diffusion_pytorch_model", lambda name: renamed(name, old)),
        ("text_encoder", "model", lambda name: f"text_model.{name.removeprefix('text_model.')}"),
    ):
        path = saved_copy / part / f"{file}.safetensors"
        state = {rename(name): weight for name, weight in load_file(path).items()}
        save_file(state, path, {"format": "pt"})
    assert_same(find_source(str(saved_copy)), originals)


def renamed(name: str, old: dict[str, str]) -> str:
    for new, older in old.items():
        name = name.replace(f"attentions.0.{new}.", f"attentions.0.{older}.")
    return name


@pytest.mark.parametrize("source", ["mini", "single", "random:sd15"])
@pytest.mark.parametrize("part", PARTS)
def test_a_few_at_a_time_in_half_precision(single_files: Path, source: str, part: str) -> None:
    found = find_source(str(single_files / "fp32.safetensors"), MINI) if source == "single" else find_source(source)
    weights = found.weights(part)
    names = [name for name, shape in weights.shapes.items() if shape.numel() < 5000]
    some = [names[7], names[2], names[-1]]
    once, others = weights.take(some, torch.float16), weights.take(reversed(some[:2]), torch.float32)
    assert list(once) == some
    assert {weight.dtype for weight in once.values()} == {torch.float16}
    assert all(torch.equal(weight.half(), once[name]) for name, weight in others.items())
    assert all(weight.shape == weights.shapes[name] and weight.is_contiguous() for name, weight in once.items())
    with pytest.raises(TuningError, match="there is no conv_nowhere in this part's module"):
        weights.take(["conv_nowhere"], torch.float32)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("part", PARTS)
def test_no_file_stays_mapped(single_files: Path, saved: Path, tmp_path: Path, part: str) -> None:
    def mapped() -> list[str]:
        return [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(".safetensors")]

    before = mapped()
    path = shutil.copyfile(single_files / "fp32.safetensors", tmp_path / "one.safetensors")
    taken = []
    for source in (find_source(str(path), MINI), find_source(str(saved))):
        weights = source.weights(part)
        taken.append(weights.take(weights.shapes, torch.float32))
    assert mapped() == before
    path.write_bytes(b"")
    assert all(torch.equal(weight, taken[1][name]) for name, weight in taken[0].items())


def test_files_are_opened_anew_before_too_much_of_them_is_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    monkeypatch.setattr("tuning.checkpoints.weights._MAPPED_AT_ONCE", 500_000)

    def note(path: Path) -> dict[str, Tensor]:
        opened.append(path)
        return mmap_safetensors(path)

    monkeypatch.setattr("tuning.checkpoints.folder.mmap_safetensors", note)
    file = MINI / "unet" / "diffusion_pytorch_model.safetensors"
    skeleton: Any = find_source("mini").skeleton("unet")
    made, original = materialize(skeleton, unet_weights(file.parent, skeleton)), load_file(file)
    assert len(opened) > 5
    assert all(torch.equal(weight, original[name].float()) for name, weight in made.state_dict().items())


def test_the_skeleton_with_its_weights_computes_what_the_model_does(originals: dict[str, Any]) -> None:
    source = find_source("mini")
    tokens = torch.arange(32)[None]
    text = source.model("text_encoder")
    assert not text.training
    assert next(source.skeleton("text_encoder").parameters()).is_meta
    with torch.no_grad():
        states = text(input_ids=tokens).last_hidden_state
        assert torch.equal(states, originals["text_encoder"].eval()(input_ids=tokens).last_hidden_state)
        inputs = torch.ones(1, 4, 8, 8), torch.tensor([3.0]), states
        assert torch.equal(source.model("unet")(*inputs).sample, originals["unet"].eval()(*inputs).sample)


# Random weights


def test_random_weights_depend_on_seed_part_and_name_only() -> None:
    shapes = shapes_of(find_source("mini").skeleton("unet"))
    whole = RandomWeights("unet", shapes).take(shapes, torch.float32)
    names = list(shapes)[::7]
    few = RandomWeights("unet", shapes).take(reversed(names), torch.float32)
    assert all(torch.equal(few[name], whole[name]) for name in names)
    for other in (RandomWeights("unet", shapes, seed=1), RandomWeights("vae", shapes)):
        assert not torch.equal(other.take(["conv_in.weight"], torch.float32)["conv_in.weight"], whole["conv_in.weight"])
    assert not torch.equal(whole["conv_in.bias"], whole["down_blocks.0.resnets.0.norm1.bias"])


def test_random_weights_have_sane_sizes_and_are_nowhere_constant() -> None:
    shapes = {"a.weight": torch.Size([64, 32, 3, 3]), "norm.weight": torch.Size([1000]), "a.bias": torch.Size([1000])}
    drawn = RandomWeights("unet", shapes).take(shapes, torch.float32)
    assert drawn["a.weight"].std().item() == pytest.approx((32 * 9) ** -0.5, rel=0.05)
    assert drawn["norm.weight"].mean().item() == pytest.approx(1, abs=0.02)
    assert drawn["a.bias"].mean().item() == pytest.approx(0, abs=0.02)
    assert all(weight.unique().numel() > 900 for weight in drawn.values())


def test_random_activations_stay_in_half_precisions_range() -> None:
    source = find_source(f"random:{MINI / 'unet' / 'config.json'}", MINI)
    unet = source.model("unet")
    largest: list[float] = []
    for module in unet.modules():
        module.register_forward_hook(lambda _module, _inputs, output: keep_largest(largest, output))
    with torch.no_grad():
        out = unet(torch.randn(2, 4, 8, 8), torch.tensor([500.0]), torch.randn(2, 32, 128)).sample
    assert 0.1 < out.std() < 10
    assert max(largest) < 100


def keep_largest(largest: list[float], output: Any) -> None:
    if isinstance(output, Tensor):
        largest.append(output.abs().max().item())


# Families: configurations and vocabulary without weights


@pytest.mark.parametrize(("family", "pad"), [("sd15", 49407), ("sd21", 0)])
def test_the_vocabulary_of_clip(family: str, pad: int) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(CONFIGS / family / "tokenizer", local_files_only=True)
    ids = tokenizer("a photo of an astronaut riding a horse on mars", padding="max_length").input_ids
    assert ids[:12] == [49406, 320, 1125, 539, 550, 18376, 6765, 320, 4558, 525, 7496, 49407]
    assert ids[12:] == [pad] * 65
    assert len(tokenizer) == 49408


@pytest.mark.parametrize(("family", "width", "target"), [("sd15", 768, "epsilon"), ("sd21", 1024, "v_prediction")])
def test_a_familys_parts_fit_together(family: str, width: int, target: str) -> None:
    source = find_source(f"random:{family}")
    unet, text, vae = (source.skeleton(part) for part in ("unet", "text_encoder", "vae"))
    config: Any = unet.config
    assert (config.cross_attention_dim, text.config.hidden_size, text.config.vocab_size) == (width, width, 49408)  # type: ignore[union-attr]
    assert vae.config.sample_size == 8 * config.sample_size  # type: ignore[union-attr]
    millions = {"sd15": (860, 84, 123), "sd21": (866, 84, 340)}[family]
    assert tuple(round(sum(w.numel() for w in part.parameters()) / 1e6) for part in (unet, vae, text)) == millions
    scheduler = json.loads((source.folder / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == target


@pytest.fixture(scope="module", params=["sd15", "sd21"])
def full_size(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A single file of a family's real shape and names: gigabytes of zeros that take no place on the disk."""
    source = find_source(f"random:{request.param}")
    state = single_file_state({part: source.skeleton(part) for part in PARTS}, open_clip=request.param == "sd21")
    header: dict[str, Any] = {}
    at = 0
    for name, weight in state.items():
        size = 2 * weight.numel()
        header[name] = {"dtype": "F16", "shape": list(weight.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    path = tmp_path_factory.mktemp("full") / "full.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    yield request.param, path
    path.unlink()


def test_a_single_file_of_full_size(full_size: tuple[str, Path]) -> None:
    family, path = full_size
    source = find_source(str(path))
    assert source.folder == CONFIGS / family
    for part, name in (
        ("unet", "up_blocks.3.attentions.2.proj_out.weight"),
        ("vae", "decoder.mid_block.attentions.0.to_q.weight"),
    ):
        weights = source.weights(part)
        taken = weights.take([name], torch.float16)[name]
        assert taken.shape == weights.shapes[name]
        assert not taken.any()
    assert open_unet(str(path)).whole == source


# Mistakes


def damaged(state: dict[str, Tensor], *, without: str = "nothing", **changes: Tensor) -> dict[str, Tensor]:
    return {name: weight for name, weight in (state | changes).items() if not name.startswith(without)}


def test_single_files_that_are_no_checkpoint(originals: dict[str, Any], single_files: Path, tmp_path: Path) -> None:
    state, unet = load_file(single_files / "fp32.safetensors"), originals["unet"].state_dict()
    path = tmp_path / "x.safetensors"
    mistakes: list[tuple[dict[str, Tensor], str]] = [
        (unet, "it is a diffusers UNet.* with its config.json"),
        ({"lora_unet_mid.lora_down.weight": torch.zeros(2)}, "it is a LoRA"),
        ({"weight": torch.zeros(2)}, r"no tensor is called model\.diffusion_model\.\*"),
        ({"conditioner.embedders.0.x": torch.zeros(2), **unet_state(originals["unet"])}, "SDXL"),
        (damaged(state, without="first_stage_model."), "has no VAE"),
        (damaged(state, without="cond_stage_model."), "has no text encoder"),
        (damaged(state, without="model.diffusion_model.out.2"), r"conv_out\.weight is missing.*--config DIR"),
        (
            state | {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3)},
            r"conv_in\.weight is \(32, 9, 3, 3\)",
        ),
    ]
    for content, message in mistakes:
        save(content, path)
        with pytest.raises(TuningError, match=message):
            read_all(path)
    whole = (single_files / "fp32.safetensors").read_bytes()
    for size in (0, 100, 100_000, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(TuningError, match=r"x\.safetensors: its weights cannot be read .*; get the file again"):
            read_all(path)


def read_all(path: Path) -> None:
    source = find_source(str(path), MINI)
    for part in PARTS:
        source.weights(part)


def test_a_single_file_of_no_known_family(single_files: Path, tmp_path: Path) -> None:
    path = str(single_files / "fp32.safetensors")
    with pytest.raises(TuningError, match=r"text of width 128, .*; give --config DIR .*, a diffusers folder with the config"):
        find_source(path)
    with pytest.raises(TuningError, match=r"config .* is no diffusers folder: .*config\.json is missing"):
        find_source(path, tmp_path)
    with pytest.raises(TuningError, match=r"its UNet is not what .*sd15/unet describes .*give --config DIR"):
        find_source(path, CONFIGS / "sd15").weights("unet")
    with pytest.raises(TuningError, match="source mini has configurations of its own: leave --config out"):
        find_source("mini", CONFIGS / "sd15")


def test_a_random_source_whose_text_width_no_family_has(tmp_path: Path) -> None:
    small_unet("two stages").save_pretrained(tmp_path)
    with pytest.raises(TuningError, match=r"text of width 16, .*; give --config DIR"):
        find_source(f"random:{tmp_path / 'config.json'}")
    assert open_unet(f"random:{tmp_path / 'config.json'}").unet().config.cross_attention_dim == 16


@pytest.mark.parametrize("part", PARTS)
def test_a_folders_damaged_and_foreign_weights(saved_copy: Path, part: str) -> None:
    source = find_source(str(saved_copy))
    path = next((saved_copy / part).glob("*.safetensors"))
    state = load_file(path)
    name = next(name for name in state if name.endswith("norm.weight") or "norm" in name)
    for content in (damaged(state, without=name), state | {name: torch.zeros(3)}):
        save_file(content, path, {"format": "pt"})
        with pytest.raises(TuningError, match="get (both|its files) again"):
            source.model(part)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(TuningError, match="cannot be read"):
        source.model(part)


def test_the_hubs_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    from httpx2 import ProxyError, ReadError
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    response = Mock()
    refusals: list[tuple[Exception, str]] = [
        (GatedRepoError("no", response=response), r"source a/b is gated: agree to its terms at .*/a/b, then .* hf auth login"),
        (RepositoryNotFoundError("no", response=response), "the hub has no repository of that name for you"),
        (LocalEntryNotFoundError("no"), "it is not in the hub's cache, and the hub may not be asked: HF_HUB_OFFLINE is set"),
        (ProxyError("502 Bad Gateway"), r"could not be fetched from the hub \(502 Bad Gateway\); try again"),
        (ReadError(""), r"could not be fetched from the hub \(ReadError\)"),
        (OSError("No space left on device"), r"could not be fetched from the hub \(No space left on device\)"),
    ]
    for error, message in refusals:

        def refuse(*_args: Any, error: Exception = error, **_more: Any) -> None:
            raise error

        monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
        with pytest.raises(TuningError, match=message):
            find_source("a/b")


def test_a_repository_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pickles are not fetched, but its configurations are."""
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_args, **_more: str(tmp_path))
    with pytest.raises(TuningError, match=r"no \.safetensors file.*P\.from_pretrained\('a/b'\)\.save_pretrained\('a/b-safe"):
        find_source("a/b")
