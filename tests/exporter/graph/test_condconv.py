"""Conditional convolutions in a bundle: every form is exact at every batch, TensorRT-RTX takes them, and pictures come out."""

from __future__ import annotations

import itertools
import json
import shutil
import statistics
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.export import Dim

import runtime
import tuning
from engines import Bundle, Manifest, Profile, Segment, make_engine
from engines.bundle.shapes import resolve
from exporter import BuildOptions, build, verify
from exporter.graph.condconv import FORM, FORMS, Form, exported
from exporter.graph.topology import depth_factor
from exporter.graph.unit_modules import CondConvBranch, SegmentModule, unit_module
from exporter.segments.quick_export import quick_export, quick_trace
from exporter.segments.trace import OPSET, trace
from tests.support.conditional import convolution_by_hand, randomise_routers, twin, unet_by_hand
from tests.support.sources import save_source, tiny_vae
from tests.support.unets import live_network, manifest_of, relative_error, small_unet
from tuning import Experts, Recipe
from tuning.surgery.condconv import CondConv2d, CondConvResnet, Router

pytestmark = pytest.mark.shared_pieces

ROUTERS: tuple[Router, ...] = ("timestep", "features")
FP32 = 1e-5
"""Sums in another order give 1e-6 of the largest value; a wrong gate gives 1e-2 and more."""
FP16 = 5e-3
"""Ten bits of mantissa are 1e-3; gates and kernels are rounded before they meet."""
CASES = [("timestep", FORM), *(("features", form) for form in FORMS)]
PLANS = ("block:2", "deepcache:2")
REMOVE = ("down.0.layer.1", "up.-1.layer.1")


def original() -> UNet2DConditionModel:
    return small_unet("two stages", layers_per_block=2, mid_block_type=None)


def conditional(router: Router) -> UNet2DConditionModel:
    """A small assembled UNet with random routers: experts in one ResNet on the way down and two on the way up."""
    unet = tuning.assemble(original(), Recipe(name="small", remove=REMOVE, experts=Experts(router=router, count=3)))
    randomise_routers(unet)
    return unet.eval()


def traced(module: nn.Module, rows: int | None, path: Path, dtype: torch.dtype) -> tuple[onnxruntime.InferenceSession, nn.Module]:
    """One layer as a session and as a program of the torch engine; `rows` fixes the batch."""
    moving = {2: Dim("height"), 3: Dim("width")} | ({} if rows else {0: Dim("batch", max=63)})
    arguments = (torch.randn(rows or 2, 6, 5, 4, dtype=dtype), torch.randn(1, 7, dtype=dtype))
    with warnings.catch_warnings(), torch.no_grad(), quick_trace(), quick_export():
        warnings.simplefilter("ignore")
        program = torch.export.export(module, arguments, dynamic_shapes=(moving, {}), strict=False)
        written = torch.onnx.export(program, input_names=["x", "time"], opset_version=OPSET, dynamo=True, verbose=False)
    assert written is not None
    written.save(path)
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]), program.module()


def ran(session: onnxruntime.InferenceSession, x: Tensor, time: Tensor) -> Tensor:
    given = {"x": x.numpy(), "time": time.numpy()}
    return torch.from_numpy(session.run(None, {put.name: given[put.name] for put in session.get_inputs()})[0])


def convolution(router: Router) -> CondConv2d:
    torch.manual_seed(1)
    made = CondConv2d(nn.Conv2d(6, 5, 3, padding=1), 3, router, time_width=7)
    randomise_routers(made)
    return made


@pytest.mark.parametrize(("router", "form"), CASES)
@pytest.mark.slow
def test_every_form_is_what_it_is_by_hand(router: Router, form: Form, tmp_path: Path) -> None:
    """As a module, in ONNX Runtime and as the torch engine runs it."""
    layer = convolution(router)
    module = exported(layer, form).eval()
    any_batch = None if form == "grouped" else traced(module, None, tmp_path / "layer.onnx", torch.float32)
    for rows in (1, 2, 3):
        x, time = torch.randn(rows, 6, 7, 9), torch.randn(1, 7)
        expected = convolution_by_hand(layer, x, time.expand(rows, -1))
        session, program = any_batch or traced(module, rows, tmp_path / "layer.onnx", torch.float32)
        with torch.no_grad():
            assert relative_error(module(x, time), expected) < FP32
            assert relative_error(program(x, time), expected) < FP32
        assert relative_error(ran(session, x, time), expected) < FP32


@pytest.mark.parametrize("router", ROUTERS)
def test_half_precision(router: Router, tmp_path: Path) -> None:
    layer = convolution(router)
    session, _ = traced(exported(layer).eval().half(), None, tmp_path / "layer.onnx", torch.float16)
    x, time = torch.randn(3, 6, 7, 9), torch.randn(1, 7)
    found = ran(session, x.half(), time.half()).float()
    assert relative_error(found, convolution_by_hand(layer.float(), x, time.expand(3, -1))) < FP16


