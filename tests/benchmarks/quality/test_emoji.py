"""Shares and intervals of what a reader finds in pictures."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.quality import emoji_grid
from benchmarks.quality.emoji import main
from benchmarks.quality.judge import MEASURES, Judge, check_source, difference, distances, shares, wilson
from engines import Bundle, UserError
from tuning.emoji.concepts import Pair
from tuning.emoji.reader import Reader
from tuning.errors import TuningError


def test_intervals_are_wilsons() -> None:
    # Newcombe 1998, table I: 81 of 263 and 0 of 20, at 95 %.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    low, high = wilson(20, 20)
    assert (low, high) == pytest.approx((1 - 0.1611, 1.0), abs=1e-4)


class Fixed(Reader):
    """Reads concept and style from a picture's first two numbers."""

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        concepts, styles = pictures[:, 0, 0, 0].long(), pictures[:, 0, 0, 1].long()
        return torch.eye(7)[concepts], torch.eye(2)[styles]


def test_pictures_are_right_where_the_reader_finds_what_was_asked_for() -> None:
    pictures = torch.zeros(60, 3, 128, 128)
    pictures[:30, 0, 0, 0] = 6  # the concept of half of them, in the style of a third
    pictures[20:40, 0, 0, 1] = 1
    judge = Judge(Fixed(7, 2, (4,), 4), tuple("abcdefg"), ("noto", "twitter"), (), ())
    figures = shares(judge.answers(pictures, [Pair("g", "twitter")] * 60))
    assert tuple(figures) == MEASURES
    assert [figures[name]["right"] for name in MEASURES if name != "concept_top5"] == [30, 20, 10]
    assert all(each["of"] == 60 and each["low"] < each["share"] < each["high"] for each in figures.values() if each["right"] < 60)


def test_readings_agree_whether_they_are_right_or_not() -> None:
    pictures, others = torch.zeros(2, 60, 3, 128, 128)
    pictures[:, 0, 0, 0] = torch.arange(60) % 7
    others[:, 0, 0, 0] = torch.arange(60) % 7
    others[40:, 0, 0, 0] = (torch.arange(40, 60) + 1) % 7
    others[:, 0, 0, 1] = 1  # another style
    judge = Judge(Fixed(7, 2, (4,), 4), tuple("abcdefg"), ("noto", "twitter"), (), ())
    assert judge.agrees(pictures, others) == [True] * 40 + [False] * 20


def test_differences_are_of_pairs() -> None:
    """McNemar's counts: 10 right by the one alone, 4 by the other alone, of 100."""
    one, other = ([True] * 10 + [False] * 4 + [True] * 86, [False] * 10 + [True] * 4 + [True] * 86)
    error = 1.96 * (0.14 - 0.06**2) ** 0.5 / 10
    assert difference(one, other) == pytest.approx({"mean": 0.06, "low": 0.06 - error, "high": 0.06 + error}, abs=1e-4)
    assert difference(one, one) == {"mean": 0.0, "low": 0.0, "high": 0.0}


def test_counts_below_one_are_refused() -> None:
    with pytest.raises(TuningError, match="--pairs 0 --steps 20: give 1 or more"):
        main(["--pairs", "0"])


def test_pairs_seen_and_held_back_take_turns() -> None:
    seen, held = (tuple(Pair(f"{kind} {number}", "noto") for number in range(of)) for kind, of in (("seen", 30), ("held", 5)))
    judge = Judge(Fixed(7, 2, (4,), 4), (), (), seen, held)
    asked = judge.asked(20)
    assert len(set(asked)) == 20
    assert [pair in held for pair in asked] == [False, True] * 5 + [False] * 10
    assert judge.asked(8) == asked[:8]
    assert judge.title(asked[1]) == f"{asked[1].prompt} (held back)"
    assert judge.title(asked[0]) == asked[0].prompt


def test_pictures_that_are_further_off_are_further_off() -> None:
    torch.manual_seed(0)
    reader = Reader(7, 2, (4, 4), 8).eval()
    real, near = torch.randn(2, 40, 3, 1, 1).expand(2, 40, 3, 32, 32)
    close, far = distances(reader, 20 * real, [20 * near, 40 * near])
    assert far["frechet"] > 2 * close["frechet"] > 0
    assert far["kernel"] > 2 * abs(close["kernel"]) > 0


def test_a_grid_has_every_style_and_marks_what_was_held_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    held = (Pair("cat", "noto"), Pair("dog", "twitter"))
    judge = Judge(Fixed(7, 2, (4,), 4), ("cat", "dog"), ("noto", "twitter"), (Pair("dog", "noto"), Pair("cat", "twitter")), held)
    asked: list[str] = []
    drawn: list[Any] = []

    def pictures(bundle: Path, prompts: list[str], **options: Any) -> list[int]:
        asked.extend(prompts)
        return list(range(len(prompts)))

    monkeypatch.setattr(Judge, "of", lambda model: judge)
    monkeypatch.setattr(Bundle, "open", lambda folder: SimpleNamespace(manifest=SimpleNamespace(source="emoji")))
    monkeypatch.setattr(emoji_grid, "draw_prompts", pictures)
    monkeypatch.setattr(emoji_grid, "draw", lambda *given: drawn.extend(given))
    emoji_grid.main(["--concepts", "2", "--out", str(tmp_path / "grid.png")])
    rows, columns, _, notes = drawn
    assert rows == [("noto", [0, 1]), ("twitter", [2, 3])]
    assert asked == [Pair(concept, style).prompt for style in ("noto", "twitter") for concept in columns]
    marked = {
        (concept, style)
        for (style, _), line in zip(rows, notes, strict=True)
        for concept, n in zip(columns, line, strict=True)
        if n
    }
    assert marked == {(pair.concept, pair.style) for pair in held}


def test_a_bundle_of_another_model_is_refused() -> None:
    check_source("emoji", Path("bundles/a"), Path("models/emoji"))
    with pytest.raises(UserError, match="bundles/a was built from mini, and the reader is that of models/emoji: name"):
        check_source("mini", Path("bundles/a"), Path("models/emoji"))
