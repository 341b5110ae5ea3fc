"""``python -m runtime``: a picture and what ran, or for a mistake one line of ours, exit code 2, and nothing written."""

from __future__ import annotations

import errno
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from shlex import quote
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from engines import Bundle
from runtime.command.output import progress
from tests.support.commands import Command, assert_refused

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "a red star on a blue background"

pytestmark = pytest.mark.usefixtures("here")


def test_a_prompt_gives_a_picture_and_says_what_ran(runtime: Command, mini_bundle: Bundle, here: Path) -> None:
    outcome = runtime(PROMPT, "--bundle", mini_bundle.folder, "--plan", "deepcache:2", "--steps", 3, "--seed", 4)
    assert outcome.code == 0
    assert outcome.err == []
    assert [path.name for path in here.iterdir()] == ["out.png"]
    with Image.open(here / "out.png") as image:
        assert (image.format, image.size) == ("PNG", (64, 64))
    text = "\n".join(outcome.out)
    assert outcome.out[0] == (
        f"bundle {mini_bundle.folder} (original UNet of mini, fp32, engine onnxruntime): plan deepcache:2, 3 steps of dpm++, "
        "seed 4"
    )
    rows = [line.split() for line in outcome.out if line.split()[:1] in (["key"], ["inherit"])]
    assert [row[:2] for row in rows] == [["key", "2"], ["inherit", "1"]]
    assert "3 steps" in text
    assert text.count("all 13") == 1
    assert "3 of 13: stem, up.3.layer.2, head" in text
    assert outcome.out[-1] == f"wrote out.png (64x64, bundle {mini_bundle.folder}, plan deepcache:2, seed 4)"


def test_a_file_of_prompts_is_another_command(runtime: Command) -> None:
    assert_refused(runtime("--prompts", "my prompts.txt"), "my prompts.txt cannot be read")


def test_every_step_is_listed_if_asked_for(runtime: Command, mini_bundle: Bundle) -> None:
    outcome = runtime(PROMPT, "--bundle", mini_bundle.folder, "--plan", "deepcache:2", "--steps", 3, "--every-step")
    text = "\n".join(outcome.out)
    assert text.count("inherit ") == 1
    assert text.count("all 13") == 2
    assert "stem, up.3.layer.2, head" in text


def test_two_plans_are_compared(runtime: Command, mini_bundle: Bundle, here: Path) -> None:
    given = [PROMPT, "--bundle", mini_bundle.folder, "--plan", "deepcache:2", "--steps", 4, "--compare", "full"]
    outcome = runtime(*given)
    assert (outcome.code, outcome.err) == (0, [])
    assert re.fullmatch(r"deepcache:2: \d+\.\d times as fast as full, \d+ dB", outcome.out[-1])
    assert sorted(path.name for path in here.iterdir()) == ["out-compared.png", "out.png"]
    with Image.open(here / "out-compared.png") as sheet, Image.open(here / "out.png") as made:
        assert sheet.width > 2 * 384 > 10 * made.width
    told = json.loads(runtime(*given, "--json").out[0])
    import runtime as package

    pictures = [package.generate(PROMPT, plan=plan, steps=4, bundle=mini_bundle.folder).image for plan in ("full", "deepcache:2")]
    levels = [np.asarray(each, float) for each in pictures]
    psnr = 10 * math.log10(255**2 / ((levels[0] - levels[1]) ** 2).mean())
    assert told["compared"]["psnr"] == [pytest.approx(psnr, abs=0.01)]
    assert told["compared"]["plan"] == "full"
    assert runtime(*given[:4], "full", *given[5:]).out[-1].endswith(" times as fast as full, the same picture")
    assert_refused(runtime(*given[:-1], "unit:3"), "plan unit:3 inherits", "--granularity block --plan unit:3")


