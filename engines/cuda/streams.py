"""Streams for calls: each call has one to itself, so that memory which it lets go is never another call's before it is read."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from engines.cuda.graphs import on_stream

__all__ = ["CallStreams"]


class CallStreams:
    """As many streams as there are calls at once; one that is free is taken again, for engines keep something for each.

    PyTorch gives freed memory to the next work on the stream that it was made on, which must not be another call's:
    the first call's last read may have been put on a third stream in between.

    Args:
        device: of the streams; on others than CUDA devices there are none.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: list[torch.cuda.Stream] = []
        self._lock = threading.Lock()

    @contextmanager
    def one(self) -> Iterator[None]:
        """Inside it, work goes to a stream of the block's own: after all that the current one was given, and before its next.

        Where the current stream is not the default one, the caller has chosen, and it stays.
        """
        if self._device.type != "cuda" or torch.cuda.current_stream(self._device) != torch.cuda.default_stream(self._device):
            yield
            return
        with self._lock:
            stream = self._free.pop() if self._free else torch.cuda.Stream(self._device)
        try:
            with on_stream(stream):
                yield
        finally:
            with self._lock:
                self._free.append(stream)

    def hand_over(self, tensor: torch.Tensor) -> torch.Tensor:
        """To be called inside ``one``: the tensor may be read on the default stream after the block, where it is freed, too."""
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.default_stream(tensor.device))
        return tensor
