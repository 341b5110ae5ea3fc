"""A plan on a loaded bundle, measured: time, memory, kernels, and what comes out."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu.found import Row, TextAndVae
from engines import DTYPES, Runner
from engines.bundle.names import LATENTS, SAMPLE, TEXT, VAE_DECODER
from engines.bundle.shapes import resolve
from engines.cuda.streams import wait_for
from runtime import Executor, Pipeline, find_plan
from runtime.execution.loaded_bundle import LoadedBundle
from runtime.execution.swapping import free_bytes
from runtime.images.schedulers import make_scheduler
from runtime.plans.schedule import Schedule
from runtime.report.cost import peak_bytes

__all__ = ["PROMPT", "Settings", "measure_plan", "measure_text_and_vae", "relative"]

PROMPT = "a red star on a blue background"


@dataclass(frozen=True)
class Settings:
    """Denoising steps of a picture, and how often each thing is timed after its first time."""

    steps: int
    rounds: int


@dataclass(frozen=True)
class _Run:
    latents: Tensor
    first_seconds: float
    unet_seconds: float
    picture_seconds: float


def relative(made: Tensor, reference: Tensor) -> float:
    """The largest difference, relative to the reference's largest value."""
    return float((made.float().cpu() - reference.float().cpu()).abs().max() / reference.float().abs().max().cpu())


def measure_plan(
    pipeline: Pipeline, plan: str, reference: Tensor | None, settings: Settings, free: int | None
) -> tuple[Row, Tensor]:
    """A plan run segment by segment and, where there are graphs, replayed; its row and its latents, segment by segment.

    Args:
        pipeline: a loaded bundle.
        plan: a preset or a file.
        reference: the latents to compare with, if there are any.
        settings: steps and rounds.
        free: the device's free bytes before the engine came, if it has any of its own.
    """
    graphs, pipeline.graphs = pipeline.graphs, None
    plain = _run(pipeline, plan, settings)
    planned, held, peak = _memory(pipeline, plan, settings.steps)
    pipeline.graphs = graphs
    replayed = _run(pipeline, plan, settings) if graphs else None
    left = free_bytes(pipeline.engine.device)
    row = Row(
        engine=pipeline.engine.name,
        precision=pipeline.manifest.precision,
        plan=plan,
        error=relative(plain.latents, reference) if reference is not None else None,
        graphs_error=relative(replayed.latents, plain.latents) if replayed else None,
        milliseconds=round(1000 * plain.unet_seconds, 3),
        graphs_milliseconds=round(1000 * replayed.unet_seconds, 3) if replayed else None,
        planned_bytes=planned,
        features_bytes=held,
        peak_bytes=peak,
        first_seconds=round(plain.first_seconds, 3),
        graphs_first_seconds=round(replayed.first_seconds, 3) if replayed else None,
        picture_seconds=round((replayed or plain).picture_seconds, 5),
        device_bytes=None if free is None or left is None else free - left,
    )
    return row, plain.latents


def _run(pipeline: Pipeline, plan: str, settings: Settings) -> _Run:
    """The first round warms up and records; medians are of the others."""
    unet, whole = [], []
    for _ in range(settings.rounds + 1):
        made = pipeline.generate(PROMPT, steps=settings.steps, seed=1, plan=plan)
        unet.append(sum(record.seconds for record in made.steps))
        whole.append(made.seconds)
    return _Run(made.latents, whole[0], statistics.median(unet[1:]), statistics.median(whole[1:]))


