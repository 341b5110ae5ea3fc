"""``python -m exporter``: for a mistake one line of ours, exit code 2, nothing written and nothing lost."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engines import Bundle
from tests.exporter.conftest import names_in
from tests.support.commands import Command, assert_refused, contents
from tests.support.reference import MINI
from tests.support.sources import save_source
from tests.support.unets import small_unet

FakeTrace = Callable[..., list[str]]
pytestmark = pytest.mark.usefixtures("here")
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_an_assembled_unet_that_was_not_distilled_is_said_to_be_so(
    exporter: Command, fake_trace: FakeTrace, here: Path, tmp_path: Path
) -> None:
    fake_trace()
    own = tmp_path / "own"
    shutil.copytree(MINI, own, ignore=shutil.ignore_patterns("unet_assembled", "training"))
    outcome = exporter("build", "--source", own, "--variant", "assembled")
    assert outcome.code == 0
    assert outcome.err == [f"warning: the assembled UNet was cut out of {own}'s and not distilled since, so pictures suffer"]
    assert Bundle.open(here / "bundles" / "own-assembled").manifest.variant == "assembled"
    assert exporter("build", "--variant", "assembled").err == []


def test_build_prints_progress_and_a_table(
    exporter: Command, fake_trace: FakeTrace, tiny_source: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    fake_trace()
    outcome = exporter("build", "--source", tiny_source)
    assert outcome.code == 0
    assert outcome.err == []
    assert outcome.out[:2] == ["[0/?] reading the source", "[0/12] text_encoder: tracing"]
    assert "[12/12] done" in outcome.out
    assert outcome.out[-1] == "built bundles/tiny-original"
    text = "\n".join(outcome.out)
    for word in ("MACs", "onnxruntime", "down.0.sampler", "up.1.layer.1", "vae_decoder"):
        assert word in text
    assert Bundle.open(here / "bundles" / "tiny-original").manifest.source == str(tiny_source)
    again = exporter("build", "--source", tiny_source)
    assert again.code == 0
    assert again.out[-1] == "up to date: bundles/tiny-original"


WRONG_OPTIONS: list[tuple[list[str], list[str]]] = [
    (
        ["--variant", "smaller"],
        ["unknown variant 'smaller'; choose from: original, assembled, bk-base, bk-small, bk-tiny, condconv"],
    ),
    (["--unet", "nowhere"], ["nowhere is missing"]),
    (["--variant", "../x", "--unet", "nowhere"], ["variant '../x' is no name"]),
    (
        ["--source", "nowhere"],
        ["unknown source 'nowhere': no such folder; give 'emoji', a diffusers folder, a .safetensors file, or a hub id"],
    ),
    (["--source", "./nowhere/at/all"], ["unknown source './nowhere/at/all'"]),
    (["--source", "nobody/no-such-model"], ["unknown source 'nobody/no-such-model'", "hub"]),
    (["--source", "gone.safetensors"], ["gone.safetensors: no such file"]),
    (["--source", "gone.ckpt"], ["gone.ckpt: no such file"]),
    (
        ["--engine", "onnxruntim"],
        [
            "unknown engine 'onnxruntim'; did you mean onnxruntime? ",
            "choose from: onnxruntime, openvino, openvino-bf16, tensorrt, tensorrt-rtx, torch, null",
        ],
    ),
    (["--engine", ","], ["no engine is named; choose from: onnxruntime"]),
    (["--granularity", "stage"], ["unknown granularity 'stage'; choose from: block, layer, unit"]),
    (["--precision", "int4"], ["unknown precision 'int4'; choose from: fp32, fp16"]),
    (["--plan", "nope:2"], ["unknown plan 'nope:2'; choose from: full, block:N, layer:N"]),
    (["--plan", "block:0"], ["plan 'block:0': block takes a number of steps"]),
    (["--plan", "gone.json"], ["plan file gone.json cannot be read"]),
    (["--sizes", "65x64"], ["size 65x64: height and width must be multiples of 4 pixels"]),
    (["--sizes", "64x64,64x2"], ["size 64x2"]),
    (["--sizes", "0"], ["size 0x0"]),
    (["--sizes", "64y64"], ["size '64y64' is no picture size; write HEIGHTxWIDTH"]),
    (["--sizes", "64x-64"], ["no picture size"]),
    (["--sizes", "64x64x64"], ["no picture size"]),
    (["--batch", "4..1"], ["batch"]),
    (["--batch", "2..4"], ["batch '2..4' is no range"]),
    (["--batch", "0"], ["batch 0"]),
    (["--batch", "many"], ["batch 'many' is no range; write 1..N"]),
    (["--targets", "sm86"], ["targets sm86: engine onnxruntime takes none"]),
    (["--out"], ["expected one argument", "--help"]),
    (["--colour", "red"], ["unrecognized arguments: --colour red", "--help"]),
]


@pytest.mark.parametrize(("options", "parts"), WRONG_OPTIONS, ids=" ".join)
def test_wrong_options_of_build(
    exporter: Command, fake_trace: FakeTrace, tiny_source: Path, here: Path, options: list[str], parts: list[str]
) -> None:
    traced = fake_trace()
    given = options if "--source" in options else ["--source", str(tiny_source), *options]
    assert_refused(exporter("build", *given), *parts)
    assert not traced
    assert list(here.rglob("*")) == []


@pytest.mark.parametrize("arguments", [[], ["compile"], ["verify"], ["inspect"]])
def test_a_command_that_is_missing_something(exporter: Command, arguments: list[str]) -> None:
    assert_refused(exporter(*arguments), "--help")


def test_a_plan_that_names_a_unit_the_unet_does_not_have(
    exporter: Command, fake_trace: FakeTrace, tiny_source: Path, tmp_path: Path, here: Path
) -> None:
    traced = fake_trace()
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"name": "mine", "rules": [{"units": ["up.7"], "when": {"mode": "uniform", "every": 2}}]}))
    outcome = exporter("build", "--source", tiny_source, "--plan", plan)
    assert_refused(outcome, "plan mine: rules.0.units names 'up.7', which this UNet does not have; its units: time, stem")
    assert not traced
    assert list(here.rglob("*")) == []


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt", ".pth"])
def test_a_pickle_is_refused_unread_with_the_command_to_convert_it(
    exporter: Command, tmp_path: Path, here: Path, suffix: str
) -> None:
    path = tmp_path / f"model{suffix}"
    torch.save(Trap(), path)
    assert_refused(exporter("build", "--source", path), "is a pickle, which can run code when it is read", "from_single_file")
    assert list(here.rglob("*")) == []


class Trap:
    """Fails the test that reads it."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return pytest.fail, ("a pickle was read",)


