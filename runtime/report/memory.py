"""Whether a request fits into memory, told before anything of its size is made."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from engines import Manifest
from engines.bundle.names import TEXT
from engines.support.pictures import MOST_PIXELS
from runtime.errors import RequestError
from runtime.plans.schedule import Schedule
from runtime.report.cost import feature_bytes, peak_bytes

__all__ = ["check_memory", "memory_bytes"]

_CGROUP = Path("/sys/fs/cgroup/memory.max")


def memory_bytes(device: torch.device) -> int:
    """All memory of a device; of a CPU that of the machine, or what a container may have of it."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(size, int(_CGROUP.read_text()))
    except (OSError, ValueError):  # no such limit
        return size


def check_memory(manifest: Manifest, device: torch.device, sizes: Mapping[str, int], schedule: Schedule | None = None) -> None:
    """Refuse what certainly takes more memory than there is: pictures, and with a schedule the features between segments.

    Args:
        manifest: of the bundle.
        device: where features are.
        sizes: values of ``batch``, ``images``, ``height`` and ``width`` (of latents).
        schedule: if it is known already.

    Raises:
        RequestError: says what would be needed at least.
    """
    scale = manifest.vae_scale
    pixels = sizes["height"] * scale * sizes["width"] * scale
    # Three colours, as the decoder gives them, as float32 on the host, and as bytes.
    pictures = sizes["images"] * pixels * 3 * (4 + 4 + 1)
    needed = max(pictures, 0 if schedule is None else peak_bytes(schedule, sizes))
    needed += feature_bytes(manifest, TEXT, sizes)
    have = memory_bytes(device)
    if needed > have or pixels > MOST_PIXELS:
        raise RequestError(
            f"{_short(sizes['images'])} image(s) of {_short(sizes['height'] * scale)}x{_short(sizes['width'] * scale)} take "
            f"at least {_short(needed // 2**30)} GiB of memory, and there are {have // 2**30} GiB; ask for fewer or smaller "
            f"ones, of at most {MOST_PIXELS // 10**6} million pixels"
        )


def _short(number: int) -> str:
    return str(number) if number < 10**15 else f"{float(number):.0e}" if number < 10**300 else "a number of hundreds of digits"
