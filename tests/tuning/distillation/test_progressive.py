"""Removal in portions ends where removal at once does, and shares the bound."""

import pytest
import torch
from diffusers import UNet2DConditionModel

import tuning
from tuning import Recipe
from tuning.distillation.progressive import next_removal, share_of, stages_of
from tuning.training.loop import LoopSettings

SECOND = ("down.*.layer.1", "up.*.layer.1", "mid", "down.-1", "up.0")


@pytest.mark.parametrize(
    "recipe",
    [
        tuning.recipe("progressive"),
        Recipe(name="tiny", remove=SECOND, portions=(2, 1, 2)),
        Recipe(name="inside out", remove=("down.-1", "up.0", "mid", "down.1.layer.1", "up.-2.layer.1"), portions=(3, 2)),
    ],
    ids=lambda recipe: recipe.name,
)
def test_portions_leave_what_removal_at_once_leaves(small_unet: UNet2DConditionModel, recipe: Recipe) -> None:
    student, sizes = small_unet, []
    for stage in range(stages_of(recipe)):
        student = tuning.assemble(student, next_removal(small_unet, student, recipe, stage))
        sizes.append(len(tuning.unit_modules(student)))
    assert sizes == sorted(set(sizes), reverse=True), "every portion removes something"
    expected = tuning.assemble(small_unet, recipe)
    theirs, ours = expected.state_dict(), student.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(value, ours[key]) for key, value in theirs.items())
    assert {k: v for k, v in student.config.items() if k[0] != "_"} == {k: v for k, v in expected.config.items() if k[0] != "_"}


def test_recipes_without_portions_are_one_removal(small_unet: UNet2DConditionModel) -> None:
    for name in ("original", "condconv"):
        recipe = tuning.recipe(name)
        assert stages_of(recipe) == 1
        student = tuning.assemble(small_unet, next_removal(small_unet, small_unet, recipe, 0))
        assert student.state_dict().keys() == tuning.assemble(small_unet, recipe).state_dict().keys()


def test_stages_share_the_bound() -> None:
    whole = LoopSettings(steps=10, wall_minutes=6, warmup=20)
    shares = [share_of(whole, stage, 3) for stage in range(3)]
    assert [share.steps for share in shares] == [3, 3, 4]
    assert {share.wall_minutes for share in shares} == {2}
    assert [share.warmup for share in shares] == [6, 7, 7], "as many steps of warm-up in all"
    assert share_of(whole, 0, 1) == whole


def test_portions_that_do_not_add_up_are_refused() -> None:
    for portions in ((1, 1), (3, 0), (4,)):
        with pytest.raises(ValueError, match="do not add up to the 3 entries"):
            Recipe(name="x", remove=("a", "b", "c"), portions=portions)
