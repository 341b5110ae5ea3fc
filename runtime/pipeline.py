"""Text to image and image to image: a bundle and a prompt in, pictures out."""

import json
import math
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from engines import Bundle, Engine, Manifest
from engines.bundle.names import IMAGE, LATENTS, TEXT, TOKENS, VAE_DECODER, VAE_ENCODER
from engines.cuda.streams import CallStreams
from runtime.errors import RequestError
from runtime.execution.executor import Executor, StepRecord
from runtime.execution.graph_cache import CudaGraphCache
from runtime.execution.siblings import companion
from runtime.execution.swapping import Swapper, free_bytes
from runtime.images.initial_latents import InitialState, check_strength, from_noise, from_picture, timesteps_from
from runtime.images.pictures import Original, Picture, read_original, to_pictures
from runtime.images.schedulers import make_scheduler
from runtime.plans.plan import Plan
from runtime.plans.presets import find_plan
from runtime.plans.schedule import Schedule, check_runs

__all__ = ["Callback", "Generation", "Pipeline"]

_SEEDS = 2**63
"""PyTorch's generators take seeds of 64 bits."""

Callback = Callable[[StepRecord, Tensor], None]
"""Called after every model evaluation with its record and the latents (images, channels, height, width).

On a GPU the evaluation has only been started: what reads the latents or the record's seconds waits for it."""


@dataclass(frozen=True)
class Generation:
    """The result of one call: pictures, final latents (images, channels, height, width), and what ran at every step."""

    images: list[Image.Image]
    latents: Tensor
    steps: list[StepRecord]
    seconds: float
    plan: Plan

    @property
    def image(self) -> Image.Image:
        """The first picture."""
        return self.images[0]


