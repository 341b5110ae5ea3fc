"""TensorRT: real engines are built ahead of time with no GPU; loading without one is refused in our words."""

import shutil
import sys

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from engines import Bundle, BundleError, EngineError, Profile, Traced, make_engine
from engines.bundle.folder import describe_file
from engines.bundle.manifest import Compiled
from engines.tensorrt.engine import TensorRT, TensorRTRTX
from tests.engines.conftest import compile_segment, write_bundle
from tests.support.fake_tensorrt import FakeTensorRT

trt = pytest.importorskip("tensorrt_rtx")

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


@pytest.fixture(scope="module")
def built(tiny, tmp_path_factory) -> Bundle:
    """A copy of the tiny bundle with TensorRT-RTX engines for three cards."""
    folder = tmp_path_factory.mktemp("rtx") / "bundle"
    shutil.copytree(tiny.bundle.folder, folder)
    engine = make_engine("tensorrt-rtx")
    segments = []
    for segment in tiny.bundle.manifest.segments:
        compiled = compile_segment(engine, tiny.traced[segment.name], folder, ("sm86", "sm89", "sm120"))
        segments.append(segment.model_copy(update={"engines": {**segment.engines, engine.name: compiled}}))
    return write_bundle(folder, tuple(segments))


def test_engines_are_built_without_a_gpu_for_named_targets(built):
    built.check()
    for segment in built.manifest.segments:
        compiled = segment.engines["tensorrt-rtx"]
        assert compiled.targets == ("sm86", "sm89", "sm120")
        assert compiled.version == trt.__version__
        assert [file.path for file in compiled.files] == [f"tensorrt-rtx/{segment.name}.engine"]
        assert compiled.files[0].bytes > 10_000
        assert b"trt" in built.path(compiled.files[0]).read_bytes()[:4]  # the library's own mark


@pytest.fixture
def spied(monkeypatch):
    """TensorRT-RTX as it is, with the builder's configurations kept for the test to read."""
    configs = []
    build = trt.Builder.build_serialized_network

    def spy(builder, network, config):
        configs.append(config)
        return build(builder, network, config)

    monkeypatch.setattr(trt.Builder, "build_serialized_network", spy)
    return configs


def test_every_target_is_set_and_fp32_is_not_tf32(spied, tiny, tmp_path):
    TensorRTRTX().compile(tiny.traced["front"], tmp_path / "front", tiny.profiles["front"], ["sm89", "sm86"])
    (config,) = spied
    found = [config.get_compute_capability(index) for index in range(config.num_compute_capabilities)]
    assert found == [trt.ComputeCapability.SM89, trt.ComputeCapability.SM86]
    assert not config.get_flag(trt.BuilderFlag.TF32)


def test_a_static_profile_builds(tiny, tmp_path):
    shapes = tiny.profiles["front"].optimum
    (path,) = TensorRTRTX().compile(tiny.traced["front"], tmp_path / "front", Profile(shapes, shapes, shapes), ["sm89"])
    assert path.stat().st_size > 10_000


def test_targets_are_checked_before_work_starts():
    engine = TensorRTRTX()
    assert engine.check_targets(["sm89", "sm86", "sm89"]) == ("sm89", "sm86")
    assert set(engine.targets_allowed) == {name.lower() for name in trt.ComputeCapability.__members__} - {"none", "current"}
    for unknown in ("sm90", "SM89", "8.9", ""):
        with pytest.raises(EngineError, match=rf"unknown target '{unknown}'; choose from: sm75, sm80, sm86, sm89, sm120, sm121"):
            engine.check_targets(["sm86", unknown])


def test_an_unknown_target_stops_a_build_too(tiny, tmp_path):
    with pytest.raises(EngineError, match=r"unknown target 'sm90'"):
        TensorRTRTX().compile(tiny.traced["front"], tmp_path / "front", tiny.profiles["front"], ["sm90"])
    assert list(tmp_path.iterdir()) == []


def test_the_default_targets_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert TensorRTRTX().check_targets([]) == TensorRTRTX.DEFAULT_TARGETS


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((8, 9), TensorRTRTX.DEFAULT_TARGETS),
        ((7, 5), ("sm75",)),  # the defaults leave Turing out; it gets an engine of its own
        ((9, 0), ("sm90",)),  # has no name, and is built for as the current one
    ],
)
def test_the_default_targets_cover_the_card_at_hand(card, capability, expected):
    card("A card", capability)
    assert TensorRTRTX().check_targets([]) == expected


def test_a_version_that_knows_fewer_targets_offers_fewer():
    engine = TensorRTRTX(FakeTensorRT({}))
    assert engine.check_targets([]) == ("sm86", "sm89")
    with pytest.raises(EngineError, match=r"engine tensorrt-rtx 11.0.0: unknown target 'sm75'; choose from: sm86, sm89 "):
        engine.check_targets(["sm75"])


def test_turing_without_fp32_products_is_explained(tiny, tmp_path):
    with pytest.raises(EngineError, match=r"segment back: .* cannot build it for sm75: .*FP32 GEMM") as caught:
        TensorRTRTX().compile(tiny.traced["back"], tmp_path / "back", tiny.profiles["back"], ["sm75"])
    assert str(caught.value).endswith("build with --precision fp16, or leave sm75 out")


