"""The table of variants: how it reads, that docs/variants.md shows the committed one, and that the Frechet distance is one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import linalg

from benchmarks.quality.frechet import distance_to, rendered
from benchmarks.quality.variants import ROWS, main
from benchmarks.quality.variants_page import BEFORE, markdown, page
from engines import UserError
from tuning.mini.reader_network import WEIGHTS, load

RESULTS = Path("benchmarks/results/variants.json")
SPREAD = {"median": 1.0, "low": 0.954, "high": 1.101}
COSTS = {"parameters": 2_933_604, "macs": 12_340_000}
RESULT: dict[str, Any] = {
    "settings": {"pixels": 256},
    "rows": {
        "original": COSTS | {"time": SPREAD, "time_large": SPREAD, "accuracy": 0.998, "frechet": 9.9},
        "rendered pictures": {"frechet": 1.234},
    },
}


def test_the_table_reads() -> None:
    head, _, row, floor = markdown(RESULT).splitlines()
    assert "time at 256 px" in head
    assert row == "| `original` | 2.93 M | 12.3 M | 1.00 (0.95 to 1.10) | 1.00 (0.95 to 1.10) | 99.8 % | 9.90 |"
    assert floor == "| rendered pictures |  |  |  |  |  | 1.23 |"


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
        ((0.99, 0.99, 0.99), (1.0, 0.5, 0.52), ["2.00 times as fast, and it shows as many", "takes 1.04 times as long at 64"]),
        ((0.9, 0.85, 0.88), (1.0, 0.5, 0.6), ["shows 5.0 points fewer", "1.20 times as long, 0.15 too much, at 64", "back 3.0"]),
        ((0.9, 0.95, 0.9), (1.0, 0.9, 0.9), ["1.11 times as fast, and it shows 5.0 points more", "nothing to win back"]),
    ],
)
def test_goals_stand_beside_the_figures(shown: tuple[float, ...], time: tuple[float, ...], says: list[str]) -> None:
    rows = {
        name: COSTS | {"time": SPREAD | {"median": each}, "time_large": SPREAD, "accuracy": right, "frechet": 1.0}
        for name, each, right in zip(("original", "assembled", "condconv"), time, shown, strict=True)
    }
    settings = {"rounds": 1, "count": 1, "steps": 1, "guidance": 3.0, "rendered": 1, "pixels": 256}
    made = " ".join(page({"settings": settings, "rows": rows}).split())
    assert all(words in made for words in says)


@pytest.mark.parametrize("variant", sorted({row.variant for row in ROWS if not row.distilled}))
def test_pruned_without_distillation_is_visibly_worse(variant: str) -> None:
    rows = json.loads(RESULTS.read_text())["rows"]
    before, after = rows[f"{variant}{BEFORE}"], rows[variant]
    assert before["accuracy"] <= after["accuracy"] - 0.02
    assert before["frechet"] >= 1.25 * after["frechet"]
    page = " ".join(Path("docs/variants.md").read_text().split())
    assert f"`{variant}` shows {100 * (after['accuracy'] - before['accuracy']):.1f} points fewer" in page
    assert f"{before['frechet']:.2f} in place of {after['frechet']:.2f}" in page


def _frechet(one: torch.Tensor, other: torch.Tensor) -> float:
    """Heusel et al. 2017, equation 6, with scipy's matrix root."""
    mean, covariance = zip(
        *((x.mean(0), np.cov(x, rowvar=False)) for x in (one.double().numpy(), other.double().numpy())), strict=True
    )
    root = linalg.sqrtm(covariance[0] @ covariance[1]).real
    return float(((mean[0] - mean[1]) ** 2).sum() + np.trace(covariance[0] + covariance[1] - 2 * root))


@pytest.mark.skipif(not WEIGHTS.exists(), reason="the network reader is not trained yet")
def test_the_distance_is_frechets() -> None:
    real, near = torch.cat(list(rendered(300, "real"))), torch.cat(list(rendered(300, "near")))
    far = torch.nn.functional.avg_pool2d(near, 9, stride=1, padding=4)
    distances = distance_to(iter(real.split(100)), [near, far])
    with torch.no_grad():
        features = [load().features(pictures) for pictures in (real, near, far)]
    # The matrix root of nearly singular covariances: torchmetrics takes eigenvalues, scipy a Schur decomposition.
    assert distances == pytest.approx([_frechet(features[0], features[1]), _frechet(features[0], features[2])], rel=1e-2)
    assert distances[1] > 2 * distances[0]
