"""`python -m benchmarks.serving.load`: the HTTP service under load, in a process of its own.

So many clients at once, each asking for one picture after another; then the service without batches, for comparison; then a
thousand requests during which the service's memory is watched. Every answer is checked: the seed that was asked for, and a
picture that no other seed has. Writes JSON, CSV and a Markdown table, and prints that.
"""

import argparse
import csv
import hashlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from benchmarks.machine import write_results
from engines.support.cli import run_command

__all__ = ["Row", "main", "markdown", "row_of"]

_ROOT = Path(__file__).resolve().parents[2]
_PATIENCE = 120.0
"""Seconds for the service to start or to stop."""


@dataclass(frozen=True)
class Row:
    """The measurements of so many clients: seconds of requests from sending to the whole answer, and pictures made at once."""

    clients: int
    batches: bool
    requests: int
    answered: int
    seconds: float
    per_second: float
    p50: float
    p95: float
    mean_batch: float


@dataclass(frozen=True)
class Answer:
    """Seconds that it took; the hash of the picture, or None where there was none or it was another's."""

    seconds: float
    picture: str | None


class Client(threading.Thread):
    """Asks for one picture after another, over one connection, until the seeds are used up."""

    def __init__(self, port: int, seeds: Iterator[int], lock: threading.Lock, steps: int) -> None:
        super().__init__()
        self.answers: list[Answer] = []
        self._port, self._seeds, self._lock, self._steps = port, seeds, lock, steps

    def run(self) -> None:
        connection = HTTPConnection("127.0.0.1", self._port, timeout=_PATIENCE)
        while True:
            with self._lock:
                seed = next(self._seeds, None)
            if seed is None:
                return connection.close()
            started = time.perf_counter()
            picture = _asked(connection, seed, self._steps)
            self.answers.append(Answer(time.perf_counter() - started, picture))


