"""The short way in: a bundle found and loaded, and pictures generated with it."""

import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from engines import Bundle, make_engine
from engines.bundle.folder import MANIFEST_NAME, sha256
from engines.support.files import exists, expanded, real_path
from runtime.advice import missing_bundle
from runtime.arguments.aliases import with_our_names
from runtime.errors import RequestError
from runtime.generation import Generation
from runtime.images.pictures import Picture
from runtime.pipeline import Callback, Pipeline
from runtime.plans.plan import Plan
from runtime.plans.presets import find_plan
from runtime.request import FIELDS, Request

__all__ = ["default_bundle", "find_bundle", "generate", "load"]

BUNDLES = Path("bundles")


def default_bundle() -> Path:
    """The bundle in ``./bundles`` that was built last.

    Raises:
        BundleError: there is none.
    """
    return find_bundle(None)


def _built() -> list[Path]:
    """The bundles in ``./bundles``, the one that was built last at the end."""
    found = sorted(BUNDLES.glob(f"[!.]*/{MANIFEST_NAME}"), key=lambda path: path.stat().st_mtime)
    return [path.parent for path in found]


@lru_cache(maxsize=2)
def _loaded(folder: Path, manifest_sha256: str, engine: str) -> Pipeline:
    return Pipeline(Bundle.open(folder), make_engine(engine))


def load(bundle: str | Path | None = None, engine: str = "onnxruntime", plan: str | Path | Plan = "full") -> Pipeline:
    """A bundle loaded in an engine; the last two are kept, so that the next call with them starts at once.

    Args:
        bundle: a bundle's folder, in which ``~`` is one's home; None for the one in ``./bundles`` that was built last.
        engine: onnxruntime, openvino, openvino-bf16, tensorrt, tensorrt-rtx or torch.
        plan: what it is to run; only what is said where there is no bundle depends on it.

    Raises:
        BundleError: there is no bundle, or it is damaged or of another version.
        EngineError: the engine is unknown, not installed or not in the bundle.
        PlanError: a plan that is unknown or malformed.
        RequestError: a name is no text.
    """
    for name, value, kinds in (("bundle", bundle, str | Path | None), ("engine", engine, str)):
        if not isinstance(value, kinds) or "\0" in str(value):
            raise RequestError(f"{name} is a {type(value).__name__} ({value!r:.60}); give a name as text")
    found = find_bundle(bundle, engine, plan)
    if bundle is None and (count := len(_built())) > 1:
        warnings.warn(f"bundle {found} is taken, which was built last, of {count} in ./{BUNDLES}; name one", stacklevel=3)
    folder = real_path(found)
    Bundle.open(folder)  # says what is wrong with what is there now
    wanted = folder, sha256(folder / MANIFEST_NAME), engine
    if _loaded(*wanted).swapper.is_outdated():  # a bundle that its plans switch to was rebuilt
        _loaded.cache_clear()
    return _loaded(*wanted)


def find_bundle(bundle: str | Path | None, engine: str = "onnxruntime", plan: str | Path | Plan = "full") -> Path:
    """The folder of a bundle that is there, as ``load`` finds it; raises BundleError with the command that builds it."""
    found = next(reversed(_built()), None) if bundle is None else expanded(str(bundle))
    if found is None or not exists(found):
        raise missing_bundle(found, find_plan(plan), engine)
    return found


def generate(
    prompt: str | Sequence[str] | None = None,
    negative_prompt: str | Sequence[str] | None = "",
    steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int | Sequence[int] | None = 0,
    height: int | None = None,
    width: int | None = None,
    num_images: int | None = None,
    scheduler: str = "dpm++",
    plan: str | Path | Plan = "full",
    bundle: str | Path | None = None,
    engine: str = "onnxruntime",
    callback: Callback | None = None,
    image: Picture | None = None,
    strength: float = 0.6,
    mask: Picture | None = None,
    allow_nonfinite: bool = False,
    **diffusers: Any,
) -> Generation:
    """Generate pictures from a prompt, or from a prompt and a picture.

    diffusers' names are taken beside these: ``num_inference_steps``, ``num_images_per_prompt``, ``mask_image``, ``generator``,
    ``latents``, ``prompt_embeds``, ``negative_prompt_embeds``, ``guidance_rescale``, ``callback_on_step_end`` and ``output_type``
    (pil, np, pt or latent), each with the meaning that it has there. ``clip_skip`` is decided when a bundle is built, and what is
    given for it must be that. ``long_prompts`` says what becomes of the words of a prompt that the text encoder does not read at
    once: ``chunks`` (each is encoded by itself, and all prompts of a call get as many as the longest needs) or ``cut``, as
    diffusers' pipelines do. Bundles of older versions cut; engines with a profile cut beyond the chunks they were built for.

    Args:
        prompt: what the picture shows; a list of prompts makes ``num_images`` of each in one batch. None with ``prompt_embeds``.
        negative_prompt: what it should not show; read only with guidance. A list has one for each prompt.
        steps: denoising steps; 20 where it is not given.
        guidance_scale: of classifier-free guidance (arXiv 2207.12598); None for the bundle's own (7.5, and 3 for the embedded
            model); 1 or less turns it off and halves the work.
        seed: of the first picture's noise; picture i has seed + i, or a list has each picture's. None draws one, which the
            result has in ``seeds``.
        height: in pixels; None for the image's own, or the bundle's first size. An image of another size is resized.
        width: in pixels, with the same defaults as ``height``.
        num_images: pictures per prompt; 1 where it is not given.
        scheduler: ddim, pndm, dpm++, euler, heun, euler a, unipc, lcm or another, or the name of a class of diffusers.
        plan: a preset such as ``deepcache:3``, a JSON file, or a ``Plan``.
        bundle: a bundle's folder; None for the one in ``./bundles`` that was built last.
        engine: what runs the segments.
        callback: called after every model evaluation with its record and the latents; what it raises ends the call.
        image: a picture to start from instead of noise (image-to-image): a PIL image or a file's path.
        strength: in (0, 1], the share of the steps that run, the last ones; read only with an image. Plans count those that run.
        mask: what to repaint of the image (inpainting), of its size: white is repainted, black is kept to the pixel.
        allow_nonfinite: whether numbers that are not finite (an overflow in half precision) are only warned of.
        diffusers: see above. Both names of one thing may be given only with the same value.

    Raises:
        RequestError: an argument of a wrong type, an empty prompt, an image or mask that cannot be read or does not fit, a size,
            strength, number of steps or scheduler that cannot be had, or a name that there is not.
        PlanError: a plan that is unknown, malformed, or that the bundle's segments cannot run.
        BundleError: no bundle, or a damaged one.
        EngineError: an unknown engine, or one that is not installed or not in the bundle.
    """
    options = {
        "guidance_scale": guidance_scale,
        "seed": seed,
        "height": height,
        "width": width,
        "scheduler": scheduler,
        "plan": plan,
        "image": image,
        "strength": strength,
        "allow_nonfinite": allow_nonfinite,
    }
    # What has another name in diffusers is given only if it is.
    named = {"steps": steps, "num_images": num_images, "mask": mask}
    options |= {name: value for name, value in named.items() if value is not None}
    step_end = {name: diffusers.pop(name) for name in list(diffusers) if name.startswith("callback_on_step_end")}
    request = Request(prompt, negative_prompt, **with_our_names(options | diffusers, FIELDS))  # before anything is loaded
    return load(bundle, engine, request.found_plan).generate(request, callback=callback, **step_end)
