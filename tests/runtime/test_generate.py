"""``generate``: seeds, batches, guidance, over-long prompts, callbacks, and calls in parallel."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import runtime
from engines import Bundle, BundleError, make_engine
from engines.null import Null
from runtime import Pipeline, Plan, Rule, StepRecord
from runtime.execution.executor import LoadedBundle
from runtime.plans.key_steps import Explicit, Front
from tests.support.reference import mini_text
from tests.support.unets import relative_error

PROMPT = "a red star on a blue background"
BATCH_TOLERANCE = 1e-5
"""Of the largest latent: rows are computed alike in a batch of any size, up to the order of sums in a matrix product."""


def level_difference(first: Image.Image, second: Image.Image) -> int:
    return int(np.abs(np.asarray(first, dtype=int) - np.asarray(second, dtype=int)).max())


def test_picture_i_has_seed_plus_i(mini_pipeline: Pipeline) -> None:
    together = mini_pipeline.generate(PROMPT, steps=3, seed=40, num_images=3, plan="block:2")
    assert len(together.images) == 3
    for i in range(3):
        alone = mini_pipeline.generate(PROMPT, steps=3, seed=40 + i, plan="block:2")
        assert relative_error(together.latents[i : i + 1], alone.latents) < BATCH_TOLERANCE
        assert level_difference(together.images[i], alone.image) <= 1  # rounded to 8 bits


def test_a_list_of_prompts_makes_pictures_of_each(mini_pipeline: Pipeline) -> None:
    prompts = [PROMPT, "a green ring"]
    together = mini_pipeline.generate(prompts, steps=2, seed=7, num_images=2)
    assert len(together.images) == 4
    alone = mini_pipeline.generate(prompts[1], steps=2, seed=9, num_images=2)
    assert relative_error(together.latents[2:], alone.latents) < BATCH_TOLERANCE


def test_the_same_call_twice_gives_the_same_latents(mini_pipeline: Pipeline) -> None:
    first, second = (mini_pipeline.generate(PROMPT, steps=3, seed=5, plan="deepcache:2") for _ in range(2))
    assert torch.equal(first.latents, second.latents)
    other = mini_pipeline.generate(PROMPT, steps=3, seed=6, plan="deepcache:2")
    assert relative_error(other.latents, first.latents) > 0.1


def counting(pipeline: Pipeline, rows: list[int]) -> Pipeline:
    """The same pipeline, noting the number of rows of every call of the UNet's stem."""

    class Counting:
        def __init__(self, runner: Any) -> None:
            self._runner, self.synchronize = runner, runner.synchronize

        def run(self, inputs: Any) -> dict[str, Tensor]:
            rows.append(len(inputs["sample"]))
            return self._runner.run(inputs)

    counted = Pipeline.__new__(Pipeline)
    counted.__dict__.update(pipeline.__dict__)
    runners: Any = {**pipeline.network.runners, "stem": Counting(pipeline.network.runners["stem"])}
    counted.network = LoadedBundle(pipeline.manifest, runners)
    counted.networks = {"original": counted.network}
    return counted


@pytest.mark.parametrize(("guidance", "expected"), [(7.5, 4), (1.01, 4), (1.0, 2), (0.0, 2)])
def test_guidance_doubles_the_rows_of_one_batch(mini_pipeline: Pipeline, guidance: float, expected: int) -> None:
    rows: list[int] = []
    counting(mini_pipeline, rows).generate(PROMPT, steps=2, scheduler="ddim", num_images=2, guidance_scale=guidance)
    assert rows == [expected] * 2


def test_the_negative_prompt_counts_with_guidance_only(mini_pipeline: Pipeline) -> None:
    def latents(negative: str, guidance: float) -> Tensor:
        return mini_pipeline.generate(PROMPT, negative, steps=2, guidance_scale=guidance).latents

    assert torch.equal(latents("a ring", 1.0), latents("", 1.0))
    assert relative_error(latents("a ring", 7.5), latents("", 7.5)) > 1e-3  # far above rounding, 1e-6


