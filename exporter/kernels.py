"""Counts of the kernels that TensorRT-RTX compiles segments to, taken without a GPU: ``inspect BUNDLE --kernels``."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from engines import Bundle, EngineError, Profile, Segment, Traced, make_engine
from engines.onnx_file import checked_onnx
from engines.support.tables import fit
from engines.tensorrt.engine import TensorRTRTX
from engines.tensorrt.kernels import CompiledKernels, Kernel

__all__ = ["DEFAULT_TARGET", "KernelCounts", "count_kernels", "counts_of_bundle", "kernel_table", "show_kernels", "total"]

DEFAULT_TARGET = "sm89"
_OPTIONAL = ("transp.", "casts")
"""Columns that go where a terminal is too narrow for the names of segments beside all of them."""
_ATTENTION = frozenset({"Softmax", "Attention"})
"""Operators of which each attention has one."""
_NORM = frozenset({"InstanceNormalization", "GroupNormalization"})
"""Operators of which each group norm has one."""


@dataclass(frozen=True)
class KernelCounts:
    """Counts of the kernels that one segment was compiled to, at its profile's optimum.

    ``attentions`` and ``norms`` are in the ONNX file; ``fused_attentions`` and ``fused_norms`` of them became one kernel each.
    ``casts`` and ``transposes`` are kernels that do nothing else. ``bytes_moved`` is what all kernels read and write of
    activations, ``scratch_bytes`` the memory that the engine works in.
    """

    segment: str
    kernels: int
    attentions: int
    fused_attentions: int
    norms: int
    fused_norms: int
    casts: int
    transposes: int
    bytes_moved: int
    scratch_bytes: int


def count_kernels(segment: str, path: Path, compiled: CompiledKernels) -> KernelCounts:
    """Count what an ONNX file's attentions and group norms became."""
    nodes = onnx.load(path, load_external_data=False).graph.node
    attentions = [node.name for node in nodes if node.op_type in _ATTENTION]
    norms = [node.name for node in nodes if node.op_type in _NORM]
    return KernelCounts(
        segment=segment,
        kernels=len(compiled.kernels),
        attentions=len(attentions),
        fused_attentions=sum(any(k.is_fused_attention for k in compiled.computing(name)) for name in attentions),
        norms=len(norms),
        fused_norms=sum(_is_one_kernel(compiled.computing(name)) for name in norms),
        casts=sum(kernel.only("Cast", "Move") and "Cast" in kernel.steps for kernel in compiled.kernels),
        transposes=sum(kernel.only("Tran", "Move") and "Tran" in kernel.steps for kernel in compiled.kernels),
        bytes_moved=compiled.bytes_moved,
        scratch_bytes=compiled.scratch_bytes,
    )


def _is_one_kernel(computing: Sequence[Kernel]) -> bool:
    """Whether the kernels that compute a group norm are one which does all of it."""
    return len(computing) == 1 and computing[0].is_fused_norm


def counts_of_bundle(bundle: Bundle, target: str = DEFAULT_TARGET) -> Iterator[KernelCounts]:
    """Compile every segment for one compute capability, and count.

    Raises:
        EngineError: TensorRT-RTX is not installed, does not know the target, or refuses a segment.
        BundleError: a file is missing or damaged.
    """
    engine = make_engine("tensorrt-rtx")
    if not isinstance(engine, TensorRTRTX):
        raise EngineError("kernels are listed by engine tensorrt-rtx only")
    engine.check_targets((target,))
    for segment in bundle.manifest.segments:
        path = checked_onnx(bundle, segment.onnx)
        yield count_kernels(segment.name, path, engine.kernels(Traced(segment, path), _profile(bundle, segment), (target,)))


def _profile(bundle: Bundle, segment: Segment) -> Profile:
    from exporter.segments.writer import profile_of

    manifest = bundle.manifest
    sizes, scale, chunks = manifest.sizes, manifest.vae_scale, manifest.text_chunks
    return profile_of(segment, manifest.features, sizes, manifest.max_images, scale, manifest.static, chunks)


def total(name: str, counts: Iterable[KernelCounts]) -> KernelCounts:
    """The sum of several segments; scratch memory, which they share, is the largest."""
    rows = [asdict(count) for count in counts]
    summed = {key: sum(row[key] for row in rows) for key in rows[0] if key not in {"segment", "scratch_bytes"}}
    return KernelCounts(segment=name, scratch_bytes=max(row["scratch_bytes"] for row in rows), **summed)


def show_kernels(bundle: Bundle, console: Console, target: str = DEFAULT_TARGET, *, as_json: bool = False) -> None:
    """Print what every segment is compiled to, and what the UNet is in all."""
    counts = list(counts_of_bundle(bundle, target))
    if as_json:
        console.out(json.dumps({"target": target, "segments": [asdict(count) for count in counts]}, indent=1), highlight=False)
        return
    unet = {segment.name for segment in bundle.manifest.segments if set(segment.units) <= set(bundle.manifest.unet_units)}
    height, width = bundle.manifest.sizes[0]
    title = f"{bundle.folder} as compiled for {target}: {height}x{width}, one image with guidance"
    table = kernel_table(title, counts, [count for count in counts if count.segment in unet])
    console.print(fit(table, console, _OPTIONAL))


def kernel_table(title: str, counts: Sequence[KernelCounts], unet: Sequence[KernelCounts]) -> Table:
    """A row for each segment, and the sum of the UNet's."""
    table = Table(title=title, box=SIMPLE)
    table.add_column("segment")
    for name in ("kernels", "fused\nattn.", "fused\nnorms", "casts", "transp.", "MB\nmoved", "MB\nscratch"):
        table.add_column(name, justify="right", no_wrap=True)
    for count in counts:
        table.add_row(*_cells(count))
    table.add_section()
    table.add_row(*_cells(total("the UNet", unet)))
    return table


def _cells(count: KernelCounts) -> tuple[str, ...]:
    return (
        count.segment,
        str(count.kernels),
        f"{count.fused_attentions}/{count.attentions}",
        f"{count.fused_norms}/{count.norms}",
        str(count.casts),
        str(count.transposes),
        f"{count.bytes_moved / 1e6:,.1f}",
        f"{count.scratch_bytes / 1e6:,.1f}",
    )
