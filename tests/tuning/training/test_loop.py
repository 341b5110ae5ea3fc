"""The loop: resuming repeats an unbroken run, bounds end it, bad losses stop it, and Muon works on kernels in place."""

import dataclasses
import errno
import io
import json
import multiprocessing
import random
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tuning import TuningError
from tuning.training.distributed import Workers
from tuning.training.loop import LoopSettings, run_loop
from tuning.training.noising import generator
from tuning.training.optim import MuonAdamW
from tuning.training.state import steps_in


class Line:
    """Fits a small network to a fixed map; the data of a step follows from its number."""

    name = "line"

    def __init__(self, spoil_at: int | None = None) -> None:
        torch.manual_seed(0)
        self.module: nn.Module = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 1, 1))
        self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.spoil_at, self.exports = spoil_at, 0

    def loss(self, step: int, progress: float) -> dict[str, Tensor]:
        x = torch.randn(8, 2, 6, 6, generator=generator(0, step))
        error = self.module(x) - (x[:, :1] - 0.5 * x[:, 1:])
        return {"loss": (error**2).mean() * (float("nan") if step == self.spoil_at else 1)}

    def validate(self) -> dict[str, float]:
        return {"weight": float(next(self.module.parameters()).detach().sum())}

    def export(self) -> None:
        self.exports += 1


SAVE = torch.save
SETTINGS = LoopSettings(steps=120, warmup=4, log_every=30, lr=3e-2, muon_lr=0.1, ema=0.9)


def weights(task: Line) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in task.module.state_dict().items()}


def test_training_lowers_the_loss_and_writes_a_log(tmp_path: Path) -> None:
    task, log = Line(), tmp_path / "line.jsonl"
    run_loop(task, SETTINGS, workers=Workers(), log=log)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert [line["step"] for line in lines] == [30, 60, 90, 120, 120]
    assert losses[-1] < 0.3 * losses[0]
    assert task.exports == 1
    assert lines[-1]["weight"] == pytest.approx(task.validate()["weight"], rel=1e-4)


def test_a_resumed_run_equals_an_unbroken_one(tmp_path: Path) -> None:
    whole, first, second = Line(), Line(), Line()
    checkpoint = tmp_path / "line.pt"
    run_loop(whole, SETTINGS, workers=Workers())
    run_loop(first, SETTINGS, workers=Workers(), checkpoint=checkpoint, stop_at=lambda step: step == 60)
    assert first.exports == 0
    run_loop(second, SETTINGS, workers=Workers(), checkpoint=checkpoint)
    expected = weights(whole)
    assert all(torch.equal(value, expected[key]) for key, value in weights(second).items())
    assert not all(torch.equal(value, expected[key]) for key, value in weights(first).items())


