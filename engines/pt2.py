"""Programs that ``torch.export.save`` wrote, read as data: operators by name from JSON, weights as numbers.

PyTorch's own loader unpickles what an archive holds, and evaluates expressions and generates code from its JSON: a file from a
stranger could do anything. Here nothing in the file is executed but operators of PyTorch's tensor library (ATen) that change none
of their inputs, one after the other, as the file lists them; pickles in it are not opened.

The JSON's form: https://github.com/pytorch/pytorch/blob/main/torch/_export/serde/schema.py
"""

import json
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile

import torch
from torch import Tensor

from engines.program import Named, Node, Program, ProgramError, first_line

__all__ = ["read_program", "without_pickles"]

_DTYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16, 7: torch.float32,
    8: torch.float64, 12: torch.bool, 13: torch.bfloat16,
}  # fmt: skip
_MEMORY_FORMATS = {1: torch.contiguous_format, 2: torch.channels_last, 4: torch.preserve_format}
_STRIDED = 7
_ON_NUMBERS: dict[str, Callable[..., Any]] = {
    f"_operator.{name}": getattr(operator, name)
    for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pos", "eq", "ne", "lt", "le", "gt", "ge")
} | {
    "torch.sym_max": max,
    "torch.sym_min": min,
    "torch.sym_float": float,
    "torch.sym_not": operator.not_,
    "math.trunc": math.trunc,
}
_ATEN = re.compile(r"torch\.ops\.aten\.(_to_copy|_softmax|_unsafe_view|[a-z][a-z0-9_]*[a-z0-9])\.([A-Za-z][A-Za-z0-9_]*)")
"""Not those that change their input (``add_``), nor others with a low line in front, which are PyTorch's own affair."""
_CHECKS = re.compile(r"torch\.ops\.aten\.(_assert_\w+|sym_constrain_range\w*)\.\w+")
"""They compute nothing; the runner has checked its inputs' shapes."""
_WORDS = frozenset({"none", "tanh", "constant", "reflect", "replicate", "circular", "floor", "trunc"})
"""The only strings that operators are given: no operator is told a file's name."""
_POSITIONAL = 1
_SAMPLE_INPUTS = "data/sample_inputs/"
"""The inputs that the program was traced with, as a pickle. Nobody needs them."""


def read_program(path: Path, device: torch.device) -> Program:
    """Read a program from a ``.pt2`` file.

    Args:
        path: the file.
        device: where its weights go and its operators run, whatever the file says.

    Raises:
        ProgramError: it is no such file, or holds what is not allowed: pickled weights, other operators than those of ATen.
    """
    try:
        with ZipFile(path) as archive:
            return _read(_Members(archive), device)
    except ProgramError:
        raise
    except Exception as error:  # which one depends on where the file differs from what is expected
        raise ProgramError(first_line(error) or type(error).__name__) from error


class _Members:
    """The files of an archive, by their names inside its one folder; none is compressed, so none is larger than the archive."""

    def __init__(self, archive: ZipFile) -> None:
        self._archive = archive
        if any(member.compress_type != ZIP_STORED for member in archive.infolist()):
            raise ProgramError("the archive is compressed, which PyTorch's are not")
        self._folder = archive.namelist()[0].partition("/")[0]

    def read(self, name: str) -> bytes:
        return self._archive.read(f"{self._folder}/{name}")

    def json(self, name: str) -> Any:
        return json.loads(self.read(name))


def _read(members: _Members, device: torch.device) -> Program:
    graph_module = members.json("models/model.json")["graph_module"]
    graph, signature = graph_module["graph"], graph_module["signature"]
    stored = {kind: members.json(f"data/{kind}/model_{kind}_config.json")["config"] for kind in ("weights", "constants")}
    for kind, entries in stored.items():
        for name, entry in entries.items():
            if entry["use_pickle"] or (kind == "constants" and not entry["path_name"].startswith("tensor_")):
                raise ProgramError(f"{name} is pickled, and no pickle is opened: it could run anything")
    inputs, weights = _inputs(signature["input_specs"])
    flat: dict[str, Tensor] = {}
    tensors = {name: _tensor(members, stored, stored_name, flat, device) for name, stored_name in weights.items()}
    outputs = [_only(spec, "user_output")["arg"]["as_tensor"]["name"] for spec in signature["output_specs"]]
    nodes = [_node(node, device) for node in graph["nodes"] if not _CHECKS.fullmatch(node["target"])]
    return Program(nodes, inputs, outputs, tensors)


