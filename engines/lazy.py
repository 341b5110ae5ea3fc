"""Late imports: a package's public names, and modules that others import at their head but hardly ever use.

A command's ``--help`` waits for no library, and a picture for none that it does not take.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

__all__ = ["lazy_names", "postponed"]


def lazy_names(package: str, homes: Mapping[str, Sequence[str]]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package whose public names are imported when they are first used (PEP 562).

    Args:
        package: its name.
        homes: by module, the names that come from there.
    """
    home_of = {name: home for home, names in homes.items() for name in names}

    def get(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(home_of[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return get, lambda: sorted({*vars(sys.modules[package]), *home_of})


@contextmanager
def postponed(name: str, *functions: str) -> Iterator[None]:
    """Inside, an import of that module gives a stand-in, which imports the real module when an attribute of it is first read.

    Args:
        name: of the module. Its package is imported as it is.
        functions: functions that are imported from it by name. They are stand-ins too, whose call imports the real module.
    """
    spec = None if name in sys.modules else _found(name)
    if spec is None:
        yield
        return
    module = sys.modules[name] = _Postponed(name)
    if spec.submodule_search_locations is not None:
        module.__path__ = spec.submodule_search_locations  # looked for by the import of any name from a package
    for function in functions:
        setattr(module, function, _calling(name, function))
    try:
        yield
    finally:
        _drop(module)


def _found(name: str) -> ModuleSpec | None:
    """Where a module is; None where it is missing, or the package that it lies in."""
    try:
        return find_spec(name)
    except ModuleNotFoundError:
        return None


class _Postponed(ModuleType):
    """A module that is imported when it is first read from."""

    def __getattr__(self, attribute: str) -> Any:
        if attribute in {"__file__", "__wrapped__"}:  # asked by tools that look through all modules
            raise AttributeError(attribute)
        _drop(self)
        return getattr(import_module(self.__name__), attribute)


def _drop(module: ModuleType) -> None:
    if sys.modules.get(module.__name__) is module:
        del sys.modules[module.__name__]


def _calling(name: str, function: str) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        return getattr(import_module(name), function)(*args, **options)

    return call
