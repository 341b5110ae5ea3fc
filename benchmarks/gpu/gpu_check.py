"""`make gpu-check`: the whole of what runs on an NVIDIA GPU, on the one at hand: right, and how fast.

For every engine that can be had and both precisions: error and cosine of each segment against the diffusers model, in half
precision also the PSNR of the latents after twenty steps; for each plan, the error of the final latents against the torch engine
in float32, run piece by piece; whether steps replayed as CUDA graphs give what they give piece by piece; memory; and the time of
a picture's UNet steps both ways. Of memory, the planned bytes of features are compared with those held between segments, which
must be within a tenth; what segments need inside, weights, scratch and what the device has lost in all are only reported. An
engine that breaks off, while it is built, loaded or run, is a fault; the others go on. Writes
benchmarks/results/gpu-CARD-SOURCE-VARIANT.json.
"""

import argparse
import gc
import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.machine import machine
from engines import DTYPES, ENGINES, Bundle, Engine, EngineError, Runner, make_engine
from engines.bundle.names import SAMPLE, TEXT
from engines.bundle.shapes import resolve
from engines.errors import EngineMemoryError, UserError
from engines.ort.engine import OnnxRuntime
from engines.support.cli import Parser, parse_size, run_command
from engines.torch_program import Torch
from exporter import BuildOptions, build
from exporter.graph.graph import DTYPE
from exporter.verification.command import FP16_STEPS
from exporter.verification.verify import LEAST_COSINE, LEAST_PSNR, TOLERANCE, compare_latents, verify
from runtime import Executor, Pipeline, find_plan
from runtime.execution.loaded_bundle import LoadedBundle
from runtime.execution.swapping import free_bytes
from runtime.images.schedulers import make_scheduler
from runtime.report.cost import peak_bytes

__all__ = ["main"]

PROMPT = "a red star on a blue background"
PLANNED = 0.1
"""How far, relative to what is planned, the memory of features may be off."""


@dataclass(frozen=True)
class Row:
    """A plan on an engine. Errors are the largest, relative to the largest value; None where there is nothing to measure."""

    engine: str
    precision: str
    plan: str
    error: float | None
    """Of the final latents, run piece by piece, against the torch engine in float32; None where that did not run before."""
    graphs_error: float | None
    """Of the final latents with steps replayed, against the same piece by piece."""
    milliseconds: float
    """Of a picture's UNet steps, piece by piece; the median of the rounds."""
    graphs_milliseconds: float | None
    planned_bytes: int
    """Of features at once, between segments; compared with the next."""
    features_bytes: int | None
    """Of features at once, as PyTorch's allocator has them after every segment."""
    peak_bytes: int | None
    """As it has them at any time: what PyTorch itself needs inside a segment is in it, but no other library's own memory."""

    @property
    def name(self) -> str:
        """What was run."""
        return f"{self.engine} {self.precision} {self.plan}"


@dataclass(frozen=True)
class Fit:
    """How near a segment comes to the diffusers model: the largest error, relative to the largest value, and the least cosine."""

    error: float
    cosine: float


@dataclass(frozen=True)
class Memory:
    """An engine's memory beside features; compared with nothing."""

    weights_bytes: int
    """Of the UNet's files."""
    scratch_bytes: int
    """What the engine says that it works in, for each stream; 0 where it does not say."""
    device_bytes: int | None
    """What the whole device had less at the end than at the beginning, by its driver: with all that libraries keep."""


