"""An independent reference for any plan: a script says for each step which UNet runs and which modules inherit, and how.

Like ``tests.support.reference`` it shares no code with exporter, runtime or tuning: everything is computed at every step
by the diffusers UNet in one piece, and hooks put back what is inherited.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

Script = Sequence[tuple[str, Mapping[str, str]]]
"""For each step: the UNet's name, and the modules (by diffusers path) that inherit "by output" or "by residual"."""


def _shortcut(module: nn.Module, args: Any, kwargs: Any) -> Tensor:
    """What flows past a ResNet's or transformer's branch."""
    x = args[0] if args else kwargs.get("hidden_states", kwargs.get("input_tensor"))
    shortcut = getattr(module, "conv_shortcut", None)
    return x if shortcut is None else shortcut(x)


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _like(output: Any, tensor: Tensor) -> Any:
    return (tensor, *output[1:]) if isinstance(output, tuple) else tensor


class _Hook:
    """On one module: keeps its output and what it added whenever it computes afresh, puts one of them back when it inherits."""

    def __init__(self, path: str, residual: bool, cache: dict[str, Tensor]) -> None:
        self.path, self.residual, self.cache, self.inherits = path, residual, cache, False

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        tensor = _first(output)
        past = _shortcut(module, args, kwargs) if self.residual else torch.zeros(())
        if not self.inherits:
            self.cache[self.path] = tensor - past
        return _like(output, self.cache[self.path] + past)


@torch.no_grad()
def reference_script(
    unets: Mapping[str, nn.Module], scheduler: Any, latents: Tensor, text: Tensor, guidance_scale: float, script: Script
) -> Tensor:
    """Final latents of a script; see ``tests.support.reference.reference_denoise`` for the arguments."""
    kinds = {path: kind for _, inheriting in script for path, kind in inheriting.items()}
    cache: dict[str, Tensor] = {}
    hooks = {name: {path: _Hook(path, kind == "residual", cache) for path, kind in kinds.items()} for name in unets}
    with ExitStack() as stack:
        for name, unet in unets.items():
            modules = dict(unet.named_modules())
            for path, hook in hooks[name].items():
                if path in modules:
                    stack.callback(modules[path].register_forward_hook(hook, with_kwargs=True).remove)
        for (name, inheriting), timestep in zip(script, scheduler.timesteps, strict=True):
            for path, hook in hooks[name].items():
                hook.inherits = path in inheriting
            sample = scheduler.scale_model_input(latents, timestep)
            rows = torch.cat([sample, sample]) if guidance_scale > 1 else sample
            prediction = unets[name](rows, timestep, encoder_hidden_states=text).sample
            if guidance_scale > 1:
                negative, positive = prediction.chunk(2)
                prediction = negative + guidance_scale * (positive - negative)
            latents = scheduler.step(prediction, timestep, latents).prev_sample
    return latents
