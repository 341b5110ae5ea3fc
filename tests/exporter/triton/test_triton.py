"""The Triton repository: its configuration against Triton's protobuf, and its model with a stand-in for Triton's module.

No tritonserver runs here. ``tests/support/triton_model_config.binpb`` is the descriptor of model_config.proto as tritonclient
2.73.0 has it (NVIDIA, BSD 3-clause: see NOTICE).
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engines import Bundle
from engines.errors import EngineMemoryError
from exporter.__main__ import main
from runtime import Pipeline, Request
from tests.support.commands import Command, assert_refused, command, contents

pytestmark = pytest.mark.shared_pieces
DESCRIPTOR = Path(__file__).resolve().parents[2] / "support/triton_model_config.binpb"
Texts = str | list[str]


@pytest.fixture
def exporter(capfd: Any, monkeypatch: pytest.MonkeyPatch) -> Command:
    return command(main, capfd, monkeypatch)


def parsed(text: str) -> Any:
    """A configuration as Triton's message; raises ParseError for fields and values that there are not."""
    protobuf = pytest.importorskip("google.protobuf", reason="needs protobuf, which ray brings")
    from google.protobuf import (  # type: ignore[import-untyped]
        descriptor_pb2,
        descriptor_pool,
        message_factory,
        text_format,
    )

    assert protobuf.__version__
    pool = descriptor_pool.DescriptorPool()
    pool.Add(descriptor_pb2.FileDescriptorProto.FromString(DESCRIPTOR.read_bytes()))
    kind = message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))
    return text_format.Parse(text, kind())


def test_the_repository_has_configuration_code_and_bundle(exporter: Command, mini_bundle: Bundle, tmp_path: Path) -> None:
    models = tmp_path / "models"
    outcome = exporter("export-triton", mini_bundle.folder, models, "--name", "mini", "--batch", 4, "--instances", 2)
    assert (outcome.code, outcome.err) == (0, [])
    assert outcome.out == [f"wrote {models / 'mini'}; serve it with: tritonserver --model-repository {models}"]
    model = models / "mini"
    assert sorted(path.name for path in model.iterdir()) == ["1", "README.md", "config.pbtxt"]
    assert sorted(path.name for path in (model / "1").iterdir()) == ["bundle", "model.py"]
    Bundle.open(model / "1/bundle").check()
    found = parsed((model / "config.pbtxt").read_text())
    assert (found.name, found.backend, found.max_batch_size, found.instance_group[0].count) == ("mini", "python", 4, 2)
    assert found.parameters["engine"].string_value == "onnxruntime"
    assert [each.name for each in found.input if not each.optional] == ["PROMPT"]
    types = found.DESCRIPTOR.file.enum_types_by_name["DataType"].values_by_number
    assert {each.name: (types[each.data_type].name, list(each.dims)) for each in found.output} == {
        "IMAGE": ("TYPE_UINT8", [-1, -1, 3]),
        "MADE_FROM": ("TYPE_STRING", [1]),
    }
    before = contents(models)
    assert_refused(exporter("export-triton", mini_bundle.folder, models, "--name", "mini"), "mini is there already")
    assert contents(models) == before


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (["--name", "a/b"], ["'a/b' is no name for a model"]),
        (["--engine", "onnxruntim"], ["unknown engine", "onnxruntime"]),
        (["--engine", "tensorrt"], ["has no tensorrt engines; add them with: python -m exporter build"]),
        (["--batch", "0"], ["--batch 0"]),
    ],
)
def test_mistakes_write_nothing(
    exporter: Command, mini_bundle: Bundle, tmp_path: Path, given: list[str], parts: list[str]
) -> None:
    assert_refused(exporter("export-triton", mini_bundle.folder, tmp_path / "models", *given), *parts)
    assert not (tmp_path / "models").exists()


