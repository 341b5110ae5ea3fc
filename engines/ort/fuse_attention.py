"""Attention as one operator, for ONNX Runtime: ``com.microsoft.MultiHeadAttention`` in place of what attention is traced into.

Below opset 23 a scaled dot product attention is a dozen operators, which write the score of every query with every key.
ONNX Runtime has one operator for all of them, which goes through the keys block by block (FlashAttention, arXiv 2205.14135) and
keeps no scores. No other engine knows it, so the graph that has it is a copy, with the weights of the file that was traced.

https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MultiHeadAttention
"""

import math
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript.rewriter import pattern

__all__ = ["fuse_attention"]


def fuse_attention(path: Path, copy: Path) -> int:
    """Write a copy of an ONNX file whose attentions are one operator each; no file is written where there is none to fuse.

    An attention with a mask stays as it is. Only the graph is read: the copy refers to the same file of weights.

    Args:
        path: an ONNX file as ``exporter.segments.trace`` writes it.
        copy: in the same folder, because ONNX Runtime reads weights from no other.

    Returns:
        How many attentions were fused.
    """
    model = ir.load(path)
    # The sizes in the pattern are computed from values inside it: both go when nothing reads them any more.
    fused = pattern.RewriteRule(_traced, _fused, _is_known, remove_nodes=False).apply_to_model(model)
    if fused:
        RemoveUnusedNodesPass()(model)
        ir.save(model, copy)
    return int(fused)


def _traced(op: Any, query: Any, key: Any, value: Any, query_factor: Any, key_factor: Any, score_factor: Any) -> Any:
    """The pattern that torch exports ``scaled_dot_product_attention`` as: projections (batch, tokens, channels) in and out.

    In half precision the softmax is computed in single precision, between two casts, and the scores are multiplied there by what
    queries and keys were divided by.
    """
    flat = op.Reshape(_heads(op, key, "keys"), pattern.ANY_VALUE)
    turned = op.Reshape(op.Transpose(flat, perm=[0, 2, 1]), pattern.ANY_VALUE)
    scores = op.MatMul(op.Mul(_heads(op, query, "queries"), query_factor), op.Mul(turned, key_factor))
    wide = op.Cast(scores)
    weights = op.Softmax(pattern.OrValue([op.Mul(wide, score_factor), wide, scores]), axis=-1)
    mixed = op.MatMul(pattern.OrValue([op.Cast(weights), weights]), _heads(op, value, "values"))
    return op.Reshape(op.Transpose(mixed, perm=[0, 2, 1, 3]), pattern.ANY_VALUE)


def _heads(op: Any, projected: Any, name: str) -> Any:
    """(batch, tokens, channels) -> (batch, heads, tokens, channels of a head)."""
    return op.Transpose(op.Reshape(projected, pattern.ANY_VALUE), perm=[0, 2, 1, 3], _outputs=[name])


def _is_known(_context: Any, queries: ir.Value, query_factor: ir.Value, key_factor: ir.Value, **_rest: Any) -> bool:
    """Whether the graph says how many heads there are, and the scale."""
    return _number_of_heads(queries) is not None and None not in {_constant(query_factor), _constant(key_factor)}


def _fused(
    op: Any, query: ir.Value, key: ir.Value, value: ir.Value, queries: ir.Value, query_factor: ir.Value, key_factor: ir.Value,
    score_factor: ir.Value | None = None, **_rest: Any,
) -> Any:  # fmt: skip
    factors = [query_factor, key_factor, *([] if score_factor is None else [score_factor])]
    scale = math.prod(_constant(factor) or 0.0 for factor in factors)  # the first two multiply by the scale's square root
    heads = _number_of_heads(queries)
    return op.MultiHeadAttention(query, key, value, num_heads=heads, scale=scale, _domain="com.microsoft")


def _number_of_heads(queries: ir.Value) -> int | None:
    heads = queries.shape[1] if queries.shape is not None else None
    return heads if isinstance(heads, int) else None


def _constant(value: ir.Value) -> float | None:
    """A number that the graph itself holds."""
    tensor = value.const_value
    return float(tensor.numpy().item()) if tensor is not None and tensor.size == 1 else None
