"""``python -m serving.prompts``: a picture for each line, the one that it would be alone, made once and never half."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engines import Bundle, make_engine
from engines.support.cli import interrupts_held
from runtime import Pipeline, Request
from runtime.__main__ import main as runtime_main
from serving.prompts import making
from serving.prompts.__main__ import main
from serving.prompts.lines import Asked
from serving.queueing.ticket import Made
from tests.support.commands import Command, assert_refused, command, contents
from tests.support.gated import PATIENCE

pytestmark = [pytest.mark.shared_pieces, pytest.mark.usefixtures("here")]
ROOT = Path(__file__).resolve().parents[3]
LINES: list[dict[str, Any]] = [
    {"prompt": "a red star on a blue background"},
    {"prompt": "a green ring", "num_inference_steps": 2, "plan": "deepcache:2", "seed": 7},
    {"prompt": "a yellow square", "num_images": 2},
    {"prompt": "a red cross", "negative_prompt": "a ring", "plan": {"name": "mine"}},
]


@pytest.fixture
def prompts(capfd: Any, monkeypatch: pytest.MonkeyPatch, mini_bundle: Bundle) -> Command:
    run = command(main, capfd, monkeypatch)
    return lambda *given: run(*given, "--bundle", mini_bundle.folder, "--steps", 1)


def write(folder: Path, lines: list[Any], name: str = "p.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def test_each_line_gets_the_picture_that_it_would_get_alone(prompts: Command, here: Path, mini_pipeline: Pipeline) -> None:
    outcome = prompts(write(here, LINES))
    assert (outcome.code, outcome.err) == (0, [])
    assert outcome.out[-1] == "4 made, 0 there already, 0 not made"
    assert names(here / "pictures") == [
        "00000001.png",
        "00000002.png",
        "00000003-00.png",
        "00000003-01.png",
        "00000004.png",
    ]
    alone = mini_pipeline.generate(Request("a green ring", steps=2, plan="deepcache:2", seed=7))
    with Image.open(here / "pictures/00000002.png") as made, Image.open(here / "pictures/00000003-01.png") as other:
        assert np.array_equal(np.asarray(made), np.asarray(alone.image)), "nothing of its kind is beside it"
        told = {name: value for name, value in made.info.items() if name != "request"}
        assert told == alone.metadata()
        assert (other.info["seed"], other.info["prompt"]) == ("3", "a yellow square")  # line 3 begins with seed 2


def test_a_batch_of_lines_is_the_same_call_of_generate_bit_for_bit(
    prompts: Command, here: Path, mini_pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(making, "_PATIENCE", 60.0)  # which the batch, being full, does not wait for
    shown = ["a red star on a blue background", "a green ring", "a yellow square"]
    lines = [{"prompt": text, "seed": 9 - number, "steps": 4, "plan": "deepcache:2"} for number, text in enumerate(shown)]
    assert prompts(write(here, lines), "--batch", 3).code == 0
    whole = mini_pipeline.generate(Request(shown, [""] * 3, seed=[9, 8, 7], steps=4, plan="deepcache:2"))
    for number, image in enumerate(whole.images, 1):
        with Image.open(here / f"pictures/{number:08}.png") as made:
            assert np.array_equal(np.asarray(made), np.asarray(image))


def test_runtime_hands_a_file_of_prompts_over_and_both_make_the_same_picture(
    capfd: Any, monkeypatch: pytest.MonkeyPatch, mini_bundle: Bundle, here: Path
) -> None:
    runtime = command(runtime_main, capfd, monkeypatch)
    (here / "p.txt").write_text("a green ring\n")
    given = ["--bundle", mini_bundle.folder, "--steps", 2, "--plan", "deepcache:2", "--seed", 7]
    assert runtime("--prompts", "p.txt", *given).out[-1] == "1 made, 0 there already, 0 not made"
    assert runtime("--prompts=p.txt", *given, "--out", "pictures").out[-1] == "0 made, 1 there already, 0 not made"
    assert runtime("a green ring", *given, "-o", "alone.png").code == 0
    with Image.open(here / "pictures/00000001.png") as made, Image.open(here / "alone.png") as alone:
        assert np.array_equal(np.asarray(made), np.asarray(alone))


@pytest.fixture
def interrupts() -> Iterator[None]:
    """As in a process of its own; pytest's workers take none."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_an_interrupt_ends_it_between_lines_and_leaves_no_thread(mini_bundle: Bundle) -> None:
    """Raised anywhere, it left locks held which the other thread waited for, and all hung."""
    lines = [Asked(number, Request("a ring", steps=1, seed=number), "") for number in range(100)]
    done: list[int] = []

    def interrupt(asked: Asked, made: Made) -> None:
        done.append(asked.number)
        if len(done) == 3:
            signal.raise_signal(signal.SIGINT)
        done.append(asked.number)

    with pytest.raises(KeyboardInterrupt):
        making.make(Pipeline(mini_bundle, make_engine("null")), lines, 1, interrupt, lambda number, error: None)
    assert done[0::2] == done[1::2], "what is done with a line is done whole"
    assert len(done) < len(lines)
    assert not [thread for thread in threading.enumerate() if thread.name == "pictures of prompts"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("interrupts")
def test_a_second_interrupt_is_raised_at_once() -> None:
    reached: list[int] = []

    def twice() -> None:
        with interrupts_held():
            signal.raise_signal(signal.SIGINT)
            reached.append(1)
            signal.raise_signal(signal.SIGINT)
            reached.append(2)

    with pytest.raises(KeyboardInterrupt):
        twice()
    assert reached == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_is_there_is_not_made_again_but_lines_that_changed_are(prompts: Command, here: Path) -> None:
    file = write(here, LINES[:2])
    assert prompts(file).code == 0
    before = contents(here / "pictures")
    assert prompts(file).out[-1] == "0 made, 2 there already, 0 not made"
    assert contents(here / "pictures") == before
    (here / "pictures/00000001.png").write_bytes(b"damaged")
    write(here, [LINES[0], {**LINES[1], "seed": 8}, "", LINES[3]])
    assert prompts(file).out[-1] == "3 made, 0 there already, 0 not made"
    assert names(here / "pictures") == ["00000001.png", "00000002.png", "00000004.png"]
    with Image.open(here / "pictures/00000002.png") as made:
        assert made.info["seed"] == "8"


def test_a_text_file_has_a_prompt_in_each_line(prompts: Command, here: Path) -> None:
    file = here / "p.txt"
    file.write_bytes(b"\xef\xbb\xbfa red star\r\n\n  a green ring  \n\xff\n")
    outcome = prompts(file, "--seed", 5, "-o", "out")
    assert (outcome.code, outcome.err) == (1, ["warning: line 4: the line is no text in UTF-8"])
    assert names(here / "out") == ["00000001.png", "00000003.png"]
    with Image.open(here / "out/00000001.png") as first, Image.open(here / "out/00000003.png") as second:
        assert (first.info["prompt"], second.info["prompt"], second.info["seed"]) == ("a red star", "a green ring", "7")


def test_prompts_of_other_encodings_and_line_ends_are_not_taken_for_others(prompts: Command, here: Path) -> None:
    (here / "p.txt").write_bytes("a ring\na star\n".encode("utf-16-le") + b"\na red star\ra ring\n")
    outcome = prompts("p.txt")
    assert outcome.code == 1
    assert [line.split()[2] for line in outcome.err] == ["1:", "2:", "3:", "4:"]
    assert all("the control character" in line for line in outcome.err)
    assert outcome.out[-1] == "0 made, 0 there already, 4 not made"
    assert names(here / "pictures") == []


BAD = [
    ("[1]", "is a JSON list"),
    ("{", "is no JSON"),
    ({"seed": 3}, "has no prompt"),
    ({"prompt": ["a", "b"]}, "has no prompt"),
    ({"prompt": "a ring", "plan": "blok:3"}, "blok"),
    ({"prompt": "a ring", "plan": 3}, "plan is a int"),
    ({"prompt": "a ring", "plan": {"name": "mine", "rules": 3}}, "rules"),
    ({"prompt": "a ring", "image": "none.png"}, "none.png cannot be read"),
    ({"prompt": "a ring", "image": 3}, "give the name of a file"),
    ({"prompt": "a ring", "image": "/dev/zero"}, "/dev/zero cannot be read (it is a folder, a pipe or a device"),
    ({"prompt": "a ring", "num_images": 10**9}, "num_images = 1000000000; a line makes 10000 at most"),
    ({"prompt": "a ring", "latents": [1]}, "generate takes no 'latents'"),
    ({"prompt": "a ring", "height": 63}, "height"),
    ({"prompt": "a ring", "steps": 0}, "steps"),
    ("[" * 100_000, "no JSON"),
]


def test_a_bad_line_is_told_by_its_number_and_the_rest_goes_on(prompts: Command, here: Path) -> None:
    outcome = prompts(write(here, [LINES[0], *(line for line, _ in BAD), LINES[3]]))
    assert outcome.code == 1
    assert outcome.out[-1] == f"2 made, 0 there already, {len(BAD)} not made"
    told = {int(line.split()[2].rstrip(":")): line for line in outcome.err}
    assert sorted(told) == list(range(2, len(BAD) + 2))
    for number, (_, part) in enumerate(BAD, 2):
        assert part in told[number]
    assert names(here / "pictures") == ["00000001.png", f"{len(BAD) + 2:08}.png"]


def test_a_bad_line_stops_all_if_asked_for(prompts: Command, here: Path) -> None:
    assert_refused(prompts(write(here, [LINES[0], "{", LINES[3]]), "--stop-at-error"), "line 2: the line is no JSON")
    assert not (here / "pictures/00000003.png").exists()


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (["none.txt"], ["none.txt cannot be read"]),
        (["empty.txt"], ["has no prompts"]),
        (["/dev/zero"], ["/dev/zero cannot be read (it is a folder, a pipe or a device"]),
        (["p.txt", "--plan", "blok:3"], ["blok"]),
        (["p.txt", "--size", "63"], ["63"]),
        (["p.txt", "--batch", "0"], ["--batch 0"]),
        (["p.txt", "-o", "a", "--shards", "b"], ["not allowed with"]),
        (["p.txt", "--gpus-per-worker", "1"], ["--workers N"]),
    ],
)
def test_mistakes_are_told_before_anything_is_written(prompts: Command, here: Path, given: list[str], parts: list[str]) -> None:
    (here / "empty.txt").write_text("\n \n")
    (here / "p.txt").write_text("a ring\n")
    assert_refused(prompts(*given), *parts)
    assert names(here) == ["empty.txt", "p.txt"]


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]


