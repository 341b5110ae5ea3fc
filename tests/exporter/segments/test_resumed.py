"""A build that is stopped, at any moment and in any way, is resumed: nothing twice, nothing half."""

from __future__ import annotations

import ctypes
import itertools
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engines import Bundle, Segment, Traced
from engines.bundle.manifest import File
from engines.support import files
from exporter import BuildError, BuildOptions, build
from exporter.segments.artifacts import Artifacts, working_on
from exporter.segments.progress import Step
from tests.exporter.conftest import names_in
from tests.support.commands import Command, contents
from tests.support.sources import save_source, tiny_vae
from tests.support.unets import small_unet

FakeTrace = Callable[..., list[str]]
FORK = multiprocessing.get_context("fork")
EXCHANGE = files._exchange


@pytest.fixture
def options(tiny_source: Path, tmp_path: Path) -> BuildOptions:
    return BuildOptions(source=str(tiny_source), out=tmp_path / "out" / "bundle")


def folder_of(options: BuildOptions) -> Path:
    assert options.out is not None
    return options.out


def hashes(folder: Path) -> dict[str, str]:
    """What a bundle holds, but for the times it took and what is remembered of files."""
    manifest = Bundle.open(folder).manifest
    return {file.path: file.sha256 for file in manifest.all_files} | {"key": manifest.key}


def timeless(bundle: Bundle) -> tuple[Segment, ...]:
    """A bundle's segments without the seconds that each took."""
    return tuple(segment.model_copy(update={"seconds": 0.0}) for segment in bundle.manifest.segments)


def write_in_parts(file: Path, name: str, parts: int) -> None:
    """A file that is half written at some moments."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as stream:
        for part in range(parts):
            stream.write(f"{name} {part} ".encode() * 100)
            stream.flush()
            sys.audit("tests.half", str(file))


@pytest.fixture
def written_in_parts(fake_trace: FakeTrace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments and engines whose files are half written at some moments."""
    fake_trace()

    def write(program: Any, segment: Segment, path: Path, opset: int = 0) -> list[Path]:
        data = path.with_name(f"{path.name}.data")
        for file in (path, data):
            write_in_parts(file, segment.name, 5)
        return [path, data]

    def compile_segment(engine: Any, traced: Traced, stem: Path, *rest: Any) -> list[Path]:
        path = Path(f"{stem}.engine")
        write_in_parts(path, f"engine of {traced.onnx.read_bytes()[:8]!r}", 10)
        return [path]

    monkeypatch.setattr("exporter.segments.writer.write_onnx", write)
    monkeypatch.setattr("engines.ort.engine.OnnxRuntime.compile", compile_segment)


CHANGES = {"open", "os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir", "tests.half"}


def build_until(options: BuildOptions, moment: int) -> None:
    """Build, and die at that change of a file or folder beside the bundle, in whichever process it is."""
    place, build_process, passed = str(folder_of(options).parent), os.getpid(), FORK.Value("i", 0)

    def look(event: str, given: tuple[Any, ...]) -> None:
        reads = event == "open" and not isinstance(given[0], int) and not given[2] & (os.O_WRONLY | os.O_RDWR)
        if event in CHANGES and str(given[0]).startswith(place) and not reads:
            with passed.get_lock():
                passed.value += 1
                if passed.value == moment:
                    os.kill(build_process, signal.SIGKILL)

    sys.addaudithook(look)
    build(options)


@pytest.mark.usefixtures("written_in_parts")
@pytest.mark.parametrize(("jobs", "moments"), [(1, (31, 76, 113)), (2, (83,))])
@pytest.mark.slow
def test_a_build_killed_at_many_moments(
    options: BuildOptions, jobs: int, moments: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one is killed the next resumes, and is killed as many changes later: a bundle, and another that replaces it."""
    monkeypatch.setattr("exporter.segments.pool.get_context", lambda kind: FORK)  # so that they write in parts too
    done: dict[str, str] = {}
    for precision in ("fp32", "fp16"):
        options = replace(options, jobs=jobs, precision=precision, force=True)
        whole = build(replace(options, out=folder_of(options).parent / "whole"))[0]
        wanted, kills = hashes(whole.folder), 0
        assert len([file for file in wanted if file.endswith(".engine")]) == len(whole.manifest.segments)
        for moment in itertools.cycle(moments):
            child = FORK.Process(target=build_until, args=(options, moment))
            child.start()
            child.join()
            assert child.exitcode in {0, -signal.SIGKILL}
            there = hashes(folder_of(options)) if folder_of(options).exists() else {}
            assert there in (done, wanted)
            if child.exitcode == 0:
                break
            kills += 1
        assert kills >= 3
        done = wanted
        bundle, built = build(options)
        bundle.check()
        assert not built
        assert hashes(bundle.folder) == wanted
        assert names_in(bundle.folder.parent) == ["bundle", "whole"]
        assert contents(bundle.folder).keys() == contents(whole.folder).keys()


def runs(process: int) -> bool:
    """Whether there is such a process, and it is not only waited for."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")
