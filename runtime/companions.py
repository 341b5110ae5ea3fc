"""Bundles that take turns: a plan may switch between UNets that were built from the same source, each in a bundle of its own."""

from engines import Bundle, BundleError
from runtime.errors import PlanError

__all__ = ["companion"]


def companion(bundle: Bundle, variant: str) -> Bundle:
    """The bundle of that variant: the one given, or one that lies beside it and was made from the same source.

    Raises:
        PlanError: there is none, or the two cannot take turns on the same latents and text.
    """
    source, folder = bundle.manifest.source, bundle.folder.parent
    if variant == bundle.manifest.variant:
        return bundle
    for path in sorted(folder.glob("[!.]*/manifest.json")):
        try:
            other = Bundle.open(path.parent)
        except BundleError:  # of no concern here: it may belong to anything
            continue
        if (other.manifest.variant, other.manifest.source) == (variant, source):
            _check_alike(bundle, other)
            return other
    raise PlanError(
        f"the plan runs the UNet {variant!r}, and no bundle in {folder} has it for source {source}; build it with: "
        f"python -m exporter build --variant {variant} --source {source} --out {folder / variant}"
    )


def _check_alike(one: Bundle, other: Bundle) -> None:
    for field in ("latent_channels", "vae_scale", "text_length", "precision"):
        here, there = getattr(one.manifest, field), getattr(other.manifest, field)
        if here != there:
            raise PlanError(
                f"bundles {one.folder} and {other.folder} cannot take turns: {field} is {here} in one and {there} in the other"
            )
