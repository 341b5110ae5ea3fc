"""Distillation losses: zero for a twin, blocks matched by name, and only the student learns."""

import pytest
import torch
from diffusers import UNet2DConditionModel

import tuning
from tuning import LossWeights, Recipe, TuningError
from tuning.distillation.losses import BlockFeatures, DistillLoss, matched
from tuning.mini.models import new_unet

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture
def inputs() -> Inputs:
    source = torch.Generator().manual_seed(1)
    noisy, target = torch.randn(2, 2, 4, 8, 8, generator=source)
    return noisy, torch.tensor([5, 700]), torch.randn(2, 6, 32, generator=source), target


def test_a_twin_has_no_output_or_feature_loss(small_unet: UNet2DConditionModel, inputs: Inputs) -> None:
    twin = tuning.assemble(small_unet, tuning.recipe("original"))
    losses = DistillLoss(small_unet, twin, LossWeights())(*inputs)
    assert float(losses["output"].detach()) == 0
    assert float(losses["features"].detach()) == 0
    assert float(losses["noise"].detach()) > 0.1
    assert torch.equal(losses["loss"], losses["noise"])


def test_features_are_the_blocks_outputs(small_unet: UNet2DConditionModel, inputs: Inputs) -> None:
    with BlockFeatures(small_unet, ["down.0", "mid", "up.3"]) as seen, torch.no_grad():
        small_unet(*inputs[:3])
    assert {name: tuple(value.shape) for name, value in seen.values.items()} == {
        "down.0": (2, 16, 4, 4),
        "mid": (2, 24, 1, 1),
        "up.3": (2, 16, 8, 8),
    }
    with torch.no_grad():
        before = seen.values["mid"]
        small_unet(inputs[0] * 2, *inputs[1:3])
    assert seen.values["mid"] is before, "the hooks are gone after the context"


def test_weights_count_and_a_missing_block_has_no_feature(small_unet: UNet2DConditionModel, inputs: Inputs) -> None:
    student = tuning.assemble(small_unet, Recipe(name="no-mid", remove=("mid",)))
    assert "mid" not in matched(small_unet, student)
    losses = DistillLoss(small_unet, student, LossWeights(noise=0.5, output=2, features=0.25))(*inputs)
    expected = 0.5 * losses["noise"] + 2 * losses["output"] + 0.25 * losses["features"]
    assert torch.allclose(losses["loss"], expected)
    losses["loss"].backward()
    assert all(p.grad is None for p in small_unet.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.down_blocks[0].parameters())


def test_blocks_of_a_student_without_the_innermost_stage_are_matched_from_outside(
    small_unet: UNet2DConditionModel, inputs: Inputs
) -> None:
    student = tuning.assemble(small_unet, tuning.recipe("bk-tiny"))
    assert matched(small_unet, student) == {
        "down.0": "down.0", "down.1": "down.1", "down.2": "down.2", "up.1": "up.0", "up.2": "up.1", "up.3": "up.2",
    }  # fmt: skip
    entering: list[torch.Tensor] = []
    sampler = small_unet.down_blocks[2].downsamplers[0]
    hook = sampler.register_forward_pre_hook(lambda _, given: entering.append(given[0]))
    with BlockFeatures(small_unet, ["down.2", "up.1"], ["down.2"]) as theirs, torch.no_grad():
        small_unet(*inputs[:3])
    hook.remove()
    assert torch.equal(theirs.values["down.2"], entering[0]), "the student has no sampler there: what enters it is compared"
    with BlockFeatures(student, ["down.2", "up.0"], ["down.2"]) as ours, torch.no_grad():
        student(*inputs[:3])
    assert ours.values["down.2"].shape == theirs.values["down.2"].shape
    assert ours.values["up.0"].shape == theirs.values["up.1"].shape
    losses = DistillLoss(small_unet, student, LossWeights())(*inputs)
    losses["loss"].backward()
    assert losses["features"].isfinite()


def test_unlike_models_are_refused(small_unet: UNet2DConditionModel) -> None:
    with pytest.raises(TuningError, match="text width"):
        DistillLoss(small_unet, new_unet((16, 16, 24, 24), 16), LossWeights())
    with pytest.raises(TuningError, match="block widths"):
        DistillLoss(small_unet, new_unet((8, 16, 24, 24), 32), LossWeights())
