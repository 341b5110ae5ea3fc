"""What the page does, as functions: no browser, and no Gradio but where its own doors are tried."""

from __future__ import annotations

import io
import itertools
import logging
import shlex
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engines import Bundle, make_engine
from runtime import Pipeline, Plan, PlanError, Request, RequestError, find_plan
from runtime.__main__ import main as runtime_main
from runtime.plans.plan import MOST_BYTES
from runtime.plans.words import Found
from serving import Limits
from serving.errors import BusyError, ServingError
from serving.page import make_page
from serving.page.asked import MOST_STEPS, Asked, image_and_mask
from serving.page.calls import Calls, Cancelled, Made, StepDone, in_turns, run
from serving.page.comparison import GAIN, difference, figures
from serving.page.plans import chosen_plan, ladder
from serving.page.reproduce import as_command, as_python
from serving.page.site import Site
from serving.page.strip import Strip
from serving.page.views import NOTHING_MADE, UNEXPECTED, WAITING, View
from serving.queueing.service import Service
from tests.support.commands import command
from tests.support.gated import PATIENCE, GatedPipeline, wait_for

pytestmark = pytest.mark.shared_pieces
BUNDLE = "mini-original"
CONTROLS = ("prompt", "negative", "seed", "steps", "size", "scheduler", "guidance", "edited", "strength", "preview", "compare")
ASKED = {"negative": "", "scheduler": "dpm++", "strength": 0.6, "compare": False}
"""The page's controls in their order, and what stands there if nobody touched them."""
ROOT = Path(__file__).resolve().parents[3]
PROMPT = "a red star on a blue background"


def controls(**changes: Any) -> dict[str, Any]:
    """The page's controls as a visitor finds them, with fewer steps."""
    return {"prompt": PROMPT, "seed": 3, "steps": 4, "size": "64x64", "guidance": 3.0, "preview": 0} | changes


def made_by(site: Site, plan: object = "deepcache:2", **changes: Any) -> Iterator[View]:
    return site.generate("visitor", BUNDLE, plan, None, **controls(**changes))


def ended(site: Site, plan: object = "deepcache:2", **changes: Any) -> str:
    """The last status of a call."""
    return str([view["status"] for view in made_by(site, plan, **changes) if "status" in view][-1])


def test_the_ladder_begins_with_full_and_every_rung_costs_less(site: Site) -> None:
    rungs = site.rungs[BUNDLE]
    assert rungs[0].plan.name == "full"
    assert rungs[0].cost == 1
    assert all(below.cost < above.cost for above, below in itertools.pairwise(rungs))
    assert site.plan_at(BUNDLE, site.first_rung(BUNDLE)) == "deepcache:3"
    assert site.place_of(BUNDLE, "deepcache:3") == site.first_rung(BUNDLE)
    assert site.place_of(BUNDLE, "unit:3") is None
    with pytest.raises(RequestError, match=f"0 to {len(rungs) - 1}"):
        site.plan_at(BUNDLE, len(rungs))


def test_a_front_beside_the_bundle_takes_the_ladders_place(bundle_copy: Path) -> None:
    front = bundle_copy.parent / "plans"
    front.mkdir()
    found = Found(scheduler="ddim", steps=10, guidance_scale=3, prompts=4, cost=0.5, psnr=40)
    for name, preset in (("found-0.600", "deepcache:2"), ("found-0.400", "deepcache:3"), ("found-0.500", "unit:2")):
        plan = find_plan(preset).model_copy(update={"name": name, "found": found})
        (front / f"{name}.json").write_text(plan.model_dump_json())
    (front / "found-0.100.json").write_text("{}")
    (front / "front.json").write_text("{}")
    pipeline = Pipeline(Bundle.open(bundle_copy), make_engine("null"))
    with pytest.warns(UserWarning, match=r"found-0\.100\.json"):
        rungs = ladder(pipeline)
    assert [rung.plan.name for rung in rungs if "found" in rung.plan.name] == ["found-0.600", "found-0.400"], "what it can run"
    assert rungs[0].plan.name == "full"
    cost, strip = Site(Service({"one": pipeline})).describe("one", "found-0.400", 10)
    assert "found for 10 steps of ddim" in cost
    assert strip.count("<use") == 10


