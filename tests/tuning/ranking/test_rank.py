"""``python -m tuning rank``: every removal that fits is measured, and the cheapest for the time goes first."""

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from diffusers import UNet2DConditionModel
from rich.console import Console
from torch import nn

import tuning
from tests.support.commands import Command, assert_refused, command
from tests.support.sources import save_source
from tests.support.unets import small_unet as unet_of
from tuning import Recipe, TuningError
from tuning.__main__ import main
from tuning.checkpoints.find_source import open_unet
from tuning.checkpoints.folder import save_part
from tuning.ranking.candidates import Candidate, candidates, gone_units, recipe_of, skeleton
from tuning.ranking.command import RankOptions, Result, _asked, _device, rank_command
from tuning.ranking.rank import NOTHING, Chosen, Errors, check_names, choose, rank
from tuning.ranking.timing import UnitTimes, clock, random_inputs, time_together, time_units
from tuning.ranking.trajectories import Points, trajectories
from tuning.training.teacher import Teacher

QUICK = ("--rounds", "1", "--prompts", "2", "--steps", "2")


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.setenv("COLUMNS", "200")
    return command(main, capfd, monkeypatch)


@pytest.fixture
def two_stages() -> UNet2DConditionModel:
    return unet_of("two stages", layers_per_block=2)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint with the same UNet. Not to be changed."""
    return save_source(tmp_path_factory.mktemp("rank") / "source", unet_of("two stages", layers_per_block=2))


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a UNet alone, with a layer in each block. Not to be changed."""
    folder = tmp_path_factory.mktemp("rank") / "unet"
    unet_of("two stages").save_pretrained(folder)
    return folder


def points(unet: UNet2DConditionModel, count: int = 3) -> Points:
    latents, _, states = random_inputs(unet, 8, count, tokens=5)
    return Points(latents, torch.linspace(0, 999, count), states, True)


def times(unet: UNet2DConditionModel, **dear: float) -> UnitTimes:
    """Every unit takes a hundredth of the time, but those named (with _ for .)."""
    shares = {unit: dear.get(unit.replace(".", "_"), 0.01) for unit in tuning.unit_modules(unet)}
    return UnitTimes(shares, dict.fromkeys(shares, 0.001), 1.0, 0.0, 1)


def silence(unet: UNet2DConditionModel, unit: str) -> None:
    """Makes an attention add nothing."""
    for weights in unet.get_submodule(tuning.unit_modules(unet)[unit]).proj_out.parameters():
        nn.init.zeros_(weights)


def test_candidates_are_what_assembly_accepts(two_stages: UNet2DConditionModel) -> None:
    found = {candidate.name: candidate for candidate in candidates(two_stages)}
    attentions = [unit for unit in tuning.unit_modules(two_stages) if unit.endswith(".attention")]
    pairs = [f"down.0.layer.{i} + up.1.layer.{j}" for i in range(2) for j in (1, 2)]
    # The innermost stage is wider, so nothing else takes what it made: it stays, and so does the first layer on its way down.
    pairs += [f"down.1.layer.1 + up.0.layer.{j}" for j in range(2)]
    assert set(found) == {"mid", *attentions, *pairs}
    assert found["down.0.layer.1 + up.1.layer.1"].units == {
        "down.0.layer.1.resnet", "down.0.layer.1.attention", "up.1.layer.1.resnet", "up.1.layer.1.attention",
    }  # fmt: skip
    for candidate in found.values():
        tuning.assemble(two_stages, recipe_of(candidate.remove))


def test_the_innermost_stage_takes_the_sampler_before_it_along(small_unet: UNet2DConditionModel) -> None:
    bare = skeleton(small_unet)
    assert next(bare.parameters()).is_meta
    gone = gone_units(bare, recipe_of(("down.3", "up.0")))
    assert {unit for unit in gone if unit.endswith(".sampler")} == {"down.2.sampler", "up.0.sampler"}
    assert len(gone) == 2 + 2 + 3


def test_a_recipe_names_each_thing_once() -> None:
    remove = ("up.1.layer.1", "down.0.layer.1.attention", "mid", "down.0.layer.1", "down.0.layer.0.attention", "mid")
    assert recipe_of(remove).remove == ("down.0.layer.0.attention", "down.0.layer.1", "mid", "up.1.layer.1")


