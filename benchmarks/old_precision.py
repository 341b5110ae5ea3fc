"""What earlier versions computed in float32 in half-precision graphs, for comparisons with the graphs that builds write now."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from exporter.segments import precision

__all__ = ["OLD_WIDE", "write_wide"]

OLD_WIDE = precision.WIDE | {"InstanceNormalization"}
"""Operators that had casts to float32 round them: group norms too, which are instance norms in ONNX below opset 21."""


@contextmanager
def write_wide(operators: frozenset[str]) -> Iterator[None]:
    """Inside it, this process writes half-precision graphs with casts to float32 round these operators (names of ONNX)."""
    with patch.object(precision, "WIDE", operators):
        yield