def test_text_features_are_those_of_the_text_encoder(mini_pipeline: Pipeline) -> None:
    prompts = [PROMPT, "", "a large white square at the top left and a small green ring"]
    # float32 on both sides, three layers: 1e-6 is seen, 1e-5 leaves room for another processor's kernels.
    assert relative_error(mini_pipeline.encode(prompts), mini_text(prompts)) < 1e-5


def test_text_is_encoded_once_a_call_and_not_once_a_step_or_picture(mini_bundle: Bundle) -> None:
    engine = Null()
    pipeline = Pipeline(mini_bundle, engine)
    pipeline.generate([PROMPT, "a green ring"], "a circle", steps=5, num_images=3, plan="deepcache:2")
    # The prompts in one batch, and the negative prompt; the VAE takes pictures one by one.
    assert [engine.calls.count(name) for name in ("text_encoder", "stem", "vae_decoder")] == [2, 5, 6]
    engine.calls.clear()
    pipeline.generate(PROMPT, "a circle", steps=5, guidance_scale=1)
    assert [engine.calls.count(name) for name in ("text_encoder", "stem", "vae_decoder")] == [1, 5, 1]


def test_an_over_long_prompt_can_be_cut(mini_bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    mini_pipeline = Pipeline(mini_bundle, make_engine("onnxruntime"))  # the libraries' loggers warn once
    words = "a red star on a blue background " * 10
    with pytest.warns(UserWarning, match=r"prompt cut to 32 tokens, it has 72; not read: 'star on a blue background a red"):
        long = mini_pipeline.generate(words, steps=1, scheduler="ddim", long_prompts="cut")
    assert long.unread == ("star on a blue background" + " a red star on a blue background" * 5,)
    assert [record.message for record in caplog.records if "sequence length" in record.message] == []
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        mini_pipeline.generate(PROMPT, steps=1, scheduler="ddim")
    # The words beyond the limit do not count.
    with pytest.warns(UserWarning, match="cut"):
        more = mini_pipeline.generate(f"{words} and a green circle", steps=1, scheduler="ddim", long_prompts="cut")
    assert torch.equal(long.latents, more.latents)


def test_other_sizes_than_the_bundles_own(mini_pipeline: Pipeline) -> None:
    made = mini_pipeline.generate(PROMPT, steps=2, height=64, width=192, plan="deepcache:2")
    assert made.image.size == (192, 64)  # width first, as Pillow has it
    assert made.latents.shape == (1, 4, 8, 24)


def test_the_callback_sees_every_step(mini_pipeline: Pipeline) -> None:
    seen: list[tuple[StepRecord, Tensor]] = []
    made = mini_pipeline.generate(
        PROMPT, steps=3, scheduler="heun", plan="block:2", callback=lambda record, latents: seen.append((record, latents.clone()))
    )
    assert [record for record, _ in seen] == made.steps
    assert [record.index for record, _ in seen] == [0, 1, 2, 3, 4]
    assert torch.equal(seen[-1][1], made.latents)
    assert all(latents.shape == (1, 4, 8, 8) for _, latents in seen)


def test_a_callback_that_raises_ends_the_call_and_nothing_else(mini_pipeline: Pipeline) -> None:
    before = mini_pipeline.generate(PROMPT, steps=4, plan="deepcache:2")

    def stop(record: StepRecord, latents: Tensor) -> None:
        if record.index == 2:
            raise InterruptedError("enough")

    with pytest.raises(InterruptedError, match="enough"):
        mini_pipeline.generate("a green ring", steps=4, plan="deepcache:2", callback=stop)
    after = mini_pipeline.generate(PROMPT, steps=4, plan="deepcache:2")
    assert torch.equal(after.latents, before.latents)


OWN_PLAN = Plan(
    name="own",
    rules=(
        Rule(units=("up.-2",), when=Front(every=2)),
        Rule(units=("up.-1.layer.-2",), when=Explicit(steps=(0, 1)), start=0.5),
    ),
)
# Sixteen plans of which no two inherit the same at the same steps.
CALLS: list[dict[str, Any]] = [
    {"prompt": PROMPT, "plan": "full", "scheduler": "ddim", "seed": 1},
    {"prompt": "a green ring", "plan": "deepcache:3", "scheduler": "euler", "seed": 2},
    {"prompt": "a white square", "plan": "block:2", "scheduler": "heun", "seed": 3, "num_images": 2},
    {"prompt": "a small heart", "plan": "deepcache:2", "scheduler": "pndm", "seed": 4, "width": 128},
    {"prompt": "a blue cross", "plan": "block:3", "seed": 5, "guidance_scale": 1.0},
    {"prompt": "a red ring", "plan": "adaptive:0.1", "scheduler": "ddim", "seed": 6},
    {"prompt": "a yellow star", "plan": "quadratic:2", "seed": 7, "negative_prompt": "a ring"},
    {"prompt": "a black circle", "plan": "encoder:faster", "scheduler": "pndm", "seed": 8},
    {"prompt": "a white star", "plan": "switch:0.4+block:2", "scheduler": "euler", "seed": 9},
    {"prompt": "a green heart", "plan": OWN_PLAN, "scheduler": "heun", "seed": 10},
    {"prompt": "a blue ring", "plan": "front:2", "scheduler": "ddim", "seed": 11},
    {"prompt": "a red cross", "plan": "back:2", "scheduler": "euler", "seed": 12},
    {"prompt": "a white heart", "plan": "random:2", "scheduler": "pndm", "seed": 13},
    {"prompt": "a black star", "plan": "encoder:3", "scheduler": "ddim", "seed": 14},
    {"prompt": "a yellow ring", "plan": "switch:0.7", "seed": 15},
    {"prompt": "a green star", "plan": "adaptive:0.3", "scheduler": "euler", "seed": 16},
]


def test_sixteen_calls_at_once_give_what_calls_in_a_row_give(
    mini_bundle: Bundle, assembled_bundle: Bundle, mini_pipeline: Pipeline
) -> None:
    in_a_row = [mini_pipeline.generate(**call, steps=6) for call in CALLS]
    assert len({(str(made.plan), made.plan.name) for made in in_a_row}) == len(CALLS) == 16
    # A pipeline that has run nothing yet, so that the bundle to switch to is loaded while others run.
    together, start = Pipeline(mini_bundle, make_engine("onnxruntime")), Barrier(len(CALLS))

    def call(settings: dict[str, Any]) -> list[Any]:
        start.wait()
        # Twice, so that calls with other plans begin and end while one runs.
        return [together.generate(**settings, steps=6) for _ in range(2)]

    with ThreadPoolExecutor(max_workers=len(CALLS)) as pool:
        at_once = list(pool.map(call, CALLS))
    for alone, twice in zip(in_a_row, at_once, strict=True):
        for made in twice:
            assert torch.equal(made.latents, alone.latents)
            assert [image.tobytes() for image in made.images] == [image.tobytes() for image in alone.images]
            assert [(record.unet, record.ran) for record in made.steps] == [(record.unet, record.ran) for record in alone.steps]


def test_runtime_generate_loads_a_bundle_once(mini_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    made = runtime.generate(PROMPT, steps=1, bundle=mini_bundle.folder)
    assert made.image.size == (64, 64)
    assert runtime.load(mini_bundle.folder) is runtime.load(str(mini_bundle.folder))
    monkeypatch.chdir(mini_bundle.folder.parent)
    assert runtime.load(mini_bundle.folder.name) is runtime.load(mini_bundle.folder)


def test_the_default_bundle_is_the_one_built_last(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.chdir(tmp_path)
    with pytest.raises(BundleError, match=r"no bundle in \./bundles; build it with: python -m exporter"):
        runtime.default_bundle()
    for age, name in enumerate(["older", "newer", "newest-unfinished"]):
        folder = tmp_path / "bundles" / (f".{name}" if "unfinished" in name else name)
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
        os.utime(folder / "manifest.json", (1_700_000_000 + age, 1_700_000_000 + age))
    assert runtime.default_bundle().name == "newer"
