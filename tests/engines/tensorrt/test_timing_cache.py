"""TensorRT's timing cache: measured once on a card, for all bundles; and never more than a help."""

import pytest
import torch

from engines import EngineError, Profile, Traced
from engines.tensorrt.engine import TensorRT, TensorRTRTX
from tests.support.fake_tensorrt import FakeBuilder, FakeBuilderConfig, FakeTensorRT


@pytest.fixture
def place(tmp_path):
    """Where the cache of the fake's card lies: beside the bundles."""
    return tmp_path / "bundles" / "tensorrt-11.0.0-cpu.timings"


@pytest.fixture
def build(tiny, tmp_path):
    """Builds a segment; returns the names of those that had to be measured."""

    def build(*names, kind=TensorRT, trt=None, folder="bundle"):
        trt, bundles = trt or FakeTensorRT({}), tmp_path / "bundles"
        engine = kind(trt, torch.device("cpu"))
        for name in names:
            traced = Traced(tiny.segment(name), tmp_path / f"{name}.onnx")
            engine.compile(traced, bundles / folder / name, Profile({}, {}, {}), (), cache_dir=bundles)
        return trt.measured

    return build


def test_what_was_measured_is_not_measured_again(build, place):
    assert build("front", "back", "front") == ["front", "back"]
    assert build("front", "back", folder="another bundle") == []
    assert place.is_file()


def test_it_is_no_part_of_a_bundle(build, place, tmp_path):
    build("front")
    assert [path.name for path in (tmp_path / "bundles" / "bundle").iterdir()] == ["front.engine"]


@pytest.mark.parametrize("damage", [b"", b"\0garbage", b'["sm89", "fro'])
def test_a_damaged_one_is_ignored_and_replaced(build, place, damage):
    build("front")
    place.write_bytes(damage)
    assert build("front") == ["front"]
    assert build("front") == []


def test_that_of_another_card_under_the_same_name_is_ignored(build, place):
    build("front")
    assert build("front", trt=FakeTensorRT({}, card="sm86")) == ["front"]


def test_other_versions_have_their_own(build, place):
    build("front")
    newer = FakeTensorRT({})
    newer.__version__ = "11.1.0"
    assert build("front", trt=newer) == ["front"]
    assert sorted(path.name for path in place.parent.glob("*.timings")) == [
        "tensorrt-11.0.0-cpu.timings",
        "tensorrt-11.1.0-cpu.timings",
    ]


def test_what_another_process_measured_meanwhile_is_kept(build, place, monkeypatch):
    finish = FakeBuilder.build_serialized_network

    def build_both(builder, network, config):
        if network.name == "front":
            build("back")
        return finish(builder, network, config)

    monkeypatch.setattr(FakeBuilder, "build_serialized_network", build_both)
    assert build("front") == ["front"]
    assert build("front", "back") == []


def test_a_place_that_cannot_be_written_is_no_error(build, place):
    (place / "a folder in the way").mkdir(parents=True)
    assert build("front") == build("front") == ["front"]


def test_a_build_that_fails_leaves_what_was_known(build, place):
    build("front")
    broken = FakeTensorRT({})
    broken.builds = False
    with pytest.raises(EngineError, match="cannot build it"):
        build("back", trt=broken)
    assert build("front", "back") == ["back"]


def test_tensorrt_rtx_gets_none(build, place, monkeypatch):
    monkeypatch.setattr(FakeBuilderConfig, "create_timing_cache", lambda *given: pytest.fail("a timing cache was attached"))
    assert build("front", kind=TensorRTRTX) == ["front"]
    assert [path.name for path in place.parent.iterdir()] == ["bundle"]


def test_who_names_no_folder_gets_none(tiny, tmp_path):
    trt = FakeTensorRT({})
    for _ in range(2):
        traced = Traced(tiny.segment("front"), tmp_path / "front.onnx")
        TensorRT(trt, torch.device("cpu")).compile(traced, tmp_path / "bundle" / "front", Profile({}, {}, {}), ())
    assert trt.measured == ["front", "front"]
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
