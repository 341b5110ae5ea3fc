"""``python -m tuning assemble``: a UNet's folder comes out whole or not at all, the same each time; mistakes are one line."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError

import tuning
from tests.support.commands import Command, assert_refused, command, contents
from tests.support.sources import save_source
from tests.support.unets import small_unet
from tuning.__main__ import main
from tuning.checkpoints.find_source import find_source, open_unet


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    return command(main, capfd, monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A UNet's folder, no whole checkpoint."""
    path = tmp_path_factory.mktemp("sources") / "small"
    small_unet("no mid", layers_per_block=2, mid_block_type="UNetMidBlock2DCrossAttn").save_pretrained(path)
    return path


def parameters(unet: UNet2DConditionModel) -> int:
    return sum(weights.numel() for weights in unet.parameters())


def test_the_students_folder(run: Command, folder: Path, tmp_path: Path) -> None:
    done = run("assemble", "--source", folder, "--recipe", "bk-small", "--precision", "fp32", "--out", tmp_path / "out")
    assert (done.code, done.err) == (0, [])
    teacher, student = tuning.load_unet(folder), UNet2DConditionModel.from_pretrained(tmp_path / "out")
    wanted = tuning.assemble(teacher, tuning.recipe("bk-small"))
    assert student.config.mid_block_type is None
    assert all(torch.equal(value, wanted.state_dict()[key]) for key, value in student.state_dict().items())
    before, after = parameters(teacher), parameters(student)
    assert f"{before / 1e6:.1f} M parameters before, {after / 1e6:.1f} M after ({after / before:.1%})" in "\n".join(done.out)
    assert any("mid.layer.0.attention" in line for line in done.out)
    note = json.loads((tmp_path / "out" / "assembly.json").read_text())
    assert note["source"] == str(folder)
    assert note["parameters"] == {"before": before, "after": after}
    assert tuning.Recipe.model_validate(note["recipe"]) == tuning.recipe("bk-small")


def test_running_again_gives_the_same_bytes_and_leaves_nothing_else(run: Command, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first: dict[str, bytes] = {}
    for _ in range(2):
        assert run("assemble", "--source", folder, "--recipe", "bk-base", "--out", out).code == 0
        made = {path.name: path.read_bytes() for path in out.iterdir()}
        first = first or made
        assert made == first
    assert set(first) == {"config.json", "diffusion_pytorch_model.safetensors", "assembly.json"}
    assert list(tmp_path.iterdir()) == [out]
    assert next(tuning.load_unet(out).parameters()).dtype == torch.float32
    assert open_unet(str(out)).folder == out


def test_a_recipe_from_a_file_and_a_whole_checkpoint(run: Command, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.json"
    recipe.write_text(json.dumps({"name": "mine", "remove": ["down.0.layer.0.attention", "up.-1.layer.1.attention"]}))
    source = save_source(tmp_path / "source")
    assert run("assemble", "--source", source, "--recipe", recipe, "--out", tmp_path / "out").code == 0
    student = tuning.load_unet(tmp_path / "out")
    assert student.config.down_block_types[0] == "DownBlock2D"
    assert "up.1.layer.1.attention" not in tuning.unit_modules(student)
    assert "up.1.layer.0.attention" in tuning.unit_modules(student)


def test_random_weights_from_a_configuration(run: Command, folder: Path, tmp_path: Path) -> None:
    source = f"random:{folder / 'config.json'}"
    once, again = open_unet(source).unet(), open_unet(source).unet()
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in once.state_dict().items())
    assert run("assemble", "--source", source, "--recipe", "bk-base", "--out", tmp_path / "out").code == 0
    assert json.loads((tmp_path / "out" / "assembly.json").read_text())["source"] == source


def test_configurations_with_a_name() -> None:
    millions = {"sd15": 860, "sd21": 866, "bk-base": 579, "bk-small": 482, "bk-tiny": 323}
    skeletons: dict[str, Any] = {name: find_source(f"random:{name}").skeleton("unet") for name in millions}
    assert {name: round(parameters(unet) / 1e6) for name, unet in skeletons.items()} == millions


MISTAKES: list[tuple[list[str], list[str]]] = [
    ([], ["the following arguments are required: --out", "--help"]),
    (["--recipe", "smallest"], ["there is no recipe 'smallest': name one of original, assembled"]),
    (["--recipe", "gone.json"], ["gone.json is no recipe"]),
    (["--recipe", "bk-tiny", "--source", "mini", "--precision", "int8"], ["unknown precision 'int8'; choose from: fp16, fp32"]),
    (
        ["--source", "nowhere"],
        ["unknown source 'nowhere': no such folder; give 'emoji', a diffusers folder, ", "a .safetensors file"],
    ),
    (["--source", "model.ckpt"], ["model.ckpt: no such file"]),
    (["--source", "random:sd16"], ["random:sd16: no such configuration; choose from: sd15, sd21, bk-base, bk-small, bk-tiny"]),
    (["--source", "random:gone.json"], ["random:gone.json: no such configuration"]),
]


@pytest.mark.parametrize(("options", "parts"), MISTAKES, ids=" ".join)
def test_mistakes(run: Command, tmp_path: Path, options: list[str], parts: list[str]) -> None:
    out = ["--out", tmp_path / "out"] if options else []
    assert_refused(run("assemble", *options, *out), *parts)
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_that_does_not_fit_and_sources_that_hold_no_unet(run: Command, folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"name": "x", "remove": ["up.7"]}))
    out = ["--out", tmp_path / "out"]
    assert_refused(run("assemble", "--source", folder, "--recipe", recipe, *out), "'up.7' names no unit of this UNet")
    (tmp_path / "empty").mkdir()
    assert_refused(run("assemble", "--source", tmp_path / "empty", *out), "unet is missing")
    source = save_source(tmp_path / "whole")
    assert_refused(run("assemble", "--source", source / "vae", *out), "holds no UNet", "it is that of AutoencoderKL")
    assert_refused(run("assemble", "--source", f"random:{source / 'vae' / 'config.json'}", *out), "holds no UNet")
    assert not (tmp_path / "out").exists()


def test_the_source_is_not_written_over(run: Command, folder: Path) -> None:
    before = contents(folder)
    assert_refused(
        run("assemble", "--source", folder, "--recipe", "bk-base", "--out", folder), "is where the source is read from"
    )
    assert contents(folder) == before


def test_what_is_no_unets_folder_is_kept(run: Command, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    assert_refused(run("assemble", "--source", folder, "--recipe", "bk-base", "--out", out), "is no UNet's folder, so it is kept")
    assert contents(tmp_path).keys() == {"out/thesis.txt"}


def test_a_full_disk_leaves_what_was_there(run: Command, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    assert run("assemble", "--source", folder, "--recipe", "bk-base", "--out", out).code == 0
    before = contents(tmp_path)

    def full(*_args: Any, **_more: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def full_says_safetensors(*_args: Any, **_more: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patched:
        patched.setattr("tuning.assemble_command.save_part", full)
        assert_refused(run("assemble", "--source", folder, "--recipe", "bk-small", "--out", out), "the disk is full")
    monkeypatch.setattr("safetensors.torch.save_file", full_says_safetensors)
    assert_refused(run("assemble", "--source", folder, "--recipe", "bk-small", "--out", out), "the disk is full", "/.unet-")
    assert contents(tmp_path) == before
