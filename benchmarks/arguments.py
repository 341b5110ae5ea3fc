"""Checks of arguments that several benchmarks have."""

from argparse import Namespace
from collections.abc import Sequence

from engines import Bundle
from engines.errors import UserError
from engines.support.records import one_line
from runtime.embedded import EXAMPLES

__all__ = ["check_buildable", "check_counts", "embedded_source"]


def check_counts(options: Namespace, *names: str) -> None:
    """Raise UserError where one of these options is below 1."""
    for name in names:
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)} is too few; give 1 or more")


def embedded_source(bundle: Bundle) -> str:
    """The name of the embedded model that a bundle was built from. Raises UserError where it is another."""
    source = bundle.manifest.source
    if source not in EXAMPLES:
        raise UserError(f"{bundle.folder} was built from {one_line(source, 100)}; take a bundle of {' or '.join(EXAMPLES)}")
    return source


def check_buildable(source: str, variants: Sequence[str], size: tuple[int, int] | None) -> None:
    """Raise UserError where a source cannot be had, has no such variant, or its UNet takes no such size (height, width)."""
    from exporter.graph.checkpoint import open_source
    from exporter.graph.graph import check_size
    from exporter.graph.topology import depth_factor

    for variant in variants:
        checkpoint = open_source(source, variant)
        unet = checkpoint.skeleton("unet", variant)
        if size:
            vae = checkpoint.skeleton("vae", variant)
            check_size(size, 2 ** (len(vae.config.block_out_channels) - 1) * depth_factor(unet))
