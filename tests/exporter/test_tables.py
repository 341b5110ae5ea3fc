"""What a build says of its precision: that TensorRT fuses halves only, and how a VAE that overflows in them is found."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from engines import Bundle
from engines.bundle.manifest import Compiled
from exporter.__main__ import _parser
from exporter.tables import show_built


def as_built(bundle: Bundle, *engines: str, onnx: bool = True, **options: object) -> Bundle:
    """The bundle as if it had been built for these engines, with these options."""
    made = {name: Compiled(files=(), version="1.0") for name in engines}
    segments = tuple(
        segment.model_copy(update={"engines": made, "onnx": segment.onnx if onnx else ()}) for segment in bundle.manifest.segments
    )
    return replace(bundle, manifest=bundle.manifest.model_copy(update={"segments": segments, **options}))


def told(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> tuple[list[str], list[str], dict[str, Any]]:
    """The lines of both outputs, and what is told as JSON."""
    show_built(bundle, True, Console(markup=False))
    text = capsys.readouterr()
    show_built(bundle, True, Console(markup=False), as_json=True)
    again = capsys.readouterr()
    assert again.err == text.err
    return text.out.splitlines(), text.err.splitlines(), json.loads(again.out)


def options_of(command: str) -> Any:
    """A command's options; it exits where the command is none."""
    assert command.startswith("python -m exporter ")
    return _parser("exporter").parse_args(command.split()[3:])


@pytest.mark.parametrize("engines", [("tensorrt-rtx",), ("torch", "tensorrt", "tensorrt-rtx")])
def test_single_precision_on_tensorrt_is_advised_against(
    mini_bundle: Bundle, capsys: pytest.CaptureFixture[str], engines: tuple[str, ...]
) -> None:
    out, (warning,), found = told(as_built(mini_bundle, *engines), capsys)
    named = " and ".join(name for name in engines if name != "torch")
    assert warning == f"warning: {found['advice']}"
    assert found["advice"].startswith(f"in fp32 {named} fuse no attention, so that the scores")
    options = options_of(found["advice"].partition("build in fp16: ")[2])
    assert (options.command, options.precision, options.out, options.force) == ("build", "fp16", mini_bundle.folder, True)
    assert set(engines) <= set(options.engine.split(","))
    assert "vae_check" not in found
    assert out[-1] == f"built {mini_bundle.folder}"


@pytest.mark.parametrize(
    ("engines", "options"),
    [
        (("onnxruntime", "torch"), {}),
        (("tensorrt-rtx",), {"precision": "fp16"}),
        (("tensorrt-rtx",), {"precision": "fp16", "vae_precision": "fp32"}),
    ],
)
def test_nothing_is_said_of_what_is_fused(
    mini_bundle: Bundle, capsys: pytest.CaptureFixture[str], engines: tuple[str, ...], options: dict[str, Any]
) -> None:
    _, warnings, found = told(as_built(mini_bundle, *engines, **options), capsys)
    assert warnings == []
    assert "advice" not in found


@pytest.mark.parametrize(("onnx", "engine"), [(True, "onnxruntime"), (False, "torch")])
def test_a_vae_in_half_precision_comes_with_the_command_that_checks_it(
    mini_bundle: Bundle, capsys: pytest.CaptureFixture[str], onnx: bool, engine: str
) -> None:
    out, _, found = told(as_built(mini_bundle, "torch", onnx=onnx, precision="fp16"), capsys)
    assert out[-2].endswith(f"fit into half precision: {found['vae_check']}")
    options = options_of(found["vae_check"])
    assert (options.command, options.bundle, options.engine) == ("verify", mini_bundle.folder, engine)


@pytest.mark.parametrize("options", [{}, {"precision": "fp16", "vae_precision": "fp32"}])
def test_a_wider_vae_needs_no_check(mini_bundle: Bundle, capsys: pytest.CaptureFixture[str], options: dict[str, Any]) -> None:
    assert "vae_check" not in told(as_built(mini_bundle, "torch", **options), capsys)[2]