def test_json_says_all_and_nothing_else(runtime: Command, mini_bundle: Bundle, here: Path) -> None:
    options = ["--bundle", mini_bundle.folder, "--steps", 3, "--plan", "deepcache:3"]
    (line,) = runtime(PROMPT, *options, "--seeds", "3,9", "--json").out
    told = json.loads(line)
    assert [(one["path"], one["seed"], one["steps"]) for one in told["pictures"]] == [("out-00.png", 3, 3), ("out-01.png", 9, 3)]
    assert {(one["prompt"], one["plan"], one["bundle"]) for one in told["pictures"]} == {
        (PROMPT, "deepcache:3", mini_bundle.manifest.key)
    }
    assert [(kind["kind"], kind["steps"]) for kind in told["kinds"]] == [("key", [0]), ("inherit", [1, 2])]
    assert (told["folder"], told["not_read"]) == (str(mini_bundle.folder), [])
    for number, seed in enumerate((3, 9)):
        alone = runtime(PROMPT, *options, "--seed", seed, "--quiet", "-o", "alone.png")
        assert (alone.code, alone.out, alone.err) == (0, [], [])
        with Image.open(here / "alone.png") as one, Image.open(here / f"out-0{number}.png") as other:
            difference = np.asarray(one, int) - np.asarray(other, int)
            assert np.abs(difference).max() <= 1  # rounded to 8 bits; rows of a batch are summed in another order
            assert other.info["seed"] == str(seed)
    assert json.loads(runtime(PROMPT, *options, "--seed", "random", "--json").out[0])["pictures"][0]["seed"] > 2


def test_a_bundle_that_was_never_distilled_is_warned_of(runtime: Command, bundle_copy: Path, here: Path) -> None:
    manifest = bundle_copy / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"distilled": False}))
    outcome = runtime(PROMPT, "--bundle", bundle_copy, "--steps", 1)
    assert outcome.code == 0
    assert len(outcome.err) == 1
    assert "was cut out of a larger one and never distilled, so its pictures suffer" in outcome.err[0]


def test_words_that_the_embedded_model_never_learned_are_warned_of(runtime: Command, mini_bundle: Bundle) -> None:
    outcome = runtime("a red lighthouse on a bleu background", "--bundle", mini_bundle.folder, "--steps", 1)
    assert outcome.code == 0
    assert outcome.err == [
        "warning: this model never learned the words 'lighthouse', 'bleu', and what it makes of them means nothing "
        "(docs/embedded-model.md has those that it knows); did you mean blue?"
    ]
    for known in ("a small red ring in the center on a black background", "a big moon in the middle", "a heart in the centre"):
        assert runtime(known, "--bundle", mini_bundle.folder, "--steps", 1).err == [], "some words are several tokens"


@pytest.mark.parametrize("word", ["plan", "explain", "help"])
def test_a_command_is_not_drawn(runtime: Command, here: Path, word: str) -> None:
    assert_refused(runtime(word), f"'{word}' as a prompt?")


def test_a_home_is_expanded(runtime: Command, mini_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(mini_bundle.folder.parent))
    assert runtime(PROMPT, "--bundle", f"~/{mini_bundle.folder.name}", "--steps", 1).code == 0


def test_an_interrupted_generation_promises_nothing(
    runtime: Command, mini_bundle: Bundle, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("runtime.pipeline.denoise", stop)
    outcome = runtime(PROMPT, "--bundle", mini_bundle.folder)
    assert (outcome.code, outcome.err) == (130, ["interrupted; nothing half-written was kept"])
    assert list(here.iterdir()) == []


def test_the_bar_counts_steps_and_their_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("runtime.command.output.time.monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=80)
    with progress(console, 20, "") as step:
        for index in range(12):
            step(SimpleNamespace(index=index), None)  # type: ignore[arg-type]
            now[0] += 0.2
        (live,) = console._live_stack
        with console.capture() as captured:
            console.print(live.get_renderable())
    assert "12/20 steps, 5.0 it/s" in captured.get()


def test_a_bundle_of_a_random_source_says_that_its_pictures_are_noise(runtime: Command, bundle_copy: Path, here: Path) -> None:
    manifest = bundle_copy / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"source": "random:sd15"}))
    outcome = runtime(PROMPT, "--bundle", bundle_copy, "--steps", 1)
    assert outcome.code == 0
    assert outcome.err == [f"warning: {bundle_copy} has random weights (random:sd15), so its pictures are noise"]
    with Image.open(here / "out.png") as image:
        assert image.info["source"] == "random:sd15"


