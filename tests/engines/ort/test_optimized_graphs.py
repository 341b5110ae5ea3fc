"""A graph that was kept computes what the segment's own file does, and is never believed where it is damaged."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from engines import Bundle
from engines.bundle.names import LATENTS
from engines.ort import optimized_graphs
from engines.ort.engine import OnnxRuntime

ROOT = Path(__file__).parents[3]
SEGMENT = "vae_decoder"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept at full size only is kept of small models too."""
    monkeypatch.setattr(optimized_graphs, "_LEAST_FILES", 0)
    monkeypatch.setattr(optimized_graphs, "_LEAST_MADE", 1)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each session that is made, whether it was made of a kept graph."""
    found: list[bool] = []
    session = onnxruntime.InferenceSession

    def watched(model: str | bytes, *given: object, **options: object) -> object:
        found.append(isinstance(model, bytes))
        return session(model, *given, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", watched)
    return found


def outputs(bundle: Bundle) -> Mapping[str, Tensor]:
    latents = torch.randn(1, bundle.manifest.latent_channels, 4, 4, generator=torch.Generator().manual_seed(0))
    return OnnxRuntime().load(bundle, bundle.manifest.segment(SEGMENT)).run({LATENTS: latents})


def alike(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def entry(caches: Path) -> Path:
    (found,) = [path.parent for path in (caches / "onnxruntime").glob("*/entry.json")]
    return found


def test_the_second_start_takes_what_the_first_kept(
    mini_bundle: Bundle, caches: Path, opened: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = outputs(mini_bundle), outputs(mini_bundle)
    assert opened == [False, True]
    assert alike(first, second)
    monkeypatch.setenv("UNET_HEIRLOOM_GRAPHS_GIB", "0")
    assert alike(first, outputs(mini_bundle))
    assert opened == [False, True, False]
    graph = onnx.load(entry(caches) / "graph.onnx", load_external_data=False)
    assert {node.domain for node in graph.graph.node} >= {"com.microsoft.nchwc"}, "weights are laid out anew"
    assert {path.name for path in entry(caches).iterdir()} == {"graph.onnx", "weights.data", "entry.json"}


@pytest.mark.parametrize("name", ["graph.onnx", "weights.data", "entry.json"])
@pytest.mark.parametrize("how", ["changed", "cut", "missing"])
def test_what_is_damaged_is_made_anew(mini_bundle: Bundle, caches: Path, opened: list[bool], name: str, how: str) -> None:
    first, path = outputs(mini_bundle), entry(caches) / name
    data = path.read_bytes()
    path.unlink()
    if how != "missing":
        path.write_bytes(
            data[: len(data) // 2] + (b"" if how == "cut" else bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :])
        )
    assert alike(first, outputs(mini_bundle))
    assert alike(first, outputs(mini_bundle))
    assert opened == [False, False, True]


def test_what_onnx_runtime_does_not_take_is_not_made_again(mini_bundle: Bundle, caches: Path, opened: list[bool]) -> None:
    first = outputs(mini_bundle)
    place = entry(caches)
    (place / "graph.onnx").write_bytes(b"no graph")
    text = json.dumps({**json.loads((place / "entry.json").read_text().partition("\n")[2]), "graph_sha256": _sha256(b"no graph")})
    (place / "entry.json").write_text(f"{_sha256(text.encode())}\n{text}")
    assert alike(first, outputs(mini_bundle))
    assert alike(first, outputs(mini_bundle))
    assert opened == [False, True, False, False]


@pytest.mark.parametrize("changed", ["_processor", "_FORM"])
def test_another_processor_or_form_has_an_entry_of_its_own(
    mini_bundle: Bundle, opened: list[bool], monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    outputs(mini_bundle)
    monkeypatch.setattr(optimized_graphs, changed, (lambda: "another") if changed == "_processor" else -1)
    outputs(mini_bundle)
    assert opened == [False, False]


def test_segments_that_gain_nothing_are_not_kept(
    mini_bundle: Bundle, caches: Path, opened: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimized_graphs, "_LEAST_MADE", 2**40)
    assert alike(outputs(mini_bundle), outputs(mini_bundle))
    assert opened == [False, False]
    assert [path.name for path in entry(caches).iterdir()] == ["entry.json"]


def test_entries_that_were_used_longest_ago_go_first(mini_bundle: Bundle, caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs(mini_bundle)
    first = entry(caches)
    size = sum(path.stat().st_size for path in first.iterdir())
    monkeypatch.setattr(optimized_graphs, "_limit", lambda: 1.5 * size)
    monkeypatch.setattr(optimized_graphs, "_processor", lambda: "another")
    outputs(mini_bundle)
    assert entry(caches) != first


@pytest.mark.parametrize("place", ["/dev/null/none", "full"])
def test_without_a_place_it_starts_as_ever(
    mini_bundle: Bundle, opened: list[bool], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    if place == "full":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**40, 2**40, 0))
    else:
        monkeypatch.setenv("UNET_HEIRLOOM_CACHE", place)
    assert alike(outputs(mini_bundle), outputs(mini_bundle))
    assert opened == [False, False]


@pytest.mark.usefixtures("warm_commands")
def test_two_processes_may_start_at_once(mini_bundle: Bundle, caches: Path, opened: list[bool]) -> None:
    code = (
        "import sys; from engines import Bundle, make_engine; from engines.ort import optimized_graphs\n"
        "optimized_graphs._LEAST_FILES, optimized_graphs._LEAST_MADE = 0, 1; bundle = Bundle.open(sys.argv[1])\n"
        f"for _ in range(5): make_engine('onnxruntime').load(bundle, bundle.manifest.segment({SEGMENT!r}))"
    )
    runs = [subprocess.Popen([sys.executable, "-c", code, str(mini_bundle.folder)], cwd=ROOT) for _ in range(2)]
    assert [run.wait(100) for run in runs] == [0, 0]
    kept = outputs(mini_bundle)
    assert opened == [True]
    shutil.rmtree(caches / "onnxruntime")
    assert alike(kept, outputs(mini_bundle))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
