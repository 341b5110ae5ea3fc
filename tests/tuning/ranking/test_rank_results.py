"""The committed ranking: the recipe `assembled` is what it chose, and the page shows its figures."""

import json
from pathlib import Path
from typing import Any

import pytest

import tuning
from tuning.checkpoints.folder import meta_unet
from tuning.ranking.candidates import skeleton
from tuning.surgery.recipes import Recipe

RESULT: dict[str, Any] = json.loads(Path("benchmarks/results/rank.json").read_text())
PAGE = " ".join(Path("docs/tuning.md").read_text().split())
ROWS = [line for line in Path("docs/tuning.md").read_text().splitlines() if " % ± " in line]
GOAL = 1.224


def test_the_recipe_is_what_the_ranking_chose() -> None:
    unet = skeleton(meta_unet(Path("models/sd15/unet/config.json")))
    chosen = Recipe.model_validate(RESULT["recipe"])
    ours, theirs = (tuning.assemble(unet, recipe, share=True) for recipe in (tuning.recipe("assembled"), chosen))
    assert tuning.unit_modules(ours) == tuning.unit_modules(theirs)
    assert len(tuning.unit_modules(ours)) < len(tuning.unit_modules(unet))
    assert {name: value.shape for name, value in ours.state_dict().items()} == {
        name: value.shape for name, value in theirs.state_dict().items()
    }


def test_it_is_as_fast_as_the_goal() -> None:
    assert RESULT["options"]["times"] == "random:sd15"
    assert RESULT["measured_seconds"]["random:sd15"]["speedup"] >= GOAL


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip())
def test_a_row_of_the_page_is_the_results(row: str) -> None:
    name, share, error, note = [cell.strip() for cell in row.strip("|").split("|")]
    units = name.replace("`", "").split(" + ")
    (found,) = [each for each in RESULT["candidates"] if each["remove"] == units]
    assert share == f"{100 * found['share']:.1f} % ± {50 * found['spread']:.1f} %"
    assert error == f"{found['error']:.2g}"
    steps = [(i, step["speedup"]) for i, step in enumerate(RESULT["selection"], 1) if step["remove"] == units]
    assert note == "".join(f"chosen {i}., then {speedup:.2f}x" for i, speedup in steps)


def test_the_page_has_all_that_was_chosen() -> None:
    assert [row for row in ROWS if "chosen" in row] == ROWS[: len(RESULT["selection"])]


def test_the_page_says_what_was_asked_and_what_was_measured() -> None:
    measured = {name: each["speedup"] for name, each in RESULT["measured_seconds"].items()}
    asked, (*_, third, last) = RESULT["options"]["speedup"], [step["speedup"] for step in RESULT["selection"]]
    shares = {" + ".join(each["remove"]): 100 * each["share"] for each in RESULT["candidates"]}
    assert 4 * shares["mid"] - shares["mid"] > shares["down.3 + up.0"]
    for words in (
        f"at least {GOAL} times as fast, the paper's figure, and {asked} times if it can be had",
        f"the assembled UNet is {measured['random:sd15']:.2f} times as fast as SD 1.5's",
        f"{asked - measured['random:sd15']:.2f} short of the aim",
        f"{measured['mini']:.2f} times as fast as the embedded one",
        f"{third:.2f} times as fast after three removals and {last:.2f} times after four",
        f"three times its {shares['mid']:.1f} % is more than the {shares['down.3 + up.0']:.1f} %",
    ):
        assert words in PAGE
