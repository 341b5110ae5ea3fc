"""Prompts beyond what the text encoder reads at once: the latents of diffusers' pipeline with chunks that were encoded apart."""

from __future__ import annotations

import json
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPTokenizer

import runtime
from engines import Bundle, make_engine
from engines.bundle.folder import describe_file
from engines.null import Null
from runtime import Pipeline, RequestError
from runtime.text.chunks import chunk_rows, chunks_needed
from runtime.text.encoding import Prompts
from tests.support.diffusers_pipelines import PROMPT, pipeline
from tests.support.unets import relative_error

LONG = " and ".join([PROMPT, "a green ring at the top left", "a large white square"] * 5)
TOLERANCE = 1e-4
"""Of the largest value; see test_diffusers_names."""
CALL: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 3.0}


def noise(images: int = 1) -> Tensor:
    return torch.randn(images, 4, 8, 8, generator=torch.Generator().manual_seed(3))


def encoded(texts: list[str], chunks: int) -> Tensor:
    """Features (texts, chunks of 32 tokens, width) by diffusers' own parts: ids without marks, cut, marked, padded, encoded."""
    pipe = pipeline("text", "ddim")
    size, rows = pipe.tokenizer.model_max_length - 2, []
    for text in texts:
        words = pipe.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        parts = [pipe.tokenizer.decode(words[at * size : (at + 1) * size]) for at in range(chunks)]
        rows.append(torch.cat([pipe.encode_prompt(part, "cpu", 1, False)[0] for part in parts], dim=1))
    return torch.cat(rows)


def theirs(prompts: list[str], negatives: list[str], chunks: int) -> Tensor:
    made = pipeline("text", "ddim")(
        prompt_embeds=encoded(prompts, chunks),
        negative_prompt_embeds=encoded(negatives, chunks),
        latents=noise(len(prompts)),
        output_type="latent",
        **CALL,
    ).images
    assert isinstance(made, Tensor)
    return made


def ours(pipe: Pipeline, **given: Any) -> Tensor:
    images = len(given["prompt"]) if isinstance(given.get("prompt"), list) else 1
    return pipe.generate(latents=noise(images), scheduler="ddim", **CALL, **given).latents


