"""The manifest as a file: byte for byte as before, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engines import Bundle, BundleError, Manifest
from engines.bundle.manifest import Compiled, Feature, File, Segment, Unit

GOLDEN = Path(__file__).with_name("manifest.json")

STEM = Segment(
    name="stem",
    units=("time", "stem"),
    inputs=("timestep", "sample"),
    outputs=("time", "stem"),
    key="ab" * 32,
    onnx=(
        File(path="segments/stem.onnx", sha256="aa" * 32, bytes=1234),
        File(path="segments/stem.onnx.data", sha256="bb" * 32, bytes=65536),
    ),
    engines={
        "tensorrt-rtx": Compiled(
            files=(File(path="engines/tensorrt-rtx/stem.engine", sha256="cc" * 32, bytes=4321),),
            version="1.3.0",
            targets=("sm86", "sm89"),
            key="cd" * 32,
        )
    },
)
MANIFEST = Manifest(
    key="0f" * 32,
    variant="assembled",
    source="mini",
    source_sha256="1e" * 32,
    precision="fp16",
    sizes=((64, 64), (64, 128)),
    max_images=4,
    latent_channels=4,
    vae_scale=8,
    size_multiple=64,
    text_length=32,
    vocabulary=636,
    features={
        "sample": Feature(dtype="float32", shape=("batch", 4, "height", "width")),
        "timestep": Feature(dtype="float32", shape=(1,)),
        "time": Feature(dtype="float16", shape=(1, 128)),
        "stem": Feature(dtype="float16", shape=("batch", 32, "height", "width")),
    },
    units=(
        Unit(name="time", kind="time", inputs=("timestep",), parameters=20736, macs=20480),
        Unit(name="stem", kind="stem", inputs=("sample",), parameters=1184, macs=73728),
    ),
    segments=(STEM,),
    files=(File(path="tokenizer/vocab.json", sha256="dd" * 32, bytes=99),),
    made_with={"torch": "2.13.0", "unet-heirloom": "0.1.0"},
)


def test_a_manifest_is_written_byte_for_byte_as_before() -> None:
    """Bundles that people have built must stay readable: a change here is a new manifest version."""
    assert MANIFEST.model_dump_json(indent=1) + "\n" == GOLDEN.read_text("utf-8")


def test_a_manifest_is_read_back(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(GOLDEN.read_bytes())
    assert Bundle.open(tmp_path).manifest == MANIFEST


def test_a_unet_of_elsewhere_is_written_only_where_there_is_one(tmp_path: Path) -> None:
    other = MANIFEST.model_copy(update={"unet": "runs/student", "variant": "bk-tiny"})
    (tmp_path / "manifest.json").write_text(other.model_dump_json(), "utf-8")
    assert Bundle.open(tmp_path).manifest == other
    assert "unet" not in json.loads(MANIFEST.model_dump_json())


def test_a_built_bundle_writes_its_manifest_in_this_form(mini_bundle: Bundle) -> None:
    text = (mini_bundle.folder / "manifest.json").read_text("utf-8")
    assert text == mini_bundle.manifest.model_dump_json(indent=1) + "\n"
    assert set(json.loads(text)) == {*json.loads(GOLDEN.read_text()), "vae_images"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "has manifest version 2, this program reads 1"),
        ({"version": None}, "has manifest version None"),
        ({"variant": "../pruned"}, "manifest.json, variant: "),
        ({"text_length": "many"}, "manifest.json, text_length: "),
        ({"author": "someone"}, "manifest.json, author: "),
        ({"segments": [{"name": "stem"}]}, "manifest.json, segments.0.units: "),
    ],
)
def test_a_manifest_of_another_form_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(json.loads(GOLDEN.read_text()) | changes))
    with pytest.raises(BundleError) as refusal:
        Bundle.open(tmp_path)
    assert message in str(refusal.value)
    assert "rebuild it with: python -m exporter build" in refusal.value.__notes__[0]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[1]", b"null"])
def test_a_manifest_that_is_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError, match="rebuild it with"):
        Bundle.open(tmp_path)


def test_units_that_a_plan_can_name(mini_bundle: Bundle) -> None:
    names = mini_bundle.manifest.unet_units
    assert names[0] == "time"
    assert names[-1] == "head"
    assert not {"text_encoder", "vae_decoder", "vae_encoder"} & set(names)
