"""PyTorch's tracer and its ONNX exporter without what they would do in vain for every segment: half the time of a build.

The tracer finds out the shape of a norm's, a linear layer's or a GELU's result by the arithmetic that makes up each, looks for
operands of the same shapes, which are formulas, in all that it has seen, and notes the lines of code that led to each operator
and the layout in memory of its result, which nobody reads. The optimiser tries every rule at every node. The exporter rebuilds
its registry of operators at each export, reads an operator's schema anew wherever it writes one, runs the program a second time
to see where dtypes of operands are unlike, and traces it a third time to decompose operators that it cannot write. Segments have
none of those but changes of dtype, which are rewritten here. All are internals of PyTorch and onnxscript: where these are not as
they are known here, or a program has an operator that is not, they are left to do as they do.
"""

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from onnxscript.rewriter import RewriteRule
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

__all__ = ["quick_export", "quick_trace"]

_EXPORTER = "torch.onnx._internal.exporter"
_ATEN = torch.ops.aten
_TO = {_ATEN.to.dtype: 1, _ATEN.to.device: 2}
"""Changes of dtype, and which argument is the dtype."""
_ALIKE = {
    "add.Tensor", "arange.default", "arange.start", "argmax.default", "cat.default", "chunk.default", "clamp.default",
    "conv2d.default", "cos.default", "div.Tensor", "dropout.default", "embedding.default", "eq.Scalar", "exp.default",
    "expand.default", "gelu.default", "group_norm.default", "index.Tensor", "layer_norm.default", "le.Tensor", "linear.default",
    "mul.Tensor", "pad.default", "reshape.default", "scaled_dot_product_attention.default", "sigmoid.default", "silu.default",
    "sin.default", "slice.Tensor", "sym_size.int", "transpose.int", "unsqueeze.default", "upsample_nearest2d.vec", "view.default",
}  # fmt: skip
"""Operators of ATen that the exporter writes as it would write what they decompose into: seen on Stable Diffusion's segments."""
_CHECKS = {_ATEN._assert_tensor_metadata.default, _ATEN.sym_constrain_range_for_size.default, _ATEN._assert_scalar.default}
"""The exporter takes them out itself."""
_LEFT = {*_TO, *_CHECKS}


