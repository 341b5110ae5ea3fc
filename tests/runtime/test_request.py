"""Requests are checked before anything is loaded: types, ranges, and what would not fit into memory."""

from __future__ import annotations

import os
import random
import shutil
import warnings
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import runtime
from engines import Bundle, UserError, make_engine
from runtime import Pipeline, PlanError, Request, RequestError
from tests.support.diffusers_pipelines import mask, picture, pipeline
from tests.support.unets import relative_error

PROMPT = "a red star on a blue background"


def test_harmless_differences_are_made_good() -> None:
    given: dict[str, Any] = {"steps": np.int64(4), "seed": 3.0, "height": 64.0, "width": np.float32(64), "guidance_scale": 3}
    request = Request([PROMPT], ["a ring"], **given)
    assert (request.steps, request.seed, request.height, request.width, request.guidance_scale) == (4, 3, 64, 64, 3.0)
    assert all(type(value) is int for value in (request.steps, request.seed, request.height, request.width))
    assert (request.prompts, request.negative_prompts, request.images) == ((PROMPT,), ("a ring",), 1)
    assert Request((PROMPT, "a ring"), num_images=3).images == 6
    assert Request(PROMPT) == Request(PROMPT)
    with pytest.raises(AttributeError):
        request.steps = 3  # type: ignore[misc]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({"prompt": None}, r"prompt is a NoneType \(None\); give text, or a list of texts"),
    "a number": ({"prompt": 3}, r"prompt is a int \(3\); give text"),
    "bytes": ({"prompt": b"a star"}, "prompt is a bytes"),
    "a number among prompts": ({"prompt": ["a", 3]}, r"prompt\[1\] is a int"),
    "an empty list": ({"prompt": []}, "the prompt is empty"),
    "an empty prompt among others": ({"prompt": ["a", " "]}, "the prompt is empty"),
    "a lone surrogate": ({"prompt": "a \ud800 star"}, r"prompt has a character that is no text, U\+D800 at position 2"),
    "a lone surrogate to avoid": ({"negative_prompt": ["\udfff"]}, r"negative_prompt\[0\] has a character that is no text"),
    "a novel": ({"prompt": "word " * 10_000}, "prompt has 50000 characters; shorten it to 20000"),
    "a library": ({"prompt": ["a"] * 20_000}, "prompt is a list of 20000 texts; give 10000"),
    "too many negative prompts": ({"negative_prompt": ["a", "b"]}, r"negative_prompt has 2 texts for 1 prompt\(s\); give one"),
    "no negative prompt": ({"negative_prompt": []}, "negative_prompt has 0 texts"),
    "steps as text": ({"steps": "2"}, r"steps is a str \('2'\); give a whole number"),
    "half a step": ({"steps": 2.5}, r"steps is a float \(2.5\); give a whole number"),
    "steps that are a truth": ({"steps": True}, "steps is a bool"),
    "a seed that is not": ({"seed": "x"}, "seed is a str"),
    "a seed and a generator": ({"seed": 1, "generator": torch.Generator()}, "seed = 1 and a generator are both given"),
    "a generator that is none": ({"generator": 3}, "generator is a int"),
    "too few generators": ({"generator": [torch.Generator()], "num_images": 2}, r"a list of 1 for 2 picture\(s\)"),
    "one generator for pictures from one": (
        {"generator": torch.Generator(), "num_images": 2, "image": Image.new("RGB", (64, 64))},
        "generator is one for 2 pictures from an image",
    ),
    "latents and an image": (
        {"latents": torch.ones(1, 4, 8, 8), "image": Image.new("RGB", (64, 64))},
        "both given; a call starts",
    ),
    "latents of three dimensions": ({"latents": torch.ones(4, 8, 8)}, r"shape \(4, 8, 8\); give .* \(images, channels, height"),
    "sparse latents": (
        {"latents": torch.ones(1, 4, 8, 8).to_sparse()},
        "latents is a tensor of .* torch.sparse_coo, on cpu",
    ),
    "latents that are nowhere": ({"latents": torch.ones(1, 4, 8, 8, device="meta")}, "latents is a tensor of .* on meta; give"),
    "embeddings of nothing": ({"prompt": None, "prompt_embeds": torch.ones(0, 32, 128)}, r"shape \(0, 32, 128\)"),
    "very many steps as a fraction": ({"steps": Fraction(10**400)}, "steps = a number of more than 40 digits; choose some"),
    "half a seed as a fraction": ({"seed": Fraction(10**400 + 1, 2)}, "seed is a Fraction"),
    "very many steps": ({"steps": 10**400}, "steps = a number of more than 40 digits; choose some hundreds"),
    "latents that are not finite": (
        {"latents": torch.full((1, 4, 8, 8), float("nan"))},
        "latents has numbers that are not finite",
    ),
    "embeddings that are not finite": (
        {"prompt": None, "prompt_embeds": torch.full((1, 32, 128), float("inf"))},
        "prompt_embeds has numbers that are not finite; give finite floating-point numbers",
    ),
    "whole latents": ({"latents": torch.ones(1, 4, 8, 8, dtype=torch.int64)}, "latents is a tensor of torch.int64"),
    "a prompt twice": ({"prompt_embeds": torch.ones(1, 32, 128)}, "prompt and prompt_embeds are both given"),
    "negative rows": ({"negative_prompt_embeds": torch.ones(2, 32, 128)}, r"has 2 rows for 1 prompt\(s\)"),
    "an output that is none": ({"output_type": "jpeg"}, "output_type = 'jpeg'; choose from: pil, np, pt, latent"),
    "a rescaling above 1": ({"guidance_rescale": 2}, "guidance_rescale = 2; choose a number from 0"),
    "a seed beyond 64 bits": ({"seed": 2**63}, "seed = 9223372036854775808; choose one from -9223372036854775808 to"),
    "a seed of 5,000 digits": ({"seed": 10**5000}, "seed = a number of more than 40 digits; choose one"),
    "a height that is not a number": ({"height": float("nan")}, "height is a float"),
    "an infinite width": ({"width": float("inf")}, "width is a float"),
    "guidance as text": ({"guidance_scale": "7"}, "guidance_scale is a str"),
    "infinite guidance": ({"guidance_scale": float("inf")}, "guidance_scale = inf; choose a finite number"),
    "guidance of 5,000 digits": ({"guidance_scale": 10**5000}, "guidance_scale = inf"),
    "pictures of 5,000 digits": ({"num_images": 10**5000, "seed": 1}, "num_images = a number of more than 40 digits"),
    "no pictures": ({"num_images": 0}, "num_images = 0; ask for at least 1"),
    "a scheduler object": ({"scheduler": object()}, "scheduler is a object"),
    "a scheduler that is not": ({"scheduler": "x" * 10_000}, "unknown scheduler 'x"),
    "strength as text": ({"strength": "1"}, "strength is a str"),
    "strength of nothing": ({"strength": 0}, "strength = 0; choose"),
    "an array": ({"image": np.zeros((8, 8, 3))}, "image is a ndarray; give a PIL image or the path of a file"),
    "a mask alone": ({"mask": mask()}, "mask is given, but no image"),
    "a flag that is a number": ({"allow_nonfinite": 1}, "allow_nonfinite is a int"),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_what_is_refused_in_one_line_before_anything_is_loaded(name: str) -> None:
    options, message = WRONG[name]
    with pytest.raises(RequestError, match=message) as refusal:
        runtime.generate(**{"prompt": PROMPT, "bundle": "nowhere", **options})
    assert len(str(refusal.value).splitlines()) == 1
    assert len(str(refusal.value)) < 500


