"""What commands print for a mistake is one line, whatever was given."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from filelock import FileLock
from safetensors import SafetensorError

from engines.errors import UserError
from engines.support.cli import Parser
from engines.support.files import atomic_directory, atomic_file, check_writable, expanded, os_errors, real_path, remove_partials
from tests.support.commands import assert_refused, command


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (UserError("no bundle at a\nb"), "no bundle at a b"),
        (UserError("no bundle at \udcff"), "\\udcff"),
        (UserError(f"unknown engine {'x' * 10**6}; choose from: torch"), "xxx; choose from: torch"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 10**6), "(File name too long); choose another path"),
        (OSError(errno.ENOENT, "No such file or directory", "/proc/a\nb"), "/proc/a b cannot be read or written (No such file"),
    ],
)
def test_a_mistake_is_one_line(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception, shown: str
) -> None:
    def main(_: object) -> None:
        raise error

    outcome = command(main, capfd, monkeypatch)()
    assert_refused(outcome, shown)
    assert len(outcome.err[0]) < 4000
    assert "\n" not in str(error) or isinstance(error, OSError)


def test_what_names_no_file_keeps_its_traceback(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def main(_: object) -> None:
        raise OSError("of our own making")

    with pytest.raises(OSError, match="of our own making"):
        command(main, capfd, monkeypatch)()


def test_two_dashes_are_no_value() -> None:
    """argparse makes an empty list of them."""
    parser = Parser(prog="any")
    parser.add_argument("--size")
    with pytest.raises(UserError, match="argument --size: expected one argument; see: any --help"):
        parser.parse_args(["--size=--"])
    assert parser.parse_args(["--size=-1"]).size == "-1"


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert real_path(tmp_path / "loop").name == "loop"
    assert expanded("~no-such-user/x") == Path("~no-such-user/x")
    assert expanded("~") == Path.home()


def test_a_place_is_tried_without_a_trace(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Not a directory") as caught:
        check_writable(tmp_path / "file" / "b")
    assert caught.value.filename == str(tmp_path / "file"), "no name that nobody knows"


def test_an_error_names_the_file_that_was_to_be_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, atomic_file(tmp_path / "none" / "a.png") as temporary:
        temporary.touch()
    assert caught.value.filename == str(tmp_path / "none" / "a.png")
    (tmp_path / "a.png").mkdir()
    with pytest.raises(IsADirectoryError) as refused, atomic_file(tmp_path / "a.png") as temporary:
        temporary.touch()
    assert (refused.value.filename, refused.value.filename2) == (str(tmp_path / "a.png"), None)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_what_killed_writers_left_goes_and_nothing_else(tmp_path: Path) -> None:
    kept = [".a-0a1b2c3d.partial.txt", "b-0a1b2c3d.partial.png", ".b-0a1b2c3d.png", ".b-xx.partial.png"]
    for name in ("in/.b-0a1b2c3d.partial.png", ".c-0a1b2c3d.partial", *(f"in/{name}" for name in kept[1:]), kept[0]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    remove_partials(tmp_path / "in" / "b.png")
    assert sorted(path.name for path in (tmp_path / "in").iterdir()) == sorted(kept[1:])
    remove_partials(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == sorted(kept[1:])


def test_what_killed_writers_left_of_a_folder_goes_and_others_go_on(tmp_path: Path) -> None:
    killed, at_work, alike = (tmp_path / f".{name}.partial" for name in ("out-0a1b2c3d", "out-11111111", "out-of-22222222"))
    for left in (killed, at_work, alike, tmp_path / f"{killed.name}.old"):
        left.mkdir()
        (left / "weights").touch()
        left.with_name(f"{left.name.removesuffix('.old')}.lock").touch()
    with FileLock(tmp_path / f"{at_work.name}.lock"), atomic_directory(tmp_path / "out") as temporary:
        assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"out", at_work.name, alike.name, temporary.name}, (
            "the old folder, which was moved and not replaced, is back"
        )
        (temporary / "new").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"out", at_work.name, alike.name}
    with pytest.raises(KeyError), atomic_directory(tmp_path / "out"):
        raise KeyError
    with atomic_directory(tmp_path / "other") as temporary:
        assert temporary.is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["out", "other", alike.name, f"{alike.name}.lock"])


def test_safetensors_tells_the_systems_errors_in_words(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught, os_errors(tmp_path / "a"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "a"))
    with pytest.raises(SafetensorError, match="damaged"), os_errors(tmp_path / "a"):
        raise SafetensorError("damaged")