def test_a_folder_whose_weights_are_pickled_is_refused(exporter: Command, tiny_source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "pickled"
    shutil.copytree(tiny_source, copy)
    (copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(Trap(), copy / "unet" / "diffusion_pytorch_model.bin")
    assert_refused(exporter("build", "--source", copy), "diffusion_pytorch_model.bin is a pickle", "save_pretrained")


def test_a_single_file_that_holds_nothing_is_refused(exporter: Command, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\0" * 64)
    assert_refused(exporter("build", "--source", path), "model.safetensors: its weights cannot be read", "get the file again")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_folder_with_a_part_missing_is_refused(exporter: Command, tiny_source: Path, tmp_path: Path, part: str) -> None:
    copy = tmp_path / "partial"
    shutil.copytree(tiny_source, copy)
    shutil.rmtree(copy / part)
    assert_refused(exporter("build", "--source", copy), f"{part} is missing")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("damage", ["weights", "configuration"])
def test_a_damaged_checkpoint_is_refused(
    exporter: Command, fake_trace: FakeTrace, tiny_source: Path, tmp_path: Path, here: Path, part: str, damage: str
) -> None:
    fake_trace()
    copy = tmp_path / "damaged"
    shutil.copytree(tiny_source, copy)
    path = next((copy / part).glob("*.safetensors" if damage == "weights" else "config.json"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert_refused(exporter("build", "--source", copy), part)
    assert list(here.rglob("*")) == []


def test_a_unet_of_another_family_is_refused(exporter: Command, tmp_path: Path, here: Path) -> None:
    sdxl = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64}
    source = save_source(tmp_path / "source", small_unet("two stages", **sdxl))
    assert_refused(exporter("build", "--source", source), "addition_embed_type = 'text_time'", "Stable Diffusion 1.x/2.x")
    assert list(here.rglob("*")) == []


def test_an_inpainting_unet_is_refused(exporter: Command, tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", small_unet("two stages", in_channels=9))
    assert_refused(exporter("build", "--source", source), "its UNet takes 9 channels and gives 4, and latents have 4")


def test_a_unet_too_small_for_the_assembly_recipe_is_refused(exporter: Command, tiny_source: Path, here: Path) -> None:
    assert_refused(exporter("build", "--source", tiny_source, "--variant", "assembled"), "no assembled UNet")
    assert list(here.rglob("*")) == []


def test_an_existing_output_folder_is_kept(exporter: Command, fake_trace: FakeTrace, tiny_source: Path, tmp_path: Path) -> None:
    fake_trace()
    out = tmp_path / "bundle"
    exporter("build", "--source", tiny_source, "--out", out)
    before = contents(out)
    assert_refused(
        exporter("build", "--source", tiny_source, "--out", out, "--precision", "fp16"), "exists and is kept", "--force", "--out"
    )
    assert contents(out) == before
    assert exporter("build", "--source", tiny_source, "--out", out, "--precision", "fp16", "--force").code == 0
    assert Bundle.open(out).manifest.precision == "fp16"


def test_a_full_disk(exporter: Command, fake_trace: FakeTrace, tiny_source: Path, tmp_path: Path) -> None:
    fake_trace(fail_at="mid", error=OSError(errno.ENOSPC, "No space left on device", "mid.onnx.data"))
    folder = tmp_path / "full"
    folder.mkdir()
    outcome = exporter("build", "--source", tiny_source, "--out", folder / "bundle")
    assert_refused(
        outcome,
        "the disk is full",
        "mid.onnx.data",
        "nothing half-written was kept; the same command resumes from what was finished",
    )
    assert names_in(folder) == [".bundle.building"]


def test_a_full_disk_while_files_are_copied(
    exporter: Command, fake_trace: FakeTrace, tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_trace()
    folder = tmp_path / "full"
    folder.mkdir()

    write = Path.write_bytes

    def refuse(path: Path, data: bytes) -> int:
        if folder in path.parents and path.parent.name == "tokenizer":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", refuse)
    assert_refused(exporter("build", "--source", tiny_source, "--out", folder / "bundle"), "the disk is full")
    assert names_in(folder) == [".bundle.building"]


def test_a_place_where_nothing_can_be_written(
    exporter: Command, fake_trace: FakeTrace, tiny_source: Path, tmp_path: Path
) -> None:
    fake_trace()
    (tmp_path / "file").write_text("notes")
    assert_refused(
        exporter("build", "--source", tiny_source, "--out", tmp_path / "file" / "bundle"), "file", "choose another path"
    )
    assert (tmp_path / "file").read_text() == "notes"


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_place_where_no_folder_can_be(exporter: Command, fake_trace: FakeTrace, tiny_source: Path) -> None:
    fake_trace()
    assert_refused(exporter("build", "--source", tiny_source, "--out", "/proc/none/bundle"), "/proc/none", "choose another path")


@pytest.mark.parametrize("call", ["mkdir", "open"])
def test_a_place_that_can_only_be_read(
    exporter: Command, fake_trace: FakeTrace, tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Found out at the first folder or file, with an old bundle in the place, which stays as it is."""
    fake_trace()
    out = tmp_path / "place" / "bundle"
    assert exporter("build", "--source", tiny_source, "--out", out).code == 0
    before, real = contents(out), getattr(os, call)

    def refuse(path: Any, *rest: Any, **more: Any) -> Any:
        if str(path).startswith(str(out.parent)):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return real(path, *rest, **more)

    with monkeypatch.context() as patched:
        patched.setattr(os, call, refuse)
        outcome = exporter("build", "--source", tiny_source, "--out", out, "--precision", "fp16", "--force")
        assert exporter("build", "--source", tiny_source, "--out", out).code == 0, "it is up to date"
    assert_refused(outcome, "place", "Read-only file system", "choose another path")
    assert contents(out) == before
    assert exporter("build", "--source", tiny_source, "--out", out, "--precision", "fp16", "--force").code == 0
    assert names_in(out.parent) == ["bundle"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_real_limit_on_what_may_be_written(
    exporter: Command, fake_trace: FakeTrace, tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a faked error: the system refuses to write, in the middle of a weights file, in a process of its own."""
    import resource

    folder, said = tmp_path / "full", tmp_path / "said"
    folder.mkdir()
    fake_trace()

    def write(program: object, segment: object, path: Path, opset: int) -> list[Path]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            path.write_bytes(bytes(8192))
        except OSError as error:
            raise OSError(errno.ENOSPC, "No space left on device", str(path)) from error
        return [path]

    def run() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        outcome = exporter("build", "--source", tiny_source, "--out", folder / "bundle")
        said.write_text(json.dumps([outcome.code, outcome.err]))

    monkeypatch.setattr("exporter.segments.writer.write_onnx", write)
    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join()
    code, lines = json.loads(said.read_text())
    assert code == 2
    assert len(lines) == 1
    assert lines[0].startswith("error: the disk is full")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_a_bundle_that_is_missing(exporter: Command, command: str, tmp_path: Path) -> None:
    assert_refused(exporter(command, tmp_path / "nowhere"), "no bundle at", "no such folder", "python -m exporter build")
    assert_refused(exporter(command, tmp_path), "no manifest.json in it")


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_a_bundle_of_another_version(exporter: Command, command: str, bundle_copy: Path) -> None:
    path = bundle_copy / "manifest.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 7', 1))
    assert_refused(exporter(command, bundle_copy), "has manifest version 7, this program reads 1", "rebuild it with")


@pytest.mark.parametrize("name", ["segments/mid.onnx", "segments/mid.onnx.data", "tokenizer/vocab.json"])
@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_verify_of_a_damaged_bundle(exporter: Command, bundle_copy: Path, name: str, damage: str) -> None:
    path = bundle_copy / name
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[:-1])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    assert_refused(exporter("verify", bundle_copy), "is damaged", name, "rebuild it with")


def test_verify_with_an_engine_the_bundle_was_not_built_for(exporter: Command, mini_bundle: Bundle) -> None:
    assert_refused(
        exporter("verify", mini_bundle.folder, "--engine", "torch"),
        "has no torch engines",
        "python -m exporter build",
        "--engine",
    )
    assert_refused(exporter("verify", mini_bundle.folder, "--engine", "abacus"), "unknown engine 'abacus'")


def test_the_command_as_a_command(tmp_path: Path) -> None:
    """Once in a process of its own: nothing that is imported prints, and the exit code reaches the shell."""
    command = [sys.executable, "-m", "exporter", "build", "--variant", "smaller", "--out", str(tmp_path / "bundle")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: unknown variant 'smaller'")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "bundle").exists()


def test_the_embedded_model_needs_no_option() -> None:
    from exporter.graph.checkpoint import open_source

    assert open_source("mini", "original").folder.samefile(MINI)
