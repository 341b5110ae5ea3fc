"""Sibling bundles: a plan may switch between UNets that were built from the same source, each in a bundle of its own."""

from collections.abc import Sequence

from engines import Bundle, BundleError, Manifest
from engines.bundle.manifest import Segment
from engines.bundle.shared import shared_difference
from runtime.errors import PlanError, SiblingError
from runtime.plans.checks import check_runs
from runtime.plans.plan import Plan
from runtime.plans.schedule import Schedule

__all__ = ["check_among", "find_sibling", "lay_out_part", "partitioned_by_unit"]


def find_sibling(
    bundle: Bundle, variant: str, plan: Plan, timesteps: Sequence[float], among: Sequence[Bundle] | None = None
) -> Bundle:
    """The bundle of that variant: the one given, or one that lies beside it and was made from the same source.

    Where there are several, it is the first by name that is partitioned for the plan, or else the first.

    Args:
        bundle: the one that was named.
        variant: the UNet to find.
        plan: which both are to run.
        timesteps: of each model evaluation.
        among: the bundles that may be taken; None for those that lie beside it.

    Raises:
        SiblingError: there is none that can take turns with the bundle on the same latents and text.
    """
    source = bundle.manifest.source
    if variant == bundle.manifest.variant:
        return bundle
    others = _beside(bundle) if among is None else among
    found = [other for other in others if (other.manifest.variant, other.manifest.source) == (variant, source)]
    alike = [other for other in found if _difference(bundle, other) is None]
    if alike:
        return next((other for other in alike if _can_run(plan, other.manifest, timesteps)), alike[0])
    unlike = "".join(f"; {other.folder} cannot take turns with it: {_difference(bundle, other)}" for other in found)
    raise SiblingError(
        f"the plan runs the UNet {variant!r} of source {source}, and no bundle beside {bundle.folder} has it{unlike}"
        if among is None
        else f"the plan runs the UNet {variant!r}, and no bundle that may be taken beside {bundle.folder} has it{unlike}",
        variant,
    )


def check_among(loaded: Bundle, among: Sequence[Bundle]) -> None:
    """Raise SiblingError where a UNet was loaded for other calls from a bundle that is none of those that may be taken."""
    if loaded.folder not in [bundle.folder for bundle in among]:
        name = loaded.manifest.variant
        raise SiblingError(f"the plan runs the UNet {name!r}, and {loaded.folder}, which has it, may not be taken here", name)


def _beside(bundle: Bundle) -> list[Bundle]:
    """The bundles in the same folder that can be read, by name."""
    found = []
    for path in sorted(bundle.folder.parent.glob("[!.]*/manifest.json")):
        try:
            found.append(Bundle.open(path.parent))
        except BundleError:  # of no concern here: it may belong to anything
            continue
    return found


def _difference(one: Bundle, other: Bundle) -> str | None:
    """The reason why two bundles cannot take turns; None where they can."""
    for field in ("latent_channels", "vae_scale", "text_length", "clip_skip", "precision"):
        here, there = getattr(one.manifest, field), getattr(other.manifest, field)
        if here != there:
            return f"{field} is {here} in {one.folder.name} and {there} in {other.folder.name}"
    if _fused(one.manifest) != _fused(other.manifest):
        here, there = (_loras(bundle.manifest) for bundle in (one, other))
        return f"it has {there}, and {one.folder.name} has {here}: build both with the same --lora"
    part = shared_difference(one.manifest, other.manifest)
    return f"its {part} is not that of {one.folder.name}" if part else None


def _fused(manifest: Manifest) -> list[tuple[str, float]]:
    """Which LoRAs change the weights and how much, wherever their files lie and in whichever order they were named."""
    return sorted((lora.sha256, lora.scale) for lora in manifest.loras if lora.scale)


def _loras(manifest: Manifest) -> str:
    return f"LoRA {', '.join(lora.option for lora in manifest.loras)}" if manifest.loras else "no LoRA"


def partitioned_by_unit(manifest: Manifest) -> Manifest:
    """The same UNet with each unit in a segment of its own, which can run every plan."""
    units = [unit for unit in manifest.units if unit.name in manifest.unet_units]
    segments = [Segment(name=unit.name, units=(unit.name,), inputs=unit.inputs, outputs=unit.outputs) for unit in units]
    return manifest.model_copy(update={"segments": tuple(segments)})


def lay_out_part(plan: Plan, manifest: Manifest, timesteps: Sequence[float], guided: bool = False) -> Schedule:
    """A plan laid out for one UNet's part of it, to be checked whatever the bundles of the others are partitioned for.

    The other UNets are replaced by this one, partitioned by unit; ``guided`` calls have classifier-free guidance.

    Raises:
        PlanError: the plan does not run this UNet, or names what it does not have.
    """
    names = dict.fromkeys(part.unet for part in plan.unets) or [manifest.variant]
    if manifest.variant not in names:
        raise PlanError(f"plan {plan.name} runs the UNets {', '.join(names)}, not {manifest.variant}")
    unets = dict.fromkeys(names, partitioned_by_unit(manifest)) | {manifest.variant: manifest}
    return Schedule(plan, unets, timesteps, guided=guided)


def _can_run(plan: Plan, manifest: Manifest, timesteps: Sequence[float]) -> bool:
    try:
        check_runs(lay_out_part(plan, manifest, timesteps))
    except PlanError:
        return False
    return True