def save_slowly(state: object, path: Path) -> None:
    """torch.save, in a file that grows for a while."""
    written = io.BytesIO()
    SAVE(state, written)
    content = written.getvalue()
    with path.open("wb") as file:
        for start in range(0, len(content), len(content) // 4):
            file.write(content[start : start + len(content) // 4])
            file.flush()
            time.sleep(0.002)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this system")
def test_a_run_killed_at_random_points_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of the time goes into writing checkpoints, so most kills meet one that is half written."""
    fork, points = multiprocessing.get_context("fork"), random.Random(0)
    settings, checkpoint, log = dataclasses.replace(SETTINGS, save_minutes=0), tmp_path / "line.pt", tmp_path / "line.jsonl"
    whole, last, half, reached = Line(), Line(), 0, [0]
    run_loop(whole, SETTINGS, workers=Workers(), log=tmp_path / "whole.jsonl")
    with monkeypatch.context() as slow:
        slow.setattr(torch, "save", save_slowly)
        for _ in range(8):
            child = fork.Process(
                target=run_loop, args=(Line(), settings), kwargs={"workers": Workers(), "checkpoint": checkpoint, "log": log}
            )
            child.start()
            time.sleep(points.uniform(0.02, 0.2))
            child.kill()
            child.join()
            half += any(".partial" in path.name for path in tmp_path.iterdir())
            if checkpoint.exists():
                reached.append(steps_in(checkpoint))
    assert half
    assert reached == sorted(reached)
    run_loop(last, settings, workers=Workers(), checkpoint=checkpoint, log=log)
    expected = weights(whole)
    assert all(torch.equal(value, expected[key]) for key, value in weights(last).items())
    assert [path.name for path in tmp_path.glob(".line-*.pt")] == []
    steps = [[json.loads(line)["step"] for line in each.read_text().splitlines()] for each in (tmp_path / "whole.jsonl", log)]
    assert steps[0] == steps[1]


def test_time_bounds_end_a_run() -> None:
    task = Line()
    run_loop(task, dataclasses.replace(SETTINGS, steps=None, minutes=0.002), workers=Workers())
    assert task.exports == 1
    with pytest.raises(TuningError, match="bound"):
        run_loop(task, dataclasses.replace(SETTINGS, steps=None), workers=Workers())


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    checkpoint = tmp_path / "line.pt"
    run_loop(Line(), SETTINGS, workers=Workers(), checkpoint=checkpoint, stop_at=lambda step: step == 10)
    before = checkpoint.read_bytes()
    with pytest.raises(TuningError, match="step 15"):
        run_loop(Line(spoil_at=15), SETTINGS, workers=Workers(), checkpoint=checkpoint)
    assert checkpoint.read_bytes() == before


def test_figures_that_are_not_finite_stop_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, log, task = tmp_path / "line.pt", tmp_path / "line.jsonl", Line()
    run_loop(Line(), SETTINGS, workers=Workers(), checkpoint=checkpoint, stop_at=lambda step: step == 10)
    before = checkpoint.read_bytes()
    monkeypatch.setattr(task, "validate", lambda: {"valid_loss": float("nan")})
    for settings in (dataclasses.replace(SETTINGS, steps=12), dataclasses.replace(SETTINGS, validate_every=12)):
        with pytest.raises(
            TuningError, match="the validation loss of line is not finite at step 12; the last checkpoint is kept"
        ):
            run_loop(task, settings, workers=Workers(), checkpoint=checkpoint, log=log)
    assert checkpoint.read_bytes() == before
    assert task.exports == 0
    assert "NaN" not in log.read_text()
    with pytest.raises(TuningError, match="the loss of line is not finite before any training: check the weights it starts from"):
        run_loop(task, SETTINGS, workers=Workers(), measure_first=True)


def test_weights_that_the_last_update_spoilt_are_not_saved(tmp_path: Path) -> None:
    checkpoint = tmp_path / "line.pt"
    run_loop(Line(), SETTINGS, workers=Workers(), checkpoint=checkpoint, stop_at=lambda step: step == 10)
    before = checkpoint.read_bytes()
    wild = dataclasses.replace(SETTINGS, lr=1e30, muon_lr=1e30)
    with pytest.raises(TuningError, match="the loss of line is not finite at step 11; the last checkpoint is kept"):
        run_loop(Line(), wild, workers=Workers(), checkpoint=checkpoint, stop_at=lambda step: step == 11)
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize("name", ["line.pt", None])
def test_where_no_checkpoint_is_yet_none_is_promised(name: str | None, tmp_path: Path) -> None:
    checkpoint = tmp_path / name if name else None
    with pytest.raises(TuningError, match="not finite at step 2; no checkpoint was written yet: lower the learning rates"):
        run_loop(Line(spoil_at=2), SETTINGS, workers=Workers(), checkpoint=checkpoint)
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    checkpoint = tmp_path / "line.pt"
    for content in (b"no zip", b""):
        checkpoint.write_bytes(content)
        with pytest.raises(TuningError, match=r"line\.pt is no checkpoint.*delete it"):
            run_loop(Line(), SETTINGS, workers=Workers(), checkpoint=checkpoint)
    torch.save({"module": nn.Linear(2, 2).state_dict()}, checkpoint)
    with pytest.raises(TuningError, match="is no checkpoint"):
        run_loop(Line(), SETTINGS, workers=Workers(), checkpoint=checkpoint)


@pytest.mark.parametrize("line", ["{no JSON}", "[1, {}", '{"stage": "line"}'])
def test_a_damaged_log_is_named(line: str, tmp_path: Path) -> None:
    checkpoint, log = tmp_path / "line.pt", tmp_path / "line.jsonl"

    def go(stop: int) -> None:
        run_loop(Line(), SETTINGS, workers=Workers(), checkpoint=checkpoint, log=log, stop_at=lambda step: step == stop)

    go(40)
    whole = log.read_text()
    log.write_text(f"{line}\n{whole}")
    with pytest.raises(TuningError, match=r"line\.jsonl is damaged \(.*take the bad line out") as caught:
        go(70)
    assert "\n" not in str(caught.value)
    assert log.read_text() == f"{line}\n{whole}"
    log.write_text(f'{whole}{{"stage": "li')  # what a kill leaves is no damage
    go(70)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [30, 60]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 128 vs 0"), "the disk may be full"),
    ],
)
def test_a_full_disk_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, says: str
) -> None:
    checkpoint = tmp_path / "line.pt"

    def go(stop: int) -> None:
        run_loop(Line(), SETTINGS, workers=Workers(), checkpoint=checkpoint, stop_at=lambda step: step == stop)

    def fill(state: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(torch, "save", fill)
    with pytest.raises(TuningError, match=rf"line\.pt \({says}\): there is none yet; make room"):
        go(4)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(torch, "save", SAVE)
    go(4)
    before = checkpoint.read_bytes()
    monkeypatch.setattr(torch, "save", fill)
    with pytest.raises(TuningError, match=rf"line\.pt \({says}\): the last checkpoint is kept; make room"):
        go(8)
    assert checkpoint.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["line.pt"]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_muon_updates_kernels_in_place_whatever_their_layout(layout: torch.memory_format) -> None:
    updates = []
    for memory_format in (torch.contiguous_format, layout):
        torch.manual_seed(1)
        module = nn.Conv2d(4, 6, 3)
        module.to(memory_format=memory_format)  # type: ignore[call-overload]
        before = module.weight.detach().clone()
        optimizer = MuonAdamW(module, lr=0.1, muon_lr=0.1, weight_decay=0)
        module(torch.randn(2, 4, 5, 5)).square().mean().backward()
        optimizer.step(0.5, 1e9)
        updates.append(module.weight.detach() - before)
        assert module.weight.grad is None
    # Muon orthogonalises: every singular value of the update is near the learning rate.
    singular = torch.linalg.svdvals(updates[0].flatten(1)) / 0.05
    assert singular.min() > 0.5
    assert singular.max() < 1.5
    # bf16 inside Newton-Schulz sums columns in another order.
    assert torch.allclose(updates[0], updates[1], atol=2e-3)


def test_a_scaler_changes_no_update_and_waits_when_gradients_overflow() -> None:
    def updated(scale: float, spoil: bool = False) -> tuple[Tensor, float]:
        torch.manual_seed(1)
        module = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 1))
        optimizer = MuonAdamW(module, lr=0.1, muon_lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale) if scale else None
        loss = module(torch.ones(1, 2, 4, 4)).square().mean()
        (scaler.scale(loss) if scaler else loss).backward()
        if spoil:
            for parameter in optimizer.parameters:
                assert parameter.grad is not None
                parameter.grad.fill_(float("inf"))
        optimizer.step(1.0, 0.5, scaler)
        return torch.cat([p.detach().flatten() for p in module.parameters()]), scaler.get_scale() if scaler else 0

    plain, scaled = updated(0)[0], updated(1024.0)[0]
    assert torch.allclose(plain, scaled, atol=1e-3)
    before, scale = updated(1024.0, spoil=True)
    assert before.isfinite().all()
    assert scale == 512
    torch.manual_seed(1)
    untouched = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 1))
    assert torch.equal(before, torch.cat([p.detach().flatten() for p in untouched.parameters()]))
