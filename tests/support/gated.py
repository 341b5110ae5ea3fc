"""A pipeline whose steps wait to be let through, so that tests of a service know what runs and what waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from engines import Bundle, make_engine
from runtime import Generation, Pipeline, Request

__all__ = ["PATIENCE", "GatedPipeline", "wait_for"]

PATIENCE = 20.0
"""Seconds after which a test that waits for something has failed."""


def wait_for(condition: Callable[[], bool], patience: float = PATIENCE) -> None:
    """Wait until it holds."""
    until = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


class GatedPipeline(Pipeline):
    """Runs on the null engine. Calls wait at their first step while the gate is closed; ``requests`` is all that ran."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle, make_engine("null"))
        self.requests: list[Request] = []
        self._done = [0]
        self._gate, self._begun = threading.Event(), threading.Semaphore(0)
        self._gate.set()

    @property
    def records(self) -> int:
        """Steps that were done, by whatever serves this pipeline too."""
        return self._done[0]

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Inside, calls stop at their first step."""
        self._gate.clear()
        try:
            yield
        finally:
            self.open()

    def open(self) -> None:
        """Let calls go on."""
        self._gate.set()

    def wait_until_running(self) -> None:
        """Wait for the next call to stand before its gate."""
        assert self._begun.acquire(timeout=PATIENCE)

    def generate(self, prompt: Any = None, negative_prompt: Any = "", **options: Any) -> Generation:
        self.requests.append(prompt)
        callback = options.pop("callback")

        def step(record: Any, latents: Any) -> None:
            if record.index == 0:
                self._begun.release()
                assert self._gate.wait(PATIENCE)
            callback(record, latents)
            self._done[0] += 1

        return super().generate(prompt, negative_prompt, callback=step, **options)
