"""Commands for the user that build the bundle which a plan or a call needs. Only here, where bundle and engine are known."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from shlex import quote

from engines import Bundle, BundleError, NeedsBuildError
from engines.errors import EngineMemoryError
from runtime.embedded import DEFAULT, EXAMPLES
from runtime.errors import NonFiniteError, PartitionError, SiblingError
from runtime.plans.plan import Plan

__all__ = [
    "add_precision_advice",
    "build_advice",
    "for_plan_too",
    "missing_bundle",
    "rebuild_advice",
    "wider_vae",
    "with_clip_skip",
]

_BUILD = "python -m exporter build"
_BY_DEFAULT = {"full", "block", "adaptive", "deepcache", "quadratic", "front", "back", "random"}
"""Presets that a bundle can run as it is built by default."""


@contextmanager
def build_advice(plan: Plan, bundle: Bundle, engine: str, bundle_of: Callable[[str], Bundle]) -> Iterator[None]:
    """Add to a plan's error the command that builds the bundle which could run it.

    Args:
        plan: which is laid out inside.
        bundle: the one that was named.
        engine: name of the engine that is to run it.
        bundle_of: gives, by variant, the bundle that a UNet was loaded from.
    """
    try:
        yield
    except PartitionError as error:
        command = for_plan_too(bundle_of(error.unet), plan.option, engine)
        error.add_note(f"build a bundle that is partitioned there too: {command}")
        raise
    except SiblingError as error:
        error.add_note(f"build it with: {_sibling_command(bundle, error.variant, plan, engine)}")
        raise


def for_plan_too(bundle: Bundle, plan: str, engine: str = "onnxruntime") -> str:
    """The command that builds a bundle again in its place, partitioned as it is and for one more plan."""
    manifest, command = bundle.manifest, bundle.rebuild_command(engine)
    if manifest.granularity and " --granularity " not in command:
        command += f" --granularity {manifest.granularity}"  # else --plan alone would decide
    option = f" --plan {plan}"
    # The bundle may have been built for this plan already, by another partitioner.
    return command if f"{option} " in f"{command} " else command + option


def missing_bundle(folder: Path | None, plan: Plan, engine: str) -> BundleError:
    """An error that says how to build a bundle that is not there: the one that the folder's name means, for plan and engine."""
    where = f"no bundle at {folder}" if folder else "no bundle in ./bundles"
    # Bundles of an embedded model are called by its name and the variant.
    source, _, variant = (folder.name if folder else f"{DEFAULT}-original").partition("-")
    embedded = source in EXAMPLES and bool(variant)
    options = [] if engine == "onnxruntime" else [f"--engine {engine}"]
    if plan.rules and plan.name.partition(":")[0] not in _BY_DEFAULT:
        options.append(f"--granularity block --plan {plan.option}")
    if (folder is not None and folder != Path("bundles") / folder.name) or not embedded:
        options.append(f"--out {quote(str(folder))}")
    asked = f"--source {source} --variant {variant}" if embedded else "--source CHECKPOINT --variant original"
    return BundleError(f"{where}; build it with: {' '.join([f'{_BUILD} {asked}', *options])}")


@contextmanager
def rebuild_advice(bundle: Bundle, engine: str) -> Iterator[None]:
    """Add to an engine's error what mends it: a smaller request, or the command that builds the bundle again for that engine."""
    try:
        yield
    except EngineMemoryError as error:
        error.add_note("ask for fewer or smaller pictures")
        raise
    except NeedsBuildError as error:
        command = bundle.rebuild_command(engine)
        if error.up_to_date:
            kept = "a build would keep it, for it is of this version and for this GPU"
            error.add_note(f"{kept}: remove {bundle.folder}, then: {command}")
        else:
            error.add_note(f"build it with: {command}")
        raise


def add_precision_advice(error: NonFiniteError, bundle: Bundle, engine: str, precision: str, *, vae: bool) -> None:
    """Add to an error what keeps numbers finite: fp32, of the VAE alone where it is to blame, or else other weights.

    Args:
        error: to be told to the user.
        bundle: which ran.
        engine: name of the engine that ran it.
        precision: of the segment that made the numbers.
        vae: whether it is one of the VAE's.
    """
    if precision != "fp16":
        error.add_note(f"look at the weights and the guidance scale: {precision} has room for all that a sound model computes")
        return
    wider = wider_vae(bundle) if vae else replace(bundle, manifest=bundle.manifest.model_copy(update={"precision": "fp32"}))
    error.add_note(
        f"build {'the VAE' if vae else 'the bundle'} in fp32: {wider.rebuild_command(engine)}; "
        "or take the picture as it is with allow_nonfinite"
    )


def wider_vae(bundle: Bundle) -> Bundle:
    """The bundle with a VAE in single precision: what a VAE that overflows in half precision is to be built as."""
    return replace(bundle, manifest=bundle.manifest.model_copy(update={"vae_precision": "fp32"}))


def with_clip_skip(bundle: Bundle, clip_skip: int, engine: str) -> str:
    """The command that builds a bundle again, beside it, with a text encoder that leaves out another number of layers."""
    other = bundle.manifest.model_copy(update={"clip_skip": clip_skip})
    return f"{other.whole_build_command(engine)} --out {quote(f'{bundle.folder}-clip-skip-{clip_skip}')}"


def _sibling_command(bundle: Bundle, variant: str, plan: Plan, engine: str) -> str:
    """The command that builds another UNet as a bundle was built, in a folder beside it that does not exist yet."""
    manifest = bundle.manifest.model_copy(update={"variant": variant, "unet": None, "recipe": None, "plans": ()})
    option = f" --plan {plan.option}" if plan.rules else ""
    if option and manifest.granularity == "block":
        option = f" --granularity block{option}"
    names = chain([variant], (f"{variant}-{number}" for number in count(2)))
    out = next(path for name in names if not (path := bundle.folder.parent / name).exists())
    return f"{manifest.whole_build_command(engine)}{option} --out {quote(str(out))}"
