"""Code blocks of the documents, run as a reader would: in a folder with a fresh clone in it and nothing else.

`unet-heirloom serve ... &` is run beside the blocks after it, at a port that is free, until `kill %1`; `curl` asks it.

A block's language says what is done with it: `bash` and `python` are run, `json` is read as a plan or a recipe and saved under
its name, `text` is left alone. `bash dry-run` and `python dry-run` are for what needs a GPU, a network, a checkpoint or hours:
commands are parsed, imports are made, and nothing runs.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import itertools
import json
import logging
import os
import queue
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
import tomllib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import pytest

from runtime.embedded import DEFAULT
from unet_heirloom.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = {"bash", "bash dry-run", "python", "python dry-run", "json", "text"}
SERVED_AT = "127.0.0.1:7860"
"""Where documents have the service; tests have it elsewhere."""
_NOT_IN_A_CLONE = {".git", ".venv", "bundles", "runs", "build", "dist"}
_LAUNCHERS = r"(?:accelerate launch|torchrun --nproc-per-node \d+) -m "


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line of the page on which it starts."""

    language: str
    text: str
    line: int


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text()
    found = re.finditer(r"^ *```([^\n`]*)\n(.*?)^ *```$", text, flags=re.MULTILINE | re.DOTALL)
    return [Block(each[1].strip(), each[2], text[: each.start()].count("\n") + 1) for each in found]


def clone(folder: Path) -> None:
    """Lay a fresh clone into a folder: links to what the repository holds, and nothing that was built there."""
    for path in ROOT.iterdir():
        if path.name not in _NOT_IN_A_CLONE and not path.name.startswith("."):
            (folder / path.name).symlink_to(path)


def commands_of(text: str) -> Iterator[list[str]]:
    """The commands of a block as words, without comments and without variables that are set for them."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]
        if words:
            yield words


class _Parsed(Exception):
    """Arguments were parsed without a complaint."""


class Reader:
    """Runs blocks one after another; Python blocks share their names, as in one session.

    Args:
        folder: the working directory, with a clone in it.
        patch: undone by the test.
        built: makes the embedded model's bundle of a variant, from which an ordinary build of it is copied.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, built: Callable[[str], Path]) -> None:
        self.patch, self.built = patch, built
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.server: BackgroundServer | None = None
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        clone(folder)

    def read(self, block: Block) -> None:
        """Do with a block what its language says; raises where a reader would get stuck."""
        language, _, dry = block.language.partition(" ")
        if self.server is not None:
            block = replace(block, text=block.text.replace(SERVED_AT, self.server.address))
        if language == "json":
            _read_json(block.text)
        elif language == "python":
            tree = ast.parse(block.text)
            if dry:
                tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
            exec(compile(tree, f"<block at line {block.line}>", "exec"), self.names)
        elif language == "bash":
            for words in commands_of(block.text):
                self.command(words, dry=bool(dry))

    def command(self, words: list[str], *, dry: bool) -> None:
        """Run a command, or parse it."""
        text = shlex.join(words)
        text = re.sub(f"^{_LAUNCHERS}", "python -m ", text)
        words = shlex.split(text)
        if words[-1] == "&":
            assert words[:2] == ["unet-heirloom", "serve"]
            self.server = BackgroundServer(words[2:-1], self.patch)
        elif words == ["kill", "%1"]:
            self.stop()
        elif words[0] == "curl":
            subprocess.run([*words, "--silent", "--fail-with-body", "--max-time", "60"], check=True, capture_output=True)
        elif words[:2] == ["python", "-m"] and words[2] != "pip":
            self._module(words[2], words[3:], dry=dry)
        elif words[0] == "unet-heirloom":
            assert words[1] in COMMANDS
            self._module("unet_heirloom", words[1:], dry=dry)
        elif words[0] == "python":
            assert not dry, "a script would run here too: write python -m, whose arguments are parsed alone"
            self._script(Path(words[1]), words[2:])
        elif words[0] == "make":
            subprocess.run([*words, "--dry-run"], check=True, capture_output=True, timeout=60)
        elif words[:2] == ["pip", "install"]:
            _check_install(words[2:])
        elif words[:2] == ["pip", "uninstall"]:
            assert dry, "what is uninstalled is missing from the blocks after it"
        elif words[0] in {"cd", "git", "export"}:
            assert len(words) > 1
        else:
            raise AssertionError(f"a command that no test knows: {text}")

    def stop(self) -> None:
        """End the server that a block started, if one did."""
        if self.server is not None:
            self.server.stop()
            self.server = None

    def _module(self, module: str, arguments: list[str], *, dry: bool) -> None:
        if importlib.util.find_spec(module) is None:
            raise AssertionError(f"no module {module}")
        if dry and module == "unet_heirloom":
            name, *rest = arguments
            module, arguments = (
                COMMANDS[name].module.removesuffix(".__main__"),
                [*(() if name in {"run", "serve"} else (name,)), *rest],
            )
        if dry:
            self._parse(module, arguments)
            return
        if arguments[:1] == ["build"]:
            self._reuse(arguments)
        self._run(lambda: runpy.run_module(module, run_name="__main__", alter_sys=True), [module, *arguments])

    def _script(self, path: Path, arguments: list[str]) -> None:
        self._run(lambda: runpy.run_path(str(path), run_name="__main__"), [str(path), *arguments])

    def _run(self, action: Callable[[], object], argv: list[str]) -> None:
        with self.patch.context() as patch, warnings.catch_warnings():
            patch.setattr(sys, "argv", argv)
            code: object = 0
            try:
                action()
            except SystemExit as leaving:
                code = leaving.code
            assert code in {0, None}, f"{shlex.join(argv)} ended with {code}"

    def _parse(self, module: str, arguments: list[str]) -> None:
        """Let a command parse its arguments, and no more; then check the names that parsing leaves unchecked."""
        parse = argparse.ArgumentParser.parse_args

        def stop(self: argparse.ArgumentParser, *given: Any, **others: Any) -> NoReturn:
            raise _Parsed(parse(self, *given, **others))

        with self.patch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_args", stop)
            spec = importlib.util.find_spec(module)
            name = f"{module}.__main__" if spec and spec.submodule_search_locations else module
            with pytest.raises(_Parsed):
                importlib.import_module(name).main(arguments)
        _check_names(arguments)

    def _reuse(self, arguments: list[str]) -> None:
        """Before an ordinary build of the embedded model, put the finished bundle in its place: the build then finds it."""
        given = dict(zip(arguments[1::2], arguments[2::2], strict=False))
        if not set(given) <= {"--variant", "--source", "--out"} or given.get("--source", DEFAULT) != DEFAULT:
            return
        variant = given.get("--variant", "original")
        out = Path(given.get("--out", f"bundles/{DEFAULT}-{variant}"))
        if variant in {"original", "assembled"} and not out.exists():
            shutil.copytree(self.built(variant), out)


