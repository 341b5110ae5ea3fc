"""Bodies drawn at random: each is answered, with pictures or with one line, and never as a fault of the service."""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

from engines import Bundle, make_engine
from runtime import PRESETS, Pipeline
from serving import Limits, make_app
from serving.http import native, openai_images
from tests.support.gated import PATIENCE

pytestmark = [pytest.mark.shared_pieces, pytest.mark.filterwarnings("ignore:this model never learned the word")]
BODIES = 160
"""For each of the two addresses."""


def png(draw: random.Random) -> str:
    file = io.BytesIO()
    mode = draw.choice(["RGB", "L", "RGBA", "1", "P", "I;16"])
    Image.new(mode, (draw.choice([1, 32, 64]), draw.choice([1, 64, 128]))).save(file, format="PNG")
    data = bytearray(file.getvalue())
    if draw.random() < 0.5:
        for _ in range(draw.randrange(1, 5)):
            data[draw.randrange(len(data))] = draw.randrange(256)
    return base64.b64encode(bytes(data)).decode()


def plan(draw: random.Random) -> Any:
    presets = [preset.example for preset in PRESETS.values()]
    text = presets[int(draw.random() * len(presets))]  # what is drawn after it stays the same with another number of presets
    mode: dict[str, Any] = draw.choice(
        [
            {"mode": "uniform", "every": 2},
            {"mode": "explicit", "steps": [0, 2]},
            {"mode": "threshold", "above": 0.1},
            {"mode": "x"},
        ]
    )
    rule: dict[str, Any] = {"units": [draw.choice(["up.-2", "*", "head", "*.attention", "["])], "when": mode}
    rule |= draw.choice(
        [{}, {"kind": "residual"}, {"predict": {"order": 1}}, {"start": 0.5}, {"start": draw.random(), "stop": 0}]
    )
    made: dict[str, Any] = {"name": draw.choice(["x", "\x00", "y" * 300]), "rules": [rule] * draw.randrange(3)}
    other = {**made, "unets": [{"unet": "a"}]}
    found: list[Any] = [text, f"{text}+{text}", text[:-1], "x.json", "/etc/passwd", made, [made], other]
    return draw.choice(found)


STRANGE: list[Callable[[random.Random], Any]] = [
    lambda draw: draw.choice([None, True, False, "", 0, -1, 1, 2**63, 10**400, 1e308, 0.5, 64, 128]),
    lambda draw: draw.choice(["\ud800", "\x00", "a" * 5000, "../..", "64x64", "auto", "ddim", "é\u2028", "b64_json"]),
    lambda draw: draw.choice([[], {}, [None], [[]], {"a": 1}, ["a star"] * draw.randrange(20), [1, 2], [2**70]]),
    plan,
    png,
]
SENSIBLE: dict[str, Callable[[random.Random], Any]] = {
    "prompt": lambda draw: draw.choice(["a star", "a ring " * draw.randrange(1, 60)]),
    "steps": lambda draw: draw.randrange(1, 4),
    "scheduler": lambda draw: draw.choice(["ddim", "dpm++", "euler a", "heun", "lcm", "pndm"]),
    "plan": plan,
    "guidance_scale": lambda draw: draw.choice([0, 1, 3, 7.5, -5, 1e300]),
    "seed": lambda draw: draw.choice([None, 0, -(2**63), 2**63 - 1]),
    "image": png,
    "mask": png,
    "strength": lambda draw: draw.random(),
    "height": lambda draw: draw.choice([64, 128, 1024, 65]),
    "size": lambda draw: draw.choice(["64x64", "64x128", "0x0", "axb"]),
    "n": lambda draw: draw.randrange(4),
    "model": lambda draw: draw.choice(["mini", "mini ", None]),
}


def drawn(draw: random.Random, names: list[str]) -> bytes:
    """A body: fields that make sense, some that do not, and now and then no JSON at all."""
    found: dict[str, Any] = {"prompt": "a star", "steps": 2}
    for name in draw.sample(names, draw.randrange(1, 5)):
        strange = name not in SENSIBLE or draw.random() < 0.5
        found[name] = draw.choice(STRANGE)(draw) if strange else SENSIBLE[name](draw)
    if draw.random() < 0.1:
        found[draw.choice(["bundle", "output", "__class__", "\ud800", "x" * 500])] = draw.choice(STRANGE)(draw)
    body = json.dumps(found).encode()
    if draw.random() < 0.1:
        at = draw.randrange(len(body))
        body = draw.choice([body[:at], body[:at] + bytes([draw.randrange(256)]) + body[at + 1 :]])
    return body


@pytest.mark.parametrize(
    ("path", "schema", "seed"),
    [("/v1/images/generations", openai_images.SCHEMA, 1), ("/generate", native.SCHEMA, 5)],
    ids=["openai", "native"],
)
def test_every_body_is_answered(mini_bundle: Bundle, path: str, schema: dict[str, Any], seed: int) -> None:
    from starlette.testclient import TestClient

    draw, statuses = random.Random(seed), list[int]()
    pipeline = Pipeline(mini_bundle, make_engine("null"))
    app = make_app({"mini": pipeline}, Limits(pixels=128 * 128, picture_pixels=128 * 128, seconds=PATIENCE))
    with TestClient(app, raise_server_exceptions=False) as asking:
        for _ in range(BODIES):
            body = drawn(draw, list(schema["properties"]))
            response = asking.post(path, content=body, headers={"content-type": "application/json"})
            statuses.append(response.status_code)
            assert response.status_code in {200, 400, 404, 422}, (body[:2000], response.text)
            if response.status_code != 200:
                message = response.json()["error"]["message"]
                assert len(message.splitlines()) == 1
                assert len(message) < 4000
                assert str(mini_bundle.folder.parent) not in message
        assert asking.get("/readyz").status_code == 200
        assert asking.app.state.service.is_idle  # type: ignore[attr-defined]
    assert statuses.count(200) > BODIES // 20
    assert statuses.count(400) > BODIES // 4
