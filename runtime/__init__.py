"""Bundles and a prompt in, images out: plans, the demand-driven executor, and the pipeline."""

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
