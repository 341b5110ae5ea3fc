"""Several training processes as one, through accelerate: devices, mixed precision, and the one collective of a step.

Start with `accelerate launch -m ...` or `torchrun --nproc-per-node N -m ...`. On a CPU give each process one thread: where
other programs run, threads of one process wait for each other far longer than processes do.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tuning.errors import TuningError

__all__ = ["Mixed", "Workers"]

Mixed = Literal["no", "fp16", "bf16"]

# Gradients travel in messages of at most so many numbers: a small UNet's in one, a large one's without a second copy of all.
_MESSAGE = 32_000_000


class Workers:
    """This process's place among the workers, as accelerate reads it from the launcher's environment.

    Raises TuningError when fp16 is asked for where there is no GPU.
    """

    def __init__(self, mixed: Mixed = "no") -> None:
        from accelerate import Accelerator

        cuda = torch.cuda.is_available()
        if mixed == "fp16" and not cuda:
            raise TuningError("mixed precision fp16 needs an NVIDIA GPU and torch sees none; use bf16 or no")
        self._accelerator: Any = Accelerator(cpu=not cuda, mixed_precision=mixed)
        self.rank: int = self._accelerator.process_index
        self.count: int = self._accelerator.num_processes
        self.device: torch.device = self._accelerator.device
        self.mixed = mixed

    @property
    def first(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The scaler that keeps fp16 gradients from vanishing; None in other precisions."""
        scaler: torch.amp.GradScaler | None = self._accelerator.scaler
        return scaler

    def autocast(self) -> AbstractContextManager[None]:
        """Mixed precision, where it was asked for, inside the context."""
        context: AbstractContextManager[None] = self._accelerator.autocast()
        return context

    def backward(self, loss: Tensor) -> None:
        """Adds the loss's gradients, scaled for fp16 where that is needed."""
        self._accelerator.backward(loss)

    def average(self, parameters: Sequence[nn.Parameter], values: Sequence[float] = ()) -> list[float]:
        """Averages gradients in place over the processes, and `values` with them; returns the latter."""
        if self.count == 1:
            return list(values)
        grads = [p.grad for p in parameters if p.grad is not None]
        dtype = grads[0].dtype if grads else torch.float32
        first: list[Tensor] = [torch.tensor(values, dtype=dtype, device=self.device)]
        message, averaged = first, first[0]
        size = 0
        for grad in grads:
            message.append(grad)
            size += grad.numel()
            if size > _MESSAGE:
                self._exchange(message)
                message, size = [], 0
        if message:
            self._exchange(message)
        return [float(value) for value in averaged]

    def _exchange(self, tensors: list[Tensor]) -> None:
        flat: Tensor = self._accelerator.reduce(torch.cat([t.flatten() for t in tensors]), "mean")
        at = 0
        for tensor in tensors:
            tensor.copy_(flat[at : at + tensor.numel()].view_as(tensor))
            at += tensor.numel()

    def wait(self) -> None:
        """Waits for the others."""
        self._accelerator.wait_for_everyone()

    def close(self) -> None:
        """Leaves the group."""
        self._accelerator.end_training()
