"""The time that a step takes on its device, taken without waiting for it."""

import time

import torch

__all__ = ["Timer"]


class Timer:
    """Runs from its making to ``stop``: on a GPU, from when it has done what came before until it has done what came between."""

    def __init__(self, device: torch.device) -> None:
        self._seconds: float | None = None
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if device.type == "cuda":
            self._events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._events[0].record(torch.cuda.current_stream(device))
            self._stream = torch.cuda.current_stream(device)
        self._began = time.perf_counter()

    def stop(self) -> None:
        """Stop here, on the same stream."""
        if self._events is None:
            self._seconds = time.perf_counter() - self._began
        else:
            self._events[1].record(self._stream)

    @property
    def seconds(self) -> float:
        """The time taken, in seconds. Reading it waits until the device has reached the stop."""
        if self._seconds is None:
            if self._events is None:
                raise RuntimeError("the timer still runs")
            first, last = self._events
            last.synchronize()
            self._seconds, self._events = first.elapsed_time(last) / 1000, None
        return self._seconds
