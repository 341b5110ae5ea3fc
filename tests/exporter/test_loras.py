"""LoRAs fused by a build: pictures are those of diffusers with the same weights, and only what a LoRA touches is built again."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

import tuning
from engines import Bundle, make_engine
from exporter import BuildOptions, SourceError, build
from exporter.graph.checkpoint import Checkpoint, open_source
from exporter.verification.verify import Reference
from runtime import Pipeline
from tests.support.commands import Command, assert_refused
from tests.support.diffusers_pipelines import NEGATIVE, PROMPT, SEED, latents, pipeline_of
from tests.support.loras import Added, add, save_lora
from tests.support.reference import MINI
from tests.support.sources import save_source, tiny_vae
from tests.support.unets import relative_error, small_unet
from tuning.checkpoints.folder import save_part
from tuning.loras.lora import Lora

FakeTrace = Callable[..., list[str]]


def models_of(folder: Path, unet: str = "unet") -> dict[str, Any]:
    return {
        "unet": UNet2DConditionModel.from_pretrained(folder, subfolder=unet).float(),
        "text_encoder": CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
    }


@pytest.fixture(scope="session")
def models(tiny_source: Path) -> dict[str, Any]:
    """Not to be changed."""
    return models_of(tiny_source)


def save_on_tiny(models: dict[str, Any], path: Path, only: str, seed: int = 0, part: str = "unet") -> Lora:
    save_lora(path, {part: models[part]}, only=only, seed=seed)
    return Lora(path, 0.5)


@pytest.mark.slow
@pytest.mark.shared_pieces
def test_latents_are_those_of_diffusers_with_the_same_weights(tmp_path: Path) -> None:
    """The VAE is the one that is built fastest: latents know nothing of it."""
    source = save_source(tmp_path / "source", small_unet("two stages", mid_block_type=None))
    tiny_vae().save_pretrained(tmp_path / "vae")
    wanted, models, loras = pipeline_of(source, vae=tiny_vae()), models_of(source), []
    for number, (form, only, scale) in enumerate([("kohya", "", 0.8), ("peft", "attn|self_attn", -0.5)]):
        loras.append(Lora(tmp_path / f"{number}.safetensors", scale))
        add(wanted.components, save_lora(loras[-1].path, models, form, only=only, alpha=2.0, seed=number), scale)
    options = BuildOptions(source=str(source), vae=str(tmp_path / "vae"), loras=tuple(loras), granularity=None, plans=("full",))
    bundle, _ = build(dataclasses.replace(options, out=tmp_path / "bundle"))
    settings: dict[str, Any] = {"steps": 4, "guidance_scale": 3.0}
    pipe = Pipeline(bundle, make_engine("onnxruntime"))
    made, expected = pipe.generate(PROMPT, NEGATIVE, seed=SEED, scheduler="ddim", **settings), latents(wanted, **settings)
    assert relative_error(made.latents, expected) < 1e-4
    reference = Reference.load(bundle)  # what `verify` compares with, found by the manifest
    assert all(torch.allclose(reference.unet.get_parameter(name), weight) for name, weight in wanted.unet.named_parameters())
    assert relative_error(latents(pipeline_of(source, vae=tiny_vae()), **settings), expected) > 1e-2


def traced_for(fake_trace: FakeTrace, tiny_source: Path, out: Path, *loras: Lora) -> list[str]:
    traced = fake_trace()
    bundle, built = build(BuildOptions(source=str(tiny_source), granularity="layer", out=out, loras=loras))
    assert built
    bundle.check()
    return traced


@pytest.mark.slow
def test_only_what_a_lora_touches_is_built_again(
    tiny_source: Path, models: dict[str, Any], tmp_path: Path, fake_trace: FakeTrace
) -> None:
    assert len(traced_for(fake_trace, tiny_source, tmp_path / "plain")) > 10
    inner = save_on_tiny(models, tmp_path / "inner.safetensors", "mid_block.attentions")
    outer = save_on_tiny(models, tmp_path / "outer.safetensors", r"up_blocks.1.attentions.1.*to_q")
    words = save_on_tiny(models, tmp_path / "words.safetensors", "mlp", part="text_encoder")
    (first,) = traced_for(fake_trace, tiny_source, tmp_path / "1", inner)
    assert first.startswith("mid")
    assert traced_for(fake_trace, tiny_source, tmp_path / "2", dataclasses.replace(inner, scale=0.7)) == [first]
    assert traced_for(fake_trace, tiny_source, tmp_path / "3", inner, outer, words) == ["text_encoder", "up.1.layer.1"]
    renamed = Path(shutil.copyfile(outer.path, tmp_path / "renamed.safetensors"))
    assert traced_for(fake_trace, tiny_source, tmp_path / "4", Lora(renamed, 0.5), dataclasses.replace(words, scale=0.0)) == []


def test_a_changed_file_makes_another_bundle(
    tiny_source: Path, models: dict[str, Any], tmp_path: Path, fake_trace: FakeTrace
) -> None:
    fake_trace()
    lora = save_on_tiny(models, tmp_path / "x.safetensors", "mid_block.attentions")
    options = BuildOptions(source=str(tiny_source), out=tmp_path / "bundle", loras=(lora,))
    first = build(options)[0].manifest
    assert not build(options)[1]
    save_on_tiny(models, tmp_path / "x.safetensors", "mid_block.attentions", seed=1)
    again = build(dataclasses.replace(options, force=True))[0].manifest
    assert first.key != again.key
    assert first.source_sha256 != again.source_sha256
    assert [segment.name for segment in again.segments if segment.seconds] == ["mid"]


def test_the_manifest_and_inspect_name_them(
    exporter: Command, tiny_source: Path, models: dict[str, Any], tmp_path: Path, fake_trace: FakeTrace, here: Path
) -> None:
    fake_trace()
    lora = save_on_tiny(models, tmp_path / "ink.safetensors", "mid_block.attentions")
    given = ["--source", tiny_source, "--lora", f"{lora.path}:0.5", "--lora", lora.path]
    assert exporter("build", *given, "--out", tmp_path / "bundle").code == 0
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert [(each.file, each.scale) for each in manifest.loras] == [(str(lora.path), 0.5), (str(lora.path), 1.0)]
    assert f"--lora {lora.path}:0.5 --lora {lora.path}:1.0" in manifest.build_command
    shown = "\n".join(exporter("inspect", tmp_path / "bundle").out)
    assert f"LoRA {lora.path} at 0.5 ({manifest.loras[0].sha256[:12]})" in shown


WRONG = [
    (["--lora", "gone.safetensors"], ["LoRA gone.safetensors: no such file"]),
    (["--lora", "gone.safetensors:much"], ["its scale 'much' is no number"]),
    (["--lora", "gone.safetensors:nan"], ["its scale is nan; give a finite number"]),
]


@pytest.mark.parametrize(("options", "parts"), WRONG, ids=lambda given: given[-1])
def test_wrong_options(
    exporter: Command, tiny_source: Path, fake_trace: FakeTrace, here: Path, options: list[str], parts: list[str]
) -> None:
    traced = fake_trace()
    assert_refused(exporter("build", "--source", tiny_source, *options), *parts)
    assert not traced
    assert list(here.rglob("*")) == []


def test_a_lora_that_does_not_fit_is_refused_before_anything_is_traced(
    exporter: Command, tiny_source: Path, models: dict[str, Any], fake_trace: FakeTrace, here: Path, tmp_path: Path
) -> None:
    traced = fake_trace()
    lora = save_on_tiny(models, tmp_path / "x.safetensors", "mid_block.attentions")
    state = load_file(lora.path)
    save_file({name.replace("mid_block", "mad_block"): tensor for name, tensor in state.items()}, lora.path)
    count = len(state) // 2
    outcome = exporter("build", "--source", tiny_source, "--lora", lora.path)
    assert_refused(outcome, f"{count} of its {count} unet layers match no layer of the source (the first: mad")
    assert not traced
    assert list(here.rglob("*")) == []


# Variants


@pytest.fixture(scope="module")
def on_mini(tmp_path_factory: pytest.TempPathFactory) -> tuple[Lora, Added]:
    """A LoRA for all attentions and kernels of the embedded model's UNet."""
    path = tmp_path_factory.mktemp("lora") / "mini.safetensors"
    unet = UNet2DConditionModel.from_pretrained(MINI, subfolder="unet").float()
    return Lora(path, 0.5), save_lora(path, {"unet": unet}, only="attentions|resnets", rank=1)


