"""A call and its process: it must be the one that loaded the bundle, and its default device and autocast must change nothing."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from engines import EngineError

__all__ = ["check_not_forked", "note_loaded", "plain_settings"]

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


@contextmanager
def plain_settings() -> Iterator[None]:
    """Inside, and on this thread, new tensors are on the CPU where nobody says otherwise, and nothing is rounded on the way.

    Libraries rely on that, as PyTorch has it by itself: tokenizers and schedulers make tensors without naming a device, and
    under autocast schedulers would multiply in half precision. (No such thing is needed for the default dtype: all that is made
    here names its own.)
    """
    own = nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
    with own, torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield
