"""Symbolic shapes: what a bundle says about a tensor before a batch or a picture size is chosen.

A dimension is an integer or one of the forms ``name``, ``name/4``, ``8*name`` and ``name=77``, which is 77 where nobody says. The
names in use are ``batch`` (rows of a UNet call: images, twice with guidance), ``images`` (rows of a VAE call), ``height`` and
``width`` (of latents), and ``tokens`` (of text features).
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache

__all__ = ["Dim", "Shape", "bind", "is_dim", "is_multiple", "resolve", "size_fault"]

Dim = int | str
Shape = tuple[Dim, ...]

_LONGEST = 40
_FORM = re.compile(r"^(?:(\d+)\*)?([a-z]+)(?:/(\d+)|=(\d+))?$")


@lru_cache(4096)
def _parts(dim: str) -> tuple[int, str, int, int | None]:
    found = _FORM.match(dim)
    if found is None:
        raise ValueError(f"{dim!r} is no dimension: expected an integer, 'name', 'name/4', '8*name' or 'name=77'")
    factor, name, divisor, usual = found.groups()
    return int(factor or 1), name, int(divisor or 1), None if usual is None else int(usual)


def is_dim(dim: str, names: Collection[str], largest: int) -> bool:
    """Whether a text is a dimension of one of the ``names``, with numbers of at least 1 and at most ``largest``."""
    found = _FORM.fullmatch(dim) if len(dim) <= _LONGEST else None
    return found is not None and found[2] in names and all(1 <= int(found[at] or 1) <= largest for at in (1, 3, 4))


def is_multiple(sides: Iterable[int], multiple: int) -> bool:
    """Whether each side of a picture or of latents is a multiple of ``multiple``, and not 0."""
    return all(side >= multiple and side % multiple == 0 for side in sides)


def size_fault(size: tuple[int, int], multiple: int) -> str | None:
    """Say what is wrong with a picture's height and width in pixels; None where both are multiples.

    Args:
        size: height and width.
        multiple: what both must be multiples of.
    """
    if is_multiple(size, multiple):
        return None
    return f"{size[0]}x{size[1]}: height and width must be multiples of {multiple} pixels for this UNet"


def resolve(shape: Sequence[Dim], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The integer shape for given sizes, such as ``{"batch": 2, "height": 64, "width": 64}``.

    Raises:
        ValueError: a form is malformed, or a size does not divide.
        KeyError: a name has no size, and no usual one.
    """
    result = []
    for dim in shape:
        if isinstance(dim, int):
            result.append(dim)
            continue
        factor, name, divisor, usual = _parts(dim)
        value, rest = divmod(factor * (sizes[name] if usual is None else sizes.get(name, usual)), divisor)
        if rest:
            raise ValueError(f"{name} = {sizes[name]} is not a multiple of {divisor}, which dimension {dim!r} needs")
        result.append(value)
    return tuple(result)


def bind(shape: Sequence[Dim], actual: Sequence[int], sizes: dict[str, int]) -> str | None:
    """Match an actual shape with a symbolic one, adding what it tells to ``sizes``; what does not fit, or None."""
    if len(shape) != len(actual):
        return f"{len(actual)} dimensions, expected {len(shape)}"
    for position, (dim, got) in enumerate(zip(shape, actual, strict=True)):
        if isinstance(dim, int):
            factor, name, divisor, known = 1, str(dim), 1, dim
        else:
            factor, name, divisor, _ = _parts(dim)
            known = sizes.setdefault(name, got * divisor // factor)
        if got * divisor != factor * known:
            where = "" if isinstance(dim, int) else f" with {name} = {known}"
            return f"dimension {position} is {got}, expected {dim}{where}"
    return None