def test_the_picture_is_that_of_generate(runtime: Command, mini_bundle: Bundle, here: Path) -> None:
    import runtime as package

    outcome = runtime(
        PROMPT, "--bundle", mini_bundle.folder, "--steps", 2, "--seed", 4, "--negative", "a ring", "--guidance", 3,
        "--scheduler", "euler", "--size", "64x128", "--images", 2, "-o", here / "star.png",
    )  # fmt: skip
    assert outcome.code == 0
    made = package.generate(
        PROMPT, "a ring", steps=2, seed=4, guidance_scale=3, scheduler="euler", height=64, width=128, num_images=2,
        bundle=mini_bundle.folder,
    )  # fmt: skip
    assert sorted(path.name for path in here.iterdir()) == ["star-00.png", "star-01.png"]
    for number in range(2):
        with Image.open(here / f"star-0{number}.png") as image:
            assert image.size == (128, 64)
            assert image.tobytes() == made.images[number].tobytes()


def test_plans_are_listed(runtime: Command) -> None:
    outcome = runtime("plans")
    text = "\n".join(outcome.out)
    assert outcome.code == 0
    for form in ("full", "block:N", "deepcache:N", "FILE.json"):
        assert form in text


def test_a_plan_of_ones_own(runtime: Command, mini_bundle: Bundle, here: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"name": "mine", "rules": [{"units": ["up.2"], "when": {"mode": "explicit", "steps": [0, 2]}}]}))
    outcome = runtime(PROMPT, "--bundle", mini_bundle.folder, "--plan", path, "--steps", 4, "--scheduler", "ddim")
    assert outcome.code == 0
    assert [line.split()[:2] for line in outcome.out if "up.2.sampler" in line] == [["inherit", "2"]]
    assert "plan mine" in outcome.out[-1]


def test_an_over_long_prompt_is_read_whole_or_cut_with_a_warning(runtime: Command, mini_bundle: Bundle, here: Path) -> None:
    given = (" ".join([PROMPT] * 9), "--bundle", mini_bundle.folder, "--steps", 1)
    assert runtime(*given).err == []
    outcome = runtime(*given, "--long-prompts", "cut")
    assert outcome.code == 0
    assert len(outcome.err) == 1
    assert outcome.err[0].startswith("warning: prompt cut to 32 tokens")
    assert (here / "out.png").is_file()


