"""Calls from outside: bodies that are not read, callers who leave, requests that are late or too many."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any

import pytest

from runtime import Request
from tests.serving.conftest import Client
from tests.support.gated import PATIENCE, GatedPipeline
from tests.support.http_answers import NATIVE, OPENAI, error_of

pytestmark = pytest.mark.shared_pieces


@pytest.mark.parametrize(
    ("content", "kind", "status", "message"),
    [
        (b"{", "application/json", 400, "no JSON that can be read"),
        (b"\xff\xfe", "application/json", 400, "no JSON that can be read"),
        (b"[" * 100_000, "application/json", 400, "no JSON that can be read"),
        (b'{"steps": NaN}', "application/json", 400, "no JSON that can be read"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "application/json", 400, "no JSON that can be read"),
        (b"[]", "application/json", 400, "the request is a JSON list"),
        (b"", "application/json", 400, "no JSON that can be read"),
        (b"{}", "text/plain", 415, "send JSON, as application/json"),
        (b"prompt=a", "application/x-www-form-urlencoded", 415, "send JSON"),
        (b"{}" + b" " * 3000, "application/json; charset=utf-8", 413, "more than 2000 bytes"),
    ],
)
def test_bodies_that_are_not_read(client: Client, content: bytes, kind: str, status: int, message: str) -> None:
    asking = client(body=2000) if status == 413 else client()
    assert message in error_of(asking.post(NATIVE, content=content, headers={"content-type": kind}), status)


def test_a_body_that_says_no_length_is_bounded_too(client: Client) -> None:
    parts = (b" " * 1000 for _ in range(10))
    response = client(body=2000).post(NATIVE, content=parts, headers={"content-type": "application/json"})
    assert "more than 2000 bytes" in error_of(response, 413)


def test_a_body_that_does_not_come_is_not_waited_for(client: Client) -> None:
    app = client(body_seconds=0.05).app
    assert run(app, [{"type": "http.request", "body": b"{", "more_body": True}]) == 408


def test_bodies_that_are_read_at_once_are_bounded_together(client: Client) -> None:
    asking = client(body=1000, body_seconds=1.0)

    async def flood() -> list[int]:
        begun = [{"type": "http.request", "body": b"{", "more_body": True}]
        return await asyncio.gather(*(answered(asking.app, [*begun]) for _ in range(9)))

    statuses = asyncio.run(flood())
    assert sorted(statuses) == [408] * 8 + [429], "one more than may be read"
    assert asking.post(NATIVE, json={"prompt": "a star", "steps": 1}).status_code == 200


def run(app: Any, messages: list[dict[str, Any]], later: Callable[[], Any] | None = None) -> int:
    return asyncio.run(answered(app, messages, later))


async def answered(app: Any, messages: list[dict[str, Any]], later: Callable[[], Any] | None = None) -> int:
    """The status that the app answers to messages with, after which comes what ``later`` gives, or nothing."""
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": NATIVE, "raw_path": b""}
    scope |= {"query_string": b"", "root_path": "", "scheme": "http", "server": ("x", 80), "client": ("y", 1)}
    scope |= {"headers": [(b"content-type", b"application/json")], "state": {}}
    found: list[int] = []

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop(0)
        if later is not None:
            return await later()
        return await asyncio.Event().wait()  # type: ignore[return-value]  # for ever

    async def send(message: dict[str, Any]) -> None:
        found.extend([message["status"]] if message["type"] == "http.response.start" else [])

    await asyncio.wait_for(app(scope, receive, send), PATIENCE)
    return found[0]


def test_a_caller_who_leaves_is_forgotten(client: Client, gated: GatedPipeline) -> None:
    asking = client()
    body = json.dumps({"prompt": "a star", "steps": 4}).encode()

    async def leave() -> dict[str, Any]:
        await asyncio.to_thread(gated.wait_until_running)
        return {"type": "http.disconnect"}

    with gated.closed():
        assert run(asking.app, [{"type": "http.request", "body": body}], leave) == 499
    service = asking.app.state.service  # type: ignore[attr-defined]
    assert service.submit(None, Request("a ring", steps=1)).future.result(PATIENCE).images
    assert gated.records == 1, "the call for nobody was stopped"
    assert 'requests_total{endpoint="generate",outcome="gone"} 1.0' in asking.get("/metrics").text


def test_what_is_late_and_what_is_too_much(client: Client, gated: GatedPipeline) -> None:
    asking = client(seconds=2.0, queue=1)
    answers: list[Any] = []
    with gated.closed():
        running = threading.Thread(target=lambda: answers.append(asking.post(NATIVE, json={"prompt": "a star", "steps": 2})))
        running.start()
        gated.wait_until_running()
        service = asking.app.state.service  # type: ignore[attr-defined]
        waiting = service.submit(None, Request("a cross", steps=1))
        full = asking.post(OPENAI, json={"prompt": "a ring", "steps": 1})
        running.join(PATIENCE)
    assert "pictures are waiting, and no more can" in error_of(full, 429)
    assert int(full.headers["retry-after"]) >= 1
    assert "not finished in the time" in error_of(answers[0], 504)
    assert not waiting.future.cancelled()
