"""``unet-heirloom doctor``: what this machine has, what can run on it, and the one command to run next.

Every probe may fail, and none may end the command: it is for environments that are broken.
"""

import json
import platform
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from unet_heirloom import __version__

__all__ = ["examine", "main"]

_USAGE = """usage: unet-heirloom doctor [--json]

Says what this machine has, which engines can run on it, which bundles are in ./bundles, and what to do next."""
_DRIVER = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
_INSTALL = 'pip install --constraint constraints.txt --editable "."'
_ROOT = Path(__file__).resolve().parents[1]
_MOST_SHOWN = 200
_WIDTH = 14


def main(arguments: list[str]) -> int:
    """Print the findings; returns the exit code."""
    if set(arguments) - {"--json"}:
        asked = set(arguments) <= {"--help", "-h"}
        print(_USAGE if asked else f"error: doctor takes --json and nothing else, got {' '.join(arguments)[:_MOST_SHOWN]}",
              file=sys.stdout if asked else sys.stderr)  # fmt: skip
        return 0 if asked else 2
    found = examine()
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print(json.dumps(found, indent=2) if "--json" in arguments else _text(found, width))
    return 0


def examine(bundles: Path = Path("bundles")) -> dict[str, Any]:
    """All findings, in JSON's terms. Where a probe fails, what it raised is its finding, as ``{"error": ...}``."""
    found: dict[str, Any] = {
        "unet-heirloom": f"{__version__} in {_ROOT}",
        "python": f"{platform.python_version()} ({sys.executable}), {platform.platform()}",
        "torch": _tried(_torch),
        "driver": _tried(_driver),
        "cards": _tried(_cards),
        "tensorrt": _tried(_tensorrt),
        "engines": _tried(_engines),
        "bundles": _tried(lambda: _bundles(bundles)),
    }
    return {**found, "next": _next(found, bundles)}


def _tried(probe: Callable[[], Any]) -> Any:
    try:
        return probe()
    except Exception as error:  # a library that cannot be loaded raises what it likes
        return {"error": _line(error)}


def _line(error: BaseException) -> str:
    notes = getattr(error, "__notes__", [])
    text = " ".join("; ".join([str(error) or type(error).__name__, *notes]).split())
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _failed(finding: object) -> bool:
    return isinstance(finding, dict) and "error" in finding


def _torch() -> str:
    import torch

    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    usable = "usable here" if torch.cuda.is_available() else "no GPU that it can use"
    return f"{torch.__version__}, {built}, {usable}"


def _driver() -> str:
    try:
        done = subprocess.run(_DRIVER, capture_output=True, text=True, timeout=10, check=False)
    except (FileNotFoundError, PermissionError):
        return "none: there is no nvidia-smi"
    if done.returncode or not done.stdout.strip():
        return f"none: nvidia-smi says {' '.join((done.stdout + done.stderr).split())[:_MOST_SHOWN] or 'nothing'}"
    return f"NVIDIA {done.stdout.split()[0]}"


def _cards() -> list[str]:
    import torch

    cards = []
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        card = torch.cuda.get_device_properties(number)
        cards.append(f"{card.name}, {card.total_memory / 2**30:.0f} GiB, compute capability {card.major}.{card.minor}")
    return cards


def _tensorrt() -> dict[str, str]:
    """Versions of the distributions that hold TensorRT, in any of their forms."""
    names = {str(each.name): each.version for each in distributions() if each.name}
    return {name: version for name, version in sorted(names.items()) if name.lower().replace("_", "-").startswith("tensorrt")}


def _engines() -> dict[str, str]:
    """By engine, its version where it can run here, or why it cannot."""
    engines = import_module("engines")
    return {name: _engine(engines, name) for name in engines.ENGINES if name != "null"}


def _engine(engines: Any, name: str) -> str:
    try:
        engine = engines.make_engine(name)
        engine.check_device()
        return f"can run: {engine.version()} on {engine.device}"
    except Exception as error:
        return f"cannot run: {_line(error).removeprefix(f'engine {name} cannot be used: ')}"


def _bundles(folder: Path) -> dict[str, str]:
    """By folder, what each bundle is, or what is wrong with it; the one that was built last comes last."""
    engines = import_module("engines")
    paths = sorted(folder.glob("[!.]*/manifest.json"), key=lambda path: path.stat().st_mtime)
    return {str(path.parent): _bundle(engines, path.parent) for path in paths}


def _bundle(engines: Any, folder: Path) -> str:
    try:
        manifest = engines.Bundle.open(folder).manifest
    except Exception as error:
        return f"damaged: {_line(error)}"
    built = sorted({*engines.ON_ONNX, *(name for segment in manifest.segments for name in segment.engines)})
    made = "" if manifest.distilled else ", never distilled: its pictures suffer"
    return f"{manifest.variant} UNet of {manifest.source}, {manifest.precision}, for {', '.join(built)}{made}"


def _next(found: dict[str, Any], folder: Path) -> str:
    """The one command to run next."""
    if _failed(found["torch"]) or _failed(found["engines"]):
        made = _ROOT / ".venv" / "bin" / "python"
        if made.exists() and made.parent != Path(sys.executable).parent:
            return f"{made} -m unet_heirloom doctor"
        clone = (_ROOT / "constraints.txt").is_file()
        return f"cd {_ROOT} && {_INSTALL}" if clone else "pip install --force-reinstall unet-heirloom"
    whole = [name for name, what in found["bundles"].items() if not what.startswith("damaged")] if found["bundles"] else []
    if _failed(found["bundles"]) or not whole:
        return "python -m exporter build --variant original"
    from runtime.embedded import DEFAULT, EXAMPLES

    return f"python -m runtime '{EXAMPLES[DEFAULT]}' --bundle {whole[-1]} --plan deepcache:3"


def _text(found: dict[str, Any], width: int | None = None) -> str:
    """All findings under each other, in lines of so many columns, but for the command to run next, which stays one."""
    lines = []
    for name, value in found.items():
        head = name
        for row in _rows(value):
            lines += _wrapped(f"{head:{_WIDTH}}{row}", None if name == "next" else width)
            head = ""
    return "\n".join(lines)


def _wrapped(line: str, width: int | None) -> list[str]:
    if width is None or width < 3 * _WIDTH:
        return [line]
    return textwrap.wrap(line, width, subsequent_indent=" " * (_WIDTH + 2), break_long_words=False, break_on_hyphens=False)


def _rows(value: Any) -> list[str]:
    if _failed(value):
        return [f"cannot be told: {value['error']}"]
    if isinstance(value, dict):
        return [f"{name}: {what}" for name, what in value.items()] or ["none"]
    return (value or ["none"]) if isinstance(value, list) else [value]
