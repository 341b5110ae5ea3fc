"""Bundles and a prompt in, images out: plans, the demand-driven executor, and the text-to-image pipeline."""

from runtime.drop_in import UNet
from runtime.entry import default_bundle, generate, load
from runtime.errors import PlanError, RequestError
from runtime.executor import Executor, Network, StepRecord
from runtime.pipeline import Generation, Pipeline
from runtime.plan import Plan, Rule, UNetRange
from runtime.presets import PRESETS, find_plan
from runtime.schedule import Schedule

__all__ = [
    "PRESETS",
    "Executor",
    "Generation",
    "Network",
    "Pipeline",
    "Plan",
    "PlanError",
    "RequestError",
    "Rule",
    "Schedule",
    "StepRecord",
    "UNet",
    "UNetRange",
    "default_bundle",
    "find_plan",
    "generate",
    "load",
]
