"""Bundles and a prompt in, images out: plans, the demand-driven executor, and the text-to-image pipeline."""

from runtime.errors import PlanError, RequestError
from runtime.executor import Executor, Network, StepRecord
from runtime.pipeline import Generation, Pipeline, default_bundle, generate, load
from runtime.plan import Explicit, Plan, Uniform
from runtime.presets import PRESETS, find_plan

__all__ = [
    "PRESETS",
    "Executor",
    "Explicit",
    "Generation",
    "Network",
    "Pipeline",
    "Plan",
    "PlanError",
    "RequestError",
    "StepRecord",
    "Uniform",
    "default_bundle",
    "find_plan",
    "generate",
    "load",
]
