"""A bundle attached to diffusers pipelines, against the same pipelines with their own torch UNet and hooks on it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

import unet_heirloom
from engines import Bundle
from engines.bundle.shapes import resolve
from runtime import Attachment, PlanError, RequestError, UNet, find_plan
from runtime.plans.words import Found
from tests.support.diffusers_pipelines import PIPELINES, inputs, latents, picture, pipeline
from tests.support.reference import SCHEDULER_CLASSES, Inheritance, mini_unet, reference_scheduler
from tests.support.unets import relative_error

TOLERANCE = 1e-4
"""Of the largest final latent: both sides are float32, of which one evaluation differs by 1e-6, and a few steps with guidance 3
multiply that by less than 20. A step that inherits too much or too little differs by more than 1e-2."""
INHERITED = "up_blocks.3.attentions.1"
"""What `deepcache:N` inherits of the embedded model, by diffusers' name."""


@contextmanager
def inheriting(unet: Any, every: int) -> Iterator[None]:
    """diffusers' own UNet, whose every evaluation but one in so many puts the cached feature back."""
    inheritance, done = Inheritance(unet, [INHERITED]), [0]

    def start(*_: Any) -> None:
        inheritance.start_step(done[0] % every == 0)
        done[0] += 1

    handle = unet.register_forward_pre_hook(start)
    try:
        with inheritance.hooked():
            yield
    finally:
        handle.remove()


def kinds(attached: Attachment) -> list[str]:
    return [record.kind for record in attached.unet.steps]


@pytest.fixture
def attached(mini_bundle: Bundle) -> Callable[..., Attachment]:
    def make(kind: str = "text", scheduler: str = "ddim", plan: str = "deepcache:3") -> Attachment:
        return unet_heirloom.attach(pipeline(kind, scheduler), mini_bundle.folder, plan)

    return make


@pytest.mark.parametrize("scheduler", list(SCHEDULER_CLASSES))
@pytest.mark.parametrize("kind", list(PIPELINES))
def test_a_pipeline_with_a_bundle_is_the_pipeline_with_hooks(
    attached: Callable[..., Attachment], kind: str, scheduler: str
) -> None:
    heirloom, settings = attached(kind, scheduler), {"steps": 5, **inputs(kind)}
    made = latents(heirloom.pipe, **settings)
    reference = pipeline(kind, scheduler)
    with inheriting(reference.unet, 3):
        assert relative_error(made, latents(reference, **settings)) < TOLERANCE
    assert kinds(heirloom)[:4] == ["key", "inherit", "inherit", "key"][: len(kinds(heirloom))]
    heirloom.disable()
    assert heirloom.pipe.unet is reference.unet


def test_it_is_put_in_taken_out_and_told_another_plan(attached: Callable[..., Attachment]) -> None:
    heirloom = attached()
    pipe, parts = heirloom.pipe, dict(heirloom.pipe.components)
    assert "nothing has run yet" in str(heirloom.report())
    first = latents(pipe)
    heirloom.plan = "full"
    assert str(heirloom.report()).startswith("plan deepcache:3: 6 evaluations of the UNet in ")
    whole = latents(pipe)
    heirloom.disable()
    assert not heirloom.enabled
    assert pipe.unet is heirloom.original
    assert relative_error(whole, latents(pipe)) < TOLERANCE
    heirloom.enable()
    pipe.unet.plan = "deepcache:3"
    assert (heirloom.enabled, heirloom.plan.name) == (True, "deepcache:3")
    assert torch.equal(latents(pipe), first)
    assert {name for name, part in pipe.components.items() if part is not parts[name]} == set()
    with pytest.raises(PlanError, match="deepcash"):
        heirloom.plan = "deepcash:3"
    assert heirloom.plan.name == "deepcache:3"
    heirloom.disable()


