"""The views of a call from its first step to its end: plain values, which ``app`` puts into the page's parts."""

import logging
import tempfile
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from engines import UserError
from runtime import Request, find_plan
from runtime.plans.notes import plan_notes
from serving.page.asked import Asked
from serving.page.calls import Made, StepDone, in_turns, run
from serving.page.comparison import difference, figures
from serving.page.plans import share_of_macs
from serving.page.reproduce import IMAGE, MASK, as_command, as_python
from serving.page.strip import Strip
from serving.queueing.service import Service

__all__ = ["NOTHING_MADE", "PARTS", "UNEXPECTED", "WAITING", "View", "fault", "status", "views"]

View = dict[str, Any]
"""New values of some of ``PARTS``; the others stay."""
PARTS = ("status", "strip", "picture", "full", "difference", "figures", "python", "command", "files")
UNEXPECTED = "unexpected: this is a fault of the program, not of yours; its log says more"
NOTHING_MADE = "no picture was made: too many calls are waiting, or what the browser sent could not be read; try again"
WAITING = "waiting for its turn"
_LOG = logging.getLogger(__name__)
_BREATH = 0.2
"""Seconds between two views; steps that take less are shown together."""


def status(kind: str, text: str, share: float | None = None) -> str:
    """The line below the button, with a bar where a share is done; ``kind`` is idle, running, done or wrong."""
    bar = "" if share is None else f'<div class="bar"><i style="width:{100 * share:.1f}%"></i></div>'
    role = "alert" if kind == "wrong" else "status"
    return f'<div class="status {kind}" role="{role}"><span>{escape(text)}</span>{bar}</div>'


def fault(error: BaseException) -> str:
    """The text for an error: a visitor's mistake in one line. Anything else is unexpected, and its traceback is logged."""
    if isinstance(error, UserError):
        return error.line
    _LOG.error("a fault on the page", exc_info=error)
    return UNEXPECTED


def views(service: Service, model: str, asked: Asked, stop: threading.Event) -> Iterator[View]:
    """Everything that is shown of a call. Its pictures are files that are gone when the next view is asked for.

    Args:
        service: makes it.
        model: with which bundle.
        asked: what was asked for.
        stop: the call ends when it is set.

    Raises:
        Cancelled: it was stopped.
        UserError: the request is refused.
    """
    with tempfile.TemporaryDirectory(prefix="unet-heirloom-page-") as folder:
        yield from _call(service, model, asked, stop, Path(folder))


def _call(service: Service, model: str, asked: Asked, stop: threading.Event, folder: Path) -> Iterator[View]:
    pipeline = service.pipelines[model]
    request = asked.request(pipeline.manifest)
    compare = bool(asked.compare) and request.found_plan.name != "full"
    every = asked.preview if isinstance(asked.preview, int) else 0
    prepared = pipeline.prepare(request)
    schedule = prepared.schedule
    strip, total = Strip(schedule), schedule.steps
    yield dict.fromkeys(("full", "difference", "figures", "python", "command", "files")) | {
        "strip": strip.svg(running=True),
        "status": status("running", WAITING, 0),
    }
    made = yield from _steps(service, model, request, stop, every, total, strip)
    share = share_of_macs(schedule)
    yield {
        "picture": _saved(made, folder / "picture.png"),
        "figures": figures(made, share),
        "python": as_python(made.generation, pipeline),
        "command": as_command(made.generation, pipeline),
        "files": _files(request, folder),
    }
    if compare:
        whole = replace(request, plan=find_plan("full"))
        full = yield from _steps(service, model, whole, stop, 0, total)
        apart = difference(made.generation.image, full.generation.image)
        apart.save(folder / "difference.png")
        yield {
            "full": _saved(full, folder / "full.png"),
            "difference": folder / "difference.png",
            "figures": figures(made, share, full),
            "status": status("running", "measuring", 1),
        }
        made, full = in_turns(service, model, (request, whole), (made, full), stop)
        yield {"figures": figures(made, share, full)}
    unread = [f"not read, for the prompt is too long: {words}" for words in made.generation.unread if words]
    notes = *plan_notes(asked.plan, schedule, prepared.call), *unread
    yield {"status": status("done", "; ".join([f"done: seed {made.generation.seeds[0]}", *notes]))}


def _steps(
    service: Service,
    model: str,
    request: Request,
    stop: threading.Event,
    every: int,
    total: int,
    strip: Strip | None = None,
) -> Generator[View, None, Made]:
    """The views of a call's steps; returns what it made. A call without a strip is the one that is compared with."""
    shown_at = 0.0
    name = "" if strip else "now in full: "
    for item in run(service, model, request, stop, every):
        if isinstance(item, Made):
            return item
        if strip is not None:
            strip.note(item.record)
        done = item.record.index + 1
        if item.preview is None and done < total and time.monotonic() - shown_at < _BREATH:
            continue
        shown_at = time.monotonic()
        yield _step(item, done, total, name) | ({} if strip is None else {"strip": strip.svg(done, running=done < total)})
    raise AssertionError("a call ends with what it made")


def _step(item: StepDone, done: int, total: int, name: str) -> View:
    rate = "" if item.rate is None else f" · {item.rate:.1f} steps/s"
    view: View = {"status": status("running", f"{name}step {done} of {total}{rate}", done / total)}
    return view if item.preview is None else view | {"picture": item.preview}


def _saved(made: Made, path: Path) -> Path:
    """The picture as a PNG file that carries what it was made from."""
    return made.generation.save(path)[0]


def _files(request: Request, folder: Path) -> list[str] | None:
    """The pictures of a request as files, which the texts read beside the bundle; None where it has none."""
    pictures = [(name, picture) for name, picture in ((IMAGE, request.image), (MASK, request.mask)) if picture is not None]
    for name, picture in pictures:
        picture.save(folder / name)  # type: ignore[union-attr]  # PIL images: see Asked
    return [str(folder / name) for name, _ in pictures] or None
