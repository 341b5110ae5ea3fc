"""What the pages say of the code: the interface, the errors, the shares in pictures, the files to touch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from docs import draw_method, write_api
from engines import Unit

ROOT = Path(__file__).resolve().parents[2]
FOREIGN = {"TensorRT-RTX does not support this compute capability"}
"""Messages of TensorRT-RTX."""


def test_the_interface_is_up_to_date() -> None:
    assert write_api.PAGE.read_text() == write_api.page(), "write it again with: python -m docs.write_api"


def test_parameters_are_divided_at_their_own_commas() -> None:
    assert write_api.parameters("a: dict[str, int], b=(1, 2), *c") == ["a: dict[str, int]", "b=(1, 2)", "*c"]


def test_a_docstring_becomes_markdown() -> None:
    shown = write_api.markdown("Do ``it``::\n\n    run()\n\nMore.\n\nArgs:\n    a: one\n        and more.\n    b: two.")
    assert "Do `it`:\n\n```python dry-run\nrun()\n```\n\nMore.\n" in shown
    assert shown.endswith("**Args**\n\n- `a`: one and more.\n- `b`: two.\n")


def test_errors_on_the_troubleshooting_page_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = {found.removesuffix(" ...") for found in re.findall(r"^\| `(.+?)` \|", page, flags=re.MULTILINE)} - FOREIGN
    source = "".join(path.read_text() for package in write_api.PACKAGES for path in (ROOT / package).rglob("*.py"))
    joined = re.sub(r'"\s+f?"', "", source)
    assert len(messages) > 8
    assert [message for message in messages if message not in joined] == []


@pytest.fixture(scope="module")
def units() -> Sequence[Unit]:
    """Those of Stable Diffusion."""
    return draw_method.stable_diffusion()


def test_shares_on_the_page_are_those_in_the_picture(units: Sequence[Unit]) -> None:
    page = (ROOT / "docs" / "how-it-works.md").read_text()
    shares = [draw_method.states(units, draw_method.inherited_by(units, plan))[2] for plan in draw_method.PLANS]
    assert [f"{100 * share:.1f} %" in page for share in shares] == [True] * 3
    assert draw_method.states(units, frozenset())[2] == pytest.approx(1)


@pytest.mark.slow
def test_pictures_are_drawn(units: Sequence[Unit], tmp_path: Path) -> None:
    draw_method.draw_partition(units, tmp_path / "partition.png")
    draw_method.draw_steps(units, tmp_path / "steps.png")
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("partition.png", "steps.png"))


def test_files_to_touch_exist() -> None:
    rows = re.findall(r"^\| (`.+?) \|", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`([^`]+)`", row) if "<name>" not in name]
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).is_file()] == []