def _group_norm(
    x: Tensor, weight: object, bias: object, rows: int, channels: int, positions: int, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors shaped as a group norm's results: its input, contiguous, and two numbers for each group."""
    numbers = x.new_empty((rows, groups))
    return torch.empty_like(x, memory_format=torch.contiguous_format), numbers, numbers


def _layer_norm(x: Tensor, shape: Sequence[int], *_: object) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors shaped as a layer norm's results: its input, and two numbers for each set normalised together."""
    numbers = x.new_empty((*x.shape[: x.ndim - len(shape)], *(1 for _ in shape)))
    return torch.empty_like(x, memory_format=torch.contiguous_format), numbers, numbers


def _gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """A tensor shaped as the result: its input."""
    return torch.empty_like(x)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A tensor shaped as a linear layer's result: (..., out features), contiguous."""
    if weight.ndim != 2 or x.ndim < 2:
        return _ATEN.linear.default.decompose(x, weight, bias)  # type: ignore[no-any-return]
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_SHAPES = {
    _ATEN.native_group_norm.default: _group_norm,
    _ATEN.native_layer_norm.default: _layer_norm,
    _ATEN.gelu.default: _gelu,
}


@contextmanager
def quick_trace() -> Iterator[None]:
    """Inside, ``torch.export.export`` of a module takes less time and gives the same program."""
    try:
        from torch._decomp import decomposition_table
        from torch._dynamo import config
        from torch.fx import config as recorded
        from torch.fx.experimental import proxy_tensor

        without_memory = config.patch(fake_tensor_cache_enabled=False)
        without_lines = patch.object(recorded, "do_not_emit_stack_traces", True, create=True)
        without_layout = patch.object(proxy_tensor, "_extract_tensor_metadata", lambda tensor: None, create=True)
        kernels, known = _ATEN.linear.default.py_kernels, _ATEN.linear.default._dispatch_cache
    except (ImportError, AttributeError):
        yield
        return
    composite = {torch._C.DispatchKey.CompositeImplicitAutograd: _linear}
    with without_memory, without_lines, without_layout, patch.dict(decomposition_table, _SHAPES), patch.dict(kernels, composite):
        known.clear()  # which kernel is called for which tensors
        try:
            yield
        finally:
            known.clear()


@contextmanager
def quick_export() -> Iterator[None]:
    """Inside, ``torch.onnx.export`` of an exported program takes half the time and writes the same graph."""
    try:
        from onnx_ir.schemas import OpSignature
        from torch.onnx._internal.exporter import _decomp, _fx_passes, _registration
        from torch.onnx._internal.fx.passes.type_promotion import TypePromotionTable, get_type_promotion_rule

        promote, rule_of = (
            _fx_passes.insert_type_promotion_nodes,
            functools.partial(get_type_promotion_rule, type_promotion_table=TypePromotionTable()),
        )
        decompose, implemented = _fx_passes.decompose_with_registry, _decomp.get_onnx_implemented_overloads
        registry, signature = _registration.ONNXRegistry.from_torchlib, OpSignature.from_op_schema
    except (ImportError, AttributeError):
        yield
        return
    with (
        patch(f"{_EXPORTER}._registration.ONNXRegistry.from_torchlib", functools.partial(_registry, registry)),
        patch(f"{_EXPORTER}._fx_passes.decompose_with_registry", functools.partial(_decomposed, decompose, implemented)),
        patch(f"{_EXPORTER}._fx_passes.insert_type_promotion_nodes", functools.partial(_promoted, promote, rule_of)),
        patch.object(OpSignature, "from_op_schema", functools.partial(_signature, signature)),
        patch.object(RewriteRule, "try_rewrite", _tried(RewriteRule.try_rewrite)),
    ):
        yield


def _tried(try_rewrite: Callable[..., Any]) -> Callable[..., Any]:
    """A rule of the optimiser, tried only at nodes of the operator that its pattern starts from."""
    known: dict[tuple[Any, str, str], bool] = {}

    def tried(rule: Any, model: Any, graph: Any, node: Any, **options: Any) -> Any:
        key = rule, node.op_type, node.domain
        if key not in known:
            known[key] = _starts_at(rule, node)
        return try_rewrite(rule, model, graph, node, **options) if known[key] else None

    return tried


def _starts_at(rule: Any, node: Any) -> bool:
    """Whether a node's operator is the first that a rule compares."""
    try:
        first = rule._target_pattern.output_nodes[0]
        return bool(first.op.matches(node.op_type) and first.domain.matches(node.domain))
    except AttributeError:
        return True


_REGISTRIES: dict[int | None, Any] = {}


def _registry(make: Callable[..., Any], opset_version: int | None = None) -> Any:
    """The exporter's registry of operators, made once in a process."""
    if opset_version not in _REGISTRIES:
        _REGISTRIES[opset_version] = make() if opset_version is None else make(opset_version=opset_version)
    return _REGISTRIES[opset_version]


_SIGNATURES: dict[tuple[str, str, int], Any] = {}


def _signature(read: Callable[[Any], Any], schema: Any) -> Any:
    """What an operator of ONNX takes and gives, read from its schema once in a process."""
    key = schema.domain, schema.name, schema.since_version
    if key not in _SIGNATURES:
        _SIGNATURES[key] = read(schema)
    return _SIGNATURES[key]


def _promoted(promote: Callable[[Any], None], rule_of: Callable[[Node], object], module: torch.fx.GraphModule) -> None:
    """Make what operators do to operands of unlike dtypes explicit, where there are such operators."""
    calls = [node for part in module.modules() for node in part.graph.nodes if node.op == "call_function"]  # type: ignore[union-attr]
    if not all(_is_of_one_dtype(node) for node in calls if rule_of(node)):
        promote(module)


def _is_of_one_dtype(node: Node) -> bool:
    """Whether all tensors of an operator, its result too, have one and the same floating dtype."""
    values = [other.meta.get("val") for other in (node, *node.all_input_nodes)]
    dtypes = {value.dtype for value in values if isinstance(value, Tensor)}
    return isinstance(values[0], Tensor) and len(dtypes) == 1 and dtypes.pop().is_floating_point


def _decomposed(
    decompose: Callable[..., ExportedProgram],
    implemented: Callable[..., list[Any]],
    program: ExportedProgram,
    registry: Any,
) -> ExportedProgram:
    """A program whose operators the exporter can write: with its changes of dtype rewritten, where that is all it takes."""
    known = set(implemented(registry))
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    if not all(node.target in _LEFT or (node.target in known and _is_alike(node)) for node in calls):
        return decompose(program, registry)
    module = copy.deepcopy(program.graph_module)
    for node in module.graph.nodes:
        if node.target in _TO:
            _rewrite(node)
    module.recompile()
    return ExportedProgram(
        root=module,
        graph=module.graph,
        graph_signature=program.graph_signature,
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )


def _is_alike(node: Node) -> bool:
    """Whether nothing of an operator has to be decomposed: it is arithmetic of sizes, or one of those known."""
    operator = node.target
    return not isinstance(operator, torch._ops.OpOverload) or (operator.namespace == "aten" and str(operator)[5:] in _ALIKE)


def _rewrite(node: Node) -> None:
    """A change of dtype, as the exporter knows it; the device is the CPU anyway."""
    position = _TO[node.target]  # type: ignore[index]
    dtype = node.args[position] if len(node.args) > position else node.kwargs.get("dtype")
    node.target, node.args, node.kwargs = _ATEN._to_copy.default, node.args[:1], {"dtype": dtype}
