"""Many processes at once, with Ray: replicas of the service, one of which is killed, another bundle, and files of prompts.

Ray takes long to start, so all of it is one cluster: two cores, no dashboard, a small store.
"""

from __future__ import annotations

import base64
import io
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from engines import Bundle
from runtime import Pipeline, Request
from serving.errors import ServingError
from serving.prompts import ray_workers
from serving.prompts.__main__ import main
from serving.ray_app import Arguments, app
from tests.support.commands import command
from tests.support.gated import wait_for

ray = pytest.importorskip("ray", reason="needs ray: the extra `ray`")
from ray import serve  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.shared_pieces]
PORT = 18_473
LONG = 120.0
"""Seconds, where Ray starts or ends processes: nothing is timed."""
ROOT = Path(__file__).resolve().parents[2]
HERE = f"http://127.0.0.1:{PORT}"
PROMPTS = ["a red star on a blue background", "a green ring", "a yellow square", "a red cross"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Its address."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    begun = ray.init(num_cpus=2, include_dashboard=False, object_store_memory=2**27, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    yield str(begun.address_info["address"])
    serve.shutdown()
    ray.shutdown()


def picture(answer: dict[str, Any]) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(answer["images"][0]))) as image:
        return np.asarray(image, np.int16)


def pids(handle: Any, count: int) -> list[int]:
    """Of replicas, as they answer."""
    found: set[int] = set()

    def all_answer() -> bool:
        found.update(handle.pid.remote().result(timeout_s=60) for _ in range(8))
        return len(found) >= count

    wait_for(all_answer)
    return sorted(found)


def asked(number: int, steps: int = 12) -> httpx.Response:
    body = {"prompt": PROMPTS[number % 4], "seed": number, "steps": steps}
    return httpx.post(f"{HERE}/generate", json=body, timeout=120)


def test_two_replicas_of_serve_run_answer_and_one_is_killed_in_the_middle_and_no_request_is_lost(
    cluster: str, mini_bundle: Bundle, mini_pipeline: Pipeline
) -> None:
    given = [f"bundle=copy:{mini_bundle.folder}", "min_replicas=2", "max_replicas=2", "batch=2"]
    command = [sys.executable, "-m", "ray.serve.scripts", "run", "--non-blocking", "--address", cluster, "--name", "pictures"]
    done = subprocess.run([*command, "serving.ray_app:app", *given], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    handle = serve.get_deployment_handle("Pictures", "pictures")
    first, second = pids(handle, 2)
    with ThreadPoolExecutor(8) as clients:
        answers = [clients.submit(asked, number) for number in range(24)]
        wait_for(lambda: sum(each.done() for each in answers) >= 4)
        os.kill(first, signal.SIGKILL)
        assert not all(each.done() for each in answers)
        results = [each.result() for each in answers]
    assert [each.status_code for each in results] == [200] * 24
    for number in (0, 11, 23):  # whichever replica it was
        alone = mini_pipeline.generate(Request(PROMPTS[number % 4], seed=number, steps=12))
        assert np.abs(picture(results[number].json()) - np.asarray(alone.image, np.int16)).max() <= 1
    assert second in pids(handle, 1)
    _check_the_rest()


def _check_the_rest() -> None:
    """Mistakes, OpenAI's form, and what is served."""
    refused = httpx.post(f"{HERE}/generate", json={"prompt": "a ring", "plan": "blok:3"}, timeout=60)
    assert refused.status_code == 400
    assert "blok" in refused.json()["error"]["message"]
    form = {"prompt": "a ring", "size": "64x64"}
    assert httpx.post(f"{HERE}/v1/images/generations", json=form, timeout=60).json()["data"][0]["b64_json"]
    assert httpx.post(f"{HERE}/generate", content=b"{", timeout=60).status_code == 415
    assert httpx.get(f"{HERE}/nothing", timeout=60).status_code == 404
    assert httpx.get(f"{HERE}/v1/models", timeout=60).json()["data"] == [{"id": "model", "object": "model"}]


def replicas() -> int:
    """How many run."""
    found = serve.status().applications["pictures"].deployments["Pictures"].replica_states
    return sum(count for state, count in found.items() if str(state).endswith("RUNNING"))


def test_another_bundle_comes_in_while_requests_are_answered_and_replicas_follow_their_number(
    cluster: str, mini_bundle: Bundle
) -> None:
    """Goes on with what the test before it deployed, or else begins with one bundle itself."""
    first = Arguments(bundle=str(mini_bundle.folder), batch=1)
    if "pictures" not in serve.status().applications:
        serve.run(app(first), name="pictures", route_prefix="/")
    changed = {"name": "second", "min_replicas": 1, "max_replicas": 2, "upscale_after": 0.5, "downscale_after": 0.5}
    second, results = app(first.model_copy(update=changed)), list[httpx.Response]()
    waiting, ended = threading.Event(), threading.Event()

    def ask(number: int) -> None:
        while not ended.is_set():
            results.append(asked(number, steps=3))
            if not waiting.is_set():  # what starts meanwhile has the cores to itself
                ended.wait(0.2)

    with ThreadPoolExecutor(6) as clients:
        for number in range(6):
            clients.submit(ask, number)
        try:
            wait_for(lambda: bool(results), LONG)
            serve.run(second, name="pictures", route_prefix="/")
            wait_for(lambda: results[-1].json().get("model") == "second", LONG)
            waiting.set()  # another replica comes where requests wait
            wait_for(lambda: replicas() == 2, LONG)
        finally:
            ended.set()
    assert {each.status_code for each in results} == {200}
    assert {each.json()["model"] for each in results} == {"model", "second"}
    wait_for(lambda: replicas() == 1, LONG)
    serve.delete("pictures")


def test_a_cluster_that_does_not_answer_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setattr(ray_workers, "_ANSWERS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for address in (f"127.0.0.1:{silent.getsockname()[1]}", f"ray://127.0.0.1:{silent.getsockname()[1]}"):
            with pytest.raises(ServingError, match=r"no cluster answers there within 0.5 s; start a cluster"):
                ray_workers._start(address)


@pytest.mark.filterwarnings("ignore:.* is deprecated")  # Ray's, of its own settings
def test_a_file_of_prompts_is_made_by_two_workers(
    cluster: str, mini_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("".join(f"{PROMPTS[number % 4]}\n" for number in range(40)) + "\n\xff\n", "latin-1")
    given = ["p.txt", "--shards", "out", "--shard-size", 16, "--bundle", mini_bundle.folder, "--steps", 1, "--batch", 1]
    outcome = command(main, capfd, monkeypatch)(*given, "--workers", 2)
    assert outcome.code == 1
    assert outcome.out[-1] == "40 made, 0 there already, 1 not made"
    assert [line for line in outcome.err if line.startswith("warning")] == ["warning: line 42: the line is no text in UTF-8"]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == [f"shard-00000{number}.tar" for number in range(3)]
    assert command(main, capfd, monkeypatch)(*given).out[-1] == "0 made, 40 there already, 1 not made"
