"""Weights of one part of a checkpoint, taken a few tensors at a time, so that a whole UNet need not be in memory.

The names are those in the state of the part's module, as diffusers and transformers build it from its configuration.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Size, Tensor, nn

from engines.support.records import one_line
from tuning.checkpoints.files import check_file
from tuning.errors import TuningError

__all__ = [
    "ComputedWeights",
    "FileWeights",
    "LoadedWeights",
    "RandomWeights",
    "RenamedWeights",
    "Weights",
    "check_floating",
    "materialize",
    "metadata_of",
    "mmap_safetensors",
    "names_in",
    "shapes_in",
    "shapes_of",
]

_MAPPED_AT_ONCE = 1 << 26
"""Bytes of files that count as this process's memory before the files are closed and opened again."""

Part = TypeVar("Part", bound=nn.Module)


class Weights(ABC):
    """The weights of one part. ``shapes`` are those that its module has; ``where`` names their source in errors."""

    def __init__(self, where: str, shapes: Mapping[str, Size]) -> None:
        self.where = where
        self.shapes = dict(shapes)

    def take(self, names: Iterable[str], dtype: torch.dtype) -> dict[str, Tensor]:
        """Copies of the tensors of these names, on the CPU, those of floating point in ``dtype``; no file stays open.

        Raises:
            TuningError: a name is none of the part's, a tensor is missing or of another shape, or a file is damaged.
        """
        wanted = list(dict.fromkeys(names))
        for name in wanted:
            if name not in self.shapes:
                raise TuningError(f"{self.where}: there is no {name} in this part's module")
        return self._take(wanted, dtype)

    @abstractmethod
    def _take(self, names: Sequence[str], dtype: torch.dtype) -> dict[str, Tensor]: ...

    def changes(self, names: Iterable[str]) -> list[str]:
        """The changes to tensors of these names since their files were written, each as a line of text with a hash."""
        return []

    def check(self, shapes: Mapping[str, Size]) -> None:
        """Raise TuningError unless tensors of these shapes are those that the module needs."""
        for name, wanted in self.shapes.items():
            self._check_one(name, shapes.get(name), wanted)

    def _check_one(self, name: str, shape: Size | None, wanted: Size) -> None:
        if shape is None:
            raise TuningError(f"{self.where}: {name} is missing, which its configuration needs; get both again")
        if shape != wanted:
            raise TuningError(
                f"{self.where}: the weights are not those of its configuration ({name} is {tuple(shape)}, "
                f"not {tuple(wanted)}); get both again"
            )

    def _copy(self, tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype) -> Tensor:
        """A copy of one tensor, checked to be the one that the module needs."""
        tensor = tensors.get(name)
        self._check_one(name, None if tensor is None else tensor.shape, self.shapes[name])
        assert tensor is not None
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.detach().to(kind, copy=True, memory_format=torch.contiguous_format)


class FileWeights(Weights):
    """Tensors of safetensors files, which are mapped into memory only while they are copied.

    Args:
        open_files: maps the files and gives their tensors, unread, under the module's names.
    """

    def __init__(self, where: str, shapes: Mapping[str, Size], open_files: Callable[[], Mapping[str, Tensor]]) -> None:
        super().__init__(where, shapes)
        self._open = open_files

    def _take(self, names: Sequence[str], dtype: torch.dtype) -> dict[str, Tensor]:
        taken: dict[str, Tensor] = {}
        while len(taken) < len(names):
            tensors, size = self._open(), 0
            for name in names[len(taken) :]:
                taken[name] = self._copy(tensors, name, dtype)
                size += tensors[name].nbytes
                if size > _MAPPED_AT_ONCE:
                    break
        return taken


class LoadedWeights(Weights):
    """Those of a model that its own library loads, because that knows the older names of its tensors.

    Args:
        load: dtype -> the whole model; it is dropped when what was asked for has been copied.
    """

    def __init__(self, where: str, shapes: Mapping[str, Size], load: Callable[[torch.dtype], nn.Module]) -> None:
        super().__init__(where, shapes)
        self._load = load

    def _take(self, names: Sequence[str], dtype: torch.dtype) -> dict[str, Tensor]:
        state = self._load(dtype).state_dict()
        # Copies, as a library may hand out what it mapped from a file.
        return {name: self._copy(state, name, dtype) for name in names}