def test_shards_hold_pictures_prompts_and_what_they_were_made_from(prompts: Command, here: Path) -> None:
    given = [write(here, LINES), "--shards", "s", "--shard-size", 3]
    assert prompts(*given).code == 0
    assert names(here / "s") == ["shard-000000.tar", "shard-000001.tar", "shards.json"]
    first = members(here / "s/shard-000000.tar")
    keys = ["00000001", "00000002", "00000003-00", "00000003-01"]
    assert list(first) == [f"{key}.{kind}" for key in keys for kind in ("json", "png", "txt")]
    assert first["00000002.txt"] == b"a green ring"
    assert json.loads(first["00000002.json"])["plan"] == "deepcache:2"
    before = contents(here / "s")
    assert prompts(*given).out[-1] == "0 made, 4 there already, 0 not made"
    assert contents(here / "s") == before


def test_a_shard_is_written_anew_where_a_line_changed_and_only_that_line_is_made(prompts: Command, here: Path) -> None:
    file = write(here, [LINES[0], "{", LINES[1]])
    given = [file, "--shards", "s", "--shard-size", 2]
    assert prompts(*given).code == 1
    kept = members(here / "s/shard-000000.tar")
    assert [name for name in kept if name.endswith("png")] == ["00000001.png"]
    write(here, [LINES[0], LINES[3], LINES[1]])
    assert prompts(*given).out[-1] == "1 made, 2 there already, 0 not made"
    made = members(here / "s/shard-000000.tar")
    assert len(made) == 6
    assert {name: made[name] for name in kept} == kept
    write(here, ["{", LINES[3], LINES[1]])
    assert prompts(*given).out[-1] == "0 made, 2 there already, 1 not made"
    assert list(members(here / "s/shard-000000.tar")) == [name for name in made if name.startswith("00000002")]
    assert_refused(prompts(*given[:-1], 3), "has shards of 2 lines; give --shard-size 2")


