"""`python -m tuning latents`: a folder of pictures in, a folder of latents out, for many passes of distillation."""

from dataclasses import dataclass
from pathlib import Path

from engines.support.cli import Parser
from engines.support.files import expanded
from tuning.distillation.options import number

__all__ = ["LatentsOptions", "add_arguments", "run"]


@dataclass(frozen=True)
class LatentsOptions:
    """Whose autoencoder encodes which pictures, at how many pixels a side (None: the model's), and where latents go."""

    source: str
    data: str
    out: Path
    size: int | None = None
    batch: int = 8
    variant_files: str | None = None
    vae: str | None = None


def add_arguments(parser: Parser) -> None:
    """Adds the arguments of `latents`."""
    add, whole = parser.add_argument, number(int, 1)
    add("--source", required=True, help="model whose autoencoder and tokenizer to use: mini, a diffusers folder, hub id or file")
    add("--variant-files", help="variant of the weight files to read, such as fp16 (default: those without)")
    add("--vae", help="a VAE instead of the source's; give distill the same")
    parser.refuse("--lora", "it changes neither latents nor tokens; leave it out here, and give it to distill")
    add("--data", required=True, help="a folder of pictures and metadata.jsonl, or .tar shards")
    add("--out", type=Path, required=True, help="folder for the latents")
    add("--size", type=whole, help="pixels of the pictures' sides (default: the model's)")
    add("--batch", type=whole, default=8, help="pictures at a time (default: %(default)s)")


def run(options: LatentsOptions) -> None:
    """Runs the command. Raises TuningError for a user's mistake."""
    import torch
    from rich.console import Console

    from tuning.distillation.examples import check_size
    from tuning.distillation.latents import write_latents
    from tuning.distillation.pictures import Pictures
    from tuning.training.distributed import Workers
    from tuning.training.teacher import Teacher

    workers = Workers()
    try:
        teacher = Teacher.load(options.source, options.variant_files, vae=options.vae)
        size, pictures = check_size(teacher, options.size), Pictures(expanded(options.data))
        teacher.vae.to(workers.device, memory_format=torch.channels_last)
        console, count = Console(stderr=True), len(pictures.captions)

        def progress(done: int) -> None:
            console.print(f"latents: {done} of {count} pictures by process {workers.rank}", highlight=False)

        write_latents(
            pictures, teacher, options.out, workers, data=options.data, size=size, batch=options.batch, progress=progress
        )
    finally:
        workers.close()
