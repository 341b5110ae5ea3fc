"""The command that builds the bundle which a plan needs is added to the plan's error, where bundle and engine are known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engines import Bundle, NeedsBuildError, Runner, Segment
from engines.errors import EngineMemoryError
from engines.null import Null
from runtime import PlanError, find_plan
from runtime.advice import build_advice, missing_bundle, rebuild_advice
from runtime.errors import PartitionError, SiblingError
from runtime.execution.loaded_bundle import LoadedBundle
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


@pytest.mark.parametrize("up_to_date", [False, True])
def test_an_engine_is_built_again_for_the_one_that_needs_it(up_to_date: bool, bundle: Bundle) -> None:
    with pytest.raises(NeedsBuildError) as refusal, rebuild_advice(bundle, "torch"):
        raise NeedsBuildError("no engine", up_to_date=up_to_date)
    (note,) = refusal.value.__notes__
    assert note.endswith(bundle.rebuild_command("torch"))
    assert (
        note.startswith(f"a build would keep it, for it is of this version and for this GPU: remove {bundle.folder}")
        == up_to_date
    )


def test_what_does_not_fit_into_memory_is_to_be_less(bundle: Bundle) -> None:
    with pytest.raises(EngineMemoryError) as refusal, rebuild_advice(bundle, "onnxruntime"):
        raise EngineMemoryError("no memory")
    assert refusal.value.line == "no memory; ask for fewer or smaller pictures"


def test_engines_that_fail_to_load_or_to_run_are_advised_alike(bundle: Bundle) -> None:
    """An engine may be found unusable only as it runs: its kernels are finished then."""

    class LateRunner(Runner):
        def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return self._run_impl({}, {})

        def _run_impl(self, inputs: dict[str, torch.Tensor], sizes: dict[str, int]) -> dict[str, torch.Tensor]:
            raise NeedsBuildError("no context")

    class Late(Null):
        fails_at_once = True

        def load(self, bundle: Bundle, segment: Segment) -> Runner:
            if self.fails_at_once:
                raise NeedsBuildError("no engine")
            return LateRunner(segment, bundle.manifest.features)

    engine = Late()
    with pytest.raises(NeedsBuildError) as at_load:
        LoadedBundle.load(bundle, engine)
    engine.fails_at_once = False
    network, first = LoadedBundle.load(bundle, engine), bundle.manifest.segments[0]
    with pytest.raises(NeedsBuildError) as at_run:
        network.run_all([first], {name: torch.zeros(()) for name in first.inputs}, {})
    assert at_load.value.__notes__ == at_run.value.__notes__ == [f"build it with: {bundle.rebuild_command('null')}"]


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
        (None, "full", "onnxruntime", "--source emoji --variant original"),
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