def measure_text_and_vae(pipeline: Pipeline, settings: Settings) -> TextAndVae:
    """Text encoder and VAE decoder apart, as the host waits for them, and the kernels of a full step of the UNet."""
    manifest, device = pipeline.manifest, pipeline.engine.device
    height, width = (side // manifest.vae_scale for side in manifest.sizes[0])
    shape = resolve(manifest.features[LATENTS].shape, {"images": 1, "height": height, "width": width})
    latents = torch.zeros(shape, dtype=DTYPES[manifest.features[LATENTS].dtype], device=device)
    text = _median(lambda: pipeline.encode([PROMPT]), device, settings.rounds)
    vae = _median(lambda: pipeline.network.compute(VAE_DECODER, {LATENTS: latents}), device, settings.rounds)
    return TextAndVae(round(text, 3), round(vae, 3), _kernels(pipeline))


def _median(work: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Milliseconds until it is done on the device, once it has been done before."""
    times = []
    for _ in range(rounds + 1):
        wait_for(device)
        started = time.perf_counter()
        work()
        wait_for(device)
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[1:])


class _Steps:
    """A plan's steps on inputs of no meaning, which change from step to step, so that adaptive rules compute afresh."""

    def __init__(self, pipeline: Pipeline, plan: str, steps: int) -> None:
        manifest, device = pipeline.manifest, pipeline.engine.device
        self._pipeline = pipeline
        timesteps = make_scheduler("ddim", pipeline.bundle.folder / "scheduler", steps).timesteps.tolist()
        self.schedule: Schedule = pipeline.schedule(find_plan(plan), timesteps)
        height, width = (side // manifest.vae_scale for side in manifest.sizes[0])
        self.sizes = {"batch": 2, "height": height, "width": width}
        shapes = {name: resolve(manifest.features[name].shape, self.sizes) for name in (SAMPLE, TEXT)}
        self._samples = [torch.full(shapes[SAMPLE], value, device=device) for value in (1.0, -1.0)]
        self._text = torch.zeros(shapes[TEXT], dtype=DTYPES[manifest.features[TEXT].dtype], device=device)
        self._when = torch.tensor(timesteps, dtype=torch.float32, device=device)

    def run(self, networks: Mapping[str, LoadedBundle], count: int | None = None) -> None:
        """The first so many steps, or all."""
        executor = Executor(networks, self.schedule, swapper=self._pipeline.swapper)
        for index in range(self.schedule.steps if count is None else count):
            executor.step(index, self._samples[index % 2], self._when[index : index + 1], self._text)


def _kernels(pipeline: Pipeline) -> int | None:
    """Kernels of the UNet's full step, as CUPTI counts them; None where it cannot."""
    if pipeline.engine.device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    steps = _Steps(pipeline, "full", 2)
    steps.run(pipeline.networks, 1)
    wait_for(pipeline.engine.device)
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            steps.run(pipeline.networks, 1)
            wait_for(pipeline.engine.device)
        names = [event.name for event in profiler.events() if event.device_type.name == "CUDA"]
    except RuntimeError:  # the driver lets nobody look
        return None
    return len([name for name in names if not name.startswith(("Memcpy", "Memset"))]) or None


class _Watched:
    """A runner after whose runs somebody looks at the memory that is held."""

    def __init__(self, runner: Runner, look: Callable[[], None]) -> None:
        self._runner, self._look = runner, look

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        outputs = self._runner.run(inputs)
        self._look()
        return outputs


def _watched(network: LoadedBundle, look: Callable[[], None]) -> LoadedBundle:
    return LoadedBundle(network.manifest, {name: _Watched(runner, look) for name, runner in network.runners.items()})  # type: ignore[misc]


def allocated(device: torch.device) -> int | None:
    """Bytes that PyTorch's allocator has been asked for, not what it made of them; None where it does not count."""
    return torch.cuda.memory_stats(device)["requested_bytes.all.current"] if device.type == "cuda" else None


def _memory(pipeline: Pipeline, plan: str, count: int) -> tuple[int, int | None, int | None]:
    """Of the UNet's steps run segment by segment: planned bytes of features, the most held between segments, and at all."""
    device, steps = pipeline.engine.device, _Steps(pipeline, plan, count)
    steps.run(pipeline.networks)  # contexts, scratch memory and the libraries' workspaces are made at first use
    wait_for(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before, held = allocated(device), list[int]()
    watched = {
        name: _watched(network, lambda: held.append(allocated(device) or 0)) for name, network in pipeline.networks.items()
    }
    steps.run(watched)
    planned = peak_bytes(steps.schedule, steps.sizes)
    if before is None:
        return planned, None, None
    peak = torch.cuda.memory_stats(device)["requested_bytes.all.peak"] - before if device.type == "cuda" else None
    return planned, max(held) - before, peak
