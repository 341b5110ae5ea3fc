"""Whether PyTorch can reach a GPU."""

import torch

__all__ = ["missing_gpu"]


def missing_gpu() -> str:
    """Why there is no GPU to run on, in words; empty where there is one."""
    if torch.cuda.is_available():
        return ""
    return "PyTorch finds none" if torch.version.cuda else f"PyTorch {torch.__version__} is built without CUDA"
