"""Named plans: ``full``, ``block:3``, ``deepcache:3``. Each expands to a ``Plan`` for the UNet at hand."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import PlanError
from runtime.plan import Plan, Uniform

__all__ = ["PRESETS", "Preset", "find_plan"]


@dataclass(frozen=True)
class Preset:
    """A named plan: how it is written, what it does in one line, and what it makes of a number and a UNet's units."""

    form: str
    summary: str
    inherit: Callable[[Sequence[str]], str] | None


def _up_blocks(units: Sequence[str]) -> int:
    return len({unit.split(".")[1] for unit in units if unit.startswith("up.")})


def _deep_block(units: Sequence[str]) -> str:
    """The last up block but one: with it, everything below the outermost resolution is skipped."""
    blocks = _up_blocks(units)
    if blocks < 2:
        raise PlanError(f"plan block:N inherits the last up block but one; this UNet has {blocks} up block(s): use deepcache:N")
    return f"up.{blocks - 2}"


def _deepcache_layer(units: Sequence[str]) -> str:
    """The last layer of the UNet but one: only the stem, the last layer and the head are left (DeepCache, section 3.3)."""
    block = f"up.{_up_blocks(units) - 1}"
    layers = len({unit.split(".")[3] for unit in units if unit.startswith(f"{block}.layer.")})
    if layers < 2:
        raise PlanError(f"plan deepcache:N inherits the last layer but one of {block}, which has {layers} layer(s): use block:N")
    return f"{block}.layer.{layers - 2}"


PRESETS = {
    "full": Preset("full", "every step computes everything", None),
    "block": Preset("block:N", "every N-th step computes everything; the others inherit the last up block but one", _deep_block),
    "deepcache": Preset(
        "deepcache:N", "as DeepCache: the others run only the stem, the last layer and the head", _deepcache_layer
    ),
}


def find_plan(plan: str | Path | Plan, units: Sequence[str]) -> Plan:
    """A plan from a preset's name, the path of a JSON file, or a plan.

    Args:
        plan: such as ``"full"``, ``"block:3"``, ``"my-plan.json"``.
        units: names of the UNet's units, which presets are expanded for.

    Raises:
        PlanError: unknown preset, bad number, or unreadable file.
    """
    if isinstance(plan, Plan):
        return plan
    if isinstance(plan, Path) or plan.endswith(".json"):
        return Plan.read(Path(plan))
    name, _, number = plan.partition(":")
    forms = ", ".join(preset.form for preset in PRESETS.values())
    if name not in PRESETS:
        raise PlanError(f"unknown plan {plan!r}; choose from: {forms}, or the path of a .json file")
    inherit = PRESETS[name].inherit
    if inherit is None:
        if number:
            raise PlanError(f"plan {name!r} takes no number, got {plan!r}")
        return Plan(name=name)
    if not number.isdecimal() or int(number) < 1:
        raise PlanError(f"plan {name!r} needs a number of steps, such as {name}:3; got {plan!r}")
    return Plan(name=plan, key_steps=Uniform(every=int(number)), inherit=(inherit(units),))