def test_units_are_timed_within_the_whole(two_stages: UNet2DConditionModel) -> None:
    inputs = random_inputs(two_stages, 8, 1, tokens=5)
    ticks: list[None] = []
    found = time_units(two_stages, inputs, 3, lambda: ticks.append(None))
    assert len(ticks) == 4
    assert set(found.shares) == set(tuning.unit_modules(two_stages))
    assert all(share > 0 for share in found.shares.values())
    assert 0.3 < sum(found.shares.values()) <= 1
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in two_stages.modules()), "hooks are gone"
    slow = unet_of("two stages", layers_per_block=8)
    quick, slower = time_together([two_stages, slow], random_inputs(two_stages, 16, 1, tokens=5), 5)
    assert 0 < quick < slower


def test_errors_are_shares_of_the_predictions_mean_square(two_stages: UNet2DConditionModel) -> None:
    silence(two_stages, "down.0.layer.1.attention")
    given = points(two_stages)
    errors = Errors(two_stages, given)
    assert errors.of(Recipe(name="same")) == 0
    assert errors.of(recipe_of(("down.0.layer.1.attention",))) < 1e-10
    without = tuning.assemble(two_stages, recipe_of(("mid",)))
    with torch.no_grad():
        whole, less = (u(given.latents, given.timesteps, given.states).sample for u in (two_stages, without))
    assert errors.of(recipe_of(("mid",))) == pytest.approx(float((whole - less).square().sum() / whole.square().sum()), rel=1e-4)


def test_the_least_error_for_the_time_comes_first(two_stages: UNet2DConditionModel) -> None:
    silence(two_stages, "down.0.layer.0.attention")
    silence(two_stages, "down.0.layer.1.attention")
    found = [
        c for c in candidates(two_stages) if c.name.startswith("down.0") and c.name.endswith("attention") and "+" not in c.name
    ]
    assert len(found) == 2
    dear = times(two_stages, down_0_layer_1_attention=0.2)
    ranked = rank(found, Errors(two_stages, points(two_stages)), dear)
    assert [each.candidate.name for each in ranked] == ["down.0.layer.1.attention", "down.0.layer.0.attention"]
    assert [each.share for each in ranked] == [0.2, 0.01]
    assert ranked[0].price == NOTHING / 0.2


def test_choosing_goes_on_until_the_unet_is_fast_enough(two_stages: UNet2DConditionModel) -> None:
    for unit in ("down.0.layer.0.attention", "down.0.layer.1.attention"):
        silence(two_stages, unit)
    found, errors = candidates(two_stages), Errors(two_stages, points(two_stages))
    dear = times(two_stages, down_0_layer_0_attention=0.1, down_0_layer_1_attention=0.15)
    chosen = choose(two_stages, found, errors, dear, 1.3)
    assert [step.name for step in chosen] == ["down.0.layer.1.attention", "down.0.layer.0.attention"]
    assert [step.speedup for step in chosen] == [pytest.approx(1 / 0.85), pytest.approx(1 / 0.75)]
    assert chosen[-1].error < 1e-10


@pytest.mark.slow
def test_errors_are_measured_anew_after_each_removal(two_stages: UNet2DConditionModel) -> None:
    found, errors = candidates(two_stages), Errors(two_stages, points(two_stages))
    chosen = choose(two_stages, found, errors, times(two_stages), 1.1)
    assert len(chosen) > 2
    taken: tuple[str, ...] = ()
    for step in chosen:
        taken += step.remove
        assert step.error == pytest.approx(errors.of(recipe_of(taken)), rel=1e-3, abs=1e-9)
    recipe = recipe_of(taken)
    share = 0.01 * len(gone_units(skeleton(two_stages), recipe))
    assert chosen[-1].speedup == pytest.approx(1 / (1 - share))
    assert chosen[-1].speedup >= 1.1 > chosen[-2].speedup


def test_a_speed_up_out_of_reach(two_stages: UNet2DConditionModel) -> None:
    found, errors = candidates(two_stages)[:2], Errors(two_stages, points(two_stages))
    with pytest.raises(TuningError, match=r"speed-up 9: with all removals the UNet is only 1\.\d+ times as fast; ask for less"):
        choose(two_stages, found, errors, times(two_stages), 9)


def test_trajectories_end_where_pictures_do(two_stages: UNet2DConditionModel, source: Path) -> None:
    given = trajectories(open_unet(str(source)), two_stages, prompts=2, steps=3, guidance=2.0, side=8)
    assert given.has_text
    assert given.latents.shape == (6, 4, 8, 8)
    assert given.timesteps.tolist() == sorted(given.timesteps.tolist(), reverse=True)
    assert len(set(given.timesteps.tolist())) == 3
    assert given.states.shape == (6, 32, 16)
    assert torch.equal(given.states[:2], given.states[2:4])
    assert not torch.equal(given.states[0], given.states[1])
    again = trajectories(open_unet(str(source)), two_stages, prompts=2, steps=3, guidance=2.0, side=8)
    assert torch.allclose(again.latents, given.latents, atol=1e-5)


