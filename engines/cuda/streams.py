"""Streams of a GPU: how all are waited for, and those of calls.

Each call has one to itself, so that memory which it lets go is never another call's before it is read.
"""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from engines.cuda.graphs import on_stream

__all__ = ["CallStreams", "wait_for"]


def wait_for(device: torch.device) -> None:
    """Wait until all streams of a device have finished; nothing to do on others than CUDA devices."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
        stream = self.take()
        try:
            with self.use(stream):
                yield
        finally:
            self.give_back(stream)

    def take(self) -> "torch.cuda.Stream | None":
        """A stream for a call that is made step by step, until it is given back; None where the current one is to stay."""
        if self._device.type != "cuda" or torch.cuda.current_stream(self._device) != torch.cuda.default_stream(self._device):
            return None
        with self._lock:
            return self._free.pop() if self._free else torch.cuda.Stream(self._device)

    def give_back(self, stream: "torch.cuda.Stream | None") -> None:
        """The call is over: the next may have its stream."""
        if stream is not None:
            with self._lock:
                self._free.append(stream)

    @staticmethod
    def use(stream: "torch.cuda.Stream | None") -> AbstractContextManager[None]:
        """Inside it, work goes to a call's stream, as in ``one``."""
        return nullcontext() if stream is None else on_stream(stream)

    def hand_over(self, tensor: torch.Tensor) -> torch.Tensor:
        """To be called inside ``one``: the tensor may be read on the default stream after the block, where it is freed, too."""
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.default_stream(tensor.device))
        return tensor
