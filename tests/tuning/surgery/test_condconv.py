"""Conditional convolutions: exactly the assembled UNet at the start, right afterwards, and placed where a recipe says."""

from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

import tuning
from tests.support.conditional import convolution_by_hand, randomise_routers, twin, unet_by_hand
from tuning import Experts, Recipe, TuningError
from tuning.checkpoints.folder import save_part
from tuning.surgery.changes import changes_of
from tuning.surgery.condconv import CondConv2d, CondConvResnet, Router, gates
from tuning.training.optim import MuonAdamW

SHALLOW = Recipe(name="assembled", remove=("down.0.layer.1", "down.1.layer.1", "up.-2.layer.1", "up.-1.layer.1"))
ROUTERS: tuple[Router, ...] = ("timestep", "features")
FP32 = 1e-5
"""Sums of a few hundred float32 products in another order differ by some 1e-6; a wrong kernel gives 0.1 and more."""


def inputs(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    latents, text = torch.randn(rows, 4, 8, 8, generator=generator), torch.randn(rows, 5, 32, generator=generator)
    return latents, torch.arange(rows) * 300.0 + 7, text


def conditional(unet: UNet2DConditionModel, router: Router) -> UNet2DConditionModel:
    return tuning.assemble(unet, SHALLOW.model_copy(update={"experts": Experts(router=router)}))


def convolution(router: Router, count: int = 4) -> CondConv2d:
    torch.manual_seed(1)
    module = CondConv2d(nn.Conv2d(6, 5, 3, padding=1), count, router, time_width=7)
    randomise_routers(module)
    return module


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_it_starts_as_the_assembled_unet_bit_for_bit(
    small_unet: UNet2DConditionModel, router: Router, memory_format: torch.memory_format
) -> None:
    ours, plain = conditional(small_unet, router), tuning.assemble(small_unet, SHALLOW)
    for unet in (ours, plain):
        unet.to(memory_format=memory_format)
    for rows in (1, 3):
        with torch.no_grad():
            assert torch.equal(ours(*inputs(rows)).sample, plain(*inputs(rows)).sample)
        trained = ours(*inputs(rows)).sample  # with gradients, sums are in another order
        assert torch.allclose(trained, plain(*inputs(rows)).sample, atol=1e-4)


def test_the_recipe_is_assembled_with_experts(small_unet: UNet2DConditionModel) -> None:
    expected = tuning.recipe("assembled").model_copy(update={"name": "condconv", "experts": Experts()})
    assert tuning.recipe("condconv") == expected
    ours, plain = (tuning.assemble(small_unet, tuning.recipe(name)) for name in ("condconv", "assembled"))
    assert any(isinstance(module, CondConv2d) for module in ours.modules())
    with torch.no_grad():
        assert torch.equal(ours(*inputs(3)).sample, plain(*inputs(3)).sample)


def test_gates_are_exact_at_zero_and_stay_within_their_bounds() -> None:
    assert torch.equal(gates(torch.zeros(2, 3)), torch.tensor([[1.0, 0.0, 0.0]] * 2))
    far = gates(torch.tensor([[50.0, 50.0, -50.0]]))
    assert torch.equal(far, torch.tensor([[2.0, 1.0, -1.0]]))


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("count", [2, 4])
def test_the_layer_is_what_it_is_by_hand(router: Router, count: int) -> None:
    module = convolution(router, count)
    x, time = torch.randn(3, 6, 5, 4), torch.randn(3, 7)
    expected = convolution_by_hand(module, x, time)
    assert torch.allclose(module(x, time), expected, atol=FP32)
    with torch.no_grad():
        assert torch.allclose(module(x, time), expected, atol=FP32)
        alone = module(x[:1], time[:1])
    assert torch.allclose(alone, expected[:1], atol=FP32)
    assert not torch.allclose(expected, nn.functional.conv2d(x, module.kernels[0], module.bias, padding=1), atol=0.1)


@pytest.mark.parametrize("router", ROUTERS)
def test_one_kernel_for_a_batch_that_shares_its_gates(router: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes it cost no more than an ordinary convolution: one convolution, not one per expert."""
    module = convolution(router)
    x, time = torch.randn(1, 6, 5, 4).repeat(3, 1, 1, 1), torch.randn(1, 7).repeat(3, 1)
    expected = convolution_by_hand(module, x, time)
    convolve = Mock(wraps=nn.functional.conv2d)
    monkeypatch.setattr(nn.functional, "conv2d", convolve)
    with torch.no_grad():
        assert torch.allclose(module(x, time), expected, atol=FP32)
    assert convolve.call_count == 1


@pytest.mark.parametrize("router", ROUTERS)
def test_gradients_are_those_of_each_samples_own_kernel(router: Router) -> None:
    module = convolution(router)
    x, time = torch.randn(3, 6, 5, 4, requires_grad=True), torch.randn(3, 7)
    weights = torch.randn(3, 5, 5, 4)
    wanted = [x, *module.parameters()]
    found = torch.autograd.grad((module(x, time) * weights).sum(), wanted)
    rows = []
    for sample, embedded in zip(x.split(1), time.split(1), strict=True):
        condition = sample.mean((2, 3)) if router == "features" else embedded
        amounts = 2 * torch.sigmoid(module.router(condition))[0] - torch.tensor([0.0, 1, 1, 1])
        kernel = torch.einsum("e,eoihw->oihw", amounts, torch.stack(list(module.kernels)))
        rows.append(nn.functional.conv2d(sample, kernel, module.bias, padding=1))
    expected = torch.autograd.grad((torch.cat(rows) * weights).sum(), wanted)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("router", ROUTERS)
def test_a_whole_unet_is_what_it_is_by_hand(small_unet: UNet2DConditionModel, router: Router) -> None:
    unet = conditional(small_unet, router)
    randomise_routers(unet)
    for rows in (1, 3):
        expected = unet_by_hand(unet, *inputs(rows))
        with torch.no_grad():
            found = unet(*inputs(rows)).sample
            plain = twin(unet)(*inputs(rows)).sample
        assert float((found - expected).abs().max() / expected.abs().max()) < FP32
        assert float((plain - expected).abs().max() / expected.abs().max()) > 1e-2


def test_experts_go_beside_what_was_removed(small_unet: UNet2DConditionModel) -> None:
    experts = changes_of(conditional(small_unet, "timestep")).experts
    assert experts is not None
    assert experts.count == 4
    assert experts.resnets == tuple(f"{layer}.resnet" for layer in BESIDE)
    removal = Recipe(name="x", remove=("down.2.layer.1.attention", "mid.layer.0.attention"), experts=Experts(count=2))
    experts = changes_of(tuning.assemble(small_unet, removal)).experts
    assert experts is not None
    assert experts.resnets == ("down.2.layer.1.resnet", "mid.layer.0.resnet")
    assert experts.count == 2


BESIDE = ("down.0.layer.0", "down.1.layer.0", "up.2.layer.0", "up.2.layer.1", "up.3.layer.0", "up.3.layer.1")


def test_kernels_of_removed_neighbours_live_on(small_unet: UNet2DConditionModel) -> None:
    unet = conditional(small_unet, "timestep")
    last = unet.get_submodule("up_blocks.3.resnets.1")
    assert isinstance(last, CondConvResnet)
    kept, gone = (small_unet.get_submodule(f"up_blocks.3.resnets.{number}") for number in (2, 1))
    assert torch.equal(last.conv1.kernels[0], kept.conv1.weight)
    assert torch.equal(last.conv1.kernels[1], gone.conv1.weight)  # both read two features of 16 channels
    assert torch.equal(last.conv2.kernels[0], kept.conv2.weight)
    assert torch.equal(last.conv2.kernels[1], gone.conv2.weight)
    assert torch.equal(last.conv2.bias, kept.conv2.bias)
    first = unet.get_submodule("down_blocks.0.resnets.0")
    teacher = small_unet.get_submodule("down_blocks.0.resnets.1")
    assert torch.equal(first.conv2.kernels[1], teacher.conv2.weight)
    assert torch.equal(first.conv2.kernels[2], teacher.conv1.weight)  # of the same shape, so it lives on as well
    drawn = first.conv2.kernels[3].detach()
    assert 0.9 < float(drawn.std() / first.conv2.kernels[0].detach().std()) < 1.1
    again = conditional(small_unet, "timestep").get_submodule("down_blocks.0.resnets.0")
    assert torch.equal(again.conv2.kernels[3], drawn)


def test_globs_name_other_places(small_unet: UNet2DConditionModel) -> None:
    def placed(*units: str) -> tuple[str, ...]:
        experts = changes_of(tuning.assemble(small_unet, Recipe(name="x", experts=Experts(units=units)))).experts
        assert experts is not None
        return experts.resnets

    assert placed("up.-1.layer.0", "mid") == ("mid.layer.0.resnet", "mid.layer.1.resnet", "up.3.layer.0.resnet")
    assert placed("down.0.*.resnet") == ("down.0.layer.0.resnet", "down.0.layer.1.resnet")


@pytest.mark.parametrize(
    ("units", "says"),
    [
        (("up.7",), "experts.units: 'up.7' names no unit"),
        (("mid", "down.0.layer.0.attention"), "'down.0.layer.0.attention', which names no ResNet .*down.0.layer.0.resnet"),
        ((), "none has a neighbour that stays: name ResNets in experts.units, of down.0.layer.0.resnet"),
    ],
)
def test_bad_places_are_refused(small_unet: UNet2DConditionModel, units: tuple[str, ...], says: str) -> None:
    with pytest.raises(TuningError, match=says) as caught:
        tuning.assemble(small_unet, Recipe(name="bad", experts=Experts(units=units)))
    assert "\n" not in str(caught.value)


def test_a_unet_that_has_experts_is_not_assembled_again(small_unet: UNet2DConditionModel) -> None:
    with pytest.raises(TuningError, match="recipe assembled: .*conditional.*assemble the UNet that it was made from"):
        tuning.assemble(conditional(small_unet, "timestep"), SHALLOW)


@pytest.mark.parametrize("router", ROUTERS)
def test_it_is_saved_and_loaded(small_unet: UNet2DConditionModel, router: Router, tmp_path: Path) -> None:
    unet = conditional(small_unet, router)
    randomise_routers(unet)
    save_part(unet, tmp_path / "unet", torch.float32)
    again = tuning.load_unet(tmp_path / "unet")
    assert changes_of(again) == changes_of(unet)
    state = again.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in unet.state_dict().items())
    with torch.no_grad():
        assert torch.allclose(again(*inputs(2)).sample, unet(*inputs(2)).sample, atol=FP32)


def test_a_folder_with_experts_where_no_resnet_is(small_unet: UNet2DConditionModel, tmp_path: Path) -> None:
    save_part(conditional(small_unet, "timestep"), tmp_path / "unet")
    config = tmp_path / "unet" / "config.json"
    config.write_text(config.read_text().replace("down.0.layer.0.resnet", "down.0.layer.0.attention"))
    with pytest.raises(TuningError, match="experts are placed in down.0.layer.0.attention, which is no ResNet"):
        tuning.load_unet(tmp_path / "unet")


@pytest.mark.parametrize("router", ROUTERS)
def test_training_moves_every_expert_and_every_router(small_unet: UNet2DConditionModel, router: Router) -> None:
    unet = conditional(small_unet, router).train().to(memory_format=torch.channels_last)
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    optimizer = MuonAdamW(unet, lr=1e-2, muon_lr=1e-2)
    target, losses = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(9)), []
    for _ in range(6):
        loss = (unet(*inputs(4)).sample - target).square().mean()
        loss.backward()
        optimizer.step(1.0, 1.0)
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    moved = {key for key, value in unet.state_dict().items() if not torch.equal(value, before[key])}
    ours = {key for key in before if ".kernels." in key or ".router." in key}
    assert ours <= moved
    assert len(ours) == 2 * len(BESIDE) * (4 + 2)
    with torch.no_grad():
        assert not torch.allclose(unet(*inputs(4)).sample, twin(unet)(*inputs(4)).sample, atol=1e-3)
