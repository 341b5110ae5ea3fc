"""What TensorRT's contexts share and keep: scratch memory, recordings, and the kernels that TensorRT-RTX compiles on the card."""

import gc
import weakref
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from engines import EngineError
from engines.cuda.graphs import CannotRecord, current_recording
from engines.tensorrt.engine import TensorRTRTX
from engines.tensorrt.workspace import StreamWorkspace
from tests.engines.conftest import random_inputs, write_bundle
from tests.support.fake_tensorrt import FakeCache
from tests.support.recording import FakeRecorder


def contexts_of(fake):
    return [context for engine in fake.engines for context in engine.contexts]


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.fixture
def recorder():
    return FakeRecorder()


def test_all_contexts_of_a_stream_work_in_one_block_of_the_largest_need(load, fake, tiny, monkeypatch):
    fake.files[b"back"] = replace(fake.files[b"back"], memory=65536)
    front, back = load("front"), load("back")
    features = tiny.reference(random_inputs(1, 8, 8))
    for stream in (5, 6):
        monkeypatch.setattr(StreamWorkspace, "stream", lambda self, stream=stream: nullcontext(stream))
        front.run(features)
        back.run(features)
    memory = [context.memory for context in contexts_of(fake)]
    assert {size for _, size in memory} == {65536}
    assert [address for address, _ in memory] == [memory[0][0], memory[1][0]] * 2
    assert memory[0] != memory[1], "two streams may run at once"


def test_an_engine_with_greater_need_makes_the_block_grow(load, fake, tiny):
    features = tiny.reference(random_inputs(1, 8, 8))
    front = load("front")
    front.run(features)
    fake.files[b"back"] = replace(fake.files[b"back"], memory=65536)
    load("back").run(features)
    front.run(features)
    assert {context.memory[1] for context in contexts_of(fake)} == {65536}
    assert len({context.memory[0] for context in contexts_of(fake)}) == 1


def test_the_unet_has_a_block_of_its_own(kind, fake, bundle, tiny, device_memory):
    """The VAE's, which is larger, is not held for each of the streams that the UNet runs on."""
    fake.files[b"back"] = replace(fake.files[b"back"], memory=65536)
    whole = write_bundle(bundle.folder, bundle.manifest.segments, {"noise": "vae_decoder"})
    engine, features = kind(fake, torch.device("cpu")), tiny.reference(random_inputs(1, 8, 8))
    for segment in whole.manifest.segments:
        engine.load(whole, segment).run(features)
    assert [context.memory[1] for context in contexts_of(fake)] == [4096, 65536]


def test_a_recording_reads_and_writes_the_same_memory_again(load, fake, tiny, recorder):
    front, back = load("front"), load("back")
    inputs = random_inputs(2, 16, 16)

    def work():
        made = front.run(inputs)
        return {**made, **back.run({**inputs, **made})}

    with recorder.on_stream():
        recording = recorder.record(work)
        for seed in range(3):
            fresh = random_inputs(2, 16, 16, seed)
            for name, tensor in inputs.items():
                tensor.copy_(fresh[name])
            recording.replay()
            for name, tensor in recording.outputs.items():
                close(tensor, tiny.reference(fresh)[name])
    assert current_recording() is None


def test_each_recording_has_contexts_of_its_own_which_die_with_it(load, fake, tiny, recorder):
    front = load("front")
    small, large = random_inputs(1, 8, 8), random_inputs(2, 16, 16)
    front.run(small)
    with recorder.on_stream():
        recordings = [recorder.record(lambda inputs=inputs: front.run(inputs)) for inputs in (small, large)]
    (engine,) = fake.engines
    assert [context.recorded for context in engine.contexts] == [False, True, True]
    close(front.run(large)["down.0.sampler"], tiny.reference(large)["down.0.sampler"])
    assert len(engine.contexts) == 3
    alive = [weakref.ref(context) for context in engine.contexts]
    engine.contexts.clear()
    recordings.pop()
    gc.collect()
    assert [context() is not None for context in alive] == [True, True, False]


def test_a_recording_keeps_the_block_that_it_works_in(load, fake, tiny, recorder):
    features = tiny.reference(random_inputs(1, 8, 8))
    front = load("front")
    with recorder.on_stream():
        recording = recorder.record(lambda: front.run(features))
    block = weakref.ref(next(iter(front._workspace.scratch._blocks.values())))
    fake.files[b"back"] = replace(fake.files[b"back"], memory=65536)
    load("back").run(features)
    front.run(features)
    fake.engines[0].contexts.clear()
    gc.collect()
    assert block() is not None, "the graph has its address"
    with recorder.on_stream():
        recording.replay()
    close(recording.outputs["down.0.sampler"], features["down.0.sampler"])
    del recording
    gc.collect()
    assert block() is None


def test_what_the_engine_cannot_run_in_a_graph_is_not_recorded(load, fake, tiny, recorder, kind):
    fake.files[b"front"] = replace(fake.files[b"front"], capturable=False)
    front, inputs = load("front"), random_inputs(1, 8, 8)
    with (
        recorder.on_stream(),
        pytest.raises(CannotRecord, match=rf"segment front: {kind.name} cannot run it inside a CUDA graph"),
    ):
        recorder.record(lambda: front.run(inputs))
    close(front.run(inputs)["down.0.sampler"], tiny.reference(inputs)["down.0.sampler"])


