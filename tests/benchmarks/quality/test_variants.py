"""The table of variants: how it reads, and that docs/variants.md shows the committed one."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality import variants
from benchmarks.quality.judge import Judge
from benchmarks.quality.variants import ROWS, _worth, main
from benchmarks.quality.variants_page import BEFORE, markdown, page
from engines import UserError
from tests.benchmarks.quality.test_emoji import Fixed
from tuning.emoji.concepts import Pair

RESULTS = Path("benchmarks/results/variants.json")
SPREAD = {"median": 1.0, "low": 0.954, "high": 1.101}
SETTINGS = {"rounds": 1, "count": 1, "steps": 1, "guidance": 3.0, "pixels": 256}
SHARES = {name: {"share": 0.5, "low": 0.421, "high": 0.579} for name in ("concept_top1", "style")}
SAME = {"mean": 0.0, "low": 0.0, "high": 0.0}
ROW: dict[str, Any] = {
    "parameters": 5_659_044, "macs": 123_400_000, "time": SPREAD, "time_large": SPREAD, "seen": SHARES, "held_back": SHARES,
    "likeness": {"psnr": None}, "over_original": SAME, "over_assembled": SAME,
}  # fmt: skip


def test_the_table_reads() -> None:
    rows = {"original": ROW, "assembled, before distillation": ROW | {"likeness": {"psnr": 21.26}}}
    head, _, first, second = markdown({"settings": SETTINGS, "rows": rows}).splitlines()
    assert "time at 256 px" in head
    share = "50 % (42 to 58)"
    assert first == f"| `original` | 5.66 M | 123 M | 1.00 (0.95 to 1.10) | 1.00 (0.95 to 1.10) | {' | '.join([share] * 4)} |  |"
    assert second.startswith("| `assembled`, before distillation |")
    assert second.endswith("| 21.3 dB |")


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


def test_times_alone_say_how_they_were_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {name: tmp_path / name for name in json.loads(RESULTS.read_text())["rows"]}
    measured = []
    monkeypatch.setattr(variants, "_make_bundles", lambda _bundles: folders)
    monkeypatch.setattr(variants, "_measure_times", lambda *given: measured.append(given))
    out = tmp_path / "variants.json"
    out.write_text(RESULTS.read_text())
    where = ["--out", str(out), "--table", str(tmp_path / "variants.md")]
    main(["--times", *where, "--rounds", "2", "--pixels", "384"])
    before, after = json.loads(RESULTS.read_text()), json.loads(out.read_text())
    assert after["settings"] == before["settings"] | {"rounds": 2, "pixels": 384}
    assert after["rows"] == before["rows"]
    assert "time at 384 px" in (tmp_path / "variants.md").read_text()
    with pytest.raises(UserError, match=rf"--steps 9: .* is of pictures in {before['settings']['steps']}; leave out --times"):
        main(["--times", *where, "--steps", "9"])
    assert len(measured) == 1


@pytest.mark.parametrize(
    ("lost", "won", "time", "says"),
    [
        (
            (-0.05, -0.08, -0.02), (0.03, 0.01, 0.05), (0.5, 0.52),
            ["2.00 times as fast", "are -5.0 points (-8.0 to -2.0)", "takes 1.04 times as long at 128", "60 % of what that"],
        ),
        (
            (-0.01, -0.03, 0.01), (0.0, -0.02, 0.02), (0.5, 0.6),
            ["are -1.0 points (-3.0 to +1.0)", "1.20 times as long, 0.15 too much,", "nothing to win"],
        ),
    ],
)  # fmt: skip
def test_goals_stand_beside_the_figures(
    lost: tuple[float, ...], won: tuple[float, ...], time: tuple[float, float], says: list[str]
) -> None:
    differences = [dict(zip(("mean", "low", "high"), each, strict=True)) for each in (lost, won)]
    rows = {
        "original": ROW,
        "assembled": ROW | {"time": SPREAD | {"median": time[0]}, "over_original": differences[0], "likeness": {"psnr": 24.0}},
        "condconv": ROW | {"time": SPREAD | {"median": time[1]}, "over_assembled": differences[1], "likeness": {"psnr": 25.0}},
    }
    made = " ".join(page({"settings": SETTINGS, "rows": rows}).split())
    assert all(words in made for words in [*says, "1.0 dB nearer to those of `original`"])


def test_worth_is_of_pairs_seen_and_held_back() -> None:
    judge = Judge(Fixed(7, 2, (4,), 4), (), (), (Pair("a", "noto"),), (Pair("b", "noto"),))
    pairs = [*judge.seen, *judge.held] * 2
    answers = {
        "original": {"concept_top1": [True, True, True, False], "style": [True] * 4},
        "assembled": {"concept_top1": [True, False, True, False], "style": [False] * 4},
    }
    worth = _worth(answers, "assembled", pairs, judge)
    shares = [worth[part]["concept_top1"]["share"] for part in ("seen", "held_back")]
    assert shares == [1.0, 0.0]
    assert worth["seen"]["style"]["of"] == 2
    assert worth["over_original"]["mean"] == -0.25
    assert worth["over_assembled"] == SAME


@pytest.mark.parametrize("variant", sorted({row.variant for row in ROWS if not row.distilled}))
def test_pruned_without_distillation_is_visibly_worse(variant: str) -> None:
    rows = json.loads(RESULTS.read_text())["rows"]
    before, after = rows[f"{variant}{BEFORE}"], rows[variant]
    assert before["over_original"]["high"] < min(0, after["over_original"]["low"])
    assert before["likeness"]["psnr_high"] < after["likeness"]["psnr_low"]


def test_too_few_prompts_are_refused() -> None:
    with pytest.raises(UserError, match="--count 3 --rounds 9: choose 16 or more"):
        main(["--count", "3"])
