"""The TensorRT runner against a fake that reads and writes memory by address: a wrong one shows as a wrong number."""

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch

from engines import EngineError, NeedsBuildError
from engines.cuda.graphs import CannotRecord
from engines.errors import EngineMemoryError
from engines.tensorrt.engine import TensorRT, TensorRTRTX
from engines.tensorrt.runner import EngineRunner
from engines.tensorrt.workspace import StreamWorkspace
from tests.engines.conftest import random_inputs, write_bundle
from tests.support.device_memory import ALIGNMENT, aligned, on_device
from tests.support.fake_tensorrt import DataType, EngineInvalidityDiagnostics
from tests.support.recording import FakeRecorder


def close(found, expected):
    """The fake computes with the very modules of the reference: nothing but the last bit may differ."""
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("batch", "height", "width"), [(2, 16, 16), (1, 8, 32), (4, 32, 8)])
def test_the_chain_agrees_with_the_live_modules(load, tiny, batch, height, width):
    front, back = load("front"), load("back")
    for seed in range(3):
        inputs = random_inputs(batch, height, width, seed)
        features = {**inputs, **front.run(inputs)}
        features.update(back.run(features))
        for name, expected in tiny.reference(inputs).items():
            close(features[name], expected)


def test_shapes_may_change_from_run_to_run_and_earlier_outputs_stay(load, tiny):
    runner = load("front")
    inputs = [random_inputs(batch, side, 8, batch) for batch, side in ((1, 8), (4, 32), (2, 16), (1, 8))]
    outputs = [runner.run(one) for one in inputs]
    for one, found in zip(inputs, outputs, strict=True):
        close(found["down.0.sampler"], tiny.reference(one)["down.0.sampler"])


def test_views_are_read_as_what_they_show(load, tiny):
    whole = {name: on_device(tensor) for name, tensor in random_inputs(4, 16, 16).items()}
    # One is not contiguous; the other is, but starts 8 bytes into an allocation.
    inputs = {"sample": whole["sample"].transpose(2, 3)[1:2], "timestep": whole["timestep"][1:2], "text": whole["text"][:1]}
    assert not inputs["sample"].is_contiguous()
    assert inputs["timestep"].is_contiguous()
    assert inputs["timestep"].data_ptr() % ALIGNMENT
    found = load("front").run(inputs)
    close(found["down.0.resnet"], tiny.reference(inputs)["down.0.resnet"])


def test_features_lie_as_the_engines_have_them(load, fake, tiny):
    """Channels last between two engines, without a copy in between."""
    for name, program in fake.files.items():
        fake.files[name] = replace(program, channels_last=frozenset({"down.0.sampler", "down.0.resnet"}))
    front, back = load("front"), load("back")
    inputs = random_inputs(2, 16, 8)
    made = front.run(inputs)
    lie = {name: tensor.is_contiguous(memory_format=torch.channels_last) for name, tensor in made.items() if tensor.ndim == 4}
    assert lie
    assert all(lie.values())
    assert all(back._addressable(made[name], torch.channels_last) is made[name] for name in lie)
    features = {**inputs, **made, **back.run({**inputs, **made})}
    for name, expected in tiny.reference(inputs).items():
        close(features[name], expected)
    plain = {name: tensor.contiguous() for name, tensor in made.items()}
    close(back.run({**inputs, **plain}), back.run({**inputs, **made}))


def test_what_needs_no_copy_is_not_copied(load):
    runner = load("front")
    tensor = on_device(torch.zeros(1, 4, 8, 8))
    assert runner._addressable(tensor) is tensor


