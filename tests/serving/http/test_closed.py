"""What the service keeps to itself: pictures without the key, files, the names of folders, and its faults."""

from __future__ import annotations

import base64
import builtins
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines.errors import EngineMemoryError
from serving.http.faults import without_paths
from tests.serving.conftest import Client
from tests.support.diffusers_pipelines import picture
from tests.support.gated import GatedPipeline
from tests.support.http_answers import KEY, NATIVE, OPENAI, encoded, error_of

pytestmark = pytest.mark.shared_pieces


def test_a_key_is_needed_for_all_but_health(client: Client, gated: GatedPipeline) -> None:
    asking = client(key=KEY)
    for path in (OPENAI, NATIVE):
        for headers in (
            {},
            {"Authorization": f"Bearer {KEY[:-1]}"},
            {"Authorization": KEY},
            {"Authorization": "Bearer é".encode()},
        ):
            response = asking.post(path, content=b"x" * 100, headers=headers)  # type: ignore[arg-type]
            assert "needs its key" in error_of(response, 401)
            assert response.headers["www-authenticate"] == "Bearer"
    for path in ("/v1/models", "/v1/models/mini", "/metrics"):
        assert asking.get(path).status_code == 401
        assert asking.get(path, headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
    assert {asking.get(path).status_code for path in ("/healthz", "/readyz", "/docs", "/openapi.json")} == {200}
    assert gated.requests == []
    response = asking.post(NATIVE, json={"prompt": "a star", "steps": 1}, headers={"Authorization": f"Bearer {KEY}"})
    assert response.status_code == 200
    assert KEY not in asking.get("/openapi.json").text


def test_no_file_is_opened_for_a_caller(client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, image = tmp_path / "plan.json", tmp_path / "image.png"
    plan.write_text('{"name": "theirs"}')
    picture().save(image)
    asking = client()
    asking.post(NATIVE, json={"prompt": "a star", "steps": 1})  # what is loaded late is there
    touched: list[str] = []

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(file: Any, *rest: Any, **more: Any) -> Any:
            touched.append(str(file))
            return function(file, *rest, **more)

        return noted

    monkeypatch.setattr(builtins, "open", noting(builtins.open))
    monkeypatch.setattr(io, "open", noting(io.open))
    monkeypatch.setattr(Path, "open", noting(Path.open))
    monkeypatch.setattr(Path, "read_text", noting(Path.read_text))
    names = [str(plan), str(image), "/etc/passwd", "../../../etc/passwd", f"file://{image}", "http://127.0.0.1:1/x.png", "x.json"]
    for name in names:
        for field in ("image", "mask", "plan", "scheduler", "model", "bundle", "out"):
            more = {} if field != "mask" else {"image": encoded(picture())}
            response = asking.post(NATIVE, json={"prompt": "a star", "steps": 1, **more, field: name})
            assert response.status_code in {400, 404}, (field, name)
            assert "root:" not in response.text
    for field in ("plan", "scheduler", "model"):
        assert asking.post(OPENAI, json={"prompt": "a star", "steps": 1, field: str(plan)}).status_code in {400, 404}
    for path in ("/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/docs/../../etc/passwd", "/v1/models/..%2f..%2fetc%2fpasswd"):
        assert asking.get(path).status_code == 404
    mine = asking.app.state.service.pipelines["mini"].bundle.folder  # type: ignore[attr-defined]
    assert [file for file in touched if not file.startswith(str(mine))] == []


def test_answers_name_no_folder_of_the_server(client: Client, gated: GatedPipeline) -> None:
    asking, folder = client(), gated.bundle.folder
    for options in ({"plan": "switch:0.4"}, {"clip_skip": 2}, {"plan": "unit:2"}, {"height": 65}, {"plan": f"{folder}/x"}):
        message = error_of(asking.post(NATIVE, json={"prompt": "a star", **options}), 400)
        assert str(folder.parent) not in message
        assert "python -m" not in message
    answered = asking.post(NATIVE, json={"prompt": "a star", "steps": 1}).text
    for text in (
        base64.b64decode(json.loads(answered)["images"][0]).decode("latin-1"),
        asking.get("/openapi.json").text,
        answered,
    ):
        assert str(folder) not in text
        assert str(Path.home()) not in text


def test_paths_are_taken_out_of_messages() -> None:
    told = without_paths("no segment in /srv/bundles/x and '~/y', at C:\\z; height/4 and 1/2", {"/srv/bundles/x": "mini"})
    assert told == "no segment in mini and '[path]', at [path]; height/4 and 1/2"
    told = without_paths("/docs lists them (lists go to /generate); not /docs/secret, /generate.py or x:/docs-of-mine")
    assert told == "/docs lists them (lists go to /generate); not [path], [path] or x:[path]"


def test_a_fault_is_told_to_the_log_alone(
    client: Client, gated: GatedPipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def stumble(*given: Any, **options: Any) -> Any:
        raise raised

    monkeypatch.setattr(gated, "generate", stumble)
    asking = client()
    raised: Exception = RuntimeError("the secret of /srv/secret")
    assert error_of(asking.post(NATIVE, json={"prompt": "a"}), 500) == "this service failed at the request; its log says why"
    assert "the secret of /srv/secret" in caplog.text
    assert "Traceback" in caplog.text
    raised = EngineMemoryError("does not fit into the memory of /dev/x")
    assert error_of(asking.post(NATIVE, json={"prompt": "a"}), 503) == "does not fit into the memory of [path]"
    assert 'requests_total{endpoint="generate",outcome="failed"} 1.0' in asking.get("/metrics").text
