"""The engines that run on a CPU: they agree with the live modules, and they say what is wrong with their input."""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from engines import ENGINES, Bundle, BundleError, EngineError, NeedsBuildError, base, make_engine
from engines.bundle.manifest import Feature, Segment
from engines.null import Null
from engines.ort.engine import OnnxRuntime, _ArrayRunner, _BoundRunner
from engines.torch_program import ModuleRunner, Torch

from .conftest import FEATURES, SEGMENTS, random_inputs

# Batch 2 at 16x24 is the traced example: each case differs from it in something.
SIZES = [(2, 16, 24), (1, 16, 24), (1, 8, 8), (3, 32, 16)]


class BoundOnnxRuntime(OnnxRuntime):
    """ONNX Runtime through IO binding, as on a GPU, but with addresses in the CPU's memory."""

    def load(self, bundle, segment):
        session = self._session(bundle.path(segment.onnx[0]), segment, ["CPUExecutionProvider"])
        given = session, torch.device("cpu"), self._run_options(), None, self._running
        return _BoundRunner(segment, bundle.manifest.features, *given)


class Live:
    """The test's own modules as an engine."""

    def __init__(self, modules):
        self.modules = modules

    def load(self, bundle, segment):
        return ModuleRunner(segment, bundle.manifest.features, self.modules[segment.name])


def openvino(name="openvino"):
    pytest.importorskip("openvino", reason="install it with: pip install --editable '.[openvino]'")
    return make_engine(name)


@pytest.fixture(params=["onnxruntime", "onnxruntime-bound", "openvino", "torch", "module"])
def engine(request, tiny):
    made: dict[str, Callable] = {
        "openvino": openvino,
        "onnxruntime": OnnxRuntime,
        "onnxruntime-bound": BoundOnnxRuntime,
        "torch": lambda: Torch(device="cpu"),
        "module": lambda: Live(tiny.modules),
    }
    return made[request.param]()


