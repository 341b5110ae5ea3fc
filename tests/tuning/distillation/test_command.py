"""`python -m tuning distill`: resumed, killed, spoilt and misused; what it leaves is whole, and a mistake is one line."""

import copy
import dataclasses
import json
import math
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

import tuning
from engines.errors import UserError
from tests.support.commands import contents
from tuning.__main__ import main
from tuning.checkpoints.find_source import EMBEDDED
from tuning.checkpoints.folder import save_part
from tuning.distillation.examples import Passes
from tuning.mini.models import new_unet
from tuning.training.noising import Batch, Noising
from tuning.training.teacher import Teacher

ROOT = Path(__file__).resolve().parents[3]
WEIGHTS = "diffusion_pytorch_model.safetensors"


# Of a UNet of two stages, what `assembled` removes of one of four, but for a whole stage.
SMALL_RECIPE = tuning.Recipe(name="small", remove=("down.0.*.attention", "down.-1.layer.1", "up.0.layer.1"))


@pytest.fixture(scope="module")
def latents(small_model: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures as latents. Not to be changed."""
    folder = tmp_path_factory.mktemp("latents") / "latents"
    main(["latents", "--source", str(small_model), "--data", str(pictures), "--out", str(folder)])
    return folder


@pytest.fixture(scope="module")
def two_stages(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with a UNet of two stages, for what a run does with a UNet of any shape. Not to be changed."""
    folder = Path(shutil.copytree(small_model, tmp_path_factory.mktemp("two-stages") / "model"))
    torch.manual_seed(0)
    shutil.rmtree(folder / "unet")
    save_part(new_unet((8, 16), 16), folder / "unet")
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of runs with two stages."""
    path = tmp_path_factory.mktemp("recipe") / "small.json"
    path.write_text(SMALL_RECIPE.model_dump_json())
    return path


def shared_arguments(teacher: Path, student: Path | str, latents: Path) -> list[str]:
    arguments = f"distill --teacher {teacher} --student {student} --data {latents} --batch 2 --lr 1e-3 --warmup 2 --log-every 1"
    return [*arguments.split(), "--precision", "fp32", "--validate-minutes", "60"]


@pytest.fixture(scope="module")
def given(two_stages: Path, student: Path, latents: Path) -> list[str]:
    """Arguments that every run here shares but for the bound and the place."""
    return shared_arguments(two_stages, student, latents)


@pytest.fixture(scope="module")
def sd_given(small_model: Path, latents: Path) -> list[str]:
    """The same for a teacher in Stable Diffusion's shape, and a built-in recipe."""
    return shared_arguments(small_model, "assembled", latents)


@pytest.fixture(autouse=True, scope="module")
def read_once(small_model: Path, two_stages: Path) -> Iterator[None]:
    """The two teachers are read from their files once; each run has a copy of its own."""
    load: Callable[..., Teacher] = Teacher.load
    known: dict[str, Teacher] = {}

    def copied(source: str, *changes: Any, **named: Any) -> Teacher:
        if source not in {str(small_model), str(two_stages)} or any(changes) or any(named.values()):
            return load(source, *changes, **named)
        if source not in known:
            known[source] = load(source)
        teacher = known[source]
        unet, text, vae = copy.deepcopy((teacher.unet, teacher.text, teacher.vae))
        return dataclasses.replace(teacher, unet=unet, text=text, vae=vae)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Teacher, "load", copied)
        yield


def leave_pictures_out(patch: pytest.MonkeyPatch) -> None:
    """Curves and sample pictures take longer than the training of a short run."""
    patch.setattr("tuning.training.curves.draw_curves", lambda log, path: None)
    patch.setattr("tuning.distillation.command._Distill.pictures", lambda *_, **__: torch.zeros(1, 3, 8, 8))


@pytest.fixture
def pictured() -> None:
    """Asked for by tests that look at curves and sample pictures: others go without."""


