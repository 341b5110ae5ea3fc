"""A manifest from a stranger is refused in one line, or runs: no traceback, no hang, whatever was edited in it."""

from __future__ import annotations

import io
import json
import shutil
import signal
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from engines import Bundle, BundleError, UserError
from engines.bundle.checks import LARGEST_MANIFEST
from engines.bundle.folder import MANIFEST_NAME
from engines.null import Null
from exporter.tables import show_bundle
from runtime import Pipeline
from tests.support.mutation import mutated

SECONDS = 40
"""For all mutations, and at least ``LEAST`` of them."""
LEAST, MOST = 60, 600
ONE = 120
"""Seconds for one mutation, on a machine with much else to do."""


@pytest.fixture(scope="module")
def bundle(mini_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The embedded model's manifest, tokenizer and scheduler: all that the null engine reads."""
    folder = tmp_path_factory.mktemp("bundle") / "edited"
    for name in ("tokenizer", "scheduler"):
        shutil.copytree(mini_bundle.folder / name, folder / name)
    shutil.copyfile(mini_bundle.folder / MANIFEST_NAME, folder / MANIFEST_NAME)
    return Bundle.open(folder)


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raises TimeoutError in what takes longer."""

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def use(folder: Path) -> str:
    """Open, inspect and generate; returns what became of it."""
    said, outcome = "", "refused"
    try:
        bundle = Bundle.open(folder)
        bundle.check_complete()
        outcome = "refused later"
        show_bundle(bundle, Console(file=io.StringIO(), width=200, markup=False))
        Pipeline(bundle, Null()).generate("a red star", steps=2, plan="block:2")
        outcome = "ran"
    except UserError as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 2000
    return outcome


def test_edited_manifests(bundle: Bundle) -> None:
    path = bundle.folder / MANIFEST_NAME
    whole = json.loads(path.read_text())
    assert use(bundle.folder) == "ran"
    outcomes, started = Counter[str](), time.monotonic()
    for seed in range(MOST):
        if seed >= LEAST and time.monotonic() - started > SECONDS:
            break
        path.write_text(json.dumps(mutated(whole, seed)))
        with warnings.catch_warnings(), at_most(ONE):
            warnings.simplefilter("ignore")
            try:
                outcomes[use(bundle.folder)] += 1
            except BaseException as error:
                error.add_note(f"seed {seed}")
                raise
    path.write_text(json.dumps(whole))
    assert outcomes["refused"] > outcomes.total() // 4
    assert outcomes["ran"], "some edits are of no consequence"


def edited(bundle: Bundle, text: str) -> Bundle:
    (bundle.folder / MANIFEST_NAME).write_text(text)
    return bundle


@pytest.fixture
def manifest(bundle: Bundle) -> Iterator[dict[str, Any]]:
    """The manifest's data; the file is as it was afterwards."""
    text = (bundle.folder / MANIFEST_NAME).read_text()
    yield json.loads(text)
    (bundle.folder / MANIFEST_NAME).write_text(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 10_000 + "]" * 10_000, "is no JSON"),
        ('{"version": 1, "max_images": ' + "9" * 5000 + "}", "is no JSON"),
        ('{"version": 1, "key": "\\ud800"}', "is no JSON"),
        ('{"version": 1, "guidance_scale": NaN}', "NaN is no number"),
        (" " * (LARGEST_MANIFEST + 1), "has more than"),
    ],
)
def test_a_file_that_is_too_much(bundle: Bundle, manifest: dict[str, Any], text: str, message: str) -> None:
    with pytest.raises(BundleError, match=message) as caught, at_most(ONE):
        Bundle.open(edited(bundle, text).folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": []}, "sizes has 0 entries"),
        ({"sizes": [[64, 10**9]]}, "sizes has 64x1000000000"),
        ({"sizes": [[100, 64]]}, "expected multiples of 64"),
        ({"latent_channels": -1}, "latent_channels is -1, expected 1 to"),
        ({"vae_scale": 0}, "vae_scale is 0"),
        ({"text_length": 10**9}, "text_length is 1000000000, expected 1 to 4096"),
        ({"text_chunks": 0}, "text_chunks is 0, expected 1 to 1024"),
        ({"clip_skip": -1}, "clip_skip is -1, expected 0 to 1024"),
        ({"guidance_scale": 1e300}, "guidance_scale is 1e"),
        ({"source": "a\nb"}, "source is not one line"),
        ({"recipe": "\x1b]0;title\x07.json"}, "recipe is not one line"),
        ({"variant_files": "a\nb"}, "variant_files is not one line"),
        ({"granularity": "block; reboot"}, "granularity is 'block; reboot', expected block, layer or unit"),
        ({"key": "/tmp/elsewhere"}, "key is '/tmp/elsewhere', expected a hash"),
        ({"engines": "null; reboot"}, "engines has a name, key, version or target that is not valid"),
        ({"bytes": 1 << 40}, "has 1099511627776 bytes, expected at most"),
        ({"units": "drop"}, "unit time is in no segment|does not exist|reads"),
        ({"segments": "drop"}, "is in no segment"),
        ({"segments": "turn"}, "before it makes"),
        ({"units": "many"}, "units has 300|has more than 16777216 bytes"),
    ],
)
def test_what_a_manifest_cannot_say(bundle: Bundle, manifest: dict[str, Any], change: dict[str, Any], message: str) -> None:
    for name, value in change.items():
        if value == "drop":
            del manifest[name][3]
        elif value == "turn":
            manifest[name].reverse()
        elif name == "engines":
            manifest["segments"][0]["engines"][value] = {"files": [], "version": "1"}
        elif name == "bytes":
            manifest["files"][0]["bytes"] = value
        elif value == "many":
            manifest[name] += [dict(manifest[name][0], name=f"extra{number}") for number in range(300_000 // 100)] * 100
        else:
            manifest[name] = value
    with pytest.raises(BundleError, match=message) as caught, at_most(ONE):
        Bundle.open(edited(bundle, json.dumps(manifest)).folder)
    assert "\n" not in str(caught.value)
