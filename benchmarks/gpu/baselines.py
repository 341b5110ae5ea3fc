"""Diffusers' own pipeline on the card at hand, in half precision: as it is, channels last, compiled, and with DeepCache.

It has the weights of the same source as the bundles and the same scheduler, prompt, size and steps. Results go to ``--out``,
again after each way, so that one which takes too long loses nothing.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.plan_runs import PROMPT
from benchmarks.machine import results_file
from engines.support.cli import Parser, parse_size, run_command
from engines.support.files import write_text
from exporter.graph.checkpoint import open_source
from runtime.images.schedulers import make_scheduler

__all__ = ["WAYS", "main", "measure_apart", "source_pipeline"]

DEEPCACHE_EVERY = 3
"""As the plan deepcache:3."""


def source_pipeline(source: str, variant: str, device: torch.device, dtype: torch.dtype, steps: int) -> Any:
    """Diffusers' pipeline with a source's weights, and the scheduler that our own measurements have."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTokenizer

    checkpoint = open_source(source, variant)
    parts = {"unet": checkpoint.unet(variant), "vae": checkpoint.vae(), "text_encoder": checkpoint.text_encoder()}
    pipeline = StableDiffusionPipeline(
        **{name: module.eval().to(device, dtype) for name, module in parts.items()},
        tokenizer=CLIPTokenizer.from_pretrained(checkpoint.folder / "tokenizer", local_files_only=True),
        scheduler=make_scheduler("dpm++", checkpoint.folder / "scheduler", steps),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class _Clock:
    """The time of a module's calls, on its device."""

    def __init__(self, module: torch.nn.Module, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []
        module.register_forward_pre_hook(self._mark, with_kwargs=True)
        module.register_forward_hook(self._mark)

    def _mark(self, *given: object) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def take(self) -> float:
        """Milliseconds of all calls since the last taking."""
        if self._cuda:
            torch.cuda.synchronize()
        pairs = list(zip(self._marks[::2], self._marks[1::2], strict=True))
        self._marks.clear()
        return sum(a.elapsed_time(b) if self._cuda else 1000 * (b - a) for a, b in pairs)


def _eager(pipeline: Any) -> None:
    """As it is."""


def _channels_last(pipeline: Any) -> None:
    for part in (pipeline.unet, pipeline.vae):
        part.to(memory_format=torch.channels_last)


def _compiled(pipeline: Any) -> None:
    _channels_last(pipeline)
    pipeline.unet.forward = torch.compile(pipeline.unet.forward, mode="reduce-overhead", fullgraph=True, dynamic=False)


def _deepcache(pipeline: Any) -> Callable[[], None]:
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe=pipeline)
    helper.set_params(cache_interval=DEEPCACHE_EVERY, cache_branch_id=0)
    helper.enable()
    return helper.disable


WAYS: dict[str, Callable[[Any], Callable[[], None] | None]] = {
    "eager": _eager,
    f"eager, DeepCache {DEEPCACHE_EVERY}": _deepcache,
    "channels_last": _channels_last,
    f"channels_last, DeepCache {DEEPCACHE_EVERY}": _deepcache,
    "compiled": _compiled,
}
"""In this order, each on the same pipeline as the one before left it."""
_COMPILED = "compiled"


def _measure(name: str, pipeline: Any, clock: _Clock, options: argparse.Namespace) -> dict[str, object]:
    height, width = options.size or (None, None)
    call = partial(pipeline, PROMPT, num_inference_steps=options.steps, height=height, width=width, guidance_scale=7.5)
    undo = WAYS[name](pipeline)
    unet, whole = [], []
    for round_ in range(options.rounds + 1):
        if round_ == 1 and options.after:
            _wait_for(options.after)
        started = time.perf_counter()
        call(generator=torch.Generator().manual_seed(1))  # its pictures are on the host
        whole.append(time.perf_counter() - started)
        unet.append(clock.take())
    if undo is not None:
        undo()
    return {
        "name": name,
        "first_seconds": round(whole[0], 3),
        "milliseconds": round(statistics.median(unet[1:]), 3),
        "picture_seconds": round(statistics.median(whole[1:]), 5),
        "steps": options.steps,
    }


def measure_apart(check: argparse.Namespace, source: str, compiled: bool, found: list[Any]) -> None:
    """Measure in a process of its own, for the GPU check: all ways but the compiled one, or that.

    Args:
        check: the check's options.
        source: whose weights.
        compiled: which.
        found: what is measured is added to it, also where the process then fails.

    Raises:
        subprocess.SubprocessError: it took too long, or failed.
    """
    out = Path(check.work) / f"baselines{'-compiled' * compiled}.json"
    command = [sys.executable, "-m", "benchmarks.gpu.baselines", "--source", source, "--variant", check.variant]
    command += ["--device", check.device, "--steps", str(check.steps), "--rounds", str(check.rounds), "--out", str(out)]
    command += ["--size", "x".join(map(str, check.size))] if check.size else []
    out.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    try:
        subprocess.run([*command, *(["--compiled"] if compiled else [])], timeout=300, check=True)
    finally:
        if out.exists():
            found += json.loads(out.read_text())


def _wait_for(path: Path, most: float = 240) -> None:
    """Until a file is there: what compiles beside something else must not be timed beside it."""
    deadline = time.monotonic() + most
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.5)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m benchmarks.gpu.baselines", description=__doc__)
    parser.add_argument("--source", default="random:sd15")
    parser.add_argument("--variant", default="original")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", type=parse_size, help="size of the picture (default: the model's own)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--compiled", action="store_true", help="measure the compiled UNet alone, for it takes a minute to compile"
    )
    parser.add_argument("--after", type=Path, help="time nothing before this file is there")
    parser.add_argument("--out", type=results_file, required=True, help="the JSON file to write")
    return parser.parse_args(arguments)


@torch.no_grad()
def main(arguments: Sequence[str]) -> None:
    """Measure and write; a way that fails says why, and the others go on."""
    options = _parse(arguments)
    device = torch.device(options.device)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    pipeline = source_pipeline(options.source, options.variant, device, dtype, options.steps)
    clock, found = _Clock(pipeline.unet, device), list[dict[str, object]]()
    for name in WAYS:
        if options.compiled != (name == _COMPILED):
            continue
        try:
            found.append(_measure(name, pipeline, clock, options))
        except Exception as error:
            found.append({"name": name, "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})
        print(json.dumps(found[-1]), flush=True)
        write_text(options.out, json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    run_command(main)
