"""LoRAs and another VAE in the commands of tuning: they work on what diffusers fuses, and builds know of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel

import tuning
from exporter import SourceError
from exporter.graph.checkpoint import open_source
from tests.support.commands import Command, assert_refused, command
from tests.support.diffusers_pipelines import pipeline_of
from tests.support.loras import add, save_lora
from tests.support.sources import save_source, small_vae, tiny_vae
from tests.support.unets import small_unet
from tuning.__main__ import main
from tuning.errors import TuningError
from tuning.loras.changed_source import open_changed_unet
from tuning.loras.lora import Lora
from tuning.ranking.command import RankOptions, _command
from tuning.training.teacher import Teacher

RECIPE = {"name": "mine", "remove": ["down.0.layer.0.attention", "up.-1.layer.1.attention"]}


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    return command(main, capfd, monkeypatch)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    return save_source(tmp_path_factory.mktemp("source") / "tiny", small_unet("two stages", layers_per_block=2))


def models_of(source: Path) -> dict[str, Any]:
    return {
        "unet": UNet2DConditionModel.from_pretrained(source, subfolder="unet"),
        "text_encoder": CLIPTextModel.from_pretrained(source / "text_encoder", dtype=torch.float32),
    }


@pytest.fixture(scope="module")
def lora(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of UNet and text encoder."""
    path = tmp_path_factory.mktemp("loras") / "ink.safetensors"
    save_lora(path, models_of(source), alpha=2.0)
    return path


@pytest.fixture
def fused(source: Path, lora: Path, tmp_path: Path) -> dict[str, Any]:
    """The source's models with the LoRA at 0.5."""
    models = models_of(source)
    add(models, save_lora(tmp_path / "again.safetensors", models, alpha=2.0), 0.5)
    return models


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(RECIPE))
    return path


def assert_alike(made: torch.nn.Module, wanted: torch.nn.Module) -> None:
    ours, theirs = made.state_dict(), wanted.state_dict()
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert torch.allclose(ours[name], weight, atol=1e-6), name


@pytest.mark.parametrize("only_unet", [False, True], ids=["checkpoint", "UNet's folder"])
def test_assembling_takes_the_unet_with_the_lora_in_it(
    run: Command, source: Path, lora: Path, fused: dict[str, Any], recipe: Path, tmp_path: Path, only_unet: bool
) -> None:
    given = ("--source", source / "unet" if only_unet else source, "--lora", f"{lora}:0.5", "--precision", "fp32")
    done = run("assemble", *given, "--recipe", recipe, "--out", tmp_path / "out")
    assert (done.code, done.err) == (0, [])
    assert any("with ink.safetensors at 0.5, not distilled" in line for line in done.out)
    assert_alike(tuning.load_unet(tmp_path / "out"), tuning.assemble(fused["unet"], tuning.recipe(str(recipe))))


def test_it_is_what_diffusers_fuses(run: Command, source: Path, lora: Path, recipe: Path, tmp_path: Path) -> None:
    """Where peft is installed, which diffusers needs for it."""
    pytest.importorskip("peft")
    pipe = pipeline_of(source)
    pipe.load_lora_weights(lora.parent, weight_name=lora.name)
    pipe.fuse_lora(lora_scale=0.5)
    pipe.unload_lora_weights()
    given = ("--source", source, "--lora", f"{lora}:0.5", "--precision", "fp32", "--recipe", recipe)
    assert run("assemble", *given, "--out", tmp_path / "out").code == 0
    assert_alike(tuning.load_unet(tmp_path / "out"), tuning.assemble(pipe.unet, tuning.recipe(str(recipe))))
    teacher = Teacher.load(str(source), None, [Lora(lora, 0.5)])
    assert_alike(teacher.unet, pipe.unet)
    assert_alike(teacher.text, pipe.text_encoder)


def test_a_build_fuses_it_into_the_text_encoder_alone(
    run: Command, source: Path, lora: Path, fused: dict[str, Any], recipe: Path, tmp_path: Path
) -> None:
    """The folder says that the UNet has it: twice would be too much, and a build without it lacks half of it."""
    out, more = tmp_path / "out", tmp_path / "more.safetensors"
    given = ("--source", source, "--recipe", recipe, "--precision", "fp32", "--out", out)
    assert run("assemble", *given, "--lora", f"{lora}:0.5").code == 0
    moved = Path(shutil.copyfile(lora, tmp_path / "moved.safetensors"))
    checkpoint = open_source(str(source), "mine", out, loras=[Lora(moved, 0.5)])
    assert_alike(checkpoint.unet("mine"), tuning.load_unet(out))
    assert_alike(checkpoint.text_encoder(), fused["text_encoder"])
    assert list(checkpoint.notes("mine")) == []
    assert "--unet/loras.json" in dict(checkpoint.files("mine"))
    for loras in ([], [Lora(lora, 0.4)]):
        with pytest.raises(SourceError, match=r"ink.safetensors at 0.5 is in the UNet .*out already, .*; give --lora .*:0.5 too"):
            open_source(str(source), "mine", out, loras=loras).weights("unet", "mine")
    # Of an assembled UNet another is assembled: it has what the first had.
    save_lora(more, {"unet": tuning.load_unet(out)}, only="mid_block.attentions")
    again = ("--source", out, "--recipe", "original", "--out", tmp_path / "again", "--lora", more)
    assert run("assemble", *again).code == 0
    noted = json.loads((tmp_path / "again" / "loras.json").read_text())["loras"]
    assert [(each["file"], each["scale"]) for each in noted] == [(str(lora), 0.5), (str(more), 1.0)]
    # What is assembled anew without it holds it no longer.
    assert run("assemble", *given).code == 0
    assert not (out / "loras.json").exists()