def test_a_refusal_while_recording_is_no_users_mistake(load, fake, recorder):
    front, small, large = load("front"), random_inputs(1, 8, 8), random_inputs(2, 16, 16)
    turns = iter([small, large])
    with recorder.on_stream(), pytest.raises(CannotRecord, match="a shape is set while a graph is recorded"):
        recorder.record(lambda: front.run(next(turns)))
    assert current_recording() is None


def test_a_mistake_before_recording_stays_one(load, recorder):
    front, inputs = load("front"), random_inputs(5, 8, 8)
    with recorder.on_stream(), pytest.raises(EngineError, match="its engine was built for 1x4x8x8 to 4x4x32x32"):
        recorder.record(lambda: front.run(inputs))


@pytest.fixture
def user_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("UNET_HEIRLOOM_CACHE", str(tmp_path / "user"))
    return tmp_path / "user"


@pytest.fixture
def start(fake, bundle, device_memory):
    """A new start of TensorRT-RTX on the bundle: runs its front with the shapes given; the kernels that were compiled."""

    def run(*shapes):
        engine = TensorRTRTX(fake, torch.device("cpu"))
        runner = engine.load(bundle, bundle.manifest.segment("front"))
        fake.compiled.clear()
        for shape in shapes:
            runner.run(random_inputs(*shape))
        engine.flush()
        return len(fake.compiled)

    return run


rtx = pytest.mark.parametrize("kind", [TensorRTRTX], indirect=False)


@rtx
def test_the_second_start_compiles_nothing(start, bundle, user_caches):
    assert start((1, 8, 8), (2, 16, 16), (1, 8, 8)) == 2
    (file,) = (bundle.folder / "cache").iterdir()
    assert file.name == "tensorrt-rtx-11.0.0-cpu.bin"
    assert start((1, 8, 8), (2, 16, 16)) == 0
    assert start((1, 8, 8), (4, 8, 8)) == 1
    assert start((4, 8, 8)) == 0
    assert not user_caches.exists()


@rtx
def test_recordings_compile_once_too(fake, load, bundle, user_caches, recorder):
    runner = load("front")
    inputs = random_inputs(1, 8, 8)
    with recorder.on_stream():
        kept = [recorder.record(lambda: runner.run(inputs)) for _ in range(2)]
    assert len(fake.compiled) == 1
    del kept


@rtx
def test_kernels_are_kept_once_for_all_contexts(fake, bundle, device_memory, user_caches, recorder, monkeypatch):
    """What one context has compiled, others find; and to write it down takes time, so that it is done at the end of a call."""
    written, serialize = [], FakeCache.serialize

    def counted(cache):
        written.append(cache)
        return serialize(cache)

    monkeypatch.setattr(FakeCache, "serialize", counted)
    engine = TensorRTRTX(fake, torch.device("cpu"))
    runner, small, large = engine.load(bundle, bundle.manifest.segment("front")), random_inputs(1, 8, 8), random_inputs(2, 16, 16)
    for inputs in (small, small, large, small):
        runner.run(inputs)
    with recorder.on_stream():
        kept = [recorder.record(lambda inputs=inputs: runner.run(inputs)) for inputs in (small, large)]
    assert written == []
    for _ in range(3):
        engine.flush()
    assert len(written) == 1
    assert len(fake.engines[0].contexts) == 1 + len(kept)


def test_a_context_is_told_a_shape_only_when_it_is_another(load, fake):
    runner, small, large = load("front"), random_inputs(1, 8, 8), random_inputs(2, 16, 16)
    for inputs in (small, small, large, large, small):
        runner.run(inputs)
    (context,) = fake.engines[0].contexts
    assert context.shapings == 3 * len(context.shapes)


def test_configuration_and_cache_go_after_their_contexts(load, fake, recorder):
    """NVIDIA: the process ends where the cache goes first."""
    runner, inputs = load("front"), random_inputs(1, 8, 8)
    runner.run(inputs)
    with recorder.on_stream():
        recording = recorder.record(partial(runner.run, inputs))
    contexts = [weakref.ref(context) for context in fake.engines[0].contexts]
    gc.collect()
    assert fake.segfaults == []
    fake.engines[0].contexts.clear()
    del recording, runner
    gc.collect()
    assert [context() for context in contexts] == [None, None]
    assert fake.segfaults == []


@rtx
@pytest.mark.parametrize("content", [b"", b"?" * 100, b'["sm120", "some kernel"]'])
def test_a_cache_that_does_not_fit_is_replaced_with_a_note(start, bundle, user_caches, content):
    start((1, 8, 8))
    (file,) = (bundle.folder / "cache").iterdir()
    file.write_bytes(content)
    with pytest.warns(UserWarning, match=r"tensorrt-rtx-11.0.0-cpu.bin is damaged or of another driver; kernels are compiled ag"):
        assert start((1, 8, 8)) == 1
    assert start((1, 8, 8)) == 0


@rtx
def test_where_the_bundle_cannot_be_written_the_cache_goes_to_the_users(start, bundle, user_caches):
    (bundle.folder / "cache").write_text("no folder")
    assert start((1, 8, 8)) == 1
    assert (user_caches / ("0" * 16) / "tensorrt-rtx-11.0.0-cpu.bin").is_file()
    assert start((1, 8, 8)) == 0


@rtx
def test_where_nothing_can_be_written_it_runs_all_the_same(start, bundle, monkeypatch, tmp_path):
    monkeypatch.setenv("UNET_HEIRLOOM_CACHE", "/dev/null/none")
    (bundle.folder / "cache").write_text("no folder")
    assert start((1, 8, 8)) == 1
    assert start((1, 8, 8)) == 1
    assert not [path for path in Path(bundle.folder).iterdir() if path.name.startswith(".")]
