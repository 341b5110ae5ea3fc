"""The emoji training, two steps of each stage at the smallest widths; what it leaves, and that it goes on when stopped."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from tests.support.emoji_sets import write_sets
from tuning.emoji import samples
from tuning.emoji import train as emoji_train
from tuning.emoji.diffusion import train_unet
from tuning.emoji.reader import READER, Reader, load_reader, right, save_reader
from tuning.emoji.reader_training import train_reader
from tuning.emoji.run import Rates, Run, due
from tuning.emoji.vae import train_decoder, train_vae
from tuning.emoji.views import VIEW, mixed, views
from tuning.errors import TuningError

pytest.importorskip("resvg_py")
WIDTHS = (8, 8, 16, 16)
PARTS = ("unet", "text_encoder", "vae", "tokenizer")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sets(tmp_path_factory.mktemp("sets"))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = {
        "vae": functools.partial(train_vae, widths=(8, 8, 8, 8), whitened_on=4),
        "decoder": train_decoder,
        "unet": functools.partial(train_unet, widths=WIDTHS, text_width=16, text_layers=1),
        "reader": functools.partial(train_reader, widths=(32, 32), settling=1),
    }
    monkeypatch.setattr(emoji_train, "_STAGES", stages)
    monkeypatch.setattr(samples, "draw_pairs", functools.partial(samples.draw_pairs, steps=2))  # of grids that are only counted


def train(sets: Path, out: Path, *stages: str, steps: int = 2, **options: Any) -> None:
    more = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    fixed = ["--icons", str(sets), "--out", str(out), "--batch", "4", "--versions", "1", "--steps", str(steps)]
    emoji_train.main([*stages, *fixed, *more])


def weights(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for part in PARTS for path in sorted((folder / part).rglob("*.*"))}


@pytest.mark.slow
def test_every_stage_leaves_a_pipeline_logs_and_grids(sets: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    train(sets, out, "vae", "decoder", "unet", "reader")
    pipeline = StableDiffusionPipeline.from_pretrained(out, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("red apple, noto style", num_inference_steps=2, guidance_scale=3.0).images[0]
    assert picture.size == (128, 128)
    for stage in ("vae", "decoder", "unet", "reader"):
        lines = [json.loads(line) for line in (out / "training" / f"{stage}.jsonl").read_text().splitlines()]
        assert lines[0]["pairs"] == 20
        assert lines[0]["held_back"] == 5
        assert json.loads((out / "training" / f"{stage}.settings.json").read_text())["steps"] == 2
    assert {path.name for path in (out / "training").glob("*.png")} == {
        *("vae.png", "seen-half.png", "seen-end.png", "held-half.png", "held-end.png")
    }
    reader, concepts, styles = load_reader(out / READER)
    assert (len(concepts), len(styles)) == (5, 5)
    assert reader(torch.zeros(2, 3, 128, 128))[0].shape == (2, 5)

    again = tmp_path / "again"
    before = weights(out)
    train(sets, again, "unet", start=out)
    assert weights(again)["vae/diffusion_pytorch_model.safetensors"] == before["vae/diffusion_pytorch_model.safetensors"]
    assert weights(again)["tokenizer/vocab.json"] == before["tokenizer/vocab.json"]
    begun = [line for line in (again / "training" / "unet.jsonl").read_text().splitlines() if "begins_from" in line]
    assert len(begun) == 2


class Counted(nn.Module):
    """One number that is drawn to 1."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(3))

    def loss(self) -> torch.Tensor:
        return (self.value - 1).square().sum()


def run_to(module: Counted, checkpoint: Path, steps: int, stop_at: int | None = None) -> Run:
    run = Run(module, Rates(0.1, warmup=2), checkpoint, seconds=1e9, steps=steps)
    for _ in run.steps():
        run.update(module.loss())
        if run.step + 1 == stop_at:
            run.step += 1
            run.save()
            break
    return run


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    whole, parts = Counted(), Counted()
    one = run_to(whole, tmp_path / "whole.pt", 10)
    run_to(parts, tmp_path / "parts.pt", 10, stop_at=4)
    resumed = Counted()
    two = run_to(resumed, tmp_path / "parts.pt", 10)
    assert one.step == two.step == 10
    assert torch.equal(whole.value, resumed.value)
    with one.averaged(), two.averaged():
        assert torch.equal(whole.value, resumed.value)
        assert float(whole.value.detach().mean()) > 0
    assert run_to(Counted(), tmp_path / "whole.pt", 10).step == 10


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"nothing")
    with pytest.raises(TuningError, match=r"a.pt is no checkpoint of this stage .* delete it"):
        run_to(Counted(), tmp_path / "a.pt", 2)


def test_marks_are_passed_once() -> None:
    done: set[float] = set()
    assert [due(p, (0.25, 0.5), done) for p in (0.1, 0.3, 0.4, 0.9, 1.0)] == [False, True, False, True, False]


def test_a_reader_is_read_as_it_was_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    reader = Reader(3, 2, (8, 16), 12).half().float().eval()
    save_reader(reader, ["a", "b", "c"], ["x", "y"], tmp_path)
    loaded, concepts, styles = load_reader(tmp_path)
    pictures = torch.randn(2, 3, 128, 128)
    with torch.no_grad():
        assert torch.equal(loaded(pictures)[0], reader(pictures)[0])
    assert (concepts, styles) == (["a", "b", "c"], ["x", "y"])
    assert loaded.features(pictures).shape == (2, 12)
    with pytest.raises(TuningError, match="holds no reader"):
        load_reader(tmp_path / "none")


def test_right_counts_the_highest_scores() -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    wanted = torch.tensor([1, 2])
    assert right(scores, wanted) == [False, True]
    assert right(scores, wanted, 2) == [True, True]


def test_views_keep_the_drawing_in_the_picture_and_mixing_says_what_it_mixed() -> None:
    torch.manual_seed(0)
    textures = torch.full((40, 4, 128, 128), 255, dtype=torch.uint8)
    textures[:, :3] = 0  # a black square that fills its box
    seen = views(textures)
    assert seen.shape == (40, 3, VIEW, VIEW)
    middle = seen[:, :, VIEW // 2 - 4 : VIEW // 2 + 4, VIEW // 2 - 4 : VIEW // 2 + 4].mean((1, 2, 3))
    assert float((middle < -0.4).float().mean()) > 0.7  # the rest are covered, or small and far from the middle
    pictures = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 4, 4)
    blend, other, share = mixed(pictures)
    assert 0.5 <= share <= 1
    assert torch.allclose(blend[:, 0, 0, 0], share * torch.arange(8.0) + (1 - share) * other)


@pytest.mark.parametrize(
    ("stages", "options", "message"),
    [
        (("unet",), {}, "vae is missing: run the stage vae first"),
        (("decoder",), {}, "vae is missing: run the stage vae first"),
        (("unet",), {"start": "nowhere"}, "nowhere is no model folder"),
        (("vae",), {"seconds": -1}, "--seconds -1.0 is not above 0"),
    ],
)
def test_mistakes_are_one_line(
    sets: Path, tmp_path: Path, stages: tuple[str, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(TuningError, match=message):
        train(sets, tmp_path / "out", *stages, **options)
