"""The UNet as one engine of TensorRT or TensorRT-RTX: a bundle of ours whose UNet is one segment, under the plan full."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.peers import ours
from benchmarks.peers.serve import Call, Made

__all__ = ["EXPORTED_FOR", "export", "load"]

EXPORTED_FOR = ("engine", "precision_of_weights", "height", "width", "images")
"""An engine is built for these."""


def export(folder: Path, exported: Path, options: dict[str, Any]) -> None:
    """Build the bundle from a pipeline: without a granularity, units that always run together are one segment."""
    from exporter import BuildOptions, build

    build(
        BuildOptions(
            source=str(folder),
            engines=(options["engine"],),
            granularity=None,
            plans=("full",),
            precision=options["precision_of_weights"],
            sizes=((options["height"], options["width"]),),
            max_images=options["images"],
            out=exported,
        )
    )


def load(folder: Path, options: dict[str, Any]) -> Callable[[Call], Made]:
    """A maker of pictures, with the bundle; raises EngineError where its engine does not run here."""
    return ours.load(folder, options)
