"""What the engines torch and onnxruntime do on a GPU, as far as that can be seen without one."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from engines import EngineError
from engines.bundle.shapes import resolve
from engines.ort.engine import OnnxRuntime
from engines.torch_program import ModuleRunner, Torch
from tests.engines.conftest import FEATURES, SEGMENTS, random_inputs
from tests.engines.test_engines import BoundOnnxRuntime


@pytest.fixture
def onnxruntime_on_cuda(damageable):
    """What an engine on CUDA would give a session of the front: the options of each provider by name, and the bundle's folder."""

    def options(precision="fp32", tensorrt=False, prefer_nhwc=False):
        engine = OnnxRuntime(device="cpu")
        engine._prefer_nhwc = prefer_nhwc
        engine._stream, engine._tensorrt = SimpleNamespace(cuda_stream=77), tensorrt  # type: ignore[assignment]
        bundle = replace(damageable, manifest=damageable.manifest.model_copy(update={"precision": precision}))
        *accelerated, last = engine._providers(bundle, bundle.manifest.segment("front"))
        assert last == "CPUExecutionProvider"
        return dict(accelerated)

    return options


@pytest.mark.parametrize("tensorrt", [False, True])
def test_onnxruntime_on_cuda_is_told_the_stream_and_waits_for_nothing(onnxruntime_on_cuda, tensorrt):
    options = onnxruntime_on_cuda(tensorrt=tensorrt)
    assert list(options) == ["TensorrtExecutionProvider"] * tensorrt + ["CUDAExecutionProvider"]
    assert all({"device_id": "0", "user_compute_stream": "77"}.items() <= each.items() for each in options.values())
    assert OnnxRuntime()._run_options().get_run_config_entry("disable_synchronize_execution_providers") == "1"


def test_onnxruntime_on_cuda_takes_no_tf32_for_fp32(onnxruntime_on_cuda):
    assert onnxruntime_on_cuda("fp32")["CUDAExecutionProvider"]["use_tf32"] == "0"
    assert "use_tf32" not in onnxruntime_on_cuda("fp16")["CUDAExecutionProvider"]


def test_onnxruntime_on_cuda_lays_features_channels_last_where_asked_to(onnxruntime_on_cuda):
    assert "prefer_nhwc" not in onnxruntime_on_cuda()["CUDAExecutionProvider"]
    options = onnxruntime_on_cuda(tensorrt=True, prefer_nhwc=True)
    assert options["CUDAExecutionProvider"]["prefer_nhwc"] == "1"
    assert "prefer_nhwc" not in options["TensorrtExecutionProvider"], "which has no such option"
    with pytest.raises(EngineError, match="prefer_nhwc on CUDA only"):
        OnnxRuntime(device="cpu", prefer_nhwc=True)


def test_the_torch_engine_channels_last_gives_the_same(torch_bundle):
    """Every segment of a whole bundle, with views of features that lie otherwise than they did when they were traced."""
    laid = 0
    for segment in torch_bundle.manifest.segments:
        features = torch_bundle.manifest.features
        sizes = {"batch": 2, "images": 1, "height": 8, "width": 8}
        drawn = {n: torch.randn(resolve(features[n].shape, sizes)) for n in segment.inputs}
        inputs = {n: (x.abs().long() if features[n].dtype == "int64" else x) for n, x in drawn.items()}
        plain, last = (Torch("cpu", channels_last=way).load(torch_bundle, segment) for way in (False, True))
        expected, found = plain.run(inputs), last.run(inputs)
        for name, tensor in expected.items():
            assert (found[name] - tensor).abs().max() <= 1e-4 * tensor.abs().max(), (segment.name, name)
        laid += sum(weight.dim() == 4 and not weight.is_contiguous() for weight in last.module._weights.values())  # type: ignore[attr-defined]
    assert laid > 0


def test_onnxruntimes_tensorrt_keeps_its_engines_with_the_bundles_caches(onnxruntime_on_cuda, damageable):
    options = onnxruntime_on_cuda(tensorrt=True)["TensorrtExecutionProvider"]
    place = damageable.folder / "cache" / f"onnxruntime-{OnnxRuntime().version()}-cpu"
    assert (options["trt_engine_cache_enable"], options["trt_timing_cache_enable"]) == ("1", "1")
    assert options["trt_engine_cache_path"] == str(place / "front")
    assert options["trt_timing_cache_path"] == str(place)
    assert (place / "front").is_dir()