def checkpoint_of(source: Path, variant: str, lora: Lora, unet: Path | None = None) -> Checkpoint:
    return open_source(str(source), variant, unet, loras=[lora])


@pytest.fixture(scope="module")
def without() -> Any:
    """The embedded model's UNet. Not to be changed."""
    return tuning.load_unet(MINI / "unet")


@pytest.fixture(scope="module")
def whole(without: Any, on_mini: tuple[Lora, Added]) -> Any:
    """The same with the LoRA. Not to be changed."""
    unet, own = copy.deepcopy(without), {name for name, _ in without.named_parameters()}
    add({"unet": unet}, {name: change for name, change in on_mini[1].items() if name.removeprefix("unet.") in own}, 0.5)
    return unet


@pytest.mark.parametrize("variant", ["original", "assembled", "condconv"])
def test_it_is_fused_before_a_recipe_makes_a_smaller_unet(
    tmp_path: Path, on_mini: tuple[Lora, Added], whole: Any, variant: str
) -> None:
    lora, _ = on_mini
    own = tmp_path / "own"
    shutil.copytree(MINI, own, ignore=shutil.ignore_patterns("unet_*", "training"))
    made = checkpoint_of(own, variant, lora).unet(variant)
    wanted = whole if variant == "original" else tuning.assemble(whole, tuning.recipe(variant))
    for name, weight in wanted.state_dict().items():
        assert torch.allclose(made.get_parameter(name), weight, atol=1e-6), name


