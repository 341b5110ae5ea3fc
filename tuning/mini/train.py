"""`python -m tuning.mini.train`: trains `mini`, stage by stage, and resumes what was killed.

With several processes: `OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m tuning.mini.train`.
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler

from tuning.checkpoints.folder import save_part
from tuning.errors import TuningError
from tuning.mini.autoencoder import AutoencoderTask, whiten
from tuning.mini.data import batch
from tuning.mini.diffusion import DiffusionTask
from tuning.mini.latents import LatentPools
from tuning.mini.models import load_tokenizer, new_text_encoder, new_unet, new_vae, save_shell, scheduler
from tuning.mini.settings import STAGES, MiniSettings
from tuning.training.distributed import Workers
from tuning.training.loop import Task, run_loop
from tuning.training.noising import Noising
from tuning.training.teacher import Teacher

__all__ = ["main", "run_stage"]


def _vae_after(folder: Path, stage: str) -> AutoencoderKL:
    path = folder / stage
    if not path.exists():
        raise TuningError(f"{path} is missing: run the stages before this one first (--stage {stage})")
    vae: AutoencoderKL = AutoencoderKL.from_pretrained(path, torch_dtype=torch.float32)
    return vae.eval()


def _task(stage: str, settings: MiniSettings, out: Path, runs: Path, workers: Workers) -> Task:
    torch.manual_seed(settings.seed)
    if stage == "vae":
        vae = new_vae(settings.vae_widths)
        return AutoencoderTask(vae, settings.vae_batch, out, workers, validation=settings.validation)
    if stage == "decoder":
        vae = _vae_after(runs, "vae")
        size, count = settings.vae_batch, settings.validation
        return AutoencoderTask(vae, size, out, workers, decoder_only=True, validation=count)
    if stage == "diffusion":
        return _diffusion(settings, out, runs, workers)
    raise TuningError(f"there is no stage {stage!r}; the stages are {', '.join(STAGES)}")


def _diffusion(settings: MiniSettings, out: Path, runs: Path, workers: Workers) -> Task:
    vae, tokenizer = _vae_after(runs, "vae"), load_tokenizer(out / "tokenizer")
    unet = new_unet(settings.unet_widths, settings.text_width)
    text = new_text_encoder(tokenizer, settings.text_width, settings.text_layers)
    schedule = DDPMScheduler.from_config(scheduler().config)
    model = Teacher("mini", unet, text, tokenizer, vae, schedule)
    pools = LatentPools(
        vae,
        tokenizer,
        workers,
        size=settings.pool,
        epochs=settings.pool_epochs,
        batch_size=settings.batch,
        seed=settings.seed,
        validation=settings.validation,
    )
    empty = model.ids([""])[0]
    noising = Noising(schedule, workers, empty=empty, dropout=settings.caption_dropout, seed=settings.seed)
    return DiffusionTask(model, pools, noising, out, workers, prompts=settings.prompts)


def _finish(stage: str, task: Any, out: Path, runs: Path) -> None:
    """Writes what the next stage reads, in full precision."""
    if stage == "vae":
        whiten(task.module, batch(2048, "whiten")[2])
        save_part(task.module, out / "vae")
    if stage == "diffusion":
        save_part(task.module["text"], runs / "text", torch.float32)
        save_part(task.module["unet"], runs / stage, torch.float32)
    else:
        save_part(task.module, runs / stage, torch.float32)


def run_stage(stage: str, settings: MiniSettings, out: Path, runs: Path, workers: Workers) -> dict[str, float]:
    """Trains one stage to its bound, or resumes it, leaving weights in `out` and working files in `runs`."""
    if (runs / stage).exists():
        return {}
    task = _task(stage, settings, out, runs, workers)
    log = out / "training" / f"{stage}.jsonl"
    checkpoint = runs / f"{stage}.pt"
    figures = run_loop(task, settings.stages[stage], workers=workers, checkpoint=checkpoint, log=log)
    if workers.first:
        _finish(stage, task, out, runs)
    workers.wait()
    return figures or {}


def _settings(args: argparse.Namespace) -> MiniSettings:
    settings = MiniSettings.load(args.settings) if args.settings else MiniSettings()
    bounds = {"steps": args.steps, "minutes": args.minutes, "wall_minutes": args.wall_minutes}
    if any(value is not None for value in bounds.values()):
        stages = {n: dataclasses.replace(s, **bounds) if n in args.stage else s for n, s in settings.stages.items()}
        settings = dataclasses.replace(settings, stages=stages)
    return settings


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tuning.mini.train", description=__doc__)
    parser.add_argument("--stage", nargs="+", default=list(STAGES), choices=STAGES, help="default: all, in order")
    parser.add_argument("--out", type=Path, default=Path("models/mini"), help="the model folder (default: models/mini)")
    parser.add_argument("--runs", type=Path, default=Path("runs/mini"), help="checkpoints (default: runs/mini)")
    parser.add_argument("--settings", type=Path, help="settings as JSON; default: the committed recipe")
    parser.add_argument("--steps", type=int, help="bound of the named stages in steps")
    parser.add_argument("--minutes", type=float, help="... in CPU minutes of each process")
    parser.add_argument("--wall-minutes", type=float, help="... in minutes on the clock")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    args = _arguments(argv)
    workers = Workers()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    try:
        settings = _settings(args)
        if workers.first:
            settings.save(args.out / "training" / "settings.json")
            if not (args.out / "model_index.json").exists():
                save_shell(args.out)
        workers.wait()
        for stage in args.stage:
            run_stage(stage, settings, args.out, args.runs, workers)
    except TuningError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        workers.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
