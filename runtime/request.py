"""A request for pictures: all that a call of ``generate`` asks of a bundle, checked before anything is loaded or computed."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from PIL import Image

from runtime.errors import RequestError
from runtime.images.pictures import Picture
from runtime.images.schedulers import check_scheduler
from runtime.plans.plan import Plan
from runtime.plans.presets import find_plan

__all__ = ["Request"]

_SEEDS = 2**63
"""PyTorch's generators take seeds of 64 bits."""
_MOST_CHARACTERS = 20_000
"""Of a prompt: a hundred times what any text encoder reads."""
_MOST_SHOWN = 40
_MOST_PROMPTS = 10_000


@dataclass(frozen=True)
class Request:
    """All that a call of ``generate`` asks of a bundle; the arguments are described there.

    Harmless differences of type are made good: 64.0 is taken for 64, one prompt for a list of one. Anything else is refused.
    What depends on the bundle (the sizes that its UNet takes, the memory that is needed) is checked by ``Pipeline.prepare``.

    Raises:
        RequestError: a field is of a wrong type or outside of its range.
        PlanError: the plan is unknown or malformed.
    """

    prompt: str | Sequence[str]
    negative_prompt: str | Sequence[str] = ""
    steps: int = 20
    guidance_scale: float | None = None
    seed: int = 0
    height: int | None = None
    width: int | None = None
    num_images: int = 1
    scheduler: str = "dpm++"
    plan: str | Path | Plan = "full"
    image: Picture | None = None
    strength: float = 0.6
    mask: Picture | None = None
    allow_nonfinite: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, _CHECKS[field.name](field.name, getattr(self, field.name)))
        check_scheduler(self.scheduler)
        if self.mask is not None and self.image is None:
            raise RequestError("mask is given, but no image; give the image whose white part is to be repainted")
        if len(self.negative_prompts) not in (1, len(self.prompts)):
            raise RequestError(
                f"negative_prompt has {len(self.negative_prompts)} texts for {len(self.prompts)} prompt(s); "
                "give one for all, or one for each"
            )
        last = _SEEDS - self.images
        if not -_SEEDS <= self.seed <= last:
            raise RequestError(f"seed = {_shown(self.seed)}; choose one from {-_SEEDS} to {last}")

    @property
    def prompts(self) -> tuple[str, ...]:
        """All prompts."""
        return (self.prompt,) if isinstance(self.prompt, str) else tuple(self.prompt)

    @property
    def negative_prompts(self) -> tuple[str, ...]:
        """One negative prompt for all prompts, or one for each."""
        return (self.negative_prompt,) if isinstance(self.negative_prompt, str) else tuple(self.negative_prompt)

    @property
    def images(self) -> int:
        """Number of pictures: ``num_images`` of each prompt."""
        return len(self.prompts) * self.num_images

    @property
    def found_plan(self) -> Plan:
        """The plan, which was read from its file or made from its presets."""
        return find_plan(self.plan)


def _shown(value: object) -> str:
    """A value as messages have it: on one line, and short."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**_MOST_SHOWN:
        return f"a number of more than {_MOST_SHOWN} digits"
    text = ascii(value) if isinstance(value, str) else " ".join(repr(value).split())
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _wrong_type(name: str, value: object, wanted: str) -> RequestError:
    return RequestError(f"{name} is a {type(value).__name__} ({_shown(value)}); give {wanted}")


def _whole(name: str, value: Any) -> int:
    if not isinstance(value, bool):
        if isinstance(value, Integral):
            return int(value)
        if isinstance(value, Real) and float(value).is_integer():
            return int(float(value))
    raise _wrong_type(name, value, "a whole number")


def _side(name: str, value: Any) -> int | None:
    return None if value is None else _whole(name, value)


def _count(name: str, value: Any) -> int:
    count = _whole(name, value)
    if count < 1:
        raise RequestError(f"{name} = {_shown(count)}; ask for at least 1")
    return count


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise _wrong_type(name, value, "a number")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _guidance(name: str, value: Any) -> float | None:
    number = None if value is None else _number(name, value)
    if number is not None and not math.isfinite(number):
        raise RequestError(f"{name} = {number}; choose a finite number: 1 or less turns guidance off")
    return number


def _strength(name: str, value: Any) -> float:
    number = _number(name, value)
    if not 0 < number <= 1:
        raise RequestError(f"{name} = {_shown(value)}; choose a number above 0 (the image as it is) and up to 1 (nothing of it)")
    return number


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong_type(name, value, "text")
    if len(value) > _MOST_CHARACTERS:
        raise RequestError(f"{name} has {len(value)} characters; shorten it to {_MOST_CHARACTERS} at most")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{name} has a character that is no text, U+{ord(value[error.start]):04X} at position {error.start}; leave it out"
        ) from error
    return value


def _texts(name: str, value: Any) -> str | tuple[str, ...]:
    if isinstance(value, str):
        return _text(name, value)
    if not isinstance(value, Sequence) or isinstance(value, bytes | bytearray):
        raise _wrong_type(name, value, "text, or a list of texts")
    if len(value) > _MOST_PROMPTS:
        raise RequestError(f"{name} is a list of {len(value)} texts; give {_MOST_PROMPTS} at most")
    return tuple(_text(f"{name}[{number}]", text) for number, text in enumerate(value))


def _prompts(name: str, value: Any) -> str | tuple[str, ...]:
    texts = _texts(name, value)
    if not texts or not all(text.strip() for text in ((texts,) if isinstance(texts, str) else texts)):
        raise RequestError("the prompt is empty; say what the picture shows, such as 'a red star on a blue background'")
    return texts


def _scheduler(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong_type(name, value, "the name of one, such as 'ddim'")
    return value


def _plan(name: str, value: Any) -> Plan:
    return find_plan(value)


def _picture(name: str, value: Any) -> Picture | None:
    if value is None or isinstance(value, str | Path | Image.Image):
        return value
    raise RequestError(f"{name} is a {type(value).__name__}; give a PIL image or the path of a file")


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong_type(name, value, "True or False")
    return value


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "prompt": _prompts,
    "negative_prompt": _texts,
    "steps": _whole,
    "guidance_scale": _guidance,
    "seed": _whole,
    "height": _side,
    "width": _side,
    "num_images": _count,
    "scheduler": _scheduler,
    "plan": _plan,
    "image": _picture,
    "strength": _strength,
    "mask": _picture,
    "allow_nonfinite": _flag,
}