def test_other_doors_check_types_too(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="callback is a int; give a function"):
        Pipeline.generate(None, PROMPT, callback=1)  # type: ignore[arg-type]
    for given in (3, "latents", ["noise"]):
        with pytest.raises(RequestError, match="callback_on_step_end_tensor_inputs = .*; only"):
            Pipeline.generate(None, PROMPT, callback_on_step_end_tensor_inputs=given)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="bundle is a int"):
        runtime.load(3)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="engine is a NoneType"):
        runtime.load(tmp_path, None)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="plan is a int"):
        Request(PROMPT, plan=3)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="unknown plan"):
        runtime.generate(PROMPT, plan="nope:3", bundle="nowhere")


def test_the_bundle_that_was_built_last_is_named_where_there_are_others(
    original: Path, assembled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(original.parent.parent)
    current = SimpleNamespace(is_outdated=lambda: False)
    monkeypatch.setattr("runtime.api._loaded", lambda folder, key, engine: SimpleNamespace(folder=folder, swapper=current))
    os.utime(original / "manifest.json", (2e9, 2e9))
    load: Any = runtime.load
    with pytest.warns(UserWarning, match=r"bundle bundles/original is taken, which was built last, of 2 in ./bundles; name one"):
        assert load().folder == original
    shutil.rmtree(original)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load().folder == assembled


@pytest.fixture(scope="module")
def null_pipeline(mini_bundle: Bundle) -> Pipeline:
    """Shapes, no arithmetic."""
    return Pipeline(mini_bundle, make_engine("null"))


@pytest.mark.parametrize(
    "options",
    [
        {"num_images": 10**9},
        {"num_images": 10**18},
        {"height": 2**31, "width": 2**31},
        {"height": 64 * 10**400},
        {"width": 64 * 10**6, "num_images": 1},
        {"image": picture(), "height": 2**31, "width": 64},
        {"prompt": [PROMPT] * 10_000, "num_images": 10**6},
    ],
    ids="+".join,
)
def test_what_does_not_fit_into_memory_is_refused_before_it_is_made(null_pipeline: Pipeline, options: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"take at least .* GiB of memory, and there are \d+ GiB; ask for fewer"):
        null_pipeline.generate(**{"prompt": PROMPT, **options})


def test_several_negative_prompts_are_each_ones_own(mini_pipeline: Pipeline) -> None:
    """As in diffusers, whose pipelines take a list for a list."""
    prompts, negatives = ["a red star", "a blue star"], ["blue", "green"]
    made = mini_pipeline.generate(prompts, negatives, steps=4, seed=5, scheduler="ddim", num_images=2, guidance_scale=3)
    expected = pipeline("text", "ddim")(
        prompts,
        negative_prompt=negatives,
        num_inference_steps=4,
        num_images_per_prompt=2,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(5 + i) for i in range(4)],
        output_type="latent",
    ).images
    assert relative_error(made.latents, expected) < 1e-4


