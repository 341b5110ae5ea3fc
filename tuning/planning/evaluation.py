"""The evaluation of plans: pictures of a few prompts, from the same noise under every plan, compared with those of ``full``."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engines.support.records import one_line
from runtime.embedded import EXAMPLES
from runtime.generation import Generation
from runtime.pipeline import Pipeline
from runtime.plans.plan import Plan
from runtime.plans.presets import find_plan
from runtime.report.cost import full_macs, macs_of, share_of_rows
from runtime.request import Request
from tuning.embedded import held_back_prompts, training_prompts
from tuning.errors import TuningError

__all__ = ["HELD_BACK", "Pictures", "choose_prompts", "pictures_at_a_time", "typical_error"]

HELD_BACK = 48
"""Prompts at most that a plan is judged by and was not found with."""
_HELD_BACK_SEED = 1_000
_SEED = 900_000
_PIXELS_AT_A_TIME = 2**19
"""Where engines have no profile: two pictures of 512x512, and more of smaller ones."""
_MOST_AT_A_TIME = 16
_LEAST_ERROR = 1e-10
"""Of a picture, mean squared: what is nearer counts as 100 dB."""
_MOST_BYTES = 2**22


def choose_prompts(source: str, file: Path | None, count: int) -> tuple[list[str], list[str]]:
    """Prompts to find a plan with, and others to judge it by (none where a file has too few).

    Args:
        source: of the bundle; the embedded model has prompts of its own, and others that it was never trained on.
        file: one prompt a line.
        count: of the former.

    Raises:
        TuningError: the file cannot be read or is empty, or there is none for another model.
    """
    if file is not None:
        prompts = _read(file)
        return prompts[:count], prompts[count : count + HELD_BACK]
    if source not in EXAMPLES:
        raise TuningError(f"a plan for {one_line(source, 100)} needs --prompts FILE, one a line; {count} are enough")
    return training_prompts(source, count, "prompts of a search"), held_back_prompts(source, HELD_BACK)


def _read(file: Path) -> list[str]:
    """The lines of a file that are not blank, each once."""
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise TuningError(f"--prompts {file}: it has more than {_MOST_BYTES} bytes; give a file with one prompt a line")
        lines = file.read_text("utf-8-sig").splitlines()
    except OSError as error:
        raise TuningError(f"--prompts {file} cannot be read ({error.strerror}); give a file with one prompt a line") from error
    except UnicodeDecodeError as error:
        raise TuningError(f"--prompts {file} is no text in UTF-8; give a file with one prompt a line") from error
    prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not prompts:
        raise TuningError(f"--prompts {file} is empty; write one prompt a line, some 16 of them")
    return prompts


def typical_error(latents: Tensor, reference: Tensor) -> float:
    """The geometric mean over pictures of their mean squared errors, which counts each picture's decibels alike."""
    squares = (latents - reference).square().mean((1, 2, 3))
    return float(squares.clamp_min(_LEAST_ERROR).log().mean().exp())


def pictures_at_a_time(pipeline: Pipeline, height: int, width: int) -> int:
    """How many pictures a call may make: what the engine's profile allows, or else what fits into little memory."""
    if pipeline.engine.has_profile:
        return pipeline.manifest.max_images
    return max(1, min(_MOST_AT_A_TIME, _PIXELS_AT_A_TIME // (height * width)))


@dataclass(frozen=True)
class Pictures:
    """Prompts with the noise of each, made a few at a time.

    ``options`` are fields of a ``Request`` beside prompts, seeds and the plan.
    """

    pipeline: Pipeline
    prompts: Sequence[str]
    at_a_time: int
    options: dict[str, Any]
    held_back: bool = False

    def some(self, most: int) -> "Pictures":
        """The first pictures, up to so many."""
        return self if most >= len(self.prompts) else replace(self, prompts=self.prompts[:most])

    @cached_property
    def requests(self) -> list[Request]:
        """One for each call; a static engine's last call is filled up with prompts from the beginning."""
        prompts = list(self.prompts)
        if self.pipeline.is_static:
            prompts += (prompts * self.at_a_time)[: -len(prompts) % self.at_a_time]
        first = _HELD_BACK_SEED if self.held_back else _SEED
        parts = range(0, len(prompts), self.at_a_time)
        return [self._request(prompts[at : at + self.at_a_time], first + at) for at in parts]

    def _request(self, prompts: Sequence[str], seed: int) -> Request:
        """With text that has been encoded, once for all plans."""
        text, negative = self.pipeline.encode(prompts), self.pipeline.encode([""])
        return Request(None, None, seed=seed, prompt_embeds=text, negative_prompt_embeds=negative, **self.options)

    def latents(self, plan: Plan) -> Tensor:
        """Final latents (pictures, channels, height, width) under a plan."""
        made = (self.pipeline.generate(replace(request, plan=plan, output_type="latent")) for request in self.requests)
        return torch.cat([each.latents for each in made])

    def error(self, plan: Plan) -> float:
        """The typical error of the final latents to those of ``full``: see ``typical_error``."""
        return typical_error(self.latents(plan), self.reference)

    @cached_property
    def reference(self) -> Tensor:
        """Final latents of ``full``."""
        return self.latents(find_plan("full"))

    @cached_property
    def _targets(self) -> list[Tensor]:
        return [_images(made) for made in self._made(find_plan("full"), None)]

    def psnr(self, plan: Plan, steps: int | None = None, tick: Callable[[], None] = lambda: None) -> float:
        """Mean PSNR in dB of the pictures under a plan; arguments as ``decibels``."""
        return float(self.decibels(plan, steps, tick).mean())

    def decibels(self, plan: Plan, steps: int | None = None, tick: Callable[[], None] = lambda: None) -> Tensor:
        """PSNR in dB of each picture under a plan to that of ``full`` (pictures), before they are rounded to 8 bits.

        Args:
            plan: to judge.
            steps: of the scheduler, where they are others than those of ``full``.
            tick: called for each call.
        """
        found: list[Tensor] = []
        for target, made in zip(self._targets, self._made(plan, steps), strict=True):
            found.append(_decibels(_images(made), target))
            tick()
        return torch.cat(found)

    def decided(self, plan: Plan, tick: Callable[[], None] = lambda: None) -> tuple[Tensor, float]:
        """As ``decibels``, and the share of the MACs of ``full``, of a plan that decides while it runs: of one picture a call."""
        found, macs, whole = list[Tensor](), 0.0, 0.0
        calls = replace(self, at_a_time=1)._made(plan, None)
        for target, made in zip(torch.cat(self._targets).split(1), calls, strict=True):
            found.append(_decibels(_images(made), target))
            manifests = {name: network.manifest for name, network in self.pipeline.networks.items()}
            macs += sum(share_of_rows(step.half) * macs_of(manifests[step.unet], step.ran) for step in made.steps)
            whole += len(made.steps) * full_macs(self.pipeline.manifest)
            tick()
        return torch.cat(found), macs / whole

    def _made(self, plan: Plan, steps: int | None) -> Iterator[Generation]:
        """Calls one after another, with pictures (pictures, 3, height, width) in [0, 1]."""
        for request in self.requests:
            yield self.pipeline.generate(replace(request, plan=plan, output_type="pt", steps=steps or request.steps))


def _images(made: Generation) -> Tensor:
    images: Any = made.images
    return images  # type: ignore[no-any-return]  # a tensor, as it was asked for


def _decibels(pictures: Tensor, target: Tensor) -> Tensor:
    return -10 * (pictures - target).square().mean((1, 2, 3)).clamp_min(_LEAST_ERROR).log10()
