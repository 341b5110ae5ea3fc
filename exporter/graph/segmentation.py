"""The segments of a whole graph: the UNet's, partitioned for plans, and the text encoder and VAE around it."""

from collections.abc import Sequence

from engines import Segment
from exporter.graph.graph import Graph
from exporter.graph.partition import Granularity, partition
from runtime.plans.plan import Plan, matching
from runtime.plans.presets import find_plan

__all__ = ["DEFAULT_PLANS", "segments_of"]

DEFAULT_PLANS = ("block:2", "deepcache:2")
"""Plans that every bundle is partitioned for; the number makes no difference."""


def segments_of(graph: Graph, granularity: Granularity | None, plans: Sequence[str] = ()) -> tuple[Segment, ...]:
    """The text encoder, the UNet partitioned for the plans (with a granularity, the default ones too), and the VAE's halves.

    Raises:
        PlanError: a plan is unknown, or names a unit that the UNet does not have.
    """
    wanted = [find_plan(plan) for plan in plans]
    if granularity is not None:
        names = [unit.name for unit in graph.unet_units]
        wanted += [plan for plan in map(find_plan, DEFAULT_PLANS) if _fits(plan, names)]
    ends = [u for u in graph.units if u not in graph.unet_units]
    text, *vae = (Segment(name=u.name, units=(u.name,), inputs=u.inputs, outputs=u.outputs) for u in ends)
    return (text, *partition(graph.unet_units, granularity, wanted), *vae)


def _fits(plan: Plan, units: Sequence[str]) -> bool:
    """Whether a UNet has what a plan inherits: one that is too small for a default plan is not partitioned for it."""
    return all(matching(pattern, units) for rule in plan.rules for pattern in rule.units)
