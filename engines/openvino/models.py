"""A segment's models in OpenVINO: one for each length of the text, since only then attention is computed rightly."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engines.bundle.manifest import Feature
from engines.openvino.waves import WAVE, split_waves

__all__ = ["LENGTHS", "Model", "Models"]

LENGTHS = 3
"""Lengths of text whose models a segment keeps at a time; each holds the segment's weights once more."""


class Model:
    """A compiled model, with the one that makes its waves where there is one, and its requests that are idle.

    ``taken`` and ``made`` are the features that it reads and makes.
    """

    def __init__(self, compiled: Any, waves: Any | None) -> None:
        self._compiled, self._waves = compiled, waves
        self._idle: list[tuple[Any, Any]] = []
        self.taken_by_waves = frozenset() if waves is None else _names(waves.inputs)
        self.taken_by_rest = frozenset(name for name in _names(compiled.inputs) if not name.startswith(WAVE))
        self.taken = self.taken_by_waves | self.taken_by_rest
        self.made = _names(compiled.outputs)

    def request(self) -> tuple[Any, Any]:
        """A request of the model that no other thread has, and one of its waves' model or None; give them back by ``put``.

        One that is used again need not learn its shapes again. It keeps no tensor alive: all that it reads or writes is set anew.
        """
        try:
            return self._idle.pop()
        except IndexError:
            return self._compiled.create_infer_request(), None if self._waves is None else self._waves.create_infer_request()

    def put(self, requests: tuple[Any, Any]) -> None:
        """Give requests back."""
        self._idle.append(requests)


class Models:
    """A segment's ONNX file, and the models compiled of it so far.

    Args:
        core: an ``openvino.Core``.
        path: the ONNX file.
        features: what the segment reads and makes, by name.
        options: those of a compiled model that computes in ``f32`` or ``bf16``.
        rounds: whether the segment computes in bfloat16.

    Raises:
        RuntimeError: OpenVINO refuses the file.
    """

    def __init__(
        self, core: Any, path: Path, features: Mapping[str, Feature], options: Callable[[str], dict[str, Any]], *, rounds: bool
    ) -> None:
        self._core, self._options, self._precision = core, options, "bf16" if rounds else "f32"
        self._graph = core.read_model(str(path))
        made_before = split_waves(self._graph) if rounds else None
        self._waves = None if made_before is None else core.compile_model(made_before, "CPU", options("f32"))
        self._axes = {name: axes for name in sorted(_names(self._graph.inputs)) if (axes := _text_axes(features.get(name)))}
        self._kept: OrderedDict[int, Model] = OrderedDict()
        self._lock = threading.Lock()

    def of_length(self, tokens: int) -> Model:
        """The model for a text of so many tokens; one for all of a segment that reads no text."""
        length = tokens if self._axes else 0
        with self._lock:
            if length not in self._kept:
                self._kept[length] = self._compiled(length)
            self._kept.move_to_end(length)
            if len(self._kept) > LENGTHS:
                self._kept.popitem(last=False)
            return self._kept[length]

    def _compiled(self, length: int) -> Model:
        shapes = {}
        for name, axes in self._axes.items():
            shape = self._graph.input(name).get_partial_shape()
            for axis in axes:
                shape[axis] = length
            shapes[name] = shape
        if shapes:
            self._graph.reshape(shapes)
        return Model(self._core.compile_model(self._graph, "CPU", self._options(self._precision)), self._waves)


def _text_axes(feature: Feature | None) -> list[int]:
    """The dimensions that are the text's length."""
    return [] if feature is None else [axis for axis, dim in enumerate(feature.shape) if str(dim).startswith("tokens")]


def _names(ports: Any) -> frozenset[str]:
    return frozenset(port.get_any_name() for port in ports)
