"""Checks of arguments that several benchmarks have."""

from argparse import Namespace

from engines import Bundle
from engines.errors import UserError
from engines.support.records import one_line
from runtime.embedded import EXAMPLES

__all__ = ["check_counts", "embedded_source"]


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
