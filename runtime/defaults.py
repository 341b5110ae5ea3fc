"""The process's own settings must change nothing: a default device that a user has set is put aside for the length of a call."""

from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["on_cpu_by_default"]


def on_cpu_by_default() -> AbstractContextManager[object]:
    """Inside, and on this thread, new tensors are on the CPU where nobody says otherwise, as PyTorch has it by itself.

    Libraries rely on that: tokenizers and schedulers make tensors without naming a device. (No such thing is needed for the
    default dtype: all that is made here names its own.)
    """
    return nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
