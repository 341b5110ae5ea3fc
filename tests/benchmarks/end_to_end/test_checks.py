"""A user's mistakes are found before anything is built or installed, also by --dry-run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import run_trt
from benchmarks.end_to_end.prepare import _pipeline_name, _without_switches
from benchmarks.end_to_end.rows import rows_of
from benchmarks.end_to_end.run import _engine_files
from benchmarks.peers import CONSTRAINTS, PEERS
from engines import Bundle
from engines.errors import UserError
from tests.support.sources import save_source


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--targets", "sm89", "--engine", "torch"], "--targets sm89: engine torch takes none; add tensorrt-rtx"),
        (["--targets", "sm999"], "unknown target 'sm999'; choose from: sm75"),
        (["--targets", "sm89", "--device", "cpu"], "--targets sm89 are cards, and --device cpu is none"),
        (["--variants", "origional"], "unknown variant 'origional'; did you mean original"),
        (["--size", "100x100"], "size 100x100: height and width must be multiples of"),
        (["--source", "nowhere.safetensors"], "nowhere.safetensors: no such file"),
        (["--engine", ""], "'' has an empty name"),
        (["--engine", "null"], "engine null computes nothing"),
        (["--plans", "full,,deepcache:3"], "'full,,deepcache:3' has an empty name"),
        (["--plans", "a/one.json,b/one.json"], "two plans are called one"),
    ],
)
@pytest.mark.parametrize("mode", [[], ["--dry-run"]])
def test_mistakes(arguments: list[str], message: str, mode: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        Path(folder).mkdir()
        Path(folder, "one.json").write_text('{"name": "one", "rules": []}')
    device = [] if "--targets" in arguments else ["--device", "cpu"]
    with pytest.raises(UserError, match=re.escape(message)):
        run_trt.main(
            ["--source", "mini", *device, *arguments, *mode, "--work", str(tmp_path / "work"), "--out", str(tmp_path / "o")]
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_bundle_for_a_card_is_the_one_that_is_looked_for_there() -> None:
    given = [*("--source", "mini", "--targets", "sm89"), "--build-only"]
    settings = run_trt._settings(run_trt._parser().parse_args(given))
    assert (settings.device, settings.precision, settings.engines) == ("cuda", "fp16", ("tensorrt-rtx",))


def test_rows_of_plan_files_are_named_by_the_file(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text('{"name": "x", "rules": []}')
    given = ["--device", "cpu", "--peers", "none", "--variants", "original", "--plans", str(tmp_path / "mine.json")]
    settings = run_trt._settings(run_trt._parser().parse_args(given))
    assert [row.name for row in rows_of(settings, {})] == ["original full", "original mine"]


def test_bundles_are_partitioned_for_what_is_joined_to_a_switch() -> None:
    plans = ["full", "switch:0.4", "switch:0.4+block:3", "deepcache:2"]
    assert [_without_switches(plan) for plan in plans] == ["", "", "block:3", "deepcache:2"]


def test_another_source_of_the_same_name_is_another_pipeline(tmp_path: Path) -> None:
    names = set()
    for number in (1, 2):
        source = save_source(tmp_path / str(number) / "model")
        if number == 2:
            config = source / "unet" / "config.json"
            config.write_text(config.read_text() + "\n")
        given = run_trt._parser().parse_args(["--source", str(source), "--device", "cpu"])
        names.add(_pipeline_name(run_trt._settings(given)))
    assert len(names) == 2
    assert all(name.startswith("model-fp32-") for name in names)


def test_environments_of_peers_have_their_versions_pinned() -> None:
    """Everything that pip would choose by the day, but torch, whose version is this project's."""
    modules = {peer.module for peer in PEERS.values() if peer.own_environment}
    assert {path.stem for path in CONSTRAINTS.iterdir()} == modules
    for module in modules:
        lines = (CONSTRAINTS / f"{module}.txt").read_text().splitlines()[1:]
        assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
        pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines}
        assert {"diffusers", "transformers", "optimum", "numpy"} <= pinned
        assert "torch" not in pinned


@pytest.mark.shared_pieces
def test_the_size_of_an_engine_has_its_weights(mini_bundle: Bundle) -> None:
    """ONNX Runtime's copies of graphs read the weights of the files that they were copied from."""
    files = _engine_files(mini_bundle, "onnxruntime")
    weights = [file for segment in mini_bundle.manifest.segments for file in segment.onnx if file.path.endswith(".data")]
    assert weights
    assert {file.path for file in weights} < {file.path for file in files}
    folder = mini_bundle.folder
    assert sum(file.bytes for file in files) == sum((folder / path).stat().st_size for path in {file.path for file in files})
    assert _engine_files(mini_bundle, "tensorrt") == []
