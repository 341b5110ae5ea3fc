"""What the check takes for a fault, and what of an earlier run stays beside a new one's findings."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from benchmarks.gpu.found import Fit, Found, Memory, PytestResult, Row, TextAndVae

GOOD = Row("torch", "fp16", "full", 0.5, 0.0, 1.0, 1.0, 1000, 1090, 5000)


def test_what_is_wrong_is_named() -> None:
    bad = Row("torch", "fp16", "block:3", 0.5, float("nan"), 1.0, 1.0, 1000, 1101, 5000)
    less = Row("torch", "fp16", "unit:3", 0.5, 0.0, 1.0, 1.0, 1000, 800, 800)
    half = {"stem": Fit(4e-3, 1.0), "head": Fit(6e-3, 1.0), "mid": Fit(1e-3, 0.999)}
    found = Found([GOOD, bad, less], {"torch fp16": half, "torch fp32": {"stem": Fit(4e-3, 1.0)}}, {"torch fp16": 30.0})
    found.tests["gpu"] = PytestResult(1, {"a": "two cards"}, {"b": "assert 1 == 2"}, 1.0)
    assert found.faults() == [
        "b: assert 1 == 2",
        "torch fp16: segment head is off by 6.0e-03, its cosine by 0.0e+00",
        "torch fp16: segment mid is off by 1.0e-03, its cosine by 1.0e-03",
        "torch fp32: segment stem is off by 4.0e-03, its cosine by 0.0e+00",
        "torch fp16: latents have a PSNR of 30.0 dB, not 35",
        "torch fp16 block:3: replayed steps are off by nan",
        "torch fp16 block:3: features of 1000 bytes are planned, 1101 held",
        "torch fp16 unit:3: features of 1000 bytes are planned, 800 held",
    ]


@pytest.fixture
def full() -> Found:
    """Something of every kind."""
    return Found(
        [GOOD], {"torch fp16": {"stem": Fit(1e-3, 1.0)}}, {"torch fp16": 50.0}, {"torch fp16": TextAndVae(1.0, 2.0, 3)},
        {"torch fp16": Memory(1, 2, None)}, {"torch fp16": {"load_seconds": 1.0}}, [{"name": "eager", "milliseconds": 2.0}],
        {"gpu": PytestResult(1, {}, {}, 2.0)}, {"torch fp16": 3.0}, {"fp16": 1.0}, {"torch fp16": {"pstate": "P0"}},
        {"tensorrt fp16": "not here"}, {"start torch fp16": "RuntimeError: no"},
    )  # fmt: skip


def test_what_was_written_is_read_again(full: Found) -> None:
    assert Found.from_json(json.loads(json.dumps(asdict(full)))) == full


def test_findings_of_other_parts_stay(full: Found) -> None:
    newer = Found([Row("tensorrt", "fp16", "full", 0.1, 0.0, 1.0, 1.0, 1, 1, 1)], seconds={"tensorrt fp16": 2.0})
    merged = newer.beside(full)
    assert [row.engine for row in merged.rows] == ["torch", "tensorrt"]
    assert merged.baselines == full.baselines
    assert merged.seconds == {"torch fp16": 3.0, "tensorrt fp16": 2.0}
    assert merged.skipped == {}, "it was there this time"
    assert merged.ended == full.ended


def test_findings_of_the_same_parts_are_replaced(full: Found) -> None:
    row = Row("torch", "fp16", "full", 0.5, 0.0, 9.0, 1.0, 1000, 1090, 5000)
    newer = Found([row], starts={"torch fp16": {"load_seconds": 7.0}}, baselines=[{"name": "eager", "milliseconds": 5.0}])
    newer.seconds["start torch fp16"] = 8.0
    merged = newer.beside(full)
    assert merged.rows == [row]
    assert merged.starts == newer.starts
    assert merged.baselines == newer.baselines
    assert merged.ended == {}, "it ended well this time"
    assert newer.beside(newer) == newer
