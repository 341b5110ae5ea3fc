"""A build, resolved: the source opened, the engines made, the targets checked; once for all that works on it."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines import Engine, make_engine
from engines.bundle.digests import known_sha256
from engines.bundle.manifest import MANIFEST_VERSION
from exporter.options import BuildOptions, check_choices, check_precision, check_static, targets_of, versions
from exporter.segments.artifacts import key_of
from exporter.segments.progress import Progress, Step
from runtime.plans.presets import find_plan

if TYPE_CHECKING:
    from exporter.graph.checkpoint import Checkpoint
    from exporter.segments.artifacts import Artifacts
    from exporter.segments.writer import Writer

__all__ = ["CODE", "BuildJob", "open_writer"]

CODE = {
    "engines": (
        "bundle/manifest",
        "bundle/names",
        "bundle/shapes",
        "ort/*",
        "pt2",
        "tensorrt/compiling",
        "tensorrt/engine",
        "torch_program",
    ),
    "exporter": (
        "build",
        "graph/*",
        "job",
        "options",
        "segments/precision",
        "segments/quick_export",
        "segments/trace",
        "segments/writer",
    ),
    "runtime": ("plans/demand", "plans/key_steps", "plans/plan", "plans/presets", "plans/words"),
    "tuning": ("checkpoints/*", "loras/*", "surgery/*"),
}
"""The files that decide what a bundle holds. A test compares them with what the build imports."""


@dataclass(frozen=True)
class BuildJob:
    """A build with everything resolved: options, checkpoint, engines and targets.

    ``targets`` are the compute capabilities by the name of the engine that builds for them; ``made_from`` is what all pieces of
    the bundle depend on: weights, variant, versions, code. Of it ``source`` is a hash of all weights, ``loras`` those of what is
    fused into them, ``parts`` those of UNet, text encoder and VAE without that.
    """

    options: BuildOptions
    checkpoint: "Checkpoint"
    engines: tuple[Engine, ...]
    targets: Mapping[str, tuple[str, ...]]
    made_from: Mapping[str, Any]

    @classmethod
    def resolve(cls, options: BuildOptions, progress: Progress) -> "BuildJob":
        """Open the source, make the engines and check the options.

        Raises:
            BuildError: an option is not one of those allowed.
            SourceError: the weights cannot be found or read.
            EngineError: an engine is unknown or not installed, or a target is unknown to it.
        """
        from exporter.graph.checkpoint import MODELS

        check_choices(options)
        checkpoint = _checkpoint(options)
        engines = tuple(make_engine(name) for name in dict.fromkeys(options.engines))
        check_static(options, engines)
        check_precision(options, engines)
        targets = targets_of(options, engines)
        progress(Step(0, None, "", "reading the source"))
        made_from = {
            "versions": versions(),
            "code": _own_code(),
            "manifest": MANIFEST_VERSION,
            "source": checkpoint.fingerprint(options.variant, known_sha256),
            "loras": [known_sha256(lora.path) for lora in options.loras],
            "parts": {part: checkpoint.fingerprint(options.variant, known_sha256, {part}) for part in MODELS},
            "variant": options.variant,
        }
        return cls(options, checkpoint, engines, targets, made_from)

    @property
    def key(self) -> str:
        """Hash of everything the bundle is made from: an equal key means that a new build would make the same bundle."""
        made_by = {"engines": {engine.name: engine.version() for engine in self.engines}, "targets": self.targets}
        return key_of({**self.options.made_from, **made_by, "made_from": self.made_from})

    def writer(self, pieces: "Artifacts") -> "Writer":
        """Return the writer of the bundle's segments; all that can be checked before anything is written is checked here.

        Raises:
            SourceError: the source cannot be read, is damaged, or its parts do not fit together.
            BuildError: a size is none that the UNet takes.
        """
        from exporter.graph.graph import DTYPE, check_size, load_graph
        from exporter.segments.writer import CompileSpec, Writer

        options = self.options
        self.checkpoint.check_weights(options.variant)
        first = options.sizes[0] if options.sizes else None
        precision, vae_precision = options.precision, options.vae_precision or options.precision
        dtypes = DTYPE[precision], DTYPE[vae_precision]
        plans = [find_plan(plan) for plan in options.plans]
        graph = load_graph(self.checkpoint, options.variant, dtypes[0], first, dtypes[1], options.clip_skip, plans)
        sizes = options.sizes or (graph.size,)
        for size in sizes:
            check_size(size, graph.size_multiple)
        spec = CompileSpec(
            self.made_from, self.targets, sizes, options.max_images, precision, vae_precision, options.static, options.text_chunks
        )
        return Writer(graph, self.engines, spec, pieces)


def open_writer(options: BuildOptions, made_from: Mapping[str, Any], folder: Path) -> "Writer":
    """The writer of a build that another process has begun in ``folder``: it hashes nothing again."""
    from exporter.segments.artifacts import Artifacts

    engines = tuple(make_engine(name) for name in dict.fromkeys(options.engines))
    return BuildJob(options, _checkpoint(options), engines, targets_of(options, engines), made_from).writer(Artifacts(folder))


def _checkpoint(options: BuildOptions) -> "Checkpoint":
    from exporter.graph.checkpoint import open_source

    return open_source(
        options.source, options.variant, options.unet, options.config, options.variant_files, options.recipe, options.loras,
        options.vae,
    )  # fmt: skip


@cache
def _own_code() -> str:
    """A hash of the code that decides what is in a bundle: one made by an older checkout is not taken for a new one."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parents[1]
    for package, modules in CODE.items():
        for module in modules:
            for path in sorted((root / package).glob(f"{module}.py")):
                digest.update(path.read_bytes())
    return digest.hexdigest()
