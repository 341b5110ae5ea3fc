"""Tables for people: the segments of a bundle, its features, and what its plans cost."""

from rich.console import Console
from rich.table import Table

from engines import Bundle, Manifest, Segment
from runtime.cost import relative_macs
from runtime.errors import PlanError
from runtime.plan import check_runs
from runtime.presets import PRESETS, find_plan

__all__ = ["show_bundle", "show_segments"]

_MIB = 2**20


def show_segments(bundle: Bundle, console: Console) -> None:
    """Print one row per segment: units, parameters, MACs, file sizes and engines."""
    manifest = bundle.manifest
    height, width = manifest.sizes[0]
    table = Table(title=f"{bundle.folder}: {manifest.variant} UNet of {manifest.source}, {manifest.precision}")
    table.add_column("segment")
    for name in ("units", "params M", f"MMACs at {height}x{width}", "ONNX MiB", "engines MiB"):
        table.add_column(name, justify="right")
    table.add_column("engines")
    for segment in manifest.segments:
        table.add_row(segment.name, *_numbers(manifest, segment), ", ".join(_engines(segment)))
    table.add_section()
    table.add_row("all", *_totals(manifest), "")
    console.print(table)


def _engines(segment: Segment) -> list[str]:
    names = ["onnxruntime"] if segment.onnx else []
    for name, compiled in segment.engines.items():
        names.append(f"{name} ({' '.join(compiled.targets)})" if compiled.targets else name)
    return names


def _amounts(manifest: Manifest, segment: Segment) -> tuple[int, int, int, int, int]:
    units = [unit for unit in manifest.units if unit.name in segment.units]
    compiled = sum(file.bytes for engine in segment.engines.values() for file in engine.files)
    return (
        len(units),
        sum(unit.parameters for unit in units),
        sum(unit.macs for unit in units),
        sum(file.bytes for file in segment.onnx),
        compiled,
    )


def _format(units: int, parameters: int, macs: int, onnx: int, compiled: int) -> tuple[str, ...]:
    return str(units), f"{parameters / 1e6:.3f}", f"{macs / 1e6:,.1f}", f"{onnx / _MIB:.2f}", f"{compiled / _MIB:.2f}"


def _numbers(manifest: Manifest, segment: Segment) -> tuple[str, ...]:
    return _format(*_amounts(manifest, segment))


def _totals(manifest: Manifest) -> tuple[str, ...]:
    rows = [_amounts(manifest, segment) for segment in manifest.segments]
    return _format(*(sum(column) for column in zip(*rows, strict=True)))  # type: ignore[arg-type]


def show_bundle(bundle: Bundle, console: Console) -> None:
    """Print everything about a bundle that a person may want to know."""
    manifest = bundle.manifest
    show_segments(bundle, console)
    table = Table(title="features between segments")
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
    table = Table(title="plans that this bundle runs (MACs of an average step, relative to full)")
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
