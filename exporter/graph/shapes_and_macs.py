"""Shapes, parameters and MACs of units, found by running them on the meta device: no arithmetic and no memory."""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from engines import DTYPES
from engines.bundle.manifest import Feature, Unit
from engines.bundle.shapes import Shape, resolve

__all__ = ["infer_shapes_and_macs"]

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def infer_shapes_and_macs(
    units: Sequence[Unit], modules: Mapping[str, nn.Module], inputs: Mapping[str, Feature], sizes: Mapping[str, int]
) -> tuple[list[Unit], dict[str, Feature]]:
    """Fill in every unit's parameters and MACs and describe every feature.

    Args:
        units: in an order in which they can run.
        modules: the module of each unit, with weights or on the meta device.
        inputs: the features that no unit makes.
        sizes: value of each symbolic dimension to count MACs at; rows (``batch``, ``images``) are counted as one.

    Returns:
        The units with ``parameters`` and ``macs`` (multiply-accumulates of one row), and all features with the inputs.
    """
    units = [
        unit.model_copy(update={"parameters": sum(weight.numel() for weight in modules[unit.name].parameters())})
        for unit in units
    ]
    bare = {unit.name: _on_meta(modules[unit.name]) for unit in units}
    double, four = ({**sizes, "height": 2 * sizes["height"], "width": wide * sizes["width"]} for wide in (1, 2))
    (macs, features), (macs_double, _), (macs_four, _) = (_run(units, bare, inputs, at) for at in (sizes, double, four))
    measured = []
    for unit, once, twice, fourfold in zip(units, macs, macs_double, macs_four, strict=True):
        quadratic, rest = divmod(fourfold - 3 * twice + 2 * once, 6)
        fixed = 2 * once - twice + 2 * quadratic
        exact = rest == 0 and quadratic >= 0 and 0 <= fixed <= once - quadratic
        parts = {"macs_fixed": fixed, "macs_quadratic": quadratic} if exact else {}
        measured.append(unit.model_copy(update={"macs": once, **parts}))
    return measured, features


def _run(
    units: Sequence[Unit], modules: Mapping[str, nn.Module], inputs: Mapping[str, Feature], sizes: Mapping[str, int]
) -> tuple[list[int], dict[str, Feature]]:
    """The MACs of each unit at a size, and all features."""
    sizes = {**sizes, "batch": 1, "images": 1}
    features, macs = dict(inputs), []
    # The attention kernels of a CPU are unknown to the counter; the plain form is two matrix products, which it knows.
    with torch.no_grad(), torch.device("meta"), sdpa_kernel(SDPBackend.MATH):
        tensors = {
            name: torch.empty(resolve(feature.shape, sizes), dtype=DTYPES[feature.dtype]) for name, feature in inputs.items()
        }
        for unit in units:
            with FlopCounterMode(display=False) as counter:
                tensors[unit.name] = modules[unit.name](*(tensors[name] for name in unit.inputs))
            macs.append(counter.get_total_flops() // 2)
            features[unit.name] = _describe(tensors[unit.name], features[unit.inputs[0]].shape[0], sizes)
    return macs, features


def _on_meta(module: nn.Module) -> nn.Module:
    """A copy on the meta device; its weights are not copied on the way."""
    bare: dict[int, object] = {id(weight): nn.Parameter(weight.to("meta"), requires_grad=False) for weight in module.parameters()}
    bare |= {id(buffer): buffer.to("meta") for buffer in module.buffers()}
    return copy.deepcopy(module, bare)


def _describe(tensor: Tensor, rows: int | str, sizes: Mapping[str, int]) -> Feature:
    """The symbolic form of a result: its first dimension is its first input's, pictures scale with height and width."""
    shape: Shape = (rows, *tensor.shape[1:])
    if tensor.ndim == 4:
        shape = (rows, tensor.shape[1], _scaled("height", tensor.shape[2], sizes), _scaled("width", tensor.shape[3], sizes))
    return Feature(dtype=_NAMES[tensor.dtype], shape=shape)


def _scaled(name: str, size: int, sizes: Mapping[str, int]) -> str:
    if size == sizes[name]:
        return name
    return f"{size // sizes[name]}*{name}" if size > sizes[name] else f"{name}/{sizes[name] // size}"
