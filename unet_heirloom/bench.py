"""``unet-heirloom bench``: the benchmarks, which are in the repository and not in the package."""

import runpy
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from engines.errors import UserError

__all__ = ["main"]


def main(arguments: Sequence[str]) -> None:
    """Run ``benchmarks.ROOM.NAME``, given as NAME or ROOM.NAME; without arguments, list them.

    Raises:
        UserError: the benchmarks are not here, or none is called so.
    """
    found = _benchmarks()
    if not arguments or arguments[0] in {"--help", "-h"}:
        print("usage: unet-heirloom bench NAME [...]\n\n" + "\n".join(f"  {name}" for name in sorted(found)))
        return
    name, *rest = arguments
    named = [module for short, module in found.items() if name in {short, module.removeprefix("benchmarks.")}]
    if not named:
        raise UserError(f"unknown benchmark {name!r:.60}; choose from: {', '.join(sorted(found))}")
    sys.argv = [named[0], *rest]
    runpy.run_module(named[0], run_name="__main__", alter_sys=True)


def _benchmarks() -> dict[str, str]:
    """The modules of ``benchmarks`` that are commands, by their last name."""
    spec = find_spec("benchmarks")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the benchmarks are no part of the installed package: they measure with models and results of the repository; "
            "clone it, and run this in its folder"
        )
    root = Path(next(iter(spec.submodule_search_locations)))
    files = [path for path in root.glob("*/*.py") if 'if __name__ == "__main__"' in path.read_text("utf-8")]
    return {
        path.stem if sum(path.stem == other.stem for other in files) == 1 else f"{path.parent.name}.{path.stem}":
        f"benchmarks.{path.parent.name}.{path.stem}"
        for path in files
    }  # fmt: skip