class BackgroundServer:
    """The command ``serve`` on a thread of its own, without the page.

    Args:
        arguments: of the command.
        patch: undone by the test.
    """

    def __init__(self, arguments: list[str], patch: pytest.MonkeyPatch) -> None:
        from serving.__main__ import main
        from serving.command import server

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        made, make = queue.Queue[Any](), server.make_server

        def noted(*options: Any) -> Any:
            made.put(found := make(*options))
            return found

        patch.setattr(server, "make_server", noted)
        given = [*arguments, "--port", str(port), "--no-page", "--quiet"]
        self._thread = threading.Thread(target=main, args=(given,), daemon=True)
        self._thread.start()
        self._server = made.get(timeout=60)
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.02)

    def stop(self) -> None:
        """Let it end."""
        self._server.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive()
        logging.captureWarnings(False)


def _check_names(arguments: list[str]) -> None:
    """Engines and plans are looked up after parsing."""
    from engines import ENGINES
    from runtime import find_plan

    for option, value in itertools.pairwise(arguments):
        if option == "--engine":
            assert set(value.split(",")) <= set(ENGINES)
        if option == "--plan" and not value.endswith(".json"):
            find_plan(value)


def _check_install(arguments: list[str]) -> None:
    """Extras that are installed exist, and so do the files named."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.findall(r"^\.\[(.+)\]$", "\n".join(arguments), flags=re.MULTILINE)
    assert {name for extra in extras for name in extra.split(",")} <= set(project["optional-dependencies"])
    assert "--constraint" not in arguments or Path(arguments[arguments.index("--constraint") + 1]).is_file()


def _read_json(text: str) -> None:
    """A plan or a recipe, saved as NAME.json for the commands after it."""
    from runtime import find_plan
    from tuning import recipe

    content = json.loads(text)
    path = Path(f"{content['name']}.json")
    path.write_text(text)
    if "rules" in content or "unets" in content:
        assert find_plan(path).name == content["name"]
    else:
        assert recipe(str(path)).name == content["name"]


def pages() -> list[Path]:
    """The documents whose blocks are run."""
    return sorted(
        [ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")], key=os.fspath
    )
