"""Mutations of JSON, seeded: what a careless or hostile editor makes of a file."""

from __future__ import annotations

import copy
import random
from typing import Any

__all__ = ["mutated"]

NASTY: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 7, 10**9, -(10**9), 2**31, 2**63, 10**30, 0.5, 1e308, float("nan"), float("inf"), "", "a",
    "head", "sample", "batch", "height/0", "0*height", "99999999*height", "\ud800", "a\nb", "\x1b[31m", "../x", "/etc/passwd",
    "x" * 100_000, [], {}, [[]], [0], [""], [None], {"a": 1}, [[[[[[]]]]]],
)  # fmt: skip


def mutated(data: Any, seed: int) -> Any:
    """A copy of JSON data with one to three edits."""
    chooser, changed = random.Random(seed), copy.deepcopy(data)
    for _ in range(chooser.choice((1, 1, 1, 2, 3))):
        _edit(changed, chooser)
    return changed


def _edit(data: Any, chooser: random.Random) -> None:
    holder, key = _place(data, chooser)
    if holder is None:
        return
    kind = chooser.choice(("drop", "nasty", "nasty", "nasty", "near", "swap", "copy", "rename"))
    if kind == "drop":
        del holder[key]
    elif kind == "nasty":
        holder[key] = copy.deepcopy(chooser.choice(NASTY))
    elif kind == "near" and isinstance(holder[key], int | float):
        holder[key] = holder[key] + chooser.choice((-1, 1, 64, -64)) if chooser.random() < 0.5 else holder[key] * 2
    elif kind == "near" and isinstance(holder[key], str):
        holder[key] = holder[key][: len(holder[key]) // 2] if chooser.random() < 0.5 else holder[key] + "x"
    elif kind == "swap" and isinstance(holder, list):
        other = chooser.randrange(len(holder))
        holder[key], holder[other] = holder[other], holder[key]
    elif kind == "copy":
        source, at = _place(data, chooser)
        if source is not None:
            holder[key] = copy.deepcopy(source[at])
    elif isinstance(holder, dict):
        holder[chooser.choice(("surprise", "version", f"{key}x"))] = holder.pop(key)
    else:
        holder.append(copy.deepcopy(holder[key]))


def _place(data: Any, chooser: random.Random) -> tuple[Any, Any]:
    """A list or object somewhere inside, and one of its places; shallow ones are as likely as deep ones."""
    holder, key, depth = None, None, chooser.randrange(1, 7)
    for _ in range(depth):
        if not isinstance(data, list | dict) or not data:
            break
        holder, key = data, chooser.choice(list(data)) if isinstance(data, dict) else chooser.randrange(len(data))
        data = holder[key]
    return holder, key
