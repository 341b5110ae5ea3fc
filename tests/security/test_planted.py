"""What is planted in a bundle, with hashes made to fit or put beside the listed files, is refused or does not exist."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile

import onnx
import pytest
import torch

from engines import Bundle, BundleError, UserError
from engines.bundle.folder import MANIFEST_NAME, describe_file
from engines.null import Null
from engines.torch_program import Torch
from runtime import Pipeline
from tests.engines.test_pt2 import Members, Trap, members_of, pickled_constant
from tests.support.commands import Command, Outcome, assert_refused, command


@pytest.fixture
def exporter(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """``python -m exporter`` in this process."""
    from exporter.__main__ import main

    return command(main, capfd, monkeypatch)


@pytest.fixture
def command_line(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """``python -m runtime`` in this process."""
    from runtime.__main__ import main

    return command(main, capfd, monkeypatch)


@pytest.fixture
def copy(torch_bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(torch_bundle.folder, tmp_path / "bundle"))


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest, and make its hashes fit all files that are there."""
    path = folder / MANIFEST_NAME
    data = json.loads(path.read_text())
    change(data)
    entries = [*data["files"]]
    for segment in data["segments"]:
        entries += segment["onnx"] + [file for compiled in segment["engines"].values() for file in compiled["files"]]
    for entry in entries:
        entry.update(describe_file(folder, folder / entry["path"]).model_dump())
    path.write_text(json.dumps(data))


def nothing(data: dict[str, Any]) -> None:
    """Leave the manifest as it is, but for the hashes."""


def into_archive(plant: Callable[[Members, bytes], None]) -> Callable[[Path, bytes], None]:
    def change(folder: Path, trap: bytes) -> None:
        path = folder / "engines" / "torch" / "stem.pt2"
        members = members_of(path.read_bytes())
        plant(members, trap)
        with ZipFile(path, "w", ZIP_STORED) as archive:
            for name, data in members.items():
                archive.writestr(name, data)

    return change


def any_weight(members: Members, trap: bytes) -> None:
    """The first weight that there is."""
    name = "archive/data/weights/model_weights_config.json"
    config = json.loads(members[name])
    first = next(iter(config["config"].values()))
    first.update(use_pickle=True, path_name="trap")
    members[name], members["archive/data/weights/trap"] = json.dumps(config).encode(), trap


def sample_inputs(members: Members, trap: bytes) -> None:
    members["archive/data/sample_inputs/model.pt"] = trap


def whole_file(folder: Path, trap: bytes) -> None:
    (folder / "engines" / "torch" / "stem.pt2").write_bytes(trap)


PLACES: dict[str, Callable[[Path, bytes], object]] = {
    "weights": into_archive(any_weight),
    "constants": into_archive(pickled_constant("tensor")),
    "objects": into_archive(pickled_constant("custom_obj")),
    "sample inputs": into_archive(sample_inputs),
    "whole file": whole_file,
    "tokenizer": lambda folder, trap: (folder / "tokenizer" / "tokenizer.json").write_bytes(trap),
    "tokenizer, beside": lambda folder, trap: (folder / "tokenizer" / "pytorch_model.bin").write_bytes(trap),
    "scheduler": lambda folder, trap: (folder / "scheduler" / "scheduler_config.json").write_bytes(trap),
    "scheduler, beside": lambda folder, trap: (folder / "scheduler" / "diffusion_pytorch_model.bin").write_bytes(trap),
}


HARMLESS = {"sample inputs", "tokenizer, beside", "scheduler, beside"}
"""Where nothing would read a pickle."""


@pytest.mark.parametrize("place", PLACES)
def test_no_pickle_is_opened(copy: Path, place: str, tmp_path: Path, exporter: Command) -> None:
    witness = tmp_path / "witness"
    PLACES[place](copy, pickle.dumps(Trap(witness)))
    rewritten(copy, nothing)
    said = ""
    try:
        Pipeline(Bundle.open(copy), Torch("cpu")).generate("a red star", steps=1)
    except UserError as error:
        said = str(error)
    assert not witness.exists()
    assert bool(said) == (place not in HARMLESS), said
    verified = exporter("verify", copy, "--engine", "torch", "--sizes", "64x64")
    assert not witness.exists()
    if place in HARMLESS:
        assert verified.code == 0, verified.err
    elif place in {"tokenizer", "scheduler"}:
        assert_refused(verified, str(copy), f"{place}/", "is not that of its source")
    else:
        assert_refused(verified, str(copy), "stem.pt2")