def test_where_they_cannot_be_kept_they_are_built_again(onnxruntime_on_cuda, damageable, monkeypatch, tmp_path):
    (damageable.folder / "cache").write_text("no folder")
    monkeypatch.setenv("UNET_HEIRLOOM_CACHE", str(tmp_path / "user"))
    kept = onnxruntime_on_cuda(tensorrt=True)["TensorrtExecutionProvider"]["trt_engine_cache_path"]
    assert Path(kept).is_relative_to(tmp_path / "user" / ("0" * 16))
    monkeypatch.setenv("UNET_HEIRLOOM_CACHE", "/dev/null/none")
    assert "trt_engine_cache_enable" not in onnxruntime_on_cuda(tensorrt=True)["TensorrtExecutionProvider"]


def test_one_bound_run_at_a_time_is_put_on_the_stream_of_all_sessions(tiny):
    engine = BoundOnnxRuntime()
    running, most = [], []

    class Watched:
        """A session that notes how many run at once."""

        def __init__(self, session):
            self.session = session

        def __getattr__(self, name):
            return getattr(self.session, name)

        def run_with_iobinding(self, *given):
            running.append(1)
            most.append(len(running))
            time.sleep(0.005)
            self.session.run_with_iobinding(*given)
            running.pop()

    runners = [engine.load(tiny.bundle, segment) for segment in tiny.bundle.manifest.segments]
    for runner in runners:
        runner._session = Watched(runner._session)
    features = tiny.reference(random_inputs(1, 8, 8))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda index: runners[index % 2].run(features), range(12)))
    assert most == [1] * 12


def precision():
    """What PyTorch makes of convolutions and matrix products of float32 on a GPU."""
    cudnn: Any = torch.backends.cudnn
    return cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision


class Watching(nn.Module):
    """Notes what PyTorch is allowed to round while it runs, and waits for another to come in."""

    def __init__(self, barrier=None, last=False):
        super().__init__()
        self.seen, self.barrier, self.last = [], barrier, last

    def forward(self, sample, timestep):
        self.seen.append(precision())
        if self.barrier:
            self.barrier.wait(10)
        if self.last:
            time.sleep(0.05)
            self.seen.append(precision())
        sizes = {"batch": 1, "height": 8, "width": 8}
        made = [torch.zeros(resolve(FEATURES[name].shape, sizes)) for name in SEGMENTS[0].outputs]
        return tuple(made)


@pytest.mark.parametrize("exact", [True, False])
def test_an_exact_module_runs_without_tf32_and_leaves_all_as_it_was(exact):
    before, module = precision(), Watching()
    assert before[0] == "tf32", "PyTorch's own choice"
    ModuleRunner(SEGMENTS[0], FEATURES, module, torch.device("cpu"), exact).run(random_inputs(1, 8, 8))
    assert module.seen == [("ieee", "ieee") if exact else before]
    assert precision() == before


def test_threads_that_are_exact_at_once():
    """The first to leave must not take it from the other."""
    before, barrier = precision(), threading.Barrier(2)
    modules = [Watching(barrier), Watching(barrier, last=True)]
    with ThreadPoolExecutor(2) as pool:
        for module in modules:
            runner = ModuleRunner(SEGMENTS[0], FEATURES, module, torch.device("cpu"), True)
            pool.submit(runner.run, random_inputs(1, 8, 8))
    assert modules[1].seen == [("ieee", "ieee")] * 2
    assert precision() == before


def test_an_exact_module_that_fails_leaves_all_as_it_was():
    before, module = precision(), Watching()
    module.register_forward_hook(lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ModuleRunner(SEGMENTS[0], FEATURES, module, torch.device("cpu"), True).run(random_inputs(1, 8, 8))
    assert module.seen == [("ieee", "ieee")]
    assert precision() == before


@pytest.mark.parametrize(
    ("device", "precision", "exact"), [("cuda", "fp32", True), ("cuda", "fp16", False), ("cpu", "fp32", False)]
)
def test_single_precision_on_a_gpu_is_exact(damageable, monkeypatch, device, precision, exact):
    monkeypatch.setattr("engines.torch_program.read_program", lambda path, device: torch.nn.Identity())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    bundle = replace(damageable, manifest=damageable.manifest.model_copy(update={"precision": precision}))
    runner: Any = Torch(device).load(bundle, bundle.manifest.segment("front"))
    assert runner._no_tf32 is exact