def test_the_form_in_bundles_is_the_fastest_for_any_batch() -> None:
    """By the committed figures: the processor's time, and the layers of TensorRT-RTX's engine."""
    rows = json.loads(Path("benchmarks/results/condconv.json").read_text())["layers"]
    for figure in ("ratio", "rtx_layers"):
        found = {form: [row[figure] for row in rows if row["form"] == f"features, {form}"] for form in FORMS if form != "grouped"}
        medians = {form: statistics.median(values) for form, values in found.items()}
        assert min(medians, key=lambda form: medians[form]) == FORM, figure


def inputs(rows: int, side: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    sample, text = torch.randn(rows, 4, side, side, generator=generator), torch.randn(rows, 5, 16, generator=generator)
    return sample, torch.tensor([501.0]), text


@pytest.mark.parametrize("router", ROUTERS)
def test_segments_of_live_modules(router: Router) -> None:
    unet = conditional(router)
    manifest = manifest_of(unet)
    names = [unit.name for unit in manifest.units]
    assert names == [unit.name for unit in manifest_of(twin(unet)).units], "plans see the same units"
    network = live_network(unet, manifest)
    for rows in (1, 3):
        sample, timestep, text = inputs(rows)
        found = network.compute("head", {"sample": sample, "timestep": timestep, "text_encoder": text})
        assert relative_error(found, unet_by_hand(unet, sample, timestep.expand(rows), text)) < FP32


def test_mixing_is_counted() -> None:
    unet = conditional("timestep")
    plain = {unit.name: unit for unit in manifest_of(twin(unet)).units}
    for unit in manifest_of(unet).units:
        before = plain[unit.name]
        if isinstance(unit_module(unet, unit.name), CondConvBranch):
            module = unet.get_submodule(tuning.unit_modules(unet)[unit.name.removesuffix(".branch")])
            assert isinstance(module, CondConvResnet)
            kernels = [c.kernels[0].numel() for c in (module.conv1, module.conv2)]
            routers = 2 * 3 * module.time_emb_proj.in_features
            assert unit.macs - before.macs == 3 * sum(kernels) + routers
            assert unit.parameters - before.parameters == 2 * sum(kernels) + routers + 2 * 3
        else:
            assert unit == before


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[Router, Path]:
    """A checkpoint for each router, whose UNets are stored as after a distillation; its VAE is the one that is built fastest."""
    folder = tmp_path_factory.mktemp("conditional")
    for router in ROUTERS:
        shutil.rmtree(save_source(folder / router, original()) / "vae")
        tiny_vae().save_pretrained(folder / router / "vae")
        conditional(router).save_pretrained(folder / router / "unet_condconv")
    return {router: folder / router for router in ROUTERS}


@pytest.fixture(scope="module")
def bundles(sources: dict[Router, Path]) -> dict[Router, Bundle]:
    def made(router: Router) -> Bundle:
        options = BuildOptions(
            variant="condconv", source=str(sources[router]), granularity=None, plans=PLANS, out=sources[router] / "bundle"
        )
        return build(options)[0]

    return {router: made(router) for router in ROUTERS}


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.slow
def test_a_bundle_is_verified(bundles: dict[Router, Bundle], router: Router) -> None:
    found = list(verify(bundles[router], make_engine("onnxruntime")))
    assert {comparison.images for comparison in found} == {1, 3}
    assert max(comparison.error for comparison in found) < FP32


@pytest.mark.parametrize("router", ROUTERS)
def test_a_bundle_is_what_it_is_by_hand(bundles: dict[Router, Bundle], router: Router) -> None:
    unet = conditional(router)
    network = runtime.LoadedBundle.load(bundles[router], make_engine("onnxruntime"))
    for rows, side in itertools.product((1, 3), (8, 12)):
        sample, timestep, text = inputs(rows, side)
        text = torch.cat([text, torch.zeros(rows, 32 - text.shape[1], 16)], dim=1)
        found = network.compute("head", {"sample": sample, "timestep": timestep, "text_encoder": text})
        expected = unet_by_hand(unet, sample, timestep.expand(rows), text)
        assert relative_error(found, expected) < FP32
        assert relative_error(twin(unet)(sample, timestep, text).sample.detach(), expected) > 1e-2


@pytest.mark.parametrize("router", ROUTERS)
def test_no_convolution_is_done_for_each_expert(bundles: dict[Router, Bundle], router: Router) -> None:
    """What keeps it as fast: of each conditional convolution there is one, in a Scan where samples have their own kernels."""
    manifest, unet = bundles[router].manifest, conditional(router)
    segments = [segment for segment in manifest.segments if set(segment.units) & set(manifest.unet_units[1:])]
    paths = [bundles[router].path(segment.onnx[0]) for segment in segments if "text_encoder" not in segment.units]
    nodes = [node for path in paths for node in onnx.load(path, load_external_data=False).graph.node]
    scans = [node for node in nodes if node.op_type == "Scan"]
    inside = [inner.op_type for scan in scans for attribute in scan.attribute for inner in attribute.g.node]
    placed = sum(isinstance(module, CondConv2d) for module in unet.modules())
    assert len(scans) == inside.count("Conv") == (placed if router == "features" else 0)
    expected = sum(isinstance(module, nn.Conv2d) for module in twin(unet).modules())
    assert sum(node.op_type == "Conv" for node in nodes) + inside.count("Conv") == expected


@pytest.mark.parametrize("router", ROUTERS)
def test_pictures(bundles: dict[Router, Bundle], router: Router) -> None:
    """A picture is the same alone and among three: nothing leaks from sample to sample."""
    pipeline = runtime.Pipeline(bundles[router], make_engine("onnxruntime"))
    for plan in ("full", *PLANS):
        alone = pipeline.generate("a red star", steps=4, seed=5, plan=plan)
        three = pipeline.generate("a red star", steps=4, seed=5, plan=plan, num_images=3)
        assert np.abs(np.asarray(alone.image, dtype=int) - np.asarray(three.images[0], dtype=int)).max() <= 1
        assert len(three.images) == 3


def test_segments_that_run_are_those_of_the_twin(bundles: dict[Router, Bundle]) -> None:
    """Inheritance by block, by branch and by unit, on the null engine: experts change nothing about what a plan runs."""
    manifest = bundles["timestep"].manifest
    plain = manifest_of(twin(conditional("timestep")), None, PLANS)
    inside = [segment for segment in manifest.segments if set(segment.units) <= {unit.name for unit in plain.units}]
    assert [(s.name, s.units, s.inputs, s.outputs) for s in inside] == [
        (s.name, s.units, s.inputs, s.outputs) for s in plain.segments
    ]
    pipeline = runtime.Pipeline(bundles["timestep"], make_engine("null"))
    for plan in PLANS:
        ran = [[step.ran for step in pipeline.generate("x", steps=4, plan=plan, num_images=n).steps] for n in (1, 3)]
        assert ran[0] == ran[1]
        assert len(ran[0][1]) < len(ran[0][0]) == len(plain.segments)


def segment_in(unet: UNet2DConditionModel, segment: Segment, manifest: Manifest, form: Form) -> SegmentModule:
    """A segment whose conditional convolutions are in another form than bundles have."""
    units = [unit for unit in manifest.units if unit.name in segment.units]
    modules = {unit.name: unit_module(unet, unit.name) for unit in units}
    for name, module in modules.items():
        if isinstance(module, CondConvBranch):
            resnet = unet.get_submodule(tuning.unit_modules(unet)[name.removesuffix(".branch")])
            assert isinstance(resnet, CondConvResnet)
            modules[name] = CondConvBranch(resnet, form)
    return SegmentModule(units, modules, segment.inputs, segment.outputs)


@pytest.mark.parametrize(("router", "form"), [case for case in CASES if case[1] != "grouped"])
@pytest.mark.slow
def test_tensorrt_rtx_compiles_it(router: Router, form: Form, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    unet = conditional(router)
    manifest = manifest_of(unet, "unit")
    name = "up.1.layer.1.resnet"
    segment = next(segment for segment in manifest.segments if segment.name == name)
    made = trace(
        segment, segment_in(unet, segment, manifest, form), manifest.features, depth_factor(unet), tmp_path / "segment.onnx"
    )

    def shapes(rows: int, side: int) -> dict[str, tuple[int, ...]]:
        sizes = {"batch": rows, "height": side, "width": side}
        return {put: resolve(manifest.features[put].shape, sizes) for put in segment.inputs}

    engine = make_engine("tensorrt-rtx")
    (path,) = engine.compile(made, tmp_path / "engine", Profile(shapes(1, 8), shapes(2, 8), shapes(6, 16)), ("sm86", "sm89"))
    assert path.stat().st_size > 10_000


@pytest.mark.slow
def test_tensorrt_rtx_builds_every_segment(sources: dict[Router, Path], tmp_path: Path) -> None:
    """The whole variant, as `build --variant condconv --engine tensorrt-rtx` does; layers of the other router are above."""
    pytest.importorskip("tensorrt_rtx")
    options = BuildOptions(
        variant="condconv", source=str(sources["timestep"]), engines=("tensorrt-rtx",), granularity=None, plans=("full",),
        precision="fp16", max_images=1, targets=("sm89",), out=tmp_path / "bundle",
    )  # fmt: skip
    bundle, _ = build(options)
    segments = bundle.manifest.segments
    assert set(bundle.manifest.unet_units) <= {unit for segment in segments for unit in segment.units}
    for segment in segments:
        made = segment.engines["tensorrt-rtx"]
        assert made.targets == ("sm89",)
        (file,) = made.files
        assert bundle.path(file).stat().st_size == file.bytes > 10_000