def test_the_report_says_what_ran_and_how_long(attached: Callable[..., Attachment]) -> None:
    heirloom = attached()
    latents(heirloom.pipe)
    report = heirloom.report()
    key, inherit = report.kinds
    assert (key.name, key.steps, inherit.name, inherit.steps) == ("key", (0, 3), "inherit", (1, 2, 4, 5))
    assert len(key.ran) == report.segments["original"] > len(inherit.ran)
    assert report.seconds == pytest.approx(sum(record.seconds for record in report.steps))
    assert f"2 key (all {len(key.ran)}; {key.milliseconds:.1f} ms each), 4 inherit ({len(inherit.ran)} of" in str(report)
    assert "enabled" in repr(heirloom)
    heirloom.disable()
    assert "disabled" in repr(heirloom)


COPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "repeated": lambda t: t.repeat(2),
    "converted": lambda t: t.to(torch.float32),
    "halved": lambda t: t.to(torch.float16),
    "cloned": lambda t: t.clone(),
    "in a new tensor": lambda t: torch.tensor([float(t)]),
}


class Copying:
    """A UNet that is handed copies of what the pipeline hands over, as pipelines of others do."""

    def __init__(self, unet: UNet, copy: Callable[[Tensor], Tensor]) -> None:
        self.unet, self.copy = unet, copy
        self.config, self.dtype = unet.config, unet.dtype

    def __call__(self, sample: Tensor, timestep: Tensor, **options: Any) -> Any:
        return self.unet(sample, self.copy(timestep), **options)


@pytest.mark.parametrize("copy", list(COPIES))
@pytest.mark.parametrize(("kind", "scheduler"), [("text", "heun"), ("image", "ddim"), ("image", "heun")])
def test_copied_timesteps_are_counted_by_value(
    attached: Callable[..., Attachment], kind: str, scheduler: str, copy: str, recwarn: pytest.WarningsRecorder
) -> None:
    heirloom, settings = attached(kind, scheduler), {"steps": 5, **inputs(kind)}
    expected = latents(heirloom.pipe, **settings)
    ran = [record.ran for record in heirloom.unet.steps]
    heirloom.pipe.unet = Copying(heirloom.unet, COPIES[copy])
    for _ in range(2):  # the second call follows on the first
        made = latents(heirloom.pipe, **settings)
        # Half precision rounds the timesteps themselves, where they are no whole numbers.
        assert copy == "halved" or relative_error(made, expected) < TOLERANCE
        assert [record.ran for record in heirloom.unet.steps] == ran
    heirloom.disable()
    assert [str(each.message) for each in recwarn if "is a copy" in str(each.message)] == []


def test_copied_timesteps_are_warned_of_once_where_no_scheduler_is_known(mini_bundle: Bundle) -> None:
    unet = UNet(mini_bundle.folder, "deepcache:3")
    made = pipeline("text", "ddim")
    own, made.unet = made.unet, Copying(unet, COPIES["repeated"])
    with pytest.warns(UserWarning, match=r"timestep \d+ is a copy, .* every step computes everything; hand over") as caught:
        result = latents(made, steps=4)
    assert len([each for each in caught if "is a copy" in str(each.message)]) == 1
    made.unet = own
    assert relative_error(result, latents(made, steps=4)) < TOLERANCE


def test_a_loop_of_ones_own_with_copies(mini_bundle: Bundle) -> None:
    """Broken off, begun again, and over the same timesteps once more."""
    scheduler = reference_scheduler("pndm", 4)
    unet = UNet(mini_bundle.folder, "deepcache:3", scheduler=scheduler)
    text = mini_bundle.manifest.features["text_encoder"].shape
    sample, states = torch.zeros(1, 4, 8, 8), torch.zeros(resolve(text, {"batch": 1}))
    for stop in (5, 2, 1, 5):
        for timestep in scheduler.timesteps[:stop]:
            unet(sample, timestep.clone(), states)
        assert [record.kind for record in unet.steps] == ["key", "inherit", "inherit", "key", "inherit"][:stop]


