"""Tables for people: the segments of a bundle, its features, and what its plans cost."""

from collections.abc import Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from engines import Bundle, Manifest, Segment
from engines.manifest import File
from runtime.cost import relative_macs
from runtime.errors import PlanError
from runtime.plan import check_runs
from runtime.presets import PRESETS, find_plan

__all__ = ["show_bundle", "show_segments"]

_MIB = 2**20


def show_segments(bundle: Bundle, console: Console) -> None:
    """Print one row per segment: units, parameters, MACs, file sizes, seconds that its build took, and engines."""
    manifest = bundle.manifest
    height, width = manifest.sizes[0]
    made_from = f"{manifest.variant} UNet of {manifest.source}, {manifest.precision}"
    title = f"{bundle.folder}: {made_from}; MACs of one row at {height}x{width}"
    table = Table(title=title, box=SIMPLE)
    table.add_column("segment", no_wrap=True)
    for name in ("units", "params M", "MMACs", "MiB", "build s"):
        table.add_column(name, justify="right")
    table.add_column("engines")
    for segment in manifest.segments:
        table.add_row(segment.name, *_format(*_amounts(manifest, segment)), _engines(segment))
    table.add_section()
    rows = [_amounts(manifest, segment) for segment in manifest.segments]
    table.add_row("all", *_format(*(sum(column) for column in zip(*rows, strict=True))))
    console.print(table)


def _engines(segment: Segment) -> str:
    """Each engine with the size of its files, and the GPUs it was made for."""
    names = [f"onnxruntime {_mib(segment.onnx)}"]
    for name, compiled in segment.engines.items():
        names.append(" ".join([name, _mib(compiled.files), *compiled.targets]))
    return ", ".join(names)


def _mib(files: Sequence[File]) -> str:
    return f"{sum(file.bytes for file in files) / _MIB:.2f}"


def _amounts(manifest: Manifest, segment: Segment) -> tuple[float, ...]:
    units = [unit for unit in manifest.units if unit.name in segment.units]
    files = [*segment.onnx, *(file for compiled in segment.engines.values() for file in compiled.files)]
    return (
        len(units),
        sum(unit.parameters for unit in units),
        sum(unit.macs for unit in units),
        sum(file.bytes for file in files),
        segment.seconds,
    )


def _format(*amounts: float) -> tuple[str, ...]:
    units, parameters, macs, size, seconds = amounts
    return f"{units:.0f}", f"{parameters / 1e6:.3f}", f"{macs / 1e6:,.1f}", f"{size / _MIB:.2f}", f"{seconds:.1f}"


def show_bundle(bundle: Bundle, console: Console) -> None:
    """Print everything about a bundle that a person may want to know."""
    manifest = bundle.manifest
    show_segments(bundle, console)
    table = Table(title="features between segments", box=SIMPLE)
    for name in ("feature", "dtype", "shape", "made by", "read by"):
        table.add_column(name)
    for segment in manifest.segments:
        for name in segment.outputs:
            feature = manifest.features[name]
            readers = [reader.name for reader in manifest.segments if name in reader.inputs]
            shape = " x ".join(str(dim) for dim in feature.shape)
            table.add_row(name, feature.dtype, shape, segment.name, ", ".join(readers) or "the caller")
    console.print(table)
    console.print(_plans(manifest))
    sizes = ", ".join(f"{height}x{width}" for height, width in manifest.sizes)
    console.print(
        f"sizes {sizes} (multiples of {manifest.size_multiple}), up to {manifest.max_images} images per call", highlight=False
    )
    console.print("made with " + ", ".join(f"{name} {version}" for name, version in manifest.made_with.items()), highlight=False)


def _plans(manifest: Manifest) -> Table:
    table = Table(title="plans that this bundle runs (MACs of an average step, relative to full)", box=SIMPLE)
    for name in ("plan", "what is inherited", "MACs"):
        table.add_column(name)
    for preset in PRESETS:
        for spec in [preset] if preset == "full" else [f"{preset}:2", f"{preset}:3", f"{preset}:5"]:
            try:
                plan = find_plan(spec, manifest.unet_units)
                schedule = plan.schedule(30, manifest.unet_units)
                check_runs(plan, schedule, manifest)
                table.add_row(spec, ", ".join(plan.inherit) or "nothing", f"{relative_macs(schedule, manifest):.3f}")
            except PlanError as error:
                table.add_row(spec, f"cannot run: {error}", "-")
    return table