def test_a_damaged_shard_is_made_anew_and_damaged_settings_are_told(prompts: Command, here: Path) -> None:
    given = [write(here, LINES[:2]), "--shards", "s"]
    prompts(*given)
    shard = here / "s/shard-000000.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:5000])
    assert prompts(*given).out[-1] == "2 made, 0 there already, 0 not made"
    assert shard.read_bytes() == whole
    (here / "s/shards.json").write_text("[]")
    assert_refused(prompts(*given), "shards.json is damaged")
    assert shard.read_bytes() == whole


def test_pictures_that_a_kill_kept_out_of_a_shard_come_into_it(prompts: Command, here: Path) -> None:
    file = write(here, [LINES[0], "{"])
    given = [file, "--shards", "s"]
    prompts(*given)
    write(here, [LINES[0], LINES[3]])
    assert prompts(file, "-o", "s/.shard-000000").code == 0  # as if it had been killed before the shard was written
    (here / "s/.shard-000000/00000001.png").unlink()
    assert prompts(*given).out[-1] == "0 made, 2 there already, 0 not made"
    assert [name for name in members(here / "s/shard-000000.tar") if name.endswith("png")] == ["00000001.png", "00000002.png"]
    assert not (here / "s/.shard-000000").exists()


def test_two_calls_do_not_write_into_one_folder(prompts: Command, here: Path) -> None:
    from filelock import FileLock

    (here / "pictures").mkdir()
    with FileLock(here / "pictures/.lock"):
        assert_refused(prompts(write(here, LINES)), "is being written to by another call")


