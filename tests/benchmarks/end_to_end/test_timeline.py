"""When segments run: in order, inside the call, and only those that the plan runs."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.end_to_end.timeline import plot_timeline
from benchmarks.peers.ours import load
from benchmarks.peers.serve import Call
from engines import Bundle


@pytest.mark.shared_pieces
def test_segments_are_noted_as_they_run(mini_bundle: Bundle) -> None:
    options: dict[str, Any] = {"engine": "onnxruntime", "device": "cpu"}
    call = Call("a red star", 4, 3.0, 0, 64, 64, plan="deepcache:2")
    assert load(mini_bundle.folder, options)(call).segments == []
    make = load(mini_bundle.folder, options | {"timeline": True})
    for _ in range(2):  # those of one call only
        spans = make(call).segments
        times = [time for _, start, end in spans for time in (start, end)]
        assert times == sorted(times)
        assert times[0] > 0
        names = [name for name, _, _ in spans]
        unet = {segment.name for segment in mini_bundle.manifest.unet_segments}
        runs = {name: names.count(name) for name in names}
        assert max(runs[name] for name in unet) == 4
        assert min(runs[name] for name in unet) == 2
        assert runs["vae_decoder"] == 1


def test_a_line_for_each_plan(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_timeline({"full": [("a", 0.1, 0.4), ("b", 0.5, 1.0)], "block:2": [("a", 0.0, 0.3)]}, tmp_path / "t.png", "title")
    with Image.open(tmp_path / "t.png") as picture:
        assert picture.width > 1000