@pytest.mark.parametrize(
    ("prompt", "negative"),
    [(LONG, "a green circle"), (PROMPT, LONG), ([PROMPT, LONG], [""]), ([LONG, PROMPT], ["red", LONG])],
    ids=["prompt", "negative", "one of two", "both"],
)
def test_long_prompts_are_read_in_chunks(mini_pipeline: Pipeline, prompt: Any, negative: Any) -> None:
    prompts = prompt if isinstance(prompt, list) else [prompt]
    negatives = [negative] if isinstance(negative, str) else negative * (len(prompts) // len(negative))
    chunks = chunks_needed(mini_pipeline.tokenizer(LONG, verbose=False).input_ids, 32)
    assert chunks == 4
    made = ours(mini_pipeline, prompt=prompt, negative_prompt=negative)
    assert relative_error(made, theirs(prompts, negatives, chunks)) < TOLERANCE


def test_without_guidance_the_negative_prompt_makes_nothing_longer(mini_pipeline: Pipeline) -> None:
    made = mini_pipeline.generate(PROMPT, LONG, steps=1, guidance_scale=1.0)
    assert torch.equal(made.latents, mini_pipeline.generate(PROMPT, steps=1, guidance_scale=1.0).latents)


def test_nothing_is_cut_and_nothing_is_warned_of(mini_pipeline: Pipeline, recwarn: pytest.WarningsRecorder) -> None:
    assert mini_pipeline.generate(LONG, steps=1).unread == ()
    assert mini_pipeline.encode([LONG, ""]).shape == (2, 4 * 32, 128)
    assert relative_error(mini_pipeline.encode([LONG, ""]), encoded([LONG, ""], 4)) < 1e-5
    assert not [each for each in recwarn if "cut" in str(each.message)]


def test_features_that_were_given_are_followed_by_empty_chunks(mini_pipeline: Pipeline) -> None:
    wanted = ours(mini_pipeline, prompt=LONG, negative_prompt="a ring")
    made = ours(mini_pipeline, prompt=LONG, negative_prompt=None, negative_prompt_embeds=encoded(["a ring"], 1))
    assert relative_error(made, wanted) < TOLERANCE
    made = ours(mini_pipeline, prompt=None, prompt_embeds=encoded([LONG], 4), negative_prompt="a ring")
    assert relative_error(made, wanted) < TOLERANCE


def test_features_of_any_length_go_with_others_of_that_length(mini_pipeline: Pipeline) -> None:
    odd = encoded([LONG, "a ring"], 2)[:, :50]
    expected = pipeline("text", "ddim")(
        prompt_embeds=odd[:1], negative_prompt_embeds=odd[1:], latents=noise(), output_type="latent", **CALL
    ).images
    given: dict[str, Any] = {"prompt": None, "negative_prompt": None, "prompt_embeds": odd[:1]}
    assert relative_error(ours(mini_pipeline, **given, negative_prompt_embeds=odd[1:]), expected) < TOLERANCE
    message = "negative_prompt_embeds is not given, and made of text it has 32 tokens, the other features have 50; give"
    with pytest.raises(RequestError, match=message):
        ours(mini_pipeline, **given)


@pytest.mark.parametrize("plan", ["full", "deepcache:2"])
def test_the_drop_in_takes_longer_features(mini_bundle: Bundle, mini_pipeline: Pipeline, plan: str) -> None:
    embeds = {"prompt_embeds": encoded([LONG], 4), "negative_prompt_embeds": encoded(["a ring"], 4)}
    unet = runtime.UNet(mini_bundle.folder, plan)
    made = pipeline("text", "ddim", unet)(latents=noise(), output_type="latent", **embeds, **CALL).images
    expected = ours(mini_pipeline, prompt=LONG, negative_prompt="a ring", plan=plan)
    assert relative_error(made, expected) < TOLERANCE


class Profiled(Null):
    """An engine whose compiled segments take only what they were built for."""

    has_profile = True


def built_for(pipe: Pipeline, chunks: int) -> Pipeline:
    """The pipeline as if its engines were built for so many chunks."""
    other = copy(pipe)
    manifest = pipe.manifest.model_copy(update={"text_chunks": chunks})
    other.bundle, other.engine = replace(pipe.bundle, manifest=manifest), Profiled()
    other.networks = {name: replace(network, manifest=manifest) for name, network in pipe.networks.items()}
    other._prompts = Prompts(manifest, pipe.tokenizer, other.engine)
    return other


def test_engines_with_a_profile_read_what_they_were_built_for(mini_pipeline: Pipeline) -> None:
    pipe = built_for(mini_pipeline, 2)
    message = r"prompt cut to 2 chunks of 32 tokens, it has 106 \(engines built with --text-chunks 4 read all\); not read: '"
    with pytest.warns(UserWarning, match=message):
        made = pipe.generate(LONG, steps=1, scheduler="ddim")
    words = mini_pipeline.tokenizer(LONG, add_special_tokens=False, verbose=False).input_ids
    assert made.unread == (mini_pipeline.tokenizer.decode(words[60:]).strip(),)
    short = mini_pipeline.generate(mini_pipeline.tokenizer.decode(words[:60]), steps=1, scheduler="ddim")
    assert torch.equal(made.latents, short.latents)
    with pytest.raises(
        RequestError, match=r"prompt_embeds has shape \(1, 96, 128\); this bundle takes \(prompts, 32 to 64, 128\)"
    ):
        pipe.generate(prompt_embeds=torch.ones(1, 96, 128))


def test_bundles_of_older_versions_cut_as_they_did(bundle_copy: Path) -> None:
    manifest = json.loads((bundle_copy / "manifest.json").read_text("utf-8"))
    assert manifest["features"]["text_encoder"]["shape"] == ["batch", "tokens=32", 128]
    manifest["features"]["text_encoder"]["shape"][1] = 32
    (bundle_copy / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    pipe = Pipeline(Bundle.open(bundle_copy), make_engine("onnxruntime"))
    with pytest.warns(UserWarning, match="prompt cut to 32 tokens, it has 106; not read: "):
        made = pipe.generate(LONG, steps=1)
    with pytest.warns(UserWarning, match="prompt cut"):
        assert torch.equal(made.latents, pipe.generate(LONG, steps=1, long_prompts="cut").latents)
    with pytest.raises(RequestError, match=r"prompt_embeds has shape \(1, 64, 128\); this bundle takes \(prompts, 32, 128\)"):
        pipe.generate(prompt_embeds=torch.ones(1, 64, 128))


@pytest.mark.parametrize("count", [0, 1, 29, 30, 31, 60, 61])
def test_chunks_hold_every_word_between_marks(count: int) -> None:
    ids = [900, *range(count), 901]
    needed = chunks_needed(ids, 32)
    rows = chunk_rows(ids, 32, needed + 1, 902)
    assert needed == max(1, -(-count // 30))
    assert [word for row in rows for word in row if word < 900] == list(range(count))
    assert all(len(row) == 32 and row[0] == 900 and row.count(901) == 1 for row in rows)
    assert rows[-1] == [900, 901, *[902] * 30]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("text", ["", PROMPT, LONG, " \u661f a  ring, " * 20])
def test_the_first_chunk_is_what_the_tokenizer_makes(mini_pipeline: Pipeline, text: str, side: str) -> None:
    tokenizer = mini_pipeline.tokenizer
    whole = tokenizer(text, verbose=False).input_ids
    cut = tokenizer(text, padding="max_length", max_length=32, truncation=True, padding_side=side).input_ids
    assert chunk_rows(whole, 32, 1, tokenizer.pad_token_id, side) == [cut]


def test_prompts_are_filled_up_at_the_side_that_the_tokenizer_says(bundle_copy: Path) -> None:
    """The tokens that diffusers' pipeline gives its text encoder, with the tokenizer that the folder's configuration makes."""
    path = bundle_copy / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"padding_side": "left"}))
    manifest = json.loads((bundle_copy / "manifest.json").read_text())
    for entry in manifest["files"]:
        entry.update(describe_file(bundle_copy, bundle_copy / entry["path"]).model_dump())
    (bundle_copy / "manifest.json").write_text(json.dumps(manifest))
    theirs = CLIPTokenizer.from_pretrained(bundle_copy / "tokenizer")
    wanted = theirs([PROMPT, ""], padding="max_length", max_length=32, truncation=True, return_tensors="pt").input_ids
    seen: list[Tensor] = []

    def encoder(tokens: Tensor) -> Tensor:
        seen.append(tokens)
        return tokens[..., None].float()

    pipe = Pipeline(Bundle.open(bundle_copy), Null())
    Prompts(pipe.manifest, pipe.tokenizer, Null()).encode([PROMPT, ""], encoder)
    assert wanted[1, 0] == theirs.pad_token_id
    assert torch.equal(torch.cat(seen), wanted)