@dataclass
class Found:
    """What the check has found, by engine and precision."""

    rows: list[Row] = field(default_factory=list)
    segments: dict[str, dict[str, Fit]] = field(default_factory=dict)
    psnr: dict[str, float] = field(default_factory=dict)
    """Of half precision's latents, in decibels."""
    memory: dict[str, Memory] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    """Why an engine could not be had."""
    ended: dict[str, str] = field(default_factory=dict)
    """How an engine broke off in the middle."""

    def faults(self) -> list[str]:
        """What is not as it must be. Errors of final latents depend on the plan and the model, and are only reported."""
        faults = [f"{name}: broke off: {reason}" for name, reason in self.ended.items()]
        for name, fits in self.segments.items():
            allowed = TOLERANCE["fp16" if name.endswith("fp16") else "fp32"]
            for segment, fit in fits.items():
                if not (fit.error <= allowed and fit.cosine >= LEAST_COSINE):
                    faults.append(f"{name}: segment {segment} is off by {fit.error:.1e}, its cosine by {1 - fit.cosine:.1e}")
        for name, psnr in self.psnr.items():
            if not psnr >= LEAST_PSNR:
                faults.append(f"{name}: latents have a PSNR of {psnr:.1f} dB, not {LEAST_PSNR:g}")
        # Replayed or not, the same kernels run; only what picks another kernel inside a graph can make a difference.
        off = [row for row in self.rows if row.graphs_error is not None and not row.graphs_error <= 1e-3]
        faults += [f"{row.name}: replayed steps are off by {row.graphs_error:.1e}" for row in off]
        return faults + [
            f"{row.name}: features of {row.planned_bytes} bytes are planned, {row.features_bytes} held"
            for row in self.rows
            if row.features_bytes is not None and abs(row.features_bytes - row.planned_bytes) > PLANNED * row.planned_bytes
        ]


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        found = "it finds none" if torch.version.cuda else f"PyTorch {torch.__version__} is built without CUDA"
        raise UserError(
            f"the check needs an NVIDIA GPU and a PyTorch built for CUDA ({found}); run it where there is one, or try the "
            "program itself, on the torch engine, with --device cpu --engines torch"
        )
    return torch.device(name)


def _engine(name: str, device: torch.device) -> Engine:
    if name == "torch":
        return Torch(device)
    if name == "onnxruntime":
        return OnnxRuntime(device=device)
    if device.type != "cuda":
        raise EngineError(f"engine {name} runs on an NVIDIA GPU only; leave it out of --engines")
    return make_engine(name)


def _relative(made: Tensor, reference: Tensor) -> float:
    return float((made.float().cpu() - reference.float().cpu()).abs().max() / reference.float().abs().max().cpu())


def _bundle(options: argparse.Namespace, engine: str, precision: str) -> Bundle:
    wanted = BuildOptions(
        variant=options.variant,
        source=options.source,
        engines=(engine,),
        plans=tuple(options.plans),
        precision=precision,  # type: ignore[arg-type]
        sizes=(options.size,) if options.size else (),
        max_images=1,
        out=options.work / f"{Path(options.source).name}-{options.variant}-{engine}-{precision}".replace(":", "-"),
        force=True,
    )
    return build(wanted)[0]


def _run(pipeline: Pipeline, plan: str, options: argparse.Namespace) -> tuple[Tensor, float]:
    """Final latents of a plan, and the median seconds of its steps over the rounds; the first round warms up and records."""
    seconds = []
    for _ in range(options.rounds + 1):
        made = pipeline.generate(PROMPT, steps=options.steps, seed=1, plan=plan)
        seconds.append(sum(record.seconds for record in made.steps))
    return made.latents, statistics.median(seconds[1:])


class _Watched:
    """A runner after whose runs somebody looks at the memory that is held."""

    def __init__(self, runner: Runner, look: Callable[[], None]) -> None:
        self._runner, self._look = runner, look

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        outputs = self._runner.run(inputs)
        self._look()
        return outputs


def _allocated(device: torch.device) -> int | None:
    """Bytes that PyTorch's allocator has been asked for, not what it made of them; None where it does not count."""
    return torch.cuda.memory_stats(device)["requested_bytes.all.current"] if device.type == "cuda" else None


