"""An independent reference for what plans say beside inheriting: forecasts, steps that skip the UNet, halves of guidance.

Like ``tests.support.reference_script`` it shares no code with exporter, runtime or tuning. The halves of guidance are evaluated
one after the other, each with hooks of its own, so that nothing has to be cut apart or put together. Formulas are written down
here as docs/plans.md has them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.reference_script import _first, _like, _shortcut


@dataclass(frozen=True)
class Rule:
    """Modules by diffusers path that inherit at all but the key steps; ``damping`` where they are forecast, from ``start`` on.

    The ``kind`` is output or residual; of an attention inside a transformer (``attn1``, ``attn2``) also sum: what it is added to
    is inherited with it.
    """

    paths: Sequence[str]
    keys: Collection[int]
    kind: str = "output"
    damping: float | None = None
    start: int = 0


@dataclass(frozen=True)
class Skip:
    """Steps other than the key steps do not evaluate the UNet: its prediction is carried as noise, picture or as it is."""

    keys: Collection[int]
    space: str = "raw"
    damping: float | None = None


@dataclass(frozen=True)
class Halves:
    """Steps other than the key steps evaluate the prompt's half alone."""

    keys: Collection[int]
    scale: float = 1.0


@dataclass
class _History:
    """What the last two key steps made, and their numbers."""

    damping: float | None
    made: list[tuple[int, Tensor]] = field(default_factory=list)

    def keep(self, index: int, tensor: Tensor) -> None:
        self.made = [*self.made, (index, tensor)][-2:]

    def at(self, index: int) -> Tensor:
        step, last = self.made[-1]
        if self.damping is None or len(self.made) == 1:
            return last
        before, older = self.made[0]
        return last + self.damping * (index - step) / (step - before) * (last - older)


class _Hook:
    """On one module, for one half: keeps what it made or added at a key step, and forecasts it at others."""

    def __init__(self, rule: Rule) -> None:
        self.rule, self.history, self.index = rule, _History(rule.damping), 0
        self.stream = torch.zeros(())

    def look(self, norm: nn.Module, args: Any) -> None:
        """Before the norm of an attention: what the attention's output is going to be added to."""
        self.stream = args[0]

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        tensor = _first(output)
        past = _shortcut(module, args, kwargs) if self.rule.kind == "residual" else torch.zeros(())
        past = -self.stream if self.rule.kind == "sum" else past
        if self.index == self.rule.start:
            self.history = _History(self.rule.damping)
        if self.index in self.rule.keys:
            self.history.keep(self.index, tensor - past)
        return _like(output, self.history.at(self.index) + past)


class _Half:
    """The UNet on the rows of one half, with hooks of its own."""

    def __init__(self, unet: nn.Module, text: Tensor, rules: Sequence[Rule]) -> None:
        self._unet, self._text = unet, text
        self._hooks = [(path, _Hook(rule)) for rule in rules for path in rule.paths]

    def __call__(self, index: int, sample: Tensor, timestep: Tensor) -> Tensor:
        modules = dict(self._unet.named_modules())
        with ExitStack() as stack:
            for path, hook in self._hooks:
                hook.index = index
                if hook.rule.kind == "sum":
                    stack.callback(modules[path.replace(".attn", ".norm")].register_forward_pre_hook(hook.look).remove)
                stack.callback(modules[path].register_forward_hook(hook, with_kwargs=True).remove)
            return self._unet(sample, timestep, encoder_hidden_states=self._text).sample


def _into(space: str, kind: str, prediction: Tensor, sample: Tensor, share: float) -> Tensor:
    """A prediction as noise or picture; ``share`` is the signal's in the variance of the sample."""
    signal, noise = math.sqrt(share), math.sqrt(1 - share)
    if space == "raw":
        return prediction
    eps = prediction if kind == "epsilon" else signal * prediction + noise * sample
    return eps if space == "eps" else (sample - noise * eps) / signal


def _out_of(space: str, kind: str, value: Tensor, sample: Tensor, share: float) -> Tensor:
    signal, noise = math.sqrt(share), math.sqrt(1 - share)
    if space == "raw":
        return value
    eps = value if space == "eps" else (sample - signal * value) / noise
    return eps if kind == "epsilon" else (eps - noise * sample) / signal


def _share(scheduler: Any, index: int, timestep: Tensor) -> float:
    """The signal's share in the variance of what the model is given: from the scheduler's own sigma, where it has such."""
    if hasattr(scheduler, "sigmas"):
        return 1 / (1 + float(scheduler.sigmas[index]) ** 2)
    return float(scheduler.alphas_cumprod[int(timestep)])


@torch.no_grad()
def reference_words(
    unet: nn.Module,
    scheduler: Any,
    latents: Tensor,
    text: Tensor,
    guidance_scale: float = 1.0,
    rules: Sequence[Rule] = (),
    skip: Skip | None = None,
    halves: Halves | None = None,
) -> Tensor:
    """Final latents; see ``tests.support.reference.reference_denoise`` for the first five arguments.

    With ``halves``, a step that skips the UNet carries the prompt's prediction and adds the difference like any that evaluates
    one half. Rules go on at steps that skip the UNet: their modules are computed at their key steps.
    """
    guided = guidance_scale > 1
    texts = text.chunk(2) if guided else [text]
    parts = [_Half(unet, each, rules) for each in texts]
    carried = [_History(skip.damping if skip else None) for _ in parts]
    kind, difference = scheduler.config.prediction_type, torch.zeros(())
    for index, timestep in enumerate(scheduler.timesteps):
        sample = scheduler.scale_model_input(latents, timestep)
        share = _share(scheduler, index, timestep)
        whole = halves is None or index in halves.keys
        made: list[Tensor | None] = [None] * len(parts)
        for number, part in enumerate(parts):
            needed = skip is None or index in skip.keys or any(index in rule.keys for rule in rules)
            if needed and (whole or number == len(parts) - 1):
                made[number] = part(index, sample, timestep)
            if skip is not None and index in skip.keys and made[number] is not None:
                carried[number].keep(index, _into(skip.space, kind, made[number], sample, share))  # type: ignore[arg-type]
            elif skip is not None and index not in skip.keys:
                made[number] = _out_of(skip.space, kind, carried[number].at(index), sample, share)
        evaluated = whole and (skip is None or index in skip.keys)
        prompt = made[-1]
        assert prompt is not None
        negative = made[0]
        if guided and halves is not None:
            if evaluated and made[0] is not None:
                noises = [_into("eps", kind, each, sample, share) for each in (prompt, made[0])]
                difference = noises[0] - noises[1]
            noise = _into("eps", kind, prompt, sample, share) - halves.scale * difference
            negative = made[0] if evaluated else _out_of("eps", kind, noise, sample, share)
        prediction = prompt if not guided else (1 - guidance_scale) * negative + guidance_scale * prompt  # type: ignore[operator]
        latents = scheduler.step(prediction, timestep, latents).prev_sample
    return latents
