"""Image-to-image and inpainting give the latents of diffusers' pipelines; plans count the steps that run; bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from engines import Bundle, make_engine
from runtime import Pipeline, Plan, PlanError, RequestError, UNetRange
from runtime.__main__ import main
from runtime.images.pictures import read_original
from tests.support.diffusers_pipelines import NEGATIVE, PROMPT, SEED, inputs, latents, mask, picture, pipeline
from tests.support.reference import MINI, Inheritance, mini_unet
from tests.support.unets import relative_error

TOLERANCE = 1e-4
"""Of the largest final latent. Both sides are float32 and differ by some 1e-6; one step more or less gives more than 1e-2."""


@pytest.fixture(scope="module")
def null_pipeline(mini_bundle: Bundle) -> Pipeline:
    """Shapes, no arithmetic: enough for what is refused."""
    return Pipeline(mini_bundle, make_engine("null"))


def generate(mini_pipeline: Pipeline, **settings: Any) -> Any:
    return mini_pipeline.generate(PROMPT, NEGATIVE, seed=SEED, **{"steps": 6, **settings})


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 128)])
def test_the_encoder_gives_mean_and_deviation_of_the_latents(mini_pipeline: Pipeline, height: int, width: int) -> None:
    vae = AutoencoderKL.from_pretrained(MINI, subfolder="vae").float().eval()
    pixels = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    made = mini_pipeline.network.compute("vae_encoder", {"image": pixels})
    with torch.no_grad():
        expected = vae.encode(pixels).latent_dist
    # One network, sums in another order.
    for got, wanted in zip(made.chunk(2, dim=1), (expected.mean, expected.std), strict=True):
        assert relative_error(got, wanted * vae.config.scaling_factor) < 1e-5


@pytest.mark.parametrize("kind", ["image", "inpaint"])
@pytest.mark.parametrize(
    ("scheduler", "strength"), [("ddim", 0.6), ("pndm", 0.5), ("dpm++", 1.0), ("euler", 0.34), ("heun", 0.6), ("heun", 1.0)]
)
def test_latents_are_those_of_diffusers(mini_pipeline: Pipeline, kind: str, scheduler: str, strength: float) -> None:
    settings = inputs(kind, strength)
    made = generate(mini_pipeline, scheduler=scheduler, **settings)
    assert relative_error(made.latents, latents(pipeline(kind, scheduler), **settings)) < TOLERANCE


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_several_pictures_of_one(mini_pipeline: Pipeline, guidance: float) -> None:
    settings = {**inputs("image"), "guidance_scale": guidance}
    made = generate(mini_pipeline, num_images=2, scheduler="ddim", **settings)
    assert relative_error(made.latents, latents(pipeline("image", "ddim"), images=2, **settings)) < TOLERANCE
    alone = mini_pipeline.generate(PROMPT, NEGATIVE, seed=SEED + 1, steps=6, scheduler="ddim", **settings)
    assert relative_error(made.latents[1:], alone.latents) < TOLERANCE


def test_a_picture_that_is_not_square(mini_pipeline: Pipeline) -> None:
    settings: dict[str, Any] = {"image": picture(64, 128), "mask": mask(64, 128), "strength": 0.5}
    made = generate(mini_pipeline, steps=4, scheduler="ddim", **settings)
    expected = latents(pipeline("inpaint", "ddim"), steps=4, height=64, width=128, **settings)
    assert made.latents.shape == (1, 4, 8, 16)
    assert made.image.size == (128, 64)
    assert relative_error(made.latents, expected) < TOLERANCE


@pytest.mark.parametrize("kind", ["image", "inpaint"])
@pytest.mark.parametrize("scheduler", ["ddim", "heun"])
def test_plans_count_the_steps_that_run(mini_pipeline: Pipeline, kind: str, scheduler: str) -> None:
    settings = inputs(kind, 0.67)
    made = generate(mini_pipeline, scheduler=scheduler, plan="block:3", **settings)
    reference = pipeline(kind, scheduler)
    inheritance, evaluations = Inheritance(reference.unet, ["up_blocks.2"]), iter(range(100))
    start = reference.unet.register_forward_pre_hook(lambda *given: inheritance.start_step(next(evaluations) % 3 == 0))
    try:
        with inheritance.hooked():
            expected = latents(reference, **settings)
    finally:
        start.remove()
    count = 4 if scheduler == "ddim" else 7
    assert [record.index for record in made.steps] == list(range(count))
    assert [record.kind for record in made.steps] == [("key", "inherit", "inherit")[i % 3] for i in range(count)]
    assert relative_error(made.latents, expected) < TOLERANCE


@pytest.mark.parametrize("scheduler", ["ddim", "heun"])
def test_a_switch_by_steps_counts_the_steps_that_run(
    mini_pipeline: Pipeline, assembled_bundle: Bundle, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = inputs("image", 0.67)
    ranges = (UNetRange(unet="assembled", start=0, stop=3), UNetRange(unet="original", start=3))
    plan = Plan(name="steps", unets=ranges, switch_by="steps")
    made = generate(mini_pipeline, scheduler=scheduler, plan=plan, **settings)
    reference = pipeline("image", scheduler)
    turns = iter([mini_unet("assembled").forward] * 3 + [reference.unet.forward] * 9)

    def forward(*given: Any, **named: Any) -> Any:
        return next(turns)(*given, **named)

    monkeypatch.setattr(reference.unet, "forward", forward)
    assert relative_error(made.latents, latents(reference, **settings)) < TOLERANCE
    count = {"ddim": 4, "heun": 7}[scheduler]
    assert [record.unet for record in made.steps] == ["assembled"] * 3 + ["original"] * (count - 3)
    far = Plan(name="far", unets=(ranges[0], UNetRange(unet="original", start=3, stop=count + 1)), switch_by="steps")
    with pytest.raises(PlanError, match=rf"unets.1 covers steps 3 to {count + 1}, but only {count} steps run"):
        generate(mini_pipeline, scheduler=scheduler, plan=far, **settings)


def test_what_the_mask_leaves_out_is_kept(mini_pipeline: Pipeline) -> None:
    settings = {**inputs("inpaint"), "steps": 4, "seed": 3, "scheduler": "ddim"}
    one, other = (mini_pipeline.generate(prompt, **settings).latents for prompt in ("a red star", "a green circle"))
    repainted = torch.zeros(8, 8, dtype=torch.bool)
    # A latent is repainted if the upper left one of its 8 x 8 pixels is: columns 10 to 49, rows 8 to 42 are white.
    repainted[1:6, 2:7] = True
    assert torch.equal(one[..., ~repainted], other[..., ~repainted])
    assert bool((one != other)[..., repainted].any(1).all())


def test_a_picture_of_another_size_is_resized_when_a_size_is_given(mini_pipeline: Pipeline) -> None:
    large, cover = picture(96, 160), mask(96, 160)
    made = generate(mini_pipeline, steps=2, image=large, mask=cover, height=64, width=64)
    size, lanczos = (64, 64), Image.Resampling.LANCZOS
    same = generate(mini_pipeline, steps=2, image=large.resize(size, lanczos), mask=cover.resize(size, lanczos))
    assert torch.equal(made.latents, same.latents)


def test_pictures_come_from_files_and_in_any_mode(tmp_path: Path) -> None:
    upright = picture(64, 128)
    turned, note = upright.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    note[0x0112] = 6  # EXIF: turn by 90 degrees clockwise to show
    turned.save(tmp_path / "turned.png", exif=note)
    for given in (tmp_path / "turned.png", str(tmp_path / "turned.png"), upright.convert("RGBA"), upright):
        found = read_original(given, None)
        assert found is not None
        assert (found.size, found.image.mode) == ((64, 128), "RGB")
        assert found.image.tobytes() == upright.tobytes()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "strength of nothing": ({"image": picture(), "strength": 0}, "strength = 0; choose a number above 0"),
    "strength above 1": ({"image": picture(), "strength": 1.1}, "strength = 1.1; choose a number above 0"),
    "strength that is no number": ({"image": picture(), "strength": float("nan")}, "strength = nan"),
    "no step left": ({"image": picture(), "strength": 0.1, "steps": 9}, "strength = 0.1 of 9 steps leaves none to run"),
    "mask alone": ({"mask": mask()}, "mask is given, but no image"),
    "mask of another size": ({"image": picture(), "mask": mask(64, 128)}, "mask and image are 64x128 and 64x64"),
    "size that does not fit": (
        {"image": picture(96, 160)},
        r"image is 96x160: .* multiples of 64 pixels .* height=128, width=128 \(--size 128x128\)",
    ),
    "size asked for that does not fit": ({"image": picture(), "height": 100}, "size 100x64: .* multiples of 64"),
    "no such file": ({"image": "nowhere.png"}, "image nowhere.png cannot be read: No such file"),
    "a file that is no picture": ({"image": __file__}, r"image .*\.py cannot be read: cannot identify"),
    "a mask that is no picture": ({"image": picture(), "mask": __file__}, r"mask .*\.py cannot be read"),
    "a list": ({"image": [picture()]}, "image is a list; give a PIL image or the path of a file"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_input_is_refused_before_anything_runs(null_pipeline: Pipeline, name: str) -> None:
    settings, message = BAD[name]
    calls: Any = null_pipeline.engine
    calls.calls.clear()
    with pytest.raises(RequestError, match=message):
        null_pipeline.generate(PROMPT, **settings)
    assert not calls.calls


def test_a_bundle_without_an_encoder_names_the_command_that_makes_one(bundle_copy: Path) -> None:
    path = bundle_copy / "manifest.json"
    manifest = json.loads(path.read_text())
    for part in ("segments", "units"):
        manifest[part] = [one for one in manifest[part] if one["name"] != "vae_encoder"]
    path.write_text(json.dumps(manifest))
    old = Pipeline(Bundle.open(bundle_copy), make_engine("null"))
    with pytest.raises(RequestError, match="no segment vae_encoder.*python -m exporter build --variant original"):
        old.generate(PROMPT, image=picture())
    assert old.generate(PROMPT, steps=1).images


def test_the_command(mini_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture().save(tmp_path / "in.png")
    mask().save(tmp_path / "mask.png")
    common = [PROMPT, "--bundle", str(mini_bundle.folder), "--image", str(tmp_path / "in.png")]
    common += ["--steps", "4", "--strength", "0.5"]
    main([*common, "--mask", str(tmp_path / "mask.png"), "-o", str(tmp_path / "out.png")])
    assert Image.open(tmp_path / "out.png").size == (64, 64)
    assert "2 steps" in capsys.readouterr().out
    main([*common, "--plan", "block:2", "--explain"])
    explained = capsys.readouterr().out
    assert explained.count(" key  ") == 1
    assert explained.count(" inherit ") == 1
