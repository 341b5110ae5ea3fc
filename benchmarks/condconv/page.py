"""The parts of docs/condconv.md that are figures: two tables and a paragraph, from committed results alone."""

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

from benchmarks.quality.variants_page import SLOWER

__all__ = ["update"]

_FORMS = {
    "scan": "a loop over the batch with one convolution in it",
    "slices": "nine products of shifted inputs",
    "experts": "every expert's convolution, then their weighted sum",
    "grouped": "the batch folded into groups",
}
_FIXED = {"grouped": ", for a batch that is fixed at export"}
_ROUTERS = ("timestep", "features")
_SD15 = "a UNet of Stable Diffusion 1.5's widths"
_MINI = "`mini`'s UNet"

Rows = Sequence[Mapping[str, Any]]


def forms(found: Mapping[str, Any]) -> str:
    """The cost of each form for the features router, for one convolution."""
    lines = ["| form for `features` | time in ONNX Runtime | layers in TensorRT-RTX |", "|---|---|---|"]
    for form, words in _FORMS.items():
        rows = [row for row in found["layers"] if row["form"] == f"features, {form}"]
        times, layers = [row["ratio"] for row in rows], sorted({str(row["rtx_layers"]) for row in rows})
        more = f"{' or '.join(layers)}{_FIXED.get(form, '')}"
        lines.append(f"| `{form}`: {words} | {min(times):.2f} to {max(times):.2f} | {more} |")
    return "\n".join(lines)


def costs(found: Mapping[str, Any]) -> str:
    """The cost of both routers, for one convolution and for whole UNets, with the goals."""
    cases = [
        (f"one 3 x 3 convolution, 320 channels, {side} x {side}", _of_layers(found["layers"], side), False) for side in (32, 64)
    ]
    small, large = (f"{found[part]['side']} x {found[part]['side']} latents" for part in ("whole", "blocks"))
    cases += [(f"{_MINI}, {small}", found["whole"]["time"], True)]
    cases += [(f"{_SD15}, {large}: sum of all blocks", found["blocks"]["sum"], True)]
    lines = ["| what, over its plain or assembled twin | router | batch 1 | batch 2 | goal |", "|---|---|---|---|---|"]
    for what, rows, has_goal in cases:
        for router in _ROUTERS:
            cells = [_cell(_row(rows, router, batch)) for batch in (1, 2)]
            goal = ("met" if _meets(rows, router) else "missed") if has_goal else ""
            lines.append(f"| {what if router == _ROUTERS[0] else ''} | {router} | {' | '.join(cells)} | {goal} |")
    return "\n".join(lines)


def goals(found: Mapping[str, Any]) -> str:
    """How the whole UNets compare with the goal."""
    words = [f"{name} {_met(rows)}" for name, rows in ((_SD15, found["blocks"]["sum"]), (_MINI, found["whole"]["time"]))]
    text = (
        f"The goal was at most {SLOWER} times the assembled twin's time, at any batch with the timestep router and at batch 1 "
        f"with the features router: {', '.join(words)}. MACs are {found['blocks']['macs']['timestep']:.3f} of the assembled "
        f"UNet's at Stable Diffusion 1.5's widths and {found['whole']['macs']['timestep']:.2f} of `mini`'s."
    )
    return _filled(text)


def update(page: str, found: Mapping[str, Any]) -> str:
    """The page with its figures as they were found; the rest of it stays.

    Raises:
        ValueError: the page has no such table or paragraph.
    """
    for made in (forms(found), costs(found), goals(found)):
        start = made.partition("\n")[0][:24]
        parts = page.rstrip("\n").split("\n\n")
        places = [i for i, part in enumerate(parts) if part.startswith(start)]
        if len(places) != 1:
            raise ValueError(f"the page has {len(places)} parts that start with {start!r}, wanted 1")
        parts[places[0]] = made
        page = "\n\n".join(parts) + "\n"
    return page


def _of_layers(rows: Rows, side: int) -> list[Mapping[str, Any]]:
    """The rows of one side, with the router's name in place of the form's."""
    names = {"timestep": "timestep", "features, scan": "features"}
    return [{**row, "router": names[row["form"]]} for row in rows if row["side"] == side and row["form"] in names]


def _row(rows: Rows, router: str, batch: int) -> Mapping[str, Any]:
    (row,) = [row for row in rows if (row["router"], row["batch"]) == (router, batch)]
    return row


def _cell(row: Mapping[str, Any]) -> str:
    """A ratio, with the lowest and highest of its rounds where it has any: a sum of medians has none."""
    spread = f" ({row['low']:.2f} to {row['high']:.2f})" if "low" in row else ""
    return f"{row['ratio']:.2f}{spread}"


def _meets(rows: Rows, router: str) -> bool:
    batches = (1,) if router == "features" else (1, 2)
    return all(round(_row(rows, router, batch)["ratio"], 2) <= SLOWER for batch in batches)


def _met(rows: Rows) -> str:
    met = [router for router in _ROUTERS if _meets(rows, router)]
    if len(met) == 1:
        return f"meets it with the {met[0]} router only"
    return "meets it with both" if met else "misses it with both"


def _filled(text: str) -> str:
    return fill(text, 130, break_long_words=False, break_on_hyphens=False)
