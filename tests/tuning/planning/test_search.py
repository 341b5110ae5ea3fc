"""A small search on the embedded model: what it finds, that it is resumed, and that what it writes runs everywhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import runtime
from engines import Bundle
from runtime import Pipeline
from runtime.images.schedulers import make_scheduler
from runtime.plans.plan import Plan
from tests.support.commands import Command, assert_refused
from tuning.planning import command as planning
from tuning.planning.evaluation import Pictures, choose_prompts
from tuning.planning.gaps import Trajectories
from tuning.planning.report import bootstrap
from tuning.planning.space import Point, Space

STEPS = 6
QUICK = ("--steps", str(STEPS), "--tries", "4", "--count", "2")
OPTIONS: dict[str, Any] = {"steps": STEPS, "scheduler": "dpm++", "guidance_scale": 3.0, "height": None, "width": None}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a red star on a blue background\na green circle\n\na black ring\na green circle\n")
    return path


@pytest.fixture
def loaded(mini_pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    """What the command searches is loaded already: for tests of what it finds. Others load it."""
    monkeypatch.setattr("tuning.planning.command.Pipeline", lambda bundle, engine: mini_pipeline)
    return mini_pipeline


def test_prompts_of_a_file_are_shared_out(prompts: Path) -> None:
    assert choose_prompts("any", prompts, 2) == (["a red star on a blue background", "a green circle"], ["a black ring"])
    assert choose_prompts("any", prompts, 8)[1] == []


def test_the_embedded_model_has_prompts_of_its_own() -> None:
    used, others = choose_prompts("mini", None, 16)
    assert len(set(used)) == 16
    assert set(used).isdisjoint(others)
    assert len(others) == 48


@pytest.mark.parametrize("scheduler", ["dpm++", "euler a", "heun"])
def test_a_trajectory_is_gone_on_with_as_a_whole_call_would(mini_pipeline: Pipeline, scheduler: str) -> None:
    """From a step on, the same latents as of a call from the beginning, whatever the scheduler keeps and draws."""
    pictures = Pictures(mini_pipeline, ["a red star", "a green circle"], 2, {**OPTIONS, "scheduler": scheduler})
    timesteps = mini_pipeline.prepare(pictures.requests[0]).timesteps
    space, trajectories = Space(tuple(timesteps.tolist()), ("deepcache",), ("original",)), Trajectories(pictures)
    keys = tuple(step for step in range(space.steps) if step not in {3, 4})
    for point in (Point(keys, damping=0), Point(keys, damping=1), Point(keys, skips=(3, 4)), Point(keys, skips=(4,))):
        plan = space.plan(point)
        whole = pictures.error(plan)
        assert whole > 1e-8
        assert trajectories.error(plan, 1) == pytest.approx(whole, rel=1e-2)
    assert trajectories.error(runtime.find_plan("full"), 2) < 1e-8


def test_pictures_do_not_depend_on_how_many_are_made_at_a_time(mini_pipeline: Pipeline) -> None:
    prompts = ["a red star", "a green circle", "a black ring"]
    plan = runtime.find_plan("deepcache:2")
    together, apart = (Pictures(mini_pipeline, prompts, count, OPTIONS) for count in (3, 2))
    assert [len(request.prompt_embeds) for request in apart.requests if request.prompt_embeds is not None] == [2, 1]
    assert torch.allclose(together.reference, apart.reference, atol=1e-4)
    assert together.psnr(plan) == pytest.approx(apart.psnr(plan), abs=0.1)
    assert together.psnr(runtime.find_plan("full")) == pytest.approx(100)


def test_the_first_few_pictures_are_those_of_the_whole(mini_pipeline: Pipeline) -> None:
    whole = Pictures(mini_pipeline, ["a red star", "a green circle", "a black ring"], 2, OPTIONS)
    few = whole.some(1)
    assert torch.allclose(few.reference, whole.reference[:1], atol=1e-4)
    assert len(few.reference) == 1
    assert whole.some(3) is whole


def test_an_interval_of_a_mean_is_bootstrapped() -> None:
    values = [40.0, 42.0, 44.0, 46.0, 48.0, 50.0]
    low, high = bootstrap(values)
    # The mean's own standard error is that of the values, 3.42, over the root of their number; skew is none.
    assert low == pytest.approx(45 - 1.96 * 1.394, abs=0.4)
    assert high == pytest.approx(45 + 1.96 * 1.394, abs=0.4)
    assert bootstrap(values) == (low, high)
    assert bootstrap([45.0]) == (45.0, 45.0)


@pytest.mark.usefixtures("loaded")
def test_what_is_to_come_is_said_before_anything_is_made(
    tuning: Command, mini_bundle: Bundle, tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(self: Pictures, plan: Plan) -> torch.Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(Pictures, "latents", stopped)
    given = ("plan", "--budget", "0.6", "--prompts", prompts, "--out", tmp_path / "plan.json", *QUICK)
    done = tuning(*given, "--bundle", mini_bundle.folder)
    assert done.code == 130
    assert f"bundle {mini_bundle.folder}: 2 prompts to find plans with, 1 others to judge them by" in done.out[0]
    # Without --bundle, the one in ./bundles, as pictures are made.
    (tmp_path / "bundles").mkdir()
    (tmp_path / "bundles" / "mini-original").symlink_to(mini_bundle.folder)
    monkeypatch.chdir(tmp_path)
    assert "bundle bundles/mini-original: 2 prompts" in tuning(*given).out[0]
    (tmp_path / "bundles" / "mini-original").unlink()
    assert_refused(tuning(*given), "no bundle in ./bundles; build it with: python -m exporter build --source emoji")


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("aim", [("--budget", "0.6"), ("--front",)])
def test_the_time_said_beforehand_has_all_that_is_judged(
    tuning: Command, mini_bundle: Bundle, tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch, aim: tuple[str, ...]
) -> None:
    """The work of judging that is reckoned with, before a plan is found, and the steps of the UNet that it then takes."""
    pytest.importorskip("matplotlib")
    reckoned, taken, jobs = list[float](), list[float](), list[Any]()
    work, judged = planning._judging_work, Pictures._made

    def noted(job: Any, found: Any = ()) -> float:
        jobs.append(job)
        reckoned.append(work(job, found))
        return reckoned[-1]

    def counted(self: Pictures, plan: Plan, steps: int | None) -> Any:
        for made in judged(self, plan, steps):
            cost = sum(len(step.ran) > 0 and (1.0 if step.kind == "key" else 0.0) for step in made.steps)
            taken.append(cost * len(made.latents) / 2)  # of the two prompts that it was found with
            yield made

    monkeypatch.setattr(planning, "_judging_work", noted)
    monkeypatch.setattr(Pictures, "_made", counted)
    out = tmp_path / ("front" if "--front" in aim else "plan.json")
    given = ("plan", "--bundle", mini_bundle.folder, *aim, "--prompts", prompts, "--out", out, *QUICK, "--steps", "4")
    assert tuning(*given).code == 0
    assert len(reckoned) == 2  # before the search, and before the stage
    assert sum(taken) <= reckoned[0]
    assert reckoned[0] < 4 * sum(taken)


def latents_of(bundle: Bundle, plan: Path, prompt: str) -> torch.Tensor:
    return runtime.generate(prompt, steps=STEPS, plan=plan, bundle=bundle.folder, guidance_scale=1, output_type="latent").latents


def drop_in(bundle: Bundle, plan: Path, prompt: str) -> torch.Tensor:
    """The same latents from a loop of one's own, with the UNet that diffusers' pipelines take."""
    scheduler = make_scheduler("dpm++", bundle.folder / "scheduler", STEPS)
    unet = runtime.UNet(bundle.folder, plan=plan, scheduler=scheduler)
    text = unet.pipeline.encode([prompt])
    shape = (1, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        prediction = unet(scheduler.scale_model_input(latents, timestep), timestep, text, return_dict=False)[0]
        latents = scheduler.step(prediction, timestep, latents, return_dict=False)[0]
    return latents


def test_what_is_found_is_within_the_budget_and_runs_everywhere(
    tuning: Command, mini_bundle: Bundle, tmp_path: Path, prompts: Path
) -> None:
    out = tmp_path / "found" / "plan.json"
    done = tuning("plan", "--bundle", mini_bundle.folder, "--budget", "0.6", "--prompts", prompts, "--out", out, *QUICK)
    assert done.code == 0, done.err
    assert [path.name for path in out.parent.iterdir()] == ["plan.json"]
    runs = f"python -m runtime PROMPT --bundle {mini_bundle.folder} --plan {out} --scheduler dpm++ --steps {STEPS} runs it"
    assert runs in " ".join("\n".join([*done.out, *done.err]).split())
    plan = Plan.read(out)
    made = runtime.generate("a black ring", steps=STEPS, plan=out, bundle=mini_bundle.folder)
    kinds = [step.kind for step in made.steps]
    assert kinds[0] == "key"
    assert kinds.count("key") <= 4
    assert plan.found is not None
    assert (plan.found.steps, plan.found.prompts, plan.found.guidance_scale) == (STEPS, 1, mini_bundle.manifest.guidance_scale)
    assert plan.found.cost <= 0.6
    assert made.plan == plan
    assert torch.allclose(drop_in(mini_bundle, out, "a black ring"), latents_of(mini_bundle, out, "a black ring"), atol=1e-4)
    # Any other number of steps takes it as well.
    assert len(runtime.generate("a black ring", steps=9, plan=out, bundle=mini_bundle.folder).steps) == 9


def test_a_search_that_was_stopped_comes_to_the_same_plan(
    tuning: Command, mini_bundle: Bundle, tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def given(name: str) -> tuple[object, ...]:
        out = tmp_path / name / "plan.json"
        return ("plan", "--bundle", mini_bundle.folder, "--budget", "0.6", "--prompts", prompts, "--out", out, *QUICK)

    assert tuning(*given("whole")).code == 0
    calls = 0
    error = Pictures.error

    def stopping(self: Pictures, plan: Plan) -> float:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return error(self, plan)

    monkeypatch.setattr(Pictures, "error", stopping)
    stopped = tuning(*given("stopped"))
    assert stopped.code == 130
    assert "the same command resumes from what was finished" in stopped.err[0]
    state = tmp_path / "stopped" / "plan.search.json"
    assert sum(name.startswith("error") for name in json.loads(state.read_text())["values"]) == 3
    copy = tmp_path / "copy.json"
    shutil.copy(state, copy)
    assert_refused(tuning(*given("stopped"), "--guidance-scale", "2"), "holds a search with guidance 3.0, and this one has 2.0")
    resumed = tuning(*given("stopped"))
    assert resumed.code == 0
    assert any("resumed with" in line for line in resumed.out)
    assert (tmp_path / "stopped" / "plan.json").read_text() == (tmp_path / "whole" / "plan.json").read_text()
    assert not state.exists()


@pytest.mark.usefixtures("loaded")
def test_what_no_plan_can_do(tuning: Command, mini_bundle: Bundle, tmp_path: Path, prompts: Path) -> None:
    given = ("plan", "--bundle", mini_bundle.folder, "--prompts", prompts, "--out", tmp_path / "plan.json", *QUICK)
    assert_refused(tuning(*given, "--budget", "0.01"), "no plan costs 0.01 or less; the cheapest costs 0.")
    assert_refused(
        tuning(*given, "--psnr", "99.5"), "no plan reaches 99.5 dB but full itself; the best found has", "ask for less"
    )
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("aim", [("--budget", "0.6"), ("--psnr", "40"), ("--front",)])
def test_two_evaluations_leave_nothing_to_save(
    tuning: Command, mini_bundle: Bundle, tmp_path: Path, prompts: Path, aim: tuple[str, ...]
) -> None:
    given = ("plan", "--bundle", mini_bundle.folder, "--prompts", prompts, "--steps", "2", "--scheduler", "ddim")
    out = tmp_path / ("front" if aim == ("--front",) else "plan.json")
    assert_refused(tuning(*given, *aim, "--out", out), "ddim evaluates the UNet 2 times", "give 3 or more")


@pytest.mark.usefixtures("loaded")
def test_the_budget_that_a_refusal_names_can_be_had(tuning: Command, mini_bundle: Bundle, tmp_path: Path, prompts: Path) -> None:
    given = ("plan", "--bundle", mini_bundle.folder, "--prompts", prompts, "--steps", "17", "--count", "1")
    refused = tuning(*given, "--budget", "0.1", "--out", tmp_path / "plan.json")
    assert_refused(refused, "the cheapest costs 0.177")  # 3 of 17 steps: 0.17647


def test_the_cheapest_plan_for_a_likeness(
    tuning: Command, mini_bundle: Bundle, loaded: Pipeline, tmp_path: Path, prompts: Path
) -> None:
    out = tmp_path / "plan.json"
    done = tuning("plan", "--bundle", mini_bundle.folder, "--psnr", "25", "--prompts", prompts, "--out", out, *QUICK)
    assert done.code == 0, done.err
    pictures = Pictures(loaded, ["a red star on a blue background", "a green circle"], 2, OPTIONS)
    assert pictures.psnr(Plan.read(out)) >= 25


@pytest.mark.usefixtures("loaded")
def test_a_front_is_plans_and_a_plot(tuning: Command, mini_bundle: Bundle, tmp_path: Path, prompts: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "front"
    done = tuning("plan", "--bundle", mini_bundle.folder, "--front", "--prompts", prompts, "--out", out, *QUICK, "--steps", "4")
    assert done.code == 0, done.err
    figures = json.loads((out / "front.json").read_text())
    assert {"found", "fewer steps", "deepcache", "back", "random", "quadratic", "adaptive"} <= set(figures)
    rows = [row for kind in figures.values() for row in kind]
    assert all(row["psnr_low"] <= row["psnr"] <= row["psnr_high"] for row in rows)
    assert all(0 < row["cost"] <= 1 for row in figures["adaptive"])
    (out / "front.png").unlink()
    again = tuning(
        "plan",
        "--bundle",
        mini_bundle.folder,
        "--front",
        "--prompts",
        prompts,
        "--out",
        out,
        *QUICK,
        "--steps",
        "4",
        "--judge-only",
    )
    assert again.code == 0, again.err
    assert json.loads((out / "front.json").read_text()) == figures
    assert (out / "front.png").exists()
    other = ("--steps", "5", "--judge-only")
    assert_refused(
        tuning("plan", "--bundle", mini_bundle.folder, "--front", "--prompts", prompts, "--out", out, *QUICK, *other),
        "was not found for 5 steps of dpm++; give what it was found for",
    )
    nothing = ("--out", tmp_path / "nothing", "--judge-only")
    assert_refused(
        tuning("plan", "--bundle", mini_bundle.folder, "--front", "--prompts", prompts, *QUICK, *nothing),
        "nothing has no found-*.json; leave it out to find plans, or name a front",
    )
    plans = sorted(path.name for path in out.glob("found-*.json"))
    assert plans == sorted(f"{row['name']}.json" for row in figures["found"])
    assert [row["cost"] for row in figures["found"]] == sorted(row["cost"] for row in figures["found"])
    assert (out / "front.png").stat().st_size > 10_000
    assert {path.name for path in tmp_path.iterdir()} == {"front", "prompts.txt"}
