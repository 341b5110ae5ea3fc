"""A traced program as a list of operators that run one after the other."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Named", "Node", "Program", "ProgramError", "first_line"]


class ProgramError(ValueError):
    """A file holds no program that may be run."""


@dataclass(frozen=True)
class Named:
    """A value that an earlier node made, a weight, or an input."""

    name: str


@dataclass(frozen=True)
class Node:
    """One operator: what it is given and the names of what it makes."""

    function: Callable[..., Any]
    target: str
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    outputs: tuple[Any, ...]
    """Names of values, or a tuple of names for a list of tensors."""
    last: tuple[str, ...] = ()
    """The values that nobody reads after this node."""


class Program(nn.Module):
    """A segment's operators in order. Takes tensors in the order of the program's inputs and returns its outputs.

    Args:
        nodes: what runs.
        inputs: names of the inputs.
        outputs: names of the outputs.
        weights: by name, on the device where it runs.

    Raises:
        ProgramError: an operator, or an output, is a value that nothing before it makes.
    """

    def __init__(
        self, nodes: Sequence[Node], inputs: Sequence[str], outputs: Sequence[str], weights: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        _check_order(nodes, {*inputs, *weights}, outputs)
        self._inputs, self._outputs, self._weights = tuple(inputs), tuple(outputs), dict(weights)
        self._nodes = tuple(_with_last_uses(nodes, {*self._outputs, *self._weights}))

    def lay_channels_last(self) -> None:
        """Lay weights of four dimensions channels last. Views of a traced program need not be views of what comes from these."""
        last = torch.channels_last
        self._weights = {n: w.contiguous(memory_format=last) if w.dim() == 4 else w for n, w in self._weights.items()}
        view, reshape = torch.ops.aten.view.default, torch.ops.aten.reshape.default
        self._nodes = tuple(replace(node, function=reshape) if node.function is view else node for node in self._nodes)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run all operators; raises ProgramError where one cannot take what it is given."""
        if len(tensors) != len(self._inputs):
            raise ProgramError(f"it takes {len(self._inputs)} inputs and is given {len(tensors)}")
        values: dict[str, Any] = {**self._weights, **dict(zip(self._inputs, tensors, strict=True))}
        for node in self._nodes:
            try:
                result = node.function(
                    *(_filled(value, values) for value in node.arguments),
                    **{name: _filled(value, values) for name, value in node.keywords.items()},
                )
                _assign(values, node, result)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
                raise ProgramError(f"operator {node.target} fails: {first_line(error)}") from error
            for name in node.last:
                values.pop(name, None)
        made = tuple(values.get(name) for name in self._outputs)
        if not all(isinstance(value, Tensor) for value in made):
            raise ProgramError("an output is no tensor")
        return tuple(value for value in made if isinstance(value, Tensor))


def _read_by(node: Node) -> Iterator[str]:
    for value in (*node.arguments, *node.keywords.values()):
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, Named):
                yield inner.name


def _made_by(node: Node) -> Iterator[str]:
    for output in node.outputs:
        yield from output if isinstance(output, tuple) else [output] if output else []


def _check_order(nodes: Sequence[Node], given: set[str], outputs: Sequence[str]) -> None:
    known = set(given)
    for node in nodes:
        missing = [name for name in _read_by(node) if name not in known]
        if missing:
            raise ProgramError(f"operator {node.target} reads {missing[0]!r}, which nothing before it makes")
        known.update(_made_by(node))
    missing = [name for name in outputs if name not in known]
    if missing:
        raise ProgramError(f"nothing makes output {missing[0]!r}")


def _with_last_uses(nodes: Sequence[Node], kept: set[str]) -> Iterator[Node]:
    last = {name: number for number, node in enumerate(nodes) for name in (*_made_by(node), *_read_by(node))}
    freed: dict[int, list[str]] = {}
    for name, number in last.items():
        if name not in kept:
            freed.setdefault(number, []).append(name)
    for number, node in enumerate(nodes):
        yield replace(node, last=tuple(freed.get(number, ())))


def _filled(value: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(value, Named):
        return values[value.name]
    if isinstance(value, list):
        return [_filled(inner, values) for inner in value]
    return value


def _assign(values: dict[str, Any], node: Node, result: Any) -> None:
    if len(node.outputs) == 1:
        result = (result,)
    for output, made in zip(node.outputs, result, strict=True) if node.outputs else ():
        if isinstance(output, tuple):
            values.update(zip(output, made, strict=True))
        elif output:
            values[output] = made


def first_line(error: BaseException) -> str:
    """Of an error's message."""
    return next(iter(str(error).splitlines()), "")
