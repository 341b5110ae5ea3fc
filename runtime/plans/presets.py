"""Named plans, and joined ones: ``full``, ``block:3``, ``deepcache:3``, ``switch:0.4+block:3``."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engines.bundle.names import BRANCH, NOISE
from engines.support.spelling import did_you_mean
from runtime.errors import PlanError
from runtime.plans.key_steps import Back, Explicit, Front, Mode, Quadratic, Random, Threshold, Uniform
from runtime.plans.plan import Plan, Rule, UNetRange, shown
from runtime.plans.words import Guidance, Predict

__all__ = ["PRESETS", "Preset", "find_plan", "join_presets"]

FASTER_DIFFUSION = (0, 1, 2, 3, 5, 10, 15, 25, 35)
"""Key steps of 50 as published (arXiv 2312.09608)."""


_MOST_CHARACTERS = 200
"""Of presets joined; it is the name of the plan."""


@dataclass(frozen=True)
class Preset:
    """A named plan: how it is written, what it does in one line, an example, and what it makes of the part after the colon."""

    form: str
    summary: str
    example: str
    make: Callable[[str], Plan]


def _every(text: str) -> Uniform:
    if not text.isdecimal() or len(text) > 6 or int(text) < 1:
        raise ValueError("a number of steps, such as 3")
    return Uniform(every=int(text))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _share(text: str) -> float:
    if not 0 < _number(text) < 1:
        raise ValueError("a number between 0 and 1, such as 0.4")
    return _number(text)


def _change(text: str) -> float:
    if not 0 <= _number(text) < math.inf:
        raise ValueError("a relative change of 0 or more, such as 0.3")
    return _number(text)


def _full(text: str) -> Plan:
    if text:
        raise ValueError("nothing after it")
    return Plan(name="full")


def _uniform(*units: str, kind: str = "output") -> Callable[[str], Plan]:
    """A preset of one rule with every N-th step a key step."""

    def make(text: str) -> Plan:
        return Plan(name="", rules=(Rule(units=units, kind=kind, when=_every(text)),))

    return make


def _encoder(text: str) -> Plan:
    when = Explicit(steps=FASTER_DIFFUSION, of=50) if text == "faster" else _every(text)
    # Everything on the way down and in the middle; a UNet without a mid block has no unit of that name.
    return Plan(name="", rules=(Rule(units=("[sdm]*",), when=when),))


def _spaced(mode: Callable[..., Mode]) -> Callable[[str], Plan]:
    """A preset that inherits what deepcache does, with key steps of another mode, one in N."""

    def make(text: str) -> Plan:
        return Plan(name="", rules=(Rule(units=("up.-1.layer.-2",), when=mode(every=_every(text).every)),))

    return make


def _forecast(text: str) -> Plan:
    when = _every(text)
    rule = Rule(units=("up.-1.layer.-2",), when=when, predict=Predict(damping=0.75 if when.every <= 3 else 0.5))
    return Plan(name="", rules=(rule,))


def _skip(text: str) -> Plan:
    return Plan(name="", rules=(Rule(units=(NOISE,), when=_every(text), predict=Predict(damping=0.5, space="x0")),))


def _guide(text: str) -> Plan:
    return Plan(name="", guidance=Guidance(when=_every(text)))


def _switch(text: str) -> Plan:
    at = _share(text)
    return Plan(name="", unets=(UNetRange(unet="assembled", start=0, stop=at), UNetRange(unet="original", start=at, stop=1)))


def _adaptive(text: str) -> Plan:
    return Plan(name="", rules=(Rule(units=("up.-2",), when=Threshold(above=_change(text))),))


def _first(text: str) -> Plan:
    when = Threshold(above=_change(text), feature=f"down.0.layer.0.attention{BRANCH}")
    return Plan(name="", rules=(Rule(units=("up.-1.layer.-2",), when=when),))


def _tgate(text: str) -> Plan:
    # What cross-attention adds is computed for the last time at the first step of the rest of the schedule.
    when = Explicit(steps=(0,))
    return Plan(name="", rules=(Rule(units=("*.attention.cross",), kind="residual", when=when, start=_share(text)),))


# Which units each level inherits is this project's choice where A-SDM is silent; DeepCache's and Faster Diffusion's are theirs.
PRESETS = {
    "full": Preset("full", "there are none: every step computes all", "full", _full),
    "block": Preset("block:N", "inherit the last up block but one", "block:3", _uniform("up.-2")),
    "layer": Preset("layer:N", "inherit the last up block's first layer", "layer:3", _uniform("up.-1.layer.0")),
    "unit": Preset(
        "unit:N", "skip attentions, add what they added", "unit:3", _uniform("*.attention", kind="residual")
    ),
    "encoder": Preset("encoder:faster", "run the way up only (also encoder:N)", "encoder:faster", _encoder),
    "deepcache": Preset("deepcache:N", "run the stem, the last layer and the head", "deepcache:3", _uniform("up.-1.layer.-2")),
    "quadratic": Preset("quadratic:N", "as deepcache; key steps dense around 0.3", "quadratic:3", _spaced(Quadratic)),
    "front": Preset("front:N", "as deepcache; key steps dense early", "front:3", _spaced(Front)),
    "back": Preset("back:N", "as deepcache; key steps dense late", "back:3", _spaced(Back)),
    "random": Preset("random:N", "as deepcache; random key steps, a control", "random:3", _spaced(Random)),
    "adaptive": Preset("adaptive:X", "as block; key steps as the stem changes", "adaptive:0.3", _adaptive),
    "first": Preset("first:X", "as deepcache; key steps by first attention", "first:0.3", _first),
    "forecast": Preset("forecast:N", "as deepcache; features are forecast", "forecast:3", _forecast),
    "skip": Preset("skip:N", "run nothing; the picture is forecast", "skip:2", _skip),
    "tgate": Preset("tgate:X", "after X of the steps, keep cross-attention", "tgate:0.4", _tgate),
    "guide": Preset("guide:N", "evaluate the prompt alone, not both halves", "guide:2", _guide),
    "switch": Preset("switch:X", "the assembled UNet for X of the noise", "switch:0.4", _switch),
}  # fmt: skip


def find_plan(plan: str | Path | Plan) -> Plan:
    """A plan from presets joined by ``+``, the path of a JSON file, or a plan.

    Args:
        plan: such as ``"full"``, ``"switch:0.4+block:3"``, ``"my-plan.json"``.

    Raises:
        PlanError: unknown preset, bad number, or unreadable file.
    """
    if isinstance(plan, Plan):
        return plan.checked()
    if not isinstance(plan, str | Path):
        raise PlanError(f"plan is a {type(plan).__name__}; give a preset such as 'block:3', the path of a .json file, or a Plan")
    if isinstance(plan, Path) or plan.endswith(".json"):
        return Plan.read(Path(plan))
    return join_presets(plan, "the path of a .json file")


def join_presets(plan: str, otherwise: str) -> Plan:
    """A plan from presets joined by ``+``; no file is read.

    Args:
        plan: the text.
        otherwise: what else can be given for a plan, in words.

    Raises:
        PlanError: unknown preset or bad number.
    """
    if len(plan) > _MOST_CHARACTERS:
        raise PlanError(f"plan {shown(plan)!r} has {len(plan)} characters; join fewer presets, or give {otherwise}")
    parts = [_preset(part, otherwise) for part in plan.split("+")]
    guidance = [found.guidance for found in parts if found.guidance]
    if len(guidance) > 1:
        raise PlanError(f"plan {plan}: guide stands there {len(guidance)} times; a plan can have it once")
    return Plan(
        name=plan,
        unets=tuple(part for found in parts for part in found.unets),
        rules=tuple(rule for found in parts for rule in found.rules),
        guidance=next(iter(guidance), None),
    ).checked()


def _preset(text: str, otherwise: str) -> Plan:
    name, _, rest = text.partition(":")
    if name not in PRESETS:
        forms = ", ".join(preset.form for preset in PRESETS.values())
        raise PlanError(
            f"unknown plan {shown(text)!r}; {_meant(name, rest)}choose from: {forms}, several joined by '+', or {otherwise}"
        )
    try:
        return PRESETS[name].make(rest)
    except ValueError as error:
        raise PlanError(f"plan {shown(text)!r}: {name} takes {error}") from error


def _meant(name: str, rest: str) -> str:
    """The preset that was meant by a name that is none, as it is written with the part after the colon that was given."""
    forms = {known: f"{known}:{rest}" if rest else preset.form for known, preset in PRESETS.items()}
    near = did_you_mean(name.rstrip("0123456789.-"), forms)
    return next(
        (near.replace(f"mean {known}?", f"mean {form}?") for known, form in forms.items() if f"mean {known}?" in near), ""
    )
