"""What commands print for a mistake is one line, whatever was given."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from safetensors import SafetensorError

from engines.errors import UserError
from engines.support.cli import Parser
from engines.support.files import check_writable, expanded, os_errors, real_path
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
    with pytest.raises(OSError, match="Not a directory"):
        check_writable(tmp_path / "file" / "b")


def test_safetensors_tells_the_systems_errors_in_words(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught, os_errors(tmp_path / "a"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "a"))
    with pytest.raises(SafetensorError, match="damaged"), os_errors(tmp_path / "a"):
        raise SafetensorError("damaged")
