"""Bundles and a prompt in, images out: plans, the demand-driven executor, and the pipeline."""

from typing import TYPE_CHECKING

from engines.lazy import lazy_names

if TYPE_CHECKING:
    from runtime.api import default_bundle, generate, load
    from runtime.attachment import Attachment, attach
    from runtime.diffusers_unet import UNet
    from runtime.errors import NonFiniteError, PlanError, RequestError
    from runtime.execution.executor import Executor, LoadedBundle, StepRecord
    from runtime.generation import Generation
    from runtime.pipeline import Pipeline
    from runtime.plans.plan import Plan, Rule, UNetRange
    from runtime.plans.presets import PRESETS, find_plan
    from runtime.plans.schedule import Schedule
    from runtime.request import Request
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "runtime.api": ("default_bundle", "generate", "load"),
            "runtime.attachment": ("Attachment", "attach"),
            "runtime.diffusers_unet": ("UNet",),
            "runtime.errors": ("NonFiniteError", "PlanError", "RequestError"),
            "runtime.execution.executor": ("Executor", "LoadedBundle", "StepRecord"),
            "runtime.generation": ("Generation",),
            "runtime.pipeline": ("Pipeline",),
            "runtime.plans.plan": ("Plan", "Rule", "UNetRange"),
            "runtime.plans.presets": ("PRESETS", "find_plan"),
            "runtime.plans.schedule": ("Schedule",),
            "runtime.request": ("Request",),
        },
    )

__all__ = [
    "PRESETS",
    "Attachment",
    "Executor",
    "Generation",
    "LoadedBundle",
    "NonFiniteError",
    "Pipeline",
    "Plan",
    "PlanError",
    "Request",
    "RequestError",
    "Rule",
    "Schedule",
    "StepRecord",
    "UNet",
    "UNetRange",
    "attach",
    "default_bundle",
    "find_plan",
    "generate",
    "load",
]
