"""Shared by all stages of the emoji training: clock, optimizer, averaged weights, checkpoints and log.

Nothing in it waits for the GPU between two lines of the log: a step's cost there is that of its kernels.
"""

import json
import pickle
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engines.support.files import atomic_file
from tuning.errors import TuningError

__all__ = ["Log", "Rates", "Run", "autocast", "due"]

_CLIP = 1.0


class Log:
    """Lines on the console and in a file, with the seconds since the start."""

    def __init__(self, path: Path, stage: str) -> None:
        self._path, self._stage, self._start = path, stage, time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, **figures: Any) -> None:
        """Writes one line."""
        row = {"stage": self._stage, "seconds": round(time.monotonic() - self._start, 1)} | figures
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 on a GPU, where the cache of cast weights would not outlive a recorded graph; and on a CPU that computes in it."""
    if device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16, cache_enabled=False)
    return torch.autocast("cpu", torch.bfloat16) if torch.cpu.get_capabilities().get("avx512_bf16") else nullcontext()


@dataclass(frozen=True)
class Rates:
    """Of AdamW: the learning rate, its warm-up in steps, its fall over the last share of the bound, weight decay; and of the
    averaged weights.
    """

    lr: float
    warmup: int = 100
    fall: float = 0.5
    weight_decay: float = 0.01
    average: float = 0.999


class Run:
    """One stage: resumes from its checkpoint where there is one, until its seconds or its steps are used up.

    Seconds are those on the clock, over all the times that it was started; on a CPU, which it may share with other work, they are
    the process's own. Raises TuningError for a damaged checkpoint.
    """

    def __init__(
        self,
        module: nn.Module,
        rates: Rates,
        checkpoint: Path,
        *,
        seconds: float,
        steps: int | None = None,
        save_seconds: float = 60,
    ) -> None:
        self.module, self.step, self._rates, self._checkpoint = module, 0, rates, checkpoint
        self._seconds, self._steps, self._save_seconds = seconds, steps, save_seconds
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        fused = self._parameters[0].device.type == "cuda"
        betas, decay = (0.9, 0.98), rates.weight_decay
        self._optimizer = torch.optim.AdamW(self._parameters, lr=rates.lr, betas=betas, weight_decay=decay, fused=fused)
        self._average = [p.detach().clone() for p in self._parameters]
        self._clock = time.monotonic if fused else time.process_time
        self._used = 0.0
        if checkpoint.exists():
            self._load()
        self._started, self._saved = self._clock(), time.monotonic()

    @property
    def used(self) -> float:
        """Seconds used up."""
        return self._used + self._clock() - self._started

    @property
    def progress(self) -> float:
        """0 to 1, and a little more at the end."""
        return self.step / self._steps if self._steps else self.used / self._seconds

    def steps(self) -> Iterator[float]:
        """The progress before each step, until the end; writes checkpoints in between and a last one."""
        while (progress := self.progress) < 1:
            yield progress
            self.step += 1
            if time.monotonic() - self._saved > self._save_seconds:
                self.save()
        self.save()

    def update(self, loss: Tensor) -> None:
        """One step down the loss's gradients, clipped; the averaged weights follow."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, _CLIP)
        fall = min(1.0, max(1e-3, (1 - self.progress) / self._rates.fall)) ** 1.5
        for group in self._optimizer.param_groups:
            group["lr"] = self._rates.lr * min(1.0, (self.step + 1) / self._rates.warmup) * fall
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        decay = min(self._rates.average, (2 + self.step) / (11 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self._average, [p.detach() for p in self._parameters], 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in the module, inside the context."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, value in zip(self._parameters, self._average, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(kept)

    def save(self) -> None:
        """Writes the checkpoint in one move."""
        self._checkpoint.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "module": self.module.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "average": self._average,
            "step": self.step,
            "used": self.used,
        }
        with atomic_file(self._checkpoint) as temporary:
            torch.save(state, temporary)
        self._saved = time.monotonic()

    def _load(self) -> None:
        try:
            state = torch.load(self._checkpoint, map_location="cpu", weights_only=True)
            self.module.load_state_dict(state["module"])
            self._optimizer.load_state_dict(state["optimizer"])
            for value, kept in zip(self._average, state["average"], strict=True):
                value.copy_(kept)
            self.step, self._used = int(state["step"]), float(state["used"])
        except (OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, pickle.UnpicklingError) as error:
            reason = str(error).strip().partition("\n")[0][:120]
            raise TuningError(
                f"{self._checkpoint} is no checkpoint of this stage ({reason}): delete it to start the stage anew"
            ) from error


def due(progress: float, marks: Sequence[float], done: set[float]) -> bool:
    """Whether one more of these shares of the bound is passed; notes that it is."""
    passed = {mark for mark in marks if progress >= mark} - done
    done |= passed
    return bool(passed)
