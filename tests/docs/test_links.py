"""Links, anchors, modules and paths that the documents name are there."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "models").rglob("*.md")})
MODULE = r"python -m ((?:engines|exporter|runtime|serving|tuning|benchmarks)[\w.]*)"
TREE = r"`((?:engines|exporter|runtime|tuning|benchmarks|models|tests|docs)/[\w./-]*)`"

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", without_code(page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def is_broken(page: Path, link: str) -> bool:
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    return not target.exists() or bool(anchor and anchor not in anchors(target))


def test_the_pages_are_found() -> None:
    assert {"README.md", "ARCHITECTURE.md", "plans.md"} <= {page.name for page in PAGES}


@pages
def test_relative_links_resolve(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text()))
    relative = [link for link in links if not re.match(r"\w+:", link)]
    assert [link for link in relative if is_broken(page, link)] == []


@pages
def test_named_modules_and_files_exist(page: Path) -> None:
    text = page.read_text()
    assert [name for name in re.findall(MODULE, text) if importlib.util.find_spec(name.rstrip(".")) is None] == []
    assert [name for name in re.findall(TREE, text) if not (ROOT / name).exists()] == []
