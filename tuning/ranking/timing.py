"""How long a UNet's units take on the device that the UNet is on, by hooks on their modules.

On a processor with one thread (OMP_NUM_THREADS=1) seconds are the process's own, so that other programs on the machine don't
count; with more they are those of the clock on the wall. A GPU is waited for before its clock is read.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from tuning.checkpoints.configs import text_width
from tuning.surgery.units import unit_modules

__all__ = ["UnitTimes", "clock", "random_inputs", "time_together", "time_units"]

Inputs = tuple[Tensor, Tensor, Tensor]
Tick = Callable[[], None]


@dataclass(frozen=True)
class UnitTimes:
    """Medians over rounds: each unit's share of the UNet's time, how far the shares spread, and the UNet's seconds.

    A spread is the distance between the quartiles.
    """

    shares: dict[str, float]
    spreads: dict[str, float]
    seconds: float
    seconds_spread: float
    rounds: int


def clock(device: torch.device | None = None) -> Callable[[], float]:
    """The clock for work on this device (default: the processor), in seconds."""
    if device is not None and device.type == "cuda":

        def perf_counter_after_synchronize() -> float:
            torch.cuda.synchronize(device)
            return time.perf_counter()

        return perf_counter_after_synchronize
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def random_inputs(unet: UNet2DConditionModel, side: int, rows: int, tokens: int = 77) -> Inputs:
    """Noise of (rows, channels, side, side), one timestep, and text states (rows, tokens, width), on the UNet's device."""
    source = torch.Generator().manual_seed(0)
    latents = torch.randn((rows, unet.config.in_channels, side, side), generator=source)
    states = torch.randn((rows, tokens, text_width(unet.config)), generator=source)
    return latents.to(unet.device), torch.tensor(500, device=unet.device), states.to(unet.device)


@torch.no_grad()
def time_units(unet: UNet2DConditionModel, inputs: Inputs, rounds: int, tick: Tick = lambda: None) -> UnitTimes:
    """Time every unit in each of several rounds, after one that does not count."""
    taken: dict[str, list[float]] = {}
    whole = []
    for number in range(rounds + 1):
        seconds, units = _round(unet, inputs)
        if number:
            whole.append(seconds)
            for name, part in units.items():
                taken.setdefault(name, []).append(part / seconds)
        tick()
    shares = {name: statistics.median(parts) for name, parts in taken.items()}
    spreads = {name: _spread(parts) for name, parts in taken.items()}
    return UnitTimes(shares, spreads, statistics.median(whole), _spread(whole), rounds)


def _round(unet: UNet2DConditionModel, inputs: Inputs) -> tuple[float, dict[str, float]]:
    """Seconds of one forward pass, and of each unit in it."""
    units: dict[str, float] = {}
    now = clock(unet.device)
    with ExitStack() as stack:
        for name, path in unit_modules(unet).items():
            module = unet.get_submodule(path)
            before, after = _hooks(name, units, now)
            stack.callback(module.register_forward_pre_hook(before).remove)
            stack.callback(module.register_forward_hook(after).remove)
        start = now()
        unet(*inputs)
        return now() - start, units


def _hooks(name: str, units: dict[str, float], now: Callable[[], float]) -> tuple[Callable[..., None], Callable[..., None]]:
    def before(_module: nn.Module, _inputs: Any) -> None:
        units[name] = -now()

    def after(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        units[name] += now()

    return before, after


@torch.no_grad()
def time_together(unets: Sequence[UNet2DConditionModel], inputs: Inputs, rounds: int, tick: Tick = lambda: None) -> list[float]:
    """Seconds of each UNet on the same inputs, medians over rounds in which they take turns, after one that does not count."""
    taken: list[list[float]] = [[] for _ in unets]
    now = clock(unets[0].device)
    for _ in range(rounds + 1):
        for unet, seconds in zip(unets, taken, strict=True):
            start = now()
            unet(*inputs)
            seconds.append(now() - start)
        tick()
    return [statistics.median(seconds[1:]) for seconds in taken]


def _spread(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low
