"""The plots of a run: all rows against one base, drawn again from its file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import run_trt
from benchmarks.end_to_end.plots import _against_first, _point
from engines.errors import UserError

RESULTS = Path(run_trt.__file__).parent / "results"


def test_every_row_is_held_against_one_base() -> None:
    """Those of other engines and peers too; what nobody tells apart is drawn at 50 dB."""
    base = {"name": "original full", "engine": "onnxruntime", "variant": "original", "p50": 2.0, "psnr": None, "overall": 1.0}
    other = {"name": "original full", "engine": "openvino", "p50": 4.0, "psnr": None, "ratio": 1.0, "reference_psnr": 90.0}
    plan = {
        "name": "original skip:2",
        "engine": "openvino",
        "p50": 2.0,
        "psnr": 31.0,
        "ratio": 2.0,
        "overall": 0.9,
        "reference_psnr": 30.0,
    }
    peer = {"name": "deepcache", "engine": "deepcache", "p50": 1.0, "psnr": 31.0, "ratio": 2.0, "overall": 2.0}
    found = [base, other, plan, peer]
    assert [_point(_against_first(one, found)) for one in found] == [(50.0, 1.0), (50.0, 0.5), (30.0, 0.9), (31.0, 2.0)]


def test_results_are_plotted_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    shutil.copy(next(RESULTS.glob("run_trt-cpu-*emoji*-t1.json")), tmp_path / "run.json")
    run_trt.main(["--plot", str(tmp_path / "run.json")])
    assert capsys.readouterr().out == f"written: {tmp_path / 'run.png'}\n"
    with Image.open(tmp_path / "run.png") as picture:
        assert picture.width > 1000
    (tmp_path / "no.json").write_text(json.dumps([1]))
    with pytest.raises(UserError, match="no.json is no file of results"):
        run_trt.main(["--plot", str(tmp_path / "no.json")])
