"""Shapes, MACs and graphs of what was measured before: they take a second, and tests ask for the same few UNets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from engines.bundle.manifest import Feature, Unit
from exporter.graph import graph, shapes_and_macs
from tuning.checkpoints.source import FolderSource

if TYPE_CHECKING:
    from exporter.graph.checkpoint import Checkpoint

_load_graph = graph.load_graph
_graphs: dict[tuple[Any, ...], graph.Graph] = {}
_measured: dict[tuple[Any, ...], tuple[list[Unit], dict[str, Feature]]] = {}


def infer_shapes_and_macs(
    units: Sequence[Unit], modules: Mapping[str, nn.Module], inputs: Mapping[str, Feature], sizes: Mapping[str, int]
) -> tuple[list[Unit], dict[str, Feature]]:
    """As the exporter's own, once for modules of one structure."""
    described = tuple((unit.model_dump_json(), _structure(modules[unit.name])) for unit in units)
    given = tuple((name, feature.model_dump_json()) for name, feature in inputs.items())
    key = (described, given, tuple(sorted(sizes.items())))
    if key not in _measured:
        _measured[key] = shapes_and_macs.infer_shapes_and_macs(units, modules, inputs, sizes)
    measured, features = _measured[key]
    return list(measured), dict(features)


def load_graph(checkpoint: Checkpoint, variant: str, *settings: Any) -> graph.Graph:
    """As the exporter's own, once for folders that hold the same files. Its weights may be those of a folder that is gone.

    What replaces a part of a source is compared with the part, which no hash of what a build reads includes: never remembered.
    """
    replaced = checkpoint.own_unet, checkpoint.own_recipe, checkpoint.own_vae, *checkpoint.loras
    if any(replaced) or type(checkpoint.source) is not FolderSource:
        return _load_graph(checkpoint, variant, *settings)
    key = checkpoint.fingerprint(variant), variant, repr(settings)
    if key not in _graphs:
        _graphs[key] = _load_graph(checkpoint, variant, *settings)
    return _graphs[key]


def _structure(module: nn.Module) -> tuple[Any, ...]:
    """All that the shapes and the arithmetic of a module can depend on: types, settings, and the shapes of its weights."""
    return tuple(
        (
            name,
            type(part),
            tuple(
                (key, value) for key, value in sorted(vars(part).items()) if isinstance(value, bool | int | float | str | tuple)
            ),
            tuple((key, tuple(tensor.shape), tensor.dtype) for key, tensor in _tensors(part)),
        )
        for name, part in module.named_modules()
    )


def _tensors(part: nn.Module) -> list[tuple[str, Any]]:
    return [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
