"""Calls that are broken off leave nothing behind, and many calls take no more than one."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engines import Bundle, make_engine
from engines.ort.engine import OnnxRuntime
from engines.ort.engine import _ArrayRunner as OnnxRuntimeRunner
from runtime import Pipeline, StepRecord, UNet, diffusers_unet
from tests.support.diffusers_pipelines import PROMPT, mask, picture


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_a_callback_raises_ends_the_call_and_nothing_else(mini_pipeline: Pipeline, error: type[BaseException]) -> None:
    options: dict[str, Any] = {"steps": 4, "plan": "deepcache:2", "image": picture(), "mask": mask()}
    before = mini_pipeline.generate(PROMPT, **options)

    def stop(record: StepRecord, latents: Tensor) -> None:
        if record.index == 1:
            raise error("enough")

    with pytest.raises(error, match="enough"):
        mini_pipeline.generate("a green ring", callback=stop, **options)
    assert torch.equal(mini_pipeline.generate(PROMPT, **options).latents, before.latents)


class Learning(OnnxRuntime):
    """What it has compiled is lost unless it is written down, which may fail."""

    def __init__(self) -> None:
        super().__init__()
        self.written = 0
        self.disk_is_full = False

    def flush(self) -> None:
        self.written += 1
        if self.disk_is_full:
            raise OSError("no space left")


@pytest.mark.parametrize("disk_is_full", [False, True])
def test_what_was_compiled_is_kept_where_a_call_breaks_off(mini_bundle: Bundle, disk_is_full: bool) -> None:
    """The process may end with it. What is raised is the call's own error, whatever becomes of the rest."""
    engine = Learning()
    pipeline = Pipeline(mini_bundle, engine)

    def stop(record: StepRecord, latents: Tensor) -> None:
        raise KeyboardInterrupt

    pipeline.generate(PROMPT, steps=2)
    assert engine.written == 1, "once for a call"
    engine.disk_is_full = disk_is_full
    with pytest.raises(KeyboardInterrupt):
        pipeline.generate(PROMPT, steps=2, callback=stop)
    assert engine.written == 2


def test_a_step_of_a_loop_of_ones_own_that_fails(mini_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Learning()
    monkeypatch.setattr(diffusers_unet, "load", lambda *given: Pipeline(mini_bundle, engine))
    unet = UNet()
    sample, text = torch.randn(1, 4, 8, 8), torch.randn(1, 32, unet.config.cross_attention_dim)
    first, second, *_ = torch.tensor([900.0, 500.0, 100.0])
    unet(sample, first, text)
    assert engine.written == 0
    monkeypatch.setattr(OnnxRuntimeRunner, "_run_impl", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        unet(sample, second, text)
    assert engine.written == 1


def usage() -> tuple[int, int, int]:
    """Resident kilobytes, threads and open files of this process."""
    gc.collect()
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]), threading.active_count(), len(os.listdir("/proc/self/fd"))


def check_flat(pipeline: Pipeline, calls: int, warm: int, allowed_kilobytes: int) -> None:
    """After ``warm`` calls nothing grows, whatever plan, scheduler, size and task comes, and though calls are broken off."""

    def call(number: int) -> None:
        options: dict[str, Any] = {"steps": 2, "seed": number, "scheduler": ("ddim", "dpm++", "heun", "pndm")[number % 4]}
        options["plan"] = ("full", "deepcache:2", "block:2", "adaptive:0.1")[number // 4 % 4]
        if number % 3 == 0:
            options |= {"image": picture(), "mask": mask()}
        if number % 5 == 0:

            def stop(record: StepRecord, latents: Tensor) -> None:
                raise InterruptedError

            with pytest.raises(InterruptedError):
                pipeline.generate(PROMPT, callback=stop, **options)
        else:
            pipeline.generate(PROMPT, width=64 * (1 + number % 2) if number % 3 else None, **options)

    for number in range(warm):
        call(number)
    memory, threads, files = usage()
    for number in range(warm, calls):
        call(number)
    after = usage()
    assert after[1:] == (threads, files)
    assert after[0] - memory <= allowed_kilobytes


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_many_calls_take_no_more_memory_threads_or_files(mini_bundle: Bundle) -> None:
    check_flat(Pipeline(mini_bundle, make_engine("null")), calls=120, warm=60, allowed_kilobytes=8_000)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_three_hundred_calls_take_no_more_memory_threads_or_files(mini_pipeline: Pipeline) -> None:
    # The allocator keeps what it had once; 300 calls that each left their latents and features would be 60 MB and more.
    check_flat(mini_pipeline, calls=300, warm=60, allowed_kilobytes=24_000)
