"""Assembly: kept weights are the teacher's, the rest of the UNet is whole, and bad recipes are one clear line."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

import tuning
from tuning import Recipe, TuningError
from tuning.mini.models import new_unet


def units_of(unet: UNet2DConditionModel) -> list[str]:
    return list(tuning.unit_modules(unet))


def test_units_follow_the_modules(small_unet: UNet2DConditionModel) -> None:
    units = tuning.unit_modules(small_unet)
    assert units["down.0.layer.1.attention"] == "down_blocks.0.attentions.1"
    assert units["mid.layer.1.resnet"] == "mid_block.resnets.1"
    assert units["up.0.sampler"] == "up_blocks.0.upsamplers.0"
    assert "down.3.sampler" not in units
    assert "up.3.sampler" not in units
    assert "down.3.layer.0.attention" not in units
    assert next(iter(units)) == "stem"
    assert list(units)[-1] == "head"
    modules = dict(small_unet.named_modules())
    assert all(path in modules for path in units.values())
    counted = sum(p.numel() for path in units.values() for p in modules[path].parameters())
    rest = sum(p.numel() for m in (small_unet.time_embedding, small_unet.conv_norm_out) for p in m.parameters())
    assert counted + rest == sum(p.numel() for p in small_unet.parameters())


def test_units_without_a_mid_block_and_with_one_layer() -> None:
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        mid_block_type=None,
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    units = units_of(unet)
    assert not any(unit.startswith("mid") for unit in units)
    assert [u for u in units if u.startswith("up.1")] == [
        "up.1.layer.0.resnet",
        "up.1.layer.0.attention",
        "up.1.layer.1.resnet",
        "up.1.layer.1.attention",
    ]


def test_assembled_keeps_the_teachers_weights(small_unet: UNet2DConditionModel) -> None:
    student = tuning.assemble(small_unet, tuning.recipe("assembled"))
    assert list(student.config.layers_per_block) == [1, 1, 2, 2]
    theirs, ours = small_unet.state_dict(), student.state_dict()
    moved = {"up_blocks.2": {1: 2}, "up_blocks.3": {1: 2}}
    for key, value in ours.items():
        origin = key
        for block, layers in moved.items():
            for new, old in layers.items():
                for kind in ("resnets", "attentions"):
                    origin = origin.replace(f"{block}.{kind}.{new}.", f"{block}.{kind}.{old}.")
        assert torch.equal(value, theirs[origin]), key
    gone = [u for u in units_of(small_unet) if u not in units_of(student)]
    assert gone == [f"{layer}.{kind}" for layer in LAST_LAYERS for kind in ("resnet", "attention")]
    latents, states = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 32)
    assert student(latents, torch.tensor([1, 999]), states).sample.isfinite().all()


LAST_LAYERS = ("down.0.layer.1", "down.1.layer.1", "up.2.layer.2", "up.3.layer.2")  # names of the student, renumbered


def test_removing_nothing_gives_the_same_unet(small_unet: UNet2DConditionModel) -> None:
    twin = tuning.assemble(small_unet, tuning.recipe("original"))
    latents, states = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 32)
    with torch.no_grad():
        expected = small_unet(latents, 10, states).sample
        assert torch.equal(twin(latents, 10, states).sample, expected)
    assert twin is not small_unet


def test_the_mid_block_can_go(small_unet: UNet2DConditionModel) -> None:
    student = tuning.assemble(small_unet, Recipe(name="no-mid", remove=("mid",)))
    assert student.mid_block is None
    assert student(torch.randn(1, 4, 8, 8), 5, torch.randn(1, 3, 32)).sample.shape == (1, 4, 8, 8)


@pytest.mark.parametrize(
    ("remove", "says"),
    [
        (("down.9.layer.1",), "names no unit"),
        (("down.0.layer.1",), "skip connection"),
        (("down.0.layer.*", "up.-1.layer.*"), "everything at its resolution"),
        (("down.0.layer.1.attention",), "can't go alone"),
        (("stem",), "can't be removed"),
        (("up.0.sampler",), "can't be removed"),
        (("mid.layer.1",), "remove the whole of it"),
        (("down.1.layer.1", "up.2.layer.0"), "keep the first and the last layer"),
    ],
)
def test_bad_recipes_are_refused(small_unet: UNet2DConditionModel, remove: tuple[str, ...], says: str) -> None:
    with pytest.raises(TuningError, match=says) as caught:
        tuning.assemble(small_unet, Recipe(name="bad", remove=remove))
    assert "\n" not in str(caught.value)


def test_recipes_are_frozen_versioned_and_serialise(tmp_path: Path) -> None:
    assembled = tuning.recipe("assembled")
    path = tmp_path / "mine.json"
    path.write_text(assembled.model_dump_json())
    assert tuning.recipe(str(path)) == assembled
    with pytest.raises(ValueError, match="frozen"):
        assembled.name = "other"  # type: ignore[misc]
    path.write_text('{"name": "x", "version": 2}')
    with pytest.raises(TuningError, match="no recipe"):
        tuning.recipe(str(path))
    with pytest.raises(TuningError, match="assembled"):
        tuning.recipe("smallest")


def test_the_student_saves_as_an_ordinary_diffusers_folder(tmp_path: Path) -> None:
    student = tuning.assemble(new_unet((8, 8, 16, 16), 16), tuning.recipe("assembled")).eval()
    student.save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path).eval()
    latents, states = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)
    with torch.no_grad():
        # Convolutions may choose another order of sums for weights that lie elsewhere in memory.
        assert torch.allclose(again(latents, 3, states).sample, student(latents, 3, states).sample, atol=1e-5)
