"""Text to image: a bundle and a prompt in, pictures out."""

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from engines import Bundle, BundleError, Engine, Manifest, make_engine
from runtime.errors import RequestError
from runtime.executor import TEXT, Executor, Network, StepRecord
from runtime.plan import Plan, Step, check_runs
from runtime.presets import find_plan
from runtime.schedulers import make_scheduler

__all__ = ["Callback", "Generation", "Pipeline", "default_bundle", "generate"]

BUNDLES = Path("bundles")
_SEEDS = 2**63
"""PyTorch's generators take seeds of 64 bits."""

Callback = Callable[[StepRecord, Tensor], None]
"""Called after every model evaluation with its record and the latents (images, channels, height, width)."""


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
    """A loaded bundle. Calls share it and keep their own state, so they may run in parallel."""

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        from transformers import CLIPTokenizer

        self.bundle, self.engine = bundle, engine
        for file in bundle.manifest.files:
            bundle.path(file)
        self.network = Network.load(bundle, engine)
        self.tokenizer: Any = CLIPTokenizer.from_pretrained(bundle.folder / "tokenizer", local_files_only=True)

    @property
    def manifest(self) -> Manifest:
        """What the bundle says about itself."""
        return self.bundle.manifest

    def schedule(self, plan: Plan, steps: int) -> tuple[Step, ...]:
        """A plan for this bundle's UNet, checked; raises PlanError if the bundle cannot run it."""
        schedule = plan.schedule(steps, self.manifest.unet_units)
        check_runs(plan, schedule, self.manifest)
        return schedule

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """The text encoder's output (prompts, tokens, width); a prompt that is too long is cut with a warning."""
        length = self.manifest.text_length
        for prompt in prompts:
            tokens = len(self.tokenizer(prompt).input_ids)
            if tokens > length:
                warnings.warn(f"prompt cut to {length} tokens, it has {tokens}: {prompt!r}", stacklevel=3)
        ids = self.tokenizer(
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        return self.network.compute(TEXT, {"tokens": ids.to(self.engine.device)})

    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Pictures from latents (images, channels, height, width)."""
        pixels = self.network.compute("vae_decoder", {"latents": latents}).float().cpu()
        rounded = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
        return [Image.fromarray(np.ascontiguousarray(picture)) for picture in rounded]

    def check_request(self, prompts: Sequence[str], images: int, height: int, width: int) -> None:
        """Raise RequestError unless prompts and sizes are such as this bundle and engine take."""
        if not prompts or not all(prompt.strip() for prompt in prompts):
            raise RequestError("the prompt is empty; say what the picture shows, such as 'a red star on a blue background'")
        multiple = self.manifest.size_multiple
        if any(side < multiple or side % multiple for side in (height, width)):
            raise RequestError(f"size {height}x{width}: height and width must be multiples of {multiple} pixels for this UNet")
        if images < 1:
            raise RequestError(f"num_images = {images}; ask for at least 1")
        if self.engine.has_profile:
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

    def generate(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str = "",
        steps: int = 20,
        guidance_scale: float = 7.5,
        seed: int = 0,
        height: int | None = None,
        width: int | None = None,
        num_images: int = 1,
        scheduler: str = "dpm++",
        plan: str | Path | Plan = "full",
        callback: Callback | None = None,
    ) -> Generation:
        """Generate pictures; see ``runtime.generate``."""
        started = time.perf_counter()
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        images = len(prompts) * num_images
        height = self.manifest.sizes[0][0] if height is None else height
        width = self.manifest.sizes[0][1] if width is None else width
        self.check_request(prompts, images, height, width)
        if not -_SEEDS <= seed <= _SEEDS - images:
            raise RequestError(f"seed = {seed}; choose one from {-_SEEDS} to {_SEEDS - images}")
        if not math.isfinite(guidance_scale):
            raise RequestError(f"guidance_scale = {guidance_scale}; choose a finite number: 1 or less turns guidance off")
        noise = make_scheduler(scheduler, self.bundle.folder / "scheduler", steps)
        found = find_plan(plan, self.manifest.unet_units)
        schedule = self.schedule(found, len(noise.timesteps))
        text = self._text(prompts, num_images, negative_prompt, guidance_scale)
        latents = self._noise(seed, images, height, width) * noise.init_noise_sigma
        latents, records = self._denoise(latents, text, noise, schedule, guidance_scale, callback)
        return Generation(self.decode(latents), latents, records, time.perf_counter() - started, found)

    def _text(self, prompts: Sequence[str], num_images: int, negative_prompt: str, guidance_scale: float) -> Tensor:
        """Text features of a UNet call: with guidance, the negative prompt's rows and then the prompts'."""
        text = self.encode(prompts).repeat_interleave(num_images, dim=0)
        if guidance_scale <= 1:
            return text
        return torch.cat([self.encode([negative_prompt]).expand(len(text), -1, -1), text])

    def _noise(self, seed: int, images: int, height: int, width: int) -> Tensor:
        """Standard normal latents. Image i has seed + i, so it does not depend on how many are made together."""
        scale = self.manifest.vae_scale
        shape = (self.manifest.latent_channels, height // scale, width // scale)
        rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in range(images)]
        return torch.stack(rows).to(self.engine.device)

    def _denoise(
        self,
        latents: Tensor,
        text: Tensor,
        noise: Any,
        schedule: Sequence[Step],
        scale: float,
        callback: Callback | None,
    ) -> tuple[Tensor, list[StepRecord]]:
        """The denoising loop. The step index is counted here: schedulers may visit a timestep twice."""
        executor, records = Executor(self.network, schedule), []
        for index, timestep in enumerate(noise.timesteps):
            scaled = noise.scale_model_input(latents, timestep)
            sample = torch.cat([scaled, scaled]) if scale > 1 else scaled
            when = timestep.reshape(1).to(self.engine.device, torch.float32)
            prediction, record = executor.step(index, sample, when, text)
            if scale > 1:
                negative, positive = prediction.chunk(2)
                prediction = negative + scale * (positive - negative)
            latents = noise.step(prediction, timestep, latents, return_dict=False)[0]
            records.append(record)
            if callback is not None:
                callback(record, latents)
        return latents, records


def default_bundle() -> Path:
    """The bundle in ``./bundles`` that was built last.

    Raises:
        BundleError: there is none.
    """
    found = sorted(BUNDLES.glob("[!.]*/manifest.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise BundleError(f"no bundle in ./{BUNDLES}; make one with: python -m exporter build --variant assembled")
    return found[-1].parent


@lru_cache(maxsize=2)
def _loaded(folder: Path, key: str, engine: str) -> Pipeline:
    return Pipeline(Bundle.open(folder), make_engine(engine))


def load(bundle: str | Path | None = None, engine: str = "onnxruntime") -> Pipeline:
    """A bundle loaded in an engine; the last two are kept, so that the next call with them starts at once.

    Args:
        bundle: a bundle's folder; None for the one in ``./bundles`` that was built last.
        engine: onnxruntime, tensorrt, tensorrt-rtx or torch.

    Raises:
        BundleError: there is no bundle, or it is damaged or of another version.
        EngineError: the engine is unknown, not installed or not in the bundle.
    """
    folder = Path(bundle if bundle is not None else default_bundle()).resolve()
    return _loaded(folder, Bundle.open(folder).manifest.key, engine)


def generate(
    prompt: str | Sequence[str],
    negative_prompt: str = "",
    steps: int = 20,
    guidance_scale: float = 7.5,
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    num_images: int = 1,
    scheduler: str = "dpm++",
    plan: str | Path | Plan = "full",
    bundle: str | Path | None = None,
    engine: str = "onnxruntime",
    callback: Callback | None = None,
) -> Generation:
    """Generate pictures from a prompt.

    Args:
        prompt: what the picture shows; a list of prompts makes ``num_images`` of each in one batch.
        negative_prompt: what it should not show; read only with guidance.
        steps: denoising steps.
        guidance_scale: classifier-free guidance (arXiv 2207.12598); 1 or less turns it off and halves the work.
        seed: of the first picture's noise; picture i has seed + i.
        height: in pixels; None for the bundle's first size.
        width: likewise.
        num_images: pictures per prompt.
        scheduler: ddim, pndm, dpm++, euler or heun.
        plan: a preset such as ``deepcache:3``, a JSON file, or a ``Plan``.
        bundle: a bundle's folder; None for the one in ``./bundles`` that was built last.
        engine: what runs the segments.
        callback: called after every model evaluation; what it raises ends the call.

    Raises:
        RequestError: an empty prompt, or a size, number of steps or scheduler that cannot be had.
        PlanError: a plan that is unknown, malformed, or that the bundle's segments cannot run.
        BundleError: no bundle, or a damaged one.
        EngineError: an unknown engine, or one that is not installed or not in the bundle.
    """
    return load(bundle, engine).generate(
        prompt, negative_prompt, steps, guidance_scale, seed, height, width, num_images, scheduler, plan, callback
    )
