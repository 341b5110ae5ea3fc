"""A bundle's UNet in diffusers' own pipelines gives the latents of ``generate``, call after call, whatever became of the last."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from engines import Bundle
from engines.bundle.shapes import resolve
from engines.cuda.streams import CallStreams
from runtime import Pipeline, PlanError, RequestError, UNet
from runtime.diffusers_unet import _all_timesteps
from tests.support.diffusers_pipelines import NEGATIVE, PIPELINES, PROMPT, SEED, inputs, latents, pipeline
from tests.support.reference import MINI, SCHEDULER_CLASSES, mini_unet, reference_scheduler
from tests.support.unets import relative_error

TOLERANCE = 1e-4
"""Of the largest final latent. Both sides run the same segments in float32; text and picture are encoded by diffusers on one side
and by the bundle on the other, which is 1e-6, and a few steps with guidance 3 multiply that by less than 20."""


def generate(mini_pipeline: Pipeline, **settings: Any) -> Any:
    return mini_pipeline.generate(PROMPT, NEGATIVE, seed=SEED, **{"steps": 6, **settings})


def kinds(records: Any) -> list[str]:
    return [record.kind for record in records]


@pytest.fixture
def unet(mini_bundle: Bundle) -> UNet:
    return UNet(mini_bundle.folder, "deepcache:3")


@pytest.mark.parametrize("scheduler", list(SCHEDULER_CLASSES))
@pytest.mark.parametrize("kind", list(PIPELINES))
def test_latents_are_those_of_generate(mini_pipeline: Pipeline, unet: UNet, kind: str, scheduler: str) -> None:
    settings = inputs(kind)
    made = latents(pipeline(kind, scheduler, unet), **settings)
    expected = generate(mini_pipeline, scheduler=scheduler, plan="deepcache:3", **settings)
    assert relative_error(made, expected.latents) < TOLERANCE
    assert [record.ran for record in unet.steps] == [record.ran for record in expected.steps]
    assert [record.timestep for record in unet.steps] == [record.timestep for record in expected.steps]


# Unlike uniform ones, these ask how many evaluations there will be.
@pytest.mark.parametrize("plan", ["full", "quadratic:2", "encoder:faster", "quadratic:3+block:2"])
@pytest.mark.parametrize(("kind", "scheduler"), [("text", "heun"), ("image", "pndm"), ("inpaint", "heun")])
def test_plans(mini_bundle: Bundle, mini_pipeline: Pipeline, plan: str, kind: str, scheduler: str) -> None:
    settings = inputs(kind, 0.7)
    unet = UNet(mini_bundle.folder, plan)
    made = latents(pipeline(kind, scheduler, unet), **settings)
    expected = generate(mini_pipeline, scheduler=scheduler, plan=plan, **settings)
    assert relative_error(made, expected.latents) < TOLERANCE
    assert kinds(unet.steps) == kinds(expected.steps)


@pytest.mark.parametrize("plan", ["skip:2+deepcache:3", "forecast:2+guide:3"])
@pytest.mark.parametrize(
    ("kind", "scheduler", "guidance"), [("text", "heun", 3.0), ("image", "dpm++", 3.0), ("inpaint", "euler", 1.0)]
)
def test_forecasts_skips_and_halves(
    mini_bundle: Bundle, mini_pipeline: Pipeline, plan: str, kind: str, scheduler: str, guidance: float
) -> None:
    settings = {**inputs(kind, 0.7), "guidance_scale": guidance}
    unet = UNet(mini_bundle.folder, plan)
    images = 1 if kind == "inpaint" else 2  # of several, diffusers draws the picture's latents with the first one's generator
    made = latents(pipeline(kind, scheduler, unet), images=images, **settings)
    expected = generate(mini_pipeline, scheduler=scheduler, plan=plan, num_images=images, **settings)
    assert relative_error(made, expected.latents) < TOLERANCE
    assert kinds(unet.steps) == kinds(expected.steps)
    assert ("key, half" in kinds(unet.steps)) is (guidance > 1 and "guide" in plan)


def test_who_says_that_there_is_no_guidance_is_believed(mini_bundle: Bundle) -> None:
    """Two pictures from the same noise look like the halves of guidance."""
    sample, text = (
        torch.randn(1, 4, 8, 8).repeat(2, 1, 1, 1),
        torch.randn(2, 32, UNet(mini_bundle.folder).config.cross_attention_dim),
    )
    scheduler = reference_scheduler("ddim", 3)
    found = []
    for guided in (None, False, True):
        unet = UNet(mini_bundle.folder, "guide:3", guided=partial(bool, guided) if guided is not None else lambda: None)
        for timestep in scheduler.timesteps:
            unet(sample, timestep, text)
        found.append("key, half" in kinds(unet.steps))
    assert found == [True, False, True]


def test_full_is_what_diffusers_gives(mini_bundle: Bundle) -> None:
    made = latents(pipeline("text", "dpm++", UNet(mini_bundle.folder)), images=2)
    assert relative_error(made, latents(pipeline("text", "dpm++"), images=2)) < TOLERANCE


class CountedStreams(CallStreams):
    """Streams that only have numbers."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.taken, self.given_back, self.used = 0, list[int](), list[int]()

    def take(self) -> Any:
        self.taken += 1
        return self.taken

    def give_back(self, stream: Any) -> None:
        self.given_back.append(stream)

    @contextmanager
    def use(self, stream: Any) -> Iterator[None]:  # type: ignore[override]
        self.used.append(stream)
        yield


