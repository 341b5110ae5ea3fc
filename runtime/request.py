"""A request for pictures: all that a call of ``generate`` asks of a bundle, checked before anything is loaded or computed."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from runtime.arguments.values import CHECKS, shown
from runtime.errors import RequestError
from runtime.images.pictures import Picture
from runtime.images.schedulers import check_scheduler
from runtime.plans.plan import Plan
from runtime.plans.presets import find_plan

__all__ = ["FIELDS", "Request"]

_SEEDS = 2**63
"""PyTorch's generators take seeds of 64 bits."""
_DRAWN_SEEDS = 2**32
"""Seeds that are drawn are below this, so that people can read them out."""


@dataclass(frozen=True)
class Request:
    """All that a call of ``generate`` asks of a bundle; the arguments are described there.

    Harmless differences of type are made good: 64.0 is taken for 64, one prompt for a list of one. Anything else is refused.
    What depends on the bundle (the sizes that its UNet takes, the memory that is needed) is checked by ``Pipeline.prepare``.

    Raises:
        RequestError: a field is of a wrong type or outside of its range.
        PlanError: the plan is unknown or malformed.
    """

    prompt: str | Sequence[str] | None
    negative_prompt: str | Sequence[str] | None = ""
    steps: int = 20
    guidance_scale: float | None = None
    seed: int | Sequence[int] | None = 0
    height: int | None = None
    width: int | None = None
    num_images: int = 1
    scheduler: str = "dpm++"
    plan: str | Path | Plan = "full"
    image: Picture | None = None
    strength: float = 0.6
    mask: Picture | None = None
    allow_nonfinite: bool = False
    guidance_rescale: float = 0.0
    generator: torch.Generator | Sequence[torch.Generator] | None = field(default=None, compare=False)
    latents: Tensor | None = field(default=None, compare=False)
    prompt_embeds: Tensor | None = field(default=None, compare=False)
    negative_prompt_embeds: Tensor | None = field(default=None, compare=False)
    output_type: str = "pil"
    long_prompts: str = "chunks"
    clip_skip: int | None = None

    def __post_init__(self) -> None:
        for each in fields(self):
            if each.name != "prompt" or self.prompt_embeds is None:
                object.__setattr__(self, each.name, CHECKS[each.name](each.name, getattr(self, each.name)))
        check_scheduler(self.scheduler)
        self._check_embeds()
        self._check_noise()
        if self.mask is not None and self.image is None:
            raise RequestError("mask is given, but no image; give the image whose white part is to be repainted")

    def _check_embeds(self) -> None:
        """Raise RequestError where text features are given beside the text that they would be made from."""
        for name in ("prompt", "negative_prompt"):
            if getattr(self, f"{name}_embeds") is not None and getattr(self, name):
                raise RequestError(f"{name} and {name}_embeds are both given; give one of them")
        embeds, negative = self.prompt_embeds, self.negative_prompt_embeds
        if negative is not None and len(negative) not in (1, self.images // self.num_images):
            raise RequestError(
                f"negative_prompt_embeds has {len(negative)} rows for {self.images // self.num_images} prompt(s); "
                "give one for all, or one for each"
            )
        if embeds is None and len(self.negative_prompts) not in (1, len(self.prompts)):
            raise RequestError(
                f"negative_prompt has {len(self.negative_prompts)} texts for {len(self.prompts)} prompt(s); "
                "give one for all, or one for each"
            )

    def _check_noise(self) -> None:
        """Raise RequestError unless there is one origin of the noise; a seed that is asked for is drawn here."""
        if self.seed is None:
            object.__setattr__(self, "seed", secrets.randbelow(_DRAWN_SEEDS))
        if isinstance(self.seed, tuple) and len(self.seed) != self.images:
            raise RequestError(f"seed is a list of {len(self.seed)} for {self.images} picture(s); give one for each")
        last = _SEEDS - (1 if isinstance(self.seed, tuple) else self.images)
        for seed in self.seed if isinstance(self.seed, tuple) else (self.seed,):
            if not -_SEEDS <= seed <= last:  # a number: see CHECKS
                raise RequestError(f"seed = {shown(seed)}; choose one from {-_SEEDS} to {last}")
        if self.generator is not None and self.seed != 0:
            raise RequestError(f"seed = {shown(self.seed)} and a generator are both given; give one of them")
        if not isinstance(self.generator, torch.Generator | None) and len(self.generator) != self.images:
            raise RequestError(f"generator is a list of {len(self.generator)} for {self.images} picture(s); give one for each")
        if isinstance(self.generator, torch.Generator) and self.images > 1 and self.image is not None:
            raise RequestError(f"generator is one for {self.images} pictures from an image; give a list, with one for each")
        if self.latents is not None and self.image is not None:
            raise RequestError("latents and image are both given; a call starts from one of them")

    @property
    def picture_seeds(self) -> tuple[int, ...]:
        """Of each picture's own generator: those given, or the one given and those that follow it."""
        if isinstance(self.seed, tuple):
            return self.seed
        return tuple(range(int(self.seed), int(self.seed) + self.images))  # type: ignore[arg-type]  # drawn if it was None

    def copied(self) -> "Request":
        """The same request, with copies of its generators as they are now: what is drawn for it can be drawn once more."""
        if self.generator is None:
            return self
        given = [self.generator] if isinstance(self.generator, torch.Generator) else list(self.generator)
        copies = [torch.Generator(each.device).set_state(each.get_state()) for each in given]
        return replace(self, generator=copies[0] if isinstance(self.generator, torch.Generator) else copies)

    @property
    def generators(self) -> list[torch.Generator] | None:
        """Those given, one for each picture; None where a seed decides."""
        if isinstance(self.generator, torch.Generator):
            return [self.generator] * self.images
        return None if self.generator is None else list(self.generator)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of each picture's noise; none where it comes from elsewhere."""
        given = self.generator is not None or self.latents is not None
        return () if given else self.picture_seeds

    @property
    def prompts(self) -> tuple[str, ...]:
        """All prompts; none where text features were given."""
        return () if self.prompt is None else (self.prompt,) if isinstance(self.prompt, str) else tuple(self.prompt)

    @property
    def negative_prompts(self) -> tuple[str, ...]:
        """One negative prompt for all prompts, or one for each."""
        negative = self.negative_prompt or ""
        return (negative,) if isinstance(negative, str) else tuple(negative)

    @property
    def images(self) -> int:
        """Number of pictures: ``num_images`` of each prompt."""
        return (len(self.prompts) if self.prompt_embeds is None else len(self.prompt_embeds)) * self.num_images

    @property
    def found_plan(self) -> Plan:
        """The plan, which was read from its file or made from its presets."""
        return find_plan(self.plan)


FIELDS = tuple(each.name for each in fields(Request))
"""The names of all that can be asked for."""