@pytest.fixture(autouse=True)
def unpictured(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "pictured" not in request.fixturenames:
        leave_pictures_out(monkeypatch)


@pytest.fixture(scope="module")
def paused(given: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 9 steps that paused after the second. Not to be changed."""
    return unpictured_run(given, tmp_path_factory.mktemp("paused") / "run", "--steps 9 --pause-at 2")


@pytest.fixture
def paused_copy(paused: Path, tmp_path: Path) -> Path:
    """The same, to be resumed or damaged."""
    return Path(shutil.copytree(paused, tmp_path / "paused"))


@pytest.fixture(scope="module")
def whole(given: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps that nothing stopped. Not to be changed."""
    return unpictured_run(given, tmp_path_factory.mktemp("whole") / "run", "--steps 8")


def unpictured_run(given: list[str], out: Path, extra: str) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        leave_pictures_out(patch)
        distil(given, out, extra)
    return out


def distil(given: list[str], out: Path, extra: str) -> None:
    main([*given, "--out", str(out), *extra.split()])


def metrics(out: Path, stage: str = ".") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "training" / stage / "metrics.jsonl").read_text().splitlines()]


def same(one: Any, two: Any) -> bool:
    """Whether two states hold the same tensors and numbers, bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(same(a, b) for a, b in zip(one, two, strict=True))
    return bool(one == two)


def checkpoint(out: Path) -> dict[str, Any]:
    state = torch.load(out / "training" / "checkpoint.pt", weights_only=True)
    for clock in ("cpu", "wall"):
        del state["counters"][clock]
    return dict(state)


@pytest.mark.parametrize("more", ["", "--muon-lr 0.01 --accumulate 2 --gradient-checkpointing"])
@pytest.mark.slow
def test_eight_steps_are_four_and_four(given: list[str], whole: Path, more: str, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    if more:
        whole = tmp_path / "whole"
        distil(given, whole, f"--steps 8 {more}")
    distil(given, parts, f"--steps 8 --pause-at 4 {more}")
    assert not (parts / WEIGHTS).exists(), "a student that is not done is not written"
    assert checkpoint(parts)["counters"]["step"] == 4
    distil(given, parts, f"--steps 8 {more}")
    assert same(checkpoint(whole), checkpoint(parts))
    assert same(load_file(whole / WEIGHTS), load_file(parts / WEIGHTS))
    assert (whole / "config.json").read_bytes() == (parts / "config.json").read_bytes()
    lines = [{k: v for k, v in line.items() if "minutes" not in k} for line in metrics(whole)]
    assert lines == [{k: v for k, v in line.items() if "minutes" not in k} for line in metrics(parts)]
    assert [line["step"] for line in lines] == [0, *range(1, 9), 8]


@pytest.mark.slow
def test_the_average_and_not_the_last_weights_are_written(given: list[str], tmp_path: Path) -> None:
    distil(given, tmp_path, "--steps 6 --ema 0.9")
    state, written = checkpoint(tmp_path), load_file(tmp_path / WEIGHTS)
    assert same(written, state["average"])
    assert not same(written, state["module"])


@pytest.mark.slow
@pytest.mark.usefixtures("warm_commands")
def test_a_killed_run_goes_on_to_the_same_weights(given: list[str], tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [sys.executable, "-m", "tuning", *given, "--out", str(killed), "--steps", "20", "--save-minutes", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    log = killed / "training" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (log.exists() and len(log.read_text().splitlines()) > 5) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "config.json").exists()
    done = torch.load(killed / "training" / "checkpoint.pt", weights_only=True)["counters"]["step"]
    assert 2 < done < 20
    distil(given, killed, "--steps 20")
    distil(given, whole, "--steps 20")
    assert same(load_file(whole / WEIGHTS), load_file(killed / WEIGHTS))
    assert [line["step"] for line in metrics(killed)] == [0, *range(1, 21), 20], "steps that were lost are logged once"


# Writes half of its third checkpoint and is killed.
KILLED_IN_THE_MIDDLE = """
import io, os, signal, sys, torch
from tuning.__main__ import main
saved, save = [], torch.save
def half(state, path):
    saved.append(path)
    if len(saved) < 3:
        return save(state, path)
    buffer = io.BytesIO()
    save(state, buffer)
    with open(path, "wb") as file:
        file.write(buffer.getvalue()[: buffer.tell() // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = half
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.usefixtures("warm_commands")
def test_a_run_killed_while_it_writes_a_checkpoint_resumes_from_the_one_before(
    given: list[str], whole: Path, tmp_path: Path
) -> None:
    killed = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED_IN_THE_MIDDLE, *given, "--out", str(killed), "--steps", "8", "--save-minutes", "0"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False, timeout=300).returncode == -signal.SIGKILL
    left = list((killed / "training").glob(".checkpoint-*"))
    assert len(left) == 1
    done = checkpoint(killed)["counters"]["step"]
    assert left[0].stat().st_size < 0.6 * (killed / "training" / "checkpoint.pt").stat().st_size
    (killed / "training" / ".curves-0a1b2c3d.partial.png").touch()  # as a kill while curves are drawn leaves it
    (killed / "training" / "samples").mkdir(exist_ok=True)
    (killed / "training" / "samples" / ".step_000004-0a1b2c3d.partial.png").touch()
    distil(given, killed, "--steps 8")
    assert 0 < done < 8
    assert same(load_file(whole / WEIGHTS), load_file(killed / WEIGHTS))
    assert same(checkpoint(whole), checkpoint(killed))
    assert not list(killed.rglob("*.partial*")), "what was half-written goes when the run is resumed"


@pytest.mark.slow
def test_a_loss_that_is_not_finite_keeps_a_checkpoint_that_can_go_on(given: list[str], tmp_path: Path) -> None:
    distil(given, tmp_path, "--steps 9 --pause-at 3")
    # In the middle of a run, where it pauses, where it ends, and where it is measured.
    for more in ("--save-minutes 0", "--pause-at 4", "--steps 4", "--validate-every 4"):
        with pytest.raises(UserError, match=r"loss of distill is not finite at step 4; the last checkpoint is kept"):
            distil(given, tmp_path, f"--steps 9 --lr 1e25 {more}")
        assert not (tmp_path / WEIGHTS).exists()
        assert checkpoint(tmp_path)["counters"]["step"] == 3, "what the bad step made is not saved"
    assert all(math.isfinite(value) for line in metrics(tmp_path) for value in line.values() if not isinstance(value, str))
    distil(given, tmp_path, "--steps 6")
    assert all(value.isfinite().all() for value in load_file(tmp_path / WEIGHTS).values())


def test_a_run_that_is_spoilt_by_its_first_step_leaves_no_student(given: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"validation loss of distill is not finite at step 1; no checkpoint was written yet"):
        distil(given, tmp_path, "--steps 1 --lr 1e30")
    assert not (tmp_path / WEIGHTS).exists()
    assert not list(tmp_path.rglob("checkpoint.pt"))
    assert [line["step"] for line in metrics(tmp_path)] == [0, 1]


@pytest.mark.slow
def test_distillation_lowers_the_loss_that_removal_left(sd_given: list[str], tmp_path: Path) -> None:
    distil(sd_given, tmp_path, "--student bk-tiny --steps 25 --ema 0.8 --lr 3e-3")
    before, after = [line["valid_loss"] for line in metrics(tmp_path) if "valid_loss" in line]
    assert after < 0.8 * before


@pytest.mark.slow
def test_a_finished_run_says_its_figures_once(given: list[str], tmp_path: Path) -> None:
    for _ in range(2):
        distil(given, tmp_path, "--steps 3 --log-every 2")
        lines = metrics(tmp_path)
        assert [line["step"] for line in lines] == [0, 2, 3, 3]
        assert [line["step"] for line in lines if "loss" in line] == [2, 3], "the last steps' losses are written too"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda state: state | {"optimizer": [1, 2]}, "checkpoint.pt is no checkpoint of this distill"),
        (lambda state: state | {"counters": state["counters"] | {"step": "2"}}, "counters that are not valid"),
        (lambda state: state | {"counters": state["counters"] | {"progress": "half"}}, "checkpoint.pt is no checkpoint"),
        (lambda state: state | {"counters": [1]}, "checkpoint.pt is no checkpoint"),
        (lambda state: [state], "checkpoint.pt is no checkpoint"),
    ],
    ids=["optimizer", "step", "progress", "counters", "list"],
)
@pytest.mark.slow
def test_a_checkpoint_of_other_things_is_one_line(
    given: list[str], spoil: Callable[[dict[str, Any]], Any], says: str, paused_copy: Path
) -> None:
    place = paused_copy / "training" / "checkpoint.pt"
    torch.save(spoil(torch.load(place, weights_only=True)), place)
    with pytest.raises(UserError, match=says) as caught:
        distil(given, paused_copy, "--steps 9")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.usefixtures("pictured")