WRONG_OPTIONS: list[tuple[list[str], list[str]]] = [
    (["--plan", "nope:2"], ["unknown plan 'nope:2'; choose from: full, block:N, layer:N"]),
    (["--plan", "block"], ["plan 'block': block takes a number of steps, such as 3"]),
    (["--plan", "gone.json"], ["plan file gone.json cannot be read"]),
    (["--plan", "deepcash:3"], ["unknown plan 'deepcash:3'; did you mean deepcache:3? choose from: full"]),
    (["--plan", "Block"], ["unknown plan 'Block'; did you mean block:N? choose from"]),
    (["--compare", "ful"], ["unknown plan 'ful'; did you mean full?"]),
    (["--scheduler", "plms"], ["unknown scheduler 'plms'; did you mean lms? choose from: ddim, pndm, dpm++, euler, heun"]),
    (["--scheduler", "EulerDiscrete"], ["did you mean EulerDiscreteScheduler?"]),
    (["--seeds", "1..x"], ["--seeds 'x' is no seed; write 1,5,7 or 1..4"]),
    (["--seeds", "4..1"], ["--seeds '4..1': write the lower one first"]),
    (["--seeds", "1", "--seed", "2"], ["--seed and --seeds are both given"]),
    (["--seeds", "1", "--images", "2"], ["leave --images out"]),
    (["--strength", "5"], ["strength = 5.0; choose a number above 0 (the image as it is) and up to 1"]),
    (["--steps", "0"], ["steps = 0; choose from 1 to 500"]),
    (["--steps", "-3"], ["steps = -3"]),
    (["--steps", "many"], ["--steps", "many"]),
    (["--engine", "abacus"], ["unknown engine 'abacus'; choose from: onnxruntime"]),
    (["--engine", "torch"], ["has no torch engines", "python -m exporter build"]),
    (["--size", "65x64"], ["size 65x64: height and width must be multiples of 64 pixels"]),
    (["--size", "64x0"], ["size 64x0: height and width must be multiples of 64 pixels"]),
    (["--size", "0"], ["size 0x0"]),
    (["--size", ""], ["size '' is no picture size"]),
    (["--size", "large"], ["size 'large' is no picture size; write HEIGHTxWIDTH"]),
    (["--images", "0"], ["num_images = 0; ask for at least 1"]),
    (["--images", "-1"], ["num_images = -1"]),
    (["--seed", "99999999999999999999"], ["seed = "]),
    (["--seed", "-99999999999999999999"], ["seed = "]),
    (["--guidance", "much"], ["--guidance", "much"]),
    (["--guidance", "nan"], ["guidance_scale = nan"]),
    (["-o", "nowhere/out.png"], ["cannot write nowhere/out.png", "folder that exists"]),
    (["-o", "out.docx"], ["cannot write out.docx", ".png"]),
    (["--strength"], ["--strength", "--help"]),
    (["--size", "9" * 4400], ["size '999", "is no picture size; write HEIGHTxWIDTH"]),
    (["--size", "2147483648x64"], ["2147483648x64 take", " GiB; ask for fewer or smaller ones"]),
    (["--seed", "9" * 4400], ["--seed '999", "is no seed; write a whole number, or random"]),
    (["--seed", "0.5"], ["--seed", "0.5"]),
    (["--guidance", "1e999"], ["guidance_scale = inf"]),
    (["--images", "1000000000"], ["1000000000 image(s) of 64x64 take at least", "GiB of memory"]),
    (["--plan", "block:" + "9" * 4400], ["has 4406 characters; join fewer presets"]),
    (["--plan", "block:9999999"], ["block takes a number of steps, such as 3"]),
    (["--negative", "\udcff"], ["negative_prompt has a character that is no text, U+DCFF at position 0"]),
    (["-o", "/proc/x.png"], ["cannot write /proc/x.png", "in a folder that exists and can be written"]),
    (["-o", "a" * 300 + ".png"], ["aaa.png cannot be read or written", "File name too long"]),
    (["-o", "\udcff.png"], ["is no text in UTF-8"]),
    (["--plot", "/proc/x.png"], ["cannot write /proc/x.png"]),
    (["--plot", "nowhere/x.png"], ["cannot write nowhere/x.png"]),
    (["--image", "/proc/self/environ"], ["image /proc/self/environ cannot be read"]),
    (["--image", "/dev/zero"], ["image /dev/zero is not a file"]),
]


@pytest.mark.parametrize(("options", "parts"), WRONG_OPTIONS, ids=lambda words: ascii(" ".join(words))[:40])
def test_wrong_options(runtime: Command, mini_bundle: Bundle, here: Path, options: list[str], parts: list[str]) -> None:
    assert_refused(runtime(PROMPT, "--bundle", mini_bundle.folder, *options), *parts)
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("prompt", ["", "   ", "\n"])
def test_an_empty_prompt(runtime: Command, mini_bundle: Bundle, here: Path, prompt: str) -> None:
    assert_refused(runtime(prompt, "--bundle", mini_bundle.folder), "the prompt is empty; say what the picture shows")
    assert list(here.iterdir()) == []


def test_no_prompt_at_all(runtime: Command) -> None:
    assert_refused(runtime(), "no prompt; say what the picture shows, such as", "`plans`")


@pytest.mark.parametrize("option", ["--lora", "--vae"])
def test_what_is_built_into_a_bundle_is_not_given_here(runtime: Command, option: str) -> None:
    for given in ([option, "x.safetensors"], [f"{option}=x"], [option]):
        assert_refused(
            runtime(PROMPT, *given), f"{option}: it is built into a bundle: give {option} to build, and here the bundle"
        )


