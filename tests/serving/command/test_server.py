"""The command with a real server: OpenAI's own client, signals, the page, and what is refused at the start."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

from serving.__main__ import main
from serving.command.arguments import limits_of, named_bundles, parse
from serving.errors import ServingError
from tests.support.commands import Command, assert_refused, command
from tests.support.gated import PATIENCE, GatedPipeline, wait_for
from tests.support.http_answers import KEY

pytestmark = pytest.mark.shared_pieces


@pytest.fixture
def serve(capfd: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Command]:
    monkeypatch.delenv("UNET_HEIRLOOM_API_KEY", raising=False)
    yield command(main, capfd, monkeypatch)
    logging.captureWarnings(False)


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number: int = free.getsockname()[1]
        return number


def ask(port: int, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    sent = None if body is None else json.dumps(body)
    connection.request(method, path, sent, {"Content-Type": "application/json", **headers})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


class Beside:
    """Does things with a server that runs in this thread, from another one, and keeps what went wrong there."""

    def __init__(self, port: int, things: Callable[[], None]) -> None:
        self.port, self._things = port, things
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._thread.join(PATIENCE)
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        try:
            self._wait_until_ready()
            self._things()
        except BaseException as error:
            self.error = error
        finally:
            stop()
            if self.error is not None:
                time.sleep(0.3)
                stop()  # for a second time: it ends whatever still runs

    def _wait_until_ready(self) -> None:
        def is_ready() -> bool:
            try:
                return ask(self.port, "GET", "/readyz")[0] == 200
            except OSError:
                return False

        wait_for(is_ready)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def served(gated: GatedPipeline, monkeypatch: pytest.MonkeyPatch) -> Iterator[GatedPipeline]:
    """What the command loads, whatever it is told to. Signals that come when no server runs are nobody's."""
    monkeypatch.setattr("serving.command.run.load", lambda folder, engine: gated)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    yield gated
    signal.signal(signal.SIGTERM, before)
    gated.open()


def test_openais_client_gets_pictures_and_its_own_errors(
    serve: Command, served: GatedPipeline, port: int, tmp_path: Path
) -> None:
    (tmp_path / "key").write_text(f"{KEY}\n")

    def things() -> None:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0)
        assert [model.id for model in client.models.list()] == ["mini"]
        found: Any = client.images.generate(prompt="a red star", n=2, size="64x128", extra_body={"steps": 2, "seed": 5})
        sizes = [Image.open(io.BytesIO(base64.b64decode(each.b64_json))).size for each in found.data]
        assert sizes == [(64, 128)] * 2
        assert [each.seed for each in found.data] == [5, 6]
        with pytest.raises(openai.BadRequestError, match="unknown scheduler 'eulr'; did you mean euler"):
            client.images.generate(prompt="a red star", extra_body={"scheduler": "eulr"})
        with pytest.raises(openai.NotFoundError, match="there is no model 'dall-e-3'; choose from: mini"):
            client.images.generate(prompt="a red star", model="dall-e-3")
        with pytest.raises(openai.AuthenticationError, match="needs its key"):
            client.with_options(api_key="another").images.generate(prompt="a red star")

    with Beside(port, things):
        outcome = serve("--bundle", "mini=anything", "--port", port, "--api-key-file", tmp_path / "key", "--no-page", "--quiet")
    assert outcome.code == 0
    assert KEY not in "".join([*outcome.out, *outcome.err])


def test_a_server_that_is_told_to_stop_finishes_what_it_took(serve: Command, served: GatedPipeline, port: int) -> None:
    answers: list[tuple[int, Any]] = []

    def things() -> None:
        with served.closed():
            star, ring = (
                threading.Thread(target=lambda name=name: answers.append(ask(port, "POST", "/generate", {"prompt": name})))
                for name in ("a star", "a ring")
            )
            star.start()
            served.wait_until_running()
            ring.start()
            wait_for(is_waiting)
            stop()
            wait_for(lambda: ask(port, "GET", "/readyz")[0] == 503)
            status, told = ask(port, "POST", "/generate", {"prompt": "a cross"})
            assert (status, told["error"]["code"]) == (503, "stopping")
            assert ask(port, "GET", "/healthz")[0] == 200
        for thread in (star, ring):
            thread.join(PATIENCE)

    def is_waiting() -> bool:
        connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        connection.request("GET", "/metrics")
        return 'waiting_pictures{model="mini"} 1.0' in connection.getresponse().read().decode()

    with Beside(port, things):
        outcome = serve("--bundle", "mini=anything", "--port", port, "--no-page", "--quiet")
    assert outcome.code == 0
    assert [(status, len(told["images"])) for status, told in answers] == [(200, 1)] * 2
    with pytest.raises(OSError, match="refused"):
        ask(port, "GET", "/healthz")


def test_a_second_signal_and_the_time_to_stop_end_what_runs(serve: Command, served: GatedPipeline, port: int) -> None:
    answers: list[tuple[int, Any]] = []

    def things() -> None:
        with served.closed():
            star = threading.Thread(target=lambda: answers.append(ask(port, "POST", "/generate", {"prompt": "a star"})))
            star.start()
            served.wait_until_running()
            stop()
            star.join(PATIENCE)  # answered while it still runs

    with Beside(port, things):
        outcome = serve("--bundle", "mini=anything", "--port", port, "--no-page", "--quiet", "--stop-timeout", "0.2")
    assert outcome.code == 0
    ((status, told),) = answers
    assert status == 503
    assert "stopped before the request was finished" in told["error"]["message"]
    assert served.records == 0