class RandomWeights(Weights):
    """Random weights of sane size; each tensor depends on seed, part and name only, whichever are taken and in which order.

    Nothing is constant, so that no compiler can leave a norm's weight or a bias out, and one that is forgotten shows.
    """

    def __init__(self, part: str, shapes: Mapping[str, Size], seed: int = 0) -> None:
        super().__init__(f"random {part}", shapes)
        self._part, self._seed = part, seed

    def _take(self, names: Sequence[str], dtype: torch.dtype) -> dict[str, Tensor]:
        return {name: self._draw(name).to(dtype) for name in names}

    def _draw(self, name: str) -> Tensor:
        seed, shape = hashlib.sha256(f"{self._seed} {self._part} {name}".encode()).digest(), self.shapes[name]
        generator, drawn = torch.Generator().manual_seed(int.from_bytes(seed[:8])), torch.empty(shape)
        if len(shape) > 1:
            return drawn.normal_(std=(shape.numel() / shape[0]) ** -0.5, generator=generator)
        return drawn.normal_(1.0 if name.endswith("weight") else 0.0, 0.1, generator=generator)


class RenamedWeights(Weights):
    """Another part's weights under other names: those of a UNet that was cut out of it.

    Args:
        names: this part's names -> the other's.
    """

    def __init__(self, weights: Weights, names: Mapping[str, str]) -> None:
        super().__init__(weights.where, {name: weights.shapes[origin] for name, origin in names.items()})
        self._weights, self._names = weights, dict(names)

    def changes(self, names: Iterable[str]) -> list[str]:
        """Those of the other part's."""
        return self._weights.changes(self._names[name] for name in names)

    def _take(self, names: Sequence[str], dtype: torch.dtype) -> dict[str, Tensor]:
        taken = self._weights.take((self._names[name] for name in names), dtype)
        return {name: taken[self._names[name]] for name in names}


class ComputedWeights(Weights):
    """Those of a model that has to be made as a whole; unlike the others it stays in memory, once something was taken.

    Args:
        made_of: the weights that it is made of.
    """

    def __init__(self, where: str, shapes: Mapping[str, Size], make: Callable[[], nn.Module], made_of: Weights) -> None:
        super().__init__(where, shapes)
        self._make, self._made_of = make, made_of

    def changes(self, names: Iterable[str]) -> list[str]:
        """All of those of what it is made of: each tensor may come from any."""
        return self._made_of.changes(self._made_of.shapes)

    @cached_property
    def _state(self) -> dict[str, Tensor]:
        return self._make().state_dict()

    def _take(self, names: Sequence[str], dtype: torch.dtype) -> dict[str, Tensor]:
        return {name: self._copy(self._state, name, dtype) for name in names}


def mmap_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped into memory: they are read when they are used, and unmapped with the last one.

    Raises:
        TuningError: the file is missing, cut off or no safetensors file.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping, it only has keys()


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        reason = one_line(error, 200)
        raise TuningError(f"{path}: its weights cannot be read ({reason}); get the file again") from error


def metadata_of(path: Path) -> dict[str, str]:
    """The texts in the header of a safetensors file. Raises TuningError as ``mmap_safetensors`` does."""
    with _opened(path) as file:
        return dict(file.metadata() or {})


def names_in(path: Path) -> list[str]:
    """The names of the tensors of a safetensors file. Raises TuningError as ``mmap_safetensors`` does."""
    with _opened(path) as file:
        return list(file.keys())


def shapes_in(path: Path) -> dict[str, Size]:
    """Name -> shape of the tensors of a safetensors file. Raises TuningError as ``mmap_safetensors`` does."""
    with _opened(path) as file:
        return {name: Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def check_floating(path: Path, prefix: str = "") -> None:
    """Raise TuningError where a tensor whose name begins so holds no numbers of floating point, but for positions."""
    with _opened(path) as file:
        named = (name for name in file.keys() if name.startswith(prefix) and not name.endswith("position_ids"))  # noqa: SIM118
        wrong = next((name for name in named if not file.get_slice(name).get_dtype().startswith(("F", "BF"))), None)
        dtype = "" if wrong is None else str(file.get_tensor(wrong).dtype).removeprefix("torch.")
    if wrong is not None:
        raise TuningError(
            f"{path}: {wrong} holds {dtype}, and weights are floating-point numbers; "
            "give the model as it was before it was quantized"
        )


def shapes_of(module: nn.Module) -> dict[str, Size]:
    """Name -> shape of what a module has in its state; one on the meta device will do."""
    return {name: value.shape for name, value in module.state_dict().items()}


def materialize(skeleton: Part, weights: Weights, dtype: torch.dtype = torch.float32) -> Part:
    """The module itself, with all of its weights instead of those on the meta device. Raises TuningError as ``take`` does."""
    skeleton.load_state_dict(weights.take(skeleton.state_dict(), dtype), assign=True)
    return skeleton
