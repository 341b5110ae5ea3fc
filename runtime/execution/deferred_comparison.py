"""Whether a feature has changed: found out on its device, and read by the host no sooner than it has to."""

import torch
from torch import Tensor

__all__ = ["DeferredComparison"]


class DeferredComparison:
    """Whether ``now`` differs from ``before`` by more than ``above``: the norm of the difference over the norm of ``before``.

    All is computed in float32 at least: in half precision the norm of a large feature would be infinite, and so would the
    difference of two large numbers of opposite signs.

    On a GPU the comparison is only put in the stream here, and its answer copied into pinned memory behind it. What is put in the
    stream afterwards does not wait for the host, and the host waits (in ``bool``) for the answer alone.
    """

    def __init__(self, before: Tensor, now: Tensor, above: float) -> None:
        wide = torch.promote_types(before.dtype, torch.float32)
        answer = _norm(now.to(wide) - before) > above * _norm(before)
        self._event: torch.cuda.Event | None = None
        if answer.is_cuda:
            self._answer = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._answer.copy_(answer, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(answer.device))
        else:
            self._answer = answer

    def __bool__(self) -> bool:
        if self._event is not None:
            self._event.synchronize()
        return bool(self._answer)


def _norm(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
    return norm
