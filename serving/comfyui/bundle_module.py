"""The module that replaces ComfyUI's UNet: it takes the same calls, and runs a bundle's UNet by a plan."""

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from engines.bundle.names import TEXT
from engines.bundle.shapes import is_multiple
from runtime import Pipeline, RequestError, UNet

__all__ = ["PLAN", "BundleModule"]

PLAN = "unet_heirloom_plan"
"""Under which name a MODEL's ``transformer_options`` carry its plan."""
_PROMPT, _NEGATIVE = 0, 1
"""As ComfyUI numbers the halves of guidance."""


class BundleModule(nn.Module):
    """The ``diffusion_model`` of a ComfyUI model.

    ComfyUI tells with each call all noise levels of the run (``sample_sigmas``), and which conditions its rows belong to. A run
    of one group of rows over these levels is one call of ``runtime.UNet``; where conditions are evaluated one after another, each
    has its own. Samplers that evaluate a level twice, or levels in between, get right predictions; fewer inherit anything.

    Args:
        pipeline: the loaded bundle, whose folder and engine the calls run with.
        timestep_of: the timesteps of noise levels, as the model's sampling has them now.
    """

    def __init__(self, pipeline: Pipeline, timestep_of: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.pipeline, self._timestep_of = pipeline, timestep_of
        self._sigmas: Tensor | None = None
        self._plan: Any = None
        self._walk = SimpleNamespace(timesteps=torch.empty(0))
        self._unets: dict[Any, UNet] = {}

    @property
    def dtype(self) -> torch.dtype:
        """In which ComfyUI hands over latents and text features; the bundle converts what its engines take."""
        return torch.float32

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor | None = None,
        y: Tensor | None = None,
        control: object = None,
        transformer_options: Mapping[str, Any] | None = None,
        **others: object,
    ) -> Tensor:
        """The prediction (rows, channels, height, width) for latents ``x``.

        Raises:
            RequestError: conditions or shapes that a bundle does not take.
            PlanError: the bundle's segments cannot run the plan.
        """
        options = transformer_options or {}
        if bool((timesteps != timesteps.reshape(-1)[0]).any()):
            raise RequestError("rows of one call have unlike noise levels; a bundle takes one for all")
        self._check_conditions(y, control, others)
        self._check_latents(x)
        text = self._checked_text(context)
        self._check_patches(options)
        self._begin(options)
        unet = self._unet(options)
        return unet(x, timesteps.reshape(-1)[:1].clone(), text, return_dict=False)[0]

    def _check_latents(self, x: Tensor) -> None:
        manifest = self.pipeline.manifest
        if x.ndim != 4 or x.shape[1] != manifest.latent_channels:
            raise RequestError(
                f"latents of shape {tuple(x.shape)}; this bundle takes (rows, {manifest.latent_channels}, height, width). More "
                "channels come from conditions for inpainting models: use Set Latent Noise Mask instead; or from another model"
            )
        sides = [int(side) * manifest.vae_scale for side in x.shape[2:]]
        if not is_multiple(sides, manifest.size_multiple):
            raise RequestError(
                f"a picture or an area of it (Conditioning Set Area) of {sides[0]}x{sides[1]} pixels, height first; this bundle "
                f"takes heights and widths in multiples of {manifest.size_multiple}"
            )

    def _checked_text(self, context: Tensor | None) -> Tensor:
        manifest = self.pipeline.manifest
        width = manifest.features[TEXT].shape[-1]
        if context is None or context.shape[-1] != width:
            got = "none" if context is None else f"of width {context.shape[-1]}"
            raise RequestError(
                f"text features {got}; this bundle takes width {width}: encode prompts with the text encoder of "
                f"{manifest.source}, or with the bundle's own"
            )
        return context

    @staticmethod
    def _check_conditions(y: object, control: object, others: Mapping[str, object]) -> None:
        if control is not None or others.get("crossattn_controlnet") is not None:
            raise RequestError(
                "a ControlNet is applied to these conditions, and a bundle's UNet has no inputs for it; take it out, "
                "or use the model that the bundle was built from"
            )
        if y is not None:
            raise RequestError("these conditions are for SDXL or another model with pooled text; a bundle is SD 1.x or 2.x")
        if given := [name for name, value in others.items() if value is not None]:
            raise RequestError(f"a bundle's UNet does not take {', '.join(given)}; take that out of the conditions")

    @staticmethod
    def _check_patches(options: Mapping[str, Any]) -> None:
        """Raise RequestError where something would change layers inside of the UNet: a bundle's engines are compiled."""
        inside = [*options.get("patches", {}), *options.get("patches_replace", {})]
        inside += [name for name, found in options.get("wrappers", {}).get("diffusion_model", {}).items() if found]
        if inside:
            raise RequestError(
                f"a node before the sampler changes layers of the UNet ({', '.join(map(str, inside))}), which are compiled in a "
                "bundle: take it out (FreeU, IPAdapter, perturbed attention and the like)"
            )

    def _begin(self, options: Mapping[str, Any]) -> None:
        """Begin a run where the noise levels or the plan are others than before."""
        sigmas, plan = options.get("sample_sigmas"), options.get(PLAN, "full")
        if self._sigmas is not None and sigmas is self._sigmas and plan == self._plan:
            return
        for unet in self._unets.values():
            unet.close()
        self._unets, self._sigmas, self._plan = {}, sigmas, plan
        # The last level is where the run ends: nothing is evaluated there.
        self._walk.timesteps = torch.empty(0) if sigmas is None else self._timestep_of(sigmas[:-1]).float()

    def _unet(self, options: Mapping[str, Any]) -> UNet:
        """Who has the run of these rows."""
        halves = tuple(options.get("cond_or_uncond", ()))
        key = halves, tuple(options.get("uuids", ()))
        if key not in self._unets:
            folder, engine = self.pipeline.bundle.folder, self.pipeline.engine.name
            guided = is_guided(halves)
            self._unets[key] = UNet(folder, self._plan, engine, scheduler=lambda: self._walk, guided=lambda: guided)
        return self._unets[key]


def is_guided(halves: Sequence[int]) -> bool:
    """Whether rows are those of guidance, the negative prompt's first, as plans that evaluate one half take them."""
    return list(halves) == [_NEGATIVE, _PROMPT]
