"""A recipe of one's own in a build, typos that are found before anything is made, and tables in narrow terminals."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from engines import Bundle, Unit
from engines.bundle.names import TEXT, VAE_DECODER
from engines.support.tables import fit
from exporter.segments.progress import Step
from exporter.segments.progress_display import show_progress
from exporter.tables import _plans, show_bundle
from runtime.plans.presets import PRESETS
from runtime.report.plan_table import list_plans
from tests.exporter.conftest import names_in
from tests.support.commands import Command, assert_refused, contents

FakeTrace = Callable[..., list[str]]


def test_a_recipe_of_ones_own_is_a_variant(
    exporter: Command, fake_trace: FakeTrace, tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fake_trace()
    recipe = tmp_path / "slim.json"
    recipe.write_text(json.dumps({"name": "slim", "remove": ["mid"]}))
    given = ["build", "--source", tiny_source, "--variant", "slim.json"]
    done = exporter(*given, "--out", "slim")
    assert done.code == 0
    assert "never distilled" not in done.out
    assert "was cut out of" in done.err[0]
    bundle = Bundle.open("slim")
    assert (bundle.manifest.variant, bundle.manifest.recipe, bundle.manifest.distilled) == ("slim", "slim.json", False)
    assert not [unit for unit in bundle.manifest.unet_units if unit.startswith("mid")]
    assert "--variant slim.json --source" in bundle.rebuild_command()
    assert exporter(*given, "--out", "slim").out[-1].startswith("up to date")
    # The recipe's content counts, and not its name.
    recipe.write_text(json.dumps({"name": "slim", "remove": ["up.-1.layer.1"]}))
    assert_refused(exporter(*given, "--out", "slim"), "exists and is kept")
    recipe.write_text(json.dumps({"name": "My recipe", "remove": ["mid"]}))
    assert_refused(exporter(*given), "variant 'My recipe' is no name; write small letters")
    assert_refused(exporter(*given[:-1], "gone.json"), "gone.json is no recipe (No such file or directory)")
    assert_refused(exporter(*given, "--unet", tiny_source / "unet"), "recipe slim.json and unet", "are both given; give one")
    assert names_in(tmp_path) == ["slim", "slim.json"]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--plan", "deepcash:3"], ["unknown plan 'deepcash:3'; did you mean deepcache:3?"]),
        (["--sizes", "35x32"], ["size 35x32: height and width must be multiples of"]),
        (["--variant", "asembled"], ["unknown variant 'asembled'; did you mean assembled?", "the .json file of a recipe"]),
        (["--engine", "onnxruntim"], ["unknown engine 'onnxruntim'; did you mean onnxruntime?"]),
        (["--granularity", "blok"], ["unknown granularity 'blok'; did you mean block?"]),
        (["--precision", "fp61"], ["unknown precision 'fp61'; did you mean fp16?"]),
    ],
    ids=" ".join,
)
def test_a_typo_is_named_whether_a_bundle_is_there_or_not(
    exporter: Command, fake_trace: FakeTrace, tiny_source: Path, tmp_path: Path, options: list[str], parts: list[str]
) -> None:
    fake_trace()
    given = ["build", "--source", tiny_source, "--out", tmp_path / "bundle"]
    assert_refused(exporter(*given, *options), *parts)
    assert exporter(*given).code == 0
    before = contents(tmp_path)
    assert_refused(exporter(*given, *options), *parts)
    assert_refused(exporter(*given, *options, "--force"), *parts)
    assert contents(tmp_path) == before


def test_a_plan_for_units_that_the_bundle_in_place_does_not_have(
    exporter: Command, fake_trace: FakeTrace, tiny_source: Path, tmp_path: Path
) -> None:
    fake_trace()
    plan = tmp_path / "far.json"
    rule = {"units": ["up.9"], "when": {"mode": "uniform", "every": 2}}
    plan.write_text(json.dumps({"name": "far", "rules": [rule]}))
    given = ["build", "--source", tiny_source, "--out", tmp_path / "bundle"]
    assert exporter(*given).code == 0
    assert_refused(exporter(*given, "--plan", plan), "names 'up.9', which this UNet does not have")


def printed(table: Table, width: int, optional: list[str]) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(fit(table, console, optional))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("width", "left"), [(60, 4), (38, 3), (30, 2)])
def test_columns_go_and_digits_stay(width: int, left: int) -> None:
    table = Table()
    for name in ("segment", "units", "params", "MACs"):
        table.add_column(name, justify="right" if name != "segment" else "left")
    table.add_row("up.3", "13", "860.123", "1,257,256.4")
    lines = printed(table, width, ["units", "params"])
    heads = next(line for line in lines if "MACs" in line or "segm" in line)
    assert sum(name in heads for name in ("seg", "units", "params", "MACs")) == left
    assert any("1,257,256.4" in line for line in lines)
    assert "…" not in "".join(lines)


@pytest.mark.parametrize("width", [80, 76, 73])
def test_names_stay_whole_while_they_fit(width: int) -> None:
    table = Table(box=SIMPLE)
    for name in ("step", "kind", "segments run", "inherited", "MACs", "time"):
        table.add_column(name, justify="right" if name in {"step", "MACs", "time"} else "left")
    table.add_row("12", "inherit", "3 of 13: stem, up.3.layer.2, head", "up.3.layer.1.attention", "0.10", "0.12")
    lines = printed(table, width, ["inherited"])
    words = " ".join(lines).split()
    assert {"inherit", "up.3.layer.2,", "up.3.layer.1.attention", "0.12"} <= set(words)
    assert max(map(len, lines)) <= width


def test_a_bundle_is_shown_in_80_columns(tmp_path: Path) -> None:
    """At Stable Diffusion's size, in each engine: no number is cut."""
    from tests.support.unets import manifest_of, small_unet, written_manifest

    manifest = manifest_of(small_unet("uneven"))
    units = tuple(unit.model_copy(update={"macs": 1_257_256_400_000, "parameters": 860_000_000}) for unit in manifest.units)
    folder = written_manifest(manifest.model_copy(update={"units": units}), tmp_path / "bundle")
    console = Console(file=io.StringIO(), width=80, color_system=None)
    show_bundle(Bundle.open(folder), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "1,257,256.4" in text
    assert "…" not in text
    assert "MACs of 20 steps, relative to full" in text
    assert all(unit.name in text for unit in units if isinstance(unit, Unit) and unit.kind == "stem")


def test_a_plan_costs_the_same_in_each_list_of_plans(tmp_path: Path) -> None:
    """That of ``inspect`` and that of ``python -m runtime plans``, whose rows are in the same order."""
    from tests.support.unets import manifest_of, small_unet, written_manifest

    bundle = Bundle.open(written_manifest(manifest_of(small_unet("uneven")), tmp_path / "bundle"))
    inspected = dict(zip(*(list(column.cells) for column in _plans(bundle.manifest).columns[::2]), strict=True))
    listed = dict(zip(PRESETS, list_plans(bundle, 20).columns[1].cells, strict=False))
    costs = {name: (inspected[preset.example], listed[name]) for name, preset in PRESETS.items()}
    assert {name: cost for name, cost in costs.items() if cost[0] not in {cost[1], "-"}} == {}
    assert {"full", "block", "deepcache", "adaptive", "skip", "guide"} <= {name for name, cost in costs.items() if cost[0] != "-"}
    assert costs["tgate"] == ("-", "*"), "a bundle for it can be built, and only that one has the MACs of parts of attentions"
    assert dict(zip(*(list(column.cells) for column in _plans(bundle.manifest).columns[:2]), strict=True))["tgate:0.4"] == (
        "other partition"
    )


def test_the_vae_counts_in_the_time_left() -> None:
    """It is one unit of the graph, and takes a fifth of the embedded model's build."""
    from exporter.segments.pool import _AS_UNITS

    assert _AS_UNITS[VAE_DECODER] > 10
    assert _AS_UNITS[TEXT] > 1


def test_a_build_that_takes_longer_than_was_thought_shows_no_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("exporter.segments.progress_display.time.monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=120)
    with show_progress(console, as_json=False) as progress:
        (live,) = console._live_stack
        for done, seconds, shown in ((1, 3.0, "left 0:00:03"), (1, 0.0, "left -:--:--"), (12, 0.0, "left 0:00:00")):
            progress(Step(done, 12, "vae_decoder", "tracing", seconds))
            with console.capture() as captured:
                console.print(live.get_renderable())
            assert shown in captured.get()