def test_one_context_serves_one_stream(load, fake, monkeypatch, kind):
    stream = [5]
    monkeypatch.setattr(StreamWorkspace, "stream", lambda self: nullcontext(stream[0]))
    runner = load("front")
    runner.run(random_inputs(1, 8, 8))
    runner.run(random_inputs(2, 8, 8))
    stream[0] = 6
    runner.run(random_inputs(1, 8, 8))
    (engine,) = fake.engines
    assert [context.launches for context in engine.contexts] == [[5, 5], [6]]
    for context in engine.contexts:
        if kind is TensorRT:
            assert context.config == "user managed"
        else:
            assert context.config.cuda_graph_strategy == "disabled"
            assert context.config.dynamic_shapes_kernel_specialization_strategy == "eager"


@pytest.mark.parametrize("streams", ["one", "one each"])
def test_threads_may_share_a_runner(load, fake, tiny, monkeypatch, streams):
    if streams == "one each":
        monkeypatch.setattr(StreamWorkspace, "stream", lambda self: nullcontext(threading.get_ident()))
    runner = load("front")
    inputs = [random_inputs(1 + seed % 3, 8, 8 * (1 + seed % 2), seed) for seed in range(60)]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(runner.run, inputs))
    if streams == "one":
        assert len(fake.engines[0].contexts) == 1
    for one, outputs in zip(inputs, found, strict=True):
        close(outputs["down.0.sampler"], tiny.reference(one)["down.0.sampler"])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((5, 8, 8), "input sample is 5x4x8x8, its engine was built for 1x4x8x8 to 4x4x32x32; choose a size and batch"),
        ((1, 8, 40), "input sample is 1x4x8x40, .* or build it with other --sizes and --batch"),
        ((1, 4, 8), "input sample is 1x4x4x8, "),
    ],
)
def test_sizes_outside_the_profile_are_refused_with_the_profile(load, fake, sizes, message):
    runner = load("front")
    with pytest.raises(EngineError, match=message):
        runner.run(random_inputs(*sizes))
    assert fake.engines[0].contexts == []


def test_a_static_engine_names_its_one_shape(load, fake):
    program, shapes = fake.files[b"front"], {"sample": (2, 4, 8, 8), "timestep": (2,)}
    fake.files[b"front"] = replace(program, limits={name: (shape, shape) for name, shape in shapes.items()})
    runner = load("front")
    assert runner.run(random_inputs(2, 8, 8))
    with pytest.raises(EngineError, match=r"input sample is 1x4x8x8, its engine was built for 2x4x8x8 only; choose a size"):
        runner.run(random_inputs(1, 8, 8))


def test_refusals_of_the_engine_carry_its_reason(load, fake, kind):
    runner = load("front")
    inputs = random_inputs(1, 8, 8)
    fake.engines[0].memory_left = False
    with pytest.raises(
        EngineMemoryError, match=rf"{kind.name} refused the making of an execution context: out of memory; free memory of the GPU"
    ):
        runner.run(inputs)
    fake.engines[0].memory_left = True
    runner.run(inputs)
    fake.engines[0].contexts[0].fails = True
    with pytest.raises(EngineError, match=r"refused the launch: the launch failed"):
        runner.run(inputs)
    fake.engines[0].contexts[0].fails = False
    runner.run(inputs)


def test_an_address_that_the_engine_refuses_is_named(load, monkeypatch):
    monkeypatch.setattr(EngineRunner, "ALIGNMENT", 1)
    whole = {name: on_device(tensor) for name, tensor in random_inputs(2, 8, 8).items()}
    with pytest.raises(EngineError, match=r"refused the address of timestep: timestep: address \d+ is not aligned"):
        load("front").run({name: tensor[1:] for name, tensor in whole.items()})


def test_the_hosts_memory_is_refused(load, fake, monkeypatch):
    """What is made without a word of the device lies where no GPU can read or write."""
    runner, inputs = load("front"), random_inputs(1, 8, 8)
    runner.run(inputs)
    (context,) = fake.engines[0].contexts
    scratch = aligned((4096,), torch.uint8)
    with pytest.raises(AssertionError, match="the host's memory"):
        context.set_device_memory(scratch.data_ptr(), scratch.nbytes)
    monkeypatch.setattr(torch, "empty", lambda shape, dtype, **options: aligned(shape, dtype))
    with pytest.raises(EngineError, match=r"refused the address of down.0.resnet: .* is not the device's"):
        runner.run(inputs)