def test_damaged_bundles_and_folders_that_cannot_take_a_model(exporter: Command, bundle_copy: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    before = contents(bundle_copy)
    for folder, part in ((bundle_copy, "is inside of the bundle"), (bundle_copy / "segments", "is inside of the bundle")):
        assert_refused(exporter("export-triton", bundle_copy, folder), part)
    assert_refused(exporter("export-triton", bundle_copy, tmp_path / "file"), "file cannot be read or written")
    assert_refused(exporter("export-triton", tmp_path / "none", tmp_path / "models"), "no such folder")
    assert contents(bundle_copy) == before
    next(bundle_copy.glob("segments/*.onnx")).write_bytes(b"damaged")
    assert_refused(exporter("export-triton", bundle_copy, tmp_path / "models"), "is not the file that was built")
    assert not (tmp_path / "models").exists()


class Tensor:
    """Triton's, as its documentation has it."""

    def __init__(self, name: str, values: np.ndarray) -> None:
        self._name, self._values = name, values

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._values


Made = Callable[..., list[Any]]


@pytest.fixture
def execute(mini_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    """The model's execute on requests that are dictionaries of values by row, as an instance of Triton calls it."""
    utils: Any = ModuleType("triton_python_backend_utils")
    utils.Tensor = Tensor
    utils.TritonError = str
    utils.InferenceResponse = lambda tensors=(), error=None: SimpleNamespace(
        error=error, tensors={each.name(): each.as_numpy() for each in tensors}
    )
    utils.get_input_tensor_by_name = lambda request, name: request.get(name)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utils)
    version = tmp_path / "mini/1"
    version.mkdir(parents=True)
    source = Path(__file__).resolve().parents[3] / "exporter/triton/model.py"
    (version / "model.py").write_text(source.read_text())
    (version / "bundle").symlink_to(mini_bundle.folder)
    spec = importlib.util.spec_from_file_location("model", version / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    settings = json.dumps({"parameters": {"engine": {"string_value": "onnxruntime"}}})
    model.initialize({"model_config": settings, "model_instance_kind": "CPU", "model_instance_device_id": "0"})

    def run(*requests: dict[str, Any]) -> list[Any]:
        return list(model.execute([{name: _tensor(name, values) for name, values in each.items()} for each in requests]))

    run.model = model  # type: ignore[attr-defined]
    return run


def _tensor(name: str, values: Any) -> Tensor:
    rows = values if isinstance(values, list) else [values]
    if isinstance(rows[0], str | bytes):
        return Tensor(name, np.array([[row if isinstance(row, bytes) else row.encode()] for row in rows], object))
    return Tensor(name, np.array([[row] for row in rows]))


def test_requests_of_a_kind_are_made_at_once_and_each_gets_its_own_pictures(
    execute: Made, mini_pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    pipeline = execute.model._pipeline  # type: ignore[attr-defined]
    generate = pipeline.generate

    def counted(request: Request) -> Any:
        calls.append(request.images)
        return generate(request)

    monkeypatch.setattr(pipeline, "generate", counted)
    common = {"STEPS": 2, "PLAN": "deepcache:2"}
    answers = execute(
        {"PROMPT": "a red star", "SEED": 5, **common},
        {"PROMPT": ["a green ring", "a red cross"], "SEED": [7, 8], "STEPS": [2, 2], "PLAN": ["deepcache:2"] * 2},
        {"PROMPT": "a yellow square", "STEPS": 3},
        {"PROMPT": "a blue ring " * 30, "SEED": 5, **common},
    )
    assert calls == [3, 1, 1]
    assert [answer.error for answer in answers] == [None] * 4
    assert [answer.tensors["IMAGE"].shape for answer in answers] == [
        (1, 64, 64, 3),
        (2, 64, 64, 3),
        (1, 64, 64, 3),
        (1, 64, 64, 3),
    ]
    alone = mini_pipeline.generate(Request("a red cross", seed=8, steps=2, plan="deepcache:2"))
    assert np.abs(answers[1].tensors["IMAGE"][1].astype(int) - np.asarray(alone.image, int)).max() <= 1
    told = json.loads(answers[1].tensors["MADE_FROM"][1, 0])
    assert (told["prompt"], told["seed"], told["plan"]) == ("a red cross", "8", "deepcache:2")


def test_a_batch_that_does_not_fit_is_made_one_by_one(execute: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = execute.model._pipeline  # type: ignore[attr-defined]
    generate = pipeline.generate

    def small(request: Request) -> Any:
        if request.images > 1 or "large" in request.prompts[0]:
            raise EngineMemoryError("does not fit into the memory")
        return generate(request)

    monkeypatch.setattr(pipeline, "generate", small)
    first, second, third = execute(*({"PROMPT": prompt, "STEPS": 1} for prompt in ("a star", "a large ring", "a cross")))
    assert (first.error, second.error, third.error) == (None, "does not fit into the memory", None)


@pytest.mark.parametrize(
    ("request_", "part"),
    [
        ({"PROMPT": "a ring", "PLAN": "blok:3"}, "blok"),
        ({"PROMPT": "a ring", "PLAN": "/etc/passwd.json"}, "presets"),
        ({"PROMPT": "a ring", "STEPS": 0}, "steps"),
        ({"PROMPT": "a ring", "HEIGHT": 63}, "height"),
        ({"PROMPT": b"\xff"}, "PROMPT is no text"),
        ({"PROMPT": ["a ring", "a star"], "STEPS": [2, 3]}, "STEPS has unlike values"),
    ],
)
def test_a_mistake_is_the_answer_to_its_request_alone(execute: Made, request_: dict[str, Any], part: str) -> None:
    first, second = execute(request_, {"PROMPT": "a ring", "STEPS": 1})
    assert part in first.error
    assert (second.error, second.tensors["IMAGE"].shape) == (None, (1, 64, 64, 3))
