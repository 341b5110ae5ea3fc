"""`python -m tuning distill`: a teacher, a student and data in; the student's UNet out."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from engines.support.files import expanded, remove_partials
from tuning.checkpoints.find_source import check_apart, named_path
from tuning.checkpoints.folder import load_unet, save_part
from tuning.distillation.losses import check_pair
from tuning.distillation.options import DistillOptions, remember
from tuning.distillation.progressive import next_removal, share_of, stages_of
from tuning.distillation.task import Distillation, Examples
from tuning.errors import TuningError
from tuning.loras.lora import Lora
from tuning.loras.note import describe, write_note
from tuning.mini.render import IMAGE_SIZE
from tuning.mini.scenes import held_back_prompts
from tuning.surgery.assembly import assemble
from tuning.surgery.recipes import Recipe, recipe
from tuning.training.distributed import Workers
from tuning.training.extras import need
from tuning.training.loop import run_loop
from tuning.training.state import steps_in
from tuning.training.teacher import Teacher

__all__ = ["run"]

_GRID = 16  # sample pictures


class _Distill(Distillation):
    """Draws the run's curves where others would write their weights."""

    def __init__(self, run: Path, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._run = run

    def export(self) -> None:
        """Draws the curves so far."""
        from tuning.training.curves import draw_curves

        draw_curves(self._run / "metrics.jsonl", self._run / "curves.png")


def _student(option: str, teacher: UNet2DConditionModel) -> tuple[Recipe, UNet2DConditionModel]:
    """The student to begin with, and the recipe that it follows; a UNet's folder is a recipe that removes nothing."""
    path = expanded(option)
    if path.is_dir():
        return Recipe(name=path.name or "student"), load_unet(path)
    if path.is_file() and path.suffix != ".json":
        raise TuningError(f"student {option} is a file; give a recipe, or the folder of a UNet with safetensors")
    chosen = recipe(option)
    return chosen, assemble(teacher, next_removal(teacher, teacher, chosen, 0))


def _examples(options: DistillOptions, teacher: Teacher, workers: Workers) -> tuple[Examples, int]:
    """The data, and the side of its pictures in pixels."""
    if options.data != "mini":
        from tuning.distillation.examples import open_examples

        return open_examples(
            options.data, teacher, workers,
            size=options.size, batch=options.batch, validation=options.validation, seed=options.seed,
        )  # fmt: skip
    need("scipy", "--data mini")
    from tuning.mini.latents import LatentPools

    sizes = {"size": options.pool, "epochs": 4, "batch_size": options.batch, "validation": options.validation}
    return LatentPools(teacher.vae, teacher.tokenizer, workers, seed=options.seed, name="distill", **sizes), IMAGE_SIZE


def _prompts(options: DistillOptions, teacher: Teacher, examples: Examples) -> list[str]:
    """Prompts of sample pictures: those of the file, or captions of examples held back."""
    if options.prompts is None:
        if options.data == "mini":
            return held_back_prompts(_GRID, 1)
        texts: list[str] = teacher.tokenizer.batch_decode(examples.validation()[1][:_GRID], skip_special_tokens=True)
        return texts
    try:
        prompts = [line.strip() for line in options.prompts.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise TuningError(f"prompts {options.prompts} cannot be read ({error}); give a text file, a prompt per line") from error
    if not prompts:
        raise TuningError(f"prompts {options.prompts} is empty; write a prompt per line")
    return prompts


def _measure(options: DistillOptions, teacher: Teacher) -> Callable[[UNet2DConditionModel], dict[str, float]] | None:
    """Reads pictures of held-back prompts with the rule reader, for `mini`'s data; None for other data."""
    if options.data != "mini":
        return None
    from tuning.mini.reader_score import accuracy

    return functools.partial(accuracy, model=teacher, count=min(64, options.validation))


def _check_out(options: DistillOptions) -> None:
    """Nothing that is read may be written over."""
    check_apart(options.out, named_path(options.teacher), "teacher")
    for name in ("student", "data"):
        check_apart(options.out, expanded(getattr(options, name)), name)


def run(options: DistillOptions) -> None:
    """Runs the command.

    Raises TuningError for a user's mistake. Of several processes the first alone raises what all of them find out before
    they train; the others leave with exit code 2.
    """
    workers = Workers(options.mixed)
    try:
        try:
            work = _Run(options, workers)
        except TuningError:
            if workers.first:
                raise
            sys.exit(2)
        work.train()
        workers.wait()
    finally:
        workers.close()


class _Run:
    """One command: what is read once, and a training for each portion of the recipe."""

    def __init__(self, options: DistillOptions, workers: Workers) -> None:
        self.options, self.workers = options, workers
        self.folder: Path = options.work or options.out / "training"
        _check_out(options)
        need("matplotlib", "drawing curves")
        remember(options, self.folder, workers.count, write=False)
        torch.manual_seed(options.seed)
        self.loras = [Lora.parse(text) for text in options.loras]
        self.teacher = Teacher.load(options.teacher, options.variant_files, self.loras, options.vae)
        self.recipe, student = _student(options.student, self.teacher.unet)
        self.stages = stages_of(self.recipe)
        check_pair(self.teacher.unet, student)
        self.first = student
        self.examples, self.size = _examples(options, self.teacher, workers)
        self.teacher.vae.to(workers.device)
        self.prompts = _prompts(options, self.teacher, self.examples)
        remember(options, self.folder, workers.count, write=workers.first)

    def train(self) -> None:
        """Trains stage after stage, passing over those that an earlier run has done, and writes the student of the last."""
        if self.workers.first:
            remove_partials(self.folder)  # what a run that was killed has left of pictures and logs
        student, batches = self.first, 0
        for stage in range(self.stages):
            last = stage == self.stages - 1
            folder = self.folder if last else self.folder / f"stage_{stage + 1}"
            if last or not (folder / "unet" / "config.json").is_file():
                task = self._task(student, stage, batches, folder)
                if self._loop(task, stage, folder) is None:
                    return
                if self.workers.first:
                    half = last and self.options.precision == "fp16"
                    write_note(self.options.out if last else folder / "unet", describe(self.loras))
                    save_part(
                        task.module, self.options.out if last else folder / "unet", torch.float16 if half else torch.float32
                    )
                self.workers.wait()
            if not last:
                batches += self.options.accumulate * steps_in(folder / "checkpoint.pt")
                student = load_unet(folder / "unet")
                student = assemble(student, next_removal(self.teacher.unet, student, self.recipe, stage + 1))

    def _task(self, student: UNet2DConditionModel, stage: int, batches: int, folder: Path) -> _Distill:
        """The training of one portion, after others that drew so many batches."""
        options = self.options
        return _Distill(
            folder,
            teacher=self.teacher,
            student=student,
            weights=self.recipe.loss,
            examples=self.examples,
            workers=self.workers,
            name="distill" if self.stages == 1 else f"distill {stage + 1} of {self.stages}",
            dropout=options.dropout,
            seed=options.seed,
            first=batches,
            checkpointing=options.gradient_checkpointing,
            measure=_measure(options, self.teacher),
        )

    def _loop(self, task: _Distill, stage: int, folder: Path) -> dict[str, float] | None:
        pause: int | None = self.options.pause_at

        def grid(step: int) -> None:
            from tuning.training.curves import write_grid

            pictures = task.pictures(self.prompts, guidance=self.options.guidance, size=self.size)
            write_grid(pictures, folder / "samples" / f"step_{step:06}.png")

        return run_loop(
            task,
            share_of(self.options.loop, stage, self.stages),
            workers=self.workers,
            checkpoint=folder / "checkpoint.pt",
            log=folder / "metrics.jsonl",
            stop_at=None if pause is None else lambda step: step >= pause,
            sample=grid,
            measure_first=True,
        )
