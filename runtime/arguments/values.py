"""Whether a value of a request is of its kind and in its range; harmless differences of type are made good."""

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Rational, Real
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from runtime.errors import RequestError
from runtime.images.pictures import Picture
from runtime.plans.plan import Plan
from runtime.plans.presets import find_plan

__all__ = ["CHECKS", "LONG_PROMPTS", "OUTPUTS", "shown", "tensor_fault"]

OUTPUTS = ("pil", "np", "pt", "latent")
"""The forms that diffusers' pipelines give pictures in."""
LONG_PROMPTS = ("chunks", "cut")
"""The ways to treat words that the text encoder does not read at once."""
_MOST_CHARACTERS = 20_000
"""Of a prompt: a hundred times what any text encoder reads."""
_MOST_SHOWN = 40
_MOST_PROMPTS = 10_000
_MOST_STEPS = 10**9


def shown(value: object) -> str:
    """A value as messages have it: on one line, and short."""
    if isinstance(value, int) and abs(value) >= 10**_MOST_SHOWN:
        return f"a number of more than {_MOST_SHOWN} digits"
    text = ascii(value) if isinstance(value, str) else " ".join(repr(value).split())
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _wrong_type(name: str, value: object, wanted: str) -> RequestError:
    return RequestError(f"{name} is a {type(value).__name__} ({shown(value)}); give {wanted}")


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not (isinstance(value, Integral) or (isinstance(value, Real) and _is_whole(value))):
        raise _wrong_type(name, value, "a whole number")
    return int(value)  # type: ignore[call-overload,no-any-return]


def _is_whole(value: Any) -> bool:
    """Whether a number, a fraction of any size too, is a whole one."""
    if isinstance(value, Rational):
        return value.denominator == 1
    return float(value).is_integer()


def _printable(name: str, value: Any) -> int:
    """A whole number that can be printed, and so can what is reckoned from it."""
    number = _whole(name, value)
    if abs(number) >= 10**_MOST_SHOWN:
        raise RequestError(f"{name} = {shown(number)}; give one of less")
    return number


def _side(name: str, value: Any) -> int | None:
    return None if value is None else _whole(name, value)


def _count(name: str, value: Any) -> int:
    count = _printable(name, value)
    if count < 1:
        raise RequestError(f"{name} = {shown(count)}; ask for at least 1")
    return count


def _steps(name: str, value: Any) -> int:
    steps = _whole(name, value)
    if abs(steps) > _MOST_STEPS:  # how many can be had, the scheduler says
        raise RequestError(f"{name} = {shown(steps)}; choose some hundreds at most")
    return steps


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
        raise RequestError(f"{name} = {shown(value)}; choose a number above 0 (the image as it is) and up to 1 (nothing of it)")
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


def _negative(name: str, value: Any) -> str | tuple[str, ...]:
    texts = _texts(name, "" if value is None else value)
    if not texts and not isinstance(texts, str):
        raise RequestError(f"{name} has 0 texts; give one for all prompts, or one for each")
    return texts


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


def _seed(name: str, value: Any) -> int | tuple[int, ...] | None:
    if isinstance(value, list | tuple) and value:
        return tuple(_whole(f"{name}[{number}]", seed) for number, seed in enumerate(value))
    return None if value is None else _whole(name, value)


def _rescale(name: str, value: Any) -> float:
    number = _number(name, value)
    if not 0 <= number <= 1:
        raise RequestError(f"{name} = {shown(value)}; choose a number from 0 (as it is) to 1")
    return number


def _generators(name: str, value: Any) -> torch.Generator | tuple[torch.Generator, ...] | None:
    if value is None or isinstance(value, torch.Generator):
        return value
    if isinstance(value, list | tuple) and value and all(isinstance(each, torch.Generator) for each in value):
        return tuple(value)
    raise _wrong_type(name, value, "a torch.Generator, or a list with one for each picture")


def tensor_fault(value: Any, *, numbers: bool = True) -> str | None:
    """The reason why a value is no plain tensor of floating-point numbers, in words; None where it is one.

    Args:
        value: anything.
        numbers: whether the numbers are looked at, for which a device has to be waited for.
    """
    if not isinstance(value, Tensor):
        return f"is a {type(value).__name__}"
    if not value.is_floating_point() or value.layout != torch.strided or value.is_meta:
        where = f", {value.layout}, on {value.device}"
        return f"is a tensor of {value.dtype} and shape {tuple(value.shape)}{where}"
    if numbers and not bool(value.float().isfinite().all()):
        return "has numbers that are not finite"
    return None


def _tensor(dimensions: str) -> Callable[[str, Any], Tensor | None]:
    def check(name: str, value: Any) -> Tensor | None:
        if value is None:
            return None
        fault = tensor_fault(value)
        if fault is None and (value.ndim != len(dimensions.split()) or not value.numel()):
            fault = f"has shape {tuple(value.shape)}"
        if fault is not None:
            raise RequestError(f"{name} {fault}; give finite floating-point numbers of ({', '.join(dimensions.split())})")
        detached: Tensor = value.detach()
        return detached

    return check


def _one_of(allowed: Sequence[str]) -> Callable[[str, Any], str]:
    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise RequestError(f"{name} = {shown(value)}; choose from: {', '.join(allowed)}")
        return value

    return check


def _skipped(name: str, value: Any) -> int | None:
    count = None if value is None else _printable(name, value)
    if count is not None and count < 0:
        raise RequestError(f"{name} = {shown(count)}; give the number of the text encoder's last layers to leave out, from 0")
    return count


CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "prompt": _prompts,
    "negative_prompt": _negative,
    "steps": _steps,
    "guidance_scale": _guidance,
    "seed": _seed,
    "height": _side,
    "width": _side,
    "num_images": _count,
    "scheduler": _scheduler,
    "plan": _plan,
    "image": _picture,
    "strength": _strength,
    "mask": _picture,
    "allow_nonfinite": _flag,
    "guidance_rescale": _rescale,
    "generator": _generators,
    "latents": _tensor("images channels height width"),
    "prompt_embeds": _tensor("prompts tokens width"),
    "negative_prompt_embeds": _tensor("prompts tokens width"),
    "output_type": _one_of(OUTPUTS),
    "long_prompts": _one_of(LONG_PROMPTS),
    "clip_skip": _skipped,
}
