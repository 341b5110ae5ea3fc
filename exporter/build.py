"""Build a bundle: trace every segment, compile it for every engine, and name all of it in a manifest.

A bundle takes its place whole or not at all. A build that was stopped is gone on with by the same command: finished pieces are
kept under hashes of what they are made from (see ``exporter.segments.artifacts``), and a bundle that is replaced hands on those
that still hold.

What is imported here is light, so that a bundle that is up to date is soon found to be: diffusers alone takes seconds.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from engines import ENGINES, Bundle, BundleError, Engine, make_engine
from engines.bundle.folder import MANIFEST_NAME, sha256
from engines.bundle.manifest import MANIFEST_VERSION, Precision, Variant
from exporter.errors import BuildError
from exporter.graph.partition import GRANULARITIES, Granularity
from exporter.segments.artifacts import key_of
from exporter.segments.digests import Digests
from exporter.segments.progress import Progress, Step

__all__ = ["DIGESTS", "PRECISIONS", "BuildOptions", "build", "targets_of", "versions"]

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16")
DIGESTS = ".digests.json"
"""In a bundle: what a later build need not hash again. It belongs to the machine, not to the bundle."""
_CODE = {
    "exporter": ("build", "make", "graph/*", "segments/pool", "segments/precision", "segments/trace", "segments/writer"),
    "engines": ("bundle/manifest", "bundle/shapes", "ort/*", "tensorrt/engine", "torch_program"),
    "runtime": ("plans/demand", "plans/key_steps", "plans/plan", "plans/presets"),
    "tuning": ("checkpoints/*", "surgery/*"),
}
_VERSIONED = ("unet-heirloom", "torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript")


@dataclass(frozen=True)
class BuildOptions:
    """What to build.

    Without a ``granularity``, segments are as large as ``plans`` allow. ``unet`` is the folder of the
    variant's UNet, where the source does not hold it; ``config`` the folder of configurations, where a source has none and is of
    no usual shape. ``sizes`` are (height, width) in pixels, none for the model's own; ``max_images`` is per call; ``static``
    engines take nothing less either. ``jobs`` processes work side by side.
    """

    variant: Variant = "original"
    source: str = "mini"
    unet: Path | None = None
    config: Path | None = None
    engines: tuple[str, ...] = ("onnxruntime",)
    granularity: Granularity | None = "block"
    plans: tuple[str, ...] = ()
    precision: Precision = "fp32"
    sizes: tuple[tuple[int, int], ...] = ()
    max_images: int = 4
    static: bool = False
    targets: tuple[str, ...] = ()
    out: Path | None = None
    force: bool = False
    jobs: int = 1

    @property
    def folder(self) -> Path:
        """Where the bundle goes: ``out``, or a name under ``bundles`` made from source and variant."""
        kind, _, name = self.source.rpartition(":")
        parts = (kind, Path(name).name.removesuffix(".safetensors").removesuffix(".json"), self.variant)
        return self.out or Path("bundles") / "-".join(re.sub(r"[^\w.]+", "-", part) for part in parts if part)

    @property
    def made_from(self) -> dict[str, object]:
        """What of it decides what is in the bundle, in JSON's terms."""
        options = asdict(self)
        for name in ("out", "force", "jobs"):
            del options[name]
        options |= {name: None if options[name] is None else str(options[name]) for name in ("unet", "config")}
        return options | {"plans": [sha256(Path(plan)) if Path(plan).is_file() else plan for plan in self.plans]}


