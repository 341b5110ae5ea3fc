"""A part's weights with LoRAs fused into them, a few tensors at a time."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Size, Tensor

from tuning.checkpoints.weights import Weights, mmap_safetensors
from tuning.errors import TuningError
from tuning.loras.layers import LoraFile, LoraLayer, fitted

__all__ = ["FusedWeights", "fused"]

_AT_ONCE = 1 << 26
"""Numbers that are held in single precision at a time, until they are in the precision asked for."""


@dataclass(frozen=True)
class _Addition:
    """The change of one weight by one LoRA: ``factor`` times a product of two tensors of its file."""

    path: Path
    layer: LoraLayer
    factor: float

    def digest(self, files: Mapping[Path, Mapping[str, Tensor]]) -> str:
        """A hash of what is added."""
        whole = hashlib.sha256(repr(self.factor).encode())
        for name in (self.layer.up, self.layer.down):
            tensor = files[self.path][name].contiguous()
            whole.update(f" {tensor.dtype} {tuple(tensor.shape)} ".encode())
            whole.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
        return whole.hexdigest()

    def tensor(self, files: Mapping[Path, Mapping[str, Tensor]]) -> Tensor:
        """(out, all else), float32."""
        up, down = (files[self.path][name].float().flatten(1) for name in (self.layer.up, self.layer.down))
        return self.factor * (up @ down)


class FusedWeights(Weights):
    """Weights to which products of small matrices are added, in single precision, whatever precision is asked for."""

    def __init__(self, weights: Weights, additions: Mapping[str, Sequence[_Addition]]) -> None:
        super().__init__(weights.where, weights.shapes)
        self._weights, self._additions = weights, additions

    @cached_property
    def _digests(self) -> dict[str, list[str]]:
        files = self._files(self._additions)
        return {name: [f"{name} {each.digest(files)}" for each in added] for name, added in self._additions.items()}

    def _files(self, names: Iterable[str]) -> dict[Path, dict[str, Tensor]]:
        """The files whose tensors are added to weights of these names, mapped."""
        return {path: mmap_safetensors(path) for path in {added.path for name in names for added in self._additions[name]}}

    def changes(self, names: Iterable[str]) -> list[str]:
        """As any weights', with hashes of what is added to each."""
        names = list(names)
        own = [line for name in names for line in self._digests.get(name, ())]
        return [*self._weights.changes(names), *own]

    def _take(self, names: Sequence[str], dtype: torch.dtype) -> dict[str, Tensor]:
        taken = self._weights.take([name for name in names if name not in self._additions], dtype)
        changed = [name for name in names if name in self._additions]
        files = self._files(changed)
        for some in self._portions(changed):
            for name, weight in self._weights.take(some, torch.float32).items():
                for added in self._additions[name]:
                    weight += added.tensor(files).view_as(weight)
                taken[name] = weight.to(dtype)
        return {name: taken[name] for name in names}

    def _portions(self, names: Sequence[str]) -> Iterator[list[str]]:
        portion: list[str] = []
        size = 0
        for name in names:
            portion.append(name)
            size += self.shapes[name].numel()
            if size >= _AT_ONCE:
                yield portion
                portion, size = [], 0
        if portion:
            yield portion


def fused(
    weights: Weights,
    files: Sequence[LoraFile],
    part: str,
    shapes: Mapping[str, Size] | None = None,
    origins: Mapping[str, str] | None = None,
) -> Weights:
    """Weights with the LoRAs in ``files`` fused, in that order.

    Args:
        weights: of the part.
        files: from ``read_lora``.
        part: ``unet`` or ``text_encoder``.
        shapes: of the source's own part, where ``weights`` are of a smaller one that was made of it.
        origins: then, their names -> the source's. What a LoRA has for other layers is left out.

    Raises:
        TuningError: a LoRA does not fit them.
    """
    shapes = weights.shapes if shapes is None else shapes
    names = {name: name for name in weights.shapes} if origins is None else origins
    additions: dict[str, list[_Addition]] = {}
    for file in files:
        layers = fitted(file, part, shapes)
        for name, origin in names.items():
            if origin not in layers or name not in weights.shapes:
                continue
            if weights.shapes[name] != shapes[origin]:
                raise TuningError(
                    f"LoRA {file.lora.path}: {name} of {weights.where} is {tuple(weights.shapes[name])}, and {origin} of the "
                    f"source {tuple(shapes[origin])}, so it was not made of that; give the source that it was made of"
                )
            if factor := file.lora.scale * layers[origin].factor:
                additions.setdefault(name, []).append(_Addition(file.lora.path, layers[origin], factor))
    return FusedWeights(weights, additions) if additions else weights
