"""`python -m tuning distill`: a teacher, a student and data in; the student's UNet out."""

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from tuning.assembly import assemble
from tuning.distill_options import fill_defaults, loop_settings, remember
from tuning.distill_task import Distillation, Examples
from tuning.errors import TuningError
from tuning.folder import load_unet, save_part
from tuning.loop import run_loop
from tuning.mini.render import IMAGE_SIZE
from tuning.mini.scenes import held_back_prompts
from tuning.recipes import LossWeights, recipe
from tuning.teacher import Teacher
from tuning.workers import Workers

__all__ = ["run"]

_GRID = 16  # sample pictures


class _Distill(Distillation):
    """Draws the run's curves where others would write their weights."""

    def __init__(self, run: Path, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._run = run

    def export(self) -> None:
        """Draws the curves so far."""
        from tuning.curves import draw_curves

        draw_curves(self._run / "metrics.jsonl", self._run / "curves.png")


def _student(option: str, teacher: UNet2DConditionModel) -> tuple[UNet2DConditionModel, LossWeights]:
    """The student and its losses' weights."""
    path = Path(option).expanduser()
    if path.is_dir():
        return load_unet(path), LossWeights()
    if path.is_file() and path.suffix != ".json":
        raise TuningError(f"student {option} is a file; give a recipe, or the folder of a UNet with safetensors")
    chosen = recipe(option)
    return assemble(teacher, chosen), chosen.loss


def _examples(options: argparse.Namespace, teacher: Teacher, workers: Workers) -> tuple[Examples, int]:
    """The data, and the side of its pictures in pixels."""
    if options.data != "mini":
        from tuning.examples import open_examples

        limits = {"size": options.size, "batch": options.batch, "validation": options.validation, "seed": options.seed}
        return open_examples(options.data, teacher, workers, **limits)
    from tuning.mini.latents import LatentPools

    sizes = {"size": options.pool, "epochs": 4, "batch_size": options.batch, "validation": options.validation}
    return LatentPools(teacher.vae, teacher.tokenizer, workers, seed=options.seed, name="distill", **sizes), IMAGE_SIZE


def _prompts(options: argparse.Namespace, teacher: Teacher, examples: Examples) -> list[str]:
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


def _measure(options: argparse.Namespace, teacher: Teacher) -> Callable[[UNet2DConditionModel], dict[str, float]] | None:
    """What the rule reader reads in pictures of held-back prompts, for the embedded model's data."""
    if options.data != "mini":
        return None
    from tuning.mini.sampling import accuracy

    return functools.partial(accuracy, model=teacher, count=min(64, options.validation))


def _check_out(options: argparse.Namespace) -> None:
    """Nothing that is read may be written over."""
    for name in ("teacher", "student", "data"):
        read = Path(getattr(options, name)).expanduser()
        taken = {read.resolve(), (read / "unet").resolve()} if read.is_dir() else set()
        if options.out.resolve() in taken:
            raise TuningError(f"--out {options.out} is where the {name} is read from; choose another folder")


def run(options: argparse.Namespace) -> None:
    """Runs the command.

    Raises TuningError for a user's mistake. Of several processes the first alone raises what all of them find out before
    they train; the others leave with exit code 2.
    """
    fill_defaults(options)
    workers = Workers(options.mixed)
    try:
        try:
            task, folder, grid = _prepared(options, workers)
        except TuningError:
            if workers.first:
                raise
            sys.exit(2)
        figures = run_loop(
            task,
            loop_settings(options),
            workers=workers,
            checkpoint=folder / "checkpoint.pt",
            log=folder / "metrics.jsonl",
            stop_at=(lambda step: step >= options.pause_at) if options.pause_at else None,
            sample=grid,
        )
        if figures:
            save_part(task.module, options.out, torch.float16 if options.precision == "fp16" else torch.float32)
        workers.wait()
    finally:
        workers.close()


def _prepared(options: argparse.Namespace, workers: Workers) -> tuple[Distillation, Path, Callable[[int], None]]:
    """The training, the folder of what it leaves beside the UNet, and what draws sample pictures at a step."""
    _check_out(options)
    folder: Path = options.work or options.out / "training"
    remember(options, folder, workers.count, write=False)
    torch.manual_seed(options.seed)
    teacher = Teacher.load(options.teacher)
    student, weights = _student(options.student, teacher.unet)
    examples, size = _examples(options, teacher, workers)
    task = _Distill(
        folder,
        teacher=teacher,
        student=student,
        weights=weights,
        examples=examples,
        workers=workers,
        dropout=options.dropout,
        seed=options.seed,
        checkpointing=options.gradient_checkpointing,
        measure=_measure(options, teacher),
    )
    prompts = _prompts(options, teacher, examples)
    remember(options, folder, workers.count, write=workers.first)

    def grid(step: int) -> None:
        from tuning.curves import write_grid

        pictures = task.pictures(prompts, guidance=options.guidance, size=size)
        write_grid(pictures, folder / "samples" / f"step_{step:06}.png")

    return task, folder, grid
