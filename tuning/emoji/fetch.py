"""`python -m tuning.emoji.fetch`: the emoji sets from the npm registry, and pictures with captions made of them.

Three folders come of it. `icons` holds the sets, which `python -m tuning.emoji.train` draws from. `pictures` holds drawings
of the training pairs, and `held_back` plain ones of the pairs that training never sees, both with a metadata.jsonl of captions,
the form that `python -m tuning distill --data` reads. What is there is kept: the same command resumes where it was stopped.
"""

import argparse
import gzip
import hashlib
import json
import os
import random
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from engines.support.cli import Parser
from engines.support.files import atomic_file, write_bytes, write_text
from tuning.emoji.concepts import SETS, Drawing, Icon, IconSet, caption, load_icons, split
from tuning.emoji.pictures import draw, random_drawing, render
from tuning.errors import TuningError
from tuning.training.extras import need

__all__ = ["fetch", "main", "write_pictures"]

METADATA = "metadata.jsonl"


def fetch(folder: Path, say: Callable[[str], None] = lambda text: None) -> None:
    """Downloads the sets as ``STYLE.json.gz`` and checks their hashes; those that are there are kept.

    Raises:
        TuningError: npm is missing or fails, or a file is not the one that was pinned.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for style, one in SETS.items():
        target = folder / f"{style}.json.gz"
        if target.exists():
            say(f"{style}: there already")
            continue
        say(f"{style}: {one.package} {one.version}, {one.licence}, {one.authors}")
        with tempfile.TemporaryDirectory() as scratch:
            write_bytes(target, _contents(one, _pack(one, Path(scratch))))


def _contents(one: IconSet, archive: Path) -> bytes:
    """The drawings and categories of a package that is the pinned one."""
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != one.sha256:
        raise TuningError(
            f"{one.package} {one.version} has the SHA-256 {found}, not {one.sha256}: nothing of it was kept; "
            "check which registry npm takes it from, and try again"
        )
    parts = {}
    with tarfile.open(archive) as tar:
        for name in ("icons", "metadata"):
            member = tar.extractfile(f"package/{name}.json")
            if member is None:
                raise TuningError(f"{one.package} {one.version} has no {name}.json; nothing of it was kept")
            parts[name] = json.load(member)
    return gzip.compress(json.dumps(parts).encode(), mtime=0)


def _pack(one: IconSet, folder: Path) -> Path:
    package = f"{one.package}@{one.version}"
    try:
        done = subprocess.run(["npm", "pack", "--silent", package], cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise TuningError("npm is missing, and the emoji come from its registry; install Node.js, then try again") from error
    archives = list(folder.glob("*.tgz"))
    if done.returncode or len(archives) != 1:
        said = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
        raise TuningError(f"npm pack {package} failed: {said[-1]}; see that its registry can be reached, then try again")
    return archives[0]


def _file_name(icon: Icon, version: int) -> str:
    return f"{icon.style}/{icon.concept.replace(' ', '-')}-{version}.png"


def _drawings(icon: Icon, versions: int, *, plain: bool) -> Iterator[tuple[str, Drawing, random.Random]]:
    """File name, drawing and generator of each version; all follow from the icon's key and the version's number."""
    for version in range(versions):
        rng = random.Random(f"{icon.key} {version}")
        drawing = Drawing(icon.concept, icon.style) if plain else random_drawing(icon, rng)
        yield _file_name(icon, version), drawing, rng


def _write_icon(folder: Path, icon: Icon, versions: int, plain: bool) -> list[dict[str, str]]:
    """Draws what is missing of one icon; returns its lines of metadata."""
    from PIL import Image

    from tuning.mini.data import to_bytes

    lines, texture = [], None
    for name, drawing, rng in _drawings(icon, versions, plain=plain):
        text = icon.prompt if plain else caption(drawing, rng)
        lines.append({"file_name": name, "text": text})
        path = folder / name
        if path.exists():
            continue
        texture = render([icon]) if texture is None else texture
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            Image.fromarray(to_bytes(draw(texture, [drawing], None if plain else rng).clamp(-1, 1))[0]).save(temporary)
    return lines


def _start_process() -> None:
    import torch

    torch.set_num_threads(1)


def write_pictures(
    folder: Path,
    icons: Sequence[Icon],
    versions: int,
    *,
    plain: bool = False,
    processes: int = 1,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Writes `versions` pictures of each icon and, last, the captions; pictures that are there are kept.

    `plain`: as large as the picture, in its middle, on white, with a caption that names concept and style.
    """
    need("resvg_py", "drawing emoji")
    lines: list[dict[str, str]] = []
    with ProcessPoolExecutor(processes, initializer=_start_process) as pool:
        made = [pool.submit(_write_icon, folder, icon, versions, plain) for icon in icons]
        for done, future in enumerate(made, 1):
            lines += future.result()
            if done % 500 == 0 or done == len(made):
                say(f"{folder.name}: {done} of {len(made)} icons")
    write_text(folder / METADATA, "".join(json.dumps(line) + "\n" for line in lines))


def _arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m tuning.emoji.fetch", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/emoji"), help="where the folders go (default: %(default)s)")
    parser.add_argument("--versions", type=int, default=2, help="drawings of each training pair (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="processes that draw (default: one a core)")
    parser.add_argument("--icons-only", action="store_true", help="download, but draw nothing")
    options = parser.parse_args(arguments)
    for name in ("versions", "processes"):
        if getattr(options, name) < 1:
            raise TuningError(f"--{name} {getattr(options, name)} is too few; give 1 or more")
    return options


def main(arguments: Sequence[str]) -> None:
    """Runs the command. Raises TuningError for a user's mistake."""
    options = _arguments(arguments)
    say = print
    fetch(options.out / "icons", say)
    train, held = split(load_icons(options.out / "icons"))
    concepts = len({icon.concept for icon in train})
    say(f"{len(train)} pairs of {concepts} concepts and {len(SETS)} styles to train on, {len(held)} pairs held back")
    if options.icons_only:
        return
    shared = {"processes": options.processes, "say": say}
    write_pictures(options.out / "pictures", train, options.versions, **shared)
    write_pictures(options.out / "held_back", held, 1, plain=True, **shared)
    say(f"captions: {options.out / 'pictures' / METADATA}, {options.out / 'held_back' / METADATA}")


if __name__ == "__main__":
    from engines.support.cli import run_command

    run_command(main)
