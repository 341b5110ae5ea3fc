"""What every test runs under, and the bundles that several of them share."""

from __future__ import annotations

import atexit
import dataclasses
import gc
import logging
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any

import pytest
from filelock import FileLock
from hypothesis import settings

if TYPE_CHECKING:
    from engines import Bundle
    from runtime import Pipeline
    from tests.support.warm import Warm

# No test reaches a model hub; set before any library reads it, and inherited by the commands that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# The tensors here are small: a second thread gains nothing, and where cores are shared it waits for its turn at every operator.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A log for PyTorch's own tools: with a handler, and pytest gives it one, every step of every trace is written down in it.
setattr(logging.getLogger("torch.__trace"), "addHandler", lambda handler: None)  # noqa: B010

# The same examples in every run, so that a failure is the change's; HYPOTHESIS_PROFILE=explore draws others.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

# Nothing that tests build is taken for a user's: pieces are noted in a folder that goes with the session.
if "UNET_HEIRLOOM_CACHE" not in os.environ:  # test processes inherit it
    os.environ["UNET_HEIRLOOM_CACHE"] = tempfile.mkdtemp(prefix="unet-heirloom-tests-")
    atexit.register(shutil.rmtree, os.environ["UNET_HEIRLOOM_CACHE"], ignore_errors=True)


_BUILDERS = {"build", "build_shared"}
"""Functions that make a bundle."""
_FIRST = (
    "/test_ray.py", "/docs/test_blocks.py", "/graph/test_condconv.py", "/sizes/test_full_build.py",
    "/distillation/test_command.py", "/end_to_end/test_run_trt.py", "/speed/test_full_size.py", "/verification/test_verify.py",
    "/execution/test_graph_cache.py", "/segments/test_resumed.py", "/ranking/test_rank.py", "/mini/test_training.py",
)  # fmt: skip
"""The files that take longest, by the ends of their paths: they come first, so that none begins when the others are done. The
tests of the very first wait for processes more than they compute, and mypy runs beside them."""
_MANY = (
    "/execution/test_graph_cache.py", "/execution/test_swapping.py", "/exporter/test_build.py", "/exporter/test_clip_skip.py",
    "/exporter/test_command.py", "/exporter/test_loras.py", "/graph/test_checkpoint.py", "/graph/test_variants.py",
    "/checkpoints/test_configs.py", "/checkpoints/test_weight_files.py", "/checkpoints/test_weights.py",
    "/plans/test_demand.py", "/plans/test_plan_language.py", "/plans/test_plans_against_reference.py", "/plans/test_tgate.py",
    "/plans/test_words.py", "/report/test_cost.py", "/segments/test_artifact_index.py", "/segments/test_precision.py",
    "/segments/test_quick_export.py", "/segments/test_resumed.py", "/surgery/test_condconv.py", "/surgery/test_recipe_files.py",
)  # fmt: skip
"""The files whose tests are quick, and so many that together they are not: of these one in ``_ONE_IN`` is not marked as slow."""
_ONE_IN = 8


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported stays: Python need not go through those objects again and again in search of garbage."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, mark as slow what needs a whole build or is one of many, and skip what needs a GPU."""
    items.sort(key=_place)
    for item in items:
        if _is_built_for(item):
            item.add_marker(pytest.mark.slow)
    _thin_out([item for item in items if item.path.as_posix().endswith(_MANY) and not item.get_closest_marker("slow")])
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU; torch sees none"))


def _place(item: pytest.Item) -> int:
    """The place of a test's file among those that come first; behind them, files stay in their order."""
    path = item.path.as_posix()
    return next((place for place, end in enumerate(_FIRST) if path.endswith(end)), len(_FIRST))


def _thin_out(items: list[pytest.Item]) -> None:
    """Mark most tests of each file as slow: the first is not, nor is every eighth one after it."""
    seen: Counter[Path] = Counter()
    for item in items:
        if seen[item.path] % _ONE_IN:
            item.add_marker(pytest.mark.slow)
        seen[item.path] += 1


def _is_built_for(item: pytest.Item) -> bool:
    """Whether a fixture of a test builds a bundle: of all tests that use it, the first that runs waits for that."""
    fixtures: dict[str, Any] = getattr(getattr(item, "_fixtureinfo", None), "name2fixturedefs", {})
    return "fake_trace" not in fixtures and any(
        _BUILDERS & _names_in(definition.func.__code__) for found in fixtures.values() for definition in found
    )


