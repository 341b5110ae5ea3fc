"""What a user may have got wrong, found before anything is built, installed or measured."""

from argparse import ArgumentTypeError
from collections import Counter
from collections.abc import Sequence

from benchmarks.end_to_end.rows import plan_name
from engines import ENGINES
from engines.errors import UserError

__all__ = ["check_engines_named", "check_plans", "check_targets", "names"]

_RTX = "tensorrt-rtx"


def names(text: str) -> tuple[str, ...]:
    """The names that an option lists, each once. Raises ArgumentTypeError where one is empty."""
    found = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    if "" in found:
        raise ArgumentTypeError(f"{text!r:.60} has an empty name; write names with commas between them, such as a,b")
    return found


def check_engines_named(engines: Sequence[str]) -> None:
    """Raise UserError for an engine that is unknown, or that draws nothing."""
    allowed = [name for name in ENGINES if name != "null"]
    if "null" in engines:
        raise UserError(f"engine null computes nothing that can be compared; choose from: {', '.join(allowed)}")
    if unknown := [name for name in engines if name not in allowed]:
        raise UserError(f"unknown engine {unknown[0]!r}; choose from: {', '.join(allowed)}")


def check_plans(plans: Sequence[str], variants: Sequence[str]) -> None:
    """Raise UserError for a plan that is none, that runs a UNet of no variant named, or that has another's name."""
    from runtime import find_plan

    for plan in plans:
        if missing := [part.unet for part in find_plan(plan).unets if part.unet not in variants]:
            raise UserError(
                f"plan {plan} runs the UNet {missing[0]}; name it too: --variants {','.join([*variants, missing[0]])}"
            )
    twice = [name for name, count in Counter(map(plan_name, plans)).items() if count > 1]
    if twice:
        raise UserError(f"two plans are called {twice[0]}, and rows are named after them; rename one of the files")


def check_targets(targets: Sequence[str], engines: Sequence[str], device: str) -> None:
    """Raise UserError for targets that no engine of the run is built for, or that TensorRT-RTX does not know."""
    if not targets:
        return
    given = ",".join(targets)
    if device == "cpu":
        raise UserError(f"--targets {given} are cards, and --device cpu is none; leave one of the two out")
    if _RTX not in engines:
        raise UserError(
            f"--targets {given}: engine {', '.join(engines)} takes none; add {_RTX} with --engine, or leave --targets out"
        )
    from engines.tensorrt.engine import TensorRTRTX

    allowed = TensorRTRTX.targets_allowed
    if unknown := [target for target in targets if target not in allowed]:
        raise UserError(
            f"unknown target {unknown[0]!r}; choose from: {', '.join(allowed)} (sm86 is compute capability 8.6: "
            "https://developer.nvidia.com/cuda-gpus)"
        )
