"""Real traces: every segment and the chain agree with the torch model, and a bundle that does not is found out."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from engines import Bundle, make_engine
from engines.bundle.folder import describe_file
from exporter import BuildError, BuildOptions, build, verify
from exporter.verification.metrics import cosine, psnr
from exporter.verification.verify import LEAST_COSINE, LEAST_PSNR, TOLERANCE, Comparison, compare_latents
from tests.support.commands import Command, assert_refused
from tests.support.sources import save_source
from tests.support.unets import small_unet

FP32 = 1e-4
"""What `verify` allows at float32: sums in another order give 1e-6 to 5e-6, a wrong feature or weight far above 1e-3."""
FP16 = 5e-3
"""What `verify` allows at half precision against float32: ten bits of mantissa are 1e-3, and a deep segment adds some."""

pytestmark = pytest.mark.shared_pieces


COSINE = 0.9999
"""Of every segment's outputs with the reference's."""
PSNR = 35.0
"""Of final latents, in decibels."""


def assert_complete(found: list[Comparison], bundle: Bundle, sizes: int, batches: int) -> None:
    """Every segment and the chain, at every size and batch."""
    names = [segment.name for segment in bundle.manifest.segments] + ["the chain"]
    assert [comparison.segment for comparison in found] == names * (sizes * batches)
    assert len({(c.height, c.width) for c in found}) == sizes
    assert len({c.images for c in found}) == batches


def test_the_allowed_errors_are_those_stated_here() -> None:
    assert TOLERANCE == {"fp32": FP32, "fp16": FP16, "bf16": 8 * FP16, "openvino-bf16": 16 * FP16}
    assert LEAST_COSINE == {"fp32": COSINE, "fp16": COSINE, "bf16": 0.999, "openvino-bf16": 0.9995}
    assert LEAST_PSNR == PSNR


def test_the_embedded_model_at_two_sizes_and_two_batches(mini_bundle: Bundle) -> None:
    found = list(verify(mini_bundle, make_engine("onnxruntime")))
    assert_complete(found, mini_bundle, sizes=2, batches=2)
    assert max(comparison.error for comparison in found) < FP32
    assert all(np.isfinite(comparison.error) for comparison in found)


@pytest.mark.slow
def test_the_assembled_variant(assembled_bundle: Bundle) -> None:
    found = list(verify(assembled_bundle, make_engine("onnxruntime"), [(64, 64), (128, 64)]))
    assert_complete(found, assembled_bundle, sizes=2, batches=2)
    assert max(comparison.error for comparison in found) < FP32


@pytest.fixture(scope="module")
def no_mid_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A UNet without mid block, one layer per block, cut by layer."""
    folder = tmp_path_factory.mktemp("no-mid")
    source = save_source(folder / "source", small_unet("no mid"))
    return build(BuildOptions(source=str(source), granularity="layer", out=folder / "bundle"))[0]


@pytest.mark.slow
def test_another_topology_cut_by_layer(no_mid_bundle: Bundle) -> None:
    found = list(verify(no_mid_bundle, make_engine("onnxruntime"), [(16, 16), (24, 8)]))
    assert_complete(found, no_mid_bundle, sizes=2, batches=2)
    assert max(comparison.error for comparison in found) < FP32