def difference(without: Any, whole: Any, variant: str) -> dict[str, torch.Tensor]:
    """What the LoRA adds to a UNet that is made by a recipe, by its own names: layers are numbered anew in it."""
    recipe = tuning.recipe(variant).model_copy(update={"experts": None})
    before, after = (tuning.assemble(unet, recipe).state_dict() for unet in (without, whole))
    return {name: weight - before[name] for name, weight in after.items()}


@pytest.mark.parametrize("own", [False, True], ids=["stored", "--unet"])
def test_of_a_unet_of_its_own_the_layers_that_are_there_are_changed(
    tmp_path: Path, on_mini: tuple[Lora, Added], without: Any, whole: Any, own: bool
) -> None:
    lora, added = on_mini
    folder = tmp_path / "student"
    student = tuning.load_unet(MINI / "unet_assembled")
    if own:
        save_part(student, folder, torch.float32)
    checkpoint = checkpoint_of(MINI, "assembled", lora, folder if own else None)
    made, change = checkpoint.unet("assembled"), difference(without, whole, "assembled")
    for name, weight in student.state_dict().items():
        assert torch.allclose(made.get_parameter(name), weight + change[name], atol=1e-6), name
    (note,) = checkpoint.notes("assembled")
    left = len(added) - sum(bool(each.any()) for each in change.values())
    assert left > 0
    assert f"{left} of its {len(added)} unet layers are of layers that the assembled UNet does not have, and are left out" in note
    assert list(checkpoint_of(MINI, "original", lora).notes("original")) == []


def test_of_conditional_convolutions_the_other_layers_are_changed(on_mini: tuple[Lora, Added], without: Any, whole: Any) -> None:
    lora, _ = on_mini
    student, made = tuning.load_unet(MINI / "unet_condconv"), checkpoint_of(MINI, "condconv", lora).unet("condconv")
    change = difference(without, whole, "condconv")
    for name, weight in student.state_dict().items():
        assert torch.allclose(made.get_parameter(name), weight + change.get(name, 0), atol=1e-6), name
    assert "kernels" in "".join(student.state_dict())


def test_a_unet_of_no_recipe_of_ours_is_refused(tmp_path: Path, on_mini: tuple[Lora, Added], models: dict[str, Any]) -> None:
    save_part(tuning.load_unet(MINI / "unet_assembled"), tmp_path / "student", torch.float32)
    checkpoint = checkpoint_of(MINI, "mine", on_mini[0], tmp_path / "student")
    with pytest.raises(
        SourceError, match="no recipe of ours is called mine, so nothing says which layers of .*student are which"
    ):
        checkpoint.weights("unet", "mine")
    save_lora(tmp_path / "words.safetensors", {"text_encoder": models_of(MINI)["text_encoder"]})
    checkpoint = checkpoint_of(MINI, "mine", Lora(tmp_path / "words.safetensors"), tmp_path / "student")
    assert checkpoint.weights("unet", "mine").changes(["conv_in.weight"]) == []
    assert list(checkpoint.notes("mine")) == []


def test_half_precision_is_rounded_once(tiny_source: Path, models: dict[str, Any], tmp_path: Path) -> None:
    path, wanted = tmp_path / "x.safetensors", models_of(tiny_source)
    add(wanted, save_lora(path, models), 0.3)
    weights = checkpoint_of(tiny_source, "original", Lora(path, 0.3)).weights("unet", "original")
    taken = weights.take(weights.shapes, torch.float16)
    for name, weight in wanted["unet"].state_dict().items():
        assert taken[name].dtype == torch.float16
        assert torch.allclose(taken[name].float(), weight.half().float(), atol=1e-6, rtol=1e-3), name