class Pipeline:
    """A loaded bundle. Calls share it and keep their own state, so they may run in parallel.

    Args:
        bundle: what to load.
        engine: what runs it.
        free: tells how much memory of a device is free; UNets that do not fit into it together are swapped.

    Raises:
        BundleError, EngineError: as ``Engine.load``.
    """

    def __init__(self, bundle: Bundle, engine: Engine, free: Callable[[torch.device], int | None] = free_bytes) -> None:
        from transformers import CLIPTokenizer

        engine.check_device()
        self.bundle, self.engine = bundle, engine
        if bundle.manifest.is_random:
            warnings.warn(
                f"{bundle.folder} has random weights ({bundle.manifest.source}), so its pictures are noise", stacklevel=2
            )
        for file in bundle.manifest.files:
            bundle.path(file)
        recorder = engine.recorder()
        self.graphs = CudaGraphCache(recorder) if recorder else None
        self.swapper = Swapper(bundle, engine, self.graphs, free)
        self.networks = self.swapper.networks
        self.network = self.networks[bundle.manifest.variant]
        self._lock = threading.Lock()
        self._streams = CallStreams(engine.device)
        scheduler = json.loads((bundle.folder / "scheduler" / "scheduler_config.json").read_text("utf-8"))
        self._train_steps: int = scheduler.get("num_train_timesteps", 1000)
        self.tokenizer: Any = CLIPTokenizer.from_pretrained(bundle.folder / "tokenizer", local_files_only=True)

    @property
    def manifest(self) -> Manifest:
        """What the bundle says about itself."""
        return self.bundle.manifest

    def schedule(self, plan: Plan, timesteps: Sequence[float]) -> Schedule:
        """A plan laid out for this bundle (and others of its source, where the plan switches UNets), checked.

        Raises:
            PlanError: a UNet of the plan is not there, or the segments cannot run the plan.
        """
        names = dict.fromkeys(part.unet for part in plan.unets) or [self.manifest.variant]
        for name in names:
            if name not in self.networks:
                self.swapper.add(companion(self.bundle, name, plan, timesteps, self.engine))
        unets = {name: self.networks[name].manifest for name in names}
        schedule = Schedule(plan, unets, timesteps, self._train_steps)
        check_runs(schedule, self.swapper.rebuild_command)
        return schedule

    def executor(self, schedule: Schedule) -> Executor:
        """What runs a schedule's steps, for one call."""
        return Executor(self.networks, schedule, self.graphs, self.swapper)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """The text encoder's output (prompts, tokens, width); a prompt that is too long is cut with a warning."""
        length = self.manifest.text_length
        with self._lock:  # padding and truncation are state of the tokenizer: two threads would change each other's
            whole = [len(self.tokenizer(prompt).input_ids) for prompt in prompts]
            ids = self.tokenizer(
                list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            ).input_ids
        for prompt, tokens in zip(prompts, whole, strict=True):
            if tokens > length:
                warnings.warn(f"prompt cut to {length} tokens, it has {tokens}: {prompt!r}", stacklevel=3)
        return self.network.compute(TEXT, {TOKENS: ids.to(self.engine.device)})

    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Pictures from latents (images, channels, height, width), as many at a time as the VAE's engines take."""
        parts = latents.split(self.manifest.vae_images or len(latents))
        return to_pictures(torch.cat([self.network.compute(VAE_DECODER, {LATENTS: part}) for part in parts]))

    def check_request(self, prompts: Sequence[str], images: int, height: int, width: int, guidance_scale: float) -> None:
        """Raise RequestError unless prompts, sizes and guidance are such as this bundle and engine take."""
        if not prompts or not all(prompt.strip() for prompt in prompts):
            raise RequestError("the prompt is empty; say what the picture shows, such as 'a red star on a blue background'")
        self.check_shape(images, height, width, guidance_scale)

    def check_shape(self, images: int, height: int, width: int, guidance_scale: float) -> None:
        """Raise RequestError unless number, size and guidance are such as this bundle and engine take."""
        multiple = self.manifest.size_multiple
        if any(side < multiple or side % multiple for side in (height, width)):
            raise RequestError(f"size {height}x{width}: height and width must be multiples of {multiple} pixels for this UNet")
        if images < 1:
            raise RequestError(f"num_images = {images}; ask for at least 1")
        if not math.isfinite(guidance_scale):
            raise RequestError(f"guidance_scale = {guidance_scale}; choose a finite number: 1 or less turns guidance off")
        if self.engine.has_profile and self.manifest.static:
            self._check_static(images, height, width, guidance_scale)
        elif self.engine.has_profile:
            self._check_profile(images, height, width)

    def _check_profile(self, images: int, height: int, width: int) -> None:
        sizes = self.manifest.sizes
        heights, widths = [size[0] for size in sizes], [size[1] for size in sizes]
        inside = min(heights) <= height <= max(heights) and min(widths) <= width <= max(widths)
        if not inside or images > self.manifest.max_images:
            built = ", ".join(f"{size[0]}x{size[1]}" for size in sizes)
            raise RequestError(
                f"{images} image(s) of {height}x{width}: the {self.engine.name} engines of this bundle were built for up to "
                f"{self.manifest.max_images} image(s) of {built}; build others with --sizes and --batch"
            )

    def _check_static(self, images: int, height: int, width: int, guidance_scale: float) -> None:
        built = self.manifest.max_images, *self.manifest.sizes[0]
        if (images, height, width) != built or guidance_scale <= 1:
            raise RequestError(
                f"{images} image(s) of {height}x{width} with guidance {guidance_scale:g}: the {self.engine.name} engines of this "
                f"bundle are static, for exactly {built[0]} image(s) of {built[1]}x{built[2]} with guidance above 1; "
                "ask for that, or build others with --sizes and --batch, for several without --static"
            )

    def generate(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str = "",
        steps: int = 20,
        guidance_scale: float | None = None,
        seed: int = 0,
        height: int | None = None,
        width: int | None = None,
        num_images: int = 1,
        scheduler: str = "dpm++",
        plan: str | Path | Plan = "full",
        callback: Callback | None = None,
        image: Picture | None = None,
        strength: float = 0.6,
        mask: Picture | None = None,
    ) -> Generation:
        """Generate pictures; see ``runtime.generate``."""
        started = time.perf_counter()
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        images = len(prompts) * num_images
        original = self.original(image, mask, height, width)
        if original:
            height, width = original.size
        height = self.manifest.sizes[0][0] if height is None else height
        width = self.manifest.sizes[0][1] if width is None else width
        guidance_scale = self.manifest.guidance_scale if guidance_scale is None else guidance_scale
        self.check_request(prompts, images, height, width, guidance_scale)
        if not -_SEEDS <= seed <= _SEEDS - images:
            raise RequestError(f"seed = {seed}; choose one from {-_SEEDS} to {_SEEDS - images}")
        check_strength(strength)
        noise = make_scheduler(scheduler, self.bundle.folder / "scheduler", steps)
        timesteps = timesteps_from(noise, steps, strength) if original else noise.timesteps
        found = find_plan(plan)
        schedule = self.schedule(found, timesteps.tolist())
        seeds = range(seed, seed + images)
        with self._streams.one():
            text = self._text(prompts, num_images, negative_prompt, guidance_scale)
            if original:
                repainted = original.repainted(self.manifest.vae_scale)
                start = from_picture(noise, self._distribution(original), repainted, timesteps, strength, seeds)
            else:
                start = from_noise(noise, self._latent_shape(height, width), seeds, self.engine.device)
            latents, records = self._denoise(start, text, noise, schedule, guidance_scale, callback)
            made = self.decode(latents)
            self._streams.hand_over(latents)
        self.engine.flush()
        return Generation(made, latents, records, time.perf_counter() - started, found)

    def original(
        self, image: Picture | None, mask: Picture | None = None, height: int | None = None, width: int | None = None
    ) -> Original | None:
        """The picture to start from, at the size (in pixels) asked for or else its own; None without one.

        Raises:
            RequestError: it cannot be read, its size or the mask's does not fit, or the bundle has no VAE encoder.
        """
        original = read_original(image, mask)
        if original is None:
            return None
        if VAE_ENCODER not in [segment.name for segment in self.manifest.segments]:
            raise RequestError(
                f"bundle {self.bundle.folder} has no segment {VAE_ENCODER}, which image needs: an older version built it; "
                f"build it anew: {self.engine.rebuild_command(self.bundle)}"
            )
        return original.fitted(height, width, self.manifest.size_multiple)

    def _distribution(self, original: Original) -> Tensor:
        """Means and standard deviations of a picture's latents (1, 2 * channels, height, width)."""
        return self.network.compute(VAE_ENCODER, {IMAGE: original.pixels().to(self.engine.device)})

    def _latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        scale = self.manifest.vae_scale
        return self.manifest.latent_channels, height // scale, width // scale

    def _text(self, prompts: Sequence[str], num_images: int, negative_prompt: str, guidance_scale: float) -> Tensor:
        """Text features of a UNet call: with guidance, the negative prompt's rows and then the prompts'."""
        text = self.encode(prompts).repeat_interleave(num_images, dim=0)
        if guidance_scale <= 1:
            return text
        return torch.cat([self.encode([negative_prompt]).expand(len(text), -1, -1), text])

    def _denoise(
        self, start: InitialState, text: Tensor, noise: Any, schedule: Schedule, scale: float, callback: Callback | None
    ) -> tuple[Tensor, list[StepRecord]]:
        """The denoising loop. The step index is counted here: schedulers may visit a timestep twice."""
        with self.swapper.exclusive(), closing(self.executor(schedule)) as executor:
            return self._loop(executor, start, text, noise, scale, callback)

    def _loop(
        self, executor: Executor, start: InitialState, text: Tensor, noise: Any, scale: float, callback: Callback | None
    ) -> tuple[Tensor, list[StepRecord]]:
        records, latents = [], start.latents
        # The scheduler looks things up by timestep on the host; the UNet's copies are made here, for each would be waited for.
        when = start.timesteps.to(self.engine.device, torch.float32)
        for index, timestep in enumerate(start.timesteps):
            scaled = noise.scale_model_input(latents, timestep)
            sample = torch.cat([scaled, scaled]) if scale > 1 else scaled
            prediction, record = executor.step(index, sample, when[index : index + 1], text)
            if scale > 1:
                negative, positive = prediction.chunk(2)
                prediction = negative + scale * (positive - negative)
            latents = noise.step(prediction, timestep, latents, return_dict=False)[0]
            if start.repaint is not None:
                latents = start.repaint.blend(latents, index)
            records.append(record)
            if callback is not None:
                callback(record, latents)
        return latents, records