def test_the_name_of_another_site_is_not_answered_without_a_key(
    serve: Command, served: GatedPipeline, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    statuses: list[int] = []

    def things() -> None:
        for name in ("localhost", f"127.0.0.1:{port}", "[::1]", "site.example", f"site.example:{port}"):
            connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
            connection.request("GET", "/healthz", headers={"Host": name})
            statuses.append(connection.getresponse().status)

    with Beside(port, things):
        serve("--bundle", "mini=anything", "--port", port, "--no-page", "--quiet")
    monkeypatch.setenv("UNET_HEIRLOOM_API_KEY", KEY)
    with Beside(port, things):
        serve("--bundle", "mini=anything", "--port", port, "--no-page", "--quiet")
    assert statuses == [200, 200, 200, 400, 400, *[200] * 5]


@pytest.mark.parametrize("key", [None, KEY])
def test_the_page_is_there_and_asks_for_the_key(
    serve: Command, served: GatedPipeline, port: int, monkeypatch: pytest.MonkeyPatch, key: str | None
) -> None:
    pytest.importorskip("gradio")
    if key is not None:
        monkeypatch.setenv("UNET_HEIRLOOM_API_KEY", key)
    statuses: list[int] = []
    refused: list[tuple[int, str]] = []

    def things() -> None:
        """The parts of the page, and who is let in."""
        connection = HTTPConnection("127.0.0.1", port, timeout=10)
        for path, sent in (("/config", None), ("/login", "another"), ("/login", key)):
            headers = {"Content-Type": "application/x-www-form-urlencoded"}
            connection.request("POST" if sent else "GET", path, sent and f"username=a&password={sent}", headers)
            answer = connection.getresponse()
            answer.read()
            statuses.append(answer.status)
        for method, path in (("GET", "/generate"), ("POST", "/v1/images/edits"), ("PUT", "/v1/models/mini")):
            status, error = ask(port, method, path)
            refused.append((status, error["error"]["message"]))
        statuses.append(ask(port, "GET", "/healthz")[0])

    with Beside(port, things):
        assert serve("--bundle", "mini=anything", "--port", port, "--quiet").code == 0
    assert refused == [(405, "Method Not Allowed"), (404, "Not Found"), (405, "Method Not Allowed")], "in our form"
    assert statuses.pop() == 200
    assert statuses[0] == (200 if key is None else 401)
    assert key is None or statuses[1:] == [400, 200]


def test_listening_elsewhere_without_a_key_is_warned_of(
    serve: Command, served: GatedPipeline, port: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--bundle", "mini=anything", "--host", "0.0.0.0", "--port", port, "--no-page", "--quiet")
    with Beside(port, lambda: None):
        assert serve(*arguments).code == 0
    assert "listening at 0.0.0.0 without a key" in caplog.text
    caplog.clear()
    monkeypatch.setenv("UNET_HEIRLOOM_API_KEY", KEY)
    with Beside(port, lambda: None):
        assert serve(*arguments).code == 0
    assert "without a key" not in caplog.text


def test_what_cannot_be_started(serve: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short").write_text("1234")
    (tmp_path / "key").write_text(KEY)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        assert_refused(serve("--port", number), f"127.0.0.1:{number} cannot be listened at", "choose another --host or --port")
    assert_refused(serve("--port", 0), "no bundle in ./bundles; build it with")
    assert_refused(serve("--port", 0, "--bundle", "nowhere"), "no bundle at nowhere")
    assert_refused(serve("--port", 99999), "--port 99999: give one from 0")
    assert_refused(serve("--max-queue", 0), "--max-queue 0: give a number above 0")
    assert_refused(serve("--batch-wait-ms", -1), "--batch-wait-ms -1: give milliseconds")
    assert_refused(serve("--host", "no such host.invalid", "--port", 0), "cannot be listened at")
    assert_refused(serve("--api-key-file", tmp_path / "none"), "cannot be read", "give a file with the key")
    assert_refused(serve("--api-key-file", tmp_path / "short"), "holds no key: 16 to 1000 letters", "token_urlsafe")
    monkeypatch.setenv("UNET_HEIRLOOM_API_KEY", KEY)
    assert_refused(serve("--api-key-file", tmp_path / "key"), "are both given; give one")


def test_bundles_are_called_by_their_folders_or_as_they_are_named() -> None:
    assert named_bundles(["bundles/mini-original", "small=bundles/x", "a=b/c=d"]) == {
        "mini-original": "bundles/mini-original",
        "small": "bundles/x",
        "a": "b/c=d",
    }
    assert named_bundles(["./x=y/z"]) == {"z": "./x=y/z"}
    for given, message in (
        (["a/x", "b/x"], "two are called 'x'; give one another name"),
        (["a\n=x"], "is no name for it"),
        (["/"], "is no name for it"),
    ):
        with pytest.raises(ServingError, match=message):
            named_bundles(given)


def test_options_set_the_limits() -> None:
    given = "--max-pixels 1 --max-images 2 --max-steps 3 --max-prompt 4 --max-body-mib 5 --max-picture-mib 6 --max-queue 8"
    given += " --max-picture-pixels 7 --max-batch 9 --batch-wait-ms 10 --timeout 11"
    found = limits_of(parse(given.split(), "serve"))
    assert (found.pixels, found.images, found.steps, found.prompt) == (1, 2, 3, 4)
    assert (found.body, found.picture_bytes, found.picture_pixels) == (5 * 2**20, 6 * 2**20, 7)
    assert (found.queue, found.batch, found.batch_wait, found.seconds) == (8, 9, 0.01, 11)
    usual = parse([], "serve")
    limits, page = limits_of(usual), Path("docs/serving.md").read_text()
    for number in (limits.pixels, limits.images, limits.steps, limits.prompt, limits.queue, limits.batch):
        assert str(number) in page
    assert (usual.host, usual.port) == ("127.0.0.1", 7860)
