"""A call and its process: it must be the one that loaded the bundle, and its default device must change nothing."""

import os
from contextlib import AbstractContextManager, nullcontext

import torch

from engines import EngineError

__all__ = ["check_not_forked", "note_loaded", "on_cpu_by_default"]

_loaded_in: list[int] = []
"""Ids of the processes that loaded a bundle, with what a fork brings along from its parent."""


def note_loaded() -> None:
    """A bundle is about to be loaded in this process; raises as ``check_not_forked``."""
    check_not_forked()
    _loaded_in.append(os.getpid())


def check_not_forked() -> None:
    """Refuse to go on in a process that was forked after a bundle was loaded: the engines' threads are not in it.

    Raises:
        EngineError: it was; a call would wait for those threads for ever.
    """
    if _loaded_in and os.getpid() not in _loaded_in:
        raise EngineError(
            f"this process ({os.getpid()}) was forked from one that had loaded a bundle ({_loaded_in[-1]}), and engines do not "
            "work in a fork; load bundles in the worker processes alone, or start them with multiprocessing.get_context('spawn')"
        )


def on_cpu_by_default() -> AbstractContextManager[object]:
    """Inside, and on this thread, new tensors are on the CPU where nobody says otherwise, as PyTorch has it by itself.

    Libraries rely on that: tokenizers and schedulers make tensors without naming a device. (No such thing is needed for the
    default dtype: all that is made here names its own.)
    """
    return nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