def test_no_process_outlives_a_build_that_is_killed(
    options: BuildOptions, fake_trace: FakeTrace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even one that is inside a library: it would write into what the next build makes."""
    fake_trace()

    def hang(*_: object) -> None:
        (tmp_path / f"{os.getpid()}.process").touch()
        ctypes.PyDLL(None).sleep(60)  # with Python's lock held

    monkeypatch.setattr("exporter.segments.pool.get_context", lambda kind: FORK)
    monkeypatch.setattr("exporter.segments.writer.write_onnx", hang)
    child = FORK.Process(target=build, args=(replace(options, jobs=2),))
    child.start()
    deadline = time.monotonic() + 60
    while len(started := [int(path.stem) for path in tmp_path.glob("*.process")]) < 2:
        assert child.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert all(runs(process) for process in started)
    child.kill()
    child.join()
    while any(runs(process) for process in started):
        assert time.monotonic() < deadline, "they should end at once"
        time.sleep(0.05)
    fake_trace()
    build(options)[0].check()


def test_an_engine_that_is_half_written_when_the_build_is_killed_is_made_again(
    options: BuildOptions, fake_trace: FakeTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []

    def compile_segment(wait: float, traced: Traced, stem: Path) -> list[Path]:
        path = Path(f"{stem}.engine")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
        if traced.segment.name == "mid":
            time.sleep(wait)
        path.write_bytes(b"half and half")
        compiled.append(traced.segment.name)
        return [path]

    fake_trace()
    compile_name = "engines.ort.engine.OnnxRuntime.compile"
    monkeypatch.setattr(compile_name, lambda engine, traced, stem, *rest: compile_segment(600, traced, stem))
    child = FORK.Process(target=build, args=(options,))
    child.start()
    half = folder_of(options).parent / ".bundle.building" / "bundle" / "engines" / "onnxruntime" / "mid.engine"
    while child.is_alive() and not (half.is_file() and half.stat().st_size):
        time.sleep(0.01)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert half.read_bytes() == b"half"
    monkeypatch.setattr(compile_name, lambda engine, traced, stem, *rest: compile_segment(0, traced, stem))
    bundle, _ = build(options)
    bundle.check()
    engines = [bundle.path(file) for segment in bundle.manifest.segments for file in segment.engines["onnxruntime"].files]
    assert {path.read_bytes() for path in engines} == {b"half and half"}
    assert "mid" in compiled
    assert "text_encoder" not in compiled


def test_a_file_that_is_half_written_is_not_taken_for_whole(options: BuildOptions, fake_trace: FakeTrace) -> None:
    fake_trace(fail_at="mid", error=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        build(options)
    building = folder_of(options).parent / ".bundle.building" / "bundle"
    (building / "segments" / "stem.onnx").write_bytes(b"half")
    traced = fake_trace()
    build(options)[0].check()
    assert "stem" in traced
    assert "text_encoder" not in traced


def test_another_engine_leaves_the_segments_as_they_are(options: BuildOptions, fake_trace: FakeTrace) -> None:
    fake_trace()
    before = build(options)[0]
    traced = fake_trace()
    steps: list[Step] = []
    bundle, built = build(replace(options, engines=("onnxruntime", "null"), force=True), steps.append)
    assert built
    assert not traced
    assert timeless(bundle) == timeless(before)
    assert (1, 12, "stem", "kept") in [step[:4] for step in steps]
    assert names_in(bundle.folder.parent) == ["bundle"]


def test_a_replacement_that_was_stopped_is_resumed(options: BuildOptions, fake_trace: FakeTrace) -> None:
    """The old bundle, whose pieces have the same names and hold no more, is there all the while."""
    fake_trace()
    build(options)
    forced = replace(options, precision="fp16", force=True)
    fake_trace(fail_at="mid", error=KeyboardInterrupt(), content="half precision")
    with pytest.raises(KeyboardInterrupt):
        build(forced)
    traced = fake_trace()
    bundle, _ = build(forced)
    assert traced[0] == "mid"
    assert bundle.manifest.precision == "fp16"
    bundle.check()


def test_another_cut_traces_only_what_is_cut_otherwise(options: BuildOptions, fake_trace: FakeTrace) -> None:
    fake_trace()
    before = {segment.name: segment.units for segment in build(options)[0].manifest.segments}
    traced = fake_trace()
    after = {s.name: s.units for s in build(replace(options, granularity="layer", force=True))[0].manifest.segments}
    assert set(traced) == {name for name, units in after.items() if before.get(name) != units}
    assert "text_encoder" not in traced


def test_a_replaced_bundle_is_not_written_into(options: BuildOptions, fake_trace: FakeTrace, tmp_path: Path) -> None:
    """What the new bundle takes over has one file with two names for a while: it must not be opened for writing."""
    fake_trace()
    build(options)
    os.link(folder_of(options) / "segments" / "stem.onnx", tmp_path / "witness")
    fake_trace(fail_at="mid", error=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        build(replace(options, precision="fp16", force=True))
    Bundle.open(folder_of(options)).check()
    assert (tmp_path / "witness").read_bytes() == b"stem" * 10


def test_two_builds_in_one_place(options: BuildOptions, fake_trace: FakeTrace) -> None:
    fake_trace()
    with working_on(folder_of(options)) as pieces:
        (pieces.folder / "mine").write_text("mine")
        with pytest.raises(BuildError, match="another build is writing .*bundle; wait for it"):
            build(options)
    assert (folder_of(options) / "mine").read_text() == "mine"


def test_a_build_stopped_between_its_last_two_moves(tmp_path: Path) -> None:
    """The old bundle has stepped aside, the new one is not in its place yet."""
    old = tmp_path / ".bundle.building" / "old"
    old.mkdir(parents=True)
    (old / "manifest.json").write_text("old")
    with working_on(tmp_path / "bundle") as pieces:
        assert (tmp_path / "bundle" / "manifest.json").read_text() == "old"
        (pieces.folder / "manifest.json").write_text("new")
    assert (tmp_path / "bundle" / "manifest.json").read_text() == "new"
    assert names_in(tmp_path) == ["bundle"]


def killed_in_its_last_moves(options: BuildOptions, exchange: Callable[[Path, Path], bool]) -> None:
    """Build in a process that ends where ``exchange`` ends it."""

    def run() -> None:
        files._exchange = exchange  # type: ignore[assignment]
        build(options)

    child = FORK.Process(target=run)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL


def die(*given: Path) -> bool:
    os.kill(os.getpid(), signal.SIGKILL)
    return True


def exchange_and_die(one: Path, other: Path) -> bool:
    assert files._exchange is not die
    assert EXCHANGE(one, other), "this system can exchange folders"
    return die()


def die_at_the_second_rename(one: Path, other: Path) -> bool:
    """As on a system that cannot exchange folders."""
    rename = Path.rename

    def move(path: Path, target: Path) -> Path:
        if path == one:
            die()
        return rename(path, target)

    Path.rename = move  # type: ignore[assignment, method-assign]
    return False


@pytest.mark.parametrize(("exchange", "is_new"), [(die, False), (exchange_and_die, True), (die_at_the_second_rename, False)])
def test_a_replacement_that_is_killed_in_its_last_moves(
    options: BuildOptions, fake_trace: FakeTrace, exchange: Callable[[Path, Path], bool], is_new: bool
) -> None:
    fake_trace()
    folder = folder_of(options)
    old = build(options)[0]
    forced = replace(options, precision="fp16", force=True)
    killed_in_its_last_moves(forced, exchange)
    if exchange is die_at_the_second_rename:
        assert not folder.exists()
    else:
        there = Bundle.open(folder)
        there.check()
        assert (there.manifest.precision == "fp16") == is_new
        assert (there.manifest == old.manifest) != is_new
    traced = fake_trace()
    bundle, built = build(forced)
    assert (built, traced) == (not is_new, []), "all pieces were finished"
    assert bundle.manifest.precision == "fp16"
    bundle.check()
    assert names_in(folder.parent) == ["bundle"]


def test_what_a_finished_build_left_is_no_other_builds_concern(options: BuildOptions, fake_trace: FakeTrace) -> None:
    """A build of other options was stopped: its pieces stay when the bundle in place is found up to date."""
    fake_trace()
    build(options)
    fake_trace(fail_at="mid", error=KeyboardInterrupt())
    forced = replace(options, precision="fp16", force=True)
    with pytest.raises(KeyboardInterrupt):
        build(forced)
    assert not build(options)[1]
    traced = fake_trace()
    build(forced)
    assert traced[0] == "mid"


def test_pieces_are_found_by_another_process_or_not_at_all(tmp_path: Path) -> None:
    pieces = Artifacts(tmp_path)
    path = pieces.folder / "a.onnx"
    path.write_bytes(b"whole")
    files = pieces.add("ab" * 32, [path])
    assert Artifacts(tmp_path).find("ab" * 32) == files
    assert Artifacts(tmp_path).find("cd" * 32) is None
    path.write_bytes(b"other")
    assert Artifacts(tmp_path).find("ab" * 32) is None
    next((tmp_path / "pieces").iterdir()).write_text("[{")
    assert Artifacts(tmp_path).find("ab" * 32) is None


@pytest.mark.slow
def test_two_processes_make_the_same_bundle_as_one(exporter: Command, tmp_path: Path) -> None:
    """Real traces, in processes of their own, of models that are soon traced."""
    source = save_source(tmp_path / "source", small_unet("two stages", mid_block_type=None))
    tiny_vae().save_pretrained(tmp_path / "vae")
    wanted = BuildOptions(
        source=str(source), vae=str(tmp_path / "vae"), granularity=None, plans=("deepcache:2",)
    )  # as few segments as show it
    one, two = (build(replace(wanted, out=tmp_path / str(jobs), jobs=jobs))[0] for jobs in (1, 2))
    assert [segment.name for segment in one.manifest.segments] == [segment.name for segment in two.manifest.segments]
    assert hashes(one.folder).keys() == hashes(two.folder).keys()
    # PyTorch names some values of a graph after its own state; the weights are the same to the last bit.
    weights = [name for name in hashes(one.folder) if name.endswith(".data")]
    assert len(weights) > len(one.manifest.segments) // 2
    assert all(hashes(one.folder)[name] == hashes(two.folder)[name] for name in weights)
    assert exporter("verify", two.folder, "--sizes", "16x16").code == 0


def test_a_process_that_ends(options: BuildOptions, fake_trace: FakeTrace, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one does when memory runs out."""
    fake_trace()
    parent, finished = os.getpid(), Artifacts.add

    def end_after_one(pieces: Artifacts, key: str, paths: Iterable[Path]) -> tuple[File, ...]:
        files = finished(pieces, key, paths)
        if len(pieces) > 1 and os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return files

    monkeypatch.setattr("exporter.segments.pool.get_context", lambda kind: FORK)
    monkeypatch.setattr(Artifacts, "add", end_after_one)
    with pytest.raises(BuildError, match="one of 2 processes ended.*fewer --jobs; the same command resumes"):
        build(replace(options, jobs=2))
    assert not folder_of(options).exists()
    assert len(Artifacts(folder_of(options).parent / ".bundle.building")), "what was finished is kept"


def test_progress_and_result_as_json(exporter: Command, fake_trace: FakeTrace, tiny_source: Path, tmp_path: Path) -> None:
    fake_trace()
    lines = [json.loads(line) for line in exporter("build", "--source", tiny_source, "--out", tmp_path / "b", "--json").out]
    assert lines[0].keys() == {"done", "total", "segment", "phase", "seconds", "seconds_left"}
    left = [line["seconds_left"] for line in lines[:-1]]
    assert left[:3] == [None] * 3, "nothing is done yet"
    assert all(seconds >= 0 for seconds in left[3:])
    assert left[-1] == 0
    assert [line["phase"] for line in lines[1:3]] == ["tracing", "compiling for onnxruntime"]
    assert lines[-2]["phase"] == "done"
    assert lines[-1]["bundle"] == str(tmp_path / "b")
    assert lines[-1]["built"] is True
    assert lines[-1]["onnx_bytes"]["stem"] == len(b"stem" * 10)
    again = [json.loads(line) for line in exporter("build", "--source", tiny_source, "--out", tmp_path / "b", "--json").out]
    assert again[-1]["built"] is False
