"""Distillation as a training: batches of latents, the three losses, validation figures and sample pictures."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from tuning.distillation.losses import DistillLoss
from tuning.surgery.recipes import LossWeights
from tuning.training.distributed import Workers
from tuning.training.noising import Batch, Noising, generator
from tuning.training.sampling import sample
from tuning.training.teacher import Teacher

__all__ = ["Distillation", "Examples"]

_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Examples(Protocol):
    """Training data: scaled latents (n, c, h, w) and the ids of their captions (n, length)."""

    def draw(self, step: int) -> tuple[Tensor, Tensor]:
        """The batch of this process at `step`."""

    def validation(self) -> tuple[Tensor, Tensor]:
        """Examples that training never sees."""


class Distillation:
    """Teaches a student to do what the teacher does; all on the workers' device."""

    def __init__(
        self,
        teacher: Teacher,
        student: UNet2DConditionModel,
        weights: LossWeights,
        examples: Examples,
        workers: Workers,
        *,
        name: str = "distill",
        dropout: float = 0.1,
        seed: int = 0,
        first: int = 0,
        checkpointing: bool = False,
        measure: Callable[[UNet2DConditionModel], dict[str, float]] | None = None,
    ) -> None:
        """`measure` adds figures of its own to validation; `first` batches were drawn in trainings before this one.

        Raises TuningError for a student of another kind.
        """
        self.name = name
        self._losses = DistillLoss(teacher.unet, student, weights)
        # What only answers questions needs no more than the precision that is computed in.
        teacher.unet.to(workers.device, _DTYPES[workers.mixed], memory_format=torch.channels_last)
        teacher.text.to(workers.device)
        teacher.vae.to(workers.device, memory_format=torch.channels_last)
        student.to(workers.device, memory_format=torch.channels_last)
        if checkpointing:
            student.enable_gradient_checkpointing()
        self.module: nn.Module = student.train().requires_grad_(True)
        self._teacher, self._student, self._examples, self._workers = teacher, student, examples, workers
        self._seed, self._first, self._measure = seed, first, measure
        empty = teacher.ids([""])[0]
        self._noising = Noising(teacher.schedule, workers, empty=empty, dropout=dropout, seed=seed)

    def _distil(self, drawn: Batch) -> dict[str, Tensor]:
        with self._workers.autocast():
            return self._losses(drawn.noisy, drawn.timesteps, self._teacher.states(drawn.tokens), drawn.target)

    def loss(self, step: int, progress: float) -> dict[str, Tensor]:
        """Noise, output and feature losses of one batch."""
        step += self._first
        # A student's own dropout draws from the global generator.
        torch.manual_seed(generator(self._seed, step, self._workers.rank).initial_seed())
        return self._distil(self._noising.batch(*self._examples.draw(step), step))

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The losses on held-back examples at fixed noise, and what else is measured."""
        latents, tokens = self._examples.validation()
        totals: dict[str, float] = {}
        self._student.eval()
        part = 128 if latents[0].numel() <= 1024 else 4
        for at in range(0, len(latents), part):
            drawn = self._noising.fixed(latents[at : at + part], tokens[at : at + part], at)
            for name, value in self._distil(drawn).items():
                totals[f"valid_{name}"] = totals.get(f"valid_{name}", 0.0) + float(value) * len(drawn.noisy) / len(latents)
        totals |= self._measure(self._student) if self._measure else {}
        self._student.train()
        return totals

    def pictures(self, prompts: Sequence[str], *, guidance: float, size: int) -> Tensor:
        """Pictures (n, 3, size, size) in [-1, 1] that the student draws, the same noise at every call."""
        self._student.eval()
        how = {"guidance": guidance, "size": size}
        with self._workers.autocast():
            drawn = [sample(self._student, self._teacher, [p], seed=i, **how) for i, p in enumerate(prompts)]  # type: ignore[arg-type]
        self._student.train()
        return torch.cat(drawn).float().cpu()

    def export(self) -> None:
        """Nothing: the student is written when it is done."""
