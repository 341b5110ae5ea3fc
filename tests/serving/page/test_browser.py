"""The page in a real browser. With DRAW_PAGE=FOLDER, its pictures for the documents are written there."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from runtime import Pipeline
from serving.page.views import UNEXPECTED
from serving.queueing.service import Service

if TYPE_CHECKING:
    from selenium.webdriver import Chrome
    from selenium.webdriver.remote.webelement import WebElement

pytestmark = pytest.mark.shared_pieces
DESKTOP, PHONE = (1280, 1000), (390, 844)
PATIENCE = 60
"""Seconds after which a test gives up; nothing is timed."""


class Page:
    """What a visitor does and sees."""

    def __init__(self, chrome: Chrome, address: str) -> None:
        self.chrome, self.address = chrome, address

    def open(self, size: tuple[int, int] = DESKTOP) -> None:
        self.resize(size)
        self.chrome.get(self.address)
        self.until(lambda: self.find("#generate").is_enabled())

    def resize(self, size: tuple[int, int]) -> None:
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
        self.chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def find(self, selector: str) -> WebElement:
        return self.chrome.find_element("css selector", selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.chrome.find_elements("css selector", selector)

    def js(self, code: str, *arguments: Any) -> Any:
        return self.chrome.execute_script(code, *arguments)

    def until(self, holds: Callable[[], Any]) -> Any:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                if found := holds():
                    return found
            except Exception:  # an element that is being drawn anew
                if time.monotonic() > end:
                    raise
            assert time.monotonic() < end, self.text()
            time.sleep(0.05)

    def text(self) -> str:
        return str(self.js("return document.body.innerText"))

    def click(self, selector: str) -> None:
        self.js("arguments[0].scrollIntoView({block: 'center'})", self.find(selector))
        self.find(selector).click()

    def write(self, selector: str, text: str) -> None:
        from selenium.webdriver import Keys

        self.js("arguments[0].scrollIntoView({block: 'center'})", self.find(selector))
        self.find(selector).send_keys(Keys.CONTROL, "a")
        self.find(selector).send_keys(text, Keys.TAB)

    def generate(self) -> None:
        """Press the button; the status that stands there is no longer one."""
        self.js("document.querySelector('#status .status').className = 'seen'")
        self.click("#generate")

    def choose(self, selector: str, text: str) -> None:
        """Write into a list and take that."""
        from selenium.webdriver import Keys

        self.js("arguments[0].scrollIntoView({block: 'center'})", self.find(selector))
        self.find(selector).send_keys(Keys.CONTROL, "a")
        self.find(selector).send_keys(text, Keys.ENTER)

    def status(self, kind: str) -> str:
        """The status line, once it is of a kind and the page can be used again."""
        self.until(lambda: self.all(f"#status .{kind}") and self.find("#generate").is_enabled())
        return self.find("#status").text

    def picture(self, name: str) -> Image.Image:
        """A picture as the browser has it from the server."""
        source = self.until(lambda: self.find(f"#{name} img").get_attribute("src"))
        code = (
            "const done = arguments[1]; fetch(arguments[0]).then(r => r.blob()).then(b => {"
            "const reader = new FileReader(); reader.onload = () => done(reader.result); reader.readAsDataURL(b)})"
        )
        return Image.open(io.BytesIO(base64.b64decode(self.chrome.execute_async_script(code, source).partition(",")[2])))

    def log(self, kind: str) -> list[dict[str, Any]]:
        return list(self.chrome.get_log(kind))

    def draw(self, name: str, size: tuple[int, int], wait: float = 1.0) -> None:
        """Write a picture of the page, for the documents, if asked to."""
        if folder := os.environ.get("DRAW_PAGE"):
            self.js("window.scrollTo(0, 0); document.activeElement.blur()")
            time.sleep(wait)  # what fades in has done so
            height = self.js("return document.querySelector('#made').getBoundingClientRect().bottom + 24")
            self.resize((size[0], max(size[1], int(height))))
            shot = self.chrome.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
            Path(folder, name).write_bytes(base64.b64decode(shot["data"]))
            self.resize(size)


@pytest.fixture(scope="module")
def page(browser: Chrome, address: str) -> Page:
    page = Page(browser, address)
    page.open()
    return page


def test_it_loads_without_asking_anybody_else(page: Page) -> None:
    asked = [json.loads(entry["message"])["message"] for entry in page.log("performance")]
    urls = [each["params"]["request"]["url"] for each in asked if each["method"] == "Network.requestWillBeSent"]
    ours = [url for url in urls if url.startswith(page.address)]
    assert len(ours) > 5
    assert [url for url in urls if url.startswith(("http", "ws")) and url not in ours] == []
    assert [entry["message"] for entry in page.log("browser") if entry["level"] == "SEVERE"] == []
    assert len(page.all("#strip use.later")) == 20
    assert "of the multiply-accumulates of full" in page.find("#cost").text


def test_it_makes_a_picture_and_the_same_in_full(page: Page, mini_pipeline: Pipeline) -> None:
    page.write("#seed input", "7")
    page.click("#compare input")
    page.generate()
    assert page.status("done") == "done: seed 7"
    assert len(page.all("#strip use.done")) == 20
    asked = {"prompt": "a red star on a blue background", "seed": 7, "steps": 20}
    for name, plan in (("picture", "deepcache:3"), ("full", "full")):
        shown, made = page.picture(name), mini_pipeline.generate(**asked, plan=plan).image  # type: ignore[arg-type]
        assert (np.asarray(shown.convert("RGB")) == np.asarray(made)).all()
    assert page.picture("picture").text["plan"] == "deepcache:3"  # type: ignore[attr-defined]
    figures = page.find("#figures").text
    assert all(part in figures for part in ("×", "dB", "deepcache:3", "full", "%"))
    page.click("#again button")
    page.until(lambda: "plan='deepcache:3'" in page.find("#python").text)
    page.draw("serving.png", DESKTOP)


def test_it_fits_a_phone(page: Page) -> None:
    page.resize(PHONE)
    assert page.js("return window.innerWidth") == PHONE[0]
    page.until(lambda: page.js("return document.documentElement.scrollWidth") <= PHONE[0])
    parts = page.all("#room > *, #pictures > *, .strip, .figures")
    assert max(part.rect["x"] + part.rect["width"] for part in parts) <= PHONE[0]
    page.draw("serving-phone.png", PHONE)
    page.resize(DESKTOP)


def test_the_slider_leads_from_full_to_speed(page: Page) -> None:
    slide(page, "END")
    page.until(lambda: page.find("#plan input").get_attribute("value") == "deepcache:10")
    slide(page, "HOME")
    page.until(lambda: page.find("#plan input").get_attribute("value") == "full")
    page.until(lambda: "% of the multiply-accumulates" in page.find("#cost").text)


def slide(page: Page, key: str) -> None:
    from selenium.webdriver import Keys

    page.find("#speed input[type=range]").send_keys(getattr(Keys, key))


def test_a_mistake_is_one_line(page: Page) -> None:
    page.choose("#plan input", "blok:3")
    page.until(lambda: page.all("#cost .wrong"))
    page.generate()
    told = page.status("wrong")
    assert told.startswith("unknown plan 'blok:3'; did you mean block:3?")
    assert "Traceback" not in page.text()
    page.choose("#plan input", "deepcache:3")
    page.until(lambda: not page.all("#cost .wrong"))
    page.until(lambda: page.find("#speed input[type=range]").get_attribute("value") == "3")


def test_cancel_stops_the_call_and_the_page_goes_on(page: Page, service: Service) -> None:
    page.write("#steps input[type=number]", "100")
    page.choose("#scheduler input", "heun")
    if "DRAW_PAGE" in os.environ:
        time.sleep(1)  # lists fade out
    page.generate()
    page.until(lambda: " of 199" in page.find("#status").text)
    if "DRAW_PAGE" in os.environ:
        page.until(lambda: "step 1" in page.find("#status").text and len(page.all("#strip use.done")) > 100)
        page.draw("serving-running.png", DESKTOP, wait=0)
    page.click("#cancel")
    assert page.status("idle") == "cancelled"
    page.until(lambda: service.is_idle)
    page.write("#steps input[type=number]", "4")
    page.choose("#scheduler input", "dpm++")
    page.write("#seed input", "11")
    page.generate()
    assert page.status("done") == "done: seed 11"


def test_a_fault_is_called_unexpected_and_is_in_the_log(
    page: Page, service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*given: Any, **named: Any) -> Any:
        raise RuntimeError("secret of the server")

    monkeypatch.setattr(next(iter(service.pipelines.values())), "generate", broken)
    with caplog.at_level(logging.ERROR):
        page.generate()
        assert page.status("wrong") == UNEXPECTED
    assert "secret of the server" in caplog.text
    assert "Traceback" in caplog.text
    assert "secret" not in page.text()


def test_a_picture_that_is_painted_over_is_repainted_there(page: Page, tmp_path: Path) -> None:
    from selenium.webdriver import ActionChains

    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(tmp_path / "start.png")
    page.click("#start button")
    page.until(lambda: page.all("#edited input[type=file]"))
    page.find("#edited input[type=file]").send_keys(str(tmp_path / "start.png"))
    page.until(lambda: page.all("#edited [aria-label=Brush]"))
    page.js("document.querySelector('#edited').scrollIntoView({block: 'center'})")
    canvas = page.until(lambda: page.find("#edited canvas"))
    ActionChains(page.chrome).move_to_element_with_offset(canvas, -60, -60).click_and_hold().move_by_offset(
        40, 0
    ).release().perform()
    page.write("#preview input[type=number]", "0")
    page.generate()
    page.status("done")
    made, start = np.asarray(page.picture("picture").convert("RGB")), np.asarray(Image.open(tmp_path / "start.png"))
    kept = (made == start).all(axis=2)
    assert kept[-8:].all()
    assert not kept[:32, :32].all()
    assert {"image.png", "mask.png"} <= {link.get_attribute("download") for link in page.all("#files a")}


def test_a_visitor_who_leaves_ends_the_call(page: Page, service: Service) -> None:
    page.open()
    page.write("#steps input[type=number]", "100")
    page.choose("#scheduler input", "heun")
    page.generate()
    page.until(lambda: not service.is_idle)
    page.chrome.get("about:blank")
    page.until(lambda: service.is_idle)