@pytest.mark.parametrize("prompt", [[], ["plans"], [PROMPT]], ids=str)
def test_a_plan_is_explained_with_or_without_a_prompt(
    runtime: Command, mini_bundle: Bundle, here: Path, prompt: list[str]
) -> None:
    given = ["--bundle", mini_bundle.folder, "--steps", 4, "--plan", "block:2", "--explain", "--plot", "plan.png"]
    outcome = runtime(*prompt, *given)
    assert outcome.code == 0
    text = "\n".join(outcome.out)
    assert "plan block:2" in text
    assert text.count("inherit ") == 2
    assert "predicted time" in text
    assert outcome.out[-1].startswith("rules.0: up.-2 inherited by output; key steps 0, 2;")
    assert [path.name for path in here.iterdir()] == ["plan.png"]


def test_a_plan_on_a_card_that_is_not_here(runtime: Command, mini_bundle: Bundle) -> None:
    """Nothing is loaded or run; a mistake in the card's name is one line."""
    given = ["--bundle", mini_bundle.folder, "--plan", "deepcache:3"]
    outcome = runtime(*given, "--explain", "--card", "rtx4090")
    assert outcome.code == 0
    assert "plan deepcache:3 on a rtx4090, at best" in outcome.out[0]
    assert sum(word in line.split() for line in outcome.out for word in ("key", "inherit")) == 2
    assert "a bound, not a promise" in outcome.out[-1]
    assert "has no tensorrt-rtx engines whose kernels could be counted" in outcome.out[-1]
    assert_refused(runtime(*given, "--explain", "--card", "rtx9090"), "unknown card 'rtx9090'", "rtx4090")
    assert_refused(runtime(*given, "--card", "rtx4090"), "--card rtx4090 goes with --explain")


def test_a_card_without_a_name(runtime: Command, mini_bundle: Bundle) -> None:
    given = ["--bundle", mini_bundle.folder, "--card", ""]
    assert_refused(runtime(*given, "--explain"), "unknown card ''; choose one of rtx2080ti")
    assert_refused(runtime(*given, PROMPT), "--card  goes with --explain")


def test_a_plan_from_a_picture_counts_the_encoder(runtime: Command, mini_bundle: Bundle, here: Path) -> None:
    Image.new("RGB", (64, 64)).save(here / "start.png")
    given = ["--bundle", mini_bundle.folder, "--explain", "--card", "rtx4090", "--json"]
    plain, started = (
        json.loads(runtime(*given, *more).out[0]) for more in ([], ["--image", here / "start.png", "--strength", 1])
    )
    assert started["unet_ms"] == plain["unet_ms"]
    assert started["text_and_vae_ms"] > plain["text_and_vae_ms"] > 0


def test_a_plan_is_explained_as_json(runtime: Command, mini_bundle: Bundle, here: Path) -> None:
    given = ["--bundle", mini_bundle.folder, "--steps", 4, "--plan", "block:2", "--json"]
    (line,) = runtime(*given, "--explain", "--plot", "plan.png").out
    told = json.loads(line)
    assert [step["kind"] for step in told["steps"]] == ["key", "inherit"] * 2
    assert told["steps"][0]["macs"] == 1 > told["steps"][1]["macs"] > 0
    assert (told["plan"], told["plot"], told["engine"]) == ("block:2", "plan.png", "onnxruntime")
    assert told["macs_of_full"][0] == told["macs_of_full"][1] < 1
    (line,) = runtime(*given, "--plot", "plan.png").out
    assert json.loads(line)["plot"] == "plan.png"
    (line,) = runtime(*given, "--explain", "--card", "rtx4090").out
    told = json.loads(line)
    assert {kind["kind"]: kind["steps"] for kind in told["kinds"]} == {"key": 2, "inherit": 2}
    assert told["card"]["name"] == "rtx4090"
    assert 0 < told["unet_ms"][0] < told["unet_ms_of_full"]
    assert_refused(runtime("plans", "--json"), "`plans` is a table and takes no --json")


@pytest.mark.parametrize("path", ["nowhere/plan.png", "plan.xyz", "plan"])
def test_a_plot_that_cannot_be_written(runtime: Command, here: Path, path: str) -> None:
    """Said before a bundle is looked for: there is none here."""
    expected = f"cannot write {path}: give the name of a .png file in a folder that exists"
    assert_refused(runtime("--plan", "block:2", "--plot", path), expected)
    assert list(here.iterdir()) == []