def build(options: BuildOptions, progress: Progress = lambda step: None) -> tuple[Bundle, bool]:
    """Build a bundle, unless the one in its place was made from the very same things.

    Returns:
        The bundle, and whether it had to be built.

    Raises:
        BuildError: something else is in its place, another build is at work there, or an option is not one of those allowed.
        SourceError: the weights cannot be found or read.
        EngineError: an engine is unknown, not installed, or refuses a segment or a target.
        PlanError: a plan to cut for is unknown or names a unit that the UNet does not have.
    """
    from exporter.graph.checkpoint import open_source

    _check_choices(options)
    checkpoint = open_source(options.source, options.variant, options.unet, options.config)
    engines = [make_engine(name) for name in dict.fromkeys(options.engines)]
    _check_static(options, engines)
    asked = {"engines": {engine.name: engine.version() for engine in engines}, "targets": targets_of(options, engines)}
    progress(Step(0, None, "", "reading the source"))
    digests = Digests.load(options.folder / DIGESTS)
    source = checkpoint.fingerprint(options.variant, digests)
    code = {"versions": versions(), "code": _own_code(), "manifest": MANIFEST_VERSION}
    key = key_of({**options.made_from, **asked, **code, "source_sha256": source})
    existing = _existing(options, key, digests)
    if existing is not None:
        return existing, False

    from exporter.make import make

    made_from = {**code, "source": source, "variant": options.variant, "precision": options.precision}
    make(options, key, made_from, progress)
    bundle = Bundle.open(options.folder)
    for file in bundle.manifest.all_files:
        digests.note(bundle.folder / file.path, file.sha256)
    digests.save(bundle.folder / DIGESTS)
    return bundle, True


def versions() -> dict[str, str]:
    """Versions of the programs that make a bundle."""
    return {name: version(name) for name in _VERSIONED}


def _check_choices(options: BuildOptions) -> None:
    if options.granularity is None and not options.plans:
        raise BuildError("no granularity and no plan: name a plan to cut for, or a granularity")
    if options.granularity is not None and options.granularity not in GRANULARITIES:
        raise BuildError(f"unknown granularity {options.granularity!r}; choose from: {', '.join(GRANULARITIES)}")
    if options.precision not in PRECISIONS:
        raise BuildError(f"unknown precision {options.precision!r}; choose from: {', '.join(PRECISIONS)}")
    if not options.engines:
        raise BuildError(f"no engine is named; choose from: {', '.join(ENGINES)}")
    if options.jobs < 1:
        raise BuildError(f"jobs {options.jobs}: at least 1 process must do the work")
    if options.max_images < 1:
        raise BuildError(f"batch {options.max_images}: a bundle must take at least 1 image")


def _check_static(options: BuildOptions, engines: Sequence[Engine]) -> None:
    if not options.static:
        return
    if len(options.sizes) > 1:
        sizes = ", ".join(f"{height}x{width}" for height, width in options.sizes)
        raise BuildError(f"sizes {sizes}: static engines are built for one size; name one, or leave --static out")
    if not any(engine.has_profile for engine in engines):
        raise BuildError(
            f"static: engine {', '.join(options.engines)} is built for no sizes; add tensorrt or tensorrt-rtx with --engine, "
            "or leave --static out"
        )


def targets_of(options: BuildOptions, engines: Sequence[Engine]) -> dict[str, tuple[str, ...]]:
    """The compute capabilities that each engine is to build for, by its name.

    Raises:
        BuildError: targets are named, but no engine takes any.
        EngineError: a target is unknown to its engine.
    """
    if options.targets and not any(engine.has_profile for engine in engines):
        raise BuildError(
            f"targets {', '.join(options.targets)}: engine {', '.join(options.engines)} takes none; leave --targets out"
        )
    return {engine.name: engine.check_targets(options.targets if engine.has_profile else ()) for engine in engines}


def _own_code() -> str:
    """A hash of the code that decides what is in a bundle: one made by an older checkout is not taken for a new one."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parents[1]
    for package, modules in _CODE.items():
        for module in modules:
            for path in sorted((root / package).glob(f"{module}.py")):
                digest.update(path.read_bytes())
    return digest.hexdigest()


def _existing(options: BuildOptions, key: str, digests: Digests) -> Bundle | None:
    """The bundle in place, if it is whole and made from the same things; None if a new one may take the place."""
    folder = options.folder
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not (folder / MANIFEST_NAME).is_file():
        raise BuildError(f"{folder} exists and is no bundle, so it is kept, also with --force; choose another --out")
    try:
        bundle = Bundle.open(folder)
        bundle.check(digests)
    except BundleError as error:
        if options.force:
            return None
        raise BuildError(f"{folder} exists and is kept ({error}); choose --force or another --out") from error
    if bundle.manifest.key != key:
        if options.force:
            return None
        raise BuildError(
            f"{folder} exists and is kept (a bundle made from other weights, options or versions); "
            "replace it with --force, or choose another --out"
        )
    return bundle
