"""The benchmark of assembly, on a small model; and that the page shows the committed figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.sizes import assemble
from engines import UserError
from tests.support.sources import save_source


@pytest.mark.slow
@pytest.mark.usefixtures("warm_commands")
def test_assembling_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, work, source = tmp_path / "found.json", tmp_path / "work", str(save_source(tmp_path / "tiny"))
    recipe = tmp_path / "no-mid.json"
    recipe.write_text('{"name": "no mid", "remove": ["mid"]}')
    assemble.main(["--source", source, "--recipes", "original", str(recipe), "--work", str(work), "--out", str(out)])
    original, smaller = json.loads(out.read_text())["rows"]
    assert 0 < smaller["parameters"] < original["parameters"]
    assert all(row["exit"] == 0 and 100 < row["peak_mb"] < 4000 and row["seconds"] > 0 for row in (original, smaller))
    assert not list(work.iterdir())
    assert recipe.exists()
    assert "no-mid" in capsys.readouterr().out
    with pytest.raises(UserError, match="by none ended with an error, which stands above"):
        assemble.main(["--source", source, "--recipes", "none", "--work", str(work), "--out", str(tmp_path / "other.json")])
    assert not (tmp_path / "other.json").exists()


def test_the_page_shows_the_committed_figures() -> None:
    page = " ".join(Path("docs/tuning.md").read_text().split())
    rows = {row["recipe"]: row for row in json.loads(Path("benchmarks/results/assemble.json").read_text())["rows"]}
    assert round(rows["bk-tiny"]["parameters"] / 1e6) == 323
    assert max(row["peak_mb"] for row in rows.values()) * 2**20 < 8e9
    least, most = (f"{rows[recipe]['peak_mb'] / 1024:.1f} GiB of memory with `{recipe}`" for recipe in ("bk-tiny", "bk-base"))
    assert f"{least} and {most}" in page