def test_a_plot_without_its_library_has_the_one_hint(
    runtime: Command, mini_bundle: Bundle, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None)
    outcome = runtime("--bundle", mini_bundle.folder, "--plan", "block:2", "--plot", "plan.png")
    assert_refused(outcome, "--plot needs matplotlib; install it, in this repository's folder, with: pip install", '".[plots]"')
    assert list(here.iterdir()) == []


EVERY_2 = {"mode": "uniform", "every": 2}
WRONG_PLANS: list[tuple[dict[str, Any], list[str]]] = [
    (
        {"name": "late", "rules": [{"units": ["up.2"], "when": {"mode": "explicit", "steps": [1, 2]}}]},
        ["plan late: rules.0.when leaves out step 0", "the first step of a rule is always a key step"],
    ),
    ({"name": "far", "rules": [{"units": ["up.9"], "when": EVERY_2}]}, ["plan far, UNet original: rules.0.units names 'up.9'"]),
    (
        {"name": "deep", "rules": [{"units": ["down.1.layer.0.resnet"], "when": EVERY_2}]},
        ["plan deep inherits down.1.layer.0.resnet", "in one segment (down.1)", "python -m exporter build", "--plan"],
    ),
    ({"name": "typo", "key_step": {"mode": "uniform", "every": 2}}, ["wrong.json, key_step: "]),
    (
        {"name": "gap", "unets": [{"unet": "assembled", "start": 0, "stop": 0.4}, {"unet": "original", "start": 0.5, "stop": 1}]},
        ["plan gap: unets.1 covers 0.5 to 1, expected a range that starts at 0.4"],
    ),
    (
        {
            "name": "overlap",
            "unets": [{"unet": "original", "start": 0, "stop": 0.6}, {"unet": "original", "start": 0.4, "stop": 1}],
        },
        ["plan overlap: unets.1 covers 0.4 to 1, expected a range that starts at 0.6", "without overlap or gap"],
    ),
    (
        {"name": "short", "unets": [{"unet": "original", "start": 0, "stop": 0.6}]},
        ["plan short: unets end at 0.6; the last range must end at 1"],
    ),
    (
        {"name": "sampler", "rules": [{"units": ["down.0.sampler"], "kind": "residual", "when": EVERY_2}]},
        [
            "rules.0.units names 'down.0.sampler' by residual, but",
            "no residual branch: its input and output differ",
            "kind output",
        ],
    ),
    (
        {"name": "below", "rules": [{"units": ["up.2"], "when": {"mode": "threshold", "above": -0.1}}]},
        ["wrong.json, rules.0.when.threshold.above: ", "greater than or equal to 0"],
    ),
    (
        {"name": "many", "rules": [{"units": ["up.2"], "when": {"mode": "explicit", "steps": [0, 30]}}]},
        ["plan many: rules.0.when.steps names step 30, but only 20 steps run: choose from 0 to 19"],
    ),
    (
        {"name": "backwards", "rules": [{"units": ["up.2"], "when": EVERY_2, "start": 0.9, "stop": 0.1}]},
        ["plan backwards: rules.0 starts at 0.9 and stops at 0.1; stop is a share of the steps above start"],
    ),
    (
        {"name": "never", "rules": [{"units": ["up.2"], "when": {"mode": "uniform", "every": 0}}]},
        ["wrong.json, rules.0.when.uniform.every: "],
    ),
]


@pytest.mark.parametrize(("plan", "parts"), WRONG_PLANS, ids=[plan["name"] for plan, _ in WRONG_PLANS])
def test_wrong_plans(runtime: Command, mini_bundle: Bundle, here: Path, tmp_path: Path, plan: Any, parts: list[str]) -> None:
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(plan))
    assert_refused(runtime(PROMPT, "--bundle", mini_bundle.folder, "--plan", path), *parts)
    assert list(here.iterdir()) == []