@pytest.mark.parametrize("recorded", [False, True])
def test_a_runner_that_is_dropped_waits_for_its_launches(load, fake, monkeypatch, recorded):
    """A context must not go while the GPU runs what it has launched; a capture that fails drops one, too."""
    fake.watch_flights(monkeypatch)
    runner, inputs, recorder = load("front"), random_inputs(1, 8, 8), FakeRecorder()
    if recorded:
        recorder.broken = RuntimeError("operation not permitted")
        with recorder.on_stream(), pytest.raises(CannotRecord):
            recorder.record(partial(runner.run, inputs))
        recorder.broken = None  # it knows the frames that it went through
    else:
        runner.run(inputs)
        runner.run(inputs)
    assert fake.compiled, "it was launched"
    assert len(fake.flights) == (0 if recorded else 2)
    context = weakref.ref(next(iter(runner._contexts.values())).handle) if runner._contexts else None
    del runner
    gc.collect()
    assert context is None or context() is None
    assert fake.flights == set()
    assert fake.segfaults == []


def test_a_bundle_of_another_card_is_refused_and_can_be_built_again(load, fake, kind, bundle):
    fake.card = "sm120"
    with pytest.raises(NeedsBuildError) as caught:
        load("front")
    message = f"segment front: {kind.name} 11.0.0 cannot load {bundle.folder / 'front.engine'} here: unsupported cc; "
    assert str(caught.value) == f"{message}it was built by 10.9 for sm86"
    assert not caught.value.up_to_date


@pytest.mark.parametrize(
    ("trouble", "advice"),
    [
        (EngineInvalidityDiagnostics.OLD_CUDA_DRIVER, "update the NVIDIA driver"),
        (EngineInvalidityDiagnostics.OLD_CUDA_RUNTIME, "install newer CUDA libraries: pip install --upgrade tensorrt-rtx"),
        (EngineInvalidityDiagnostics.INSUFFICIENT_GPU_MEMORY, "free memory of the GPU, or build for smaller --sizes and --batch"),
        (EngineInvalidityDiagnostics.CUDA_ERROR, "see that nvidia-smi works here, and install or update the NVIDIA driver"),
    ],
)
def test_what_another_engine_would_not_mend(load, fake, trouble, advice):
    fake.trouble = int(trouble)
    with pytest.raises(EngineError) as caught:
        load("front")
    reason = trouble.name.replace("_", " ").lower()
    assert str(caught.value).endswith(f"front.engine here: {reason}; it was built by 10.9 for sm86; {advice}")
    assert isinstance(caught.value, EngineMemoryError) == (trouble.name == "INSUFFICIENT_GPU_MEMORY")


def test_an_engine_that_a_build_would_keep(fake, bundle, kind, card):
    """Of this version and for this card: its key would be the same, so the command alone would do nothing."""
    card("A card", (8, 6))
    engine, segment = kind(fake), bundle.manifest.segment("front")
    targets = engine.check_targets([])
    made = segment.engines[kind.name].model_copy(update={"version": "11.0.0", "targets": targets})
    segment, fake.card = segment.model_copy(update={"engines": {kind.name: made}}), "sm86"
    with pytest.raises(NeedsBuildError) as caught:
        engine.load(bundle, segment)
    assert caught.value.up_to_date


