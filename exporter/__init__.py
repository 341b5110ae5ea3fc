"""A model in, a bundle out: topology, partition, trace, build, verify."""

import sys
from types import ModuleType
from typing import TYPE_CHECKING

from engines.lazy import lazy_names

if TYPE_CHECKING:
    from exporter.build import build
    from exporter.errors import BuildError, SourceError
    from exporter.graph.partition import partition
    from exporter.graph.topology import topology
    from exporter.options import BuildOptions
    from exporter.verification.verify import verify
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "exporter.build": ("build",),
            "exporter.errors": ("BuildError", "SourceError"),
            "exporter.graph.partition": ("partition",),
            "exporter.graph.topology": ("topology",),
            "exporter.options": ("BuildOptions",),
            "exporter.verification.verify": ("verify",),
        },
    )

__all__ = ["BuildError", "BuildOptions", "SourceError", "build", "partition", "topology", "verify"]


class _Package(ModuleType):
    """This package, in which ``build`` is the function, also when the module of that name has been imported."""

    def __setattr__(self, name: str, value: object) -> None:
        if name != "build" or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