def test_a_switch_whose_features_do_not_match(
    runtime: Command, mini_bundle: Bundle, assembled_bundle: Bundle, here: Path, tmp_path: Path
) -> None:
    """The assembled UNet has a stage less, so its last up block but one is not the original's."""
    path = tmp_path / "carry.json"
    ranges = [{"unet": "assembled", "start": 0, "stop": 0.4}, {"unet": "original", "start": 0.4, "stop": 1}]
    rules = [{"units": ["up.-2"], "when": {"mode": "explicit", "steps": [0]}}]
    path.write_text(json.dumps({"name": "taken", "unets": ranges, "rules": rules, "carry": True}))
    outcome = runtime(PROMPT, "--bundle", mini_bundle.folder, "--plan", path)
    assert_refused(outcome, "plan taken: carry cannot take up.2.sampler from UNet assembled to original", "set carry to false")
    assert list(here.iterdir()) == []


def test_the_documented_carry_runs_on_the_embedded_bundles(
    runtime: Command, mini_bundle: Bundle, assembled_bundle: Bundle, tmp_path: Path
) -> None:
    blocks = (ROOT / "docs" / "plans.md").read_text("utf-8").split("```json\n")[1:]
    (example,) = (text for block in blocks if '"carry": true' in (text := block.partition("```")[0]))
    path = tmp_path / "carried.json"
    path.write_text(example)
    given = ["--plan", path, "--steps", 12, "--scheduler", "ddim", "--every-step"]
    outcome = runtime(PROMPT, "--bundle", mini_bundle.folder, *given)
    assert outcome.code == 0
    rows = [line.split() for line in outcome.out if {"key", "inherit"}.intersection(line.split()[4:5])]
    assert [row[4] for row in rows] == ["key", "inherit", "inherit"] * 4, "the switch, at step 4, is no key step"
    assert [row[3] for row in rows] == ["assembled"] * 4 + ["original"] * 8
    whole = {bundle.manifest.variant: f"all {len(bundle.manifest.segments) - 3}" for bundle in (mini_bundle, assembled_bundle)}
    assert all(" ".join(row[5:7]) == whole[row[3]] for row in rows if row[4] == "key")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--strength", "0"], ["strength = 0.0; choose a number above 0"]),
        (["--strength", "1.01"], ["strength = 1.01; choose a number above 0", "up to 1"]),
        (["--mask", "wide.png"], ["mask and image are 64x128 and 64x64 (height x width); give a mask of the image's size"]),
    ],
    ids=" ".join,
)
def test_wrong_pictures(runtime: Command, mini_bundle: Bundle, here: Path, options: list[str], parts: list[str]) -> None:
    Image.new("RGB", (64, 64)).save(here / "in.png")
    Image.new("L", (128, 64)).save(here / "wide.png")
    assert_refused(runtime(PROMPT, "--bundle", mini_bundle.folder, "--image", "in.png", *options), *parts)
    assert sorted(path.name for path in here.iterdir()) == ["in.png", "wide.png"]


@pytest.mark.parametrize("name", ["deep", "block:2", "with a [/b] in it"])
def test_a_plan_file_that_a_bundle_cannot_run_is_named_as_a_file_to_build_with(
    runtime: Command, mini_bundle: Bundle, tmp_path: Path, name: str
) -> None:
    """What the plan inside the file is called does not matter."""
    path = tmp_path / "a deep one.json"
    path.write_text(json.dumps({"name": name, "rules": [{"units": ["down.1.layer.0.resnet"], "when": EVERY_2}]}))
    outcome = runtime(PROMPT, "--bundle", mini_bundle.folder, "--plan", path)
    assert_refused(outcome, f"plan {name} inherits")
    assert outcome.err[0].endswith(
        "build a bundle that is partitioned there too: python -m exporter build --variant original --source mini "
        f"--precision fp32 --engine onnxruntime --sizes 64x64 --batch 1..4 --force --out {mini_bundle.folder} "
        f"--granularity block --plan {quote(str(path))}"
    )


def test_the_names_in_a_plan_file_are_printed_as_they_are(runtime: Command, mini_bundle: Bundle, here: Path) -> None:
    rules = [{"units": ["[sdm]*"], "when": EVERY_2}]
    (here / "plan.json").write_text(json.dumps({"name": "[/a] and [bold]", "rules": rules}))
    options = ("--bundle", mini_bundle.folder, "--plan", "plan.json", "--steps", 2)
    made, explained = runtime(PROMPT, *options), runtime("--explain", *options)
    assert (made.code, explained.code) == (0, 0)
    assert any("plan [/a] and [bold], seed 0)" in line for line in made.out)
    assert any("plan [/a] and [bold]" in line for line in explained.out)


