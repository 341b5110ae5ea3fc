"""The table of variants: how it reads, and that docs/variants.md shows the committed one."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality.judge import wilson
from benchmarks.quality.variants import ROWS, main
from benchmarks.quality.variants_page import BEFORE, markdown, page
from engines import UserError

RESULTS = Path("benchmarks/results/variants.json")
SPREAD = {"median": 1.0, "low": 0.954, "high": 1.101}
COSTS = {"parameters": 5_659_044, "macs": 12_340_000}


def judged(right: int, of: int = 100) -> dict[str, Any]:
    """So many concepts and styles right, of seen pairs and of pairs held back."""
    low, high = wilson(right, of)
    share = {"right": right, "of": of, "share": right / of, "low": low, "high": high}
    figures = {"concept_top1": share, "style": share, "frechet": 9.9, "kernel": 1.234}
    return {"seen": figures, "held": figures}


def test_the_table_reads() -> None:
    row = COSTS | {"time": SPREAD, "time_large": SPREAD} | judged(50)
    head, _, line = markdown({"settings": {"pixels": 256}, "rows": {"original": row}}).splitlines()
    assert "| time at 256 px | concept, seen | concept, held back | style, seen | style, held back | distance |" in head
    shares = " | ".join(["50 % (40 to 60)"] * 4)
    assert line == f"| `original` | 5.66 M | 12.3 M | 1.00 (0.95 to 1.10) | 1.00 (0.95 to 1.10) | {shares} | 1.2 |"


def test_rows_compare_with_the_original() -> None:
    assert ROWS[0].variant == "original"
    assert len({row.folder for row in ROWS}) == len(ROWS)
    assert {row.variant for row in ROWS if not row.distilled} <= {row.variant for row in ROWS if row.distilled}


def test_pages_show_the_committed_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--page", "--table", str(tmp_path / "variants.md")])
    assert (tmp_path / "variants.md").read_text() == Path("docs/variants.md").read_text()
    table = markdown(json.loads(RESULTS.read_text()))
    assert table in Path("docs/variants.md").read_text()
    assert capsys.readouterr().out == f"{table}wrote {tmp_path / 'variants.md'}\n"
    with pytest.raises(UserError, match=r"none\.json holds no figures .*measure without --page"):
        main(["--page", "--out", str(tmp_path / "none.json")])


@pytest.mark.parametrize(
    ("shown", "time", "says"),
    [
        ((99, 99, 99), (1.0, 0.5, 0.52), ["2.00 times as fast, and it shows as many", "takes 1.04 times as long at 128"]),
        ((90, 85, 88), (1.0, 0.5, 0.6), ["shows 5.0 points fewer", "1.20 times as long, 0.15 too much, at 128", "back 3.0"]),
        ((90, 95, 90), (1.0, 0.9, 0.9), ["1.11 times as fast, and it shows 5.0 points more", "nothing to win back"]),
    ],
)
def test_goals_stand_beside_the_figures(shown: tuple[int, ...], time: tuple[float, ...], says: list[str]) -> None:
    rows = {
        name: COSTS | {"time": SPREAD | {"median": each}, "time_large": SPREAD} | judged(right)
        for name, each, right in zip(("original", "assembled", "condconv"), time, shown, strict=True)
    }
    settings = {"rounds": 1, "count": 1, "steps": 1, "guidance": 3.0, "pixels": 256}
    made = " ".join(page({"settings": settings, "rows": rows}).split())
    assert all(words in made for words in says)


@pytest.mark.parametrize("variant", sorted({row.variant for row in ROWS if not row.distilled}))
def test_pruned_without_distillation_is_visibly_worse(variant: str) -> None:
    rows = json.loads(RESULTS.read_text())["rows"]
    before, after = rows[f"{variant}{BEFORE}"], rows[variant]
    assert before["seen"]["concept_top1"]["high"] < after["seen"]["concept_top1"]["low"]
    assert before["seen"]["kernel"] >= 1.25 * after["seen"]["kernel"]
