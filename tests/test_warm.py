"""Commands that start warm are processes like those that start cold."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.warm import is_ours

pytestmark = pytest.mark.usefixtures("warm_commands")

SEEN = """
import json, os, sys
print(json.dumps([sys.argv, os.getcwd(), os.environ.get("COLOUR"), __name__, sys.stdin.read(), os.getppid()]))
print("a line", file=sys.stderr)
sys.exit(3)
"""
IMPORTS = "import sys; print('torch' in sys.modules)"


def run(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, timeout=60, **options)


def test_it_sees_what_it_was_given(tmp_path: Path) -> None:
    done = run("-c", SEEN, "one", cwd=tmp_path, input="given", env=os.environ | {"COLOUR": "red"})
    assert json.loads(done.stdout) == [["-c", "one"], str(tmp_path), "red", "__main__", "given", os.getpid()]
    assert (done.returncode, done.stderr) == (3, "a line\n")
    assert "COLOUR" not in os.environ


def test_a_module_is_run_as_python_runs_it(warm: object) -> None:
    done = run("-m", "runtime", "a red star", "--bundle", "nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no bundle at nowhere; build it with: ")
    assert run("-c", "1 / 0").stderr.splitlines()[-1] == "ZeroDivisionError: division by zero"
    assert run("-c", IMPORTS).stdout == f"{warm is not None}\n"


def test_it_can_be_killed_and_says_so() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    assert process.poll() is None
    process.kill()
    assert process.wait(60) == -signal.SIGKILL


def test_other_commands_start_cold() -> None:
    assert run("-c", IMPORTS, env=os.environ | {"OMP_NUM_THREADS": "3"}).stdout == "False\n"
    assert subprocess.run(["echo", "a"], capture_output=True, check=True).stdout == b"a\n"
    here = dict(os.environ)
    assert not is_ours([sys.executable, "-m", "pip", "list"], here)
    assert not is_ours(["python3", "-m", "runtime"], here)
    assert not is_ours([sys.executable, "--version"], here)
    assert is_ours([sys.executable, "-m", "runtime", "plans"], here)
