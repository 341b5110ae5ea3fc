"""The bundle on disk, and the engines that compile and run its segments.

Engines are named in one table, one class each; the packages behind them are imported when an engine is made.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from engines.support.environment import check_environment

check_environment()  # before the first import that fails without it

from engines.errors import BundleError, EngineError, NeedsBuildError, UserError
from engines.lazy import lazy_names

if TYPE_CHECKING:
    from engines.base import DTYPES, Engine, Profile, Runner, Traced
    from engines.bundle.folder import Bundle
    from engines.bundle.manifest import Manifest, Segment, Unit
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "engines.base": ("DTYPES", "Engine", "Profile", "Runner", "Traced"),
            "engines.bundle.folder": ("Bundle",),
            "engines.bundle.manifest": ("Manifest", "Segment", "Unit"),
        },
    )

__all__ = [
    "DTYPES",
    "ENGINES",
    "ON_ONNX",
    "Bundle",
    "BundleError",
    "Engine",
    "EngineError",
    "Manifest",
    "NeedsBuildError",
    "Profile",
    "Runner",
    "Segment",
    "Traced",
    "Unit",
    "UserError",
    "make_engine",
]

ENGINES = {
    "onnxruntime": "engines.ort.engine:OnnxRuntime",
    "openvino": "engines.openvino.engine:OpenVINO",
    "openvino-bf16": "engines.openvino.engine:OpenVINOBfloat16",
    "tensorrt": "engines.tensorrt.engine:TensorRT",
    "tensorrt-rtx": "engines.tensorrt.engine:TensorRTRTX",
    "torch": "engines.torch_program:Torch",
    "null": "engines.null:Null",
}

ON_ONNX = ("onnxruntime", "openvino", "openvino-bf16")
"""Those that run the ONNX files of any bundle."""


def engine_class(name: str) -> type[Engine]:
    """The class of the engine of that name; raises EngineError where there is none."""
    if name not in ENGINES:
        from engines.support.spelling import did_you_mean

        raise EngineError(f"unknown engine {name!r}; {did_you_mean(name, ENGINES)}choose from: {', '.join(ENGINES)}")
    module, _, attribute = ENGINES[name].partition(":")
    found: type[Engine] = getattr(import_module(module), attribute)
    return found


def make_engine(name: str) -> Engine:
    """The engine of that name.

    Raises:
        EngineError: there is none, or the package it needs is not installed.
    """
    return engine_class(name)()
