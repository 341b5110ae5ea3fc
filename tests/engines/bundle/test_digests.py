"""Hashes are remembered while a file is the one that was read, and never believed of another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engines.bundle import digests
from engines.bundle.digests import fresh_sha256, known_sha256, note_sha256, sha256
from engines.bundle.folder import describe_file, is_intact

ROOT = Path(__file__).parents[3]
LARGE = b"0" * digests._SMALL


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are read; all others are settled at once."""
    paths: list[Path] = []

    def noting(path: Path) -> str:
        paths.append(path)
        return sha256(path)

    monkeypatch.setattr(digests, "sha256", noting)
    monkeypatch.setattr(digests, "_SETTLED", -1)
    return paths


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "weights.data"
    path.write_bytes(LARGE)
    return path


def test_a_file_that_stays_is_read_once(path: Path, read: list[Path]) -> None:
    assert known_sha256(path) == known_sha256(path) == sha256(path)
    assert read == [path]
    assert fresh_sha256(path) == sha256(path)
    assert len(read) == 2


def test_a_file_that_changed_is_read_though_size_and_time_are_the_same(path: Path, read: list[Path]) -> None:
    before, status = known_sha256(path), path.stat()
    with path.open("r+b") as stream:
        stream.write(b"1")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns, path.stat().st_ino) == (
        status.st_size, status.st_mtime_ns, status.st_ino,
    )  # fmt: skip
    assert known_sha256(path) == sha256(path) != before


def test_a_file_that_another_replaced_is_read(path: Path, read: list[Path], tmp_path: Path) -> None:
    status = path.stat()
    known_sha256(path)
    (tmp_path / "other").write_bytes(b"1" + LARGE[1:])
    os.utime(tmp_path / "other", ns=(status.st_atime_ns, status.st_mtime_ns))
    (tmp_path / "other").replace(path)
    assert known_sha256(path) == sha256(path)
    assert len(read) == 2


def test_what_changed_a_moment_ago_or_is_small_is_not_remembered(path: Path, caches: Path) -> None:
    small = path.with_name("small")
    small.write_bytes(b"one")
    known_sha256(path)
    note_sha256(small, "no hash")
    assert known_sha256(small) == sha256(small)
    assert [json.loads(place.read_text()) for place in (caches / "digests").iterdir()] == [{}]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weights.data": 1}', '{"weights.data": [1, 2, 3, 4, 5]}'])
def test_what_is_remembered_may_be_damaged(path: Path, caches: Path, read: list[Path], text: str) -> None:
    known_sha256(path)
    next((caches / "digests").iterdir()).write_text(text)
    assert known_sha256(path) == known_sha256(path) == sha256(path)
    assert len(read) == 2


def test_a_damaged_memory_damages_no_bundle(path: Path, caches: Path, read: list[Path]) -> None:
    file = describe_file(path.parent, path)
    assert is_intact(path.parent, file, known_sha256)
    place = next((caches / "digests").iterdir())
    place.write_text(place.read_text().replace(file.sha256, "0" * 64))
    assert is_intact(path.parent, file, known_sha256)
    assert file.sha256 in place.read_text()
    path.write_bytes(LARGE[:-1] + b"1")
    assert not is_intact(path.parent, file, known_sha256)


def test_nothing_that_lies_beside_a_file_is_believed(path: Path) -> None:
    status = path.stat()
    entry = [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, "0" * 64]
    for name in (".digests.json", "digests.json"):
        path.with_name(name).write_text(json.dumps({path.name: entry}))
    assert known_sha256(path) == sha256(path)


def test_caches_that_cannot_be_written_are_done_without(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNET_HEIRLOOM_CACHE", "/dev/null/none")
    monkeypatch.setattr(digests, "_SETTLED", -1)
    assert known_sha256(path) == sha256(path)


def test_no_more_folders_are_remembered_than_some(
    tmp_path: Path, caches: Path, read: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "_MOST_FOLDERS", 2)
    for name in "abc":
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights.data").write_bytes(LARGE)
        known_sha256(tmp_path / name / "weights.data")
    assert len(list((caches / "digests").iterdir())) == 2


@pytest.mark.usefixtures("warm_commands")
def test_two_processes_may_remember_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from engines.bundle import digests; digests._SETTLED = -1\n"
        "for _ in range(50): [digests.fresh_sha256(path) for path in map(Path, sys.argv[1:])]"
    )
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_bytes(LARGE)
    runs = [subprocess.Popen([sys.executable, "-c", code, *map(str, paths)], cwd=ROOT) for _ in range(2)]
    assert [run.wait(60) for run in runs] == [0, 0]
    assert [known_sha256(path) for path in paths] == [sha256(path) for path in paths]
