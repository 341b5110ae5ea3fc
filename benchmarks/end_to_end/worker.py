"""A subject in a process of its own, as the run sees it."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.serve import Call

__all__ = ["ROOT", "Subject", "SubjectError"]

ROOT = Path(__file__).resolve().parents[2]


class SubjectError(Exception):
    """A subject could not be loaded, or failed at a picture: its own words."""


class Subject:
    """A process that holds one subject. Use as a context manager; the process ends with it.

    Args:
        module: the adapter's, in ``benchmarks.peers``.
        folder: what it loads: a bundle, or a diffusers pipeline.
        options: for the adapter; ``scratch`` is a folder for arrays, ``threads`` how many it may use.
        python: the interpreter of its environment.
        log: where its standard error goes.

    Attributes:
        about: what it says when it is loaded: ``load_seconds``, and ``versions`` by package.

    Raises:
        SubjectError: it cannot be loaded.
    """

    def __init__(self, module: str, folder: Path, options: Mapping[str, Any], python: str, log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        threads = str(options["threads"])
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        command = [python or sys.executable, "-m", "benchmarks.peers.serve", module, str(folder.resolve()), json.dumps(options)]
        self._log = log.open("w")
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            start_new_session=True,  # Ctrl-C is this process's alone, which ends the others: none seems to have failed
        )  # fmt: skip
        try:
            self.about = self._read()
        except BaseException:
            self.__exit__()
            raise

    def picture(self, call: Call) -> dict[str, Any]:
        """Figures of a picture, with its latents and pixels as arrays. Raises SubjectError where it fails."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(call)) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        return answer | {name: np.load(answer[name]) for name in ("latents", "pictures")}

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise SubjectError(f"its process ended with {code}; see {self._log.name}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise SubjectError(answer["error"])
        return answer

    def __enter__(self) -> "Subject":
        return self

    def __exit__(self, *given: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                stream.close()