def test_each_call_has_a_stream_and_writes_its_caches_once(unet: UNet, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step keeps must lie on the stream of the step that reads it; what runs have compiled is not lost."""
    streams, flushed = CountedStreams(), list[int]()
    monkeypatch.setattr(unet.pipeline, "streams", streams)
    monkeypatch.setattr(unet.pipeline.engine, "flush", lambda: flushed.append(len(unet.steps)))
    made = pipeline("text", "ddim", unet)
    latents(made)
    latents(made)
    assert (streams.taken, streams.used, streams.given_back) == (2, [1] * 6 + [2] * 6, [1])
    assert flushed == [6, 6]


def test_calls_in_a_row_are_alike(unet: UNet) -> None:
    made = pipeline("text", "ddim", unet)
    first = latents(made)
    for _ in range(2):
        assert torch.equal(latents(made), first)
        assert kinds(unet.steps) == ["key", "inherit", "inherit"] * 2


@pytest.mark.parametrize("plan", ["switch:0.4", "switch:0.4+block:2"])
@pytest.mark.parametrize(("kind", "scheduler"), [("text", "dpm++"), ("text", "heun"), ("image", "ddim"), ("inpaint", "pndm")])
def test_a_plan_that_switches_finds_the_other_bundle(
    mini_bundle: Bundle, assembled_bundle: Bundle, mini_pipeline: Pipeline, plan: str, kind: str, scheduler: str
) -> None:
    settings = inputs(kind, 0.9)
    unet = UNet(mini_bundle.folder, plan)
    made = pipeline(kind, scheduler, unet)
    expected = generate(mini_pipeline, scheduler=scheduler, plan=plan, **settings)
    first = latents(made, **settings)
    assert relative_error(first, expected.latents) < TOLERANCE
    names = [record.unet for record in unet.steps]
    assert names == [record.unet for record in expected.steps]
    assert set(names) == {"assembled", "original"}
    assert kinds(unet.steps) == kinds(expected.steps)
    # Broken off while the first UNet runs, and after the switch: the next call begins with the first one again.
    for step in (0, 4):
        with pytest.raises(BrokenOffError):
            latents(made, callback_on_step_end=break_off_after(step), **settings)
        assert torch.equal(latents(made, **settings), first)
        assert [record.unet for record in unet.steps] == names


def test_switching_is_what_two_unets_of_diffusers_give(mini_bundle: Bundle, assembled_bundle: Bundle) -> None:
    """Nothing of ours on the other side: one pipeline whose UNet is exchanged when the noise is down to 0.6."""
    made = pipeline("text", "ddim")
    unets = [mini_unet("assembled"), made.unet]

    def exchange(made: Any, index: int, timestep: Any, tensors: Any) -> Any:
        following = made.scheduler.timesteps[index + 1 :]
        made.unet = unets[len(following) > 0 and 1 - float(following[0]) / 1000 >= 0.4]
        return tensors

    made.unet = unets[0]
    expected = latents(made, callback_on_step_end=exchange)
    assert relative_error(latents(pipeline("text", "ddim", UNet(mini_bundle.folder, "switch:0.4"))), expected) < TOLERANCE


class BrokenOffError(Exception):
    pass


def break_off_after(step: int) -> Any:
    def callback(made: Any, index: int, timestep: Any, tensors: Any) -> Any:
        if index == step:
            raise BrokenOffError
        return tensors

    return callback


@pytest.mark.parametrize("scheduler", ["ddim", "heun"])
@pytest.mark.parametrize("step", [0, 1, 3])
def test_a_call_after_one_that_was_broken_off(unet: UNet, scheduler: str, step: int) -> None:
    made = pipeline("text", scheduler, unet)
    expected = latents(made)
    with pytest.raises(BrokenOffError):
        latents(made, callback_on_step_end=break_off_after(step))
    assert len(unet.steps) == step + 1
    assert torch.equal(latents(made), expected)


def test_one_unet_in_three_pipelines_in_turn(unet: UNet) -> None:
    """As with ``StableDiffusionImg2ImgPipeline(**pipe.components)``: also with other strengths, and calls broken off."""
    made = {kind: pipeline(kind, "dpm++", unet) for kind in PIPELINES}
    order = [("text", 1.0), ("image", 0.4), ("image", 0.9), ("inpaint", 0.9), ("text", 1.0), ("image", 0.4)]
    alone = {turn: latents(pipeline(turn[0], "dpm++", unet), **inputs(*turn)) for turn in order}
    for turn in order:
        assert torch.equal(latents(made[turn[0]], **inputs(*turn)), alone[turn])
        with pytest.raises(BrokenOffError):
            latents(made["image"], callback_on_step_end=break_off_after(1), **inputs("image", 0.7))


def test_guidance_that_is_turned_off_on_the_way(mini_bundle: Bundle, unet: UNet) -> None:
    """Half of the rows are gone: what was cached has other shapes, so the plan begins anew with the steps that are left."""

    def turn_off(made: Any, index: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if index == 3:
            made._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"][-1:]
        return tensors

    settings: dict[str, Any] = {
        "callback_on_step_end": turn_off,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    }
    whole = UNet(mini_bundle.folder, "full")
    expected = latents(pipeline("text", "ddim"), **settings)
    assert relative_error(latents(pipeline("text", "ddim", whole), **settings), expected) < TOLERANCE
    latents(pipeline("text", "ddim", unet), **settings)
    assert kinds(unet.steps) == ["key", "inherit"]


def test_a_pipeline_that_never_had_a_unet(mini_pipeline: Pipeline, unet: UNet) -> None:
    """No torch UNet need be loaded."""
    made = StableDiffusionPipeline.from_pretrained(MINI, unet=None, dtype=torch.float32)
    made.unet = unet
    made.to("cpu")
    made.set_progress_bar_config(disable=True)
    assert made.components["unet"] is unet
    expected = generate(mini_pipeline, scheduler="ddim", plan="deepcache:3").latents
    assert relative_error(latents(made, height=64, width=64), expected) < TOLERANCE


def test_the_configuration_is_the_models(mini_bundle: Bundle, unet: UNet) -> None:
    real = pipeline("text", "ddim").unet.config
    assert {name: real[name] for name in unet.config if name != "_diffusers_version"} == {
        name: value for name, value in unet.config.items() if name != "_diffusers_version"
    }
    assert unet.config.sample_size == unet.config["sample_size"] == 8
    assert (unet.dtype, unet.device.type) == (torch.float32, "cpu")


# A loop of one's own, on the UNet alone.


@pytest.fixture
def sample(mini_bundle: Bundle) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    text = mini_bundle.manifest.features["text_encoder"].shape
    return {
        "sample": torch.randn(1, 4, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(resolve(text, {"batch": 1}), generator=generator),
    }


@pytest.mark.parametrize("scheduler", list(SCHEDULER_CLASSES))
def test_a_timestep_tells_its_place(scheduler: str) -> None:
    timesteps = reference_scheduler(scheduler, 5).timesteps
    for start in (0, 1, 3):
        with torch.no_grad():
            places = [_all_timesteps(timestep) for timestep in timesteps[start:]]
        assert [place for _, place in places] == list(range(start, len(timesteps)))
        assert all(torch.equal(found, timesteps) for found, _ in places)


def test_a_loop_over_the_same_timesteps_once_more(unet: UNet, sample: dict[str, Any]) -> None:
    timesteps = reference_scheduler("ddim", 4).timesteps
    for stop in (4, 3, 1, 4):
        for timestep in timesteps[:stop]:
            unet(timestep=timestep, **sample)
        assert kinds(unet.steps) == ["key", "inherit", "inherit", "key"][:stop]


@pytest.mark.parametrize("order", [(0, 2), (0, 0, 1, 1), (0, 1, 1)])
def test_evaluations_out_of_turn_are_refused(unet: UNet, sample: dict[str, Any], order: tuple[int, ...]) -> None:
    timesteps = reference_scheduler("ddim", 4).timesteps
    for place in order[:-1]:
        unet(timestep=timesteps[place], **sample)
    with pytest.raises(RequestError, match=rf"evaluation {order[-1]} of 4 \(timestep \d+\) is out of turn.*set_timesteps"):
        unet(timestep=timesteps[order[-1]], **sample)


def test_a_timestep_alone_is_a_call_of_its_own(unet: UNet, sample: dict[str, Any], recwarn: pytest.WarningsRecorder) -> None:
    """A model of one step is called with the same timestep again and again, which is nothing to warn of."""
    for timestep in (torch.tensor(501), torch.tensor(501), torch.tensor([501.0])):
        unet(timestep=timestep, **sample)
        assert kinds(unet.steps) == ["key"]
    assert not [each for each in recwarn if "copy, which" in str(each.message)]


def test_outputs_are_as_the_sample_is(unet: UNet, sample: dict[str, Any]) -> None:
    timestep = reference_scheduler("ddim", 1).timesteps[0]
    single: Any = unet(timestep=timestep, **sample)
    double = unet(timestep=timestep.expand(1), return_dict=False, **{n: t.double() for n, t in sample.items()})
    assert (single.sample.dtype, double[0].dtype) == (torch.float32, torch.float64)
    assert torch.equal(single.sample, double[0].float())
    assert not isinstance(double, type(single))


def test_what_it_cannot_take_is_refused_by_name(unet: UNet, sample: dict[str, Any]) -> None:
    timestep = reference_scheduler("ddim", 1).timesteps[0]
    with pytest.raises(RequestError, match="does not take cross_attention_kwargs, down_block_additional_residuals"):
        unet(timestep=timestep, class_labels=None, cross_attention_kwargs={}, down_block_additional_residuals=(), **sample)
    with pytest.raises(RequestError, match="timestep is a int; give an element of scheduler.timesteps"):
        unet(timestep=501, **sample)  # type: ignore[arg-type]
    for wrong in (torch.ones(0), torch.tensor(1j), torch.tensor(float("nan")), torch.ones((), device="meta")):
        with pytest.raises(RequestError, match="timestep is .*; give an element of scheduler.timesteps"):
            unet(timestep=wrong, **sample)
    for name, tensor in sample.items():
        with pytest.raises(RequestError, match="has shape"):
            unet(timestep=timestep, **{**sample, name: tensor[:0]})
        for other in (tensor.long(), tensor.to("meta"), tensor.to_sparse()):
            with pytest.raises(RequestError, match=rf"{name} is a tensor of .*; give a tensor of floating-point numbers"):
                unet(timestep=timestep, **{**sample, name: other})
    with pytest.raises(RequestError, match="timestep has unlike values"):
        unet(timestep=torch.tensor([1, 2]), **sample)


def test_shapes_are_checked_at_the_door(unet: UNet, sample: dict[str, Any]) -> None:
    timestep = reference_scheduler("ddim", 1).timesteps[0]
    latents, text = sample["sample"], sample["encoder_hidden_states"]
    rows = len(latents)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"sample": torch.zeros(rows, 4, 9, 8)}, r"sample has shape .* 9, 8\); expected .* in multiples of 8 \(.* 64 pixels\)"),
        ({"sample": torch.zeros(rows, 9, 8, 8)}, r"sample has shape .*; expected \(rows, 4, height, width\)"),
        ({"sample": latents[0]}, "sample has shape"),
        ({"sample": torch.zeros(rows, 4, 0, 8)}, "sample has shape"),
        ({"sample": None}, "sample is a NoneType; give a tensor"),
        ({"encoder_hidden_states": text[:, :0]}, r"shape \(\d, 0, 128\); expected \(\d, tokens, 128\): a row for each"),
        ({"encoder_hidden_states": text[:0]}, "encoder_hidden_states has shape"),
        ({"encoder_hidden_states": text[..., :64]}, "encoder_hidden_states has shape"),
        ({"encoder_hidden_states": None}, "encoder_hidden_states is a NoneType"),
    ]
    for change, message in wrong:
        with pytest.raises(RequestError, match=message):
            unet(timestep=timestep, **(sample | change))


def test_a_plan_that_the_bundle_cannot_run(mini_bundle: Bundle, sample: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="unknown plan"):
        UNet(mini_bundle.folder, "deepcash:3")
    unet = UNet(mini_bundle.folder, "unit:2")
    with pytest.raises(PlanError, match="python -m exporter build"):
        unet(timestep=reference_scheduler("ddim", 4).timesteps[0], **sample)
