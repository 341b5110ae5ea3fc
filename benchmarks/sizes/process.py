"""One of our commands in a process of its own, with its time and its peak of memory (Linux)."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

__all__ = ["run"]


def run(
    arguments: Sequence[str],
    stop: Callable[[float], bool] = lambda seconds: False,
    read: Callable[[Sequence[str]], dict[str, Any]] = lambda lines: {},
) -> dict[str, Any]:
    """Run ``python -m`` with these arguments; its seconds, peak of resident memory in MB and exit code.

    Args:
        arguments: module and its arguments. A build with ``--json`` also gets ``phases``: the peak in MB of each phase of each
            segment, the largest first.
        stop: told the seconds since the start; the process gets SIGKILL when it says so.
        read: told the lines printed, gives what else is to be noted.
    """
    started = time.perf_counter()
    peak, phases = 0, dict[str, int]()
    with TemporaryFile() as output:
        process = subprocess.Popen([sys.executable, "-m", *arguments], stdout=output)
        killed = False
        while True:
            done, status, usage = os.wait4(process.pid, os.WNOHANG)
            seconds = time.perf_counter() - started
            if done:
                break
            if not killed and stop(seconds):
                process.send_signal(signal.SIGKILL)
                killed = True
            phase, memory = _phase(_printed(output)), _memory(process.pid)
            peak = max(peak, memory.get("VmHWM", 0))
            phases[phase] = max(phases.get(phase, 0), memory.get("VmRSS", 0))
            time.sleep(0.05)
        printed = _printed(output)
    print(*printed[-3:], sep="\n")
    found = {
        "command": " ".join(["python -m", *arguments]),
        "seconds": round(seconds, 1),
        "processor_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mb": peak,
        "exit": os.waitstatus_to_exitcode(status),
    }
    if arguments[0] == "exporter" and "--json" in arguments:
        found["phases"] = dict(sorted(phases.items(), key=lambda item: -item[1]))
    return found | read(printed)


def _printed(output: IO[bytes]) -> list[str]:
    """The lines printed so far; the position where the process writes next stays."""
    return os.pread(output.fileno(), 1 << 20, 0).decode().splitlines()


def _phase(lines: Sequence[str]) -> str:
    """The step that a build with ``--json`` named last."""
    for line in reversed(lines):
        try:
            step = json.loads(line)
            return f"{step['phase']} {step['segment']}".strip()
        except (ValueError, TypeError, KeyError):  # half a line, or none of a build's steps
            continue
    return "starting"


def _memory(process: int) -> dict[str, int]:
    """Resident memory in MB: now (``VmRSS``) and at its peak (``VmHWM``). Its own: ``rusage`` has its parent's too."""
    try:
        lines = [line.split() for line in Path(f"/proc/{process}/status").read_text().splitlines()]
    except OSError:  # it has just ended
        return {}
    return {line[0].rstrip(":"): round(int(line[1]) / 1024) for line in lines if line and line[0] in ("VmRSS:", "VmHWM:")}
