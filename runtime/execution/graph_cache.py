"""Each kind of step recorded once on the GPU and replayed: what is left of a step on the host is a copy of its inputs.

A recording belongs to the UNet, the segments that run, what is wanted of them, the shapes of the step's own inputs and the
addresses of inherited features. It ends with a copy of the features that it made to memory of their own, where they stay: an
inherit step's recording reads them there. All else is memory that the recordings share.
"""

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from engines.bundle.manifest import Segment
from engines.bundle.names import NOISE, SAMPLE, TEXT, TIMESTEP
from engines.cuda.graphs import CannotRecord, Recorder, Recording
from engines.errors import EngineMemoryError
from runtime.execution.loaded_bundle import LoadedBundle
from runtime.plans.subgraph import Subgraph, read_by

__all__ = ["LIMIT", "CudaGraphCache", "GraphedNetwork"]

_OWN = frozenset({SAMPLE, TIMESTEP, TEXT})
"""The inputs that come anew with every step, and are copied to where its recording reads them."""
LIMIT = 32
_LIMIT_BYTES = 2**30

Features = dict[str, Tensor]


@dataclass(frozen=True)
class _Graph:
    """A recording, and all that it reads: for that memory must not be given to others while it may be replayed.

    ``size`` counts the bytes of its own: the inputs that are copied for it and the features that it made.
    """

    recording: Recording[Features]
    inputs: Features
    size: int


class CudaGraphCache:
    """The recordings of a pipeline's UNets. They write to the same memory in every call, so one call has them at a time.

    Args:
        recorder: what makes them.
        limit: how many are kept; the one that was not replayed for longest goes first.
        limit_bytes: how much memory of their own they have together; what they share is as much as one needs. The last one stays,
            whatever it has.
    """

    def __init__(self, recorder: Recorder, limit: int = LIMIT, limit_bytes: int = _LIMIT_BYTES) -> None:
        self._recorder, self._limit, self._limit_bytes = recorder, limit, limit_bytes
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._taken = threading.Lock()
        self._given_up = False
        self._pausing = False

    def take(self) -> bool:
        """Have the graphs for one call, until ``release``; False where another call has them or nothing can be recorded."""
        return not self._given_up and self._taken.acquire(blocking=False)

    def release(self) -> None:
        """Let the next call have them, once the device has done what this one has been given."""
        self._pausing = False
        try:
            self._recorder.hand_over()
        finally:
            self._taken.release()

    def __del__(self) -> None:
        with suppress(Exception):  # at the end of the process the device may be gone
            self._recorder.wait()

    def clear(self) -> None:
        """Let go all recordings, as when the engines that they refer to are about to go; nobody may be in a step."""
        self._recorder.wait()  # a replay under way reads and writes what goes now
        self._graphs.clear()
        self._recorder.forget()

    def of(self, unet: str, network: LoadedBundle) -> "GraphedNetwork":
        """Return a network that runs through these graphs, for the call that holds them."""
        return GraphedNetwork(unet, network, self)

    def run(
        self,
        kind: Hashable,
        inputs: Mapping[str, Tensor],
        work: Callable[[Mapping[str, Tensor]], Features],
        transient: frozenset[str] = frozenset(),
        elsewhere: frozenset[str] = frozenset(),
    ) -> Features:
        """``work`` on the inputs, replayed from the second time on.

        Args:
            kind: tells apart all that is done here to inputs of the same names, shapes and addresses.
            inputs: by name; those that are not a step's own must be outputs of earlier recordings, or be named in ``elsewhere``.
            work: makes the outputs from the inputs; all that it reads must be among them.
            transient: the outputs with which the caller is done before anything else is replayed.
            elsewhere: the inputs that lie elsewhere every time, and are copied like a step's own.

        Returns:
            The outputs. Work of the same kind overwrites their memory when it is done again. Any replay may overwrite the memory
            of those in ``transient``.
        """
        if self._given_up or self._pausing:
            return work(inputs)
        try:
            with self._recorder.on_stream():
                graph = self._find(kind, inputs, work, transient, _OWN | elsewhere)
                _fill(graph.inputs, inputs, _OWN | elsewhere)
                graph.recording.replay()
                return graph.recording.outputs
        except (torch.OutOfMemoryError, EngineMemoryError) as error:
            self._pausing = True  # as long as this call has them: another may need less
            self._let_go(error)
        except CannotRecord as error:
            self._given_up = True
            self._let_go(error)
        return work(inputs)

    def _find(
        self,
        kind: Hashable,
        inputs: Mapping[str, Tensor],
        work: Callable[[Mapping[str, Tensor]], Features],
        transient: frozenset[str],
        copied: frozenset[str],
    ) -> _Graph:
        key = kind, tuple((name, None if name in copied else x.data_ptr(), x.shape, x.dtype) for name, x in inputs.items())
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key]
        memory = {name: torch.empty(x.shape, dtype=x.dtype, device=x.device) for name, x in inputs.items() if name in copied}
        fixed = {name: memory.get(name, x) for name, x in inputs.items()}
        _fill(fixed, inputs, copied)
        lasting: Features = {}
        recording = self._recorder.record(lambda: _outlasting(work(fixed), lasting, transient))
        graph = _Graph(recording, fixed, sum(tensor.nbytes for tensor in (*memory.values(), *lasting.values())))
        self._graphs[key] = graph
        self._make_room()
        return graph

    def _make_room(self) -> None:
        """Never before there is another: the pool of memory is theirs together."""
        while len(self._graphs) > 1 and (
            len(self._graphs) > self._limit or sum(graph.size for graph in self._graphs.values()) > self._limit_bytes
        ):
            self._recorder.wait()
            self._graphs.popitem(last=False)

    def _let_go(self, error: Exception) -> None:
        self.clear()
        reason = " ".join(str(error).split())
        warnings.warn(f"steps run segment by segment, not as CUDA graphs, which costs time: {reason}", stacklevel=2)


