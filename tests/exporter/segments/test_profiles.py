"""The shapes that engines are built for: a range of them, or with --static one, and what is then refused."""

from __future__ import annotations

import shlex
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engines import Bundle, Profile, Segment
from engines.bundle.manifest import Feature
from engines.null import Null
from engines.tensorrt.engine import TensorRTRTX
from exporter.segments.writer import profile_of
from runtime import Pipeline, RequestError
from runtime.prepared import check_shape
from tests.support.commands import Command, assert_refused
from tests.support.fake_tensorrt import FakeTensorRT

FEATURES = {
    "tokens": Feature(dtype="int64", shape=("batch", 77)),
    "sample": Feature(dtype="float32", shape=("batch", 4, "height", "width")),
    "time": Feature(dtype="float32", shape=(1, 1280)),
    "text_encoder": Feature(dtype="float32", shape=("batch", "tokens=77", 768)),
    "latents": Feature(dtype="float32", shape=("images", 4, "height", "width")),
    "image": Feature(dtype="float32", shape=("images", 3, "8*height", "8*width")),
}
READ = {
    "text_encoder": ("tokens",),
    "down.0": ("sample", "time"),
    "mid": ("text_encoder",),
    "vae_decoder": ("latents",),
    "vae_encoder": ("image",),
}
SIZES = [(64, 96), (32, 128)]


def profiles(sizes: Any, static: bool, chunks: int = 1) -> dict[str, list[dict[str, tuple[int, ...]]]]:
    """Smallest, best and largest shapes for 3 images, by segment."""
    made = {}
    for name, inputs in READ.items():
        segment = Segment(name=name, units=(name,), inputs=inputs, outputs=(name,))
        profile = profile_of(segment, FEATURES, sizes, 3, 8, static, chunks)
        made[name] = [dict(shapes) for shapes in (profile.minimum, profile.optimum, profile.maximum)]
    return made


def test_a_profile_goes_from_one_row_to_guidance_for_all_images() -> None:
    found = profiles(SIZES, static=False)
    assert [shapes["sample"] for shapes in found["down.0"]] == [(1, 4, 4, 12), (2, 4, 8, 12), (6, 4, 8, 16)]
    assert [shapes["tokens"] for shapes in found["text_encoder"]] == [(1, 77), (2, 77), (6, 77)]
    assert [shapes["latents"] for shapes in found["vae_decoder"]] == [(1, 4, 4, 12), (1, 4, 8, 12), (1, 4, 8, 16)], "one by one"


def test_a_profile_is_best_at_one_chunk_of_text_and_takes_as_many_as_were_asked_for() -> None:
    one, three = (profiles(SIZES, static=False, chunks=chunks) for chunks in (1, 3))
    assert [shapes["text_encoder"] for shapes in one["mid"]] == [(1, 77, 768), (2, 77, 768), (6, 77, 768)]
    assert [shapes["text_encoder"] for shapes in three["mid"]] == [(1, 77, 768), (2, 77, 768), (6, 231, 768)]
    assert three["text_encoder"] == one["text_encoder"], "it reads a chunk at a time"


def test_a_static_profile_is_one_shape_but_where_rows_differ_from_call_to_call() -> None:
    """A negative prompt is one row; the VAE takes pictures one by one."""
    found = profiles(SIZES[:1], static=True)
    assert found["down.0"] == [{"sample": (6, 4, 8, 12), "time": (1, 1280)}] * 3
    assert found["vae_decoder"] == [{"latents": (1, 4, 8, 12)}] * 3
    assert [shapes["tokens"] for shapes in found["text_encoder"]] == [(1, 77), (2, 77), (6, 77)]
    assert found["vae_encoder"] == [{"image": (1, 3, 64, 96)}] * 3


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> dict[str, Profile]:
    """A TensorRT-RTX that builds nothing; the profiles that it was given, by segment."""
    given: dict[str, Profile] = {}

    def compile_segment(engine: Any, traced: Any, stem: Path, profile: Profile, *rest: Any) -> list[Path]:
        given[traced.segment.name] = profile
        path = Path(f"{stem}.engine")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"engine")
        return [path]

    monkeypatch.setattr(TensorRTRTX, "_import", lambda engine: FakeTensorRT({}))
    monkeypatch.setattr(TensorRTRTX, "compile", compile_segment)
    return given


def test_a_static_bundle_says_so(
    exporter: Command, fake_trace: Any, compiled: dict[str, Profile], tiny_source: Path, tmp_path: Path
) -> None:
    fake_trace()
    folder = tmp_path / "static"
    given = ["build", "--source", tiny_source, "--out", folder, "--engine", "onnxruntime,tensorrt-rtx", "--sizes", "16x32"]
    assert exporter(*given, "--static", "--batch", "2").code == 0
    bundle = Bundle.open(folder)
    assert (bundle.manifest.static, bundle.manifest.max_images, bundle.manifest.sizes) == (True, 2, ((16, 32),))
    assert compiled["stem"].minimum == compiled["stem"].maximum
    assert compiled["stem"].maximum["sample"][0] == 4
    assert any("exactly 2 (static) images" in line for line in exporter("inspect", folder).out)
    command = bundle.rebuild_command("null")
    assert "--sizes 16x32 --batch 2 --static --force" in command
    assert "--plan" not in command

    compiled.clear()
    assert exporter(*given, "--batch", "1..2", "--force").code == 0
    assert not Bundle.open(folder).manifest.static
    assert "stem" in compiled, "the static engine is another"
    assert "static" not in (folder / "manifest.json").read_text()