def cyclic_onnx(folder: Path) -> None:
    """The first two operators of a segment need one another."""
    path = folder / "segments" / "stem.onnx"
    model = onnx.load(path, load_external_data=False)
    first, second = model.graph.node[:2]
    first.input[0] = second.output[0]
    path.write_bytes(model.SerializeToString())


def cyclic_program(folder: Path) -> None:
    """The same for the torch engine."""

    def turn(members: Members, trap: bytes) -> None:
        name = "archive/models/model.json"
        model = json.loads(members[name])
        nodes = model["graph_module"]["graph"]["nodes"]
        *_, last = (node["outputs"][0]["as_tensor"]["name"] for node in nodes if "as_tensor" in next(iter(node["outputs"]), {}))
        for node in nodes:
            if node["target"] == "torch.ops.aten.linear.default":
                node["inputs"][0]["arg"]["as_tensor"]["name"] = last
        members[name] = json.dumps(model).encode()

    into_archive(turn)(folder, b"")


def test_a_graph_that_goes_round_is_refused_by_who_reads_it(copy: Path, exporter: Command, command_line: Command) -> None:
    def drawn(engine: str) -> Outcome:
        return command_line("a red star", "--bundle", copy, "--engine", engine, "--steps", "1", "-o", copy / "star.png")

    cyclic_onnx(copy)
    rewritten(copy, nothing)
    for outcome in (drawn("onnxruntime"), exporter("verify", copy)):
        assert_refused(outcome, str(copy / "segments" / "stem.onnx"), "'Unsqueeze' and 'Mul': the graph is cyclic")
    assert exporter("inspect", copy).code == 0, "it reads no graph"
    assert drawn("torch").code == 0
    (copy / "star.png").unlink()
    cyclic_program(copy)
    rewritten(copy, nothing)
    for outcome in (drawn("torch"), exporter("verify", copy, "--engine", "torch")):
        assert_refused(outcome, str(copy / "engines" / "torch" / "stem.pt2"), "which nothing before it makes")
    assert not (copy / "star.png").exists()


def test_tokens_put_beside_do_not_exist(copy: Path) -> None:
    before = Pipeline(Bundle.open(copy), Null()).tokenizer("a red star").input_ids
    (copy / "tokenizer" / "added_tokens.json").write_text('{"red": 5}')
    assert Pipeline(Bundle.open(copy), Null()).tokenizer("a red star").input_ids == before


def test_a_tokenizer_of_another_model_is_refused(copy: Path) -> None:
    vocabulary = {f"word{number}": number for number in range(2000)} | {"<|startoftext|>": 2000, "<|endoftext|>": 2001}
    for path in (copy / "tokenizer").iterdir():
        if path.name == "vocab.json":
            path.write_text(json.dumps(vocabulary))
        elif path.name == "tokenizer.json":
            data = json.loads(path.read_text())
            data["model"].update(vocab=vocabulary, merges=[])
            path.write_text(json.dumps(data))
    rewritten(copy, nothing)
    with pytest.raises(BundleError, match="its folder tokenizer holds no tokenizer for it"):
        Pipeline(Bundle.open(copy), Null())


def test_weights_that_are_not_listed_are_not_read(copy: Path) -> None:
    from engines.ort.engine import OnnxRuntime

    def unlist(data: dict[str, Any]) -> None:
        for segment in data["segments"]:
            segment["onnx"] = segment["onnx"][:1]

    rewritten(copy, unlist)
    bundle = Bundle.open(copy)
    with pytest.raises(BundleError, match=r"takes weights from 'stem.onnx.data', which the manifest does not list"):
        OnnxRuntime().load(bundle, bundle.manifest.segment("stem"))


@pytest.mark.parametrize("name", [MANIFEST_NAME, "tokenizer/tokenizer_config.json", "segments/stem.onnx"])
def test_links_that_lead_outside_are_refused(copy: Path, name: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (copy / name).rename(outside)
    (copy / name).symlink_to(outside)
    with pytest.raises(BundleError, match="is a link that leads out of the bundle"):
        Bundle.open(copy).check()


def test_a_hubs_cache_is_made_of_links(copy: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0" / "bundle"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in copy.rglob("*") if path.is_file())):
        target = snapshot / path.relative_to(copy)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(blobs / str(number))
        target.symlink_to(os.path.relpath(blobs / str(number), target.parent))
    bundle = Bundle.open(snapshot)
    bundle.check()
    assert torch.isfinite(Pipeline(bundle, Null()).generate("a red star", steps=1).latents).all()
