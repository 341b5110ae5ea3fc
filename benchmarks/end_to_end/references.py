"""What the first engine of a run draws in full: the reference that every other engine's pictures are held to.

An engine that is compared with nothing but itself may draw anything. The reference is kept on disk for each variant and seed, so
that the rows of other processes, and a run that goes on with --resume, are compared with the same.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.end_to_end.rows import Row
from benchmarks.peers import OURS
from engines.support.files import atomic_file

__all__ = ["References", "pixel_psnr"]

Arrays = Mapping[str, Any]
"""``latents`` (images, channels, height, width) and ``pictures`` (images, height, width, 3)."""


class References:
    """The pictures of a run's first engine under ``full``.

    Args:
        folder: where they are kept.
        name: of the run.
        first: the base row of the first engine; None where there is none, and nothing is compared.
        resume: whether those of an earlier run of the same settings are taken; otherwise they are removed.
    """

    def __init__(self, folder: Path, name: str, first: Row | None, *, resume: bool) -> None:
        self._folder, self._name, self._first = folder, name, first
        if not resume:
            for path in folder.glob(f"reference-{name}-*.npz"):
                path.unlink()

    def keep(self, row: Row, seed: int, made: Arrays) -> None:
        """Save a picture if it is the first engine's in full, the first of its variant and seed."""
        path = self._path(row.variant, seed)
        if self._first is None or not _is_whole(row) or row.engine != self._first.engine or path.exists():
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            np.savez(temporary, latents=made["latents"], pictures=made["pictures"])

    def compare(self, row: Row, seed: int, made: Arrays) -> dict[str, float | None]:
        """How far a picture is from the reference.

        Returns:
            ``reference_psnr``: PSNR in dB of pixels to those of ``original full``, None where they are the same; left out where
            there is no reference. ``deviation``, of other engines' ``full``: the root mean square of the latents' difference to
            the same variant's reference, relative to the reference's range (``verify`` gives it in dB); NaN where there is
            none.
        """
        found: dict[str, float | None] = {}
        if self._first is None:
            return found
        if (original := self._of("original", seed)) is not None:
            found["reference_psnr"] = pixel_psnr(made["pictures"], original["pictures"])
        if _is_whole(row) and row.engine != self._first.engine:
            found["deviation"] = _deviation(made["latents"], self._of(row.variant, seed))
        return found

    def _of(self, variant: str, seed: int) -> Arrays | None:
        path = self._path(variant, seed)
        if not path.exists():
            return None
        with np.load(path) as file:
            return {name: file[name] for name in ("latents", "pictures")}

    def _path(self, variant: str, seed: int) -> Path:
        return self._folder / f"reference-{self._name}-{variant}-{seed}.npz"


def _is_whole(row: Row) -> bool:
    return row.peer is OURS and row.plan == "full"


def _deviation(latents: Any, reference: Arrays | None) -> float:
    import torch

    from exporter.verification.metrics import psnr

    if reference is None or latents.shape != reference["latents"].shape:
        return float("nan")
    ratio = psnr(torch.from_numpy(latents), torch.from_numpy(reference["latents"]))
    return float(np.float64(10) ** (-ratio / 20))


def pixel_psnr(made: Any, wanted: Any) -> float | None:
    """PSNR in dB of pictures of 8 bits: None where they are the same, NaN where they are of different shapes."""
    a, b = (pictures.astype(np.float64) for pictures in (made, wanted))
    error = float(((a - b) ** 2).mean()) if a.shape == b.shape else float("nan")
    return float(10 * np.log10(255**2 / error)) if error else None
