"""The list of plans and their costs, and bundles that take turns: all read from manifests, with nothing built or loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines import Bundle
from runtime import Schedule, find_plan
from runtime.plans.presets import PRESETS
from runtime.report.cost import relative_macs
from tests.support.commands import Command, assert_refused
from tests.support.unets import manifest_of, small_unet

SWITCH = find_plan("switch:0.4")
TIMESTEPS = [float(timestep) for timestep in range(970, 0, -100)]


@pytest.fixture(autouse=True)
def narrow(runtime: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")


def rows(out: list[str]) -> dict[str, str]:
    """The lines of the table, by plan."""
    forms = {*(preset.form for preset in PRESETS.values()), "FILE.json"}
    return {line.split()[0]: line for line in out if line.split() and line.split()[0] in forms}


def test_every_plan_has_one_line_and_its_cost(runtime: Command, original: Path, assembled: Path) -> None:
    outcome = runtime("plans", "--bundle", original, "--steps", 30)
    assert outcome.code == 0
    found = rows(outcome.out)
    assert list(found) == [*(preset.form for preset in PRESETS.values()), "FILE.json"]
    # One line each: none is continued on the next one.
    table = [line for line in outcome.out if line.strip()]
    table = table[2 : table.index(found["FILE.json"]) + 1]
    assert table == list(found.values())
    manifest = Bundle.open(original).manifest
    for name in ("block:3", "deepcache:3"):
        cost = relative_macs(Schedule(find_plan(name), {"original": manifest}, [900.0 - index for index in range(30)]))
        assert f" {cost:.2f} " in found[f"{name.split(':')[0]}:N"]
    assert " 1.00 " in found["full"]
    assert " to 1.00 " in found["adaptive:X"]
    # Not cut for these, so the cost is that of a bundle which is.
    fitting = manifest_of(small_unet("uneven"), None, ["unit:3"])
    cost = relative_macs(Schedule(find_plan("unit:3"), {"original": fitting}, [900.0 - index for index in range(30)]))
    assert f" {cost:.2f} * " in found["unit:N"]
    assert "block:3, layer:3" in " ".join(outcome.out)


def test_a_switch_is_compared_with_the_bundle_that_was_named(runtime: Command, original: Path, assembled: Path) -> None:
    costs = [float(rows(runtime("plans", "--bundle", folder).out)["switch:X"].split()[1]) for folder in (original, assembled)]
    assert costs[0] < 1 < costs[1]


def test_a_plan_that_needs_another_bundle_has_no_cost_without_it(runtime: Command, original: Path) -> None:
    outcome = runtime("plans", "--bundle", original)
    assert " - " in rows(outcome.out)["switch:X"]
    assert "no bundle of the other UNet" in " ".join(" ".join(outcome.out).split())


def test_without_a_bundle_the_list_says_what_costs_need(
    runtime: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = runtime("plans")
    assert outcome.code == 0
    assert "inherit the last up block but one" in rows(outcome.out)["block:N"]
    assert "MACs" not in "\n".join(outcome.out)
    assert "no bundle in ./bundles; build it with: python -m exporter build" in outcome.out[-1]
    assert_refused(runtime("plans", "--bundle", "nowhere"), "no bundle at nowhere")


def test_costs_of_no_steps_are_refused(runtime: Command, original: Path) -> None:
    assert_refused(runtime("plans", "--bundle", original, "--steps", 0), "steps = 0; choose 1 or more")
