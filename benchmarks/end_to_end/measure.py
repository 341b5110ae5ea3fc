"""The measuring: rows in turns with the base row; what is found is written as it comes, so that a run can be resumed."""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.end_to_end.references import References, pixel_psnr
from benchmarks.end_to_end.rows import Row, Settings
from benchmarks.end_to_end.worker import Subject, SubjectError
from benchmarks.peers.serve import Call
from engines.support.files import write_text

__all__ = ["Log", "Sample", "measure"]

Sample = dict[str, Any]
"""A picture that was made: row, round, turn, seconds by part, memory, and its distance to the base row's of the same seed."""

WARM_UP = -1
"""The round before those that count."""


class Log:
    """The samples found so far, one line of JSON each. Raises ValueError where the file is of a run with other settings."""

    def __init__(self, path: Path, settings: dict[str, Any], *, resume: bool) -> None:
        self._path = path
        self.samples: list[Sample] = []
        header = json.loads(json.dumps(settings, default=str))
        if resume and path.exists():
            first, *lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] or [""]
            if json.loads(first) != header:
                raise ValueError("its settings are others")
            self.samples = [json.loads(line) for line in lines]
        # What a run that was killed has left of a line goes: the next one would be written behind it.
        write_text(path, "".join(json.dumps(line) + "\n" for line in (header, *self.samples)))

    def add(self, sample: Sample) -> None:
        """Write one down."""
        self.samples.append(sample)
        with self._path.open("a") as file:
            file.write(json.dumps(sample) + "\n")

    def has(self, row: Row, round_: int) -> bool:
        """Whether a row was measured in a round, or has failed."""
        return any(
            sample["row"] == row.name and sample["engine"] == row.engine and (sample["round"] == round_ or "error" in sample)
            for sample in self.samples
        )


def measure(
    rows: Sequence[Row],
    leads: Sequence[Row],
    start: Callable[[Row], Subject],
    call: Call,
    settings: Settings,
    log: Log,
    references: References,
    tell: Callable[[Row, int, float | None], None],
) -> None:
    """Measure rows that share a subject, in turns with the base row: base, row, row, base, row, row.

    Args:
        rows: of one subject; it is loaded once, with the leads' beside it.
        leads: what is drawn at the start of every round. The last is the base row, which ratios are taken to; before it may stand
            that of the first engine, which base rows of other engines are compared with.
        start: starts the process of a row's subject.
        call: the picture; its seed is that of the first round.
        settings: of the run.
        log: takes what is found.
        references: what the first engine draws; takes and compares.
        tell: told of each picture before it is made, and after it with its seconds.
    """  # fmt: skip
    rounds = range(WARM_UP, settings.rounds)
    *others, base = leads
    todo = [row for row in rows if not all(log.has(row, round_) for round_ in rounds if round_ >= 0)]
    if not todo:
        return
    with ExitStack() as stack:
        try:
            wanted = {row.subject: row for row in (base, todo[0])}
            subjects = {subject: stack.enter_context(start(row)) for subject, row in wanted.items()}
        except SubjectError as error:
            for row in todo:
                log.add({**_key(row), "round": 0, "error": str(error)})
            return
        for row in list(others):
            try:
                subjects[row.subject] = stack.enter_context(start(row))
            except SubjectError:  # it has said so in its own rows; these are measured without it
                others.remove(row)
        for row in todo:
            log.add({**_key(row), "round": WARM_UP, **subjects[row.subject].about})
        for round_ in rounds:
            seeded = replace(call, seed=call.seed + max(0, round_))
            try:
                _round(round_, others, base, todo, subjects, seeded, log, references, tell)
            except SubjectError as error:  # of the base row: the others have nothing to be compared with
                for row in [row for row in todo if row != base]:
                    log.add({**_key(row), "round": round_, "error": f"{base.name} failed: {error}"})
                return


def _round(
    round_: int, others: list[Row], base: Row, todo: list[Row], subjects: dict[tuple[str, str, str], Subject], call: Call,
    log: Log, references: References, tell: Callable[[Row, int, float | None], None],
) -> None:  # fmt: skip
    """One picture of each row, and the base row's before them; a row that fails is left out from then on."""
    wanted: dict[str, Any] = {}
    for row in [*others, base, *[row for row in todo if row != base]]:
        tell(row, round_, None)
        try:
            found = subjects[row.subject].picture(replace(call, plan=row.plan))
        except SubjectError as error:
            log.add({**_key(row), "round": round_, "error": str(error)})
            if row == base:
                raise
            (others if row in others else todo).remove(row)
            continue
        arrays = {name: found.pop(name) for name in ("latents", "pictures")}
        references.keep(row, call.seed, arrays)
        compared = references.compare(row, call.seed, arrays)
        if row in others:
            compared |= _distance(arrays, arrays)
        else:
            wanted = wanted or arrays
            compared |= _distance(arrays, wanted)
        tell(row, round_, found["seconds"])
        log.add({**_key(row), "round": round_, "at": time.time(), **found, **compared})


def _key(row: Row) -> Sample:
    return {"row": row.name, "engine": row.engine}


def _distance(made: dict[str, Any], wanted: dict[str, Any]) -> Sample:
    """How far a picture is from the base row's of the same seed: PSNR in dB of pixels, and the latents' largest difference."""
    latents = np.abs(made["latents"] - wanted["latents"]).max() / max(float(np.abs(wanted["latents"]).max()), 1e-12)
    return {"psnr": pixel_psnr(made["pictures"], wanted["pictures"]), "latents_error": float(latents)}