@pytest.mark.parametrize("shards", [False, True])
def test_what_a_kill_leaves_is_whole_and_is_gone_on_with(
    prompts: Command, here: Path, mini_bundle: Bundle, shards: bool, request: pytest.FixtureRequest
) -> None:
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}  # started cold, by somebody who sets nothing
    if shards:
        request.getfixturevalue("warm_commands")
        environment = dict(os.environ)
    file, out = write(here, [{"prompt": "a red star", "steps": 6}] * 200), str(here / "o")
    where = ["--shards", out, "--shard-size", "1000"] if shards else ["-o", out]
    pictures = here / "o" / (".shard-000000" if shards else ".")
    given = [sys.executable, "-m", "serving.prompts", str(file), *where, "--bundle", str(mini_bundle.folder), "--batch", "2"]
    running = subprocess.Popen(given, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    try:
        until(lambda: len(list(pictures.glob("0*.png"))) >= 3, running)
    finally:
        running.kill()
        running.wait()
    left = sorted(pictures.glob("0*.png"))
    for path in left:
        with Image.open(path) as image:
            image.load()
    assert 3 <= len(left) < 200
    assert not list((here / "o").glob("*.tar"))
    write(here, [{"prompt": "a red star", "steps": 6}] * (len(left) + 1))
    outcome = prompts(file, *where)
    assert outcome.code == 0
    assert outcome.out[-1] in {f"{made} made, {len(left) + 1 - made} there already, 0 not made" for made in (1, 2, 3)}
    assert bool(list((here / "o").glob("*.tar"))) == shards


def until(condition: Callable[[], bool], running: subprocess.Popen[bytes]) -> None:
    limit = time.monotonic() + 4 * PATIENCE
    while not condition():
        assert running.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.02)
