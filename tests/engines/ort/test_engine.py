"""The ONNX Runtime engine on bundles: copies with fused attention, bundles without them, sessions that threads share."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from diffusers import UNet2DConditionModel

from engines import Bundle, BundleError, EngineError, NeedsBuildError, Segment
from engines.base import DTYPES
from engines.bundle.shapes import resolve
from engines.errors import EngineMemoryError
from engines.ort.engine import OnnxRuntime
from tests.support.reference import MINI

UNET_ATTENTION = ("down.0", "down.1", "down.2", "mid", "up.1", "up.2", "up.3", "up.3.layer.2")


def graph(bundle: Bundle, path: str) -> onnx.GraphProto:
    return onnx.load(bundle.folder / path, load_external_data=False).graph


def copies(bundle: Bundle) -> dict[str, str]:
    """The path of each segment's copy."""
    return {s.name: file.path for s in bundle.manifest.segments for file in s.engines["onnxruntime"].files}


def random_inputs(bundle: Bundle, segment: Segment, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = 1 + seed % 3
    sizes = {"batch": rows, "images": rows, "height": 8 + 8 * (seed % 2), "width": 16}
    features = {name: bundle.manifest.features[name] for name in segment.inputs}
    return {n: torch.randn(resolve(f.shape, sizes), generator=generator).to(DTYPES[f.dtype]) for n, f in features.items()}


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() < 1e-5 * tensor.abs().max(), name


def test_every_attention_of_the_unet_and_the_vae_is_one_operator(mini_bundle: Bundle) -> None:
    fused = {
        name: sum(node.op_type == "MultiHeadAttention" for node in graph(mini_bundle, path).node)
        for name, path in copies(mini_bundle).items()
    }
    unet: Any = UNet2DConditionModel.from_pretrained(MINI / "unet")
    assert sum(fused[name] for name in UNET_ATTENTION) == sum(
        name.endswith(("attn1", "attn2")) for name, _ in unet.named_modules()
    )
    # The text encoder's attention has a mask and runs once a call: it stays.
    assert fused.keys() - set(UNET_ATTENTION) == {"vae_encoder", "vae_decoder"}
    assert fused["vae_encoder"] == fused["vae_decoder"] == 1


def test_no_weight_is_stored_twice(mini_bundle: Bundle) -> None:
    for name, path in copies(mini_bundle).items():
        assert path == f"segments/{name}.ort.onnx"
        tensors = graph(mini_bundle, path).initializer
        places = {entry.value for t in tensors for entry in t.external_data if entry.key == "location"}
        assert places == {f"{name}.onnx.data"}
        # What is left in the graph: biases, scales and shapes of less than 256 bytes each.
        assert max(len(t.raw_data) for t in tensors) <= 256
    stored = sorted(path.name for path in (mini_bundle.folder / "segments").glob("*.data"))
    assert stored == sorted(f"{s.name}.onnx.data" for s in mini_bundle.manifest.segments if len(s.onnx) == 2)


@pytest.mark.parametrize("name", ["down.0", "mid", "up.1", "vae_decoder"])
def test_a_bundle_without_copies_runs_and_gives_the_same(mini_bundle: Bundle, name: str) -> None:
    segment = mini_bundle.manifest.segment(name)
    fused = OnnxRuntime().load(mini_bundle, segment)
    plain = OnnxRuntime().load(mini_bundle, segment.model_copy(update={"engines": {}}))
    for seed in range(3):
        inputs = random_inputs(mini_bundle, segment, seed)
        close(fused.run(inputs), plain.run(inputs))


def test_the_copy_is_what_is_loaded_unless_tensorrt_has_to_read_it(mini_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    session = OnnxRuntime._session

    def watched(self: OnnxRuntime, path: Path, *given: Any) -> Any:
        seen.append(path.name)
        return session(self, path, *given)

    monkeypatch.setattr(OnnxRuntime, "_session", watched)
    engine, segment = OnnxRuntime(), mini_bundle.manifest.segment("mid")
    engine.load(mini_bundle, segment)
    engine._tensorrt = True
    engine.load(mini_bundle, segment)
    assert seen == ["mid.ort.onnx", "mid.onnx"]


def test_a_damaged_copy_is_refused(mini_bundle: Bundle, tmp_path: Path) -> None:
    shutil.copytree(mini_bundle.folder, tmp_path / "copy")
    path = tmp_path / "copy" / "segments" / "mid.ort.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(BundleError, match=r"segments/mid.ort.onnx is not the file that was built"):
        OnnxRuntime().load(Bundle.open(tmp_path / "copy"), mini_bundle.manifest.segment("mid"))


class Failing:
    """A session that fails as it runs."""

    def __init__(self, session: Any, message: str) -> None:
        self._session, self._message = session, message

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, *given: Any) -> Any:
        raise RuntimeError(self._message)


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("[ONNXRuntimeError] : 6 : Failed to allocate memory\nfor requested buffer", EngineMemoryError),
        ("std::bad_alloc", EngineMemoryError),
        ("[ONNXRuntimeError] : 2 : INVALID_ARGUMENT", NeedsBuildError),
    ],
)
def test_a_session_that_fails_is_told_by_what_it_lacks(mini_bundle: Bundle, message: str, kind: type[EngineError]) -> None:
    segment = mini_bundle.manifest.segment("stem")
    runner: Any = OnnxRuntime().load(mini_bundle, segment)
    runner._session = Failing(runner._session, message)
    with pytest.raises(kind, match=r"^segment stem: ONNX Runtime fails: .*") as caught:
        runner.run(random_inputs(mini_bundle, segment, 0))
    assert "\n" not in str(caught.value)


def test_a_session_with_other_names_needs_a_build(mini_bundle: Bundle) -> None:
    segment = mini_bundle.manifest.segment("stem").model_copy(update={"inputs": ()})
    with pytest.raises(NeedsBuildError, match=r"takes '\w+', which it is not given$"):
        OnnxRuntime().load(mini_bundle, segment)


def test_targets_are_refused(tiny, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="engine onnxruntime takes no targets, got sm89"):
        OnnxRuntime().compile(tiny.traced["front"], tmp_path / "front", tiny.profiles["front"], ("sm89",))


def test_threads_share_sessions(mini_bundle: Bundle) -> None:
    segment = mini_bundle.manifest.segment("down.0")
    runner = OnnxRuntime().load(mini_bundle, segment)
    inputs = [random_inputs(mini_bundle, segment, seed) for seed in range(30)]
    expected = [runner.run(one) for one in inputs]
    with ThreadPoolExecutor(10) as pool:
        found = list(pool.map(runner.run, inputs))
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in other)