def test_metrics_curves_and_sample_pictures_are_left(sd_given: list[str], tmp_path: Path) -> None:
    work, prompts = tmp_path / "work", tmp_path / "prompts.txt"
    prompts.write_text("a red star\n\na blue ring on white\n")
    distil(
        sd_given,
        tmp_path / "out",
        f"--steps 6 --validate-every 3 --sample-every 2 --prompts {prompts} --work {work} --log-every 2",
    )
    lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6]
    assert [line["step"] for line in lines if "valid_loss" in line] == [0, 3, 6]
    parts = lines[1]["noise"] + lines[1]["output"] + lines[1]["features"]
    assert lines[1]["loss"] == pytest.approx(parts, rel=1e-3)
    assert sorted(path.name for path in (work / "samples").iterdir()) == [f"step_00000{n}.png" for n in (2, 4, 6)]
    with Image.open(work / "samples" / "step_000006.png") as grid:
        assert grid.size == (128, 64), "a picture of 64 pixels for each prompt"
    with Image.open(work / "curves.png") as curves:
        assert min(curves.size) > 200
        assert len(curves.convert("RGB").getcolors(1 << 24) or ()) > 20, "something is drawn"
    settings = json.loads((work / "settings.json").read_text())
    assert (settings["student"], settings["steps"], settings["processes"]) == ("assembled", 6, 1)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", WEIGHTS]