def test_plans_are_named_never_opened(site: Site, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(find_plan("block:2").model_dump_json())
    with pytest.raises(PlanError, match="opens no file by its name; upload it"):
        chosen_plan(str(file), [])
    with pytest.raises(PlanError, match="is a list"):
        chosen_plan([str(file)], [])
    assert chosen_plan(" block:2 ", []) == find_plan("block:2")
    uploaded = find_plan("block:3").model_copy(update={"name": "/etc/plan.json"})
    assert chosen_plan("/etc/plan.json", [], uploaded) is uploaded
    assert "no file by its name" in ended(site, str(file))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\xff{", "is no JSON that can be read"),
        (b"[" * 100_000, "is no JSON that can be read"),
        (b"{}", "name: it is missing"),
        (b'{"name": "x", "rules": [], "path": "/etc/passwd"}', "path: there is no such field"),
        (b" " * (MOST_BYTES + 1), f"has more than {MOST_BYTES} bytes"),
    ],
    ids=["bytes", "deep", "nothing", "unknown", "large"],
)
def test_uploaded_plans_that_are_none(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "mine.json").write_bytes(content)
    with pytest.raises(PlanError) as refused:
        Site.read_plan(tmp_path / "mine.json")
    assert refused.value.line.startswith("plan file mine.json")
    assert told in refused.value.line


