"""Streams for calls, and captures: with stand-ins for CUDA's streams and graphs."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engines.cuda.graphs import CannotRecord, CudaRecorder
from engines.cuda.streams import CallStreams
from engines.ort.engine import _BoundRunner
from runtime.execution.graph_cache import CudaGraphCache
from tests.engines.conftest import FEATURES, SEGMENTS, random_inputs

CUDA = torch.device("cuda")


class FakeStream:
    """Knows what it waited for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.waited: list[FakeStream] = []

    def wait_stream(self, other: FakeStream) -> None:
        self.waited.append(other)

    def synchronize(self) -> None: ...


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """CUDA as far as streams go: ``default`` and ``current``."""
    default = FakeStream(CUDA)
    state = SimpleNamespace(default=default, current=default)

    @contextmanager
    def use(stream: FakeStream) -> Iterator[None]:
        before, state.current = state.current, stream
        try:
            yield
        finally:
            state.current = before

    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", use)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(state, "current", stream))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: state.current)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: default)
    return state


def test_calls_at_once_have_streams_of_their_own_and_the_next_takes_one_of_them(streams: SimpleNamespace) -> None:
    pool = CallStreams(CUDA)
    with pool.one():
        first = streams.current
        streams.current = streams.default  # another thread's
        with pool.one():
            second = streams.current
        streams.current = first
    assert len({id(stream) for stream in (first, second, streams.default)}) == 3
    with pool.one():
        assert streams.current in (first, second)
    assert first.waited[0] is streams.default
    assert first in streams.default.waited
    assert streams.current is streams.default


def test_a_stream_that_the_caller_chose_stays(streams: SimpleNamespace) -> None:
    streams.current = chosen = FakeStream(CUDA)
    with CallStreams(CUDA).one():
        assert streams.current is chosen


def test_a_call_in_pieces_keeps_its_stream(streams: SimpleNamespace) -> None:
    pool = CallStreams(CUDA)
    mine, other = pool.take(), pool.take()
    assert len({id(stream) for stream in (mine, other, streams.default)}) == 3
    for _ in range(2):
        with pool.use(mine):
            assert streams.current is mine
        assert streams.current is streams.default
    pool.give_back(mine)
    assert pool.take() is mine
    streams.current = FakeStream(CUDA)
    assert pool.take() is None, "the caller has chosen"


def test_without_cuda_there_are_none() -> None:
    pool, x = CallStreams(torch.device("cpu")), torch.zeros(1)
    with pool.one():
        assert pool.hand_over(x) is x


class FailingCapture:
    """As PyTorch's own: where a capture fails, its stream stays the current one."""

    def __init__(self, streams: SimpleNamespace, **given: Any) -> None:
        self.streams, self.stream = streams, FakeStream(CUDA)

    def __enter__(self) -> None:
        self.streams.current = self.stream

    def __exit__(self, *given: object) -> None:
        raise RuntimeError("operation would make the legacy stream depend on a capturing blocking stream")


def test_a_capture_that_fails_restores_the_stream_and_collection(
    streams: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=None))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **given: FailingCapture(streams, **given))
    recorder, collects = CudaRecorder(CUDA), []
    with recorder.on_stream():
        own = streams.current
        with pytest.raises(CannotRecord, match="legacy stream"):
            recorder.record(lambda: collects.append(gc.isenabled()))
        assert streams.current is own
    assert streams.current is streams.default
    assert collects == [True, False], "done once, then recorded"
    assert gc.isenabled()


def test_all_recordings_share_one_pool_of_memory(streams: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their need is then that of the largest, and not the sum. Whose graphs are all gone is not taken into use again."""
    handles, pools = iter([(0, 1), (0, 2)]), []

    def graph(_: object, pool: object, **given: object) -> AbstractContextManager[None]:
        pools.append(pool)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=None))
    monkeypatch.setattr(torch.cuda, "graph", graph)
    recorder = CudaRecorder(CUDA)
    with recorder.on_stream():
        recorder.record(lambda: None)
        recorder.record(lambda: None)
        recorder.forget()
        recorder.record(lambda: None)
    assert pools == [(0, 1), (0, 1), (0, 2)]


class Work(TorchDispatchMode):
    """Notes on which stream PyTorch made memory, and a session ran."""

    def __init__(self, streams: SimpleNamespace) -> None:
        super().__init__()
        self.streams, self.made, self.ran = streams, list[FakeStream](), list[FakeStream]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.made.append(self.streams.current)
        return func(*args, **(kwargs or {}))

    def session(self) -> SimpleNamespace:
        """One of ONNX Runtime's, with the front's inputs, that computes nothing."""
        names = [SimpleNamespace(name=name) for name in SEGMENTS[0].inputs]
        binding = SimpleNamespace(bind_input=lambda *given: None, bind_output=lambda *given: None)
        return SimpleNamespace(
            get_inputs=lambda: names,
            io_binding=lambda: binding,
            run_with_iobinding=lambda *given: self.ran.append(self.streams.current),
        )


def test_onnxruntimes_outputs_belong_to_the_stream_of_the_call(streams: SimpleNamespace) -> None:
    """Of the stream that all calls share, PyTorch would give what one has let go to the next before it was read."""
    shared: Any = FakeStream(CUDA)
    work, inputs = Work(streams), random_inputs(1, 8, 16)
    inputs["sample"] = inputs["sample"].transpose(2, 3)  # has to be copied
    runner = _BoundRunner(SEGMENTS[0], FEATURES, work.session(), torch.device("cpu"), None, shared, threading.Lock())
    with CallStreams(CUDA).one():
        call = streams.current
        with work:
            outputs = runner.run(inputs)
    assert outputs.keys() == set(SEGMENTS[0].outputs)
    assert set(map(id, work.made)) == {id(call)}
    assert work.ran == [shared]
    assert (shared.waited, call.waited) == ([call], [streams.default, shared])


def test_the_next_call_replays_after_what_the_last_one_still_reads(
    streams: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call copies its prediction on its own stream, after the replay, and hands the graphs over when that is only queued."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    recorder = CudaRecorder(CUDA)
    graphs, pool = CudaGraphCache(recorder), CallStreams(CUDA)
    with pool.one():
        call = streams.current
        assert graphs.take()
        with recorder.on_stream():
            own = streams.current
        assert own.waited == [call]
    graphs.release()  # wherever that is: a call that was dropped is let go by whoever collects it
    assert own.waited == [call, call]
    assert graphs.take()
