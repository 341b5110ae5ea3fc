"""The stages of the GPU check, in the order of a first session on a card: what each does, and about how long it takes."""

from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Literal

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from benchmarks.gpu.card import LAYOUTS
from runtime.embedded import DEFAULT

__all__ = ["PARTS", "SPEED_SOURCE", "STAGES", "Stage", "show_stages", "too_long"]

SPEED_SOURCE = "random:sd15"
"""Whose speed is measured where no source is named: the size that people run."""
PARTS = {
    "segments": "each segment against the diffusers model",
    "plans": "time, memory and latents of each plan",
    "start": "the time from a second process' start to its pictures",
}
"""What a stage measures of an engine."""
_SMALL = frozenset({"mini", "emoji"})
_PACKAGES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_INSTEAD = (
    "make gpu-check does not install onnxruntime-gpu, whose files are those of onnxruntime, which this project's own tests need: "
    "to include it, give the check an environment of its own, in which it takes the other's place (docs/onnxruntime.md)"
)


@dataclass(frozen=True)
class Stage:
    """A stage. ``what`` says in words what it does; ``{source}`` and ``{precision}`` in it stand for those of a run.

    ``minutes`` are for an embedded model and for one of full size: guesses, for a recent card and 16 cores. What stages really
    take is written with what the check finds (``seconds``).
    """

    name: str
    minutes: tuple[float, float]
    what: str
    of: Literal["", "correct", "speed"] = ""
    """Whether it runs the source whose correctness or the one whose speed is looked at, if any."""
    engines: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    old_precision: bool = False

    def source(self, options: Namespace) -> str:
        """Whose weights it runs, if any's."""
        if not self.of:
            return ""
        return str(options.source or (SPEED_SOURCE if self.of == "speed" else DEFAULT))

    def precisions(self, options: Namespace) -> list[str]:
        """Speed is measured in the last of those that were asked for."""
        return options.precision[-1:] if self.of == "speed" else list(options.precision)

    def takes(self, options: Namespace) -> float:
        """Minutes."""
        return self.minutes[self.of != "" and self.source(options) not in _SMALL]

    def words(self, options: Namespace) -> str:
        """What it does in a run with these options."""
        return self.what.format(source=self.source(options), precision=" and ".join(self.precisions(options)))


_EVERY = ("torch", "tensorrt-rtx", "tensorrt", "onnxruntime")

STAGES = {
    stage.name: stage
    for stage in (
        Stage("driver", (2, 2), "the card and its driver; the tests marked gpu, the drills left out"),
        Stage(
            "correct", (3, 20), "{source} in {precision} on every engine: segments against the diffusers model, plans with and "
            "without graphs", "correct", _EVERY, ("segments", "plans"),
        ),
        Stage(
            "rtx", (1, 4), "{source} in {precision} on TensorRT-RTX, and on torch, whose latents are the reference: times, "
            "memory, kernels, a second process", "speed", ("torch", "tensorrt-rtx"), ("plans", "start"),
        ),
        Stage(
            "rtx-old", (1, 3), "the same on TensorRT-RTX with the old precision: casts to float32 round group norms",
            "speed", ("tensorrt-rtx",), ("plans", "start"), old_precision=True,
        ),
        Stage("tensorrt", (2, 8), "{source} in {precision} on TensorRT: as rtx", "speed", ("tensorrt",), ("plans", "start")),
        Stage(
            "baselines", (2, 4), "diffusers itself with {source} in half precision: eager, channels last, DeepCache, "
            "torch.compile",
            "speed",
        ),
        Stage(
            "layouts", (2, 6), "{source} in {precision} on torch and ONNX Runtime as they are and with options that are off: "
            "channels last, cuDNN's benchmark, NHWC", "speed", ("torch", "onnxruntime", *LAYOUTS), ("plans",),
        ),
        Stage("drills", (4, 4), "the tests of what goes wrong: a failed capture, no memory left, threads, 40 kinds of step"),
    )
}  # fmt: skip
"""By name, in their order."""


def too_long(stage: Stage, options: Namespace, began: float) -> str:
    """Why a stage is left out that would begin so many minutes after the check; nothing where it fits the budget."""
    takes, left = stage.takes(options), max(0.0, options.budget - began)
    if takes <= left:
        return ""
    return f"takes about {takes:g} minutes; left of the budget of {options.budget:g}: {left:.3g}"


def show_stages(console: Console, options: Namespace, stages: Iterable[Stage]) -> None:
    """Print the stages in their order, with about when each begins and how long it takes, and what would be left out."""
    table = Table(box=SIMPLE, title=f"{options.variant}, {options.steps} steps, plans {', '.join(options.plans)}")
    for name in ("stage", "from, min", "takes", "what it does"):
        table.add_column(name, justify="right" if name in {"from, min", "takes"} else "left", no_wrap=name == "stage")
    began, left_out = 0.0, {}
    for stage in stages:
        reason = too_long(stage, options, began)
        if reason:
            left_out[stage.name] = reason
        begins, takes = ("-" if reason else f"{began:g}"), stage.takes(options)
        table.add_row(stage.name, begins, f"{takes:g}", stage.words(options))
        began += 0 if reason else takes
    console.print(table)
    for name, reason in left_out.items():
        console.print(f"left out: {name}: {reason}", highlight=False)
    console.print(f"about {began:g} minutes of {options.budget:g}; nothing was built or run", highlight=False)
    for name in options.engines:
        if name in _PACKAGES and find_spec(_PACKAGES[name]) is None:
            console.print(f"engine {name} is not installed here and would be left out", highlight=False)
    if "onnxruntime" in options.engines and not _installed("onnxruntime-gpu"):
        console.print(f"engine onnxruntime has no CUDA here and would be left out on a card: {_INSTEAD}", highlight=False)


def _installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True
