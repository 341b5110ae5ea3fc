"""Commands as processes of their own that start warm: forked from one that has the libraries already (Linux).

`python -m exporter ...` takes seconds to import what it needs, each time. Inside ``warm_starts`` such a command, started through
``subprocess``, is a fork of a process that has imported all that, with the arguments, folder, environment and files that it was
given; it is a child of this process like any other: it is waited for, killed, and counted as such. Commands in another
environment, and whatever is no command of ours, start as always.

Every command also has a test that starts it cold.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
OURS = ("benchmarks", "exporter", "runtime", "serving", "tuning", "unet_heirloom")
IMPORTED = (
    "exporter.build", "exporter.segments.pool", "exporter.verification.command", "runtime.command.run",
    "tuning.distillation.command", "tuning.assemble_command",
)  # fmt: skip
"""What is there already when a command starts, with all that it imports."""
_READ_AT_IMPORT = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "HF_HUB_OFFLINE",
    "PYTHONHASHSEED",
    "PYTHONWARNINGS",
    "COVERAGE_FILE",
)
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER
_LONGEST = 1 << 20
"""Bytes of a request."""


class Warm:
    """The process that commands are forked from. Use as a context manager; it ends with it."""

    def __init__(self) -> None:
        self._here, there = socket.socketpair()
        command = [sys.executable, "-m", "tests.support.warm", str(there.fileno())]
        self._process = subprocess.Popen(command, cwd=ROOT, pass_fds=[there.fileno()])
        there.close()

    def __enter__(self) -> Warm:
        return self

    def __exit__(self, *given: object) -> None:
        self._here.close()
        self._process.wait(60)

    def start(self, arguments: list[str], folder: str, environment: dict[str, str], files: list[int]) -> int:
        """Start a command, whose standard files these are; gives the process, a child of this one."""
        request = json.dumps({"arguments": arguments, "folder": folder, "environment": environment}).encode()
        assert len(request) < _LONGEST
        with _adopting():
            socket.send_fds(self._here, [len(request).to_bytes(4, "big")], files)
            self._here.sendall(request)
            return int.from_bytes(self._here.recv(4, socket.MSG_WAITALL), "big")


@contextmanager
def _adopting() -> Iterator[None]:
    """Inside, a process whose parent ends becomes a child of this one, if it descends from it."""
    change = ctypes.CDLL(None).prctl
    change(_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        change(_SUBREAPER, 0, 0, 0, 0)


@contextmanager
def warm_starts(warm: Warm) -> Iterator[None]:
    """Inside, ``subprocess`` starts commands warm where it can."""

    class Popen(subprocess.Popen[Any]):
        def _execute_child(
            self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell, *others
        ) -> None:
            environment = dict(os.environ if env is None else env)
            if executable or preexec_fn or pass_fds or shell or not is_ours(args, environment):
                super()._execute_child(  # type: ignore[misc]
                    args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell, *others
                )
                return
            pipes = others[:6]
            files = [given if given != -1 else own for given, own in zip((pipes[0], pipes[3], pipes[5]), range(3), strict=True)]
            self.pid = warm.start([str(part) for part in args[1:]], os.path.abspath(cwd or "."), environment, files)
            self._child_created = True
            self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]

    with patch.object(subprocess, "Popen", Popen):
        yield


def is_ours(command: Any, environment: dict[str, str]) -> bool:
    """Whether a command can be forked: `python -m` with a module of ours, or `python -c`, in an environment like this one."""
    if not isinstance(command, list | tuple) or len(command) < 3 or str(command[0]) != sys.executable:
        return False
    kind, what = command[1:3]
    known = kind == "-c" or (kind == "-m" and str(what).split(".")[0] in OURS)
    return known and all(environment.get(name) == os.environ.get(name) for name in _READ_AT_IMPORT)


def serve(control: socket.socket) -> None:
    """Fork a command for each request, until nobody can ask any more."""
    while header := socket.recv_fds(control, 4, 3):
        size, files, *_ = header
        if not size:
            return
        request = json.loads(control.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
        reading, writing = os.pipe()
        between = os.fork()
        if between == 0:  # ends at once, so that its child goes to whoever asked
            process = os.fork()
            if process:
                os.write(writing, process.to_bytes(4, "big"))
                os._exit(0)
            for file in (reading, writing):
                os.close(file)
            control.close()
            run(request, files)
            return
        os.waitpid(between, 0)
        control.sendall(os.read(reading, 4))
        for file in (reading, writing, *files):
            os.close(file)


def run(request: dict[str, Any], files: list[int]) -> None:
    """Be the command."""
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        number = ("stdin", "stdout", "stderr").index(name)
        stream = open(number, mode, buffering=1 if name == "stderr" else -1, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.path[0] = request["folder"]
    kind, what, *rest = request["arguments"]
    sys.argv = [what if kind == "-m" else kind, *rest]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
        return
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(what, "<string>", "exec"), vars(main))


def _import() -> None:
    gc.disable()
    for name in IMPORTED:
        with suppress(ImportError):  # of an extra that is not installed
            importlib.import_module(name)
    gc.freeze()
    gc.enable()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _import()
    serve(socket.socket(fileno=int(sys.argv[1])))
