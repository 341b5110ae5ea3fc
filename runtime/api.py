"""The short way in: a bundle found and loaded, and pictures generated with it."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from engines import Bundle, BundleError, make_engine
from engines.bundle.folder import MANIFEST_NAME, sha256
from engines.support.files import real_path
from runtime.errors import RequestError
from runtime.images.pictures import Picture
from runtime.pipeline import Callback, Generation, Pipeline
from runtime.plans.plan import Plan
from runtime.request import Request

__all__ = ["default_bundle", "generate", "load"]

BUNDLES = Path("bundles")


def default_bundle() -> Path:
    """The bundle in ``./bundles`` that was built last.

    Raises:
        BundleError: there is none.
    """
    found = sorted(BUNDLES.glob("[!.]*/manifest.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        error = BundleError(f"no bundle in ./{BUNDLES}")
        error.add_note("make one with: python -m exporter build --variant assembled")
        raise error
    return found[-1].parent


@lru_cache(maxsize=2)
def _loaded(folder: Path, manifest_sha256: str, engine: str) -> Pipeline:
    return Pipeline(Bundle.open(folder), make_engine(engine))


def load(bundle: str | Path | None = None, engine: str = "onnxruntime") -> Pipeline:
    """A bundle loaded in an engine; the last two are kept, so that the next call with them starts at once.

    Args:
        bundle: a bundle's folder; None for the one in ``./bundles`` that was built last.
        engine: onnxruntime, tensorrt, tensorrt-rtx or torch.

    Raises:
        BundleError: there is no bundle, or it is damaged or of another version.
        EngineError: the engine is unknown, not installed or not in the bundle.
        RequestError: a name is no text.
    """
    for name, value, kinds in (("bundle", bundle, str | Path | None), ("engine", engine, str)):
        if not isinstance(value, kinds) or "\0" in str(value):
            raise RequestError(f"{name} is a {type(value).__name__} ({value!r:.60}); give a name as text")
    folder = real_path(Path(bundle if bundle is not None else default_bundle()))
    Bundle.open(folder)  # says what is wrong with what is there now
    return _loaded(folder, sha256(folder / MANIFEST_NAME), engine)


def generate(
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str] = "",
    steps: int = 20,
    guidance_scale: float | None = None,
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    num_images: int = 1,
    scheduler: str = "dpm++",
    plan: str | Path | Plan = "full",
    bundle: str | Path | None = None,
    engine: str = "onnxruntime",
    callback: Callback | None = None,
    image: Picture | None = None,
    strength: float = 0.6,
    mask: Picture | None = None,
    allow_nonfinite: bool = False,
) -> Generation:
    """Generate pictures from a prompt, or from a prompt and a picture.

    Args:
        prompt: what the picture shows; a list of prompts makes ``num_images`` of each in one batch.
        negative_prompt: what it should not show; read only with guidance. A list has one for each prompt.
        steps: denoising steps.
        guidance_scale: of classifier-free guidance (arXiv 2207.12598); None for the bundle's own (7.5, and 3 for the embedded
            model); 1 or less turns it off and halves the work.
        seed: of the first picture's noise; picture i has seed + i.
        height: in pixels; None for the image's own, or the bundle's first size. An image of another size is resized.
        width: likewise.
        num_images: pictures per prompt.
        scheduler: ddim, pndm, dpm++, euler or heun.
        plan: a preset such as ``deepcache:3``, a JSON file, or a ``Plan``.
        bundle: a bundle's folder; None for the one in ``./bundles`` that was built last.
        engine: what runs the segments.
        callback: called after every model evaluation; what it raises ends the call.
        image: a picture to start from instead of noise (image-to-image): a PIL image or a file's path.
        strength: in (0, 1], the share of the steps that run, the last ones; read only with an image. Plans count those that run.
        mask: what to repaint of the image (inpainting), of its size: white is repainted, black is kept.
        allow_nonfinite: whether numbers that are not finite (an overflow in half precision) are only warned of.

    Raises:
        RequestError: an argument of a wrong type, an empty prompt, an image or mask that cannot be read or does not fit, or a
            size, strength, number of steps or scheduler that cannot be had.
        PlanError: a plan that is unknown, malformed, or that the bundle's segments cannot run.
        BundleError: no bundle, or a damaged one.
        EngineError: an unknown engine, or one that is not installed or not in the bundle.
    """
    request = Request(
        prompt=prompt,
        negative_prompt=negative_prompt,
        steps=steps,
        guidance_scale=guidance_scale,
        seed=seed,
        height=height,
        width=width,
        num_images=num_images,
        scheduler=scheduler,
        plan=plan,
        image=image,
        strength=strength,
        mask=mask,
        allow_nonfinite=allow_nonfinite,
    )
    return load(bundle, engine).generate(request, callback=callback)
