"""Writes docs/api.md, the public names of the packages, from their docstrings.

python -m docs.write_api
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

PAGE = Path(__file__).resolve().parent / "api.md"
PACKAGES = ("runtime", "exporter", "tuning", "engines")
HEAD = """# The interface

The public names of the packages `runtime`, `exporter`, `tuning` and `engines`; others may change. This page is written by
`python -m docs.write_api` from the docstrings.
"""
SECTIONS = r"(Args|Returns|Raises|Yields):"
Definition = ast.FunctionDef | ast.ClassDef


def page() -> str:
    """The text of docs/api.md."""
    return "\n".join([HEAD, *(package_text(importlib.import_module(name)) for name in PACKAGES)])


def package_text(package: ModuleType) -> str:
    """A package: its docstring, and each public name."""
    names = sorted(package.__all__, key=lambda name: (not name.islower(), name.lower()))
    entries = [entry(name, getattr(package, name)) for name in names]
    return "\n".join([f"## {package.__name__}\n", markdown(inspect.getdoc(package) or ""), *entries])


def entry(name: str, value: Any) -> str:
    """One public name as Markdown."""
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        keys = f": {', '.join(f'`{key}`' for key in value)}" if isinstance(value, dict) else ""
        return f"### {name}\n\nA {type(value).__name__}{keys}.\n"
    found = definition(value)
    if isinstance(found, ast.FunctionDef):
        return f"### {name}\n\n{signature(found, name)}\n{described(found)}"
    bases = [ast.unparse(base) for base in found.bases]
    parents = f" ({', '.join(bases)})" if bases else ""
    return "\n".join([f"### {name}\n\nclass{parents}\n", described(found), *fields(found), *methods(found)])


def definition(value: Any) -> Definition:
    """The definition of a class or function in its source."""
    source = Path(inspect.getsourcefile(value) or "").read_text()
    return next(
        node for node in ast.parse(source).body if isinstance(node, Definition) and node.name == value.__qualname__
    )  # fmt: skip


def signature(function: ast.FunctionDef, name: str) -> str:
    """A function's name, parameters and result, a parameter a line where they are many."""
    arguments, returns = ast.unparse(function.args), f" -> {ast.unparse(function.returns)}" if function.returns else ""
    arguments = re.sub(r"^self(, )?", "", arguments)
    line = f"{name}({arguments}){returns}"
    if len(line) > 100:
        line = f"{name}(\n    " + ",\n    ".join(parameters(arguments)) + f"\n){returns}"
    return f"```text\n{line}\n```\n"


def parameters(arguments: str) -> list[str]:
    """A parameter list divided at its own commas, not at those inside brackets."""
    found, depth = [""], 0
    for character in arguments:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth:
            found.append("")
        else:
            found[-1] += character
    return [each.strip() for each in found]


def fields(owner: ast.ClassDef) -> list[str]:
    """The annotated public attributes of a class, with the strings that stand below them."""
    lines = []
    for node, after in zip(owner.body, [*owner.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and not node.target.id.startswith("_"):
            words = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            lines.append(f"- `{ast.unparse(node)}`" + (f": {inline(str(words))}" if words else ""))
    return [*lines, ""] if lines else []


def methods(owner: ast.ClassDef) -> list[str]:
    """The public methods and properties that a class defines itself and describes."""
    shown = [node for node in owner.body if isinstance(node, ast.FunctionDef) and ast.get_docstring(node)]
    shown = [node for node in shown if not node.name.startswith("_") or node.name == "__call__"]
    return [method(node) for node in shown]


def method(node: ast.FunctionDef) -> str:
    """A property in one line, or a method with its signature."""
    decorators = {ast.unparse(each).rsplit(".", maxsplit=1)[-1] for each in node.decorator_list}
    if decorators & {"property", "cached_property"}:
        kind = f": {ast.unparse(node.returns)}" if node.returns else ""
        return f"- `{node.name}{kind}`: {inline(ast.get_docstring(node) or '')}\n"
    return f"#### {node.name}\n\n{signature(node, node.name)}\n{described(node)}"


def described(node: Definition) -> str:
    """The docstring of a definition as Markdown."""
    return markdown(ast.get_docstring(node) or "")


def inline(text: str) -> str:
    """A short docstring on one line."""
    return " ".join(text.replace("``", "`").split())


def markdown(text: str) -> str:
    """A docstring as Markdown: sections as lists, examples as code blocks."""
    parts = re.split(rf"^{SECTIONS}\n", text, flags=re.MULTILINE)
    shown = [prose(parts[0])]
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        shown.append(f"**{title}**\n\n{listed(body)}\n")
    return "\n".join(shown)


def prose(text: str) -> str:
    """Paragraphs; one that ends with two colons has a code block behind it."""
    return re.sub(r"::\n\n((?:    .*\n?|\n)+)", _example, text.replace("``", "`")).strip() + "\n"


def _example(found: re.Match[str]) -> str:
    return f":\n\n```python dry-run\n{textwrap.dedent(found[1]).strip()}\n```\n\n"


def listed(body: str) -> str:
    """The entries of a section as a list, each with its continued lines."""
    entries: list[str] = []
    for line in textwrap.dedent(body).rstrip().splitlines():
        if line and not line[0].isspace():
            entries.append(line.strip())
        elif line.strip():
            entries[-1] += " " + line.strip()
    return "\n".join("- " + re.sub(r"^([*]*\w+):", r"`\1`:", inline(each)) for each in entries)


def main() -> None:
    """Write the page."""
    PAGE.write_text(page())
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
