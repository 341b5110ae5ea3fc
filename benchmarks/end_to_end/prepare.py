"""Preparations of a run: bundles, the pipeline's weights as peers read them, and environments for peers."""

import json
import subprocess
import sys
import venv
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.end_to_end.rows import Row, Settings, bundle_folder
from benchmarks.peers import CONSTRAINTS, Peer
from engines import Bundle
from engines.errors import UserError
from engines.support.files import write_text

__all__ = ["built", "environment_of", "written_pipeline"]

Say = Callable[[str], None]


def built(settings: Settings, variant: str, say: Say) -> Bundle:
    """The bundle of a variant, with every engine of the run and partitioned for all of its plans."""
    from exporter import BuildOptions, build

    options = BuildOptions(
        variant=variant,
        source=settings.source,
        engines=settings.engines,
        plans=tuple(filter(None, map(_without_switches, settings.plans))),
        precision=settings.precision,  # type: ignore[arg-type]
        sizes=(settings.size,) if settings.size else (),
        max_images=settings.batch,
        targets=settings.targets if "tensorrt-rtx" in settings.engines else (),
        out=bundle_folder(settings, variant),
        force=True,
    )
    say(f"building {options.folder}")
    return build(options)[0]


def _without_switches(plan: str) -> str:
    """What of a plan a UNet is partitioned for: ``switch`` says only which UNet runs, and ``full`` inherits nothing."""
    if plan.endswith(".json"):
        return plan
    return "+".join(part for part in plan.split("+") if part != "full" and not part.startswith("switch:"))


def written_pipeline(settings: Settings, say: Say) -> Path:
    """The source as a diffusers pipeline on disk, which all peers read: the same weights, and the scheduler that the rows have.

    The text encoder's weights keep the names that older versions of transformers look for, and the tokenizer its two files.
    """
    folder = settings.work / "pipelines" / _pipeline_name(settings)
    if (folder / "complete").exists():
        return folder
    say(f"writing {folder} for the peers")
    import torch

    from benchmarks.gpu.baselines import source_pipeline
    from exporter.graph.graph import DTYPE

    dtype = DTYPE[settings.precision]  # type: ignore[index]
    pipeline = source_pipeline(settings.source, "original", torch.device("cpu"), dtype, settings.steps)
    pipeline.save_pretrained(folder)
    _name_text_weights(folder / "text_encoder")
    _write_words(folder / "tokenizer")
    (folder / "complete").touch()
    return folder


def _pipeline_name(settings: Settings) -> str:
    """The source's name and precision, and a hash of its files: another source of the same name is another pipeline."""
    from engines.bundle.digests import known_sha256
    from exporter.graph.checkpoint import open_source

    own = open_source(settings.source, "original").fingerprint("original", known_sha256)
    return f"{Path(settings.source).name}-{settings.precision}-{own[:12]}".replace(":", "-")


def _name_text_weights(folder: Path) -> None:
    """Older versions of transformers take a text encoder whose weights lack their prefix for one without any: a random one."""
    from safetensors.torch import load_file, save_file

    (path,) = folder.glob("*.safetensors")
    state = load_file(path)
    save_file({_prefixed(name): tensor for name, tensor in state.items()}, path, {"format": "pt"})


def _prefixed(name: str) -> str:
    return name if name.startswith("text_model.") else f"text_model.{name}"


def _write_words(folder: Path) -> None:
    """Older versions of transformers read a tokenizer's words and merges from two files, which newer ones no longer write."""
    model = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]
    write_text(folder / "vocab.json", json.dumps(model["vocab"], ensure_ascii=False))
    write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *map(" ".join, model["merges"]), ""]))


def environment_of(row: Row, settings: Settings, say: Say) -> str:
    """The interpreter that a row's subject runs in: this one, or that of an environment made for it.

    An environment has the versions in the peer's file of pins, and is made anew when these change.

    Raises:
        UserError: its packages cannot be installed.
    """
    if not row.peer.own_environment:
        return sys.executable
    folder = settings.work / "environments" / row.peer.module
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    pins, marker = CONSTRAINTS / f"{row.peer.module}.txt", folder / "complete"
    if not marker.exists() or marker.read_text("utf-8") != pins.read_text("utf-8"):
        say(f"installing {', '.join(row.peer.to_install)} into {folder}")
        venv.create(folder, with_pip=True, clear=True)
        _install(python, row.peer, pins)
        write_text(marker, pins.read_text("utf-8"))
    return str(python)


def _install(python: Path, peer: Peer, pins: Path) -> None:
    import torch

    wanted: Sequence[str] = [f"torch=={torch.__version__.partition('+')[0]}", *peer.to_install, "--constraint", str(pins)]
    _pip(python, "install", *wanted)
    if peer.unwanted:
        _pip(python, "uninstall", "--yes", *peer.unwanted)


def _pip(python: Path, *arguments: str) -> None:
    done = subprocess.run([str(python), "-m", "pip", *arguments, "--quiet"], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason"])[-1][:300]
        raise UserError(f"pip {' '.join(arguments)} failed: {reason}")
