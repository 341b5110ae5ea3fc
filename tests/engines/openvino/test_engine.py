"""OpenVINO: what ONNX Runtime makes, at every shape; near it in bfloat16, at every timestep; and no copies."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from engines import Bundle, EngineError, NeedsBuildError, make_engine
from engines.bundle.manifest import Feature
from engines.bundle.names import SAMPLE, TEXT, TIMESTEP, TOKENS
from engines.null import Null
from engines.openvino.engine import OpenVINO, OpenVINOBfloat16
from engines.openvino.models import LENGTHS
from exporter.verification.inputs import random_inputs
from exporter.verification.metrics import relative_error
from exporter.verification.verify import CHAIN, LEAST_PSNR, TOLERANCE, compare_latents, verify
from runtime import LoadedBundle, Pipeline
from tests.engines.conftest import Tiny
from tests.engines.conftest import random_inputs as tiny_inputs

pytest.importorskip("openvino", reason="install it with: pip install --editable '.[openvino]'")


@pytest.fixture
def bfloat16() -> OpenVINOBfloat16:
    engine = OpenVINOBfloat16()
    try:
        engine.check_device()
    except EngineError as error:
        pytest.skip(str(error))
    return engine


@pytest.mark.shared_pieces
def test_every_segment_agrees_with_onnx_runtime_at_every_shape(mini_bundle: Bundle) -> None:
    """The innermost features of 64x64 pixels are one number each: there attention was wrong where text could have any length."""
    manifest = mini_bundle.manifest
    wanted, found = (LoadedBundle.load(mini_bundle, make_engine(name)).runners for name in ("onnxruntime", "openvino"))
    chunk = manifest.text_length
    for rows, height, width, tokens in ((1, 64, 64, chunk), (2, 64, 128, chunk), (4, 64, 64, 3 * chunk), (2, 128, 64, chunk)):
        features = dict(random_inputs(manifest, Null(), rows, height, width))
        for segment in manifest.segments:
            made = found[segment.name].run(features)
            expected = wanted[segment.name].run(features)
            for name in segment.outputs:
                assert relative_error(made[name], expected[name]) < TOLERANCE["fp32"], (segment.name, name, rows, height, width)
            features |= expected
            if TOKENS in segment.inputs:
                features[TEXT] = features[TEXT].repeat(1, tokens // chunk, 1)


@pytest.mark.shared_pieces
def test_a_picture_is_that_of_onnx_runtime_under_a_plan(mini_bundle: Bundle) -> None:
    made = {
        name: Pipeline(mini_bundle, make_engine(name)).generate("a red star", steps=4, seed=1, plan="deepcache:2").latents
        for name in ("onnxruntime", "openvino")
    }
    assert relative_error(made["openvino"], made["onnxruntime"]) < 1e-4


@pytest.mark.shared_pieces
def test_the_embedded_model_in_bfloat16_is_as_near_as_verify_wants(bfloat16: OpenVINOBfloat16, mini_bundle: Bundle) -> None:
    found = list(verify(mini_bundle, bfloat16))
    assert {one.precision for one in found} == {"openvino-bf16"}
    assert [one for one in found if not one.is_good] == []
    assert all(one.error > 1e-4 for one in found if one.segment == CHAIN), "it is not computed in bfloat16"
    assert compare_latents(mini_bundle, bfloat16, (64, 64), 4) > LEAST_PSNR
    assert compare_latents(mini_bundle, OpenVINO(), (64, 64), 4) > 2 * LEAST_PSNR  # torch's own, summed in another order


def test_bfloat16_is_near_at_every_timestep(bfloat16: OpenVINOBfloat16, tiny: Tiny) -> None:
    """Timesteps above 256 are no numbers of bfloat16: their sines would be those of others."""
    runner = bfloat16.load(tiny.bundle, tiny.segment("front"))
    for timestep in (1, 501, 999):
        inputs = tiny_inputs(2, 16, 24) | {TIMESTEP: torch.full((2,), timestep)}
        found, expected = runner.run(inputs), tiny.reference(inputs)
        for name in runner.segment.outputs:
            assert relative_error(found[name], expected[name]) < 2e-2, (timestep, name)  # 8 bits, at most 150 products
            assert not torch.equal(found[name], expected[name]), "it is not computed in bfloat16"


def test_a_processor_without_bfloat16_is_told_what_to_choose(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = OpenVINOBfloat16()
    monkeypatch.setattr(engine, "_core", SimpleNamespace(get_property=lambda device, name: ["FP32", "INT8"]))
    with pytest.raises(EngineError, match=r"openvino-bf16 needs a processor that .*; choose --engine openvino or --engine onnxr"):
        engine.load(tiny.bundle, tiny.segment("front"))


def test_no_more_than_a_few_lengths_of_text_have_a_model(tiny: Tiny) -> None:
    runner: Any = OpenVINO().load(tiny.bundle, tiny.segment("back"))
    for tokens in range(1, LENGTHS + 3):
        inputs = tiny_inputs(1, 8, 8, tokens=tokens)
        reference = tiny.reference(inputs)
        assert relative_error(runner.run(reference)["noise"], reference["noise"]) < 1e-5
    assert list(runner._models._kept) == list(range(3, LENGTHS + 3))


def test_what_it_makes_is_written_into_the_tensors_themselves(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    runner: Any = OpenVINO().load(tiny.bundle, tiny.segment("front"))
    inputs, places, tensor_of = tiny_inputs(1, 8, 8), set(), runner._tensor

    def noted(array: np.ndarray, shared_memory: bool) -> Any:
        places.add(array.__array_interface__["data"][0])
        return tensor_of(array, shared_memory=shared_memory)

    monkeypatch.setattr(runner, "_tensor", noted)
    outputs = runner.run(inputs)
    assert {tensor.data_ptr() for tensor in (inputs[SAMPLE], inputs[TIMESTEP], *outputs.values())} == places


def test_a_file_that_makes_another_shape_than_the_manifest_says_is_refused(tiny: Tiny) -> None:
    features = tiny.bundle.manifest.features | {
        "down.0.sampler": Feature(dtype="float32", shape=("batch", 8, "height", "width/2"))
    }
    bundle = Bundle(tiny.bundle.folder, tiny.bundle.manifest.model_copy(update={"features": features}))
    runner = OpenVINO().load(bundle, tiny.segment("front"))
    with pytest.raises(NeedsBuildError, match=r"segment front"):
        runner.run(tiny_inputs(1, 8, 8))


def test_threads_follow_torch_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert OpenVINO().threads == 7
    assert OpenVINO(threads=3).threads == 3
    with pytest.raises(EngineError, match=r"engine openvino: got 0 threads, expected 1 or more"):
        OpenVINO(threads=0)
