"""Pictures, shards and latents are the same examples; what can't be read is named in one line."""

import io
import json
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from PIL import Image
from torch import Tensor

from tuning import TuningError
from tuning.distillation.examples import Passes, open_examples
from tuning.distillation.latents import LatentFolder, write_latents
from tuning.distillation.pictures import Pictures
from tuning.training.distributed import Workers
from tuning.training.teacher import Teacher

LIMITS: dict[str, Any] = {"size": None, "batch": 3, "validation": 4, "seed": 0}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` remembers goes with the test."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def teacher(small_model: Path) -> Teacher:
    return Teacher.load(str(small_model))


@pytest.fixture
def copy(pictures: Path, tmp_path: Path) -> Path:
    """A folder of pictures that a test may damage."""
    return Path(shutil.copytree(pictures, tmp_path / "copy"))


def pack(folder: Path, out: Path, shards: int) -> Path:
    """The pictures of a folder as webdataset shards."""
    out.mkdir()
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for shard in range(shards):
        with tarfile.open(out / f"{shard:03}.tar", "w") as tar:
            for line in lines[shard * len(lines) // shards : (shard + 1) * len(lines) // shards]:
                file = folder / line["file_name"]
                for name, data in ((file.name, file.read_bytes()), (f"{file.stem}.txt", line["text"].encode())):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    return out


def place(rank: int = 0, count: int = 1) -> Workers:
    return cast(Workers, SimpleNamespace(rank=rank, count=count))


def test_pictures_shards_and_latents_are_the_same_examples(pictures: Path, teacher: Teacher, tmp_path: Path) -> None:
    shards, workers = pack(pictures, tmp_path / "shards", 2), Workers()
    latents = tmp_path / "latents"
    source = Pictures(pictures)
    write_latents(source, teacher, latents, workers, data=str(pictures), size=64, batch=5, shard=10)
    assert len(list(latents.glob("*.safetensors"))) == 3
    expected, side = open_examples(str(pictures), teacher, workers, **LIMITS)
    assert side == 64
    for path, error in ((shards, 0.0), (latents, 2e-3)):  # latents are stored in float16
        examples, side = open_examples(str(path), teacher, workers, **LIMITS)
        assert side == 64
        for theirs, ours in ((expected.draw(5), examples.draw(5)), (expected.validation(), examples.validation())):
            assert torch.allclose(theirs[0], ours[0], atol=error, rtol=error)
            assert torch.equal(theirs[1], ours[1])
    assert len(open_examples(str(shards / "000.tar"), teacher, workers, **LIMITS)[0].validation()[0]) == 1


def test_pictures_are_cut_from_the_middle(tmp_path: Path) -> None:
    from PIL import Image

    wide = Image.new("RGB", (90, 40), "black")
    wide.paste("white", (20, 0, 70, 40))  # wider than the cut: the filter looks over its border
    wide.save(tmp_path / "a.png")
    Image.new("L", (5, 9), 255).save(tmp_path / "b.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "A"}\n{"file_name": "b.png", "text": "B"}\n')
    read = Pictures(tmp_path)
    assert read.captions == ["A", "B"]
    both = read.read([0, 1], 16)
    assert both.shape == (2, 3, 16, 16)
    assert float(both.min()) > 0.99


def test_names_that_say_train_or_test_are_no_splits(tmp_path: Path) -> None:
    names = ["bullet-train.png", "plain.png", "test/tube.png", "val.png", "validation/dev-eval.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    lines = [json.dumps({"file_name": name, "text": name}) for name in names]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    assert sorted(Pictures(tmp_path).captions) == names


def test_sixteen_bit_grey_is_read_as_requests_read_it(tmp_path: Path) -> None:
    import numpy as np

    from tests.support.pictures import sixteen_bits

    sixteen_bits(np.full((16, 16), 257 * 100, np.uint16)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "A"}\n')
    read = Pictures(tmp_path).read([0], 16)
    assert torch.allclose(read, torch.full_like(read, 100 / 127.5 - 1))


def test_every_example_comes_once_in_a_pass_and_held_back_ones_never() -> None:
    def read(numbers: list[int]) -> tuple[Tensor, Tensor]:
        values = torch.tensor(numbers)
        return values[:, None, None, None].float(), values[:, None]

    limits: dict[str, Any] = {"batch": 4, "validation": 3, "seed": 1}
    one = Passes(read, 23, place(), **limits)
    held = set(one.validation()[1].flatten().tolist())
    assert len(held) == 2, "one in ten"
    drawn = [number for step in range(21) for number in one.draw(step)[1].flatten().tolist()]  # 84 = 4 passes of 21
    assert Counter(drawn) == dict.fromkeys(set(range(23)) - held, 4)
    assert drawn[:21] != drawn[21:42]
    pair = [Passes(read, 23, place(rank, 2), batch=2, validation=3, seed=1) for rank in (0, 1)]
    for step in (0, 4, 9):
        assert torch.equal(torch.cat([half.draw(step)[1] for half in pair]), one.draw(step)[1])


def test_latents_go_on_after_a_kill_and_refuse_what_they_are_not(
    pictures: Path, teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, source = tmp_path / "latents", Pictures(pictures)

    def write(size: int = 64, progress: Callable[[int], None] = lambda done: None) -> None:
        write_latents(source, teacher, out, Workers(), data="p", size=size, batch=8, shard=8, progress=progress)

    def killed(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(progress=killed)
    with pytest.raises(TuningError, match="unfinished; run the same"):
        LatentFolder(out, teacher)
    first = out / "latents-00000.safetensors"
    before = first.stat().st_mtime_ns
    write()
    assert first.stat().st_mtime_ns == before, "what was done stays"
    assert len(LatentFolder(out, teacher)) == 24
    with pytest.raises(TuningError, match="another size"):
        write(size=128)
    with pytest.raises(TuningError, match="leave --size out"):
        open_examples(str(out), teacher, Workers(), **(LIMITS | {"size": 128}))
    first.write_bytes(b"no tensors")
    with pytest.raises(TuningError, match=r"latents-00000\.safetensors cannot be read"):
        LatentFolder(out, teacher).read([1])
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").touch()
    with pytest.raises(TuningError, match="holds no latents"):
        write_latents(source, teacher, tmp_path / "taken", Workers(), data="p", size=64, batch=8)
    monkeypatch.setattr(teacher.vae.config, "scaling_factor", 0.5, raising=False)
    monkeypatch.setattr("tuning.distillation.latents.made_with", lambda _: "other")
    with pytest.raises(TuningError, match="was made with the autoencoder"):
        LatentFolder(out, teacher)


def refused(path: Path, says: str) -> None:
    with pytest.raises(TuningError, match=says) as caught:
        Pictures(path).read([0], 16)
    assert "\n" not in str(caught.value)


def test_folders_that_hold_no_data_are_named(copy: Path, tmp_path: Path) -> None:
    refused(tmp_path / "none", "none: no such folder")
    (tmp_path / "data.zip").touch()
    refused(tmp_path / "data.zip", r"data\.zip: is a file of another kind than \.tar")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "empty is empty; put pictures")
    metadata = copy / "metadata.jsonl"
    lines = metadata.read_text().splitlines()
    (copy / "00.png").write_bytes(b"no picture")
    refused(copy, r"00\.png cannot be read as a picture")
    (copy / "00.png").unlink()
    refused(copy, r"00\.png cannot be read as a picture")
    metadata.write_text('{"file_name": "01.png", "text": " "}\n' + "\n".join(lines[2:]) + "\n")
    refused(copy, r"01\.png has no caption")
    metadata.write_text('{"file_name": "01.png", "text": 3}\n{"file_name": "02.png", "text": 4}\n')
    refused(copy, r"01\.png has a caption that is no text \(3\); write one")
    metadata.write_text('{"file_name": "01.png", "text": ["a", "b"]}\n')
    refused(copy, r"01\.png has a caption that is no text")
    metadata.write_text('{"file_name": "01.png", "text": "one"}\n{"file_name": "02.png", "text": null}\n')
    refused(copy, r"02\.png has no caption")
    metadata.write_text('{"file_name": "01.png", "label": 3}\n')
    refused(copy, "no captions, only image, label; write the columns")
    metadata.write_text("\n")
    refused(copy, r"metadata\.jsonl is empty; write a line for each picture")
    metadata.write_text("{nonsense")
    refused(copy, r"metadata\.jsonl cannot be read")
    metadata.unlink()
    refused(copy, r"metadata\.jsonl is missing; write one")


def test_shards_that_cannot_be_read_are_named(copy: Path, tmp_path: Path) -> None:
    for file in copy.glob("*.png"):
        file.write_bytes(b"no picture")
    shards = pack(copy, tmp_path / "shards", 1)
    refused(shards, r"00\.png cannot be read as a picture")
    (shards / "000.tar").write_bytes(b"no tar")
    refused(shards, r"000\.tar cannot be read")
    refused(shards / "000.tar", r"000\.tar cannot be read")
    tarfile.open(shards / "000.tar", "w").close()
    refused(shards, r"000\.tar cannot be read \(it holds no files\); repair it or take it out")
    with tarfile.open(shards / "000.tar", "w") as tar:
        tar.add(copy / "00.png", "a.png")
    refused(shards, "no captions, only png; write KEY.txt")


def test_one_example_is_too_few(copy: Path, teacher: Teacher) -> None:
    with pytest.raises(TuningError, match="holds 1 example;"):
        Passes(lambda _: (torch.zeros(1), torch.zeros(1)), 1, place(), batch=1, validation=1, seed=0)
    metadata = copy / "metadata.jsonl"
    metadata.write_text(metadata.read_text().splitlines()[0] + "\n")
    with pytest.raises(TuningError, match=f"data {copy} holds 1 example; training and validation need one each"):
        open_examples(str(copy), teacher, Workers(), **LIMITS)


@pytest.mark.parametrize("shards", ["{}", '{"latents-00000.safetensors": 0}', '{"latents-00000.safetensors": "8"}'])
def test_a_manifest_of_nothing_is_named(shards: str, teacher: Teacher, tmp_path: Path) -> None:
    (tmp_path / "latents.json").write_text(f'{{"version": 1, "finished": true, "made_with": "x", "shards": {shards}}}')
    with pytest.raises(TuningError, match=r"latents\.json cannot be read \(it names no latents\); run python -m tuning latents"):
        LatentFolder(tmp_path, teacher)
