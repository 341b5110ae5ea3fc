"""The bounds of what an ONNX file of a bundle may hold, checked before any library opens it.

A segment is a list of operators that run once, one after the other, on weights of its own files. Builds write no loops, branches
or functions, which could run for ever, except for a Scan that goes once over the rows; nor operators of ONNX Runtime's own that
open other files (``EPContext``).
"""

from collections.abc import Iterable, Iterator, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from engines.bundle.damage import damaged
from engines.bundle.folder import Bundle
from engines.bundle.manifest import File, Segment
from engines.errors import NeedsBuildError

__all__ = ["check_names", "check_onnx", "checked_onnx"]

_OPERATORS = {"": None, "ai.onnx": None, "com.microsoft": frozenset({"MultiHeadAttention"})}
"""By their domain, the operators that may run; None for all. Others than ONNX's own are those of ``fuse_attention``."""


def checked_onnx(bundle: Bundle, files: Sequence[File]) -> Path:
    """The path of a segment's ONNX file, the first of these: hashes are compared with the manifest's, and the graph is looked at.

    Raises:
        BundleError: a file is missing or damaged, or the graph is not a plain one.
        NeedsBuildError: there is none.
    """
    if not files:
        raise NeedsBuildError(f"bundle {bundle.folder} has a segment without an ONNX file")
    path, *others = [bundle.path(file) for file in files]
    check_onnx(bundle, path, {other.name for other in others if other.parent == path.parent})
    return path


def check_names(segment: Segment, path: Path, taken: Iterable[str], made: Iterable[str]) -> None:
    """Raise NeedsBuildError where a file takes what its segment is not given, or does not make what it should."""
    unknown, missing = sorted({*taken}.difference(segment.inputs)), sorted({*segment.outputs}.difference(made))
    if unknown or missing:
        found = f"takes {unknown[0]!r:.200}, which it is not given" if unknown else f"does not make {missing[0]!r:.200}"
        raise NeedsBuildError(f"segment {segment.name}: {path} {found}")


def check_onnx(bundle: Bundle, path: Path, listed: set[str]) -> None:
    """Raise BundleError unless a segment's ONNX file is a plain graph, with weights in files that were checked as it was.

    Args:
        bundle: whose file it is.
        path: the file.
        listed: names of the files beside it that the manifest lists for the segment.
    """
    try:
        model = _read(path)
        _check_graph(model)
    except ValueError as error:
        raise damaged(bundle.folder, f"{path} {error}") from error
    if strange := sorted(set(_locations(model)) - listed):
        raise damaged(
            bundle.folder, f"{path.name} takes weights from {strange[0][:200]!r}, which the manifest does not list beside it"
        )


def _read(path: Path) -> Any:
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    model = onnx.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ValueError(f"is no ONNX model ({error})") from error
    return model


def _check_graph(model: Any) -> None:
    """Raise ValueError unless the graph's operators can run one after the other, each once, or in a Scan once for each row."""
    if model.functions:
        raise ValueError(f"has a function of its own, {model.functions[0].name[:80]!r}, and a segment has operators alone")
    _check_nodes(model.graph)


def _check_nodes(graph: Any, *, inside: bool = False) -> set[str]:
    """As ``_check_graph``, of a graph or, ``inside``, of a Scan's; returns the names that it takes from around it."""
    makers: dict[str, int] = {}
    needs: dict[int, set[str]] = {}
    for number, node in enumerate(graph.node):
        known = _OPERATORS.get(node.domain, frozenset())
        if known is not None and node.op_type not in known:
            raise ValueError(f"has an operator {node.op_type[:80]!r} of {node.domain[:80]!r}, which is none that may run")
        needs[number] = {name for name in node.input if name} | _taken_by_body(node, inside=inside)
        makers.update((name, number) for name in node.output if name)
    try:
        TopologicalSorter(
            {number: {makers[name] for name in names if name in makers} for number, names in needs.items()}
        ).prepare()
    except CycleError as error:
        names = " and ".join(repr(graph.node[number].op_type[:80]) for number in sorted(set(error.args[1]))[:2])
        raise ValueError(f"has operators that need one another, {names}: the graph is cyclic") from error
    own = {*makers, *(value.name for value in graph.input), *(tensor.name for tensor in graph.initializer)}
    return set().union(*needs.values()) - own


def _taken_by_body(node: Any, *, inside: bool) -> set[str]:
    """The names that an operator's graph takes from around it: only a Scan, which ends with its input's rows, has one."""
    bodies = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    if any(attribute.graphs for attribute in node.attribute) or (bodies and (inside or node.op_type != "Scan" or node.domain)):
        raise ValueError(f"has an operator {node.op_type[:80]!r} with a graph inside, and a segment is one graph")
    return set().union(*(_check_nodes(body, inside=True) for body in bodies))


def _locations(message: Any) -> Iterator[str]:
    """The files that any message inside this one names for a tensor."""
    for field, value in message.ListFields():
        if field.name == "external_data":
            yield from (entry.value for entry in value if entry.key == "location")
        elif field.type == field.TYPE_MESSAGE:
            for inner in value if _is_list(value) else [value]:
                yield from _locations(inner)


def _is_list(value: Any) -> bool:
    return not hasattr(value, "ListFields")
