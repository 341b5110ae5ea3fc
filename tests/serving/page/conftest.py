"""One page for all tests of the room: the embedded model's, served in this process, and a browser to look at it."""

from __future__ import annotations

import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from engines import Bundle, make_engine
from runtime import Pipeline
from serving.page.site import Site
from serving.queueing.service import Service

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

BUNDLE = "mini-original"
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--force-color-profile=srgb",
)  # fmt: skip


@pytest.fixture(scope="session")
def service(mini_bundle: Bundle) -> Iterator[Service]:
    """What makes the pictures of all tests of the room."""
    found = Service({BUNDLE: Pipeline(mini_bundle, make_engine("onnxruntime"))})
    found.start()
    yield found
    found.end()


@pytest.fixture(scope="session")
def site(service: Service) -> Site:
    return Site(service)


@pytest.fixture(scope="session")
def address(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the page is served; what it and its visitors write goes to a folder of the session."""
    import uvicorn
    from fastapi import FastAPI

    from serving.page import mount_page

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        app = mount_page(FastAPI(), service)
        server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="critical"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the server ended"
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
        server.should_exit = server.force_exit = True
        thread.join(timeout=20)


@pytest.fixture(scope="session")
def browser() -> Iterator[Chrome]:
    """A headless Chromium with a profile of its own, that notes which addresses it asks for."""
    if not CHROMIUM or not DRIVER:
        pytest.skip("needs Chromium: no chromium and chromedriver on PATH")
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    with tempfile.TemporaryDirectory() as profile:
        options = ChromeOptions()
        options.binary_location = CHROMIUM
        for option in (*OPTIONS, f"--user-data-dir={profile}", f"--crash-dumps-dir={Path(profile) / 'crashes'}"):
            options.add_argument(option)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        chrome = Chrome(options, ChromeService(DRIVER))
        try:
            yield chrome
        finally:
            chrome.quit()
