"""The fields of a plan beside its rules' units and key steps: how features are forecast, and when guidance is evaluated.

A plan that a search found also says what it was found for.

A-SDM (arXiv 2406.00210) inherits features as they are. Forecasting them along the last two key steps is what TaylorSeer (arXiv
2503.06923) does for transformers; reusing the difference that guidance makes is the idea of Faster Diffusion's successors
(FasterCache, arXiv 2410.19355). Forms and defaults here are this project's choice.
"""

from typing import Annotated, Literal

from pydantic import Field

from engines.support.records import Name, Record
from runtime.plans.key_steps import Back, Explicit, Front, Quadratic, Random, Uniform

__all__ = ["FixedMode", "Found", "Guidance", "Predict"]

FixedMode = Annotated[Uniform | Quadratic | Front | Back | Explicit | Random, Field(discriminator="mode")]
"""Modes whose key steps are known before anything runs."""


class Predict(Record):
    """How a rule's features are forecast at its inherit steps.

    With order 1, a step ``i`` reads ``F1 + damping * (i - k1) / (k1 - k0) * (F1 - F0)``: F1 is the feature of the last key step
    k1, F0 that of the one before, k0. Between the first two key steps of its range, and with order 0, it reads F1.

    ``space`` is for rules that skip the UNet (``head``): what is carried is the prediction as it is (``raw``), or the noise
    (``eps``) or the picture (``x0``) that it stands for, whatever the model predicts.
    """

    order: Literal[0, 1] = 1
    damping: float = Field(default=0.75, ge=0, le=2, allow_inf_nan=False)
    space: Literal["raw", "eps", "x0"] = "raw"


class Guidance(Record):
    """The steps at which classifier-free guidance evaluates both of its halves; at the others only that of the prompt.

    At those, the noise for the negative prompt is the noise for the prompt less ``scale`` times the difference of the two at the
    last step that had both. The difference is one of noise, whatever the model predicts.
    """

    when: FixedMode
    scale: float = Field(default=1.0, ge=0, le=10, allow_inf_nan=False)


class Found(Record):
    """The settings that a plan was found for, and there its ``cost`` relative to ``full`` and ``psnr`` in dB to its pictures.

    ``source`` is the model whose pictures these are, as ``exporter build --source`` was given it; empty where that is not known.
    """

    scheduler: Name
    steps: int = Field(ge=1)
    guidance_scale: float = Field(allow_inf_nan=False)
    prompts: int = Field(ge=1)
    cost: float = Field(ge=0, allow_inf_nan=False)
    psnr: float = Field(allow_inf_nan=False)
    source: str = Field(default="", max_length=1000)