def test_what_code_asks_of_a_unet(mini_bundle: Bundle) -> None:
    unet = UNet(mini_bundle.folder)
    assert unet.to("cuda", torch.float16) is unet.eval() is unet.requires_grad_(False) is unet
    (parameter,) = unet.parameters()
    assert (parameter.device, parameter.dtype, parameter.numel(), unet.training) == (unet.device, unet.dtype, 0, False)


def test_pipelines_that_it_cannot_be_attached_to(mini_bundle: Bundle, attached: Callable[..., Attachment]) -> None:
    with pytest.raises(RequestError, match="pipe is a str, which has no UNet"):
        unet_heirloom.attach("mini", mini_bundle.folder)
    heirloom = attached()
    with pytest.raises(RequestError, match=r"has a bundle's UNet already; assign its \.plan"):
        unet_heirloom.attach(heirloom.pipe, mini_bundle.folder)
    heirloom.disable()
    other = pipeline("text", "ddim")
    wide = mini_unet()
    wide.register_to_config(cross_attention_dim=768)
    own, other.unet = other.unet, wide
    with pytest.raises(RequestError, match="text width 768, that of .* has 128; build a bundle from the pipeline's own"):
        unet_heirloom.attach(other, mini_bundle.folder)
    assert other.unet is wide
    other.unet = own


def test_a_plan_that_was_found_for_other_calls_is_warned_of(attached: Callable[..., Attachment]) -> None:
    """The pipeline tells scheduler, steps and guidance."""
    heirloom = attached("text", "ddim")
    found = Found(scheduler="dpm++", steps=4, guidance_scale=7.0, prompts=4, cost=0.5, psnr=40, source="emoji")
    heirloom.plan = find_plan("deepcache:2").model_copy(update={"name": "attached", "found": found})
    was, now = "for 4 steps of dpm++, with guidance 7, on emoji", "3 of ddim, with 3, mini"
    with pytest.warns(UserWarning, match=re.escape(f"plan attached was found {was}, and this is {now}: its")):
        latents(heirloom.pipe, steps=3)


def test_what_a_bundle_needs_of_the_pipeline_is_said(bundle_copy: Path, recwarn: pytest.WarningsRecorder) -> None:
    """The pipeline has a text encoder and a scheduler of its own, which know nothing of how the bundle was built."""
    unet_heirloom.attach(pipeline("text", "ddim"), bundle_copy).disable()
    assert [str(each.message) for each in recwarn] == []
    path = bundle_copy / "manifest.json"
    loras = [{"file": "ink.safetensors", "scale": 0.8, "sha256": "a" * 64}]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"loras": loras, "clip_skip": 1}))
    made = pipeline("text", reference_scheduler("ddim", 1, prediction_type="sample"))
    unet_heirloom.attach(made, bundle_copy).disable()
    said = "\n".join(str(each.message) for each in recwarn)
    for words in (
        "LoRA ink.safetensors:0.8 in its UNet; the pipeline's text encoder needs it too",
        "built with --clip-skip 1: give clip_skip=1",
        "scheduler is for a UNet that predicts sample, and that of",
    ):
        assert words in said
    assert len(recwarn) == 3


def test_what_changes_a_unets_weights_is_refused_in_words(attached: Callable[..., Attachment]) -> None:
    """Those are attributes of diffusers' UNets, which pipelines take for granted."""
    heirloom = attached()
    refused: list[Callable[[Any], object]] = [
        lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
        lambda pipe: pipe.fuse_qkv_projections(vae=False),
        lambda pipe: pipe("a red star", ip_adapter_image=picture(), num_inference_steps=1),
        lambda pipe: pipe.unet.load_lora_adapter({}),
    ]
    for change in refused:
        with pytest.raises(AttributeError, match=r"the UNet of a bundle has no \w+: its weights are inside of compiled engines"):
            change(heirloom.pipe)
    assert not hasattr(heirloom.unet, "add_adapter")
    assert getattr(heirloom.unet, "_hf_hook", None) is None
    for options in ({"cross_attention_kwargs": {"gligen": None}}, {"ip_adapter_image_embeds": [torch.zeros(2, 1, 4)]}):
        with pytest.raises(RequestError, match=r"does not take \w+; leave it out, or use diffusers' own UNet"):
            heirloom.pipe("a red star", num_inference_steps=1, **options)
    heirloom.disable()


