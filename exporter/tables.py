"""Tables for people: the segments of a bundle, its features, and what its plans cost."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from shlex import quote

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from engines import ON_ONNX, Bundle, Manifest, Segment
from engines.bundle.names import VAE
from engines.support.tables import fit
from runtime.advice import for_plan_too
from runtime.errors import PartitionError, PlanError
from runtime.execution.siblings import lay_out_part
from runtime.plans.checks import check_runs
from runtime.plans.plan import Plan
from runtime.plans.presets import PRESETS, find_plan
from runtime.report.cost import from_to, relative_macs

__all__ = ["show_built", "show_bundle", "show_segments"]

_MIB = 2**20
_FUSING_HALVES = ("tensorrt", "tensorrt-rtx")
"""The engines that fuse in half precision what they do not in single (docs/onnx.md)."""
_MOST_NAMED = 3
_TIMESTEPS = tuple(range(950, -1, -50))
"""Of 20 steps, as many as are run by default, to show costs for."""


def show_built(bundle: Bundle, built: bool, console: Console, *, as_json: bool = False) -> None:
    """Print what a build made, with warnings on the error stream: where its pictures will suffer, or where it will be slow."""
    manifest, advice, check = bundle.manifest, _precision_advice(bundle), _vae_check(bundle)
    if as_json:
        sizes = {segment.name: sum(file.bytes for file in segment.onnx) for segment in manifest.segments}
        told = {"bundle": str(bundle.folder), "built": built, "distilled": manifest.distilled, "onnx_bytes": sizes}
        further = {"notes": manifest.notes, "advice": advice, "vae_check": check}
        console.out(json.dumps(told | {name: value for name, value in further.items() if value}), highlight=False)
    else:
        show_segments(bundle, console)
    if not manifest.distilled:
        print(
            f"warning: the {manifest.variant} UNet was cut out of {manifest.source}'s and not distilled since, "
            "so pictures suffer",
            file=sys.stderr,
        )
    if advice:
        print(f"warning: {advice}", file=sys.stderr)
    if not as_json:
        if check:
            console.print(f"whether the VAE's numbers fit into half precision: {check}", highlight=False, soft_wrap=True)
        console.print(f"{'built' if built else 'up to date:'} {bundle.folder}", highlight=False, soft_wrap=True)


def _precision_advice(bundle: Bundle) -> str:
    """What engines make of single precision that half would spare them, and the build that does; empty where there is nothing."""
    manifest = bundle.manifest
    engines = [name for name in _engines(manifest) if name in _FUSING_HALVES]
    if manifest.precision != "fp32" or not engines:
        return ""
    half = replace(bundle, manifest=manifest.model_copy(update={"precision": "fp16"}))
    return (
        f"in fp32 {' and '.join(engines)} fuse no attention, so that the scores of every query with every key go through the "
        f"GPU's memory; unless the last digits count, build in fp16: {half.rebuild_command(engines[0])}"
    )


def _vae_check(bundle: Bundle) -> str:
    """The command that finds out whether the VAE overflows in half precision; empty where it is in none.

    Engines compute the same numbers there, so any that runs here will do: ONNX Runtime, where the bundle has ONNX files.
    """
    manifest = bundle.manifest
    halves = [segment for segment in manifest.segments if VAE.issuperset(segment.units)]
    if not any(manifest.precision_of(segment) == "fp16" for segment in halves):
        return ""
    engine = "" if all(segment.onnx for segment in manifest.segments) else f" --engine {next(iter(halves[0].engines))}"
    return f"python -m exporter verify {quote(str(bundle.folder))}{engine}"


def show_segments(bundle: Bundle, console: Console) -> None:
    """Print one row per segment: units, parameters, MACs, seconds that its build took, and the size of each engine's files."""
    manifest = bundle.manifest
    engines = _engines(manifest)
    height, width = manifest.sizes[0]
    vae = f", VAE {manifest.vae_precision}" if manifest.vae_precision else ""
    made_from = f"{manifest.variant} UNet of {manifest.source}, {manifest.precision}{vae}"
    table = Table(title=f"{bundle.folder}: {made_from}; MACs of one row at {height}x{width}", box=SIMPLE)
    table.add_column("segment", no_wrap=True)
    for name in ("units", "params\nM", "MACs\nM", "build\ns", *(f"{name}\nMiB" for name in engines)):
        table.add_column(name, justify="right")
    rows = [_amounts(manifest, segment, engines) for segment in manifest.segments]
    for segment, amounts in zip(manifest.segments, rows, strict=True):
        table.add_row(segment.name, *_format(*amounts))
    table.add_section()
    table.add_row("all", *_format(*(sum(column) for column in zip(*rows, strict=True))))
    console.print(fit(table, console, ["units", "build\ns", "params\nM"]))
    for name in engines:
        targets = {compiled.targets for segment in manifest.segments if (compiled := segment.engines.get(name))}
        for target in filter(None, targets):
            console.print(f"{name}: built for {', '.join(target)}", highlight=False)
    for line in _replaced(manifest):
        console.print(line, highlight=False, soft_wrap=True)