def _inputs(specs: Sequence[Mapping[str, Any]]) -> tuple[list[str], dict[str, str]]:
    """Names of the inputs, and the stored name of each weight by the name that the graph has for it."""
    inputs, weights = [], {}
    for spec in specs:
        ((kind, value),) = spec.items()
        if kind == "user_input":
            inputs.append(value["arg"]["as_tensor"]["name"])
        elif kind in {"parameter", "buffer", "tensor_constant"}:
            weights[value["arg"]["name"]] = value[f"{kind}_name"]
        else:
            raise ProgramError(f"input of kind {kind!r}; expected tensors and weights")
    return inputs, weights


def _tensor(members: _Members, stored: Mapping[str, Any], name: str, flat: dict[str, Tensor], device: torch.device) -> Tensor:
    """A stored tensor; those that share a file share its memory."""
    kind = "weights" if name in stored["weights"] else "constants"
    entry = stored[kind][name]
    meta, file = entry["tensor_meta"], f"data/{kind}/{entry['path_name']}"
    if file not in flat:
        data = bytearray(members.read(file))
        dtype = _DTYPES[meta["dtype"]]
        flat[file] = (torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)).to(device)
    sizes, strides = (tuple(size["as_int"] for size in meta[key]) for key in ("sizes", "strides"))
    return flat[file].as_strided(sizes, strides, meta["storage_offset"]["as_int"])


def _node(node: Mapping[str, Any], device: torch.device) -> Node:
    arguments = [entry for entry in node["inputs"] if entry["kind"] == _POSITIONAL]
    keywords = [entry for entry in node["inputs"] if entry["kind"] != _POSITIONAL]
    return Node(
        _function(node["target"]),
        node["target"],
        tuple(_value(entry["arg"], device) for entry in arguments),
        {entry["name"]: _value(entry["arg"], device) for entry in keywords},
        tuple(_output(entry) for entry in node["outputs"]),
    )


def _function(target: str) -> Callable[..., Any]:
    """The operator of that name, if it is one that only computes."""
    if target in _ON_NUMBERS:
        return _ON_NUMBERS[target]
    found = _ATEN.fullmatch(target)
    packet = getattr(torch.ops.aten, found[1], None) if found else None
    function = getattr(packet, found[2], None) if found and isinstance(packet, torch._ops.OpOverloadPacket) else None
    if not isinstance(function, torch._ops.OpOverload) or function._schema.is_mutable:
        raise ProgramError(f"operator {target[:80]!r} is not allowed; expected one of ATen that changes none of its inputs")
    return function


def _value(argument: Mapping[str, Any], device: torch.device) -> Any:
    """An argument: a number, a word, a type, or the name of a value, or lists of them."""
    ((kind, value),) = argument.items()
    if kind in {"as_int", "as_float", "as_bool", "as_ints", "as_floats", "as_bools"}:
        return value
    if kind == "as_none":
        return None
    if kind == "as_tensor":
        return Named(value["name"])
    if kind in {"as_sym_int", "as_sym_float", "as_sym_bool"}:
        return _symbol(value)
    if kind in {"as_tensors", "as_sym_ints", "as_optional_tensors"}:
        return [Named(entry["name"]) if "name" in entry else _symbol(entry) for entry in value]
    if kind == "as_string" and value in _WORDS:
        return value
    if kind == "as_scalar_type":
        return _DTYPES[value]
    if kind == "as_memory_format":
        return _MEMORY_FORMATS[value]
    if kind == "as_layout" and value == _STRIDED:
        return torch.strided
    if kind == "as_device":
        return device
    raise ProgramError(f"argument {kind} = {str(value)[:80]!r} is not allowed as an operator's argument")


def _symbol(value: Mapping[str, Any]) -> Any:
    """A number, or the name of one or of a tensor; None where an optional tensor is left out."""
    ((kind, inner),) = value.items()
    if kind == "as_none":
        return None
    if kind == "as_tensor":
        return Named(inner["name"])
    return Named(inner) if kind == "as_name" else inner


def _output(entry: Mapping[str, Any]) -> Any:
    ((kind, value),) = entry.items()
    if kind == "as_tensors":
        return tuple(tensor["name"] for tensor in value)
    return value["name"] if kind == "as_tensor" else value.get("as_name") if isinstance(value, dict) else None


def _only(entry: Mapping[str, Any], wanted: str) -> Any:
    ((kind, value),) = entry.items()
    if kind != wanted:
        raise ProgramError(f"{kind!r} where {wanted!r} is expected")
    return value


def without_pickles(saved: ZipFile, path: Path) -> None:
    """Write an archive of ``torch.export.save`` to a file, but for the pickle of the tensors that it was traced with."""
    with ZipFile(path, "w", ZIP_STORED) as archive:
        for member in saved.infolist():
            if _SAMPLE_INPUTS not in member.filename:
                archive.writestr(member.filename, saved.read(member))
