"""diffusers' own arguments, by their names, give what its pipelines give for them with the same weights."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import runtime
from runtime import Pipeline, RequestError
from runtime.arguments.aliases import with_our_names
from runtime.images.schedulers import SCHEDULERS, make_scheduler
from runtime.request import FIELDS
from tests.support.diffusers_pipelines import NEGATIVE, PROMPT, inputs, mask, picture, pipeline
from tests.support.reference import MINI, SCHEDULER_CLASSES
from tests.support.unets import relative_error

TOLERANCE = 1e-4
"""Of the largest value: both sides are float32, one evaluation differs by 1e-6, and the steps multiply that by less than 20."""
BOTH: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0, "negative_prompt": NEGATIVE}


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(images: int = 1) -> Tensor:
    return torch.randn(images, 4, 8, 8, generator=drawn(3))


def embeds(texts: list[str]) -> Tensor:
    made: Tensor = pipeline("text", "ddim").encode_prompt(texts, "cpu", 1, False)[0]
    return made


def halve(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """A callback that changes the latents at one step."""
    return {"latents": tensors["latents"] / 2} if index == 1 else tensors


def two_prompts() -> dict[str, Any]:
    return {
        "prompt_embeds": embeds([PROMPT, "a ring"]),
        "negative_prompt_embeds": embeds([NEGATIVE, "red"]),
        "negative_prompt": None,
        "latents": noise(4),
        "num_images_per_prompt": 2,
    }


def one_prompt() -> dict[str, Any]:
    made = {"prompt_embeds": embeds([PROMPT]), "negative_prompt_embeds": embeds([NEGATIVE])}
    return {**made, "negative_prompt": None, "latents": noise()}


def each_its_own() -> dict[str, Any]:
    return {"prompt": [PROMPT, "a ring"], "negative_prompt": [NEGATIVE] * 2, "generator": [drawn(5), drawn(1)]}


NOTHING = {"clip_skip": None, "callback_on_step_end": None, "callback_on_step_end_tensor_inputs": ["latents"]}
CALLS: dict[str, Any] = {
    "a generator": lambda: {"prompt": PROMPT, "generator": drawn(5)},
    "one generator for two": lambda: {"prompt": PROMPT, "generator": drawn(5), "num_images_per_prompt": 2},
    "a generator for each": each_its_own,
    "latents": lambda: {"prompt": PROMPT, "latents": noise(2), "num_images_per_prompt": 2},
    "embeddings": one_prompt,
    "embeddings of two prompts": two_prompts,
    "a callback": lambda: {"prompt": PROMPT, "latents": noise(), "callback_on_step_end": halve},
    "rescaled guidance": lambda: {"prompt": PROMPT, "latents": noise(2), "num_images_per_prompt": 2, "guidance_rescale": 0.7},
    "no negative prompt": lambda: {"prompt": PROMPT, "latents": noise(), "negative_prompt": None},
    "what diffusers' defaults are": lambda: {"prompt": PROMPT, "latents": noise(), **NOTHING},
}


@pytest.mark.parametrize("call", list(CALLS))
def test_a_call_is_diffusers(mini_pipeline: Pipeline, call: str) -> None:
    expected = pipeline("text", "ddim")(output_type="latent", **{**BOTH, **CALLS[call]()}).images
    made: Any = mini_pipeline.generate(scheduler="DDIMScheduler", output_type="latent", **{**BOTH, **CALLS[call]()})
    assert made.latents is made.images
    assert relative_error(made.latents, expected) < TOLERANCE


@pytest.mark.parametrize(("output", "kind"), [("np", np.ndarray), ("pt", Tensor), ("pil", list)])
def test_outputs_have_diffusers_forms(mini_pipeline: Pipeline, output: str, kind: type) -> None:
    call: dict[str, Any] = {**BOTH, "prompt": PROMPT, "latents": noise(2), "num_images_per_prompt": 2, "output_type": output}
    expected: Any = pipeline("text", "ddim")(**call).images
    made: Any = mini_pipeline.generate(scheduler="ddim", **call).images
    pairs = [(np.asarray(one, float), np.asarray(other, float)) for one, other in zip(made, expected, strict=True)]
    # The VAE is run in float32 on both sides; a level is rounded the other way here and there.
    assert all(one.shape == other.shape and np.abs(one - other).max() <= (1 if output == "pil" else 1e-3) for one, other in pairs)
    assert isinstance(made, kind)


@pytest.mark.parametrize("name", ["lcm", "tcd", "sa", "unipc", "euler a", "deis", "dpm2", "lms", "ddim parallel", "ddpm"])
def test_more_schedulers_by_name(mini_pipeline: Pipeline, name: str) -> None:
    kind = type(make_scheduler(name, MINI / "scheduler", 4))
    theirs = kind.from_pretrained(MINI, subfolder="scheduler")
    expected = pipeline("text", theirs)(PROMPT, output_type="latent", generator=[drawn(2)], **BOTH).images
    made = mini_pipeline.generate(PROMPT, scheduler=name, seed=2, **BOTH)
    assert relative_error(made.latents, expected) < TOLERANCE
    assert torch.equal(made.latents, mini_pipeline.generate(PROMPT, scheduler=kind.__name__, seed=2, **BOTH).latents)


def test_ours_stay(mini_pipeline: Pipeline) -> None:
    assert {name: getattr(diffusers, kind) for name, kind in SCHEDULERS.items()} == SCHEDULER_CLASSES


def test_both_names_with_one_value_are_one_option() -> None:
    assert with_our_names({"steps": 5, "num_inference_steps": 5, "mask_image": None}, FIELDS) == {"steps": 5}
    one = picture()
    assert with_our_names({"mask": one, "mask_image": one}, FIELDS) == {"mask": one}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"steps": 5, "num_inference_steps": 6},
            "steps and num_inference_steps are two names of one thing, and were given 5 and 6",
        ),
        ({"num_images": 1, "num_images_per_prompt": 2}, "num_images and num_images_per_prompt are two names"),
        ({"num_inference_step": 5}, "generate takes no 'num_inference_step'; did you mean num_inference_steps"),
        ({"clip_skip": -1}, "clip_skip = -1; give the number of the text encoder's last layers to leave out"),
        ({"long_prompts": "drop"}, "long_prompts = 'drop'; choose from: chunks, cut"),
        ({"eta": 0.5}, "eta cannot be had"),
        ({"callback_on_step_end": 3}, "callback_on_step_end is a int; give a function of the pipeline"),
        ({"callback_on_step_end": halve, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, r"only \['latents'\]"),
        ({"callback_on_step_end": lambda *_: None}, "callback_on_step_end returned a NoneType; return the dict"),
        ({"latents": torch.ones(1, 4, 8, 8), "height": 128}, r"size 128x64 and latents of 64x64 pixels are given"),
        ({"latents": torch.ones(2, 4, 8, 8)}, r"latents has shape \(2, 4, 8, 8\); this bundle takes \(1, 4, height, width\)"),
        (
            {"negative_prompt_embeds": torch.ones(1, 32, 77)},
            r"has shape \(1, 32, 77\); this bundle takes \(prompts, tokens, 128\)",
        ),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, dict) else None,
)
def test_what_is_refused(mini_pipeline: Pipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        mini_pipeline.generate(PROMPT, **{"scheduler": "ddim", **options})
    if "callback_on_step_end" not in options and "shape" not in message and "size" not in message:  # before anything is loaded
        with pytest.raises(RequestError, match=message):
            runtime.generate(PROMPT, bundle="nowhere", **options)


def test_a_seed_that_was_drawn_gives_the_picture_again(mini_pipeline: Pipeline) -> None:
    first, second = (mini_pipeline.generate(PROMPT, steps=2, seed=None, num_images=2) for _ in range(2))
    assert first.seeds != second.seeds
    assert first.seeds[1] == first.seeds[0] + 1
    assert torch.equal(mini_pipeline.generate(PROMPT, steps=2, seed=first.seeds[0], num_images=2).latents, first.latents)
    assert mini_pipeline.generate(PROMPT, steps=1, generator=drawn(3)).seeds == ()


def test_a_generation_says_what_it_is(mini_pipeline: Pipeline, tmp_path: Path) -> None:
    made = mini_pipeline.generate([PROMPT, "a ring"], ["", "red"], steps=3, seed=4, num_images=6, plan="deepcache:3")
    assert len(repr(made)) < 150
    for part in ("12 pictures of 64x64", "seeds 4 to 15", "3 steps of dpm++", "plan deepcache:3"):
        assert part in repr(made)
    assert Image.open(io.BytesIO(made._repr_png_() or b"")).size == (12 * 64, 64)
    paths = made.save(tmp_path / "out.png")
    assert [path.name for path in paths] == [f"out-{number:02}.png" for number in range(12)]
    written: Any = Image.open(paths[7])
    assert written.text == {
        "prompt": "a ring", "negative_prompt": "red", "seed": "11", "steps": "3", "scheduler": "dpm++", "guidance_scale": "3.0",
        "plan": "deepcache:3", "source": "mini", "variant": "original", "bundle": mini_pipeline.manifest.key,
        "version": f"unet-heirloom {runtime_version()}",
    }  # fmt: skip
    assert np.array_equal(np.asarray(written), np.asarray(made.images[7]))
    assert mini_pipeline.generate(PROMPT, steps=1).save(tmp_path / "one.png") == [tmp_path / "one.png"]
    with pytest.raises(RequestError, match=r"give the name of a .png file"):
        made.save(tmp_path / "out.jpg")
    bare = mini_pipeline.generate(PROMPT, steps=1, output_type="pt")
    assert bare._repr_png_() is None
    with pytest.raises(RequestError, match="no PIL pictures"):
        bare.save(tmp_path / "two.png")


def runtime_version() -> str:
    from engines.support.version import our_version

    return our_version()


def test_inpainting_keeps_what_is_black_to_the_pixel(mini_pipeline: Pipeline) -> None:
    """The mask ends inside of latents, and the VAE loses something everywhere: the kept pixels are the picture's own."""
    made = mini_pipeline.generate(PROMPT, steps=4, seed=1, **{**inputs("inpaint"), "strength": 1.0})
    black = np.asarray(mask()) < 128
    kept, original = np.asarray(made.image)[black], np.asarray(picture())[black]
    assert np.array_equal(kept, original)
    assert not np.array_equal(np.asarray(made.image)[~black], np.asarray(picture())[~black])


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        (None, "latents of a NoneType; return floating ones of shape (1, 4, 8, 8)"),
        (torch.zeros(1, 4, 8, 4), "latents of torch.float32 (1, 4, 8, 4)"),
        (torch.zeros(1, 4, 8, 8, dtype=torch.int64), "latents of torch.int64"),
    ],
)
def test_latents_that_a_callback_may_not_return(mini_pipeline: Pipeline, returned: Any, says: str) -> None:
    with pytest.raises(RequestError) as refusal:
        mini_pipeline.generate(PROMPT, steps=2, callback_on_step_end=lambda *given: {"latents": returned})
    assert says in str(refusal.value)


def test_latents_that_a_callback_returns_in_another_precision_stay_in_ours(mini_pipeline: Pipeline) -> None:
    def rounded(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"].half()}

    assert mini_pipeline.generate(PROMPT, steps=2, callback_on_step_end=rounded).latents.dtype == torch.float32