def test_a_saved_pipeline_has_its_own_unet(attached: Callable[..., Attachment], tmp_path: Path) -> None:
    heirloom = attached()
    heirloom.pipe.save_pretrained(tmp_path / "attached")
    assert heirloom.enabled
    heirloom.disable()
    heirloom.pipe.save_pretrained(tmp_path / "plain")
    one, other = (json.loads((tmp_path / name / "model_index.json").read_text()) for name in ("attached", "plain"))
    assert one == other
    assert one["unet"] == ["diffusers", "UNet2DConditionModel"]
    saved = UNet2DConditionModel.from_pretrained(tmp_path / "attached", subfolder="unet")
    for name, weight in heirloom.original.state_dict().items():
        assert torch.equal(saved.state_dict()[name], weight), name


@pytest.mark.parametrize("kind", [StableDiffusionPipeline, StableDiffusionImg2ImgPipeline])
def test_a_pipeline_made_from_an_attached_one_is_not_saved_without_its_unet(
    attached: Callable[..., Attachment], kind: Any, tmp_path: Path
) -> None:
    heirloom = attached()
    made = kind.from_pipe(heirloom.pipe)
    assert made.unet is heirloom.unet
    with pytest.raises(RequestError, match="cannot be saved with a pipeline"):
        made.save_pretrained(tmp_path / "made")
    assert not (tmp_path / "made/model_index.json").exists()
    made.unet = heirloom.original
    made.save_pretrained(tmp_path / "made")
    assert json.loads((tmp_path / "made/model_index.json").read_text())["unet"] == ["diffusers", "UNet2DConditionModel"]
    heirloom.disable()


def batched(pipe: Any, **options: Any) -> Tensor:
    """Final latents of two prompts with two pictures each."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    given = {"num_images_per_prompt": 2, "num_inference_steps": 4, "generator": generators, "output_type": "latent"}
    made: Tensor = pipe(["a red star", "a green circle"], **given, **options).images
    return made


@pytest.mark.parametrize(
    "options", [{"guidance_scale": 3.0}, {"guidance_scale": 1.0}, {"guidance_scale": 3.0, "guidance_rescale": 0.7}], ids=str
)
def test_calls_as_users_make_them(attached: Callable[..., Attachment], options: dict[str, float]) -> None:
    """Batches, guidance and none, callbacks that change latents or interrupt, and what is said to all parts of a pipeline."""
    heirloom = attached(plan="full")
    pipe = heirloom.pipe

    def dim(_: Any, step: int, __: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": tensors["latents"] * (0.9 if step == 1 else 1.0)}

    def interrupt(pipe: Any, step: int, _: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pipe._interrupt = step == 1
        return tensors

    def both() -> list[Tensor]:
        return [batched(pipe, callback_on_step_end=each, **options) for each in (None, dim, interrupt)]

    pipe.enable_attention_slicing()
    assert pipe.to("cpu", torch.float32) is pipe
    made = both()
    assert pipe.device.type == "cpu"
    heirloom.disable()
    for ours, theirs in zip(made, both(), strict=True):
        assert relative_error(ours, theirs) < TOLERANCE
    pipe.disable_attention_slicing()


def test_pipelines_made_of_one_that_has_a_bundle(attached: Callable[..., Attachment]) -> None:
    heirloom = attached(plan="guide:3")
    image = StableDiffusionImg2ImgPipeline.from_pipe(heirloom.pipe)
    image.set_progress_bar_config(disable=True)
    assert image.unet is heirloom.unet
    settings = {"steps": 4, **inputs("image")}
    made = latents(image, **settings)
    heirloom.disable()
    again = attached("image", plan="guide:3")
    assert torch.equal(made, latents(again.pipe, **settings))
    again.disable()
