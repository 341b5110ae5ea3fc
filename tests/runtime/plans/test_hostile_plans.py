"""Plans from strangers: whatever a file holds, it is a plan that can be laid out or one line of ours; never a hang."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from engines import UserError
from runtime import Plan, PlanError, Schedule, find_plan
from runtime.plans.checks import check_runs
from tests.support.unets import manifest_of, small_unet

SECONDS = float(os.environ.get("FUZZ_SECONDS", "5"))
"""How long plans are drawn; longer on request."""

BASE: dict[str, Any] = {
    "version": 1,
    "name": "mine",
    "unets": [{"unet": "assembled", "start": 0, "stop": 0.5}, {"unet": "original", "start": 0.5, "stop": 1}],
    "switch_by": "noise",
    "carry": False,
    "guidance": {"when": {"mode": "uniform", "every": 2}, "scale": 0.9},
    "found": {"scheduler": "dpm++", "steps": 9, "guidance_scale": 3.0, "prompts": 4, "cost": 0.5, "psnr": 40.0},
    "rules": [
        {"units": ["up.-2"], "kind": "output", "when": {"mode": "uniform", "every": 2}, "start": 0.0, "stop": 1.0},
        {"units": ["*.attention"], "kind": "residual", "when": {"mode": "quadratic", "every": 3, "center": 0.3, "power": 1.4}},
        {"units": ["mid"], "when": {"mode": "explicit", "steps": [0, 2, 4], "of": 8}},
        {"units": ["down.1"], "when": {"mode": "random", "every": 2, "seed": 1}},
        {"units": ["up.0.layer.0"], "when": {"mode": "threshold", "above": 0.3, "feature": "stem"}},
        {
            "units": ["down.0.layer.1"],
            "when": {"mode": "front", "every": 2, "power": 2.0},
            "predict": {"order": 1, "damping": 0.5},
        },
        {"units": ["head"], "when": {"mode": "uniform", "every": 3}, "predict": {"order": 0, "space": "x0"}},
    ],
}
LEAVES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 7, 2**31, 2**63, 2**64, 10**30, 10**400, -(10**30), 0.5, -0.0, 1e-320, 1e308, float("inf"),
    float("nan"), "", " ", "up", "up.-1", "*", "[!a]*", "[", "a" * 100_000, "*a" * 5_000, "line\nbreak", "\u2028", "\ud800",
    [], {}, [[]], [0] * 20_000, {"mode": "uniform", "every": 10**30}, {"mode": "threshold"}, {"mode": []}, ["stem"] * 2_000,
]  # fmt: skip


def places(data: Any, found: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to all that is in a JSON document."""
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [found, *(path for key, value in inner for path in places(value, (*found, key)))]


def mutated(dice: random.Random) -> Any:
    """The plan above with some of it replaced, left out, repeated or renamed."""
    data: Any = json.loads(json.dumps(BASE))
    for _ in range(dice.randint(1, 4)):
        *way, key = dice.choice([path for path in places(data) if path] or [(0,)])
        parent = data
        for part in way:
            parent = parent[part]
        change = dice.random()
        if change < 0.6:
            parent[key] = deepcopy(dice.choice(LEAVES))
        elif change < 0.75:
            del parent[key]
        elif isinstance(parent, dict):
            parent[dice.choice(["x", "mode", "line\nbreak", "n" * 50_000, "every"])] = deepcopy(parent[key])
        else:
            parent.extend(deepcopy(parent[key]) for _ in range(dice.randint(1, 120)))
        if not data:
            break
    return data


def run(path: Path, manifests: dict[str, Any]) -> str:
    """Read a plan, lay it out and check it; the message, or nothing where all went well."""
    try:
        plan = find_plan(path)
        check_runs(Schedule(plan, manifests, [900.0 - 100 * index for index in range(9)], guided=True))
    except UserError as error:
        message = str(error)
        assert message.splitlines() == [message], message
        assert len(message) < 5_000, message[:200]
        message.encode("utf-8")
        return message
    return ""


@pytest.fixture(scope="module")
def manifests() -> dict[str, Any]:
    return {name: manifest_of(small_unet("uneven"), "unit") for name in ("assembled", "original")}


def test_mutated_plans(tmp_path: Path, manifests: dict[str, Any]) -> None:
    dice, path = random.Random(11), tmp_path / "plan.json"
    messages: set[str] = set()
    until, tried = time.monotonic() + SECONDS, 0
    while time.monotonic() < until or tried < 200:
        path.write_text(json.dumps(mutated(dice)), "utf-8")
        began = time.monotonic()
        messages.add(run(path, manifests).rpartition(str(path))[2][:40])
        assert time.monotonic() - began < 20, "a plan that takes for ever"
        tried += 1
    assert len(messages) > 30, "of many kinds"


def test_files_whose_bytes_are_changed(tmp_path: Path, manifests: dict[str, Any]) -> None:
    dice, path = random.Random(12), tmp_path / "plan.json"
    whole = json.dumps(BASE).encode()
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(dice.randint(1, 6)):
            data[dice.randrange(len(data))] = dice.randrange(256)
        path.write_bytes(bytes(data[: dice.choice([len(data), dice.randrange(len(data))])]))
        run(path, manifests)


WRITERS: dict[str, Callable[[Path], object]] = {
    "digits": lambda path: path.write_text('{"name": "a", "version": ' + "9" * 5_000 + "}"),
    "digits of a step": lambda path: path.write_text(json.dumps(BASE).replace('"every": 2', '"every": ' + "9" * 4_000)),
    "nesting": lambda path: path.write_text("[" * 100_000 + "]" * 100_000),
    "a mode nested deep": lambda path: path.write_text('{"name": "a", "rules": ' + "[" * 900 + "]" * 900 + "}"),
    "two megabytes": lambda path: path.write_text('{"name": "' + "a" * 2_000_000 + '"}'),
    "a pipe": os.mkfifo,
    "a folder": lambda path: path.mkdir(),
    "nothing": lambda path: path.touch(),
    "no text": lambda path: path.write_bytes(b"\xff\xfe\x00"),
}


@pytest.mark.parametrize("name", list(WRITERS))
def test_files_that_are_refused_at_once(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / "plan.json")
    with pytest.raises(PlanError) as refusal:
        Plan.read(tmp_path / "plan.json")
    assert len(str(refusal.value).splitlines()) == 1
    assert len(str(refusal.value)) < 500


LONG = {"digits": "block:" + "9" * 5_000, "a share": "switch:" + "9" * 5_000, "a name": "a" * 100_000, "many": "full+" * 50_000}
SHORT = ("block:\n3", "adaptive:1e400", "adaptive:nan", "", "+", "block:\ud800")


@pytest.mark.parametrize("text", [*LONG.values(), *SHORT], ids=[*LONG, *map(ascii, SHORT)])
def test_presets_that_are_refused_in_one_short_line(text: str) -> None:
    with pytest.raises(PlanError) as refusal:
        find_plan(text)
    assert len(str(refusal.value).splitlines()) == 1
    assert len(str(refusal.value)) < 600
