"""Shapes and MACs of what was measured before: runs on the meta device take a second, and tests ask for the same few UNets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from engines.bundle.manifest import Feature, Unit
from exporter.graph import shapes_and_macs

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
