"""What stands in front of many replicas, and what is in each, without Ray; bundles brought from elsewhere."""

from __future__ import annotations

import asyncio
import hashlib
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from pydantic import ValidationError
from starlette.requests import Request as HttpRequest

from engines import Bundle, BundleError, EngineError
from serving import Limits, ServingError
from serving.errors import StoppingError
from serving.fetching import bundle_folder
from serving.ray_app import Arguments, Front, Pictures, app
from tests.support.commands import contents
from tests.support.gated import PATIENCE

pytestmark = pytest.mark.shared_pieces
BODY = json.dumps({"prompt": "a ring", "steps": 2}).encode()


def replica(limits: Limits | None = None) -> Pictures:
    return Pictures("null", limits or Limits())


def told(answer: tuple[int, dict[str, str], bytes]) -> tuple[int, Any]:
    return answer[0], json.loads(answer[2])


def test_a_replica_changes_over_to_another_bundle_and_finishes_what_it_has(mini_bundle: Bundle, bundle_copy: Path) -> None:
    async def course() -> None:
        pictures = replica(Limits(batch_wait=0.3))  # a request waits for so long
        assert told(await pictures.answer("generate", BODY))[0] == 503
        await pictures.reconfigure({"bundle": str(mini_bundle.folder), "name": "first"})
        assert await pictures.models() == ["first"]
        waiting = asyncio.create_task(pictures.answer("generate", BODY))
        while pictures.service.is_idle:
            await asyncio.sleep(0.01)
        old = pictures.service
        await pictures.reconfigure({"bundle": str(bundle_copy), "name": "second"})
        status, answer = told(await waiting)
        assert (status, answer["model"]) == (200, "first")
        for worker in old.workers.values():
            worker.join(PATIENCE)
            assert not worker.is_alive()
        status, answer = told(await pictures.answer("openai", json.dumps({"prompt": "a ring", "size": "64x64"}).encode()))
        assert (status, len(answer["data"])) == (200, 1)
        assert await pictures.models() == ["second"]
        pictures.check_health()
        pictures.service.end()
        with pytest.raises(StoppingError):
            pictures.check_health()

    asyncio.run(course())


def test_mistakes_are_answered_by_the_replica(mini_bundle: Bundle) -> None:
    async def course() -> None:
        pictures = replica(Limits(seconds=0.2, batch_wait=5))
        await pictures.reconfigure({"bundle": str(mini_bundle.folder), "name": "mini"})
        assert told(await pictures.answer("generate", b"{"))[0] == 400
        assert told(await pictures.answer("generate", b'{"prompt": "a ring", "model": "none"}'))[0] == 404
        assert told(await pictures.answer("generate", BODY))[0] == 504  # it waits longer than it may
        pictures.service.end()

    asyncio.run(course())


def test_the_front_holds_no_more_bodies_than_fit_and_hands_on_what_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    exceptions = pytest.importorskip("ray").exceptions
    monkeypatch.setattr("serving.ray_app._PAUSE", 0.0)
    dies, release = [True, True, False], asyncio.Event()

    async def held(form: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        if dies and dies.pop(0):
            raise exceptions.RayActorError
        await release.wait()
        return 200, {"content-type": "application/json"}, body

    front = Front(SimpleNamespace(answer=SimpleNamespace(remote=held)), Limits(body=len(BODY)), 3)

    async def course() -> list[int]:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            await (await front(HttpRequest(scope, receive)))(scope, receive, send)

        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front") as client:
            headers = {"content-type": "application/json"}
            calls = [asyncio.create_task(client.post("/generate", content=BODY, headers=headers)) for _ in range(9)]
            while not any(call.done() for call in calls):
                await asyncio.sleep(0.01)
            release.set()
            return sorted(answer.status_code for answer in await asyncio.gather(*calls))

    assert asyncio.run(course()) == [200] * 8 + [429]
    assert not dies


@pytest.mark.parametrize("given", [{}, {"bundle": "b", "batch": 0}, {"bundle": "b", "gpu": 1}, {"bundle": "b", "cpus": -1}])
def test_arguments_of_the_application_are_checked(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Arguments(**given)


def test_more_replicas_at_least_than_at_most_are_refused() -> None:
    pytest.importorskip("ray")
    with pytest.raises(ServingError, match="min_replicas=3 max_replicas=2"):
        app(Arguments(bundle="b", min_replicas=3, max_replicas=2))


def test_an_engine_that_there_is_not_and_a_bundle_that_is_none_are_refused_before_anything_starts(bundle_copy: Path) -> None:
    pytest.importorskip("ray")
    with pytest.raises(EngineError, match="unknown engine"):
        app(Arguments(bundle="b", engine="onnxruntim"))
    (bundle_copy / "manifest.json").write_text("[]")
    for given in (str(bundle_copy), f"copy:{bundle_copy}"):
        with pytest.raises(BundleError, match="manifest"):
            app(Arguments(bundle=given))


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNET_HEIRLOOM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def archive(mini_bundle: Bundle, tmp_path: Path) -> Callable[[str], Path]:
    def make(inside: str) -> Path:
        path = tmp_path / "bundle.tar.gz"
        with tarfile.open(path, "w:gz", compresslevel=1) as file:
            file.add(mini_bundle.folder, inside, filter=lambda member: None if "/." in member.name[2:] else member)
        return path

    return make


def test_a_folder_is_used_where_it_is_or_copied_once(mini_bundle: Bundle, own_cache: Path, tmp_path: Path) -> None:
    assert bundle_folder(str(mini_bundle.folder)) == mini_bundle.folder
    copy = bundle_folder(f"copy:{mini_bundle.folder}")
    assert copy.is_relative_to(own_cache)
    Bundle.open(copy).check()
    before = contents(copy)
    assert bundle_folder(f"copy:{mini_bundle.folder}") == copy
    assert contents(copy) == before
    with pytest.raises(BundleError, match="no such folder"):
        bundle_folder(f"copy:{tmp_path / 'none'}")
    (tmp_path / "large").mkdir()
    with pytest.raises(BundleError, match="no manifest"):  # and nothing is copied to find that out
        bundle_folder(f"copy:{tmp_path / 'large'}")
    with pytest.raises(ServingError, match="Protocol not known"):
        bundle_folder("nowhere://bundle.tar")


@pytest.mark.parametrize("inside", [".", "mini"])
def test_an_archive_is_unpacked_once_and_is_the_one_that_was_named(
    archive: Callable[[str], Path], own_cache: Path, inside: str
) -> None:
    path = archive(inside)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    folder = bundle_folder(f"file://{path}#sha256={found}")
    Bundle.open(folder).check()
    path.unlink()
    assert bundle_folder(f"file://{path}#sha256={found}") == folder


def test_what_is_damaged_or_another_is_not_kept(archive: Callable[[str], Path], bundle_copy: Path, own_cache: Path) -> None:
    path = archive("mini")
    with pytest.raises(ServingError, match=r"^[^(]*it is another archive, or damaged$"):
        bundle_folder(f"{path}#sha256={'0' * 64}")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ServingError, match="cannot be brought here"):
        bundle_folder(str(path))
    segment = next(bundle_copy.glob("segments/*.onnx"))
    segment.write_bytes(b"damaged")
    with pytest.raises(BundleError, match="not the file that was built"):
        bundle_folder(f"copy:{bundle_copy}")
    with pytest.raises(BundleError, match="not the file that was built"):  # nothing of it stayed
        bundle_folder(f"copy:{bundle_copy}")
