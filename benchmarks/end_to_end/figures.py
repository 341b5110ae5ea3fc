"""Figures of each row, from the samples of a run."""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.end_to_end.measure import WARM_UP, Sample
from benchmarks.end_to_end.rows import Row, plan_name
from exporter.verification.verify import LEAST_PSNR

__all__ = ["LEAST_PSNR", "Figures", "fault", "figures_of"]

Figures = dict[str, Any]


def figures_of(rows: Sequence[Row], samples: Sequence[Sample], known: Mapping[Row, Figures], images: int = 1) -> list[Figures]:
    """A row of figures for each row: those that were measured, or the reason why there are none.

    Times are of a whole picture, text encoder and VAE included, unless they are named after a part. ``ratio`` compares a row with the
    base row's picture of the same round: the median, and the least and the most of all rounds. ``efficiency`` is the share of the time
    that MACs promise to save which was saved: the UNet's time as MACs foresee it, over the time that it took. ``overall`` is the ratio
    to the first engine's base row, for all rows: of another engine's it is the ratio to its own base row times that one's. ``fault``
    is what is wrong with a row's output, where something is.

    Args:
        rows: in their order.
        samples: of the run.
        known: what is known of rows without measuring: MACs, sizes, build times.
        images: that a call makes.
    """  # noqa: E501
    by_row: dict[tuple[str, str], list[Sample]] = defaultdict(list)
    for sample in samples:
        by_row[sample["row"], sample["engine"]].append(sample)
    loads = _loads(rows, by_row)
    first = next((row.engine for row in rows if row.is_base and not row.reason), "")
    found = [
        _figures(row, by_row[row.name, row.engine], by_row["original full", row.engine or first], loads) | known.get(row, {})
        for row in rows
    ]
    bases = {figures["engine"]: figures for figures in found if figures["name"] == "original full"}
    for row, figures in zip(rows, found, strict=True):
        base = bases.get(figures["engine"], {})
        whole, own, macs = base.get("unet_seconds"), figures.get("unet_seconds"), figures.get("macs_ratio")
        if versions := [sample["versions"] for sample in by_row[row.name, row.engine] if sample.get("versions")]:
            figures["versions"] = versions[-1]
        figures["efficiency"] = round(macs * whole / own, 3) if whole and own and macs else None
        if "ratio" in figures:
            figures["pictures_per_second"] = images / figures["p50"]
            scale = 1.0
            if row.engine not in {"", first}:
                scale = _ratios(_measured(by_row["original full", row.engine]), by_row["original full", first])[1]
            figures["overall"] = figures["ratio"] * scale
        if reason := fault(figures):
            figures["fault"] = reason
    return found


def _loads(rows: Sequence[Row], by_row: Mapping[tuple[str, str], Sequence[Sample]]) -> dict[tuple[str, str, str], list[float]]:
    """Of each subject, whose rows share a process, the seconds of all times that it was loaded as such."""
    loads: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for row in rows:
        loads[row.subject] += [one["load_seconds"] for one in by_row[row.name, row.engine] if "load_seconds" in one]
    return loads


def _figures(
    row: Row, samples: Sequence[Sample], base: Sequence[Sample], loads: Mapping[tuple[str, str, str], Sequence[float]]
) -> Figures:
    figures: Figures = {"name": row.name, "engine": row.engine or row.name, "variant": row.variant, "plan": plan_name(row.plan)}
    reasons = [row.reason, *(sample["error"] for sample in samples if "error" in sample)]
    if reason := next(filter(None, reasons), ""):
        return figures | {"reason": reason}
    measured = _measured(samples)
    if not measured:
        return figures | {"reason": "not measured"}
    first = [sample["seconds"] for sample in samples if "seconds" in sample and sample["round"] == WARM_UP]
    seconds = [sample["seconds"] for sample in measured]
    low, middle, high = (1.0, 1.0, 1.0) if row.is_base else _ratios(measured, base)
    psnr = [sample["psnr"] for sample in measured if sample["psnr"] is not None]
    reference = [sample["reference_psnr"] for sample in measured if sample.get("reference_psnr") is not None]
    deviations = [sample["deviation"] for sample in measured if "deviation" in sample]
    return figures | {
        "pictures": len(measured),
        "p50": statistics.median(seconds),
        "p95": float(np.percentile(seconds, 95)),
        "low": min(seconds),
        "high": max(seconds),
        "cpu_seconds": statistics.median(sample["cpu"] for sample in measured),
        "first_seconds": max(first, default=None),
        "load_seconds": statistics.median(loads[row.subject]) if loads[row.subject] else None,
        "text_seconds": statistics.median(sample["text"] for sample in measured),
        "vae_seconds": statistics.median(sample["vae"] for sample in measured),
        "unet_seconds": statistics.median(sum(value for _, value in sample["unet"]) for sample in measured),
        "steps": _kinds(measured),
        "ratio": middle,
        "ratio_low": low,
        "ratio_high": high,
        "psnr": statistics.mean(psnr) if psnr else None,
        "identical": len(psnr) < len(measured),
        "latents_error": float(np.max([sample["latents_error"] for sample in measured])),  # NaN where one is
        "reference_psnr": statistics.mean(reference) if reference else None,
        "deviation": float(np.max(deviations)) if deviations else None,
        "same_output": row.peer.same_output and row.plan == "full" and row.variant in {"", "original"},
        "peak_mb": max((sample["peak_mb"] for sample in measured if sample["peak_mb"]), default=None),
        "device_mb": max((sample["device_mb"] for sample in measured if sample["device_mb"]), default=None),
    }


def _measured(samples: Sequence[Sample]) -> list[Sample]:
    return [sample for sample in samples if "seconds" in sample and sample["round"] != WARM_UP]


def _ratios(measured: Sequence[Sample], base: Sequence[Sample]) -> tuple[float, float, float]:
    """Low, median and high of how many times as fast as the base row's picture just before it, given that row's samples."""
    ratios = []
    for sample in measured:
        before = [one for one in _measured(base) if one["round"] == sample["round"] and one["at"] <= sample["at"]]
        if before:
            ratios.append(max(before, key=lambda one: one["at"])["seconds"] / sample["seconds"])
    return (min(ratios), statistics.median(ratios), max(ratios)) if ratios else (float("nan"),) * 3


def _kinds(measured: Sequence[Sample]) -> dict[str, dict[str, float]]:
    """By kind of step: how many there are in a picture, and the median of their seconds."""
    times: dict[str, list[float]] = defaultdict(list)
    for sample in measured:
        for kind, seconds in sample["unet"]:
            times[kind].append(seconds)
    return {kind: {"count": len(values) // len(measured), "seconds": statistics.median(values)} for kind, values in times.items()}


def fault(figures: Figures) -> str:
    """What is wrong with a row's output: it is further off than ``verify`` allows of final latents; nothing where it is right.

    A peer that claims the output of ``original full`` is held to it; every engine's ``full`` to the first engine's.
    """
    most = 10 ** (-LEAST_PSNR / 20)
    error, deviation = figures.get("latents_error"), figures.get("deviation")
    if figures.get("same_output") and error is not None and not error <= most:  # what is no number is not within it either
        return f"not the output of original full: latents are off by {error:.2g} of their largest, verify allows {most:.2g}"
    if deviation is not None and not deviation <= most:
        return f"not the output of the first engine: latents are off by {deviation:.2g} of their range, verify allows {most:.2g}"
    return ""