@pytest.mark.parametrize("kind", [TensorRT], indirect=True)
def test_tensorrt_takes_an_engine_of_another_model_for_another_one(fake, bundle, kind, card):
    """The library itself would only warn of one of the same compute capability."""
    segment = bundle.manifest.segment("front")
    made = segment.engines[kind.name].model_copy(update={"targets": ("sm89", "nvidia-geforce-rtx-4070")})
    segment = segment.model_copy(update={"engines": {kind.name: made}})
    card("NVIDIA GeForce RTX 4090", (8, 9))
    with pytest.raises(NeedsBuildError) as caught:
        kind(fake).load(bundle, segment)
    assert str(caught.value) == (
        "segment front: its tensorrt engine was built by 10.9 for sm89, nvidia-geforce-rtx-4070, this GPU is "
        "sm89, nvidia-geforce-rtx-4090"
    )
    assert fake.engines == []
    card("NVIDIA GeForce RTX 4070", (8, 9))
    kind(fake).load(bundle, segment)
    assert len(fake.engines) == 1


@pytest.mark.parametrize("kind", [TensorRTRTX], indirect=True)
def test_a_card_that_tensorrt_rtx_has_no_name_for(fake, bundle, kind, card):
    card("NVIDIA H100", (9, 0))
    fake.card = "sm90"
    with pytest.raises(NeedsBuildError, match=r"it was built by 10.9 for sm86$"):
        kind(fake).load(bundle, bundle.manifest.segment("front"))
    assert kind(fake).check_targets([]) == kind(fake).check_targets(["sm90"]) == ("sm90",)


def test_without_diagnostics_the_first_error_is_the_reason(load, fake, monkeypatch):
    """TensorRT has no get_engine_validity; its log must do."""
    monkeypatch.delattr("tests.support.fake_tensorrt.FakeRuntime.get_engine_validity")
    fake.card = "sm120"
    with pytest.raises(EngineError, match=r"here: deserializeCudaEngine: incompatible device; it was built"):
        load("front")


def test_an_engine_with_another_dtype_or_without_an_output_is_refused(load, fake):
    program = fake.files[b"front"]
    fake.files[b"front"] = replace(program, types={"timestep": DataType.INT64, "down.0.sampler": DataType.HALF})
    with pytest.raises(NeedsBuildError, match=r"engine has down.0.sampler as HALF, the manifest as FLOAT$"):
        load("front")
    fake.files[b"front"] = replace(program, outputs=("down.0.resnet", "other"))
    with pytest.raises(NeedsBuildError, match=r"no output down.0.sampler, only sample, timestep, down.0.resnet, other$"):
        load("front")


def test_an_input_that_nothing_reads_may_be_gone_from_the_engine(load, fake, tiny):
    program = fake.files[b"back"]
    limits = {name: limit for name, limit in program.limits.items() if name != "text"}
    fake.files[b"back"] = replace(program, limits=limits, function=lambda skip, down: skip[:, :4] * 2)
    features = tiny.reference(random_inputs(1, 8, 8))
    torch.testing.assert_close(load("back").run(features)["noise"], features["down.0.resnet"][:, :4] * 2)


@pytest.mark.gpu
def test_the_real_thing_agrees_with_the_live_modules(tiny, tmp_path):
    """Built for the card at hand and run on it, on a stream of its own."""
    from tests.engines.conftest import compile_segment

    pytest.importorskip("tensorrt_rtx")
    engine = TensorRTRTX()
    segments = []
    for segment in tiny.bundle.manifest.segments:
        compiled = compile_segment(engine, tiny.traced[segment.name], tmp_path)
        segments.append(segment.model_copy(update={"engines": {engine.name: compiled}}))
    bundle = write_bundle(tmp_path, tuple(segments))
    inputs = random_inputs(2, 16, 16)
    features = {name: tensor.cuda() for name, tensor in inputs.items()}
    with torch.cuda.stream(torch.cuda.Stream()):
        for segment in bundle.manifest.segments:
            runner = engine.load(bundle, segment)
            features.update(runner.run(features))
        runner.synchronize()
    for name, expected in tiny.reference(inputs).items():
        # Sums in another order, and a fast exponential.
        torch.testing.assert_close(features[name].cpu(), expected, rtol=1e-4, atol=1e-4)
