"""A plan's rules in words."""

from __future__ import annotations

import pytest

from engines import Bundle
from runtime import Plan, Rule, Schedule, find_plan
from runtime.plans.key_steps import Explicit, Threshold, Uniform
from runtime.plans.words import Predict
from runtime.report.rules import described_rules
from tests.support.commands import Command
from tests.support.unets import shared_network

STEPS = 8


def lines(plan: Plan, guided: bool = True) -> list[str]:
    manifest = shared_network("uneven", "unit", "unit:2").manifest
    return described_rules(Schedule(plan, {"one": manifest}, [1000 - 100 * step for step in range(STEPS)], 1000, guided))


def rule(unit: str, **fields: object) -> Plan:
    return Plan(name="p", rules=(Rule.model_validate({"units": (unit,), "when": Uniform(every=3), **fields}),))


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (
            rule("up.-1.layer.-2"),
            "rules.0: up.-1.layer.-2 inherited by output; key steps 0, 3, 6; between them the features of the last one (order 0)",
        ),
        (
            rule("*.attention", kind="residual", predict=Predict(damping=0.5), start=0.5),
            "rules.0: *.attention inherited by residual at steps 4 to 7; key steps 4, 7; "
            "between them the features forecast along the last two (order 1, damping 0.5)",
        ),
        (
            rule("head", predict=Predict(damping=0.25, space="x0"), when=Explicit(steps=(0, 1, 2, 3, 5, 7))),
            "rules.0: the UNet is skipped; key steps 0 to 3, 5, 7; "
            "between them the picture (x0) forecast along the last two (order 1, damping 0.25)",
        ),
        (
            rule("head", predict=Predict(order=0, space="eps")),
            "rules.0: the UNet is skipped; key steps 0, 3, 6, 7; between them the noise (eps) of the last one (order 0)",
        ),
        (
            rule("head"),
            "rules.0: the UNet is skipped; key steps 0, 3, 6, 7; between them the prediction of the last one (order 0)",
        ),
        (
            rule("up.2", when=Threshold(above=0.3)),
            "rules.0: up.2 inherited by output; a key step whenever stem has changed by more than 0.3 since the last; "
            "between them the features of the last one (order 0)",
        ),
        (
            find_plan("guide:3"),
            "guidance: both halves at steps 0, 3, 6; between them only the prompt's, and the noise by which the halves differ is "
            "that of the last one (order 0), times 1",
        ),
    ],
)
def test_rules_say_key_steps_order_damping_and_space(plan: Plan, said: str) -> None:
    assert lines(plan) == [said]


def test_what_has_no_step_is_said_to_have_none() -> None:
    assert "at no step: too few run; key steps none" in lines(rule("up.2", start=0.5, stop=0.51))[0]
    assert lines(find_plan("guide:3"), guided=False) == lines(find_plan("full")) == []


def test_explain_names_the_predictor(runtime: Command, mini_bundle: Bundle) -> None:
    given = ("a red star", "--bundle", mini_bundle.folder, "--steps", 4, "--explain", "--plan", "skip:2+forecast:2+guide:3")
    printed = runtime(*given).out
    found = [line for line in printed if line.startswith(("rules.", "guidance: "))]
    assert [line.split(":")[0] for line in found] == ["rules.0", "rules.1", "guidance"]
    assert "key steps 0, 2, 3; between them the picture (x0) forecast along the last two (order 1, damping 0.5)" in found[0]
    assert "key steps 0, 2; between them the features forecast along the last two (order 1, damping 0.75)" in found[1]