VALUES: list[Any] = [
    None, True, 0, 1, -1, 2.5, 64.0, float("nan"), float("inf"), 10**30, 10**5000, -(2**63), "", " ", "2", "a\ud800", "\0",
    "x" * 30_000, b"x", [], ["a"], ["a", None], {}, {"a": 1}, (), object(), 1j, np.float64(2), np.zeros(3), torch.ones(()),
    Path("/"), Path("gone"), Image.new("RGB", (64, 64)), Image.new("F", (0, 0)), "ddim", "deepcache:2", "block:" + "9" * 5000,
    "full+" * 100, lambda: None,
]  # fmt: skip
FIELDS = (
    "prompt", "negative_prompt", "steps", "guidance_scale", "seed", "height", "width", "num_images", "scheduler", "plan", "image",
    "strength", "mask", "allow_nonfinite", "long_prompts", "clip_skip",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:prompt cut")
def test_requests_drawn_at_random_give_a_request_or_one_line(null_pipeline: Pipeline) -> None:
    """Seeded: each request has one to three fields of anything, and goes as far as a pipeline would take it before it runs."""
    dice, taken = random.Random(3), 0
    for _ in range(400):
        options: dict[str, Any] = {"prompt": PROMPT, "steps": 3}
        options |= {name: dice.choice(VALUES) for name in dice.sample(FIELDS, dice.randint(1, 3))}
        try:
            null_pipeline.prepare(Request(**options))
            taken += 1
        except UserError as error:
            message = str(error)
            assert len(message.splitlines()) == 1, message
            assert len(message) < 1000
    assert taken > 10, "some are fine"