def _names_in(code: CodeType) -> set[str]:
    """The names that a function uses, in functions inside of it too."""
    return set(code.co_names).union(*(_names_in(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


@pytest.fixture(autouse=True)
def caches(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's caches, each test's own. With the mark `shared_pieces` they are the session's: builds there take what others
    made, which is for tests that need bundles and do not test how they are built. Pieces that a fake wrote are never shared.
    """
    if request.node.get_closest_marker("shared_pieces") and "fake_trace" not in request.fixturenames:
        return Path(os.environ["UNET_HEIRLOOM_CACHE"])
    folder = tmp_path.with_name(f"{tmp_path.name}-caches")
    monkeypatch.setenv("UNET_HEIRLOOM_CACHE", str(folder))
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands run in an empty folder, so that whatever they write shows."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where shared bundles are built: a temporary folder, or TEST_BUNDLES, where the next run finds them up to date.

    Where tests run in several processes, all of them share it.
    """
    folder = os.environ.get("TEST_BUNDLES")
    if folder:
        return Path(folder)
    if "PYTEST_XDIST_WORKER" in os.environ:
        return tmp_path_factory.getbasetemp().parent / "bundles"
    return tmp_path_factory.mktemp("bundles")


def build_shared(bundles: Path, name: str, **options: object) -> Bundle:
    """Build a bundle that tests only read."""
    from exporter import BuildError, BuildOptions, build

    wanted = dataclasses.replace(BuildOptions(source="mini"), out=bundles / name, **options)  # type: ignore[arg-type]
    bundles.mkdir(parents=True, exist_ok=True)
    with FileLock(bundles / f".{name}.lock"):  # another process may be building it: wait for that
        try:
            return build(wanted)[0]
        except BuildError:  # TEST_BUNDLES holds one made by older code
            return build(dataclasses.replace(wanted, force=True))[0]


@pytest.fixture(scope="session")
def mini_bundle(bundles: Path) -> Bundle:
    """The small model, original UNet, ONNX Runtime, partitioned as every bundle is by default. Not to be changed."""
    return build_shared(bundles, "mini-original")


@pytest.fixture(scope="session")
def assembled_bundle(bundles: Path) -> Bundle:
    """The small model with its assembled UNet. Not to be changed."""
    return build_shared(bundles, "mini-assembled", variant="assembled")


@pytest.fixture(scope="session")
def emoji_bundle(bundles: Path) -> Bundle:
    """The model that the documents use, original UNet, ONNX Runtime. Not to be changed."""
    return build_shared(bundles, "emoji-original", source="emoji")


@pytest.fixture(scope="session")
def assembled_emoji_bundle(bundles: Path) -> Bundle:
    """The model that the documents use, with its assembled UNet. Not to be changed."""
    return build_shared(bundles, "emoji-assembled", source="emoji", variant="assembled")


@pytest.fixture(scope="session")
def torch_bundle(bundles: Path) -> Bundle:
    """A small checkpoint with a UNet of three stages, with programs of the torch engine. Not to be changed."""
    from tests.support.sources import save_source
    from tests.support.unets import small_unet

    source = bundles / "uneven-source"
    bundles.mkdir(parents=True, exist_ok=True)
    with FileLock(bundles / ".uneven-source.lock"):
        if not (source / "scheduler").exists():  # which is written last
            save_source(source, small_unet("uneven"))
    return build_shared(bundles, "uneven-torch", source=str(source), engines=("torch",))


@pytest.fixture(scope="module")
def mini_pipeline(mini_bundle: Bundle) -> Pipeline:
    """The embedded model, loaded in ONNX Runtime: for each file of tests anew, so that none meets what those of others left."""
    from engines import make_engine
    from runtime import Pipeline

    return Pipeline(mini_bundle, make_engine("onnxruntime"))


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm | None]:
    """The process that commands are forked from, started when it is first asked for; none where it cannot be."""
    from tests.support.warm import Warm

    if not sys.platform.startswith("linux"):
        yield None
        return
    with Warm() as process:
        yield process


@pytest.fixture
def warm_commands(warm: Warm | None) -> Iterator[None]:
    """Commands that a test starts have imported their libraries already: for tests of what they do, not of how they start."""
    from tests.support.warm import warm_starts

    with nullcontext() if warm is None else warm_starts(warm):
        yield


@pytest.fixture
def bundle_copy(mini_bundle: Bundle, tmp_path: Path) -> Path:
    """A copy of the embedded model's bundle that a test may damage."""
    folder = tmp_path / "bundle"
    shutil.copytree(mini_bundle.folder, folder)
    return folder
