"""The service as HTTP, in this process: both ways to ask, what they answer, and what is counted."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import fields
from typing import Any

import pytest

from runtime import Request
from serving.http.asked import DESCRIPTIONS, TRAVELS
from serving.http.interface_page import interface_page
from tests.serving.conftest import Client
from tests.support.diffusers_pipelines import mask, picture
from tests.support.gated import GatedPipeline
from tests.support.http_answers import NATIVE, OPENAI, encoded, error_of, opened

pytestmark = pytest.mark.shared_pieces


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


def test_the_page_of_the_interface_has_every_field_and_asks_no_other_server(client: Client) -> None:
    asking = client()
    shown, interface = asking.get("/docs"), asking.get("/openapi.json").json()
    assert shown.headers["content-security-policy"].startswith("default-src 'none'")
    assert not re.search(r"<script|<link|<img|src=|url\(|https?:", shown.text)
    for path, operations in interface["paths"].items():
        for method, operation in operations.items():
            assert f"<code>{method.upper()} {path}</code>" in shown.text
            schema = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            for field in schema.get("properties", {}):
                assert f"<code>{field}</code>" in shown.text
    assert "string or list of string or null" in shown.text
    assert interface_page({"info": {"title": "<b>", "version": "", "description": "&"}, "paths": {}}).count("<b>") == 0


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
    "several prompts": ({"prompt": ["a", "b"]}, "prompt is missing or no text; give one text (lists go to /generate)"),
    "no size": ({"size": "big"}, "write WIDTHxHEIGHT"),
    "a size that does not fit": ({"size": "64x100"}, "size 100x64: height and width must be multiples of 64"),
    "a huge size": ({"size": "64000x64000"}, "this service makes pictures of 1048576 pixels"),
    "half a picture": ({"n": 0.5}, "num_images is a float"),
    "no picture": ({"n": 0}, "num_images = 0"),
    "too many": ({"n": 9}, "9 pictures are asked for"),
    "a picture to start from": ({"image": ""}, "unknown parameter 'image'; /docs lists them"),
}
NATIVES: dict[str, tuple[dict[str, Any], str]] = {
    "too many": ({"prompt": ["a"] * 5, "num_images": 2}, "10 pictures are asked for"),
    "a size that does not fit": ({"height": 100}, "size 100x64: height and width must be multiples of 64"),
    "a height of nothing": ({"height": 0, "width": 64}, "size 0x64: height and width must be multiples of 64 pixels"),
    "tensors": ({"latents": [1.0]}, "generate takes no 'latents'; /docs has what it takes"),
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


def test_a_service_that_stops_says_so(client: Client) -> None:
    asking = client()
    assert asking.get("/readyz").json() == {"status": "ready"}
    asking.app.state.service.stop_accepting()  # type: ignore[attr-defined]
    assert asking.get("/readyz").status_code == 503
    assert asking.get("/healthz").status_code == 200
    response = asking.post(NATIVE, json={"prompt": "a star"})
    assert "being stopped" in error_of(response, 503)
    assert response.headers["retry-after"]


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
