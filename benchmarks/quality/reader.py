"""`python -m benchmarks.quality.reader [train|check]`: trains the network reader, or states the accuracy of both readers."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from rich.console import Console
from torch import Tensor, nn

from benchmarks.machine import write_results
from benchmarks.quality.table import show
from engines.support.cli import run_command
from engines.support.extras import need
from engines.support.files import check_writable
from tuning.mini.autoencoder import reconstruct
from tuning.mini.data import batch, to_bytes
from tuning.mini.reader_network import IGNORED, ReaderNetwork, labels, load, read_batch, save
from tuning.mini.reader_rules import read
from tuning.mini.reader_score import asked_of, judge, shares
from tuning.mini.scenes import Scene

RESULTS = Path("benchmarks/results/readers.json")


def _soiled(pictures: Tensor, source: torch.Generator) -> Tensor:
    """Noise and a blur of random strength, so that the network also reads pictures that no renderer made."""
    n = len(pictures)
    blurred = nn.functional.avg_pool2d(nn.functional.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    mix = torch.rand(n, 1, 1, 1, generator=source) * 0.7
    noise = torch.randn(pictures.shape, generator=source) * torch.rand(n, 1, 1, 1, generator=source) * 0.08
    return pictures + mix * (blurred - pictures) + noise


def train(steps: int, size: int = 128) -> ReaderNetwork:
    """Trains on rendered pictures of training scenes; all randomness follows from the step number."""
    torch.manual_seed(0)
    network = ReaderNetwork()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    console = Console(stderr=True)
    for step in range(steps):
        scenes, _, pictures = batch(size, f"reader {step}")
        wanted, scores = labels(scenes), network(_soiled(pictures, torch.Generator().manual_seed(step)))
        losses = [nn.functional.cross_entropy(scores[n], wanted[n], ignore_index=IGNORED) for n in scores]
        loss = torch.stack([value for value in losses if value.isfinite()]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            console.print(f"step {step + 1} of {steps}  loss {float(loss.detach()):.4f}", highlight=False)
    return network.eval()


def _accuracy(scenes: list[Scene], pictures: Tensor) -> dict[str, dict[str, float]]:
    """Both readers' accuracy on pictures of these scenes."""
    asked = [asked_of(scene) for scene in scenes]
    rules = [read(picture) for picture in to_bytes(pictures)]
    network = [seen for part in pictures.split(256) for seen in read_batch(part)]
    return {
        "rules": shares(judge(a, s) for a, s in zip(asked, rules, strict=True)),
        "network": shares(judge(a, s) for a, s in zip(asked, network, strict=True)),
    }


def check(count: int, model: Path) -> dict[str, dict[str, float]]:
    """Accuracy on rendered held-back scenes, and on what the embedded autoencoder makes of them: the model's ceiling."""
    scenes, _, pictures = batch(count, "reader check", held=True)
    vae = AutoencoderKL.from_pretrained(model / "vae", torch_dtype=torch.float32).eval()
    again = reconstruct(vae, pictures)
    rendered, rebuilt = _accuracy(scenes, pictures), _accuracy(scenes, again)
    return {f"{name}, rendered": values for name, values in rendered.items()} | {
        f"{name}, reconstructed": values for name, values in rebuilt.items()
    }


def main(arguments: Sequence[str]) -> None:
    """Runs the command. Raises UserError where what it needs is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.reader", description=__doc__)
    parser.add_argument("action", nargs="?", default="check", choices=("train", "check"))
    parser.add_argument("--steps", type=int, default=800, help="training steps of 128 pictures (default: 800)")
    parser.add_argument("--count", type=int, default=1000, help="pictures to check on (default: 1000)")
    parser.add_argument("--model", type=Path, default=Path("models/mini"), help="whose autoencoder to check with")
    args = parser.parse_args(arguments)
    need("scipy", "drawing and reading pictures")
    check_writable(RESULTS.parent)
    if args.action == "train":
        started = time.process_time()
        save(train(args.steps))
        print(f"{time.process_time() - started:.0f} s of CPU time")
        load.cache_clear()
    figures = check(args.count, args.model)
    show("What the readers get right", figures)
    write_results(RESULTS, {"count": args.count, "accuracy": figures})


if __name__ == "__main__":
    run_command(main)
