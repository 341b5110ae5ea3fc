"""Assembly: kept weights are the teacher's, the rest of the UNet is whole, and bad recipes are one clear line."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

import tuning
from tests.support.unets import SD15
from tuning import Recipe, TuningError
from tuning.checkpoints.folder import save_part
from tuning.mini.models import new_unet
from tuning.surgery.changes import changes_of


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
    config = student.config
    assert config.block_out_channels == (16, 16, 24)
    assert config.down_block_types == ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    assert config.up_block_types == ("CrossAttnUpBlock2D",) * 3
    assert config.layers_per_block == (2, 2, 1)
    assert not changes_of(student), "any diffusers loads it"
    theirs, ours = small_unet.state_dict(), student.state_dict()
    moved = {f"up_blocks.{i}.": f"up_blocks.{i + 1}." for i in range(3)}
    moved |= {f"up_blocks.0.{kind}.{i}.": f"up_blocks.1.{kind}.{i + 1}." for kind in ("resnets", "attentions") for i in range(2)}
    for key, value in ours.items():
        start = max((begin for begin in moved if key.startswith(begin)), key=len, default="")
        assert torch.equal(value, theirs[moved[start] + key[len(start) :] if start else key]), key
    latents, states = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 32)
    assert student(latents, torch.tensor([1, 999]), states).sample.isfinite().all()


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
        (("down.0.layer.*", "up.-1.layer.*"), "everything at its resolution, which is not the innermost"),
        (("down.*", "up.*"), "not the innermost"),
        (("down.-1",), "removes all layers of down.3 only; a stage goes as a whole, as down.3 and up.0"),
        (("down.0.layer.1.resnet",), "can't go alone; remove the whole down.0.layer.1, or only down.0.layer.1.attention"),
        (("down.3.layer.0.attention",), "it has down.3.layer.0.resnet, down.3.layer.1.resnet"),
        (("stem",), "can't be removed"),
        (("up.0.sampler",), "can't be removed"),
        (("mid", "down.2.sampler"), "can't be removed"),
        (("down.2.layer.0", "up.1.layer.1"), "keep the first and the last layer"),
        (("down.2", "down.3", "up.0", "up.1"), "or keep the innermost stages, whose widths are others"),
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
    path.write_bytes(b'{"name": "\xe9"}')
    with pytest.raises(TuningError, match=r"is no recipe \('utf-8' codec can't decode.*write name, version 1") as caught:
        tuning.recipe(str(path))
    assert "\n" not in str(caught.value)
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


def meta_unet(**config: Any) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**{**SD15, **config})


@pytest.mark.parametrize(("name", "millions"), [("original", 860), ("bk-base", 579), ("bk-small", 482), ("bk-tiny", 323)])
def test_parameters_of_the_published_recipes(name: str, millions: int) -> None:
    student = tuning.assemble(meta_unet(), tuning.recipe(name))
    assert round(sum(weights.numel() for weights in student.parameters()) / 1e6) == millions


def test_the_published_configuration_of_bk_tiny() -> None:
    config = tuning.assemble(meta_unet(attention_head_dim=(5, 10, 20, 20)), tuning.recipe("bk-tiny")).config
    assert config.block_out_channels == (320, 640, 1280)
    assert config.down_block_types == ("CrossAttnDownBlock2D",) * 3
    assert config.up_block_types == ("CrossAttnUpBlock2D",) * 3
    assert (config.layers_per_block, config.mid_block_type, config.attention_head_dim) == (1, None, (5, 10, 20))


def inner_unet(**config: Any) -> UNet2DConditionModel:
    """Four stages, the inner three of one width, so that up to two of them can go; every weight differs from every other."""
    widths = {"sample_size": 8, "cross_attention_dim": 16, "norm_num_groups": 4, "attention_head_dim": 2}
    torch.manual_seed(0)
    return UNet2DConditionModel(**{**SD15, **widths, "block_out_channels": (8, 16, 16, 16), **config}).eval()


# Student's layer -> the teacher's, where they differ, as BK-SDM publishes them.
BASE_LAYERS = {f"up_blocks.{i}.{kind}.1.": f"up_blocks.{i}.{kind}.2." for i in range(4) for kind in ("resnets", "attentions")}
TINY_LAYERS = {
    f"up_blocks.{i}.{kind}.{j}.": f"up_blocks.{i + 1}.{kind}.{2 * j}."
    for i in range(3) for j in range(2) for kind in ("resnets", "attentions")
} | {f"up_blocks.{i}.upsamplers.": f"up_blocks.{i + 1}.upsamplers." for i in range(2)}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "moved", "lost"),
    [
        ("bk-base", BASE_LAYERS, ()),
        ("bk-small", BASE_LAYERS, ("mid_block",)),
        ("bk-tiny", TINY_LAYERS, ("mid_block", "down_blocks.3", "down_blocks.2.downsamplers")),
    ],
)
def test_published_recipes_take_the_teachers_layers(name: str, moved: dict[str, str], lost: tuple[str, ...]) -> None:
    teacher = inner_unet()
    student = tuning.assemble(teacher, tuning.recipe(name))
    theirs = teacher.state_dict()
    for key, value in student.state_dict().items():
        assert not key.startswith(lost)
        start = next((begin for begin in moved if key.startswith(begin)), "")
        assert torch.equal(value, theirs[moved[start] + key[len(start) :] if start else key]), key
    latents, states = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
    assert student(latents, 7, states).sample.shape == (2, 4, 8, 8)


def test_several_innermost_stages_can_go() -> None:
    teacher = inner_unet(attention_head_dim=(1, 2, 2, 2), layers_per_block=(2, 1, 2, 1))
    student = tuning.assemble(teacher, Recipe(name="two", remove=("down.2", "down.3", "up.0", "up.1")))
    config = student.config
    assert config.block_out_channels == (8, 16)
    assert config.down_block_types == ("CrossAttnDownBlock2D",) * 2
    assert config.up_block_types == ("CrossAttnUpBlock2D",) * 2
    assert (config.layers_per_block, config.attention_head_dim) == ((2, 1), (1, 2))
    assert torch.equal(student.up_blocks[1].resnets[2].conv1.weight, teacher.up_blocks[3].resnets[2].conv1.weight)
    assert torch.equal(student.mid_block.resnets[0].conv1.weight, teacher.mid_block.resnets[0].conv1.weight)
    assert student(torch.randn(1, 4, 4, 4), 3, torch.randn(1, 5, 16)).sample.shape == (1, 4, 4, 4)


def test_weights_that_would_be_cut_into_other_heads_are_refused() -> None:
    teacher = inner_unet(attention_head_dim=(1, 2, 2, 4))
    with pytest.raises(TuningError, match="mid_block.attentions.0 has 4 heads and its new place gives it 2"):
        tuning.assemble(teacher, Recipe(name="inner", remove=("down.-1", "up.0")))
    assert tuning.assemble(teacher, Recipe(name="inner", remove=("down.-1", "up.0", "mid"))).mid_block is None


ALONE = ("down.0.layer.0.attention", "mid.layer.0.attention", "up.1.layer.1.attention")


def silence(unet: UNet2DConditionModel, attentions: Sequence[str]) -> UNet2DConditionModel:
    """A twin whose named attentions add nothing."""
    twin = copy.deepcopy(unet)
    for name in attentions:
        out = twin.get_submodule(tuning.unit_modules(twin)[name]).proj_out
        for weights in out.parameters():
            torch.nn.init.zeros_(weights)
    return twin


def outputs(unet: UNet2DConditionModel) -> torch.Tensor:
    torch.manual_seed(3)
    with torch.no_grad():
        result: torch.Tensor = unet(torch.randn(2, 4, 8, 8), 500, torch.randn(2, 5, unet.config.cross_attention_dim)).sample
    return result


def test_attentions_can_go_alone(small_unet: UNet2DConditionModel, tmp_path: Path) -> None:
    student = tuning.assemble(small_unet, Recipe(name="alone", remove=ALONE))
    assert not set(ALONE) & set(units_of(student))
    assert set(units_of(small_unet)) - set(units_of(student)) == set(ALONE)
    assert changes_of(student).removed == ALONE
    assert torch.allclose(outputs(student), outputs(silence(small_unet, ALONE)), atol=1e-6)
    save_part(student, tmp_path / "unet", torch.float32)
    again = tuning.load_unet(tmp_path / "unet")
    assert changes_of(again) == changes_of(student)
    # Sums may be in another order for weights that lie elsewhere in memory.
    assert torch.allclose(outputs(again), outputs(student), atol=1e-6)


def test_a_block_without_any_attention_is_of_the_plain_type(small_unet: UNet2DConditionModel, tmp_path: Path) -> None:
    gone = [f"down.1.layer.{i}.attention" for i in range(2)] + [f"up.3.layer.{i}.attention" for i in range(3)]
    student = tuning.assemble(small_unet, Recipe(name="plain", remove=("down.1.*.attention", "up.-1.*.attention")))
    assert not changes_of(student)
    assert student.config.down_block_types[1] == "DownBlock2D"
    assert student.config.up_block_types[3] == "UpBlock2D"
    assert torch.allclose(outputs(student), outputs(silence(small_unet, gone)), atol=1e-6)
    student.save_pretrained(tmp_path)
    assert torch.allclose(outputs(UNet2DConditionModel.from_pretrained(tmp_path).eval()), outputs(student), atol=1e-6)


def test_what_was_assembled_can_be_assembled_further(small_unet: UNet2DConditionModel) -> None:
    once = tuning.assemble(small_unet, Recipe(name="first", remove=("down.1.layer.0.attention", "up.2.layer.2.attention")))
    twice = tuning.assemble(once, Recipe(name="second", remove=("down.1.layer.1.attention", "up.2.layer.1", "down.1.layer.1")))
    gone = ("down.1.layer.1", "up.2.layer.1", "down.1.layer.0.attention", "up.2.layer.2.attention")
    at_once = tuning.assemble(small_unet, Recipe(name="both", remove=gone))
    assert twice.config.down_block_types[1] == at_once.config.down_block_types[1] == "DownBlock2D"
    assert changes_of(twice) == changes_of(at_once)
    assert torch.allclose(outputs(twice), outputs(at_once), atol=1e-6)


def test_the_student_shares_no_memory_with_its_teacher(small_unet: UNet2DConditionModel) -> None:
    student = tuning.assemble(small_unet, tuning.recipe("bk-small"))
    theirs = {weights.data_ptr() for weights in small_unet.parameters()}
    assert all(weights.requires_grad and weights.data_ptr() not in theirs for weights in student.parameters())
