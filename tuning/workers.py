"""Several training processes as one: the few collectives that training needs, and none of them when it runs alone.

Start with `torchrun --nproc-per-node N -m ...`. On a CPU give each process one thread: two threads of one process in
contention collapsed to a fifteenth of the speed here, two processes keep theirs.
"""

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

__all__ = ["Workers"]


class Workers:
    """This process's place among the workers; reads torchrun's environment."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
        if self.count > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if cuda else "gloo")

    @property
    def first(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def average_gradients(self, parameters: Iterable[nn.Parameter], progress: float) -> float:
        """Averages gradients in place, in one message, and `progress` (so that all use the same); returns the latter."""
        if self.count == 1:
            return progress
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads] + [torch.tensor([progress], device=grads[0].device)])
        dist.all_reduce(flat)
        flat /= self.count
        at = 0
        for grad in grads:
            grad.copy_(flat[at : at + grad.numel()].view_as(grad))
            at += grad.numel()
        return float(flat[-1])

    def wait(self) -> None:
        """Waits for the others."""
        if self.count > 1:
            dist.barrier()

    def close(self) -> None:
        """Leaves the group."""
        if self.count > 1 and dist.is_initialized():
            dist.destroy_process_group()