@dataclass(frozen=True)
class GraphedNetwork:
    """Does what a ``LoadedBundle`` does, by replaying. Only what ``run`` returns as the noise prediction stays as it is."""

    unet: str
    network: LoadedBundle
    graphs: CudaGraphCache

    def run(
        self,
        subgraph: Subgraph,
        given: Mapping[str, Tensor],
        made: Features | None = None,
        elsewhere: frozenset[str] = frozenset(),
    ) -> Features:
        """As ``LoadedBundle.run``."""
        made = {} if made is None else made
        if not subgraph.segments and not made:  # all is inherited
            return self.network.run(subgraph, given)
        inputs = {name: given[name] if name in given else made[name] for name in subgraph.inputs}
        kind = self.unet, subgraph.segment_names, subgraph.wanted
        transient = frozenset({NOISE})
        result = self.graphs.run(kind, inputs, lambda fixed: self.network.run(subgraph, fixed, dict(made)), transient, elsewhere)
        # Before the next replay; and a scheduler may hold on to predictions.
        return result | {NOISE: result[NOISE].clone()} if NOISE in result else result

    def run_all(
        self,
        segments: Iterable[Segment],
        given: Mapping[str, Tensor],
        made: Features,
        elsewhere: frozenset[str] = frozenset(),
    ) -> None:
        """As ``LoadedBundle.run_all``."""
        segments = tuple(segments)

        def work(fixed: Mapping[str, Tensor]) -> Features:
            outputs: Features = {}
            self.network.run_all(segments, fixed, outputs)
            return outputs

        if segments:
            inputs = {name: given[name] if name in given else made[name] for name in read_by(segments, given)}
            kind = self.unet, tuple(segment.name for segment in segments)
            made.update(self.graphs.run(kind, inputs, work, elsewhere=elsewhere))


def _fill(fixed: Mapping[str, Tensor], inputs: Mapping[str, Tensor], copied: frozenset[str]) -> None:
    for name in copied.intersection(fixed):
        fixed[name].copy_(inputs[name])


def _outlasting(outputs: Features, lasting: Features, transient: frozenset[str]) -> Features:
    """Outputs that are not ``transient`` are copied to ``lasting``, which gets memory for them where it has none yet."""
    for name, x in outputs.items():
        if name not in transient:
            if name not in lasting:
                lasting[name] = torch.empty_like(x)
            lasting[name].copy_(x)
    return outputs | lasting