@pytest.mark.slow
def test_rendered_data_is_measured_by_the_reader(small_model: Path, tmp_path: Path) -> None:
    arguments = f"distill --teacher {small_model} --student bk-tiny --data mini --pool 8 --batch 4 --validation 2 --steps 2"
    main([*arguments.split(), "--out", str(tmp_path / "student")])
    last = metrics(tmp_path / "student")[-1]
    assert 0 <= last["right_all"] <= 1
    assert last["valid_features"] > 0
    student = tuning.load_unet(tmp_path / "student")
    assert len(student.down_blocks) == 3
    weights = load_file(tmp_path / "student" / WEIGHTS)
    assert {value.dtype for value in weights.values()} == {torch.float16}


def in_two_processes(command: list[str]) -> None:
    """Start a command as torchrun starts it; tests/tuning/mini/test_training.py has torchrun itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    ranks = [os.environ | meeting | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    runs = [subprocess.Popen(command, cwd=ROOT, env=rank, stderr=subprocess.PIPE, text=True) for rank in ranks]
    said = [run.communicate(timeout=300)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said


@pytest.mark.slow
@pytest.mark.usefixtures("warm_commands")
def test_two_processes_do_what_one_does_with_twice_the_batch(given: list[str], tmp_path: Path) -> None:
    one, two, recipe = tmp_path / "one", tmp_path / "two", tmp_path / "recipe.json"
    # The loss of features is a share of what the teacher's features are in the process's own batch.
    loss = tuning.LossWeights(features=0)
    recipe.write_text(SMALL_RECIPE.model_copy(update={"loss": loss}).model_dump_json())
    (tmp_path / "prompts.txt").write_text("a red star\n")
    given = [*given, "--student", str(recipe), "--steps", "5", "--prompts", str(tmp_path / "prompts.txt")]
    in_two_processes([sys.executable, "-m", "tuning", *given, "--out", str(two)])
    main([*given, "--out", str(one), "--batch", "4"])
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert a["step"] == b["step"]
        for name in ("loss", "noise", "output"):
            if name in a:
                assert a[name] == pytest.approx(b[name], rel=2e-3)
    theirs, ours = load_file(one / WEIGHTS), load_file(two / WEIGHTS)
    # Adam moves a weight whose gradient is all but 0 by the learning rate either way: the mean tells, not the largest.
    error = sum(float((theirs[key] - ours[key]).abs().sum()) for key in theirs) / sum(v.numel() for v in theirs.values())
    assert error < 1e-5


@pytest.mark.slow
def test_a_recipe_in_portions_trains_after_each(sd_given: list[str], tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = "--student progressive --steps 8"
    distil(sd_given, whole, more)
    steps = {name: metrics(whole, name)[-1]["step"] for name in ("stage_1", "stage_2", ".")}
    assert list(steps.values()) == [2, 3, 3], "8 steps in all"
    stages = [tuning.load_unet(whole / "training" / name / "unet") for name in ("stage_1", "stage_2")]
    students = [*stages, tuning.load_unet(whole)]
    sizes = [sum(p.numel() for p in student.parameters()) for student in students]
    assert sizes == sorted(sizes, reverse=True)
    teacher = tuning.load_unet(Path(sd_given[sd_given.index("--teacher") + 1]) / "unet")
    at_once = tuning.assemble(teacher, tuning.recipe("assembled"))
    assert tuning.unit_modules(students[-1]) == tuning.unit_modules(at_once)
    distil(sd_given, parts, f"{more} --pause-at 1")
    with pytest.raises(UserError, match="holds a run with student progressive"):
        distil(sd_given, parts, "--steps 8")
    distil(sd_given, parts, f"{more} --pause-at 2")  # the length of the first stage: leaves in the second
    assert (parts / "training" / "stage_1" / "unet").exists()
    assert not (parts / WEIGHTS).exists()
    distil(sd_given, parts, more)
    assert same(load_file(whole / WEIGHTS), load_file(parts / WEIGHTS))


@pytest.mark.slow
def test_every_portion_draws_batches_of_its_own(sd_given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    draw, batch = Passes.draw, Noising.batch

    def noted(self: Noising, latents: torch.Tensor, tokens: torch.Tensor, step: int) -> Batch:
        drawn.append(step)
        return batch(self, latents, tokens, step)

    def checked(self: Passes, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        drawn.append(step)
        return draw(self, step)

    monkeypatch.setattr(Noising, "batch", noted)
    monkeypatch.setattr(Passes, "draw", checked)
    distil(sd_given, tmp_path, "--student progressive --steps 7 --accumulate 2")
    assert list(dict.fromkeys(drawn)) == list(range(14)), "as removal at once would draw them"
    assert max(Counter(drawn).values()) <= 4, "a portion's last batch is looked at twice, picture and noise"
    (tmp_path / "training" / "stage_1" / "checkpoint.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"stage_1/checkpoint\.pt is no checkpoint of a portion that is done"):
        distil(sd_given, tmp_path, "--student progressive --steps 7 --accumulate 2")


@pytest.mark.slow
def test_mixed_precision_comes_close(given: list[str], tmp_path: Path) -> None:
    full, mixed = tmp_path / "full", tmp_path / "mixed"
    distil(given, full, "--steps 4")
    AcceleratorState._reset_state(reset_partial_state=True)  # a process has one precision, which the runs before this one set
    try:
        distil(given, mixed, "--steps 4 --mixed bf16")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    for a, b in zip(metrics(full), metrics(mixed), strict=True):
        name = "loss" if "loss" in a else "valid_loss"
        assert a[name] == pytest.approx(b[name], rel=0.05)
    assert {value.dtype for value in load_file(mixed / WEIGHTS).values()} == {torch.float32}


@pytest.mark.slow
def test_mistakes_are_one_line(sd_given: list[str], small_model: Path, latents: Path, tmp_path: Path) -> None:
    unlike = {}
    for name, changes in {
        "narrow": {"cross_attention_dim": 8},
        "deep": {"in_channels": 9},
        "wide": {"norm_num_groups": 8},
    }.items():
        config = {k: v for k, v in new_unet((8, 8, 16, 16), 16).config.items() if k != "_use_default_values"} | changes
        if name == "wide":
            config["block_out_channels"] = (16, 16, 32, 32)
        unlike[name] = tmp_path / name
        save_part(type(new_unet((8, 8, 16, 16), 16)).from_config(config), unlike[name])
    pickled = Path(shutil.copytree(small_model, tmp_path / "pickled"))
    (pickled / "unet" / WEIGHTS).rename(pickled / "unet" / "diffusion_pytorch_model.bin")
    (tmp_path / "student.pt").write_bytes(b"")
    (tmp_path / "blank.txt").write_text("\n")
    for arguments, says in (
        ("--student smallest --steps 1", "there is no recipe 'smallest'"),
        (f"--student {unlike['narrow']} --steps 1", "differ in text width: 16 and 8"),
        (f"--student {unlike['deep']} --steps 1", "differ in latent channels in: 4 and 9"),
        (f"--student {unlike['wide']} --steps 1", "differ in block widths"),
        (f"--student {tmp_path / 'student.pt'} --steps 1", "is a file; give a recipe"),
        (f"--student {pickled / 'unet'} --steps 1", "a pickle, which can run code"),
        (f"--teacher {pickled} --steps 1", "is a pickle, which can run code"),
        ("--teacher nowhere --steps 1", "'nowhere'"),
        ("--data nowhere --steps 1", "nowhere: no such folder"),
        (f"--prompts {tmp_path / 'blank.txt'} --steps 1", "is empty; write a prompt"),
        ("", "needs a bound"),
        ("--steps 0", "got '0', expected a whole number of at least 1"),
        ("--steps 1 --lr nan", "got 'nan', expected a number"),
        ("--steps 1 --ema 2", "--ema 2.0 is no share"),
        ("--steps 1 --size 128", "leave --size out"),
        (f"--out {small_model / 'unet'} --steps 1", "is where the teacher is read from"),
    ):
        out = tmp_path / "out"
        with pytest.raises(UserError, match=says) as caught:
            main([*sd_given, "--out", str(out), *arguments.split()])
        assert "\n" not in str(caught.value)
        assert not out.exists(), arguments


@pytest.mark.parametrize("part", ["", "unet", "vae"])
def test_the_embedded_teacher_is_not_written_over(
    given: list[str], part: str, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EMBEDDED, "mini", shutil.copytree(small_model, tmp_path / "mini"))
    before = contents(tmp_path)
    with pytest.raises(UserError, match="is where the teacher is read from; choose another folder"):
        distil(given, tmp_path / "mini" / part, "--teacher mini --steps 1")
    assert contents(tmp_path) == before


@pytest.mark.slow
def test_a_pickle_in_the_checkpoints_place_is_never_run(given: list[str], paused_copy: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    place = paused_copy / "training" / "checkpoint.pt"
    for content in (pickle.dumps(Trap(), protocol=2), b"", b"no zip"):
        place.write_bytes(content)
        with pytest.raises(UserError, match=r"checkpoint\.pt is no checkpoint of this distill \(") as caught:
            distil(given, paused_copy, "--steps 9")
        assert "\n" not in str(caught.value)
    torch.save({"module": Trap()}, place)
    with pytest.raises(UserError, match="a pickle of more than tensors and numbers"):
        distil(given, paused_copy, "--steps 9")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.slow
def test_another_run_is_not_taken_for_this_one(given: list[str], student: Path, paused_copy: Path) -> None:
    with pytest.raises(UserError, match="holds a run with batch 2, and this one has 3"):
        distil(given, paused_copy, "--steps 9 --batch 3")
    with pytest.raises(UserError, match=f"holds a run with student {re.escape(str(student))}, and this one has original"):
        distil(given, paused_copy, "--steps 9 --student original")
    distil(given, paused_copy, "--steps 3 --lr 1e-4")


@pytest.mark.parametrize("name", ["settings.json", "metrics.jsonl"])
def test_files_of_a_run_that_goes_on_are_replaced_whole(
    given: list[str], name: str, paused_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, replace = paused_copy / "training" / name, os.replace
    before = file.read_bytes()

    def killed(source: Path, place: Path) -> None:
        if Path(place).name == name:
            raise KeyboardInterrupt
        replace(source, place)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        distil(given, paused_copy, "--steps 9 --pause-at 3")
    monkeypatch.undo()
    assert file.read_bytes() == before
    distil(given, paused_copy, "--steps 9 --pause-at 3")
    assert not list(paused_copy.rglob("*.partial*"))


@pytest.mark.parametrize("text", ['{"teacher": "m', "[]", "\xff"])
@pytest.mark.slow
def test_damaged_settings_are_one_line(given: list[str], text: str, paused_copy: Path) -> None:
    settings = paused_copy / "training" / "settings.json"
    settings.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"settings\.json is damaged \(.*delete it and give the same arguments") as caught:
        distil(given, paused_copy, "--steps 3")
    assert "\n" not in str(caught.value)
    settings.unlink()
    distil(given, paused_copy, "--steps 3")
    assert [line["step"] for line in metrics(paused_copy)] == [0, 1, 2, 3, 3]


@pytest.mark.parametrize("turned", [False, True])
def test_a_unets_folder_has_its_configuration_last(turned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed, replace, moved = Path.iterdir, os.replace, list[str]()

    def move(source: Path, place: Path) -> None:
        replace(source, place)
        moved.append(Path(place).name)

    monkeypatch.setattr(os, "replace", move)
    # A disk lists its files in whatever order it likes.
    monkeypatch.setattr(Path, "iterdir", lambda folder: iter(sorted(listed(folder), reverse=turned)))
    save_part(new_unet((8, 8, 16, 16), 16), tmp_path / "unet")
    assert moved == [WEIGHTS, "config.json"]


@pytest.mark.slow
def test_the_command_exits_with_two(given: list[str], tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "tuning",
        *given,
        "--steps",
        "1",
        "--out",
        str(tmp_path / "out"),
        "--data",
        str(tmp_path / "none"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"error: data {tmp_path / 'none'}: no such folder")