def test_a_static_build_is_of_one_image_where_nothing_is_said(
    exporter: Command, fake_trace: Any, compiled: Any, tiny_source: Path, tmp_path: Path
) -> None:
    fake_trace()
    exporter("build", "--source", tiny_source, "--out", tmp_path / "one", "--engine", "tensorrt-rtx", "--static")
    assert Bundle.open(tmp_path / "one").manifest.max_images == 1


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--sizes", "16x16,32x32", "--engine", "tensorrt-rtx"], ["sizes 16x16, 32x32: static engines", "leave --static out"]),
        ([], ["static: engine onnxruntime is not built for given sizes; add tensorrt or tensorrt-rtx"]),
        (["--batch", "1..2", "--engine", "tensorrt-rtx"], ["batch '1..2' is no number; with --static write the number"]),
        (["--batch", "0", "--engine", "tensorrt-rtx"], ["batch 0: "]),
        (["--text-chunks", "2", "--engine", "tensorrt-rtx"], ["text chunks 2: static engines take one chunk of text; leave"]),
        (["--text-chunks", "0", "--engine", "tensorrt-rtx"], ["text chunks 0: name from 1 to 64"]),
    ],
    ids=str,
)
def test_wrong_options(
    exporter: Command, compiled: Any, tiny_source: Path, tmp_path: Path, options: list[str], parts: list[str]
) -> None:
    folder = tmp_path / "bundle"
    assert_refused(exporter("build", "--source", tiny_source, "--out", folder, "--static", *options), *parts)
    assert not folder.exists()


class Profiled(Null):
    """An engine whose compiled segments take only what they were built for."""

    has_profile = True


@pytest.fixture
def static(mini_pipeline: Pipeline) -> Pipeline:
    """A pipeline whose bundle is static, for two images of 64x128."""
    pipeline = copy(mini_pipeline)
    changes = {"static": True, "max_images": 2, "sizes": ((64, 128),)}
    pipeline.bundle = replace(pipeline.bundle, manifest=pipeline.manifest.model_copy(update=changes))
    pipeline.engine = Profiled()
    return pipeline


def test_what_a_static_bundle_takes(static: Pipeline) -> None:
    check_shape(static.manifest, static.engine, 2, 64, 128, 1.5)


@pytest.mark.parametrize("request_made", [(1, 64, 128, 7.5), (3, 64, 128, 7.5), (2, 64, 64, 7.5), (2, 64, 128, 1.0)], ids=str)
def test_what_it_refuses(static: Pipeline, request_made: tuple[int, int, int, float]) -> None:
    images, height, width, guidance = request_made
    with pytest.raises(RequestError) as refusal:
        check_shape(static.manifest, static.engine, images, height, width, guidance)
    assert str(refusal.value) == (
        f"{images} image(s) of {height}x{width} with guidance {guidance:g}: the null engines of this bundle are static, for "
        "exactly 2 image(s) of 64x128 with guidance above 1; ask for that, or build others with --sizes and --batch, for several "
        "without --static"
    )


@pytest.mark.parametrize("request_made", [(1, 192, 64), (1, 64, 192), (3, 64, 64)], ids=str)
def test_a_request_outside_the_sizes_built_for(static: Pipeline, request_made: tuple[int, int, int]) -> None:
    changes = {"static": False, "max_images": 2, "sizes": ((64, 128), (128, 64))}
    static.bundle = replace(static.bundle, manifest=static.manifest.model_copy(update=changes))
    check_shape(static.manifest, static.engine, 2, 128, 128, 7.5)
    images, height, width = request_made
    with pytest.raises(RequestError) as refusal:
        check_shape(static.manifest, static.engine, images, height, width, 7.5)
    assert str(refusal.value) == (
        f"{images} image(s) of {height}x{width}: the null engines of this bundle were built for up to 2 image(s) of 64x128, "
        "128x64; build others with --sizes and --batch"
    )


def test_an_engine_without_a_profile_takes_anything(static: Pipeline) -> None:
    static.engine = Null()
    check_shape(static.manifest, static.engine, 3, 64, 64, 0.0)


def test_a_rebuild_cuts_as_the_bundle_was_cut(exporter: Command, fake_trace: Any, tiny_source: Path, tmp_path: Path) -> None:
    fake_trace()
    folder = tmp_path / "a folder"
    given = ["--source", tiny_source, "--out", folder, "--plan", "block:2", "--plan", "unit:3"]
    assert exporter("build", *given).code == 0
    bundle = Bundle.open(folder)
    command = bundle.rebuild_command("null")
    assert f"--source {tiny_source} --plan block:2 --plan unit:3 --precision fp32" in command
    assert command.endswith(f"--force --out '{folder}'")
    assert exporter(*shlex.split(command)[3:]).code == 0
    again = Bundle.open(folder).manifest
    assert (again.granularity, again.plans) == (None, ("block:2", "unit:3"))
    assert [segment.units for segment in again.segments] == [segment.units for segment in bundle.manifest.segments]