def test_a_gpu_is_waited_for_before_its_clock_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    card = torch.device("cuda")
    now = clock(card)
    assert 0 <= now() - now() + 1 <= 1
    assert waited == [card, card]
    assert clock(torch.device("cpu")) is clock() is time.process_time


def test_all_that_is_measured_is_where_the_unet_is(two_stages: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, which refuses what is elsewhere as a GPU does."""
    unet = two_stages.to("meta")
    inputs = random_inputs(unet, 8, 2, tokens=5)
    assert {each.device.type for each in inputs} == {"meta"}
    found = time_units(unet, inputs, 1)
    assert set(found.shares) == set(tuning.unit_modules(unet))
    with pytest.raises(TuningError, match="--device cuda: torch sees no NVIDIA GPU here; leave it out, or give cpu"):
        rank_command(RankOptions(device="cuda"), Console())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert _device(RankOptions()).type == "cuda"
    assert _device(RankOptions(device="cpu")).type == "cpu"


def test_a_gpu_that_is_too_small_is_one_line(run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr("tuning.ranking.command._measure", full)
    assert_refused(run("rank", "--out", tmp_path / "out"), "memory is too small for this: fewer --prompts, or --device cpu")


def test_what_was_asked_stands_beside_what_was_measured() -> None:
    ranked = [Chosen("x", ("down.1", "up.0"), 0.0, 1.41)]
    shares = UnitTimes({"mid.layer.0.resnet": 0.1}, {}, 1.0, 0.0, 1)

    def said(measured: float, *remove: str) -> str:
        result = SimpleNamespace(
            measured={"sd15": [measured, 1.0]}, chosen=ranked, recipe=Recipe(name="x", remove=remove), times=shares
        )
        return "\n".join(_asked(RankOptions(speedup=1.35), cast(Result, result)))

    short = said(1.32, "down.1", "up.0")
    assert "asked for 1.35x: the choice ended when the units' shares of the time said 1.41x; sd15, measured whole" in short
    assert "is 1.32x, 0.03 short of it\nwithout the innermost stage the mid block works on four times" in short
    assert said(1.4, "mid", "down.1", "up.0").endswith("measured whole, is 1.40x")


def test_without_the_innermost_stage_the_mid_block_works_on_more(small_unet: UNet2DConditionModel) -> None:
    def mid(unet: UNet2DConditionModel) -> int:
        sizes: list[int] = []
        hook = unet.mid_block.register_forward_pre_hook(lambda _, given: sizes.append(given[0][0, 0].numel()))
        with torch.no_grad():
            unet(*random_inputs(unet, 16, 1, tokens=5))
        hook.remove()
        return sizes[0]

    assert mid(tuning.assemble(small_unet, tuning.recipe("assembled"))) == 4 * mid(small_unet)


def test_a_checkpoint_whose_parts_do_not_fit(run: Command, tmp_path: Path) -> None:
    inpainting = save_source(tmp_path / "inpainting", unet_of("two stages", in_channels=9))
    other = save_source(tmp_path / "other", unet_of("two stages", cross_attention_dim=24))
    unlike = save_source(tmp_path / "unlike", latent_channels=8)
    for source, says in (
        (inpainting, "its UNet takes 9 channels and gives 4, and latents have 4; a UNet that reads more than latents"),
        (
            inpainting / "unet",
            "its UNet takes 9 channels and gives 4, and latents have 4; a UNet that reads more than latents",
        ),
        (other, "its UNet reads text of width 24 and its text encoder writes 16; take both from the same checkpoint"),
        (unlike, "its UNet takes 4 channels and gives 4, and latents have 8"),
    ):
        assert_refused(run("rank", "--source", source, "--out", tmp_path / "out", *QUICK), says)
        if source.name != "unet":
            with pytest.raises(TuningError, match=says):
                Teacher.load(str(source))


@pytest.mark.slow
def test_a_unet_with_experts_is_not_ranked(run: Command, small_unet: UNet2DConditionModel, tmp_path: Path) -> None:
    save_part(tuning.assemble(small_unet, tuning.recipe("condconv")), tmp_path / "experts")
    save_part(small_unet, tmp_path / "plain")
    for given in (["--source", "experts"], ["--source", "plain", "--times", "experts"]):
        given = [option if option[:2] == "--" else str(tmp_path / option) for option in given]
        says = f"{tmp_path / 'experts'} has conditional convolutions already; rank the UNet that it was made from"
        assert_refused(run("rank", *given, "--out", tmp_path / "out", *QUICK), says)
    with pytest.raises(TuningError, match="this UNet has conditional convolutions already"):
        candidates(tuning.load_unet(tmp_path / "experts"))


@pytest.mark.slow
def test_the_command(run: Command, two_stages: UNet2DConditionModel, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("rank", "--source", source, "--speedup", "1.05", "--out", out, *QUICK)
    assert (done.code, done.err) == (0, [])
    assert {path.name for path in out.iterdir()} == {"rank.json", "rank.png", "ranked.json"}
    recipe = tuning.recipe(str(out / "ranked.json"))
    assert recipe.name == "ranked"
    tuning.assemble(two_stages, recipe)
    record = json.loads((out / "rank.json").read_text())
    assert len(record["candidates"]) == len(candidates(two_stages))
    assert record["recipe"]["remove"] == list(recipe.remove)
    assert record["selection"][-1]["speedup"] >= 1.05
    assert record["text"] == "text encoder"
    assert record["threads"] == torch.get_num_threads()
    assert record["command"].startswith(f"python -m tuning rank --source {source} --speedup 1.05 --rounds 1 ")
    assert record["clock"] == "process_time", "tests run with one thread"
    assert record["device"] == "the CPU"
    assert (out / "rank.png").read_bytes().startswith(b"\x89PNG")
    text = "\n".join(done.out)
    for words in (
        "share of time",
        "(on the CPU)",
        "mid.layer.0.attention",
        "measured, torch on the CPU",
        "asked for 1.05x",
        "recipe ranked: remove ",
    ):
        assert words in text


@pytest.mark.slow
def test_a_source_that_is_only_a_unet_and_times_of_another(run: Command, one_layer: Path, tmp_path: Path) -> None:
    arguments = ("rank", "--source", one_layer, "--times", f"random:{one_layer / 'config.json'}", "--speedup", "1.02")
    done = run(*arguments, "--out", tmp_path / "out", *QUICK)
    assert done.code == 0
    assert any("has no text encoder: errors are for random text states" in line for line in done.out)
    assert json.loads((tmp_path / "out" / "rank.json").read_text())["text"] == "random states"
    unet_of("no mid").save_pretrained(tmp_path / "other")
    other = ("--times", tmp_path / "other", "--out", tmp_path / "none")
    assert_refused(run("rank", "--source", one_layer, *other, *QUICK), "which", "has: a UNet's times hold")
    assert not (tmp_path / "none").exists()


MISTAKES: list[tuple[list[str], str]] = [
    (["--speedup", "1"], "speed-up 1: must be more than 1"),
    (["--speedup", "nan"], "speed-up nan: must be more than 1"),
    (["--speedup", "inf"], "speed-up inf: must be more than 1"),
    (["--guidance", "nan"], "guidance nan: must be a number"),
    (["--speedup", "fast"], "invalid float value: 'fast'"),
    (["--speedup", "50"], "ask for less"),
    (["--rows", "0"], "rows 0: must be 1 or more"),
    (["--rounds", "0"], "rounds 0: must be 1 or more"),
    (["--latents", "9"], "latents 9: this UNet needs a multiple of 2"),
    (["--source", "nowhere"], "unknown source 'nowhere'"),
    (["--times", "random:sd9"], "random:sd9: no such configuration"),
]


@pytest.mark.parametrize(("options", "says"), MISTAKES, ids=lambda given: " ".join(given) if isinstance(given, list) else "")
@pytest.mark.slow
def test_mistakes(run: Command, one_layer: Path, tmp_path: Path, options: list[str], says: str) -> None:
    given = [] if "--source" in options else ["--source", one_layer]
    assert_refused(run("rank", *given, "--out", tmp_path / "out", *QUICK, *options), says)
    assert not (tmp_path / "out").exists()


def test_names_must_agree() -> None:
    found = [Candidate("mid", ("mid",), frozenset({"mid.layer.0.resnet"}))]
    with pytest.raises(TuningError, match="b has no mid.layer.0.resnet, which a has"):
        check_names(found, UnitTimes({}, {}, 1.0, 0.0, 1), "a", "b")
