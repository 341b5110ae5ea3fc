"""The process's own settings change nothing, and a fork of a process that has loaded a bundle is told so."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from engines import EngineError
from engines.bundle.shapes import resolve
from exporter.segments.trace import trace_program
from runtime import Pipeline
from runtime.images.schedulers import SCHEDULERS
from runtime.process import check_not_forked, plain_settings
from tests.support.diffusers_pipelines import PROMPT, inputs
from tests.support.unets import live_network, manifest_of, segment_module, small_unet

DTYPES = (torch.float16, torch.bfloat16, torch.float64)


@pytest.fixture
def settings() -> Iterator[None]:
    """Whatever a test sets is put back."""
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
    torch.set_default_device(None)


def made(pipeline: Pipeline, kind: str, scheduler: str) -> torch.Tensor:
    return pipeline.generate(PROMPT, seed=3, steps=3, scheduler=scheduler, plan="deepcache:2", **inputs(kind)).latents


@pytest.mark.parametrize("scheduler", [*SCHEDULERS, "tcd", "unipc"])
def test_the_default_dtype_and_device_change_nothing(mini_pipeline: Pipeline, settings: None, scheduler: str) -> None:
    kinds = ("text", "image", "inpaint") if scheduler in {"ddim", "dpm++"} else ("inpaint",)
    for kind in kinds:
        expected = made(mini_pipeline, kind, scheduler)
        for dtype in DTYPES:
            torch.set_default_dtype(dtype)
            got = made(mini_pipeline, kind, scheduler)
            torch.set_default_dtype(torch.float32)
            assert got.dtype == torch.float32
            assert torch.equal(got, expected), (kind, dtype)
        torch.set_default_device("meta")
        got = made(mini_pipeline, kind, scheduler)
        torch.set_default_device(None)
        assert torch.equal(got, expected), kind
        with torch.device("meta"):
            assert torch.equal(made(mini_pipeline, kind, scheduler), expected)


def test_the_default_dtype_is_put_back_by_the_last_of_several_calls(settings: None) -> None:
    torch.set_default_dtype(torch.float64)
    with ExitStack() as first, ExitStack() as second:
        first.enter_context(plain_settings())
        second.enter_context(plain_settings())
        first.close()
        assert torch.get_default_dtype() == torch.float32
        second.close()
        assert torch.get_default_dtype() == torch.float64
    with pytest.raises(KeyError), plain_settings():
        raise KeyError
    assert torch.get_default_dtype() == torch.float64


@pytest.mark.parametrize("scheduler", ["unipc", "deis", "dpm++"])
def test_autocast_changes_nothing(mini_pipeline: Pipeline, scheduler: str) -> None:
    """UniPC's steps are products of matrices, which autocast would compute in half precision."""
    expected = made(mini_pipeline, "text", scheduler)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(made(mini_pipeline, "text", scheduler), expected)
        assert torch.is_autocast_enabled("cpu")


def test_autocast_changes_no_live_segment_and_no_trace() -> None:
    unet = small_unet("two stages")
    manifest = manifest_of(unet)
    segment = manifest.segment("stem")
    runner, sizes = live_network(unet, manifest).runners["stem"], {"batch": 1, "height": 8, "width": 8}
    inputs = {name: torch.ones(resolve(manifest.features[name].shape, sizes)) for name in segment.inputs}
    expected = runner.run(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = runner.run(inputs)
        program = trace_program(segment, segment_module(unet, manifest, segment), manifest.features, 4)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not [node for node in program.graph.nodes if "bfloat16" in str(node.args)]


def test_the_device_is_put_back(mini_pipeline: Pipeline, settings: None) -> None:
    torch.set_default_device("meta")
    mini_pipeline.generate(PROMPT, steps=1, scheduler="ddim")
    assert torch.get_default_device().type == "meta"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_after_loading_is_a_clear_error(mini_pipeline: Pipeline) -> None:
    check_not_forked()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        answer: Any = b"it ran"
        try:
            mini_pipeline.generate(PROMPT, steps=1)
        except EngineError as error:
            answer = str(error).encode()
        finally:
            os.write(writing, answer)
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as stream:
        message = stream.read()
    assert f"this process ({child}) was forked from one that had loaded a bundle ({os.getpid()})" in message
    assert "spawn" in message
