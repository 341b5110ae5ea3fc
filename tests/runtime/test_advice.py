"""The command that builds the bundle which a plan needs is added to the plan's error, where bundle and engine are known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engines import Bundle
from runtime import PlanError, find_plan
from runtime.advice import build_advice, missing_bundle
from runtime.errors import PartitionError, SiblingError
from tests.support.unets import manifest_of, small_unet, written_manifest


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.open(written_manifest(manifest_of(small_unet("uneven")), tmp_path / "bundles" / "original"))


def notes(plan: str, bundle: Bundle, error: PlanError) -> list[str]:
    """What is added to an error."""
    with pytest.raises(type(error)) as refusal, build_advice(find_plan(plan), bundle, "null", lambda unet: bundle):
        raise error
    assert refusal.value is error
    return list(getattr(error, "__notes__", []))


def test_a_bundle_is_partitioned_anew_for_the_plan(bundle: Bundle) -> None:
    note, *others = notes("unit:3", bundle, PartitionError("inside", "original"))
    assert not others
    assert note.startswith("build a bundle that is partitioned there too: python -m exporter build --variant original ")
    assert note.endswith(f"--force --out {bundle.folder} --granularity block --plan unit:3")


def test_a_plan_that_the_bundle_was_built_for_is_named_once(bundle: Bundle) -> None:
    built = replace(bundle, manifest=bundle.manifest.model_copy(update={"plans": ("unit:3",)}))
    (note,) = notes("unit:3", built, PartitionError("inside", "original"))
    assert note.count("--plan unit:3") == 1


def test_a_sibling_is_built_as_the_bundle_was(bundle: Bundle) -> None:
    changes: dict[str, Any] = {"config": "shapes", "unet": "tuned", "precision": "fp16", "sizes": ((64, 128), (64, 64))}
    bundle = replace(bundle, manifest=bundle.manifest.model_copy(update=changes))
    (note,) = notes("switch:0.4+layer:3", bundle, SiblingError("missing", "assembled"))
    assert note == (
        "build it with: python -m exporter build --variant assembled --source test --config shapes --precision fp16 "
        "--engine null --sizes 64x128,64x64 --batch 1..4 --granularity block --plan switch:0.4+layer:3 "
        f"--out {bundle.folder.parent / 'assembled'}"
    )
    (bundle.folder.parent / "assembled").mkdir()
    (note,) = notes("switch:0.4", bundle, SiblingError("unlike", "assembled"))
    assert note.endswith(f"--out {bundle.folder.parent / 'assembled-2'}")


def test_other_mistakes_get_no_command(bundle: Bundle) -> None:
    assert notes("unit:3", bundle, PlanError("unknown")) == []


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"plans": ("layer:2",)}, "--granularity block --plan layer:2"),
        ({"plans": ("layer:2",), "granularity": None}, "--plan layer:2"),
        ({"granularity": "layer"}, "--granularity layer"),
    ],
)
def test_a_bundle_keeps_the_partition_that_it_has(bundle: Bundle, changes: dict[str, Any], kept: str) -> None:
    built = replace(bundle, manifest=bundle.manifest.model_copy(update=changes))
    (note,) = notes("unit:3", built, PartitionError("inside", "original"))
    assert f"{kept} " in note
    assert note.count("--granularity") == kept.count("--granularity")
    assert note.endswith(" --plan unit:3")


@pytest.mark.parametrize(
    ("folder", "plan", "engine", "command"),
    [
        (None, "full", "onnxruntime", "--source mini --variant original"),
        ("bundles/mini-assembled", "deepcache:3", "onnxruntime", "--source mini --variant assembled"),
        (
            "bundles/mini-bk-tiny",
            "unit:3",
            "torch",
            "--source mini --variant bk-tiny --engine torch --granularity block --plan unit:3",
        ),
        ("elsewhere/mini-original", "block:2", "onnxruntime", "--source mini --variant original --out elsewhere/mini-original"),
        ("bundles/sd15", "full", "onnxruntime", "--source CHECKPOINT --variant original --out bundles/sd15"),
    ],
)
def test_what_is_advised_without_a_bundle_builds_what_was_asked_for(
    folder: str | None, plan: str, engine: str, command: str
) -> None:
    error = missing_bundle(None if folder is None else Path(folder), find_plan(plan), engine)
    assert str(error).endswith(f"; build it with: python -m exporter build {command}")
    assert (folder or "./bundles") in str(error)
