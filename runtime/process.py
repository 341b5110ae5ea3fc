"""A call and its process: it must be the one that loaded the bundle, and the process's own settings must change nothing."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from threading import Lock

import torch

from engines import EngineError

__all__ = ["check_not_forked", "note_loaded", "plain_settings"]

_loaded_in: list[int] = []
"""Ids of the processes that loaded a bundle, with what a fork brings along from its parent."""
_lock, _others = Lock(), list[torch.dtype]()
"""The default dtype that the process has of itself, once for each call that runs with single precision in its place."""


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

    Libraries rely on that, as PyTorch has it by itself: tokenizers and schedulers make tensors without naming a device or dtype,
    and under autocast schedulers would multiply in half precision. The default dtype is one for all threads: where it is another,
    it is single precision for all of them until the last call ends.
    """
    own = nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
    with _single_precision(), own, torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


@contextmanager
def _single_precision() -> Iterator[None]:
    """Inside, the default dtype is float32; the last of the calls that run at once puts back what the first one found."""
    with _lock:
        if changed := bool(_others) or torch.get_default_dtype() != torch.float32:
            _others.append(_others[0] if _others else torch.get_default_dtype())
            torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        if changed:
            with _lock:
                before = _others.pop()
                if not _others:
                    torch.set_default_dtype(before)
