"""The list of plans and their costs, and bundles that take turns: all read from manifests, with nothing built or loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engines import Bundle, Manifest
from engines.null import Null
from runtime import PlanError, Schedule, find_plan
from runtime.__main__ import main
from runtime.execution.siblings import companion
from runtime.plans.presets import PRESETS
from runtime.report.cost import relative_macs
from tests.support.commands import Command, assert_refused, command
from tests.support.unets import manifest_of, small_unet

SWITCH = find_plan("switch:0.4")
TIMESTEPS = [float(timestep) for timestep in range(970, 0, -100)]


@pytest.fixture
def runtime(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.setenv("COLUMNS", "80")
    return command(main, capfd, monkeypatch)


def written(manifest: Manifest, folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(manifest.model_copy(update=changes).model_dump_json())
    return folder


@pytest.fixture
def original(tmp_path: Path) -> Path:
    return written(manifest_of(small_unet("uneven")), tmp_path / "bundles" / "original")


@pytest.fixture
def assembled(tmp_path: Path) -> Path:
    return written(manifest_of(small_unet("no mid")), tmp_path / "bundles" / "assembled", variant="assembled")


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
    assert "no bundle in ./bundles; make one with: python -m exporter build" in outcome.out[-1]
    assert_refused(runtime("plans", "--bundle", "nowhere"), "no bundle at nowhere")


def test_costs_of_no_steps_are_refused(runtime: Command, original: Path) -> None:
    assert_refused(runtime("plans", "--bundle", original, "--steps", 0), "steps = 0; choose 1 or more")


def test_the_companion_is_of_the_same_source_and_lies_beside(original: Path, assembled: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(original)
    # Neither of another source nor unfinished, damaged or of another version.
    written(bundle.manifest, original.parent / "aaa", variant="assembled", source="elsewhere")
    written(bundle.manifest, original.parent / ".aab", variant="assembled")
    (written(bundle.manifest, original.parent / "aac", variant="assembled") / "manifest.json").write_text("{")
    assert companion(bundle, "original", SWITCH, TIMESTEPS) is bundle
    assert companion(bundle, "assembled", SWITCH, TIMESTEPS).folder == assembled


def test_a_companion_that_is_missing_or_does_not_fit(original: Path) -> None:
    bundle = Bundle.open(original)
    with pytest.raises(
        PlanError, match=r"runs the UNet 'assembled', and no bundle .*: python -m exporter build --variant assemb"
    ):
        companion(bundle, "assembled", SWITCH, TIMESTEPS)
    written(bundle.manifest, original.parent / "assembled", variant="assembled", latent_channels=8)
    with pytest.raises(
        PlanError,
        match=r"assembled cannot take turns with it: latent_channels is 4 in original and 8 in assembled; build it with: .*"
        r" --out \S*/bundles/assembled-2$",
    ):
        companion(bundle, "assembled", SWITCH, TIMESTEPS)


def test_a_companion_that_is_missing_is_built_as_the_bundle_was(original: Path) -> None:
    changes: dict[str, Any] = {"config": "shapes", "unet": "tuned", "precision": "fp16", "sizes": ((64, 128), (64, 64))}
    bundle = replace(Bundle.open(original), manifest=Bundle.open(original).manifest.model_copy(update=changes))
    plan = find_plan("switch:0.4+layer:3")
    with pytest.raises(PlanError) as refusal:
        companion(bundle, "assembled", plan, TIMESTEPS, Null())
    assert str(refusal.value).partition("build it with: ")[2] == (
        "python -m exporter build --variant assembled --source test --config shapes --precision fp16 --engine null "
        f"--sizes 64x128,64x64 --batch 1..4 --plan switch:0.4+layer:3 --out {original.parent / 'assembled'}"
    )


def test_of_several_companions_the_one_that_fits_is_taken(original: Path, tmp_path: Path) -> None:
    bundle, unet = Bundle.open(original), small_unet("no mid")
    plan = find_plan("switch:0.4+unit:3")
    parent = original.parent
    written(manifest_of(unet), parent / "a-other", variant="assembled", precision="fp16")
    written(manifest_of(unet), parent / "b-uncut", variant="assembled")
    assert companion(bundle, "assembled", plan, TIMESTEPS).folder == parent / "b-uncut"
    written(manifest_of(unet, None, ["unit:3"]), parent / "c-cut", variant="assembled")
    assert companion(bundle, "assembled", plan, TIMESTEPS).folder == parent / "c-cut"
    assert companion(bundle, "assembled", SWITCH, TIMESTEPS).folder == parent / "b-uncut"
