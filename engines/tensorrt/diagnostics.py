"""What to do about an engine that cannot be loaded here: the command to rebuild it only where that can help."""

from collections.abc import Iterable

__all__ = ["advise", "is_out_of_memory"]

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


def advise(reasons: Iterable[str], rebuild: str) -> str:
    """What to do.

    Args:
        reasons: TensorRT-RTX's diagnostics in words, or what was logged.
        rebuild: what to do where another engine has to be built.
    """
    advice = [_OTHERWISE[kind] for kind in map(_kind, reasons) if kind in _OTHERWISE]
    return "; ".join(dict.fromkeys(advice)) or rebuild


def is_out_of_memory(reasons: Iterable[str]) -> bool:
    """Whether it is the GPU's memory that does not suffice."""
    return "insufficient gpu memory" in map(_kind, reasons)


def _kind(reason: str) -> str:
    return next((kind for text, kind in _LOGGED.items() if text in reason), reason)