def close(found, expected):
    """fp32 sums of at most 150 products in another order differ by some 1e-6; a wrong weight or shape gives 1e-1."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def chain(engine, tiny, inputs):
    """Both segments, one after the other: every feature."""
    features = dict(inputs)
    for name in ("front", "back"):
        features.update(engine.load(tiny.bundle, tiny.segment(name)).run(features))
    return features


@pytest.mark.parametrize(("batch", "height", "width"), SIZES)
def test_the_chain_agrees_with_the_live_modules(engine, tiny, batch, height, width):
    inputs = random_inputs(batch, height, width, seed=batch)
    found, expected = chain(engine, tiny, inputs), tiny.reference(inputs)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        close(found[name], tensor)
        assert not found[name].requires_grad


@pytest.mark.parametrize("tokens", [1, 10, 35])
def test_text_may_have_any_length(engine, tiny, tokens):
    inputs = random_inputs(2, 8, 16, tokens=tokens)
    close(chain(engine, tiny, inputs)["noise"], tiny.reference(inputs)["noise"])


def test_inputs_may_be_views(engine, tiny):
    whole = random_inputs(4, 16, 24)
    inputs = {name: tensor[1::2] for name, tensor in whole.items()}
    inputs["sample"] = inputs["sample"].contiguous(memory_format=torch.channels_last)
    assert not inputs["sample"].is_contiguous()
    close(chain(engine, tiny, inputs)["noise"], tiny.reference(inputs)["noise"])


def test_a_run_leaves_earlier_outputs_alone(engine, tiny):
    """The cache keeps what a runner returned: a later run must not write into it."""
    runner = engine.load(tiny.bundle, tiny.segment("front"))
    first = runner.run(random_inputs(1, 8, 8, seed=1))
    kept = {name: tensor.clone() for name, tensor in first.items()}
    runner.run(random_inputs(1, 8, 8, seed=2))
    assert all(torch.equal(first[name], kept[name]) for name in kept)


def test_threads_may_share_a_runner(engine, tiny):
    runner = engine.load(tiny.bundle, tiny.segment("front"))
    inputs = [random_inputs(1 + seed % 2, 8, 8 + 8 * (seed % 3), seed) for seed in range(12)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(runner.run, inputs))
    for one, outputs in zip(inputs, found, strict=True):
        close(outputs["down.0.sampler"], tiny.reference(one)["down.0.sampler"])


def test_a_timed_run_gives_the_outputs_and_the_seconds(engine, tiny):
    inputs = random_inputs(1, 8, 8)
    runner = engine.load(tiny.bundle, tiny.segment("front"))
    outputs, seconds = runner.timed_run(inputs)
    close(outputs["down.0.resnet"], tiny.reference(inputs)["down.0.resnet"])
    assert 0 < seconds < 60


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timestep": None}, "segment front needs input timestep; got sample"),
        ({"sample": torch.zeros(1, 4, 8, 8, dtype=torch.float16)}, "input sample: got torch.float16, expected float32"),
        ({"timestep": torch.zeros(1)}, "input timestep: got torch.float32, expected int64"),
        ({"sample": torch.zeros(1, 3, 8, 8)}, "input sample: dimension 1 is 3, expected 4"),
        ({"sample": torch.zeros(4, 8, 8)}, "input sample: 3 dimensions, expected 4"),
        ({"timestep": torch.zeros(2, dtype=torch.int64)}, "dimension 0 is 2, expected batch with batch = 1"),
        ({"sample": torch.zeros(1, 4, 8, 8, device="meta")}, "got a tensor on meta, expected cpu; move it with"),
    ],
)
def test_wrong_inputs_are_named_before_anything_runs(engine, tiny, change, message):
    inputs = {name: tensor for name, tensor in random_inputs(1, 8, 8).items() if name != "text"} | change
    runner = engine.load(tiny.bundle, tiny.segment("front"))
    with pytest.raises(EngineError, match=message):
        runner.run({name: tensor for name, tensor in inputs.items() if tensor is not None})


def test_inputs_that_fitted_once_do_not_let_others_through(engine, tiny):
    """Which inputs fitted is remembered by their dtypes, devices and shapes."""
    runner, inputs = engine.load(tiny.bundle, tiny.segment("front")), random_inputs(1, 8, 8)
    given = {name: inputs[name] for name in tiny.segment("front").inputs}
    for _ in range(2):
        runner.run(given)
        with pytest.raises(EngineError, match="expected float32"):
            runner.run(given | {"sample": given["sample"].half()})
        with pytest.raises(EngineError, match="needs input sample"):
            runner.run({name: tensor for name, tensor in given.items() if name != "sample"})


def test_a_runner_remembers_few_kinds_of_inputs(tiny, monkeypatch):
    monkeypatch.setattr(base, "_MOST_SIGNATURES", 2)
    runner = Null().load(tiny.bundle, tiny.segment("front"))
    for width in (8, 16, 24, 8):
        inputs = random_inputs(1, 8, width)
        outputs = runner.run({name: inputs[name] for name in tiny.segment("front").inputs})
        assert {tensor.shape[-1] for tensor in outputs.values()} <= {width, width // 2}
        assert max(len(runner._sizes), len(runner._shapes)) <= 2


def test_features_that_do_not_belong_together_are_refused(engine, tiny):
    """A skip of one size with a downsampled feature of another: what a stale cache would give."""
    features = tiny.reference(random_inputs(1, 16, 16))
    features["down.0.sampler"] = features["down.0.sampler"][..., :4]
    with pytest.raises(EngineError, match=r"down.0.sampler: dimension 3 is 4, expected width/2 with width = 16"):
        engine.load(tiny.bundle, tiny.segment("back")).run(features)


def known(name):
    """The engine of that name, or a skipped test."""
    return openvino(name) if name.startswith("openvino") else make_engine(name)


@pytest.mark.parametrize(
    ("name", "file"), [("onnxruntime", "front.onnx.data"), ("openvino", "front.onnx.data"), ("torch", "torch/front.pt2")]
)
def test_damaged_files_are_refused(damageable, name, file):
    path = damageable.folder / file
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(BundleError, match=rf"{file} is not the file that was built"):
        known(name).load(damageable, damageable.manifest.segment("front"))


def with_file(bundle, segment, path):
    """The segment, with that file as its ONNX file and torch program: whole by its hash, but nonsense."""
    from engines.bundle.folder import describe_file
    from engines.bundle.manifest import Compiled

    file = describe_file(bundle.folder, path)
    engines = {"torch": Compiled(files=(file,), version="1.0")}
    return segment.model_copy(update={"onnx": (file,), "engines": engines})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("onnxruntime", r"nonsense is no ONNX model"),
        ("openvino", r"nonsense is no ONNX model"),
        ("torch", r"nonsense cannot be read by PyTorch .*; it was made by PyTorch 1.0"),
    ],
)
def test_files_that_the_engine_cannot_read_are_refused(damageable, name, message):
    path = damageable.folder / "nonsense"
    path.write_bytes(b"nonsense")
    segment = with_file(damageable, damageable.manifest.segment("front"), path)
    with pytest.raises((EngineError, BundleError), match=message):
        known(name).load(damageable, segment)


def test_an_unknown_engine_is_refused_with_the_known_ones():
    with pytest.raises(EngineError, match=rf"unknown engine 'tensorflow'; choose from: {', '.join(ENGINES)}"):
        make_engine("tensorflow")


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "openvino-bf16", "torch", "null"])
def test_an_engine_knows_its_name_and_version(name):
    engine = known(name)
    assert engine.name == name
    assert engine.version()[0].isdigit()
    assert engine.check_targets([]) == ()
    assert engine.targets_allowed == ()
    with pytest.raises(EngineError, match=rf"engine {name} takes no targets, got sm89; leave --targets out"):
        engine.check_targets(["sm89"])


def test_an_engine_that_the_bundle_was_built_without_is_named(tiny):
    segment = tiny.segment("front").model_copy(update={"engines": {}})
    with pytest.raises(NeedsBuildError, match=r"has no torch engines \(it has: none\)$"):
        Torch("cpu").load(tiny.bundle, segment)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_segment_without_an_onnx_file_is_named(tiny, name):
    segment = tiny.segment("front").model_copy(update={"onnx": ()})
    with pytest.raises(NeedsBuildError, match=r"no ONNX file for segment front$"):
        known(name).load(tiny.bundle, segment)


def test_the_rebuild_command_keeps_the_other_engines(tiny):
    wanted = "--variant original --source mini --precision fp32 --engine null,torch --sizes 64x64 --batch 1..2 --force --out"
    assert wanted in tiny.bundle.rebuild_command("null")


# ONNX Runtime


@pytest.mark.parametrize("name", ["onnxruntime", "tensorrt_rtx", "tensorrt"])
def test_a_missing_package_is_an_error_that_says_what_to_install(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    engine = name.replace("_", "-")
    with pytest.raises(
        EngineError, match=rf"engine {engine} cannot be used: .*install it with: pip install (--upgrade )?{engine}"
    ):
        make_engine(engine)


@pytest.mark.parametrize("name", ["openvino", "openvino-bf16"])
def test_openvino_is_installed_as_an_extra(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(EngineError, match=rf"engine {name} cannot be used: .*install it with: pip install .*\[openvino\]"):
        make_engine(name)


def test_a_tensorrt_that_is_too_old(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.7.0.post1"))
    with pytest.raises(EngineError, match=r"engine tensorrt takes version 10\.8 or later, found 10\.7\.0\.post1; install"):
        make_engine("tensorrt")


class Recorder:
    """An ONNX Runtime session that keeps what goes in and out."""

    def __init__(self, session):
        self.session = session

    def run(self, names, feeds):
        self.feeds = feeds
        self.arrays = self.session.run(names, feeds)
        return self.arrays


def test_onnxruntime_copies_nothing_on_the_cpu(tiny):
    runner = OnnxRuntime().load(tiny.bundle, tiny.segment("front"))
    assert isinstance(runner, _ArrayRunner)
    recorder = runner._session = Recorder(runner._session)
    inputs = random_inputs(1, 8, 8)
    outputs = runner.run(inputs)
    assert np.shares_memory(recorder.feeds["sample"], inputs["sample"].numpy())
    assert all(np.shares_memory(a, t.numpy()) for a, t in zip(recorder.arrays, outputs.values(), strict=True))


def test_onnxruntime_threads_follow_torch_unless_told(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert OnnxRuntime()._options().intra_op_num_threads == 7
    options = OnnxRuntime(threads=3)._options()
    assert options.intra_op_num_threads == 3
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert options.get_session_config_entry("session.use_env_allocators") == "1"
    assert not options.enable_mem_pattern
    with pytest.raises(EngineError, match=r"got 0 threads, expected 1 or more"):
        OnnxRuntime(threads=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_onnxruntime_on_cuda_is_refused_where_there_is_none():
    with pytest.raises(EngineError, match=r"onnxruntime cannot run on cuda here: .*onnxruntime-gpu"):
        OnnxRuntime(device="cuda")


# Modules


def test_a_module_that_returns_too_few_outputs_is_named():
    runner = ModuleRunner(SEGMENTS[0], FEATURES, First())
    with pytest.raises(EngineError, match=r"returned 1 tensors, expected 2 \(down.0.resnet, down.0.sampler\)"):
        runner.run(random_inputs(1, 8, 8))


class First(nn.Module):
    def forward(self, sample, timestep):
        return sample


def test_what_a_module_returns_may_be_changed_in_place(tiny):
    outputs = ModuleRunner(SEGMENTS[0], FEATURES, tiny.modules["front"]).run(random_inputs(1, 8, 8))
    outputs["down.0.resnet"].add_(1)


def test_a_program_takes_its_name_from_the_whole_stem(tiny, tmp_path):
    """A stem such as down.0 has a dot; a suffix must not take its place."""
    files = Torch("cpu").compile(tiny.traced["front"], tmp_path / "deep" / "down.0", tiny.profiles["front"], ())
    assert [file.relative_to(tmp_path).as_posix() for file in files] == ["deep/down.0.pt2"]


# Null


def test_null_needs_no_files_and_logs_what_ran(tiny):
    bundle = Bundle(Path("nowhere"), tiny.bundle.manifest)
    engine = make_engine("null")
    assert isinstance(engine, Null)
    assert not engine.compiles
    features = random_inputs(3, 16, 8)
    for name in ("front", "back", "front"):
        features.update(engine.load(bundle, tiny.segment(name)).run(features))
    assert engine.calls == ["front", "back", "front"]
    expected = {"down.0.resnet": (3, 8, 16, 8), "down.0.sampler": (3, 8, 8, 4), "noise": (3, 4, 16, 8)}
    assert {name: tuple(features[name].shape) for name in expected} == expected
    assert all(features[name].dtype == torch.float32 and not features[name].any() for name in expected)


def test_null_checks_its_inputs_and_logs_no_failed_call(tiny):
    engine = Null()
    runner = engine.load(tiny.bundle, tiny.segment("front"))
    with pytest.raises(EngineError, match=r"needs input sample; got nothing"):
        runner.run({})
    with pytest.raises(EngineError, match=r"segment front: height = 9 is not a multiple of 2.*choose a picture size"):
        runner.run(random_inputs(1, 9, 8))
    assert engine.calls == []


@pytest.mark.parametrize("size", ["batch", "images"])
def test_null_gives_the_dtype_of_the_manifest_and_names_a_size_that_no_input_tells(tiny, size):
    segment = Segment(name="text", units=(), inputs=("tokens",), outputs=("states",))
    features = {"tokens": Feature(dtype="int64", shape=("batch", 5)), "states": Feature(dtype="float16", shape=(size, 3))}
    runner = Null().load(Bundle(Path("nowhere"), tiny.bundle.manifest.model_copy(update={"features": features})), segment)
    tokens = {"tokens": torch.zeros(2, 5, dtype=torch.int64)}
    if size == "batch":
        assert runner.run(tokens)["states"].dtype == torch.float16
    else:
        with pytest.raises(EngineError, match=r"no input tells size 'images'"):
            runner.run(tokens)


def test_onnxruntime_leaves_nothing_to_tensorrt_where_there_is_none():
    with pytest.raises(EngineError, match=r"cannot leave anything to TensorRT here: .* \(it has: .*CPUExecutionProvider\)"):
        OnnxRuntime(device="cpu", tensorrt=True)
