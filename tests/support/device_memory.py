"""A stand-in for a GPU's memory on the CPU: it lies on multiples of 256 bytes, and its addresses can be told from the host's.

The device's is what is made for a device (``torch.empty`` that is told one) and what is copied from the device's; all else that
PyTorch makes is the host's. What a runner is given counts as the device's, for it has refused other tensors before: the host's is
moved first.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from engines.tensorrt.runner import EngineRunner

__all__ = ["ALIGNMENT", "aligned", "is_device", "on_device", "use_device_memory"]

ALIGNMENT = 256
"""Bytes. PyTorch's allocations on a GPU have 512 and TensorRT demands 256; on the CPU they have 64."""

_empty, _empty_like, _clone, _contiguous = torch.empty, torch.empty_like, torch.Tensor.clone, torch.Tensor.contiguous
_blocks: dict[int, int] = {}
"""Where each block begins and ends, as long as some tensor refers to it."""


def is_device(address: int, size: int = 1) -> bool:
    """Whether so many bytes are the device's, of one block."""
    if address in _blocks:  # most are of whole tensors
        return address + size <= _blocks.get(address, 0)
    return any(begin <= address and address + size <= end for begin, end in list(_blocks.items()))


def on_device(tensor: Tensor) -> Tensor:
    """A copy in the device's memory."""
    return _allocate(tensor.shape, tensor.dtype).copy_(tensor)


def aligned(shape: Sequence[int], dtype: torch.dtype, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    """Memory of the host that lies as the device's does."""
    size = prod(shape) * dtype.itemsize
    block = _empty(size + ALIGNMENT, dtype=torch.uint8)
    flat = block[-block.data_ptr() % ALIGNMENT :][:size].view(dtype)
    if memory_format != torch.channels_last:
        return flat.view(tuple(shape))
    n, c, h, w = shape
    return flat.view(n, h, w, c).permute(0, 3, 1, 2)


def _allocate(shape: Sequence[int], dtype: torch.dtype, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    tensor = aligned(shape, dtype, memory_format)
    begin = tensor.data_ptr()
    _blocks[begin] = begin + tensor.nbytes
    weakref.finalize(tensor.untyped_storage(), _blocks.pop, begin, None)
    return tensor


def _is_on_device(tensor: Tensor) -> bool:
    return not isinstance(tensor, FakeTensor) and tensor.device.type == "cpu" and is_device(tensor.data_ptr())


def _format_of(tensor: Tensor, memory_format: torch.memory_format) -> torch.memory_format:
    if memory_format != torch.preserve_format:
        return memory_format
    last = tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _device_empty(*size: Any, device: Any = None, **options: Any) -> Tensor:
    if device is None or torch.device(device).type != "cpu":
        return _empty(*size, device=device, **options)
    shape = size if all(isinstance(side, int) for side in size) else size[0]
    return _allocate(shape, options.get("dtype", torch.float32), options.get("memory_format", torch.contiguous_format))


def _device_empty_like(tensor: Tensor, **options: Any) -> Tensor:
    if options or not _is_on_device(tensor):
        return _empty_like(tensor, **options)
    return _allocate(tensor.shape, tensor.dtype, _format_of(tensor, torch.preserve_format))


def _device_clone(tensor: Tensor, *, memory_format: torch.memory_format = torch.preserve_format) -> Tensor:
    if not _is_on_device(tensor):
        return _clone(tensor, memory_format=memory_format)
    return _allocate(tensor.shape, tensor.dtype, _format_of(tensor, memory_format)).copy_(tensor)


def _device_contiguous(tensor: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    if tensor.is_contiguous(memory_format=memory_format) or not _is_on_device(tensor):
        return _contiguous(tensor, memory_format=memory_format)
    return _device_clone(tensor, memory_format=memory_format)


def use_device_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on there is such memory, and TensorRT's runners work in it."""
    for owner, name, replacement in (
        (torch, "empty", _device_empty),
        (torch, "empty_like", _device_empty_like),
        (torch.Tensor, "clone", _device_clone),
        (torch.Tensor, "contiguous", _device_contiguous),
    ):
        monkeypatch.setattr(owner, name, replacement)
    run = EngineRunner._run_impl

    def run_on_device(runner: EngineRunner, inputs: dict[str, Tensor], sizes: dict[str, int]) -> dict[str, Tensor]:
        return run(runner, {name: x if _is_on_device(x) else on_device(x) for name, x in inputs.items()}, sizes)

    monkeypatch.setattr(EngineRunner, "_run_impl", run_on_device)