def test_plans_are_listed_all_or_explained(runtime: Command, here: Path) -> None:
    assert_refused(runtime("plans", "--plan", "nope:3"), "`plans` lists all of them, and takes no --plan nope:3")


def test_a_bundle_that_is_missing(runtime: Command, here: Path) -> None:
    assert_refused(runtime(PROMPT), "no bundle in ./bundles; build it with: python -m exporter build --source emoji")
    assert_refused(runtime(PROMPT, "--bundle", "nowhere"), "no bundle at nowhere", "--source CHECKPOINT", "--out nowhere")
    asked = runtime(PROMPT, "--bundle", "bundles/mini-bk-tiny", "--plan", "unit:3")
    assert_refused(asked, "--source mini --variant bk-tiny --granularity block --plan unit:3")
    assert list(here.iterdir()) == []


def test_a_bundle_of_another_version(runtime: Command, bundle_copy: Path, here: Path) -> None:
    path = bundle_copy / "manifest.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 0', 1))
    assert_refused(runtime(PROMPT, "--bundle", bundle_copy), "has manifest version 0, this program reads 1", "rebuild it with")
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    ["manifest.json", "segments/head.onnx", "segments/up.1.onnx.data", "tokenizer/vocab.json", "scheduler/scheduler_config.json"],
)
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_bundle(runtime: Command, bundle_copy: Path, here: Path, name: str, damage: str) -> None:
    path = bundle_copy / name
    data = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    outcome = runtime(PROMPT, "--bundle", bundle_copy)
    assert_refused(outcome, "python -m exporter build", name)
    assert list(here.iterdir()) == []


def test_a_full_disk_leaves_no_half_picture_and_keeps_the_old_one(
    runtime: Command, mini_bundle: Bundle, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = here / "out.png"
    out.write_bytes(b"an older picture")

    def refuse(self: Image.Image, target: Any, *args: Any, **kwargs: Any) -> None:
        Path(target).write_bytes(b"half a pict")
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr(Image.Image, "save", refuse)
    assert_refused(runtime(PROMPT, "--bundle", mini_bundle.folder, "--steps", 1), "the disk is full")
    assert [path.name for path in here.iterdir()] == ["out.png"]
    assert out.read_bytes() == b"an older picture"


def test_a_full_disk_keeps_the_old_plot(
    runtime: Command, mini_bundle: Bundle, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    plot = here / "plan.png"
    plot.write_bytes(b"an older picture")

    def refuse(self: Figure, target: Any, *args: Any, **kwargs: Any) -> None:
        Path(target).write_bytes(b"half a pict")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", refuse)
    outcome = runtime("--plan", "block:3", "--bundle", mini_bundle.folder, "--engine", "null", "--plot", plot)
    assert_refused(outcome, "the disk is full", "nothing half-written was kept")
    assert [path.name for path in here.iterdir()] == ["plan.png"]
    assert plot.read_bytes() == b"an older picture"


def test_a_place_where_nothing_can_be_written(runtime: Command, mini_bundle: Bundle, here: Path) -> None:
    (here / "folder.png").mkdir()
    outcome = runtime(PROMPT, "--bundle", mini_bundle.folder, "--steps", 1, "-o", here / "folder.png")
    assert_refused(outcome, "folder.png", "choose another path")
    assert [path.name for path in here.iterdir()] == ["folder.png"]


def in_a_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "runtime", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_the_command_as_a_command(mini_bundle: Bundle, here: Path) -> None:
    """Once in a process of its own: nothing that is imported prints, and the exit code reaches the shell."""
    given = [PROMPT, "--bundle", str(mini_bundle.folder), "--steps", "1", "-o", str(here / "out.png")]
    done = in_a_process(*given)
    assert done.returncode == 0
    assert done.stderr == ""
    assert (here / "out.png").is_file()
    refused = in_a_process(*given, "--steps", "0")
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert refused.stderr == "error: steps = 0; choose from 1 to 500\n"
