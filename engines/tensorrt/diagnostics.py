"""Why an engine cannot be used here, and what mends it: something of the machine, or another build."""

from collections.abc import Sequence

from engines.errors import EngineError, EngineMemoryError, NeedsBuildError

__all__ = ["refusal"]

_OTHERWISE = {
    "old cuda driver": "update the NVIDIA driver",
    "old cuda runtime": "install newer CUDA libraries: pip install --upgrade tensorrt-rtx",
    "insufficient gpu memory": "free memory of the GPU, or build for smaller --sizes and --batch",
    "cuda error": "see that nvidia-smi works here, and install or update the NVIDIA driver",
}
"""By what TensorRT-RTX says is wrong; anything else is the engine's own fault, and it has to be built again."""
_LOGGED = {
    "CUDA driver version is insufficient": "old cuda driver",
    "out of memory": "insufficient gpu memory",
    "OutOfMemory": "insufficient gpu memory",
}
"""By what is logged where there are no diagnostics."""


def refusal(message: str, reasons: Sequence[str], *, up_to_date: bool) -> EngineError:
    """The error of an engine that cannot be used here: with what to do, or as one that another build can mend.

    Args:
        message: what happened.
        reasons: TensorRT-RTX's diagnostics in words, or what was logged.
        up_to_date: whether a build would keep the engine as it is.
    """
    remedies = dict.fromkeys(_OTHERWISE[kind] for kind in map(_kind, reasons) if kind in _OTHERWISE)
    if not remedies:
        return NeedsBuildError(message, up_to_date=up_to_date)
    kind = EngineMemoryError if "insufficient gpu memory" in map(_kind, reasons) else EngineError
    return kind(f"{message}; {'; '.join(remedies)}")


def _kind(reason: str) -> str:
    return next((kind for text, kind in _LOGGED.items() if text in reason), reason)
