"""The service as HTTP, in this process: both ways to ask, errors, the key, limits, and what is never opened."""

from __future__ import annotations

import asyncio
import base64
import builtins
import io
import json
import threading
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from engines.errors import EngineMemoryError
from runtime import Request
from serving.http.asked import DESCRIPTIONS, TRAVELS
from serving.http.faults import without_paths
from tests.serving.conftest import Client
from tests.support.diffusers_pipelines import mask, picture
from tests.support.gated import PATIENCE, GatedPipeline

pytestmark = pytest.mark.shared_pieces
OPENAI, NATIVE = "/v1/images/generations", "/generate"
KEY = "a-key-of-24-characters-x"


def encoded(image: Image.Image, form: str = "PNG") -> str:
    file = io.BytesIO()
    image.save(file, format=form)
    return base64.b64encode(file.getvalue()).decode()


def opened(text: str) -> Any:
    """A picture from an answer, with the texts in its file."""
    return Image.open(io.BytesIO(base64.b64decode(text)))


def error_of(response: Any, status: int) -> str:
    """The message of an error in OpenAI's form, which is one line."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"].splitlines()) == 1
    return error["message"]


def test_pictures_in_openais_form(client: Client, gated: GatedPipeline) -> None:
    asked = {"prompt": "a red star", "n": 2, "size": "64x128", "response_format": "b64_json", "model": "mini", "user": "me"}
    ours = {"seed": 7, "steps": 2, "guidance_scale": 2, "negative_prompt": "a ring", "plan": "block:2", "scheduler": "ddim"}
    response = client().post(OPENAI, json=asked | ours)
    assert response.status_code == 200, response.text
    found = response.json()
    assert (found["size"], found["output_format"], [each["seed"] for each in found["data"]]) == ("64x128", "png", [7, 8])
    images = [opened(each["b64_json"]) for each in found["data"]]
    assert [image.size for image in images] == [(64, 128)] * 2, "OpenAI's sizes are WIDTHxHEIGHT"
    assert [(image.text["prompt"], image.text["seed"]) for image in images] == [("a red star", "7"), ("a red star", "8")]
    ran = gated.requests[0]
    assert (ran.steps, ran.guidance_scale, ran.scheduler, ran.found_plan.name) == (2, 2.0, "ddim", "block:2")
    assert ran.negative_prompts == ("a ring", "a ring")


def test_openais_form_draws_a_seed_where_none_is_given(client: Client) -> None:
    asking = client()
    seeds = [asking.post(OPENAI, json={"prompt": "a star", "steps": 1}).json()["data"][0]["seed"] for _ in range(2)]
    assert seeds[0] != seeds[1]


def test_all_that_travels_of_a_request(client: Client, gated: GatedPipeline) -> None:
    given = {
        "prompt": ["a red star", "a ring"],
        "negative_prompt": ["a ring", "a star"],
        "num_inference_steps": 4,
        "guidance_scale": 2.5,
        "seed": [5, 6],
        "height": 64,
        "width": 128,
        "num_images": 1,
        "scheduler": "euler",
        "plan": {"name": "mine", "rules": [{"units": ["up.-2"], "when": {"mode": "uniform", "every": 2}}]},
        "image": "data:image/png;base64," + encoded(picture()),
        "strength": 0.5,
        "mask": encoded(mask()),
        "allow_nonfinite": True,
        "guidance_rescale": 0.0,
        "long_prompts": "cut",
        "clip_skip": 0,
        "model": "mini",
    }
    response = client().post(NATIVE, json=given)
    assert response.status_code == 200, response.text
    found = response.json()
    assert [opened(text).size for text in found["images"]] == [(128, 64)] * 2
    assert (found["seeds"], found["plan"], found["guidance_scale"], found["model"]) == ([5, 6], "mine", 2.5, "mini")
    assert [(step["index"], step["kind"]) for step in found["steps"]] == [(0, "key"), (1, "inherit")], "half of four"
    assert found["steps"][1]["inherited"]
    ran = gated.requests[0]
    assert {name for name in TRAVELS if getattr(ran, name) == next(f.default for f in fields(Request) if f.name == name)} == {
        "num_images",
        "guidance_rescale",
    }, "all others are told apart from what they are by default"


def test_every_field_of_a_request_travels_or_is_known_to_stay(client: Client) -> None:
    stays = {"generator", "latents", "prompt_embeds", "negative_prompt_embeds", "output_type"}
    assert {each.name for each in fields(Request)} == {*TRAVELS, *stays}
    assert set(DESCRIPTIONS) == set(TRAVELS)
    interface = client().get("/openapi.json").json()
    body = interface["paths"][NATIVE]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(body["properties"]) == {*TRAVELS, "model"}
    assert body["properties"]["steps"] == {
        "type": "integer",
        "default": 20,
        "description": body["properties"]["steps"]["description"],
    }
    assert "/docs" not in interface["paths"]
    assert "swagger" in client().get("/docs").text


def test_models(client: Client) -> None:
    asking = client()
    assert [model["id"] for model in asking.get("/v1/models").json()["data"]] == ["mini"]
    assert asking.get("/v1/models/mini").json()["object"] == "model"
    assert "choose from: mini" in error_of(asking.get("/v1/models/other"), 404)


def test_addresses_that_there_are_not(client: Client) -> None:
    asking = client()
    assert error_of(asking.get("/nowhere"), 404) == "Not Found"
    assert error_of(asking.get(NATIVE), 405) == "Method Not Allowed"


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({"prompt": None}, "prompt"),
    "an empty prompt": ({"prompt": " "}, "the prompt is empty"),
    "a scheduler that is not": ({"scheduler": "eulr"}, "did you mean euler?"),
    "a class of diffusers": ({"scheduler": "DiffusionPipeline"}, "unknown scheduler"),
    "a plan that is not": ({"plan": "blok:2"}, "did you mean block:2?"),
    "a plan that the bundle cannot run": ({"plan": "unit:3"}, "plan unit:3 inherits"),
    "a plan with a wrong field": ({"plan": {"name": "x", "rules": [{"units": []}]}}, "the plan, rules.0.units"),
    "a plan that is a number": ({"plan": 3}, "plan is a int"),
    "steps as text": ({"steps": "4"}, "steps is a str"),
    "too many steps": ({"steps": 1000}, "steps = 1000; this service takes 150"),
    "a prompt that is too long": ({"prompt": "a" * 5000}, "a prompt has 5000 characters"),
    "half a character": ({"prompt": "a \ud800"}, "no text"),
    "half a character in a name": ({"\ud800": 1}, "\\ud800"),
    "a model that is not": ({"model": 3}, "model is a int"),
    "a field that is not": ({"bundle": "/etc"}, "bundle"),
    "guidance that is none": ({"guidance_scale": "high"}, "guidance_scale is a str"),
    "a seed of 30 digits": ({"seed": 10**30}, "seed ="),
}  # fmt: skip
OPENAIS: dict[str, tuple[dict[str, Any], str]] = {
    "an address": ({"response_format": "url"}, "'b64_json' alone"),
    "a stream": ({"stream": True}, "stream = True; this service gives False alone"),
    "several prompts": ({"prompt": ["a", "b"]}, "prompt is missing or no text"),
    "no size": ({"size": "big"}, "write WIDTHxHEIGHT"),
    "a size that does not fit": ({"size": "64x100"}, "size 100x64: height and width must be multiples of 64"),
    "a huge size": ({"size": "64000x64000"}, "this service makes pictures of 1048576 pixels"),
    "half a picture": ({"n": 0.5}, "num_images is a float"),
    "no picture": ({"n": 0}, "num_images = 0"),
    "too many": ({"n": 9}, "9 pictures are asked for"),
    "a picture to start from": ({"image": ""}, "unknown parameter 'image'"),
}
NATIVES: dict[str, tuple[dict[str, Any], str]] = {
    "too many": ({"prompt": ["a"] * 5, "num_images": 2}, "10 pictures are asked for"),
    "a size that does not fit": ({"height": 100}, "size 100x64: height and width must be multiples of 64"),
    "tensors": ({"latents": [1.0]}, "generate takes no 'latents'"),
    "clip_skip": ({"clip_skip": 3}, "clip_skip = 3, and the text encoder of mini was built for 0; leave it out"),
    "a picture that is a number": ({"image": 3}, "image is a int"),
    "a picture that is none": ({"image": base64.b64encode(b"GIF89a").decode()}, "image is no picture"),
    "a damaged picture": ({"image": encoded(picture())[:80]}, "image is a damaged picture"),
    "a mask alone": ({"mask": encoded(mask())}, "no image"),
    "a mask of another size": (
        {"image": encoded(picture()), "mask": encoded(mask().resize((32, 32)))},
        "mask and image are 32x32",
    ),
    "a postscript program": ({"image": base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0\n").decode()}, "image is no picture"),
}


@pytest.mark.parametrize(
    ("path", "mistakes"), [(OPENAI, MISTAKES | OPENAIS), (NATIVE, MISTAKES | NATIVES)], ids=["openai", "native"]
)
def test_a_mistake_is_answered_with_one_line_that_says_what_to_do(
    client: Client, path: str, mistakes: dict[str, tuple[dict[str, Any], str]], gated: GatedPipeline
) -> None:
    asking = client()
    for name, (options, message) in mistakes.items():
        body = json.dumps({"prompt": "a star", "steps": 4, **options})
        response = asking.post(path, content=body, headers={"content-type": "application/json"})
        assert message in error_of(response, 400), name
    assert gated.requests == []


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


def test_a_service_that_stops_says_so(client: Client) -> None:
    asking = client()
    assert asking.get("/readyz").json() == {"status": "ready"}
    asking.app.state.service.stop_accepting()  # type: ignore[attr-defined]
    assert asking.get("/readyz").status_code == 503
    assert asking.get("/healthz").status_code == 200
    response = asking.post(NATIVE, json={"prompt": "a star"})
    assert "being stopped" in error_of(response, 503)
    assert response.headers["retry-after"]


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


def test_metrics_count_what_was_made(client: Client) -> None:
    asking = client(batch=2)
    asking.post(NATIVE, json={"prompt": "a star", "steps": 2, "num_images": 3})
    asking.post(OPENAI, json={"prompt": "a star", "steps": 0})
    text = asking.get("/metrics").text
    for line in (
        'unet_heirloom_requests_total{endpoint="generate",outcome="made"} 1.0',
        'unet_heirloom_requests_total{endpoint="openai",outcome="refused"} 1.0',
        'unet_heirloom_batch_pictures_count{model="mini"} 2.0',
        'unet_heirloom_batch_pictures_sum{model="mini"} 3.0',
        'unet_heirloom_picture_seconds_count{model="mini"} 3.0',
        'unet_heirloom_step_seconds_count{model="mini"} 4.0',
        'unet_heirloom_waiting_pictures{model="mini"} 0.0',
        'unet_heirloom_request_seconds_count{endpoint="generate"} 1.0',
    ):
        assert line in text.splitlines()
