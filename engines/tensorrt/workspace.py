"""The memory that execution contexts work in: one block for all of a stream, as they run one after another.

There are two for each stream that is used: that of the UNet's engines, and that of text encoder and VAE, whose need is greater.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from engines.cuda.graphs import on_stream

__all__ = ["StreamWorkspace", "Workspace"]


class Workspace:
    """One block of device memory for each stream, as large as the greatest need of any engine.

    A block that became too small is freed here; a context that was recorded with it keeps it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._need = 1
        self._blocks: dict[int, torch.Tensor] = {}

    @property
    def need(self) -> int:
        """Bytes."""
        return self._need

    @property
    def missing(self) -> int:
        """Bytes that the first stream still has to take: none once there is a block of the size needed."""
        return 0 if any(block.numel() >= self._need for block in self._blocks.values()) else self._need

    def reserve(self, size: int) -> None:
        """Make blocks of at least this many bytes from now on."""
        self._need = max(self._need, size)

    def block(self, stream: int) -> torch.Tensor:
        """The block of a stream, which must be the current one: only there may it be used."""
        block = self._blocks.get(stream)
        if block is None or block.numel() < self._need:
            block = self._blocks[stream] = torch.empty(self._need, dtype=torch.uint8, device=self._device)
        return block


class StreamWorkspace:
    """Where an engine's runners work, and what they share there.

    Args:
        device: where tensors live; CPU in tests only.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.scratch = Workspace(device)
        self._lock = threading.Lock()
        self._own: torch.cuda.Stream | None = None

    @contextmanager
    def stream(self) -> Iterator[int]:
        """The handle of the stream to launch on, which is the current one inside; never the default stream.

        On the default stream TensorRT waits for the whole device at every launch.
        """
        if self.device.type != "cuda":
            yield 0
            return
        current = torch.cuda.current_stream(self.device)
        if current != torch.cuda.default_stream(self.device):
            yield int(current.cuda_stream)
            return
        with self._lock:
            self._own = self._own or torch.cuda.Stream(self.device)
        with on_stream(self._own):
            yield int(self._own.cuda_stream)

    def mark(self) -> "torch.cuda.Event | None":
        """An event behind all that the current stream has been given; None where work is done at once, or only recorded."""
        if self.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event
