"""Every preset, with every scheduler, gives the latents of the reference: hooks on the diffusers UNet, run in one piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from engines import Bundle
from exporter.graph.partition import Granularity
from runtime import Pipeline, Plan, Rule, find_plan
from runtime.execution.executor import LoadedBundle
from runtime.plans.key_steps import Explicit
from tests.support.denoise import denoise, small_inputs
from tests.support.reference import mini_pixels, mini_text, mini_unet, reference_denoise, reference_noise, reference_scheduler
from tests.support.reference_words import Halves, Skip, reference_words
from tests.support.reference_words import Rule as Words
from tests.support.unets import TOPOLOGIES, relative_error, shared_network, shared_unet

TOLERANCE = 1e-4
"""Of the largest final latent. Both sides are float32, one evaluation differs by 1e-6 (sums in another order), and a dozen
steps with guidance 3 multiply that by less than 20; inheriting a wrong feature, or a step too late, gives more than 1e-2."""

PROMPT, NEGATIVE = "a red star on a blue background", "a green circle"
# Paths of the modules whose outputs each preset inherits, in diffusers' names: written down, not derived.
INHERITED: dict[str, dict[str, list[str]]] = {
    "full": {"mini": [], "no mid": [], "uneven": [], "two stages": []},
    "block": {
        "mini": ["up_blocks.2"],
        "assembled": ["up_blocks.1"],  # a stage less
        "no mid": ["up_blocks.1"],
        "uneven": ["up_blocks.1"],
        "two stages": ["up_blocks.0"],
    },
    "deepcache": {
        "mini": ["up_blocks.3.attentions.1"],
        "no mid": ["up_blocks.2.attentions.0"],
        "uneven": ["up_blocks.2.attentions.1"],
        "two stages": ["up_blocks.1.attentions.0"],
    },
}
SCHEDULES = ["full", "block:2", "block:3", "block:7", "deepcache:1", "deepcache:2", "deepcache:3", "deepcache:5"]


@pytest.fixture(scope="module")
def unet() -> Any:
    return mini_unet()


def inherited_paths(plan: str, model: str) -> list[str]:
    return INHERITED[plan.partition(":")[0]][model]


def key_steps(plan: str, evaluations: int) -> range:
    return range(0, evaluations, int(plan.partition(":")[2] or 1))


def expected_latents(
    unet: Any, plan: str, scheduler: str, steps: int, guidance: float, images: int = 1, model: str = "mini"
) -> Tensor:
    noise = reference_scheduler(scheduler, steps)
    latents = reference_noise(11, images, 4, 8, 8) * noise.init_noise_sigma
    texts = [NEGATIVE] * images + [PROMPT] * images if guidance > 1 else [PROMPT] * images
    keys = key_steps(plan, len(noise.timesteps))
    return reference_denoise(unet, noise, latents, mini_text(texts), guidance, keys, inherited_paths(plan, model))[0]


@pytest.mark.parametrize("plan", SCHEDULES)
def test_presets_on_the_mini_model(mini_pipeline: Pipeline, unet: Any, plan: str) -> None:
    made = mini_pipeline.generate(PROMPT, NEGATIVE, steps=8, seed=11, scheduler="ddim", plan=plan)
    assert relative_error(made.latents, expected_latents(unet, plan, "ddim", 8, 3.0)) < TOLERANCE


@pytest.mark.parametrize("plan", ["deepcache:3", "block:2"])
@pytest.mark.parametrize("scheduler", ["pndm", "dpm++", "euler", "heun"])
def test_schedulers_on_the_mini_model(mini_pipeline: Pipeline, unet: Any, plan: str, scheduler: str) -> None:
    made = mini_pipeline.generate(PROMPT, NEGATIVE, steps=6, seed=11, scheduler=scheduler, plan=plan)
    assert relative_error(made.latents, expected_latents(unet, plan, scheduler, 6, 3.0)) < TOLERANCE


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_guidance_and_several_images(mini_pipeline: Pipeline, unet: Any, guidance: float) -> None:
    made = mini_pipeline.generate(
        PROMPT, NEGATIVE, steps=4, seed=11, scheduler="ddim", plan="block:2", guidance_scale=guidance, num_images=2
    )
    assert relative_error(made.latents, expected_latents(unet, "block:2", "ddim", 4, guidance, images=2)) < TOLERANCE


@pytest.mark.parametrize("scheduler", ["dpm++", "euler", "heun"])
def test_forecasts_skips_and_halves_on_the_mini_model(mini_pipeline: Pipeline, unet: Any, scheduler: str) -> None:
    """Joined, on engines, by the very call that users make; the model predicts v."""
    made = mini_pipeline.generate(PROMPT, NEGATIVE, steps=7, seed=11, scheduler=scheduler, plan="skip:3+forecast:2+guide:2")
    noise = reference_scheduler(scheduler, 7)
    count = len(noise.timesteps)
    expected = reference_words(
        unet,
        noise,
        reference_noise(11, 1, 4, 8, 8) * noise.init_noise_sigma,
        mini_text([NEGATIVE, PROMPT]),
        3.0,
        [Words(INHERITED["deepcache"]["mini"], range(0, count, 2), damping=0.75)],
        Skip({*range(0, count, 3), count - 1}, "x0", 0.5),
        Halves(range(0, count, 2)),
    )
    assert relative_error(made.latents, expected) < TOLERANCE


def test_pictures_are_what_the_vae_makes_of_the_latents(mini_pipeline: Pipeline) -> None:
    made = mini_pipeline.generate(PROMPT, steps=2, scheduler="ddim", num_images=2)
    expected = mini_pixels(made.latents)
    for image, pixels in zip(made.images, expected, strict=True):
        got = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
        # Half a level is lost to rounding; 0.01 more for the 4e-6 by which the decoders differ.
        assert float((got - pixels).abs().max()) <= 0.51


def test_the_assembled_variant(assembled_bundle: Bundle) -> None:
    from engines import make_engine

    pipeline = Pipeline(assembled_bundle, make_engine("onnxruntime"))
    made = pipeline.generate(PROMPT, NEGATIVE, steps=5, seed=11, scheduler="ddim", plan="block:2")
    expected = expected_latents(mini_unet("assembled"), "block:2", "ddim", 5, 3.0, model="assembled")
    assert relative_error(made.latents, expected) < TOLERANCE


@pytest.mark.parametrize("plan", ["full", "block:2", "block:3", "deepcache:2", "deepcache:3"])
@pytest.mark.parametrize("model", list(TOPOLOGIES))
@pytest.mark.parametrize("granularity", ["block", "unit"])
def test_presets_on_other_topologies(model: str, plan: str, granularity: Granularity) -> None:
    unet, network = shared_unet(model), shared_network(model, granularity, "block:2", "deepcache:2")
    latents, text = small_inputs()
    made, _ = denoise({"one": network}, reference_scheduler("ddim", 7), latents, text, find_plan(plan))
    expected, _ = reference_denoise(
        unet, reference_scheduler("ddim", 7), latents, text, 1.0, key_steps(plan, 7), inherited_paths(plan, model)
    )
    assert relative_error(made, expected) < TOLERANCE


@pytest.mark.parametrize("scheduler", ["pndm", "dpm++", "euler", "heun"])
def test_schedulers_on_a_unet_without_mid_block(scheduler: str) -> None:
    unet, network = shared_unet("no mid"), shared_network("no mid", "block", "block:2", "deepcache:2")
    latents, text = small_inputs()
    noise = reference_scheduler(scheduler, 6)
    latents = latents * noise.init_noise_sigma
    made, _ = denoise({"one": network}, noise, latents, text, find_plan("deepcache:3"))
    noise = reference_scheduler(scheduler, 6)
    expected, _ = reference_denoise(
        unet, noise, latents, text, 1.0, key_steps("deepcache:3", len(noise.timesteps)), inherited_paths("deepcache:3", "no mid")
    )
    assert relative_error(made, expected) < TOLERANCE


# Plans of one's own: pattern, the modules it stands for.
OWN_PLANS = {
    "one unit": (["down.0.layer.0.attention"], ["down_blocks.0.attentions.0"]),
    "a layer": (["up.2.layer.0"], ["up_blocks.2.resnets.0", "up_blocks.2.attentions.0"]),
    "a block whose inside is read by skips": (
        ["down.1"],
        ["down_blocks.1.resnets.0", "down_blocks.1.attentions.0", "down_blocks.1.downsamplers.0"],
    ),
    "a glob": (["up.*.sampler"], ["up_blocks.0.upsamplers.0", "up_blocks.1.upsamplers.0"]),
    "the encoder": (["down.*"], ["down_blocks.0.resnets.0", "down_blocks.0.resnets.1", "down_blocks.0.attentions.0",
                                 "down_blocks.0.attentions.1", "down_blocks.0.downsamplers.0", "down_blocks.1.resnets.0",
                                 "down_blocks.1.attentions.0", "down_blocks.1.downsamplers.0", "down_blocks.2.resnets.0",
                                 "down_blocks.2.resnets.1"]),
    "the time embedding": (["time"], ["time_embedding"]),
    "the stem, read by the first block and the last": (["stem"], ["conv_in"]),
    "everything": (["head"], ["conv_out"]),
}  # fmt: skip


@pytest.mark.parametrize("name", list(OWN_PLANS))
@pytest.mark.parametrize("granularity", ["block", "unit"])
def test_plans_of_ones_own_with_listed_key_steps(name: str, granularity: Granularity) -> None:
    patterns, paths = OWN_PLANS[name]
    keys = (0, 1, 4, 6) if patterns == ["head"] else (0, 1, 4)  # the last step is never skipped
    plan = Plan(name=name, rules=(Rule(units=tuple(patterns), when=Explicit(steps=keys)),))
    unet, network = shared_unet("uneven"), shared_network("uneven", granularity, plan)
    latents, text = small_inputs()
    made, records = denoise({"one": network}, reference_scheduler("ddim", 7), latents, text, plan)
    expected, _ = reference_denoise(unet, reference_scheduler("ddim", 7), latents, text, 1.0, set(keys), paths)
    assert relative_error(made, expected) < TOLERANCE
    inherit = "skip" if patterns == ["head"] else "inherit"
    assert [record.kind for record in records] == ["key" if index in keys else inherit for index in range(7)]


class Recording:
    """A runner that keeps what it was given."""

    def __init__(self, runner: Any, log: list[tuple[str, dict[str, Tensor]]]) -> None:
        self._runner, self._log = runner, log
        self.synchronize = runner.synchronize

    def run(self, inputs: Any) -> dict[str, Tensor]:
        segment = self._runner.segment
        self._log.append((segment.name, {name: inputs[name] for name in segment.inputs}))
        return self._runner.run(inputs)


# What the segments that run in an inherit step read: feature, and the module that makes it.
STAGES = {
    "block:3": {
        "stem": "conv_in",
        "down.0.layer.0.attention": "down_blocks.0.attentions.0",
        "down.0.layer.1.attention": "down_blocks.0.attentions.1",
        "up.2.sampler": "up_blocks.2",
        "up.3.layer.1.attention": "up_blocks.3.attentions.1",
        "up.3.layer.2.attention": "up_blocks.3.attentions.2",
    },
    "deepcache:3": {
        "stem": "conv_in",
        "up.3.layer.1.attention": "up_blocks.3.attentions.1",
        "up.3.layer.2.attention": "up_blocks.3.attentions.2",
    },
}


@pytest.mark.parametrize("plan", list(STAGES))
def test_stages_of_an_inherit_step(mini_pipeline: Pipeline, unet: Any, plan: str) -> None:
    """Not only the end result: every feature that an inherit step reads is the reference's, inherited or fresh."""
    log: list[tuple[str, dict[str, Tensor]]] = []
    network = mini_pipeline.network
    recording: Any = {name: Recording(runner, log) for name, runner in network.runners.items()}
    latents, text = reference_noise(3, 2, 4, 8, 8), mini_text([NEGATIVE, PROMPT])
    noise, found = reference_scheduler("ddim", 3), find_plan(plan)
    _, records = denoise({"one": LoadedBundle(network.manifest, recording)}, noise, latents, text, found)
    paths = STAGES[plan]
    _, seen = reference_denoise(
        unet, reference_scheduler("ddim", 3), latents, text, 1.0, {0}, inherited_paths(plan, "mini"), paths.values()
    )
    ran = iter(log)
    for record in records:
        read = {name: tensor for _, inputs in take(ran, len(record.ran)) for name, tensor in inputs.items()}
        assert record.kind == "key" or set(read) == {*paths, "sample", "timestep", "time", "text_encoder"}
        for feature, path in paths.items():
            # One feature of one step: 1e-6 of sums in another order, times 10 for the steps before it.
            assert relative_error(read[feature], seen[record.index][path]) < 1e-5, (record.index, feature)
    # The inherited feature is the very tensor that the key step made, not a copy.
    inherited = next(iter(records[1].inherited))
    tensors = {inputs[inherited].data_ptr() for _, inputs in log if inherited in inputs}
    assert len(tensors) == 1


def take(log: Any, count: int) -> Sequence[tuple[str, dict[str, Tensor]]]:
    return [next(log) for _ in range(count)]
