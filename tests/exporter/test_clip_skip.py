"""Text encoders without their last layers: the features and latents of diffusers' pipeline with that ``clip_skip``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from engines import Bundle, make_engine
from engines.bundle.names import TEXT
from exporter import BuildOptions, build
from exporter.graph.checkpoint import open_source
from exporter.graph.graph import load_graph
from exporter.verification.verify import Reference
from runtime import Pipeline, RequestError
from tests.support.commands import Command, assert_refused
from tests.support.diffusers_pipelines import NEGATIVE, PROMPT, SEED, latents, pipeline_of
from tests.support.sources import save_source, tiny_vae
from tests.support.unets import relative_error, small_unet


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose text encoder has three layers; not to be changed."""
    return save_source(tmp_path_factory.mktemp("skip") / "source", small_unet("two stages", mid_block_type=None), text_layers=3)


@pytest.fixture(autouse=True)
def text_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers 0.42 reads ``text_encoder.text_model`` for a clip_skip, and in transformers 5 the encoder is that itself."""
    if not hasattr(CLIPTextModel(CLIPTextConfig(num_hidden_layers=0, hidden_size=24, intermediate_size=8)), "text_model"):
        monkeypatch.setattr(CLIPTextModel, "text_model", property(lambda model: model), raising=False)


@pytest.mark.parametrize("skip", [1, 2, 3])
def test_features_are_those_of_diffusers(source: Path, skip: int) -> None:
    pipe = pipeline_of(source)
    graph = load_graph(open_source(str(source), "original"), "original", torch.float32, clip_skip=skip)
    module = graph.parts.load([TEXT])[TEXT]
    tokens = pipe.tokenizer(PROMPT, padding="max_length", return_tensors="pt").input_ids
    expected: Tensor = pipe.encode_prompt(PROMPT, "cpu", 1, False, clip_skip=skip)[0]
    with torch.no_grad():
        assert relative_error(module(tokens), expected) < 1e-5
    whole = load_graph(open_source(str(source), "original"), "original", torch.float32)
    parameters = [next(unit.parameters for unit in each.units if unit.name == TEXT) for each in (graph, whole)]
    layer = sum(weight.numel() for weight in pipe.text_encoder.text_model.encoder.layers[0].parameters())
    assert parameters[1] - parameters[0] == skip * layer


@pytest.mark.slow
@pytest.mark.shared_pieces
def test_latents_are_those_of_diffusers(source: Path, tmp_path: Path) -> None:
    """The VAE is the one that is built fastest: latents know nothing of it."""
    tiny_vae().save_pretrained(tmp_path / "vae")
    options = BuildOptions(source=str(source), vae=str(tmp_path / "vae"), granularity=None, plans=("full",), clip_skip=1)
    bundle, _ = build(dataclasses.replace(options, out=tmp_path / "bundle"))
    assert bundle.manifest.clip_skip == 1
    assert "--clip-skip 1 " in bundle.rebuild_command()
    pipe, reference = Pipeline(bundle, make_engine("onnxruntime")), Reference.load(bundle)
    theirs: Any = pipeline_of(source, vae=tiny_vae())
    settings: dict[str, Any] = {"steps": 4, "guidance_scale": 1.0, "clip_skip": 1}
    made = pipe.generate(PROMPT, seed=SEED, scheduler="ddim", **settings)
    assert relative_error(made.latents, latents(theirs, **settings)) < 1e-4
    # With guidance diffusers leaves no layers out for the negative prompt; here they are, as in Automatic1111's web UI.
    names = {"prompt_embeds": PROMPT, "negative_prompt_embeds": NEGATIVE}
    embeds = {name: theirs.encode_prompt(text, "cpu", 1, False, clip_skip=1)[0] for name, text in names.items()}
    settings["guidance_scale"] = 3.0
    expected = theirs(
        num_inference_steps=4, guidance_scale=3.0, generator=torch.Generator().manual_seed(SEED), output_type="latent", **embeds
    ).images
    made = pipe.generate(PROMPT, NEGATIVE, seed=SEED, scheduler="ddim", **settings)
    assert relative_error(made.latents, expected) < 1e-4
    assert made.made_from()["clip_skip"] == 1
    tokens = torch.randint(0, 636, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # what `verify` compares with: the whole text encoder, whose hidden states are read
        assert relative_error(pipe.network.compute(TEXT, {"tokens": tokens}), reference.text(tokens)) < 1e-5
    del settings["clip_skip"]
    assert torch.equal(pipe.generate(PROMPT, NEGATIVE, seed=SEED, scheduler="ddim", **settings).latents, made.latents)
    assert relative_error(latents(theirs, **settings), expected) > 1e-2


@pytest.mark.slow
def test_another_clip_skip_makes_the_text_encoder_anew_and_nothing_else(source: Path, tmp_path: Path, fake_trace: Any) -> None:
    traced = fake_trace()
    options = BuildOptions(source=str(source), granularity="block", out=tmp_path / "plain")
    build(options)
    traced.clear()
    build(dataclasses.replace(options, out=tmp_path / "skip", clip_skip=1))
    assert traced == [TEXT]


def test_a_bundle_for_another_clip_skip_is_asked_for_in_one_line(mini_pipeline: Pipeline, mini_bundle: Bundle) -> None:
    with pytest.raises(RequestError) as refusal:
        mini_pipeline.generate(PROMPT, steps=1, clip_skip=1)
    message = str(refusal.value)
    assert message.startswith(
        f"clip_skip = 1, and the text encoder of {mini_bundle.folder} was built for 0; leave it out, or build"
    )
    assert "python -m exporter build" in message
    assert " --clip-skip 1 " in message
    assert message.endswith(f"--out {mini_bundle.folder}-clip-skip-1")
    assert mini_pipeline.generate(PROMPT, steps=1, clip_skip=0).images
    embeds = mini_pipeline.encode([PROMPT])
    given: Any = {"prompt_embeds": embeds, "negative_prompt_embeds": embeds, "clip_skip": 1}  # as diffusers: nothing is encoded
    assert mini_pipeline.generate(steps=1, **given).images


@pytest.mark.parametrize(
    ("skip", "message"),
    [("4", "clip skip 4: the text encoder has 3 layers; leave out as many at most"), ("-1", "clip skip -1: name the number of")],
)
def test_what_cannot_be_left_out(exporter: Command, source: Path, tmp_path: Path, skip: str, message: str) -> None:
    assert_refused(exporter("build", "--source", source, "--out", tmp_path / "bundle", f"--clip-skip={skip}"), message)
