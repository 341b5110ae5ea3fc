"""OpenVINO: in bfloat16 it is near, at every timestep; what it is given and makes is not copied."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from engines import Bundle, EngineError, NeedsBuildError
from engines.bundle.manifest import Feature
from engines.openvino.engine import OpenVINO, OpenVINOBfloat16
from exporter.verification.verify import CHAIN, verify
from tests.engines.conftest import Tiny, random_inputs

pytest.importorskip("openvino", reason="install it with: pip install --editable '.[openvino]'")


@pytest.fixture
def bfloat16() -> OpenVINOBfloat16:
    engine = OpenVINOBfloat16()
    try:
        engine.check_device()
    except EngineError as error:
        pytest.skip(str(error))
    return engine


def near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """bfloat16 has 8 bits; these sums have at most 150 products."""
    return bool((found - expected).abs().max() < 2e-2 * expected.abs().max())


def test_bfloat16_is_near_at_every_timestep(bfloat16: OpenVINOBfloat16, tiny: Tiny) -> None:
    """Timesteps above 256 are no numbers of bfloat16: their sines would be those of others."""
    runner = bfloat16.load(tiny.bundle, tiny.segment("front"))
    for timestep in (1, 501, 999):
        inputs = random_inputs(2, 16, 24) | {"timestep": torch.full((2,), timestep)}
        found, expected = runner.run(inputs), tiny.reference(inputs)
        for name in runner.segment.outputs:
            assert near(found[name], expected[name]), (timestep, name)
            assert not torch.equal(found[name], expected[name]), "it is not computed in bfloat16"


@pytest.mark.shared_pieces
def test_the_embedded_model_in_bfloat16_is_as_near_as_verify_wants(bfloat16: OpenVINOBfloat16, mini_bundle: Bundle) -> None:
    found = list(verify(mini_bundle, bfloat16))
    assert {one.precision for one in found} == {"bf16"}
    assert [one for one in found if not one.is_good] == []
    assert all(one.error > 1e-4 for one in found if one.segment == CHAIN)


def test_a_processor_without_bfloat16_is_told_what_to_choose(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = OpenVINOBfloat16()

    class Core:
        def get_property(self, device: str, name: str) -> list[str]:
            return ["FP32", "INT8"]

    monkeypatch.setattr(engine, "_core", Core())
    with pytest.raises(EngineError, match=r"openvino-bf16 needs a processor that .*; choose --engine openvino or --engine onnxr"):
        engine.load(tiny.bundle, tiny.segment("front"))


def test_what_it_makes_is_written_into_the_tensors_themselves(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = OpenVINO().load(tiny.bundle, tiny.segment("front"))
    inputs, places, tensor_of = random_inputs(1, 8, 8), set(), runner._tensor  # type: ignore[attr-defined]

    def noted(array: np.ndarray, shared_memory: bool) -> Any:
        places.add(array.__array_interface__["data"][0])
        return tensor_of(array, shared_memory=shared_memory)

    monkeypatch.setattr(runner, "_tensor", noted)
    outputs = runner.run(inputs)
    assert {tensor.data_ptr() for tensor in (inputs["sample"], inputs["timestep"], *outputs.values())} == places


def test_a_file_that_makes_another_shape_than_the_manifest_says_is_refused(tiny: Tiny) -> None:
    features = tiny.bundle.manifest.features | {
        "down.0.sampler": Feature(dtype="float32", shape=("batch", 8, "height", "width/2"))
    }
    bundle = Bundle(tiny.bundle.folder, tiny.bundle.manifest.model_copy(update={"features": features}))
    runner = OpenVINO().load(bundle, tiny.segment("front"))
    with pytest.raises((NeedsBuildError, EngineError), match=r"segment front"):
        runner.run(random_inputs(1, 8, 8))


def test_threads_follow_torch_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert OpenVINO().threads == 7
    assert OpenVINO(threads=3).threads == 3
    with pytest.raises(EngineError, match=r"engine openvino: got 0 threads, expected 1 or more"):
        OpenVINO(threads=0)
