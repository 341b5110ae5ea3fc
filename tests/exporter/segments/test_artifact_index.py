"""A build takes over what other bundles of this machine hold; nothing from elsewhere, and nothing that has changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tuning
from exporter import BuildOptions, build
from exporter.segments import artifact_index
from tuning.checkpoints.folder import save_part

FakeTrace = Callable[..., list[str]]
ENDS = ["text_encoder", "vae_decoder", "vae_encoder"]


@pytest.fixture
def first(tiny_source: Path, tmp_path: Path, fake_trace: FakeTrace) -> BuildOptions:
    """The options of a bundle that is there."""
    fake_trace()
    options = BuildOptions(source=str(tiny_source), out=tmp_path / "first")
    build(options)
    return options


def traced_for(options: BuildOptions, fake_trace: FakeTrace, **changes: object) -> list[str]:
    """The segments that a build of changed options makes itself."""
    from dataclasses import replace

    traced = fake_trace()
    bundle, built = build(replace(options, **changes))  # type: ignore[arg-type]
    assert built
    bundle.check()
    return traced


def test_the_same_bundle_elsewhere_traces_nothing(first: BuildOptions, fake_trace: FakeTrace, tmp_path: Path) -> None:
    assert traced_for(first, fake_trace, out=tmp_path / "second") == []


def test_another_partition_takes_what_it_has_in_common(first: BuildOptions, fake_trace: FakeTrace, tmp_path: Path) -> None:
    traced = traced_for(first, fake_trace, out=tmp_path / "second", granularity="layer")
    assert traced
    assert not {*ENDS, "stem", "head"} & set(traced)


def test_another_variant_takes_text_encoder_and_vae(layered_source: Path, fake_trace: FakeTrace, tmp_path: Path) -> None:
    source = Path(shutil.copytree(layered_source, tmp_path / "source"))
    unet = tuning.assemble(tuning.load_unet(source / "unet"), tuning.recipe("bk-base"))
    save_part(unet, source / "unet_bk-base", torch.float32)
    original = BuildOptions(source=str(source), out=tmp_path / "original")
    assert set(ENDS) <= set(traced_for(original, fake_trace))
    traced = traced_for(original, fake_trace, out=tmp_path / "second", variant="bk-base")
    assert "stem" in traced
    assert not set(ENDS) & set(traced)


def test_other_weights_of_one_part_are_traced_alone(first: BuildOptions, fake_trace: FakeTrace, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(first.source, source)
    (weights,) = (source / "vae").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    assert traced_for(first, fake_trace, out=tmp_path / "second", source=str(source)) == ["vae_decoder", "vae_encoder"]


@pytest.mark.parametrize("changes", [{"precision": "fp16"}, {"fresh": True}], ids=lambda changes: next(iter(changes)))
def test_what_must_be_made_anew_is(
    changes: dict[str, object], first: BuildOptions, fake_trace: FakeTrace, tmp_path: Path
) -> None:
    assert len(traced_for(first, fake_trace, out=tmp_path / "second", **changes)) == 12


def test_a_bundle_from_elsewhere_offers_nothing(first: BuildOptions, fake_trace: FakeTrace, tmp_path: Path, caches: Path) -> None:
    shutil.rmtree(caches)  # as on another machine
    assert len(traced_for(first, fake_trace, out=tmp_path / "second")) == 12


def test_a_bundle_from_elsewhere_offers_nothing_in_the_place_of_the_new_one(
    first: BuildOptions, fake_trace: FakeTrace, caches: Path
) -> None:
    """Its manifest may give any file the key of a piece, compiled engines among them."""
    shutil.rmtree(caches)
    assert len(traced_for(first, fake_trace, force=True, max_images=2)) == 12


def test_a_bundle_that_was_moved_here_offers_what_was_built_here(
    first: BuildOptions, fake_trace: FakeTrace, tmp_path: Path
) -> None:
    shutil.move(tmp_path / "first", tmp_path / "moved")
    assert traced_for(first, fake_trace, out=tmp_path / "moved", force=True, max_images=2) == []


def test_files_that_changed_since_are_not_taken(first: BuildOptions, fake_trace: FakeTrace, tmp_path: Path, caches: Path) -> None:
    changed, notes = tmp_path / "first" / "segments" / "stem.onnx", len(list((caches / "pieces").iterdir()))
    changed.write_bytes(b"x" * changed.stat().st_size)
    assert traced_for(first, fake_trace, out=tmp_path / "second") == ["stem"]
    assert len(list((caches / "pieces").iterdir())) == notes


def test_notes_of_what_is_gone_or_damaged_are_no_obstacle(
    first: BuildOptions, fake_trace: FakeTrace, tmp_path: Path, caches: Path
) -> None:
    shutil.rmtree(tmp_path / "first")
    note, *_ = (caches / "pieces").iterdir()
    note.write_text("{")
    assert len(traced_for(first, fake_trace, out=tmp_path / "second")) == 12


def test_where_nothing_can_be_noted_a_build_goes_on(
    tiny_source: Path, tmp_path: Path, fake_trace: FakeTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNET_HEIRLOOM_CACHE", "/dev/null/none")
    options = BuildOptions(source=str(tiny_source), out=tmp_path / "first")
    assert len(traced_for(options, fake_trace)) == 12
    artifact_index.note(build(options)[0])
