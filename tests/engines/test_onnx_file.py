"""An ONNX file from a stranger is a list of operators that run once, or is refused before a library opens it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx.helper import make_function, make_graph, make_model, make_node, make_opsetid, make_tensor, make_tensor_value_info

from engines import Bundle, BundleError
from engines.errors import NeedsBuildError
from engines.onnx_file import check_onnx, checked_onnx
from tests.support.unets import make_manifest

FLOAT, INT, BOOL = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.BOOL


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """For its name alone."""
    return Bundle(tmp_path_factory.mktemp("bundle"), make_manifest())


def plain() -> Any:
    """``b = (a + a) * a``, with its nodes in the reverse order, which ONNX Runtime takes too."""
    nodes = [make_node("Mul", ["twice", "a"], ["b"]), make_node("Add", ["a", "a"], ["twice"])]
    sides = [make_tensor_value_info(name, FLOAT, [2]) for name in "ab"]
    return make_model(make_graph(nodes, "plain", sides[:1], sides[1:]), opset_imports=[make_opsetid("", 20)])


def endless(model: Any) -> None:
    body = [make_tensor_value_info("number", INT, []), make_tensor_value_info("before", BOOL, [])]
    after = [make_tensor_value_info("after", BOOL, [])]
    loop = make_graph([make_node("Identity", ["before"], ["after"])], "body", body, after)
    model.graph.initializer.extend([make_tensor("often", INT, [], [2**62]), make_tensor("yes", BOOL, [], [True])])
    model.graph.node.append(make_node("Loop", ["often", "yes"], [], body=loop))


def scan(body: Any) -> Any:
    return make_node("Scan", ["a"], ["rows"], body=body, num_scan_inputs=1)


def test_a_scan_over_the_rows_is_plain(bundle: Bundle, tmp_path: Path) -> None:
    """It ends with its input; what it takes from around it must be there before it."""
    model, path = plain(), tmp_path / "stem.onnx"
    sides = [make_tensor_value_info(name, FLOAT, []) for name in ("row", "doubled")]
    model.graph.node.append(scan(make_graph([make_node("Mul", ["row", "twice"], ["doubled"])], "body", sides[:1], sides[1:])))
    path.write_bytes(model.SerializeToString())
    check_onnx(bundle, path, set())
    model.graph.node[1].input[0] = "rows"  # of which ``twice`` is made, which the scan takes
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match="need one another, 'Add' and 'Scan': the graph is cyclic"):
        check_onnx(bundle, path, set())


def endless_inside(model: Any) -> None:
    endless(model)
    loop = model.graph.node.pop()
    model.graph.node.append(scan(make_graph([loop], "body", [], [])))


def recursive(model: Any) -> None:
    inner = [make_node("F", ["x"], ["y"], domain="own")]
    model.functions.append(make_function("own", "F", ["x"], ["y"], inner, [make_opsetid("own", 1)]))


def cyclic(model: Any) -> None:
    model.graph.node[1].input[1] = "b"


def itself(model: Any) -> None:
    model.graph.node[0].input[1] = "b"


def foreign(domain: str) -> Callable[[Any], None]:
    return lambda model: model.graph.node.append(make_node("EPContext", ["a"], ["c"], domain=domain))


def outside(model: Any) -> None:
    tensor = model.graph.initializer.add(name="w", data_type=FLOAT, dims=[2], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../../secret")


@pytest.mark.parametrize(("change", "says"), [
    (endless, "has an operator 'Loop' with a graph inside"),
    (endless_inside, "has an operator 'Loop' with a graph inside"),
    (recursive, "has a function of its own, 'F'"),
    (cyclic, "has operators that need one another, 'Mul' and 'Add': the graph is cyclic"),
    (itself, "has operators that need one another, 'Mul': the graph is cyclic"),
    (foreign("com.microsoft"), "has an operator 'EPContext' of 'com.microsoft', which is none that may run"),
    (foreign("own"), "has an operator 'EPContext' of 'own', which is none that may run"),
    (outside, "takes weights from '../../secret', which the manifest does not list"),
], ids=lambda value: getattr(value, "__name__", ""))  # fmt: skip
def test_what_is_no_plain_graph(bundle: Bundle, tmp_path: Path, change: Callable[[Any], None], says: str) -> None:
    path, model = tmp_path / "stem.onnx", plain()
    path.write_bytes(model.SerializeToString())
    check_onnx(bundle, path, set())
    change(model)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BundleError) as caught:
        check_onnx(bundle, path, {"stem.onnx.data"})
    assert says in str(caught.value)
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"\xff" * 20, b"PK\x03\x04", b"\x3a\xff\xff\xff\xff\xff\x7f"])
def test_what_is_no_onnx_file(bundle: Bundle, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "stem.onnx").write_bytes(data)
    with pytest.raises(BundleError, match=r"stem\.onnx is no ONNX model") as caught:
        check_onnx(bundle, tmp_path / "stem.onnx", set())
    assert "\n" not in str(caught.value)


def test_a_segment_without_a_file_needs_a_build(bundle: Bundle) -> None:
    with pytest.raises(NeedsBuildError, match="has a segment without an ONNX file"):
        checked_onnx(bundle, ())
