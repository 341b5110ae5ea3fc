"""Commands for the user that build the bundle which a plan needs. Only here, where bundle and engine are both known."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from shlex import quote

from engines import Bundle, BundleError
from runtime.errors import NonFiniteError, PartitionError, SiblingError
from runtime.plans.plan import Plan

__all__ = ["add_precision_advice", "build_advice", "for_plan_too", "missing_bundle"]

_BUILD = "python -m exporter build"
_EMBEDDED = "mini-"
"""What the names of the embedded model's bundles begin with, before the variant."""
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
    embedded = folder is None or folder.name.startswith(_EMBEDDED)
    variant = folder.name.removeprefix(_EMBEDDED) if folder and embedded else "original"
    options = [] if engine == "onnxruntime" else [f"--engine {engine}"]
    if plan.rules and plan.name.partition(":")[0] not in _BY_DEFAULT:
        options.append(f"--granularity block --plan {plan.option}")
    if (folder is not None and folder != Path("bundles") / folder.name) or not embedded:
        options.append(f"--out {quote(str(folder))}")
    source = "mini" if embedded else "CHECKPOINT"
    return BundleError(f"{where}; build it with: {' '.join([f'{_BUILD} --source {source} --variant {variant}', *options])}")


def add_precision_advice(error: NonFiniteError, bundle: Bundle, engine: str) -> None:
    """Add to an error what keeps numbers finite: fp32, or other weights where they are in fp32 already."""
    if bundle.manifest.precision == "fp32":
        error.add_note("look at the weights and the guidance scale: fp32 has room for all that a sound model computes")
        return
    wider = replace(bundle, manifest=bundle.manifest.model_copy(update={"precision": "fp32"}))
    error.add_note(
        f"build the bundle in fp32: {wider.rebuild_command(engine)}; or take the picture as it is with allow_nonfinite"
    )


def _sibling_command(bundle: Bundle, variant: str, plan: Plan, engine: str) -> str:
    """The command that builds another UNet as a bundle was built, in a folder beside it that does not exist yet."""
    manifest = bundle.manifest.model_copy(update={"variant": variant, "unet": None, "recipe": None, "plans": ()})
    option = f" --plan {plan.option}" if plan.rules else ""
    if option and manifest.granularity == "block":
        option = f" --granularity block{option}"
    names = chain([variant], (f"{variant}-{number}" for number in count(2)))
    out = next(path for name in names if not (path := bundle.folder.parent / name).exists())
    return f"{manifest.whole_build_command(engine)}{option} --out {quote(str(out))}"
