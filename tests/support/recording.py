"""A stand-in for CUDA graphs on the CPU, as strict as they are.

While work is recorded nothing is computed: what was written is spoilt afterwards. A replay does the same operations on the same
memory. All recordings share memory: what nobody but the recording refers to may be another recording's at any time, and is spoilt
before each replay. So is all that was made by later recordings: it may lie where the replayed recording let memory go.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only

from engines.cuda.graphs import Recorder

Outputs = TypeVar("Outputs")

_TAPE: ContextVar[Tape | None] = ContextVar("tape", default=None)


def tape() -> Tape | None:
    """What launches go on while work is recorded; None where they run."""
    return _TAPE.get()


def outside() -> AbstractContextManager[None]:
    """Inside, torch computes even while work is recorded: for what a fake does itself."""
    context: AbstractContextManager[None] = _disable_current_modes()
    return context


class Tape(TorchDispatchMode):
    """Operations and launches, in order, and the memory that they made."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Callable[[], None]] = []
        self._aliases: Counter[int] = Counter()
        self._made: dict[int, tuple[Tensor, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        before = {_storage(tensor) for tensor in _tensors((args, kwargs))}
        args, kwargs = tree_map_only(Tensor, self._alias, (args, kwargs or {}))
        memory = [self._alias(tensor) for tensor in _tensors(result) if _storage(tensor) not in before]
        self._made |= {_storage(tensor): (tensor, tensor.untyped_storage()) for tensor in memory}
        self.launches.append(lambda: _again(func, args, kwargs, memory, before))
        return result

    def _alias(self, tensor: Tensor) -> Tensor:
        """The same memory, and a reference that counts as ours."""
        self._aliases[_storage(tensor)] += 1
        return tensor.detach()

    def spoil(self, everything: bool = False) -> None:
        """Overwrite what was made and let go (or all that was made)."""
        for storage, (_, whole) in self._made.items():
            # Our aliases, and ``whole`` itself.
            if everything or torch._C._storage_Use_Count(whole._cdata) == self._aliases[storage] + 1:
                ctypes.memset(whole.data_ptr(), 0xFF, whole.nbytes())  # a NaN in every floating-point type


def _again(func: Any, args: Any, kwargs: Any, memory: list[Tensor], before: set[int]) -> None:
    result = func(*args, **kwargs)
    found = [tensor for tensor in _tensors(result) if _storage(tensor) not in before]
    for old, new in zip(memory, found, strict=True):
        old.copy_(new)


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class FakeRecorder(Recorder):
    """Records what torch and the fake TensorRT do. ``broken`` is an error to fail with."""

    def __init__(self) -> None:
        self._tapes: weakref.WeakSet[Tape] = weakref.WeakSet()
        self._made: list[weakref.ref[Tape]] = []
        self.inside = False
        self.broken: Exception | None = None
        self.under_way = False
        """Whether a replay may not be done yet: nothing that it reads may go."""
        self.let_go_under_way = 0
        self.recorded = 0
        self.replayed = 0

    @property
    def alive(self) -> int:
        """Recordings that somebody holds."""
        return len(self._tapes)

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        assert not self.inside
        self.inside = True
        try:
            yield
        finally:
            self.inside = False

    def wait(self) -> None:
        self.under_way = False

    def _note_end(self) -> None:
        self.let_go_under_way += self.under_way

    def _later(self, tape: Tape) -> list[Tape]:
        """The recordings that were made after this one."""
        made = [other for other in (reference() for reference in self._made) if other is not None]
        return made[made.index(tape) + 1 :]

    @torch.no_grad()
    def _capture(self, work: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        assert self.inside
        if self.broken:
            raise self.broken
        tape = Tape()
        token = _TAPE.set(tape)
        try:
            with tape:
                outputs = work()
        finally:
            _TAPE.reset(token)
        tape.spoil(everything=True)
        self._tapes.add(tape)
        weakref.finalize(tape, self._note_end)
        self._made.append(weakref.ref(tape))
        self.recorded += 1

        @torch.no_grad()
        def replay() -> None:
            assert self.inside
            for other in self._tapes:
                other.spoil()
            for later in self._later(tape):
                later.spoil(everything=True)
            for launch in tape.launches:
                launch()
            self.under_way = True
            self.replayed += 1

        return replay, outputs
