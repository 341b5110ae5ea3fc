"""Every code block of the documents is run from a fresh state; those that need a GPU, a network or hours are parsed."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines import Bundle
from tests.support.doc_blocks import LANGUAGES, ROOT, Block, Reader, blocks_of, pages

pytestmark = pytest.mark.shared_pieces

PAGES = [page for page in pages() if page.is_file() and blocks_of(page)]


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_block_has_a_language(page: Path) -> None:
    assert [block for block in blocks_of(page) if block.language not in LANGUAGES] == []


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=named)
def test_the_blocks_of_a_page_run_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    def built(variant: str) -> Path:
        bundle: Bundle = request.getfixturevalue({"original": "emoji_bundle", "assembled": "assembled_emoji_bundle"}[variant])
        return bundle.folder

    reader = Reader(tmp_path, monkeypatch, built)
    request.addfinalizer(reader.stop)
    for block in blocks_of(page):
        reader.read(block)


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reader:
    return Reader(tmp_path, monkeypatch, lambda variant: Path("nowhere"))


@pytest.mark.parametrize(
    "block",
    [
        ("python", "import no_such_module"),
        ("python dry-run", "from runtime import no_such_name"),
        ("bash", "make no-such-target"),
        ("bash", "python -m no_such_module"),
        ("bash", 'pip install --editable ".[no-such-extra]"'),
        ("bash", "some-other-program --version"),
        ("bash dry-run", "python docs/one_step.py bundles/mine anchor"),
        ("json", '{"name": "x", "rules": [{"units": [], "when": {"mode": "uniform", "every": 3}}]}'),
    ],
    ids=lambda block: block[1].replace(" ", "_")[:30],
)
def test_a_broken_block_is_found(reader: Reader, block: tuple[str, str]) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011 each its own
        reader.read(Block(*block, line=1))


@pytest.mark.parametrize(
    "command",
    [
        "python -m exporter build --no-such-option",
        "python -m runtime 'a star' --plan nonesuch:3",
        "python -m exporter build --engine nonesuch",
        "torchrun --nproc-per-node 2 -m tuning distill --teacher mini",
    ],
)
def test_a_mistake_in_a_command_that_is_only_parsed_is_found(reader: Reader, command: str) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011 each its own
        reader.read(Block("bash dry-run", command, line=1))


def test_a_command_that_is_only_parsed_does_nothing(reader: Reader, tmp_path: Path) -> None:
    reader.read(Block("bash dry-run", "python -m exporter build --source owner/name --variant original --out bundles/x", line=1))
    assert not (tmp_path / "bundles").exists()
