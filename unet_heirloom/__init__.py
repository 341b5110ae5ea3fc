"""All public names in one place; each is imported when it is first used. ``python -m unet_heirloom`` has all commands.

The packages behind them, ``exporter``, ``runtime``, ``engines`` and ``tuning``, can be imported as well.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engines import ENGINES, Bundle, BundleError, EngineError, UserError, make_engine
    from exporter import BuildError, BuildOptions, SourceError, build, verify
    from runtime import (
        PRESETS,
        Attachment,
        Generation,
        NonFiniteError,
        Pipeline,
        Plan,
        PlanError,
        Request,
        RequestError,
        Rule,
        UNet,
        UNetRange,
        attach,
        default_bundle,
        find_plan,
        generate,
        load,
    )
    from tuning import RECIPES, Recipe, TuningError, assemble, load_unet, recipe

    __version__: str

__all__ = [
    "ENGINES",
    "PRESETS",
    "RECIPES",
    "Attachment",
    "BuildError",
    "BuildOptions",
    "Bundle",
    "BundleError",
    "EngineError",
    "Generation",
    "NonFiniteError",
    "Pipeline",
    "Plan",
    "PlanError",
    "Recipe",
    "Request",
    "RequestError",
    "Rule",
    "SourceError",
    "TuningError",
    "UNet",
    "UNetRange",
    "UserError",
    "__version__",
    "assemble",
    "attach",
    "build",
    "default_bundle",
    "find_plan",
    "generate",
    "load",
    "load_unet",
    "make_engine",
    "recipe",
    "verify",
]

_HOMES = {
    "engines": ("ENGINES", "Bundle", "BundleError", "EngineError", "UserError", "make_engine"),
    "exporter": ("BuildError", "BuildOptions", "SourceError", "build", "verify"),
    "tuning": ("RECIPES", "Recipe", "TuningError", "assemble", "load_unet", "recipe"),
}
_HOMES_OF = {name: home for home, names in _HOMES.items() for name in names}
"""The package that a public name comes from; those that are not here come from ``runtime``."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'unet_heirloom' has no attribute {name!r}")
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("unet-heirloom")
        except PackageNotFoundError:  # the code is run from a folder that was never installed
            return "unknown"
    return getattr(import_module(_HOMES_OF.get(name, "runtime")), name)


def __dir__() -> list[str]:
    return sorted(__all__)