def _memory(pipeline: Pipeline, plan: str, steps: int) -> tuple[int, int | None, int | None]:
    """Of the UNet's steps, run piece by piece: planned bytes of features, the most held between segments, and the most at all."""
    manifest, device = pipeline.manifest, pipeline.engine.device
    timesteps = make_scheduler("ddim", pipeline.bundle.folder / "scheduler", steps).timesteps.tolist()
    schedule = pipeline.schedule(find_plan(plan), timesteps)
    height, width = (side // manifest.vae_scale for side in manifest.sizes[0])
    sizes = {"batch": 2, "height": height, "width": width}
    shapes = {name: resolve(manifest.features[name].shape, sizes) for name in (SAMPLE, TEXT)}
    samples = [torch.full(shapes[SAMPLE], value, device=device) for value in (1.0, -1.0)]
    text = torch.zeros(shapes[TEXT], dtype=DTYPES[manifest.features[TEXT].dtype], device=device)
    when = torch.tensor(timesteps, dtype=torch.float32, device=device)

    def run(networks: Mapping[str, LoadedBundle]) -> None:
        executor = Executor(networks, schedule, swapper=pipeline.swapper)
        for index in range(schedule.steps):
            # Always another one, so that adaptive rules compute afresh: there the most is held, and that is what is planned.
            executor.step(index, samples[index % 2], when[index : index + 1], text)

    run(pipeline.networks)  # contexts, scratch memory and the libraries' workspaces are made at first use
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before, held = _allocated(device), list[int]()
    run({name: _watched(network, lambda: held.append(_allocated(device) or 0)) for name, network in pipeline.networks.items()})
    planned = peak_bytes(schedule, sizes)
    if before is None:
        return planned, None, None
    peak = torch.cuda.memory_stats(device)["requested_bytes.all.peak"] - before if device.type == "cuda" else None
    return planned, max(held) - before, peak


def _watched(network: LoadedBundle, look: Callable[[], None]) -> LoadedBundle:
    return LoadedBundle(network.manifest, {name: _Watched(runner, look) for name, runner in network.runners.items()})  # type: ignore[misc]


def _row(
    pipeline: Pipeline, precision: str, plan: str, references: dict[str, Tensor], options: argparse.Namespace
) -> tuple[Row, Tensor]:
    graphs, pipeline.graphs = pipeline.graphs, None
    planned, held, peak = _memory(pipeline, plan, options.steps)
    latents, seconds = _run(pipeline, plan, options)
    pipeline.graphs = graphs
    replayed = _run(pipeline, plan, options) if graphs else None
    row = Row(
        engine=pipeline.engine.name,
        precision=precision,
        plan=plan,
        error=_relative(latents, references[plan]) if plan in references else None,
        graphs_error=_relative(replayed[0], latents) if replayed else None,
        milliseconds=round(1000 * seconds, 3),
        graphs_milliseconds=round(1000 * replayed[1], 3) if replayed else None,
        planned_bytes=planned,
        features_bytes=held,
        peak_bytes=peak,
    )
    return row, latents


def _segments(bundle: Bundle, engine: Engine) -> dict[str, Fit]:
    """How near each segment, and the chain, comes to the diffusers model."""
    fits: dict[str, Fit] = {}
    for one in verify(bundle, engine, bundle.manifest.sizes[:1]):
        fit = fits.get(one.segment, Fit(0.0, 1.0))
        fits[one.segment] = Fit(max(one.error, fit.error), min(one.cosine, fit.cosine))
    return fits


def _show(console: Console, rows: Sequence[Row]) -> None:
    table = Table(
        "engine", "precision", "plan", "error", "graphs: error", "ms", "graphs: ms", "MB planned", "held", "peak", box=SIMPLE
    )

    def text(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    for row in rows:
        planned, held, peak = (
            None if size is None else size / 1e6 for size in (row.planned_bytes, row.features_bytes, row.peak_bytes)
        )
        table.add_row(row.engine, row.precision, row.plan, text(row.error, ".1e"), text(row.graphs_error, ".1e"),
                      text(row.milliseconds, ".2f"), text(row.graphs_milliseconds, ".2f"),
                      text(planned, ".1f"), text(held, ".1f"), text(peak, ".1f"))  # fmt: skip
    console.print(table)


def _show_memory(console: Console, memory: Mapping[str, Memory]) -> None:
    table = Table("engine", "MB of the UNet's files", "scratch", "of the device", box=SIMPLE)
    for name, one in memory.items():
        sizes = (one.weights_bytes, one.scratch_bytes, one.device_bytes)
        table.add_row(name, *("-" if size is None else f"{size / 1e6:.1f}" for size in sizes))
    console.print(table)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m benchmarks.gpu.gpu_check", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: try the program itself; no graphs")
    parser.add_argument("--source", default="mini", help="as for python -m exporter build (default: mini)")
    parser.add_argument("--variant", default="original")
    parser.add_argument("--engines", default="torch,tensorrt-rtx,tensorrt,onnxruntime", help="torch comes first: the reference")
    parser.add_argument("--precision", default="fp32,fp16")
    parser.add_argument("--plans", default="full,deepcache:3,block:3,unit:3,adaptive:0.2")
    parser.add_argument("--size", type=parse_size, help="of the picture (default: the model's own)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("bundles/gpu-check"), help="where bundles are built")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args(arguments)
    for name, allowed in (("engines", ENGINES), ("precision", DTYPE), ("plans", None)):
        chosen = getattr(options, name).split(",")
        for one in chosen:
            if allowed is not None and one not in allowed:
                raise UserError(f"--{name}: unknown {one!r}; choose from: {', '.join(allowed)}")
        setattr(options, name, chosen)
    return options


def _check(
    found: Found,
    pipeline: Pipeline,
    precision: str,
    references: dict[str, Tensor],
    options: argparse.Namespace,
    free: int | None,
) -> None:
    """Everything about one engine at one precision; ``free`` are the device's bytes before it came."""
    bundle, engine = pipeline.bundle, pipeline.engine
    name, scratch = f"{engine.name} {precision}", engine.scratch_bytes()
    found.segments[name] = _segments(bundle, engine)
    if precision == "fp16":
        found.psnr[name] = round(compare_latents(bundle, engine, bundle.manifest.sizes[0], FP16_STEPS), 1)
    for plan in options.plans:
        row, latents = _row(pipeline, precision, plan, references, options)
        found.rows.append(row)
        if name == "torch fp32":
            references[plan] = latents
    left = free_bytes(engine.device)
    taken = None if free is None or left is None else free - left
    found.memory[name] = Memory(pipeline.swapper.bytes_of(bundle.manifest.variant), scratch, taken)


def main(arguments: Sequence[str]) -> None:
    """Check what runs on the GPU; raises UserError without one, exits with 1 where something is wrong."""
    options = _parse(arguments)
    device, console = _device(options.device), Console(width=130)
    card = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    found = Found()
    references: dict[str, Tensor] = {}
    for name in options.engines:
        for precision in options.precision:
            console.print(f"{name}, {precision}", highlight=False)
            _check_one(found, name, precision, device, references, options, console)
            gc.collect()  # what an exception has held, and the engine's memory with it
    _report(console, device, card, found, options)


def _load(found: Found, name: str, precision: str, device: torch.device, options: argparse.Namespace) -> Pipeline | None:
    """Build and load a bundle for an engine; None, and why, where the engine cannot be had."""
    try:
        return Pipeline(_bundle(options, name, precision), _engine(name, device))
    except EngineMemoryError:  # it can be had, and more is wrong
        raise
    except EngineError as error:
        found.skipped[f"{name} {precision}"] = str(error)
        return None


def _check_one(
    found: Found,
    name: str,
    precision: str,
    device: torch.device,
    references: dict[str, Tensor],
    options: argparse.Namespace,
    console: Console,
) -> None:
    """Build, load and check an engine at a precision; whatever becomes of it, what the others do is worth knowing.

    Raises:
        UserError: there is nothing to load for any engine: the source, a plan or a size is wrong.
    """
    pipeline = None
    try:
        free = free_bytes(device)
        pipeline = _load(found, name, precision, device, options)
        if pipeline is not None:
            _check(found, pipeline, precision, references, options, free)
    except Exception as error:
        if pipeline is None and isinstance(error, UserError) and not isinstance(error, EngineError):
            raise
        console.print_exception()
        found.ended[f"{name} {precision}"] = f"{type(error).__name__}: {error}"


def _report(console: Console, device: torch.device, card: str, found: Found, options: argparse.Namespace) -> None:
    _show(console, found.rows)
    _show_memory(console, found.memory)
    for name, reason in found.skipped.items():
        console.print(f"left out: {name}: {reason}", highlight=False, soft_wrap=True)
    settings = {name: getattr(options, name) for name in ("source", "variant", "steps", "rounds", "size")}
    faults = found.faults()
    report = {"card": card, "cuda": torch.version.cuda, "settings": settings, "faults": faults, **asdict(found)}
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"gpu-{card}-{Path(options.source).stem}-{options.variant}".lower()
    path = options.out / f"{re.sub('[^a-z0-9-]', '-', name)}.json"
    path.write_text(json.dumps(machine() | report, indent=2) + "\n")
    console.print(f"wrote {path}", highlight=False)
    for fault in faults:
        console.print(f"WRONG: {fault}", highlight=False)
    if faults or not found.rows:
        raise SystemExit(1)


if __name__ == "__main__":
    run_command(main)