def _replaced(manifest: Manifest) -> Iterator[str]:
    """The VAE and LoRAs that the weights are made from beside the source, and remarks on them, line by line."""
    if manifest.vae is not None:
        yield f"VAE of {manifest.vae}"
    for lora in manifest.loras:
        yield f"LoRA {lora.file} at {lora.scale:g} ({lora.sha256[:12]})"
    yield from manifest.notes


def _engines(manifest: Manifest) -> tuple[str, ...]:
    """The engines that can run the bundle: ONNX Runtime takes the segments as they are."""
    return tuple(dict.fromkeys(["onnxruntime", *(name for segment in manifest.segments for name in segment.engines)]))


def _amounts(manifest: Manifest, segment: Segment, engines: Sequence[str]) -> tuple[float, ...]:
    units = [unit for unit in manifest.units if unit.name in segment.units]
    files = {"onnxruntime": segment.onnx} | {name: compiled.files for name, compiled in segment.engines.items()}
    return (
        len(units),
        sum(unit.parameters for unit in units),
        sum(unit.macs for unit in units),
        segment.seconds,
        *(sum(file.bytes for file in files.get(name, ())) for name in engines),
    )


def _format(units: float, parameters: float, macs: float, seconds: float, *sizes: float) -> tuple[str, ...]:
    numbers = f"{units:.0f}", f"{parameters / 1e6:.3f}", f"{macs / 1e6:,.1f}", f"{seconds:.1f}"
    return *numbers, *(f"{size / _MIB:.2f}" for size in sizes)


def show_bundle(bundle: Bundle, console: Console) -> None:
    """Print everything about a bundle that a person may want to know."""
    manifest = bundle.manifest
    show_segments(bundle, console)
    table = Table(title="features between segments", box=SIMPLE)
    for name in ("feature", "dtype", "shape", "read by"):
        table.add_column(name, no_wrap=name == "feature")
    for segment in manifest.segments:
        for name in segment.outputs:
            feature = manifest.features[name]
            readers = [reader.name for reader in manifest.segments if name in reader.inputs]
            shape = "(" + ", ".join(str(dim) for dim in feature.shape) + ")"
            read_by = ", ".join(readers) if len(readers) <= _MOST_NAMED else f"{len(readers)} segments"
            table.add_row(name, feature.dtype, shape, read_by or "the caller")
    console.print(fit(table, console, ["read by", "dtype"]))
    console.print(fit(_plans(manifest), console, []))
    console.print(f"for plans of another partition: {for_plan_too(bundle, 'PLAN')}", highlight=False, soft_wrap=True)
    sizes = ", ".join(f"{height}x{width}" for height, width in manifest.sizes)
    images = f"exactly {manifest.max_images} (static)" if manifest.static else f"up to {manifest.max_images}"
    console.print(f"sizes {sizes} (multiples of {manifest.size_multiple}), {images} images per call", highlight=False)
    console.print(f"its ONNX files run in {', '.join(ON_ONNX)}", highlight=False, soft_wrap=True)
    console.print("made with " + ", ".join(f"{name} {version}" for name, version in manifest.made_with.items()), highlight=False)


def _plans(manifest: Manifest) -> Table:
    table = Table(title=f"plans of this UNet (MACs of {len(_TIMESTEPS)} steps, relative to full)", box=SIMPLE)
    for name in ("plan", "what is inherited", "MACs"):
        table.add_column(name, no_wrap=name != "what is inherited")
    built_for = [plan for plan in manifest.plans if plan not in {preset.example for preset in PRESETS.values()}]
    for name in (*built_for, *(preset.example for preset in PRESETS.values())):
        table.add_row(name, *_row(manifest, name))
    return table


def _row(manifest: Manifest, name: str) -> tuple[str, str]:
    try:
        plan = find_plan(name)
    except PlanError as error:  # the bundle was built for a file that is gone or was changed
        return str(error), "-"
    return _cost(manifest, plan)


def _cost(manifest: Manifest, plan: Plan) -> tuple[str, str]:
    """Return what a plan inherits, or why the bundle cannot run it; and its MACs, where they are this UNet's alone."""
    try:
        schedule = lay_out_part(plan, manifest, _TIMESTEPS, guided=True)
        check_runs(schedule)
    except PartitionError:
        return "other partition", "-"
    except PlanError as error:
        return f"not with this UNet: {error}", "-"
    others = ", ".join(name for name in dict.fromkeys(part.unet for part in plan.unets) if name != manifest.variant)
    if others:
        return f"this UNet's part can run; beside the bundle there must be one of {others}", "-"
    inherited = [f"{' '.join(rule.units)} by {rule.kind}" for rule in plan.rules]
    inherited += ["what guidance added"] if plan.guidance is not None else []
    least, most = (relative_macs(schedule, changed=changed) for changed in (False, True))
    return ", ".join(inherited) or "nothing", from_to(least, most, digits=2)