@pytest.mark.slow
def test_half_precision(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", small_unet("two stages", mid_block_type=None))
    bundle, _ = build(BuildOptions(source=str(source), precision="fp16", out=tmp_path / "bundle"))
    found = list(verify(bundle, make_engine("onnxruntime")))
    assert max(comparison.error for comparison in found) < FP16
    assert max(comparison.error for comparison in found) > 1e-5, "half precision cannot be as exact as single"
    assert min(comparison.cosine for comparison in found) > COSINE


@pytest.mark.slow
def test_half_precision_over_twenty_steps_of_the_embedded_model(tmp_path: Path, exporter: Command) -> None:
    """In as few segments as there can be."""
    options = BuildOptions(source="mini", precision="fp16", granularity=None, plans=("full",), out=tmp_path / "bundle")
    bundle, _ = build(options)
    noise = compare_latents(bundle, make_engine("onnxruntime"), (64, 64), steps=20)
    assert PSNR < noise < 100, "above that half precision would be as exact as single"
    outcome = exporter("verify", bundle.folder, "--sizes", "64x64", "--steps", "2")
    assert outcome.code == 0
    assert "latents after 2 DDIM steps at 64x64: PSNR" in outcome.out[-1]
    with_cosines = next(line for line in outcome.out if "cosine" in line)
    assert with_cosines


def test_cosine_and_psnr_by_hand() -> None:
    one = torch.tensor([3.0, 4.0])
    assert cosine(one, one) == pytest.approx(1)
    assert cosine(torch.tensor([4.0, -3.0]), one) == pytest.approx(0)
    assert cosine(torch.tensor([4.0, 3.0]), one) == pytest.approx(24 / 25)
    # The range is 1, the error 0.1 everywhere.
    assert psnr(one + 0.1, one) == pytest.approx(20, abs=1e-4)
    assert psnr(one, one) == float("inf")


def damaged(bundle: Bundle, folder: Path) -> Path:
    """A bundle whose hashes are right and whose weights are not: as if the trace had gone wrong."""
    shutil.copytree(bundle.folder, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    segment = next(segment for segment in manifest["segments"] if segment["name"] == "up.1.sampler")
    data = folder / segment["onnx"][1]["path"]
    weights = np.fromfile(data, dtype=np.float32)
    (1.01 * weights).astype(np.float32).tofile(data)
    segment["onnx"][1] = describe_file(folder, data).model_dump()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_one_per_cent_in_one_segment_is_found(no_mid_bundle: Bundle, tmp_path: Path, exporter: Command) -> None:
    folder = damaged(no_mid_bundle, tmp_path / "wrong")
    wrong = {c.segment for c in verify(Bundle.open(folder), make_engine("onnxruntime"), [(16, 16)]) if c.error > FP32}
    assert wrong == {"up.1.sampler", "the chain"}
    outcome = exporter("verify", folder, "--sizes", "16x16")
    assert outcome.code == 1
    assert "NOT within 0.0001" in outcome.out[-1]


def test_the_command_prints_the_error_of_each_segment(no_mid_bundle: Bundle, exporter: Command) -> None:
    outcome = exporter("verify", no_mid_bundle.folder, "--sizes", "16x16")
    assert outcome.code == 0
    text = "\n".join(outcome.out)
    for segment in no_mid_bundle.manifest.segments:
        assert segment.name in text
    assert "the chain" in text
    assert "all within 0.0001" in outcome.out[-1]


def test_a_source_that_has_changed_since_is_refused(no_mid_bundle: Bundle, exporter: Command, tmp_path: Path) -> None:
    manifest = dataclasses.replace(no_mid_bundle).manifest
    source = Path(manifest.source) / "scheduler" / "scheduler_config.json"
    text = source.read_text()
    try:
        source.write_text(text.replace("0.012", "0.013"))
        with pytest.raises(BuildError, match="are not those that bundle .* was made from; build it anew with --force"):
            list(verify(no_mid_bundle, make_engine("onnxruntime")))
        assert_refused(exporter("verify", no_mid_bundle.folder), "are not those that bundle")
    finally:
        source.write_text(text)


def with_hashes_made_to_fit(folder: Path) -> None:
    """The manifest of a bundle whose tokenizer or scheduler was changed, written anew."""
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    data["files"] = [describe_file(folder, folder / file["path"]).model_dump() for file in data["files"]]
    path.write_text(json.dumps(data))


def other_words(folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer.json"
    data = json.loads(path.read_text())
    words = list(data["model"]["vocab"])
    data["model"]["vocab"] = dict(zip(reversed(words), data["model"]["vocab"].values(), strict=True))
    path.write_text(json.dumps(data))


def other_noise(folder: Path) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace("0.012", "0.013"))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (other_words, "tokenizer/tokenizer.json"),
        (lambda folder: (folder / "tokenizer" / "tokenizer.json").write_text("{}"), "tokenizer/tokenizer.json"),
        (other_noise, "scheduler/scheduler_config.json"),
    ],
    ids=["another tokenizer", "a broken one", "another scheduler"],
)
def test_a_tokenizer_or_scheduler_that_is_not_the_sources_is_found(
    no_mid_bundle: Bundle, exporter: Command, tmp_path: Path, damage: Callable[[Path], object], named: str
) -> None:
    folder = shutil.copytree(no_mid_bundle.folder, tmp_path / "copy")
    damage(folder)
    with_hashes_made_to_fit(folder)
    assert_refused(exporter("verify", folder, "--sizes", "16x16"), f"{named} of bundle {folder} is not that of its source")


def test_sizes_that_do_not_fit(no_mid_bundle: Bundle, exporter: Command) -> None:
    assert_refused(exporter("verify", no_mid_bundle.folder, "--sizes", "17x16"), "17x16", "multiples of 8")


@pytest.mark.parametrize(
    ("variant", "said"),
    [
        ("original", "this UNet's part can run; beside the bundle there must be one of assembled"),
        ("assembled", "this UNet's part can run; beside the bundle there must be one of original"),
        ("condconv", "not with this UNet: plan switch:0.4 runs the UNets assembled, original, not condconv"),
    ],
)
def test_inspect_says_whether_a_switch_can_run_as_far_as_the_bundle_goes(
    exporter: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_mid_bundle: Bundle, variant: str, said: str
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    manifest = no_mid_bundle.manifest.model_copy(update={"variant": variant})
    (tmp_path / "manifest.json").write_text(manifest.model_dump_json())
    outcome = exporter("inspect", tmp_path)
    assert outcome.code == 0
    (line,) = (line for line in outcome.out if line.split()[:1] == ["switch:0.4"])
    assert said in line


def test_inspect_shows_segments_features_and_plans(
    no_mid_bundle: Bundle, exporter: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    outcome = exporter("inspect", no_mid_bundle.folder)
    text = "\n".join(outcome.out)
    assert outcome.code == 0
    for segment in no_mid_bundle.manifest.segments:
        assert segment.name in text
    for plan in ("full", "block:3", "deepcache:3"):
        assert plan in text
    assert "(batch, 24, height/2, width/2)" in text
    assert "not with this UNet" not in text
    assert "other partition" in text
    rebuild = f"{no_mid_bundle.manifest.whole_build_command()} --force --out {no_mid_bundle.folder}"
    assert f"for plans of another partition: {rebuild} --plan PLAN" in outcome.out
    assert any("adaptive:0.3" in line and " to 1.00" in line for line in outcome.out)
    assert any("encoder:faster" in line and "[sdm]* by output" in line for line in outcome.out)
    assert "multiples of 8" in text
