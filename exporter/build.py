"""Build a bundle: trace every segment, compile it for every engine, and name all of it in a manifest.

Everything is written into a temporary folder beside the bundle's place, which is renamed at the end: a bundle is there whole or
not at all.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from engines import ENGINES, Bundle, BundleError, Engine, Manifest, Segment, make_engine
from engines.bundle import MANIFEST_NAME, describe_file, sha256
from engines.manifest import MANIFEST_VERSION, File, Precision, Variant
from engines.replacing import replacing
from exporter.errors import BuildError
from exporter.graph import Graph, check_size, load_graph
from exporter.partition import GRANULARITIES, Granularity, partition
from exporter.sources import Checkpoint, open_source
from exporter.trace import OPSET
from exporter.write import Progress, write_segments
from runtime.plan import Plan, matching
from runtime.presets import find_plan

__all__ = ["DEFAULT_PLANS", "DTYPE", "BuildOptions", "build", "segments_of"]

DEFAULT_PLANS = ("block:2", "deepcache:2")
"""Plans that every bundle is cut for; the number makes no difference to the cuts."""
DTYPE: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}
_CODE = {
    "exporter": ("build", "condconv", "graph", "measure", "partition", "sources", "topology", "trace", "units", "write"),
    "engines": ("manifest", "shapes", "tensor_rt", "torch_program"),
    "runtime": ("demand", "modes", "plan", "presets"),
    "tuning": ("assembly", "changes", "condconv", "experts", "folder", "kept", "recipes", "sources", "units"),
}
_VERSIONED = ("unet-heirloom", "torch", "diffusers", "transformers", "onnx", "onnxscript")


@dataclass(frozen=True)
class BuildOptions:
    """What to build.

    Without a ``granularity``, segments are as large as ``plans`` allow. ``unet`` is the folder of the
    variant's UNet, where the source does not hold it. ``sizes`` are (height, width) in pixels, none for the
    model's own; ``max_images`` is per call.
    """

    variant: Variant = "original"
    source: str = "mini"
    unet: Path | None = None
    engines: tuple[str, ...] = ("onnxruntime",)
    granularity: Granularity | None = "block"
    plans: tuple[str, ...] = ()
    precision: Precision = "fp32"
    sizes: tuple[tuple[int, int], ...] = ()
    max_images: int = 4
    targets: tuple[str, ...] = ()
    out: Path | None = None
    force: bool = False

    @property
    def folder(self) -> Path:
        """Where the bundle goes: ``out``, or a name under ``bundles`` made from source and variant."""
        return self.out or Path("bundles") / f"{Path(self.source).name}-{self.variant}"


def build(options: BuildOptions, progress: Progress = lambda done, total, what: None) -> tuple[Bundle, bool]:
    """Build a bundle, unless the one in its place was made from the very same things.

    Returns:
        The bundle, and whether it had to be built.

    Raises:
        BuildError: something else is in its place, or an option is not one of those allowed.
        SourceError: the weights cannot be found or read.
        EngineError: an engine is unknown, not installed, or refuses a segment or a target.
        PlanError: a plan to cut for is unknown or names a unit that the UNet does not have.
    """
    _check_choices(options)
    checkpoint = open_source(options.source, options.variant, options.unet)
    engines = [make_engine(name) for name in dict.fromkeys(options.engines)]
    if options.targets and not any(engine.has_profile for engine in engines):
        raise BuildError(
            f"targets {', '.join(options.targets)}: engine {', '.join(options.engines)} takes none; leave --targets out"
        )
    targets = {engine.name: engine.check_targets(options.targets if engine.has_profile else ()) for engine in engines}
    fingerprint = checkpoint.fingerprint(options.variant)
    key = _key(options, fingerprint, engines, targets)
    existing = _existing(options, key)
    if existing is not None:
        return existing, False
    graph = load_graph(checkpoint, options.variant, DTYPE[options.precision], options.sizes[0] if options.sizes else None)
    sizes = options.sizes or (graph.size,)
    for size in sizes:
        check_size(size, graph.size_multiple)
    bare = segments_of(graph, options.granularity, options.plans)
    with replacing(options.folder) as folder:
        segments = write_segments(folder, graph, bare, engines, targets, sizes, options.max_images, progress)
        files = tuple(_copy_files(checkpoint, folder))
        manifest = _manifest(options, checkpoint, key, fingerprint, graph, sizes, segments, files)
        (folder / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=1) + "\n", "utf-8")
    return Bundle.open(options.folder), True


def segments_of(graph: Graph, granularity: Granularity | None, plans: Sequence[str] = ()) -> tuple[Segment, ...]:
    """The text encoder, the UNet cut for the plans (with a granularity, for the default ones too), and both halves of the VAE."""
    wanted = [find_plan(plan) for plan in plans]
    if granularity is not None:
        names = [unit.name for unit in graph.unet_units]
        wanted += [plan for plan in map(find_plan, DEFAULT_PLANS) if _fits(plan, names)]
    ends = [u for u in graph.units if u not in graph.unet_units]
    text, *vae = (Segment(name=u.name, units=(u.name,), inputs=u.inputs, outputs=u.outputs) for u in ends)
    return (text, *partition(graph.unet_units, granularity, wanted), *vae)


def _fits(plan: Plan, units: Sequence[str]) -> bool:
    """Whether a UNet has what a plan inherits: one that is too small for a default plan is not cut for it."""
    return all(matching(pattern, units) for rule in plan.rules for pattern in rule.units)


def _check_choices(options: BuildOptions) -> None:
    if options.granularity is None and not options.plans:
        raise BuildError("no granularity and no plan: name a plan to cut for, or a granularity")
    if options.granularity is not None and options.granularity not in GRANULARITIES:
        raise BuildError(f"unknown granularity {options.granularity!r}; choose from: {', '.join(GRANULARITIES)}")
    if options.precision not in DTYPE:
        raise BuildError(f"unknown precision {options.precision!r}; choose from: {', '.join(DTYPE)}")
    if not options.engines:
        raise BuildError(f"no engine is named; choose from: {', '.join(ENGINES)}")
    if options.max_images < 1:
        raise BuildError(f"batch {options.max_images}: a bundle must take at least 1 image")


def _key(options: BuildOptions, fingerprint: str, engines: Sequence[Engine], targets: dict[str, tuple[str, ...]]) -> str:
    """A hash of everything the bundle's content depends on."""
    inputs = asdict(options) | {"out": None, "force": None, "targets": targets, "unet": _text(options.unet)}
    inputs["plans"] = [sha256(Path(plan)) if Path(plan).is_file() else plan for plan in options.plans]
    inputs["engines"] = {engine.name: engine.version() for engine in engines}
    made_from = [inputs, fingerprint, _versions(), _own_code(), MANIFEST_VERSION, OPSET]
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _own_code() -> str:
    """A hash of the code that decides what is in a bundle: one made by an older checkout is not taken for a new one."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parents[1]
    for package, modules in _CODE.items():
        for module in modules:
            digest.update((root / package / f"{module}.py").read_bytes())
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    return {name: version(name) for name in _VERSIONED}


def _existing(options: BuildOptions, key: str) -> Bundle | None:
    """The bundle in place, if it is whole and made from the same things; None if a new one may take the place."""
    folder = options.folder
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not (folder / MANIFEST_NAME).is_file():
        raise BuildError(f"{folder} exists and is no bundle, so it is kept, also with --force; choose another --out")
    try:
        bundle = Bundle.open(folder)
        bundle.check()
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


def _copy_files(checkpoint: Checkpoint, folder: Path) -> Iterator[File]:
    """Copy the tokenizer and the scheduler configuration."""
    for part in ("tokenizer", "scheduler"):
        for path in sorted((checkpoint.folder / part).iterdir()):
            target = folder / part / path.name
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
            yield describe_file(folder, target)


def _manifest(
    options: BuildOptions, checkpoint: Checkpoint, key: str, fingerprint: str, graph: Graph, sizes: Sequence[tuple[int, int]],
    segments: Sequence[Segment], files: tuple[File, ...],
) -> Manifest:  # fmt: skip
    return Manifest(
        key=key,
        variant=options.variant,
        source=options.source,
        unet=_text(options.unet),
        source_sha256=fingerprint,
        precision=options.precision,
        sizes=tuple(sizes),
        max_images=options.max_images,
        latent_channels=graph.latent_channels,
        vae_scale=graph.vae_scale,
        size_multiple=graph.size_multiple,
        guidance_scale=checkpoint.guidance_scale,
        text_length=graph.text_length,
        vocabulary=graph.vocabulary,
        features=dict(graph.features),
        units=graph.units,
        segments=tuple(segments),
        files=files,
        made_with=_versions(),
    )
