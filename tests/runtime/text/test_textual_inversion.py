"""Words of several vectors: the pictures of diffusers' pipeline on the same folder, whichever format the vectors came in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

import runtime
from engines.support.textual_inversion import expand_words
from exporter.build import build
from exporter.options import BuildOptions
from tests.support.sources import save_source
from tests.support.unets import TEXT_WIDTH
from tuning.checkpoints.find_source import find_source
from tuning.training.teacher import Teacher

PROMPT, NEGATIVE = "a <cat> on a <mat>, a red star", "a <dog>"

pytestmark = pytest.mark.shared_pieces


def vectors(count: int, seed: int) -> Tensor:
    return torch.randn((count, TEXT_WIDTH), generator=torch.Generator().manual_seed(seed)) * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with <cat> of three vectors, in diffusers' format, <dog> of two, in the web UI's, and <mat> of one."""
    made = tmp_path_factory.mktemp("inversion")
    source = find_source(str(save_source(made / "plain")))
    pipeline = StableDiffusionPipeline(
        vae=source.model("vae"), text_encoder=source.model("text_encoder"), unet=source.model("unet"),
        tokenizer=CLIPTokenizer.from_pretrained(source.folder / "tokenizer"),
        scheduler=DDIMScheduler.from_pretrained(source.folder / "scheduler"),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    save_file({"<cat>": vectors(3, 1)}, made / "cat.safetensors")
    save_file({"emb_params": vectors(2, 2)}, made / "dog.safetensors")
    pipeline.load_textual_inversion(str(made / "cat.safetensors"))
    pipeline.load_textual_inversion(str(made / "dog.safetensors"), token="<dog>")
    pipeline.load_textual_inversion({"<mat>": vectors(1, 3)[0]})
    pipeline.save_pretrained(made / "whole")
    return made / "whole"


@pytest.fixture(scope="module")
def bundle(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "inversion"
    build(BuildOptions(source=str(folder), out=out))
    return out


def test_the_latents_are_those_of_the_pipeline(folder: Path, bundle: Path, recwarn: pytest.WarningsRecorder) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    wanted = pipeline(
        PROMPT, negative_prompt=NEGATIVE, num_inference_steps=4, guidance_scale=5.0, output_type="latent",
        generator=torch.Generator().manual_seed(3),
    ).images  # fmt: skip
    size = wanted.shape[-1] * 2
    made = runtime.generate(
        PROMPT, negative_prompt=NEGATIVE, bundle=bundle, steps=4, guidance_scale=5.0, scheduler="ddim", seed=3,
        height=size, width=size,
    )  # fmt: skip
    assert (made.latents - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert not [each for each in recwarn if "'cat'" in str(each.message)]


@pytest.mark.parametrize("prompt", [PROMPT, NEGATIVE, "no such word", "<cat> <cat>", "a <mat>"])
def test_words_are_expanded_as_diffusers_does(folder: Path, prompt: str) -> None:
    pipeline: Any = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    assert expand_words(prompt, pipeline.tokenizer) == pipeline.maybe_convert_prompt(prompt, pipeline.tokenizer)


def test_captions_of_a_training_are_expanded_as_prompts_are(folder: Path) -> None:
    pipeline: Any = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    wanted = [
        pipeline.tokenizer(pipeline.maybe_convert_prompt(text, pipeline.tokenizer)).input_ids for text in (PROMPT, NEGATIVE)
    ]
    found = Teacher.load(str(folder)).ids([PROMPT, NEGATIVE]).tolist()
    assert [ids[: len(row)] for ids, row in zip(found, wanted, strict=True)] == wanted
    assert len(wanted[1]) == 5, "a word of two vectors, between the marks"


def test_vectors_that_a_prompt_names_itself_are_not_doubled(folder: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    assert expand_words("a <cat>_2", tokenizer) == "a <cat>_2"
    assert CLIPTextModel.from_pretrained(folder / "text_encoder").config.vocab_size == len(tokenizer)
