"""The work of ``python -m serving.prompts`` once its arguments are read."""

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console

from engines import Bundle, UserError
from engines.support.cli import print_warnings
from engines.support.files import check_writable
from runtime import Pipeline, Request, find_plan, load
from runtime.api import find_bundle
from serving.errors import ServingError
from serving.fetching import bundle_folder
from serving.prompts.arguments import fields_of
from serving.prompts.job import Course, Job
from serving.prompts.lines import Asked, count_lines, in_words
from serving.prompts.making import make
from serving.prompts.progress import show_progress
from serving.queueing.ticket import Made

__all__ = ["run"]


def run(options: Namespace) -> int:
    """Run the command on its arguments by name; the number of lines of which no picture was made.

    Raises:
        UserError: a user's mistake.
    """
    console = Console(highlight=False, markup=False, quiet=options.quiet)
    print_warnings()
    total, job = count_lines(options.file), _job(options)
    pipeline = load(job.bundle, job.engine if options.workers is None else "null", job.defaults["plan"])
    pipeline.prepare(Request("-", **job.defaults))  # what no line could mend is said now
    told = _Told(options.stop_at_error)
    with _alone(job.out), show_progress(console, total) as shown:
        course = Course(job, told.failed)
        console.print(f"{total} lines of {job.file} with bundle {job.bundle}, into {job.out}", soft_wrap=True)

        def done(number: int, pictures: int) -> None:
            course.done(number, pictures)
            told.made += 1
            shown.update(told.made + course.there + told.not_made, course.there)

        if options.workers is None:
            _make_here(pipeline, job, course, done)
        else:
            from serving.prompts.ray_workers import make_in_workers

            make_in_workers(job, options, course, done)
    console.print(f"{told.made} made, {course.there} there already, {told.not_made} not made", soft_wrap=True)
    return told.not_made


class _Told:
    """The outcome of lines, counted. Those of which no picture can be made are warned of."""

    def __init__(self, stop: bool) -> None:
        self.made = self.not_made = 0
        self._stop = stop

    def failed(self, number: int, error: UserError) -> None:
        if self._stop:
            raise ServingError(in_words(number, error)) from error
        self.not_made += 1
        print(f"warning: {in_words(number, error)}", file=sys.stderr)


def _job(options: Namespace) -> Job:
    fields = fields_of(options)
    folder = find_bundle(bundle_folder(options.bundle) if options.bundle else None, options.engine, find_plan(options.plan))
    out = options.shards or options.out or Path("pictures")
    size = options.shard_size if options.shards else None
    key = Bundle.open(folder).manifest.key
    return Job(options.file, fields, folder.absolute(), key, options.engine, out.absolute(), size, options.batch)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """A folder that is there and that no other call writes into."""
    check_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise ServingError(
            f"{folder!s:.200} is being written to by another call; wait for that, or give another folder"
        ) from error


def _make_here(pipeline: Pipeline, job: Job, course: Course, done: Callable[[int, int], None]) -> None:
    def made(asked: Asked, pictures: Made) -> None:
        job.write(asked, pictures)
        done(asked.number, asked.request.images)

    make(pipeline, (asked for _, asked in course.lines()), job.batch, made, course.failed)