def _asked(connection: HTTPConnection, seed: int, steps: int) -> str | None:
    body = json.dumps({"prompt": "a red star on a blue background", "seed": seed, "steps": steps})
    connection.request("POST", "/v1/images/generations", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    content = response.read()
    if response.status != 200:
        return None
    (picture,) = json.loads(content)["data"]
    return hashlib.sha256(picture["b64_json"].encode()).hexdigest() if picture["seed"] == seed else None


@contextmanager
def _served(bundle: Path, *options: str) -> Iterator[tuple[int, int]]:
    """The service in a process of its own: its port and its process' number. It has to end by itself when it is told to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["-m", "serving", "--bundle", f"mini={bundle}", "--port", str(port), "--no-page", "--quiet", *options]
    process = subprocess.Popen([sys.executable, *words], cwd=_ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        _wait_until_ready(port, process)
        yield port, process.pid
        process.send_signal(signal.SIGTERM)
        if process.wait(_PATIENCE):
            raise RuntimeError(f"the service ended with {process.returncode}")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _wait_until_ready(port: int, process: "subprocess.Popen[bytes]") -> None:
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until and process.poll() is None:
        try:
            if _got(port, "/readyz")[0] == 200:
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError("the service did not start")


def _got(port: int, path: str) -> tuple[int, str]:
    connection = HTTPConnection("127.0.0.1", port, timeout=_PATIENCE)
    connection.request("GET", path)
    response = connection.getresponse()
    return response.status, response.read().decode()


def _batches(port: int) -> tuple[float, float]:
    """Batches so far, and the pictures in them."""
    lines = dict(line.rsplit(" ", 1) for line in _got(port, "/metrics")[1].splitlines() if not line.startswith("#"))
    name = "unet_heirloom_batch_pictures_{}" + '{{model="mini"}}'
    return tuple(float(lines.get(name.format(part), 0)) for part in ("count", "sum"))  # type: ignore[return-value]


def _load(port: int, clients: int, seeds: range, steps: int) -> tuple[list[Answer], float]:
    """All answers, and the seconds from the first request to the last answer."""
    rest, lock = iter(seeds), threading.Lock()
    threads = [Client(port, rest, lock, steps) for _ in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [answer for thread in threads for answer in thread.answers], time.perf_counter() - started


def _measured(port: int, clients: int, requests: int, steps: int, *, batches: bool) -> Row:
    _load(port, clients, range(10**6, 10**6 + 2 * clients), steps)  # what is made once for each size of batch
    before = _batches(port)
    answers, seconds = _load(port, clients, range(requests), steps)
    count, pictures = (after - earlier for after, earlier in zip(_batches(port), before, strict=True))
    return row_of(clients, answers, requests, seconds, pictures / max(count, 1), batches=batches)


def row_of(clients: int, answers: Sequence[Answer], requests: int, seconds: float, batch: float, *, batches: bool) -> Row:
    """The figures of a load. A picture that two requests got counts once: the other was lost."""
    times = sorted(answer.seconds for answer in answers)
    p95 = statistics.quantiles(times, n=20, method="inclusive")[-1]
    answered = len({answer.picture for answer in answers} - {None})
    return Row(clients, batches, requests, answered, seconds, answered / seconds, statistics.median(times), p95, batch)


def _memory(bundle: Path, requests: int, steps: int, clients: int = 16, parts: int = 10) -> dict[str, Any]:
    """The service's resident memory in MiB after a tenth of so many requests each, after some that are not counted."""
    with _served(bundle) as (port, process):
        _load(port, clients, range(10**6, 10**6 + 10 * clients), steps)
        resident, answered, each = [_resident(process)], 0, requests // parts
        for part in range(parts):
            answers, _ = _load(port, clients, range(part * each, (part + 1) * each), steps)
            answered += len({answer.picture for answer in answers} - {None})
            resident.append(_resident(process))
    return {"requests": each * parts, "answered": answered, "clients": clients, "resident_mib": resident}


def _resident(process: int) -> float:
    status = Path(f"/proc/{process}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    return round(int(line.split()[1]) / 1024, 1)


def markdown(rows: Sequence[Row], memory: Mapping[str, Any]) -> str:
    """The figures as a table, and a sentence on memory."""
    first = rows[0].per_second
    lines = [
        "| clients | pictures made at once | pictures/s | against one by one | p50 s | p95 s | answered |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        batch = f"{row.mean_batch:.1f}" if row.batches else "1 (`--max-batch 1`)"
        lines.append(
            f"| {row.clients} | {batch} | {row.per_second:.1f} | {row.per_second / first:.2f} | {row.p50:.3f} | {row.p95:.3f} | "
            f"{row.answered} of {row.requests} |"
        )
    resident = memory["resident_mib"]
    asked = f"{memory['answered']} of {memory['requests']} more requests of {memory['clients']} clients were answered"
    before, middle, after = (f"{resident[at]:.0f}" for at in (0, len(resident) // 2, -1))
    lines.append(f"\n{asked}; the service's memory was {before} MiB before them, {middle} in the middle and {after} after them.")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, default=Path("bundles/mini-original"), help="bundle of `mini`")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=160, help="requests of each number of clients")
    parser.add_argument("--flat", type=int, default=1000, help="requests during which memory is watched")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/serving.json"))
    options = parser.parse_args(arguments)
    bundle = options.bundle.resolve()
    with _served(bundle) as (port, _):
        rows = [_measured(port, clients, options.requests, options.steps, batches=True) for clients in options.clients]
    with _served(bundle, "--max-batch", "1") as (port, _):
        rows.append(_measured(port, max(options.clients), options.requests, options.steps, batches=False))
    memory = _memory(bundle, options.flat, options.steps)
    write_results(options.out, {"steps": options.steps, "load": [asdict(row) for row in rows], "memory": memory})
    with options.out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    table = markdown(rows, memory)
    options.out.with_suffix(".md").write_text(table)
    print(table)


if __name__ == "__main__":
    run_command(main)