def test_a_damaged_note(source: Path, lora: Path, tmp_path: Path) -> None:
    shutil.copytree(source / "unet", tmp_path / "unet")
    for text, says in (('{"loras": [{"file": "x"}]}', "is no note of LoRAs"), ("{", "cannot be read as JSON")):
        (tmp_path / "unet" / "loras.json").write_text(text)
        with pytest.raises(SourceError, match=rf"loras.json {says}"):
            open_source(str(source), "original", tmp_path / "unet").weights("unet", "original")


def test_a_teacher_with_a_lora_and_another_vae(source: Path, lora: Path, fused: dict[str, Any], tmp_path: Path) -> None:
    own = tmp_path / "no vae"
    shutil.copytree(source, own, ignore=shutil.ignore_patterns("vae"))
    vae = small_vae(seed=7, scaling_factor=0.7)
    vae.save_pretrained(tmp_path / "vae")
    teacher = Teacher.load(str(own), None, [Lora(lora, 0.5)], str(tmp_path / "vae"))
    assert_alike(teacher.unet, fused["unet"])
    assert_alike(teacher.text, fused["text_encoder"])
    assert_alike(teacher.vae, vae)
    picture = torch.zeros(1, 3, 16, 16)
    assert torch.equal(teacher.encode(picture), vae.encode(picture).latent_dist.mode() * 0.7)
    small_vae(latent_channels=8).save_pretrained(tmp_path / "wide")
    with pytest.raises(TuningError, match="VAE .*wide: its latents have 8 channels, and the source's UNet takes 4"):
        Teacher.load(str(source), vae=str(tmp_path / "wide"))


def test_errors_of_removals_are_those_of_the_unet_with_it(source: Path, lora: Path, fused: dict[str, Any]) -> None:
    for name in (source, source / "unet"):
        found = open_changed_unet(str(name), None, [Lora(lora, 0.5)])
        assert_alike(found.unet(), fused["unet"])
    assert_alike(open_changed_unet(str(source), None, [Lora(lora, 0.5)]).whole.model("text_encoder"), fused["text_encoder"])  # type: ignore[union-attr]
    assert _command(RankOptions(source="mini", loras=(Lora(lora, 0.5),))).endswith(f"rank --source mini --lora {lora}:0.5")


@pytest.mark.slow
def test_a_student_learns_it_and_says_so(source: Path, lora: Path, pictures: Path, tmp_path: Path) -> None:
    tiny_vae().save_pretrained(tmp_path / "vae")
    data = tmp_path / "latents"
    main(["latents", "--source", str(source), "--vae", str(tmp_path / "vae"), "--data", str(pictures), "--out", str(data)])
    out = tmp_path / "out"
    given = f"distill --teacher {source} --student original --data {data} --batch 2 --steps 2 --precision fp32 --out {out}"
    with pytest.raises(TuningError, match="was made with the autoencoder and tokenizer"):
        main(given.split())
    with_both = [*given.split(), "--vae", str(tmp_path / "vae"), "--lora", f"{lora}:0.5"]
    main([*with_both, "--pause-at", "1"])
    with pytest.raises(TuningError, match=r"holds a run with loras \['.*ink.safetensors:0.5'\], and this one has \[\]"):
        main([*given.split(), "--vae", str(tmp_path / "vae")])
    main(with_both)
    (noted,) = json.loads((out / "loras.json").read_text())["loras"]
    assert (noted["file"], noted["scale"]) == (str(lora), 0.5)
    checkpoint = open_source(str(source), "original", out, loras=[Lora(lora, 0.5)])
    assert_alike(checkpoint.unet("original"), tuning.load_unet(out))


REFUSED = [
    (["assemble", "--out", "x", "--lora", "gone.safetensors"], "LoRA gone.safetensors: no such file"),
    (["assemble", "--out", "x", "--vae", "y"], "--vae: no VAE is read here; leave it out, and give it to build"),
    (["rank", "--lora", "gone.safetensors:x"], "its scale 'x' is no number"),
    (["rank", "--vae=y"], "--vae: no VAE is read here"),
    (["plan", "--bundle", "x", "--budget", "0.5", "--lora", "a"], "--lora: plans are searched with a built bundle: give"),
    (["plan", "--vae"], "--vae: plans are searched with a built bundle"),
    (["latents", "--lora", "a"], "--lora: it changes neither latents nor tokens; leave it out here, and give it to distill"),
    (["distill", "--teacher", "mini", "--student", "assembled", "--data", "mini", "--steps", "1", "--out", "x", "--vae", "gone"],
     "VAE gone: no such folder"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "says"), REFUSED, ids=lambda given: " ".join(given[:3]) if isinstance(given, list) else "")
def test_what_makes_no_sense_is_refused(
    run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(run(*options), says)
    assert list(tmp_path.iterdir()) == []
