"""What TensorRT-RTX makes of segments, seen with no GPU: every attention and every group norm of a UNet is one kernel."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from rich.console import Console

from benchmarks.old_precision import OLD_WIDE, write_wide
from engines import Bundle, Profile, Traced
from engines.support.tables import fit
from engines.tensorrt.engine import TensorRTRTX
from engines.tensorrt.kernels import CompiledKernels, Kernel, read_kernels
from exporter import BuildOptions, build
from exporter.graph.checkpoint import open_source
from exporter.graph.graph import load_graph
from exporter.graph.segmentation import segments_of
from exporter.kernels import KernelCounts, count_kernels, counts_of_bundle, kernel_table, total
from exporter.segments.precision import WIDE
from exporter.segments.trace import OPSET, trace_program, write_onnx
from exporter.segments.writer import profile_of
from tests.support.commands import Command
from tests.support.sources import save_source
from tests.support.unets import small_unet

pytest.importorskip("tensorrt_rtx")


@pytest.fixture(scope="module", autouse=True)
def compiled_once() -> Iterator[None]:
    """A segment is compiled once for a target: the tests ask for the same ones."""
    compiled: dict[tuple[object, ...], CompiledKernels] = {}
    kernels = TensorRTRTX.kernels

    def remembered(engine: TensorRTRTX, traced: Traced, profile: Profile, targets: Sequence[str]) -> CompiledKernels:
        key = traced.onnx, repr(profile), tuple(targets)
        if key not in compiled:
            compiled[key] = kernels(engine, traced, profile, targets)
        return compiled[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TensorRTRTX, "kernels", remembered)
        yield


def widths_of_heads(unet: UNet2DConditionModel) -> dict[str, int]:
    """The channels of each head of a block's attentions, for the blocks that have some."""
    attentions = ((name, part) for name, part in unet.named_modules() if isinstance(part, Attention))
    return {name.partition(".attentions.")[0]: part.inner_dim // part.heads for name, part in attentions}


@pytest.fixture(scope="module")
def wide_heads(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A small UNet in half precision, at sizes where kernels are those of large ones.

    Its heads are 16 channels wide in the outer blocks, 32 in the inner ones and 64 in the middle.
    """
    folder = tmp_path_factory.mktemp("kernels")
    channels, heads = (64, 64, 128), (4, 2, 2)
    unet = small_unet("uneven", layers_per_block=1, block_out_channels=channels, attention_head_dim=heads)
    widths = {"down_blocks.0": 16, "down_blocks.1": 32, "mid_block": 64, "up_blocks.1": 32, "up_blocks.2": 16}
    assert widths_of_heads(unet) == widths
    source = save_source(folder / "source", unet)
    return build(BuildOptions(source=str(source), precision="fp16", sizes=((128, 128),), out=folder / "bundle"))[0]


@pytest.mark.parametrize("target", TensorRTRTX.DEFAULT_TARGETS)
@pytest.mark.slow
def test_every_attention_and_every_group_norm_is_one_kernel(wide_heads: Bundle, target: str) -> None:
    manifest = wide_heads.manifest
    own = tuple(segment for segment in manifest.segments if set(segment.units) <= set(manifest.unet_units))
    unet = dataclasses.replace(wide_heads, manifest=manifest.model_copy(update={"segments": own}))
    counts = list(counts_of_bundle(unet, target))
    assert {count.segment for count in counts} == {segment.name for segment in own}
    for count in counts:
        assert (count.fused_attentions, count.fused_norms) == (count.attentions, count.norms), count
    whole = total("the UNet", counts)
    assert whole.attentions == 14, "two in each of 7 transformers"
    assert whole.norms == 30, "two in each of 11 ResNets, one in each of 7 transformers, one in the head"
    assert whole.bytes_moved == sum(count.bytes_moved for count in counts) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("wide", "fused"), [(WIDE, 1), (OLD_WIDE, 0)])
def test_a_norm_between_casts_is_not_fused(tmp_path: Path, wide: frozenset[str], fused: int) -> None:
    """TensorRT-RTX has one kernel for the instance norm of it (``Inor``) and others for casts, scale and shift."""
    size = 128, 128
    unet = small_unet("uneven", layers_per_block=1, block_out_channels=(64, 64, 128), attention_head_dim=(4, 2, 2))
    source = save_source(tmp_path / "source", unet)
    graph = load_graph(open_source(str(source), "original"), "original", torch.float16, size)
    (head,) = (segment for segment in segments_of(graph, "block") if segment.name == "head")
    program, path = trace_program(head, graph.segment_module(head), graph.features, graph.depth), tmp_path / "head.onnx"
    with write_wide(wide):
        write_onnx(program, head, path, OPSET)
    compiled = TensorRTRTX().kernels(Traced(head, path), profile_of(head, graph.features, [size], 1, graph.vae_scale), ("sm89",))
    count = count_kernels("head", path, compiled)
    assert (count.norms, count.fused_norms) == (1, fused), [kernel.name for kernel in compiled.kernels]


@pytest.mark.parametrize(
    ("names", "fused"),
    [
        (["__myl_SiluGnor_myl0_4"], 1),
        (["__myl_Gnor_myl0_10"], 1),
        (["__myl_Inor_myl0_4"], 0),
        (["__myl_CastMulAdd_myl0_4"], 0),
        (["__myl_ReshCastCastMean_myl0_1", "__myl_SubMulMean_myl0_3"], 0),
        ([], 0),
    ],
)
def test_fused_is_one_kernel_that_does_all_of_a_norm(tmp_path: Path, names: list[str], fused: int) -> None:
    node = onnx.helper.make_node("InstanceNormalization", ["x", "a", "b"], ["y"], name="norm")
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "norm", [], [])), tmp_path / "norm.onnx")
    kernels = (Kernel(name, "kgen", 8, 8, frozenset({"norm"})) for name in names)
    loads = Kernel("__myl_Move_myl0_3", "kgen", 0, 256, frozenset({"norm"}))  # of scale and shift
    count = count_kernels("norm", tmp_path / "norm.onnx", CompiledKernels((loads, *kernels), 0))
    assert (count.norms, count.fused_norms) == (1, fused)


@pytest.mark.slow
def test_the_command_prints_a_row_for_each_segment(wide_heads: Bundle, exporter: Command) -> None:
    shown = exporter("inspect", wide_heads.folder, "--kernels")
    assert shown.code == 0
    assert [segment.name for segment in wide_heads.manifest.segments if not any(segment.name in line for line in shown.out)] == []
    assert all(len(line) <= 80 for line in shown.out)
    told = json.loads("\n".join(exporter("inspect", wide_heads.folder, "--kernels", "--json", "--target", "sm86").out))
    assert told["target"] == "sm86"
    counted = {row["segment"]: KernelCounts(**row) for row in told["segments"]}
    assert counted.keys() == {segment.name for segment in wide_heads.manifest.segments}


@pytest.mark.parametrize("name", ["down.0", "up.2.layer.2.attention.part.3", "a-segment-of-a-partition-by-units." * 3])
def test_figures_are_whole_in_a_narrow_terminal(name: str) -> None:
    counts = [KernelCounts(name, 753, 32, 31, 61, 60, 121, 92, 5_432_100_000, 987_600_000)]
    console = Console(width=80, record=True)
    console.print(fit(kernel_table("a title", counts, counts), console, ("transp.", "casts")))
    shown = console.export_text()
    assert all(shown.count(figure) == 2 for figure in ("753", "31/32", "60/61", "5,432.1", "987.6"))
    assert "…" not in shown


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--kernels", "--target", "sm1"), "unknown target 'sm1'; choose from: sm75"),
        (("--kernels", "--target", ""), "unknown target ''; choose from: sm75"),
        (("--target", "sm89"), "--target goes with --kernels"),
        (("--target", ""), "--target goes with --kernels"),
        (("--json",), "--json goes with --kernels"),
    ],
)
def test_mistakes_are_one_line(wide_heads: Bundle, exporter: Command, options: tuple[str, ...], reason: str) -> None:
    done = exporter("inspect", wide_heads.folder, *options)
    assert done.code == 2
    assert reason in done.err[-1]


LINE = (
    "Name: __myl_SiluGnor_myl0_4, LayerType: kgen, Inputs: [ { Name: a, Dimensions: [2,8,4,4], Strides: [1], Datatype: Half }, "
    "{ Name: b, Dimensions: [3], Datatype: Float }], Constants: [], "
    "Outputs: [ { Name: c, Dimensions: [2,8,4,4], Datatype: Half }], "
    "TacticName: t, StreamId: 0, Metadata: [ONNX Layer: node_norm][ONNX Layer: node_silu]"
)


def test_a_line_of_the_log() -> None:
    wait = "Name: w, LayerType: wait, Inputs: [], Constants: [], Outputs: [], TacticName: , Metadata:"
    log = ["Total Activation Memory: 512 bytes", f"Layers:\n{LINE}\n{wait}"]
    found = read_kernels(log)
    assert found.kernels == (Kernel("__myl_SiluGnor_myl0_4", "kgen", 512 + 12, 512, frozenset({"node_norm", "node_silu"})),)
    assert found.scratch_bytes == 512
    assert found.kernels[0].steps == ("Silu", "Gnor")
    assert found.computing("node_norm") == found.kernels
    with pytest.raises(ValueError, match="no list of kernels"):
        read_kernels(["nothing"])
