"""What is said where a command is stopped: nothing that is not so."""

from __future__ import annotations

import errno

import pytest

from engines.support.cli import resumable, run_command


def outcome(action, capsys):
    with pytest.raises(SystemExit) as leaving:
        run_command(lambda arguments: action(), [])
    return leaving.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "begins"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: the disk is full"),
        (OSError(errno.EFBIG, "File too large"), 2, "error: a file cannot be written any further"),
        (OSError(errno.EIO, "Input/output error"), 2, "error: a file cannot be written any further"),
    ],
)
def test_only_what_is_resumed_is_said_to_be(error, code, begins, capsys):
    def plain():
        raise error

    def resumed():
        with resumable():
            raise type(error)(*error.args)

    for action, promised in ((plain, False), (resumed, True)):
        found, message = outcome(action, capsys)
        assert found == code
        assert message.startswith(begins)
        assert "nothing half-written was kept" in message
        assert ("the same command resumes from what was finished" in message) == promised
