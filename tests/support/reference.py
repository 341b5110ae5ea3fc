"""An independent reference for plans: the diffusers model in one piece, with forward hooks that put cached outputs back.

It shares no code with exporter, runtime or tuning: modules are named by their diffusers paths, schedulers are made by class, and
everything is computed at every step. It is slow, and right by construction.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

MINI = Path(__file__).resolve().parents[2] / "models" / "mini"
"""The embedded model: a diffusers folder."""

SCHEDULER_CLASSES = {
    "ddim": DDIMScheduler,
    "pndm": PNDMScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
}


class Inheritance:
    """Hooks on modules, by path: in a key step each keeps what its module gave, in another it puts that back.

    ``seen`` has, for every step, what each of the ``watched`` modules gave to those that read it.
    """

    def __init__(self, unet: nn.Module, inherited: Collection[str], watched: Collection[str] = ()) -> None:
        self._unet, self._inherited, self._watched = unet, inherited, watched
        self._key, self._cache = True, dict[str, Any]()
        self.seen: list[dict[str, Tensor]] = []

    @contextmanager
    def hooked(self) -> Iterator[None]:
        with ExitStack() as stack:
            # Hooks run in the order in which they were registered, so those that watch see what those that inherit put back.
            for path in self._inherited:
                stack.callback(self._unet.get_submodule(path).register_forward_hook(self._inherit(path)).remove)
            for path in self._watched:
                stack.callback(self._unet.get_submodule(path).register_forward_hook(self._watch(path)).remove)
            yield

    def start_step(self, key: bool) -> None:
        self._key = key
        self.seen.append({})

    def _inherit(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if self._key:
                self._cache[path] = output
            return self._cache[path]

        return hook

    def _watch(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.seen[-1][path] = output[0] if isinstance(output, tuple) else output

        return hook


@torch.no_grad()
def reference_denoise(
    unet: UNet2DConditionModel,
    scheduler: Any,
    latents: Tensor,
    text: Tensor,
    guidance_scale: float,
    key_steps: Collection[int],
    inherited_paths: Collection[str],
    watched_paths: Collection[str] = (),
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Final latents, and for every model evaluation the outputs of the watched modules.

    Args:
        unet: float32, in evaluation mode.
        scheduler: with its timesteps set.
        latents: (images, channels, height, width), already times the scheduler's initial sigma.
        text: (rows, tokens, width); with guidance the negative rows come first.
        guidance_scale: above 1 for guidance.
        key_steps: indices of model evaluations that compute everything, counted from 0.
        inherited_paths: paths of the modules whose outputs the other evaluations take from the last key step.
        watched_paths: paths of the modules whose outputs are returned.
    """
    inheritance = Inheritance(unet, inherited_paths, watched_paths)
    with inheritance.hooked():
        for index, timestep in enumerate(scheduler.timesteps):
            inheritance.start_step(index in key_steps)
            sample = scheduler.scale_model_input(latents, timestep)
            if guidance_scale > 1:
                sample = torch.cat([sample, sample])
            prediction = unet(sample, timestep, encoder_hidden_states=text).sample
            if guidance_scale > 1:
                half = len(latents)
                prediction = (1 - guidance_scale) * prediction[:half] + guidance_scale * prediction[half:]
            latents = scheduler.step(prediction, timestep, latents).prev_sample
    return latents, inheritance.seen


def reference_scheduler(name: str, steps: int, **settings: Any) -> Any:
    """A scheduler with the embedded model's configuration and its timesteps set; PNDM as Stable Diffusion has it."""
    if name == "pndm":
        settings["skip_prk_steps"] = True
    scheduler = SCHEDULER_CLASSES[name].from_pretrained(MINI, subfolder="scheduler", **settings)
    scheduler.set_timesteps(steps)
    return scheduler


def reference_noise(seed: int, images: int, channels: int, height: int, width: int) -> Tensor:
    """Picture i starts from the noise of seed + i, drawn on the CPU."""
    return torch.cat(
        [torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(seed + i)) for i in range(images)]
    )


def mini_unet(variant: str = "original") -> UNet2DConditionModel:
    """The embedded model's UNet, float32."""
    folder = "unet" if variant == "original" else f"unet_{variant}"
    return UNet2DConditionModel.from_pretrained(MINI, subfolder=folder).float().eval()


@torch.no_grad()
def mini_text(prompts: Sequence[str]) -> Tensor:
    """The embedded model's text features, (prompts, tokens, width)."""
    tokenizer: Any = CLIPTokenizer.from_pretrained(MINI / "tokenizer")
    tokens = tokenizer(list(prompts), padding="max_length", max_length=32, truncation=True, return_tensors="pt").input_ids
    encoder = CLIPTextModel.from_pretrained(MINI / "text_encoder", dtype=torch.float32).eval()
    return encoder(input_ids=tokens).last_hidden_state


@torch.no_grad()
def mini_pixels(latents: Tensor) -> Tensor:
    """The embedded model's pictures in [0, 255], (images, height, width, 3), not rounded."""
    vae = AutoencoderKL.from_pretrained(MINI, subfolder="vae").float().eval()
    pixels = vae.decode(latents / vae.config.scaling_factor).sample
    return ((pixels / 2 + 0.5).clamp(0, 1) * 255).permute(0, 2, 3, 1)
