"""Which UNet a bundle is made of: a recipe's, one that lies in the source, or one from elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

import tuning
from engines import Bundle
from tests.support.commands import Command, assert_refused
from tests.support.unets import small_unet
from tuning.assemble_command import assemble_command
from tuning.checkpoints.folder import save_part

FakeTrace = Callable[..., list[str]]
pytestmark = [pytest.mark.usefixtures("here"), pytest.mark.shared_pieces]


@pytest.mark.parametrize("variant", ["bk-base", "bk-small"])
def test_a_variant_is_the_recipe_of_its_name(
    exporter: Command, fake_trace: FakeTrace, layered_source: Path, here: Path, variant: str
) -> None:
    traced = fake_trace()
    outcome = exporter("build", "--source", layered_source, "--variant", variant)
    assert outcome.code == 0
    assert "not distilled since" in outcome.err[0]
    manifest = Bundle.open(here / "bundles" / f"layered-{variant}").manifest
    assert manifest.variant == variant
    assert "down.0.layer.0.resnet" in manifest.unet_units
    assert "down.0.layer.1.resnet" not in manifest.unet_units
    assert ("mid" in traced) == (variant == "bk-base")


def student(source: Path, folder: Path, name: str) -> Path:
    """The folder of a UNet that was made of a source's by a recipe and then trained."""
    unet = tuning.assemble(tuning.load_unet(source / "unet"), tuning.recipe(name))
    with torch.no_grad():
        unet.conv_out.bias += 1
    save_part(unet, folder, torch.float32)
    return folder


def test_a_unet_from_elsewhere(exporter: Command, fake_trace: FakeTrace, layered_source: Path, tmp_path: Path) -> None:
    traced = fake_trace()
    own, out = student(layered_source, tmp_path / "student", "bk-small"), tmp_path / "bundle"
    (own / "log.txt").write_text("what training left")
    options = ("--source", layered_source, "--variant", "bk-small", "--unet", own, "--out", out)
    outcome = exporter("build", *options)
    assert (outcome.code, outcome.err) == (0, [])
    assert "mid" not in traced
    manifest = Bundle.open(out).manifest
    assert (manifest.variant, manifest.unet, manifest.source) == ("bk-small", str(own), str(layered_source))
    (own / "log.txt").write_text("more of it")
    assert exporter("build", *options).out[-1] == f"up to date: {out}"
    student(layered_source, tmp_path / "other", "bk-small").rename(tmp_path / "again")
    assert_refused(exporter("build", *options[:-3], tmp_path / "again", "--out", out), "exists and is kept")
    with torch.no_grad():
        unet = tuning.load_unet(own)
        unet.conv_out.bias += 1
    save_part(unet, own, torch.float32)
    assert_refused(exporter("build", *options), "exists and is kept (a bundle made from other weights")
    assert_refused(exporter("verify", out), "are not those that bundle")
    shutil.rmtree(own)
    assert_refused(exporter("verify", out), f"{own} is missing")


def test_a_unet_from_elsewhere_that_was_only_assembled_is_said_to_be_so(
    exporter: Command, fake_trace: FakeTrace, layered_source: Path, tmp_path: Path
) -> None:
    fake_trace()
    own = tmp_path / "student"
    assemble_command(str(layered_source), "bk-base", own, "fp32", Console(quiet=True))
    outcome = exporter("build", "--source", layered_source, "--variant", "bk-base", "--unet", own, "--out", tmp_path / "bundle")
    assert outcome.code == 0
    assert "not distilled since" in outcome.err[0]


def test_a_unet_of_a_recipe_of_ones_own(exporter: Command, fake_trace: FakeTrace, layered_source: Path, tmp_path: Path) -> None:
    fake_trace()
    own = student(layered_source, tmp_path / "student", "bk-small")
    options = ("--source", layered_source, "--variant", "mine-2", "--unet", own, "--out", tmp_path / "bundle")
    assert exporter("build", *options).code == 0
    assert Bundle.open(tmp_path / "bundle").manifest.variant == "mine-2"


def test_a_unet_from_elsewhere_that_does_not_fit_is_refused(
    exporter: Command, fake_trace: FakeTrace, layered_source: Path, tmp_path: Path, here: Path
) -> None:
    fake_trace()
    own = student(layered_source, tmp_path / "student", "bk-small")
    to = ("build", "--source", layered_source, "--unet")
    assert_refused(exporter(*to, own, "--variant", "bk-base"), "is no bk-base UNet", "lacks mid.layer.0.attention", "--variant")
    assert_refused(exporter(*to, own), "is no original UNet", "lacks down.0.layer.1.attention")
    assert_refused(exporter(*to, own, "--variant", "assembled"), "can have no assembled UNet")
    small_unet("two stages", layers_per_block=2, block_out_channels=(16, 40)).save_pretrained(tmp_path / "wide")
    assert_refused(exporter(*to, tmp_path / "wide"), "its widths are [16, 40], not [16, 32]")
    small_unet("two stages", layers_per_block=2, cross_attention_dim=8).save_pretrained(tmp_path / "text")
    assert_refused(exporter(*to, tmp_path / "text"), "reads text of width 8 and its text encoder writes 16")
    assert_refused(exporter(*to, layered_source / "vae"), "holds no UNet")
    assert list(here.rglob("*")) == []
