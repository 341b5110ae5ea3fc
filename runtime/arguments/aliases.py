"""diffusers' names for what a call of ``generate`` asks for, beside our own."""

from collections.abc import Collection, Mapping
from typing import Any

from engines.support.spelling import did_you_mean
from runtime.errors import RequestError

__all__ = ["ALIASES", "with_our_names"]

ALIASES = {"num_inference_steps": "steps", "num_images_per_prompt": "num_images", "mask_image": "mask"}
"""diffusers' name -> ours; all else that ``generate`` takes has the same name in both."""

_REFUSED = {
    "cross_attention_kwargs": "a bundle's attentions are compiled; leave it out",
    "eta": "schedulers are used as their configuration says; leave it out",
    "ip_adapter_image": "a bundle has no image encoder; leave it out",
    "return_dict": "a Generation is returned, whose .images are as in diffusers; leave it out",
    "sigmas": "steps are placed by the scheduler; give steps",
    "timesteps": "steps are placed by the scheduler; give steps",
}


def with_our_names(options: Mapping[str, Any], known: Collection[str], listed: str = "docs/api.md") -> dict[str, Any]:
    """Options with diffusers' names replaced by ours.

    Args:
        options: by name. None, where diffusers has that for what it is not told, means that an option is not given.
        known: the names that there are.
        listed: where whoever gave them finds these.

    Raises:
        RequestError: there is no option of a name, or both names of one thing were given with unlike values.
    """
    found: dict[str, Any] = {}
    for name, value in options.items():
        ours = ALIASES.get(name, name)
        if ours not in known:
            _refuse(name, value, known, listed)
            continue
        if name in ALIASES and value is None:
            continue
        if ours in found and found[ours] is not value and not _alike(found[ours], value):
            both = " and ".join(key for key in options if ALIASES.get(key, key) == ours)
            raise RequestError(
                f"{both} are two names of one thing, and were given {found[ours]!r:.60} and {value!r:.60}; give one"
            )
        found[ours] = value
    return found


def _alike(one: object, other: object) -> bool:
    return type(one) in {int, float, str} and bool(one == other)


def _refuse(name: str, value: object, known: Collection[str], listed: str) -> None:
    if name in _REFUSED:
        if value is None:
            return
        raise RequestError(f"{name} cannot be had: {_REFUSED[name]}")
    raise RequestError(f"generate takes no {name!r:.60}; {did_you_mean(name, [*known, *ALIASES])}{listed} has what it takes")