def test_an_operator_that_tensorrt_lacks_is_named(tiny, tmp_path):
    value = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in "xy"}
    node = helper.make_node("Nonesuch", ["x"], ["y"], name="the_node", domain="com.example")
    graph = helper.make_graph([node], "graph", [value["x"]], [value["y"]])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.example", 1)]
    path = tmp_path / "odd.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets), path)
    traced = Traced(tiny.segment("front"), path, tiny.traced["front"].program)
    with pytest.raises(EngineError, match=r"segment front: tensorrt-rtx .* cannot read .*odd.onnx: .*the_node.*Nonesuch"):
        TensorRTRTX().compile(traced, tmp_path / "odd", tiny.profiles["front"], ())


def test_a_profile_that_does_not_fit_is_explained(tiny, tmp_path):
    good = tiny.profiles["front"]
    wide = {**good.maximum, "sample": (4, 5, 32, 32)}
    bad = Profile(good.minimum, good.optimum, wide)
    with pytest.raises(EngineError, match=r"segment front: .* cannot build it for .*sample"):
        TensorRTRTX().compile(tiny.traced["front"], tmp_path / "front", bad, ())
    with pytest.raises(EngineError, match=r"the profile has no shapes for input sample"):
        TensorRTRTX().compile(tiny.traced["front"], tmp_path / "front", Profile({}, {}, {}), ())


@no_gpu
def test_loading_without_a_gpu_is_refused(built):
    with pytest.raises(EngineError, match=r"tensorrt-rtx needs an NVIDIA GPU and driver to run") as caught:
        TensorRTRTX().load(built, built.manifest.segment("front"))
    assert "choose --engine torch or --engine onnxruntime" in str(caught.value)


@no_gpu
def test_a_machine_without_a_driver_gets_a_reason_not_a_crash(built):
    """Past our own check, the real library is asked: it returns nothing and logs why."""
    engine = TensorRTRTX(device=torch.device("cpu"))
    with pytest.raises(EngineError, match=r"cannot load .*front.engine here: .*CUDA driver version") as caught:
        engine.load(built, built.manifest.segment("front"))
    message = str(caught.value)
    assert f"it was built by {trt.__version__} for sm86, sm89, sm120; " in message
    assert "driver" in message.rpartition("sm120; ")[2], "no other engine would help"
    assert "\n" not in message


def test_a_file_that_is_no_engine_is_refused(tiny, tmp_path):
    path = tmp_path / "front.engine"
    path.write_bytes(b"no engine" * 100)
    compiled = Compiled(files=(describe_file(tmp_path, path),), version="1.0", targets=("sm89",))
    segment = tiny.segment("front").model_copy(update={"engines": {"tensorrt-rtx": compiled}})
    with pytest.raises(EngineError, match=r"cannot load .*: .*(malformed engine|cuda error)"):
        TensorRTRTX(device=torch.device("cpu")).load(write_bundle(tmp_path, (segment,)), segment)


def test_a_damaged_engine_is_refused(built, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(built.folder, folder)
    with (folder / "tensorrt-rtx" / "back.engine").open("ab") as stream:
        stream.write(b"?")
    bundle = Bundle.open(folder)
    with pytest.raises(BundleError, match=r"tensorrt-rtx/back.engine is not the file that was built"):
        TensorRTRTX(device=torch.device("cpu")).load(bundle, bundle.manifest.segment("back"))


def test_tensorrt_takes_no_targets_and_needs_a_gpu_to_build(monkeypatch, tiny, tmp_path):
    engine = TensorRT(FakeTensorRT({}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match=r"takes no targets, got sm89; .*choose --engine tensorrt-rtx"):
        engine.check_targets(["sm89"])
    for attempt in (
        lambda: engine.check_targets([]),
        lambda: engine.compile(tiny.traced["front"], tmp_path / "front", tiny.profiles["front"], []),
    ):
        with pytest.raises(EngineError, match=r"engine tensorrt needs an NVIDIA GPU and driver to build.*--engine torch"):
            attempt()
    assert TensorRT.targets_allowed == ()


def test_tensorrt_builds_for_the_model_of_card_at_hand(card):
    engine = TensorRT(FakeTensorRT({}))
    card("NVIDIA GeForce RTX 4090", (8, 9))
    here = ("sm89", "nvidia-geforce-rtx-4090")
    assert engine.check_targets([]) == here
    assert engine.check_targets(here) == here
    with pytest.raises(EngineError, match="takes no targets, got sm89; "):
        engine.check_targets(["sm89"])


@pytest.mark.parametrize(
    ("kind", "found", "taken"),
    [
        (TensorRTRTX, "1.2.0.54", False),
        (TensorRTRTX, "1.3.0.35", True),
        (TensorRT, "10.7.0", False),
        (TensorRT, "10.8.0.43", True),
        (TensorRT, "11.0.0", True),
    ],
)
def test_a_version_that_is_too_old_is_refused(monkeypatch, kind, found, taken):
    """TensorRT-RTX has user allocation and strategies for graphs since 1.2; the package asks for 1.3."""
    module = FakeTensorRT({})
    module.__version__ = found
    monkeypatch.setitem(sys.modules, kind.module, module)
    if taken:
        assert kind().version() == found
    else:
        oldest = ".".join(map(str, kind.oldest))
        message = rf"takes version {oldest} or later, found {found}; install it with: pip install .*, or choose --engine torch"
        with pytest.raises(EngineError, match=message):
            kind()


def test_a_package_that_is_missing_names_the_fallback(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EngineError, match=r"engine tensorrt cannot be used: .*pip install .*, or choose --engine torch"):
        TensorRT()
