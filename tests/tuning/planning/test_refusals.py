"""Bad input of ``python -m tuning plan``: one line each, before anything is loaded or written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.commands import Command, assert_refused
from tests.support.unets import manifest_of, small_unet, written_manifest


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a small UNet, which has no files but its manifest. Not to be changed."""
    return written_manifest(manifest_of(small_unet("uneven")), tmp_path_factory.mktemp("bundles") / "original")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--budget", "0"), "--budget 0: must be a share of the cost of full, above 0 and below 1"),
        (("--budget", "1"), "--budget 1: must be a share"),
        (("--budget", "nan"), "--budget nan: must be a share"),
        (("--psnr", "-3"), "--psnr -3: must be in dB, above 0 and up to 100"),
        (("--budget", "0.5", "--psnr", "50"), "not allowed with argument"),
        ((), "one of the arguments --budget --psnr --front is required"),
        (("--budget", "0.5", "--steps", "1"), "--steps 1: must be 2 or more; one step has none before it to inherit from"),
        (("--budget", "0.5", "--count", "0"), "--count 0: must be 1 or more"),
        (("--budget", "0.5", "--tries", "0"), "--tries 0: must be 1 or more"),
        (("--budget", "0.5", "--scheduler", "dmp++"), "did you mean dpm++?"),
        (("--budget", "0.5", "--size", "big"), "'big' is no picture size"),
        (("--budget", "0.5", "--guidance-scale", "inf"), "--guidance-scale inf: must be a number"),
        (("--budget", "0.5", "--cost", "money"), "invalid choice: 'money'"),
        (("--budget", "0.5", "--judge-only"), "--judge-only goes with --front, whose plans it judges anew"),
        (("--budget", "0.5", "--out", "plan.txt"), "--out plan.txt: choose the name of a .json file"),
        (("--budget", "0.5", "--engine", "null"), "--engine null: it computes nothing"),
        (("--budget", "0.5", "--engine", "onnx-runtime"), "unknown engine 'onnx-runtime'; did you mean onnxruntime?"),
    ],
)
def test_options_out_of_range(
    tuning: Command, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a red star\n")
    assert_refused(tuning("plan", "--bundle", bundle, "--prompts", "prompts.txt", *options), says)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.txt"]


def test_places_that_cannot_be_written(tuning: Command, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.json").mkdir()
    given = ("plan", "--bundle", bundle, "--budget", "0.5", "--out")
    assert_refused(tuning(*given, tmp_path / "folder.json"), "choose the name of a .json file")
    assert_refused(tuning(*given, tmp_path / "file" / "plan.json"), "cannot be read or written")
    front = ("plan", "--bundle", bundle, "--front", "--out")
    assert_refused(tuning(*front, tmp_path / "file"), "is a file; with --front choose a folder")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot be read (No such file or directory); give a file with one prompt a line"),
        (b" \n\n", "is empty; write one prompt a line"),
        (b"\xff\xfe\x00", "is no text in UTF-8"),
    ],
)
def test_prompts_that_are_none(tuning: Command, bundle: Path, tmp_path: Path, text: bytes | None, says: str) -> None:
    prompts = tmp_path / "prompts.txt"
    if text is not None:
        prompts.write_bytes(text)
    given = ("plan", "--bundle", bundle, "--budget", "0.5", "--out", tmp_path / "plan.json", "--prompts", prompts)
    assert_refused(tuning(*given), f"--prompts {prompts}", says)


def test_another_model_needs_prompts(tuning: Command, bundle: Path, tmp_path: Path) -> None:
    given = ("plan", "--bundle", bundle, "--budget", "0.5", "--out", tmp_path / "plan.json")
    assert_refused(tuning(*given), "a plan for test needs --prompts FILE, one a line; 16 are enough")


def test_bundles_that_cannot_take_turns(tuning: Command, bundle: Path, tmp_path: Path) -> None:
    manifest = manifest_of(small_unet("no mid"))
    other = written_manifest(manifest, tmp_path / "bundles" / "other", variant="assembled", source="elsewhere")
    same = written_manifest(manifest, tmp_path / "bundles" / "same")
    given = ("plan", "--budget", "0.5", "--out", tmp_path / "plan.json", "--bundle", bundle, "--bundle")
    assert_refused(
        tuning(*given, other), "was built from test and", "from elsewhere; a plan switches between UNets of one source"
    )
    assert_refused(tuning(*given, same), "both have the UNet 'original'; give one of them")
    assert_refused(tuning(*given, other, "--bundle", same), "--bundle is given 3 times", "give two at most")
    assert_refused(tuning(*given, tmp_path / "nowhere"), "nowhere")
