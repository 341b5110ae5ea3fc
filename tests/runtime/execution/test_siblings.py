"""Bundles that take turns with another: of the same source, beside it, alike in what they share; read from manifests alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from engines import Bundle, Manifest, Segment
from engines.bundle.manifest import File, FusedLora
from engines.bundle.names import TEXT
from engines.bundle.shared import shared_difference
from engines.null import Null
from runtime import find_plan
from runtime.errors import SiblingError
from runtime.execution.siblings import find_sibling
from runtime.execution.swapping import Swapper
from tests.support.unets import make_manifest, manifest_of, small_unet, written_manifest

SWITCH = find_plan("switch:0.4")
TIMESTEPS = [float(timestep) for timestep in range(970, 0, -100)]


def test_a_sibling_is_of_the_same_source_and_lies_beside(original: Path, assembled: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(original)
    # Neither of another source nor unfinished, damaged or of another version.
    written_manifest(bundle.manifest, original.parent / "aaa", variant="assembled", source="elsewhere")
    written_manifest(bundle.manifest, original.parent / ".aab", variant="assembled")
    (written_manifest(bundle.manifest, original.parent / "aac", variant="assembled") / "manifest.json").write_text("{")
    assert find_sibling(bundle, "original", SWITCH, TIMESTEPS) is bundle
    assert find_sibling(bundle, "assembled", SWITCH, TIMESTEPS).folder == assembled


def test_a_sibling_that_is_missing_or_does_not_fit(original: Path) -> None:
    bundle = Bundle.open(original)
    message = r"runs the UNet 'assembled' of source .*, and no bundle beside .*original has it$"
    with pytest.raises(SiblingError, match=message) as refusal:
        find_sibling(bundle, "assembled", SWITCH, TIMESTEPS)
    assert refusal.value.variant == "assembled"
    written_manifest(bundle.manifest, original.parent / "assembled", variant="assembled", latent_channels=8)
    message = r"assembled cannot take turns with it: latent_channels is 4 in original and 8 in assembled$"
    with pytest.raises(SiblingError, match=message):
        find_sibling(bundle, "assembled", SWITCH, TIMESTEPS)


def test_a_sibling_that_was_rebuilt_is_told(original: Path, assembled: Path) -> None:
    """A loaded pipeline has the UNet of the bundle that was there: its next call would take turns with another checkpoint's."""
    bundle = Bundle.open(original)
    swapper = Swapper(bundle, Null())
    assert not swapper.is_outdated()
    swapper.add(find_sibling(bundle, "assembled", SWITCH, TIMESTEPS))
    assert not swapper.is_outdated()
    shutil.rmtree(assembled)
    assert swapper.is_outdated()
    written_manifest(swapper.networks["assembled"].manifest, assembled, key="2" * 64)
    assert swapper.is_outdated()


INK, DETAIL = (FusedLora(file=f"{name}.safetensors", scale=0.8, sha256=name[0] * 64) for name in ("ink", "detail"))


@pytest.mark.parametrize(
    ("here", "there", "words"),
    [
        ({"loras": (INK,)}, {}, r"it has no LoRA, and original has LoRA ink.safetensors:0.8: build both with the same --lora"),
        ({}, {"loras": (INK,)}, r"it has LoRA ink.safetensors:0.8, and original has no LoRA"),
        ({"loras": (INK,)}, {"loras": (INK.model_copy(update={"scale": 0.5}),)}, "it has LoRA ink.safetensors:0.5, and original"),
        ({"loras": (INK,)}, {"loras": (INK, DETAIL)}, "it has LoRA ink.safetensors:0.8, detail.safetensors:0.8, and original"),
        ({"loras": (INK, DETAIL)}, {"loras": (DETAIL, INK.model_copy(update={"file": "elsewhere.safetensors"}))}, None),
        ({"loras": (INK.model_copy(update={"scale": 0.0}),)}, {}, None),
        ({"clip_skip": 1}, {}, "clip_skip is 1 in original and 0 in assembled"),
    ],
)
def test_both_have_the_same_loras_and_read_text_alike(
    original: Path, here: dict[str, Any], there: dict[str, Any], words: str | None
) -> None:
    """Or a picture would begin in one style and end in another."""
    manifest = Bundle.open(original).manifest
    (original / "manifest.json").write_text(manifest.model_copy(update=here).model_dump_json())
    bundle = Bundle.open(original)
    other = written_manifest(manifest, original.parent / "assembled", variant="assembled", **there)
    if words is None:
        assert find_sibling(bundle, "assembled", SWITCH, TIMESTEPS).folder == other
        return
    with pytest.raises(SiblingError, match=f"assembled cannot take turns with it: {words}"):
        find_sibling(bundle, "assembled", SWITCH, TIMESTEPS)


def test_of_several_siblings_the_one_that_can_run_the_plan_is_taken(original: Path) -> None:
    bundle, unet = Bundle.open(original), small_unet("no mid")
    plan = find_plan("switch:0.4+unit:3")
    parent = original.parent
    written_manifest(manifest_of(unet), parent / "a-other", variant="assembled", precision="fp16")
    written_manifest(manifest_of(unet), parent / "b-by-block", variant="assembled")
    assert find_sibling(bundle, "assembled", plan, TIMESTEPS).folder == parent / "b-by-block"
    written_manifest(manifest_of(unet, None, ["unit:3"]), parent / "c-by-unit", variant="assembled")
    assert find_sibling(bundle, "assembled", plan, TIMESTEPS).folder == parent / "c-by-unit"
    assert find_sibling(bundle, "assembled", SWITCH, TIMESTEPS).folder == parent / "b-by-block"


@pytest.mark.parametrize(
    ("here", "there", "words"),
    [
        ({"data": "a", "key": "1"}, {"data": "b", "key": "2"}, "text encoder"),
        ({"data": "a", "key": "1"}, {"data": "a", "key": "2"}, None),
        ({"data": "a", "key": "1"}, {"key": "1"}, "text encoder"),
        ({"key": "1"}, {"key": "2"}, "text encoder"),
        ({"key": "1"}, {"key": "1"}, None),
        ({"key": "1", "tokenizer": "a"}, {"key": "1", "tokenizer": "b"}, "tokenizer"),
        ({"key": "1", "scheduler": "a"}, {"key": "1", "scheduler": "b"}, "scheduler"),
    ],
)
def test_what_bundles_share_is_told_by_hashes(here: dict[str, str], there: dict[str, str], words: str | None) -> None:
    """Weights that are so few that they lie in the graph have no file of their own, and a scheduler says what UNets predict."""

    def file(path: str, content: str) -> File:
        return File(path=path, sha256=content * 64, bytes=1)

    def manifest(given: dict[str, str]) -> Manifest:
        onnx = [file("segments/text.onnx", given["key"]), *(file("text.onnx.data", given[k]) for k in ("data",) if k in given)]
        text = Segment(name="text", units=(TEXT,), inputs=(), outputs=(TEXT,), onnx=tuple(onnx), key=given["key"])
        files = [file(f"{part}/config.json", given[part]) for part in ("tokenizer", "scheduler") if part in given]
        return make_manifest(segments=(text,), files=tuple(files))

    assert shared_difference(manifest(here), manifest(there)) == words
