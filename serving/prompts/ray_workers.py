"""Files of prompts on many GPUs or machines: Ray Data hands lines to workers, each with a loaded bundle of its own.

Workers write the pictures themselves, so the folder has to be one that all machines see. A worker that dies is replaced, and its
lines are made once more; a picture that was there is then replaced by the same.
"""

import logging
import os
from argparse import Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from engines.errors import UserError
from engines.support.extras import need
from runtime import load
from serving.errors import ServingError
from serving.prompts.job import Course, Job
from serving.prompts.lines import Asked, Line
from serving.prompts.making import make
from serving.queueing.ticket import Made

if TYPE_CHECKING:
    from ray.data import Dataset

__all__ = ["Painter", "make_in_workers"]

_ANSWERS = 5
"""Seconds in which a cluster has to answer."""
_BATCHES = 8
"""That a worker is given at once, so that pictures of a kind find each other."""


class Painter:
    """A worker: makes the pictures of lines and writes them. Made by Ray in a process of its own."""

    def __init__(self, job: Job) -> None:
        self._job, self._pipeline = job, load(job.bundle, job.engine)

    def __call__(self, rows: dict[str, Any]) -> dict[str, list[Any]]:
        """The outcome of lines: their numbers, how many pictures each has, and why one has none."""
        asked: list[Asked] = []
        faults: dict[int, str] = {}

        def failed(number: int, error: UserError) -> None:
            faults[number] = error.line

        for number, text in zip(rows["number"].tolist(), rows["text"], strict=True):
            try:
                asked.append(self._job.read(Line(number, text)))
            except UserError as error:  # a file that it names has gone since
                failed(number, error)
        make(self._pipeline, asked, self._job.batch, self._write, failed)
        pictures = {each.number: each.request.images for each in asked}
        numbers = rows["number"].tolist()
        return {
            "number": numbers,
            "pictures": [pictures.get(number, 0) for number in numbers],
            "fault": [faults.get(number, "") for number in numbers],
        }

    def _write(self, asked: Asked, made: Made) -> None:
        self._job.write(asked, made)


def make_in_workers(job: Job, options: Namespace, course: Course, done: Callable[[int, int], None]) -> None:
    """Make all pictures of a job that are not there.

    Args:
        job: what is done.
        options: the command's, by name: how many workers, of what size, on which cluster.
        course: gives the lines, and is told of those of which no picture can be made.
        done: is told of a line whose pictures are written, and of how many.

    Raises:
        ServingError: Ray is not installed, or there is no such cluster.
    """
    need("ray", "--workers", "ray", ServingError)
    import ray

    rows = [{"number": line.number, "text": line.text} for line, _ in course.lines()]
    if not rows:
        return
    ours = not ray.is_initialized()
    if ours:
        _start(options.ray_address)
    try:
        for row in _made(rows, job, options).iter_rows():
            if row["fault"]:
                course.failed(int(row["number"]), ServingError(row["fault"]))
            else:
                done(int(row["number"]), int(row["pictures"]))
    finally:
        if ours:
            ray.shutdown()


def _start(address: str | None) -> None:
    import ray

    _check_cluster(address or os.environ.get("RAY_ADDRESS", ""))
    try:
        ray.init(
            address, include_dashboard=False if address is None else None, log_to_driver=False, logging_level=logging.WARNING
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise _no_cluster(address, str(error)) from error


def _check_cluster(address: str) -> None:
    """Raise ServingError where no cluster answers; Ray itself would ask for minutes.

    ``auto`` and the like are looked for by Ray on this machine, which takes no time. Both kinds of address, HOST:PORT and
    ray://HOST:PORT, are gRPC's.
    """
    host = address.removeprefix("ray://")
    if ":" not in host:
        return
    need("grpc", "--ray-address", "ray", ServingError)
    import grpc  # type: ignore[import-untyped]

    with grpc.insecure_channel(host) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=_ANSWERS)
        except grpc.FutureTimeoutError as error:
            raise _no_cluster(address, f"no cluster answers there within {_ANSWERS} s") from error


def _no_cluster(address: str | None, why: str) -> ServingError:
    return ServingError(f"--ray-address {address!s:.100}: {why:.300}; start a cluster, or leave it out")


def _made(rows: list[dict[str, Any]], job: Job, options: Namespace) -> "Dataset":
    """The lines' rows, sent through workers as they are asked for."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    size = _BATCHES * job.batch
    blocks = max(1, min(-(-len(rows) // size), 10_000))
    return ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
        Painter,
        fn_constructor_args=(job,),
        batch_size=size,
        compute=ray.data.ActorPoolStrategy(size=options.workers),
        num_cpus=1 if options.cpus_per_worker is None else options.cpus_per_worker,
        num_gpus=options.gpus_per_worker or None,
    )