def test_an_uploaded_plan_is_read_and_can_be_run(site: Site, tmp_path: Path) -> None:
    plan = find_plan("block:2").model_copy(update={"name": "mine"})
    (tmp_path / "mine.json").write_text(plan.model_dump_json())
    uploaded = site.read_plan(tmp_path / "mine.json")
    assert uploaded == plan
    assert site.plan_names(BUNDLE, uploaded)[0] == "mine"
    last = [view for view in site.generate("visitor", BUNDLE, "mine", uploaded, **controls()) if "python" in view][-1]
    assert "Plan.model_validate_json" in last["python"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": None}, "prompt is a NoneType"),
        ({"prompt": ["a", "b"]}, "one picture at a time"),
        ({"prompt": "a" * 3000}, "the prompt has 3000 characters; the page takes 2000"),
        ({"steps": 0}, "steps"),
        ({"steps": MOST_STEPS + 1}, f"the page takes {MOST_STEPS} at most"),
        ({"size": "4096x4096"}, "this bundle's sizes are 64x64"),
        ({"scheduler": "eular"}, "did you mean euler?"),
        ({"scheduler": 3}, "scheduler is a int"),
        ({"seed": 1.5}, "seed is a float"),
        ({"strength": 9}, "strength = 9"),
        ({"guidance": "x"}, "guidance_scale is a str"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_had_is_one_line(site: Site, changes: dict[str, Any], told: str) -> None:
    last = ended(site, **changes)
    assert 'class="status wrong" role="alert"' in last
    assert told in last.replace("&#x27;", "'")


def test_what_a_visitor_writes_is_never_markup(site: Site) -> None:
    assert "<script>" not in ended(site, "<script>alert(1)</script>")
    cost, strip = site.describe(BUNDLE, "<script>", 20)
    assert "&lt;script&gt;" in cost
    assert strip == ""


def test_the_editors_picture_and_mask() -> None:
    background = Image.new("RGBA", (8, 6), (10, 20, 30, 255))
    layer = Image.new("RGBA", (8, 6))
    layer.paste((255, 255, 255, 255), (0, 0, 4, 6))
    layer.putpixel((7, 5), (255, 255, 255, 60))
    image, mask = image_and_mask({"background": background, "layers": [layer], "composite": None})
    assert image is not None
    assert mask is not None
    assert (image.mode, image.getpixel((0, 0))) == ("RGB", (10, 20, 30))
    assert np.array_equal(np.asarray(mask), np.tile([255] * 4 + [0] * 4, (6, 1)))
    empty = {"background": Image.new("RGBA", (8, 6)), "layers": [Image.new("RGBA", (8, 6))], "composite": None}
    assert image_and_mask(empty) == (None, None) == image_and_mask(None)
    assert image_and_mask({"background": background, "layers": []})[1] is None
    with pytest.raises(RequestError, match="open a picture first"):
        image_and_mask({"background": None, "layers": [layer]})


def test_the_strip_has_a_cell_for_every_unit_and_fills(site: Site) -> None:
    schedule = site.pipelines[BUNDLE].prepare(Asked(PROMPT, find_plan("deepcache:3"), steps=7).request(manifest(site))).schedule
    strip = Strip(schedule)
    svg = strip.svg(3, running=True)
    assert [svg.count(f'class="{name}"') for name in ("done", "now", "later")] == [3, 1, 3]
    drawn = svg[: svg.index("</defs>")]
    kinds = len({tuple(column) for column in strip.columns})
    assert drawn.count("<g ") == kinds < 7
    assert drawn.count("M0 ") == kinds * len(strip.units)
    assert "guidance" not in strip.units


def manifest(site: Site) -> Any:
    return site.pipelines[BUNDLE].manifest


def test_steps_that_are_decided_while_running_become_what_they_were(site: Site) -> None:
    pipeline = site.pipelines[BUNDLE]
    request = Asked(PROMPT, find_plan("adaptive:0.3"), steps=8).request(pipeline.manifest)
    strip = Strip(pipeline.prepare(request).schedule)
    assert "as decided" in strip.svg()
    made = pipeline.generate(request)
    for record in made.steps:
        strip.note(record)
    assert "as decided" not in strip.svg(8)
    inherits = [record.index for record in made.steps if record.kind == "inherit"]
    assert inherits
    assert [index for index, column in enumerate(strip.columns) if 1 in column] == inherits


def test_a_call_gives_its_steps_previews_and_picture(site: Site) -> None:
    pipeline = site.pipelines[BUNDLE]
    request = Asked(PROMPT, find_plan("full"), steps=5, seed=1).request(pipeline.manifest)
    items = list(run(site.service, BUNDLE, request, threading.Event(), every=2, apart=0))
    steps = [item for item in items if isinstance(item, StepDone)]
    assert [item.record.index for item in steps] == [0, 1, 2, 3, 4]
    assert [item.preview is not None for item in steps] == [False, True, False, True, False]
    assert steps[0].rate is None
    assert steps[-1].rate is not None
    made = items[-1]
    assert isinstance(made, Made)
    assert 0 < made.seconds < made.generation.seconds, "without the previews"
    assert made.generation.image == pipeline.generate(request).image, "which change nothing"


def test_calls_that_are_compared_are_the_quickest_of_several_if_they_are_short(site: Site) -> None:
    pipeline = site.pipelines[BUNDLE]
    plans = find_plan("deepcache:2"), find_plan("full")
    requests = tuple(Asked(PROMPT, plan, steps=2).request(pipeline.manifest) for plan in plans)
    one, other = (Made(pipeline.generate(request), 0.9) for request in requests)
    made = in_turns(site.service, BUNDLE, (requests[0], requests[1]), (one, other), threading.Event())
    assert [each.generation.plan for each in made] == list(plans)
    assert all(each.seconds < 0.9 for each in made)
    long = Made(one.generation, 100)
    assert in_turns(site.service, BUNDLE, (requests[0], requests[1]), (long, other), threading.Event()) == (long, other)


def test_a_call_stops_when_it_is_cancelled_or_nobody_looks_any_more(site: Site) -> None:
    pipeline = site.pipelines[BUNDLE]
    request = Asked(PROMPT, find_plan("full"), steps=100).request(pipeline.manifest)
    stop = threading.Event()
    items = run(site.service, BUNDLE, request, stop)
    next(items)
    stop.set()
    with pytest.raises(Cancelled):
        list(items)
    left = run(site.service, BUNDLE, request, threading.Event())
    next(left)
    left.close()  # type: ignore[attr-defined]
    wait_for(lambda: site.service.is_idle)  # after the step that ran


def test_a_call_is_cancelled_while_it_waits_too(site: Site) -> None:
    site.begin("visitor")
    site.calls.cancel("visitor")
    assert "cancelled" in ended(site)
    assert "done" in ended(site), "and the next is none the worse"


def test_calls_of_the_page_and_of_http_clients_wait_in_one_queue(gated: GatedPipeline) -> None:
    service = Service({BUNDLE: gated}, Limits(queue=1))
    site = Site(service)
    service.start()
    with ThreadPoolExecutor(1) as pool, gated.closed():
        first = service.submit(None, Request("a cross", steps=1))
        gated.wait_until_running()
        shown = pool.submit(list, made_by(site, "full", steps=2))
        wait_for(lambda: service.worker(None).waiting == 1)
        *_, refused = site.generate("another", BUNDLE, "full", None, **controls())
        assert "1 pictures are waiting, and no more can" in refused["status"]
        with pytest.raises(BusyError, match="1 pictures are waiting"):
            service.submit(None, Request("a ring", steps=1))
        gated.open()
        assert len(first.future.result(PATIENCE).images) == 1
        views = shown.result(PATIENCE)
    service.end()
    assert WAITING in views[0]["status"]
    assert "done" in views[-1]["status"]
    assert [request.prompts for request in gated.requests] == [("a cross",), (PROMPT,)]


def test_a_call_of_the_page_ends_when_its_time_is_over_or_the_service_stops(gated: GatedPipeline) -> None:
    service = Service({BUNDLE: gated}, Limits(seconds=0.2))
    service.start()
    with gated.closed():
        first = service.submit(None, Request("a cross", steps=1))
        gated.wait_until_running()
        assert "were not finished in the time" in ended(Site(service))
        service.end()
        assert first.future.exception(PATIENCE) is not None
    assert "this service is being stopped" in ended(Site(service))


def test_one_visitor_does_not_stop_another() -> None:
    calls = Calls()
    with calls.running("one") as one, calls.running("other") as other:
        calls.cancel("one")
        calls.cancel("nobody")
        assert (one.is_set(), other.is_set()) == (True, False)
        calls.begin("other")
        assert other.is_set(), "a second call takes the first one's place"
        calls.cancel("other")
    with calls.running("one") as again:
        assert not again.is_set()
        calls.forget("one")
        assert again.is_set()
    calls.begin("one")
    calls.forget("one")
    with calls.running("one") as last:
        assert not last.is_set()


def test_differences_are_made_visible() -> None:
    one, other = Image.new("RGB", (2, 1), (100, 100, 100)), Image.new("RGB", (2, 1), (100, 95, 0))
    assert difference(one, other).getpixel((0, 0)) == (0, 5 * GAIN, 255)
    assert difference(one, one).getextrema() == ((0, 0),) * 3


def test_the_figures_of_a_call_and_of_the_same_in_full(site: Site) -> None:
    pipeline = site.pipelines[BUNDLE]
    made, full = (
        Made(pipeline.generate(PROMPT, steps=4, plan=plan), seconds) for plan, seconds in (("deepcache:2", 0.5), ("full", 1.0))
    )
    alone, beside = figures(made, "42 %"), figures(made, "42 %", full)
    assert all(part in alone for part in ("0.50 s", "deepcache:2", "42 %"))
    assert all(part in beside for part in ("0.50 s", "1.00 s", "×", " dB", "PSNR"))
    assert "∞" in figures(made, "42 %", made)


def results(site: Site, plan: object, uploaded: Plan | None = None, **changes: Any) -> tuple[View, Image.Image, dict[str, bytes]]:
    """All that a call left on the page, its picture, and the files that it offers."""
    shown: View = {}
    files: dict[str, bytes] = {}
    for view in site.generate("visitor", BUNDLE, plan, uploaded, **controls(**changes)):
        shown |= view
        if view.get("files"):
            files = {path.name: path.read_bytes() for path in map(Path, view["files"])}
        if isinstance(view.get("picture"), Path):
            picture = Image.open(io.BytesIO(view["picture"].read_bytes()))
    return shown, picture, files


def check_texts(shown: View, picture: Image.Image, folder: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run what the page offers to copy in a folder with the bundles in it, and compare the pictures."""
    exec(compile(shown["python"], "copied", "exec"), {})
    assert Image.open(folder / "out.png") == picture
    (folder / "out.png").unlink()
    text = shown["command"]
    if text.startswith("cat > plan.json <<'END'\n"):
        plan, _, text = text.partition("\n")[2].partition("\nEND\n")
        (folder / "plan.json").write_text(plan)
    words = shlex.split(text)
    assert words[:3] == ["python", "-m", "runtime"]
    assert command(runtime_main, capfd, monkeypatch)(*words[3:]).code == 0
    assert Image.open(folder / "out.png") == picture


@pytest.fixture
def elsewhere(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A visitor's folder, with the same bundle in it."""
    (tmp_path / "bundles").symlink_to(site.pipelines[BUNDLE].bundle.folder.parent)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_copied_texts_make_the_picture_again(
    site: Site, elsewhere: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = "-a 'red' star\n\"on\" \\ blue $HOME"
    shown, picture, files = results(site, "deepcache:2", prompt=odd, negative="-green", scheduler="EulerDiscreteScheduler")
    assert files == {}
    check_texts(shown, picture, elsewhere, capfd, monkeypatch)


def test_copied_texts_hold_the_visitors_plan_and_name_their_pictures(
    site: Site, elsewhere: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = find_plan("block:2").model_copy(update={"name": 'mine\'s \\ "own".json'})
    layer = Image.new("RGBA", (64, 64))
    layer.paste((255, 255, 255, 255), (0, 0, 30, 64))
    edited = {"background": Image.linear_gradient("L").resize((64, 64)).convert("RGBA"), "layers": [layer]}
    shown, picture, files = results(site, plan.name, plan, edited=edited, strength=0.8)
    assert set(files) == {"image.png", "mask.png"}
    for name, content in files.items():
        (elsewhere / name).write_bytes(content)
    check_texts(shown, picture, elsewhere, capfd, monkeypatch)
    assert np.array_equal(np.asarray(picture)[:, 30:], np.asarray(edited["background"].convert("RGB"))[:, 30:])  # type: ignore[attr-defined]


def test_texts_name_a_bundle_by_its_place_below_the_working_directory(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = site.pipelines[BUNDLE]
    made = pipeline.generate(PROMPT, steps=1)
    monkeypatch.chdir(pipeline.bundle.folder.parent)
    assert f"bundle='{BUNDLE}'" in as_python(made, pipeline)
    monkeypatch.chdir(pipeline.bundle.folder.parent.parent)
    assert f"--bundle {pipeline.bundle.folder.parent.name}/{BUNDLE} " in as_command(made, pipeline)


def test_the_full_picture_is_made_beside_it_unless_it_is_that(site: Site) -> None:
    views = list(made_by(site, compare=True))
    assert [name for name in ("full", "difference") if any(view.get(name) for view in views)] == ["full", "difference"]
    assert any("now in full" in view.get("status", "") for view in views)
    assert not any(view.get("full") for view in made_by(site, "full", compare=True))


def test_notes_say_what_was_not_read_and_what_a_plan_was_found_for(site: Site) -> None:
    found = Found(scheduler="ddim", steps=10, guidance_scale=3, prompts=4, cost=0.5, psnr=40, source="emoji")
    plan = find_plan("block:2").model_copy(update={"name": "mine", "found": found})
    shown, _, _ = results(site, "mine", plan)
    assert "done: seed 3; plan mine was found for 10 steps of ddim, on emoji, and this is 4 of dpm++, mini:" in shown["status"]
    shown, _, _ = results(site, "guide:2", guidance=1)
    assert "without guidance (a scale of 1 or less) there is only one: that part of the plan does nothing" in shown["status"]


def test_a_fault_is_unexpected_and_logged(site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken(*given: Any, **named: Any) -> Any:
        raise KeyError("secret")

    monkeypatch.setattr(site.pipelines[BUNDLE], "generate", broken)
    with caplog.at_level(logging.ERROR):
        assert UNEXPECTED in ended(site)
    assert "KeyError: 'secret'" in caplog.text


def test_messages_name_no_folder_of_the_server(site: Site) -> None:
    folder = site.pipelines[BUNDLE].bundle.folder
    last = ended(site, "unit:2")
    assert "wrong" in last
    assert str(folder.parent.parent) not in last
    assert BUNDLE in last


def test_a_page_needs_a_bundle_that_is_there(site: Site) -> None:
    with pytest.raises(ServingError, match="no bundle to serve"):
        make_page({})
    assert "there is no bundle" in site.describe("nonesuch", "full", 20)[0]
    assert f"page takes 1 to {MOST_STEPS}" in site.describe(BUNDLE, "full", 10**9)[0]
    assert 0 <= site.dice() < 2**32


class Doors:
    """The page as a program reaches it that is no browser: its events, by part and what is done to it."""

    def __init__(self, client: Any) -> None:
        self.client = client
        config = client.get("/config").json()
        names = {part["id"]: part["props"].get("elem_id") for part in config["components"]}
        self.events = {(names.get(part), event): each["id"] for each in config["dependencies"] for part, event in each["targets"]}

    def touch(self, part: str, event: str, *values: object, then: int = 0) -> Any:
        """What comes of touching a part; ``then``: of the event so many places behind that."""
        asked = {"fn_index": self.events[part, event] + then, "session_hash": "x", "data": values}
        return self.client.post("/gradio_api/run/predict", json=asked).json()

    def generate(self, *values: object) -> str:
        """What the page is sent while a picture is made."""
        asked = {"fn_index": self.events["generate", "click"] + 1, "session_hash": "y", "data": values}
        assert self.client.post("/gradio_api/queue/join", json=asked).status_code == 200
        return str(self.client.get("/gradio_api/queue/data", params={"session_hash": "y"}).text)

    def upload(self, name: str, content: bytes) -> dict[str, Any]:
        (path,) = self.client.post("/gradio_api/upload", files={"files": (name, content)}).json()
        return file_at(path)


def file_at(path: str | Path) -> dict[str, Any]:
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}}


@pytest.fixture
def doors(mini_bundle: Bundle, bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Doors]:
    """A page of two bundles whose engine computes nothing, in an application that has a route already."""
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    from serving.page import mount_page

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    app = FastAPI()
    app.get("/healthz")(lambda: "well")
    bundles = {"one": mini_bundle, "other": Bundle.open(bundle_copy)}
    with TestClient(mount_page(app, {name: Pipeline(each, make_engine("null")) for name, each in bundles.items()})) as client:
        yield Doors(client)


def test_no_file_of_the_server_can_be_had(doors: Doors, tmp_path: Path, mini_bundle: Bundle) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text(find_plan("block:2").model_dump_json())
    for path in (secret, ROOT / "models" / "sd15" / "model_index.json", mini_bundle.folder / "manifest.json", "/etc/hostname"):
        assert doors.client.get(f"/gradio_api/file={path}").status_code in {403, 404}
        assert doors.touch("upload", "upload", "one", file_at(path)) == {"error": None}, "a path that was not uploaded"
    fetched = doors.touch("upload", "upload", "one", file_at("http://203.0.113.7/plan.json"))
    assert fetched["error"] == "the page fetches no file by its address; upload it"
    assert str(mini_bundle.folder.parent) not in doors.client.get("/config").text


def test_no_picture_of_the_server_can_be_had(doors: Doors, tmp_path: Path) -> None:
    picture = tmp_path / "secret.png"
    Image.new("RGB", (64, 64)).save(picture)
    for file, had in ((file_at(picture), False), (doors.upload("mine.png", picture.read_bytes()), True)):
        asked = controls(edited={"background": file, "layers": [], "composite": None})
        told = doors.generate("one", "full", None, *(asked.get(name, ASKED.get(name)) for name in CONTROLS))
        assert ("image.png" in told) is had
        assert ("not uploaded" in told or '"success":false' in told) is not had


def test_the_pages_events_are_no_endpoints(doors: Doors) -> None:
    assert doors.client.get("/healthz").json() == "well"
    assert doors.client.get("/gradio_api/info").json() == {"named_endpoints": {}, "unnamed_endpoints": {}}
    assert doors.client.get("/monitoring").status_code in {403, 404}


def test_uploads_are_said_to_be_wrong_in_one_line_or_can_be_chosen(doors: Doors) -> None:
    wrong = doors.touch("upload", "upload", "one", doors.upload("bad.json", b"{}"))
    assert wrong["error"].startswith("plan file bad.json, name: it is missing")
    plan = find_plan("block:2").model_copy(update={"name": "mine"})
    _, choice = doors.touch("upload", "upload", "one", doors.upload("good.json", plan.model_dump_json().encode()))["data"]
    assert choice["value"] == "mine"
    assert choice["choices"][0] == ["mine", "mine"]


def test_a_call_that_gradio_refused_does_not_wait_for_ever(doors: Doors) -> None:
    waiting = doors.touch("generate", "click")["data"][0]
    assert "waiting for its turn" in waiting
    ended, generate, cancel = doors.touch("generate", "click", waiting, then=2)["data"]
    assert NOTHING_MADE in ended["value"]
    assert (generate["interactive"], cancel["interactive"]) == (True, False)
    assert "value" not in doors.touch("generate", "click", '<div class="status done">', then=2)["data"][0]


def test_another_bundle_brings_its_own_plans_and_sizes(doors: Doors) -> None:
    speed, plan, size, guidance, uploaded = doors.touch("bundle", "change", "other")["data"]
    assert speed["maximum"] >= speed["value"] > 0
    assert plan["value"] == "deepcache:3"
    assert (size["value"], guidance["value"], uploaded) == ("64x64", 3.0, None)
    assert doors.touch("speed", "input", "other", 0)["data"] == ["full"]
