"""Build a bundle: trace every segment, compile it for every engine, and name all of it in a manifest.

A bundle appears at its path whole or not at all. A build that was stopped is resumed by the same command: finished pieces are
kept under hashes of what they are made from (see ``exporter.segments.artifacts``), and those of other bundles that
this machine has built are reused where they are still valid.

What is imported here is light, so that a bundle that is up to date is soon found to be: diffusers alone takes seconds.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from engines import Bundle, BundleError, Manifest, Segment
from engines.bundle.checks import ManifestError, check_complete, check_manifest
from engines.bundle.digests import known_sha256, note_sha256
from engines.bundle.folder import MANIFEST_NAME, describe_file
from engines.bundle.manifest import File, FusedLora
from engines.bundle.shapes import size_fault
from exporter.errors import BuildError
from exporter.job import BuildJob, open_writer
from exporter.options import BuildOptions, versions
from exporter.segments import artifact_index
from exporter.segments.artifacts import tidy, working_on
from exporter.segments.progress import Progress
from runtime.plans.plan import inherited_features
from runtime.plans.presets import find_plan

if TYPE_CHECKING:
    from exporter.graph.graph import Graph

__all__ = ["build"]


def build(options: BuildOptions, progress: Progress = lambda step: None) -> tuple[Bundle, bool]:
    """Build a bundle, unless the one at its path was made from the very same things.

    Returns:
        The bundle, and whether it had to be built.

    Raises:
        BuildError: something else is at its path, another build is at work there, or an option is not one of those allowed.
        SourceError: the weights cannot be found or read.
        EngineError: an engine is unknown, not installed, or refuses a segment or a target.
        PlanError: a plan to partition for is unknown or names a unit that the UNet does not have.
    """
    tidy(options.folder)
    job = BuildJob.resolve(options, progress)
    existing = _existing(options, job.key)
    if existing is not None:
        return existing, False
    _make(job, progress)
    bundle = Bundle.open(options.folder)
    artifact_index.note(bundle)
    for file in bundle.manifest.all_files:
        note_sha256(bundle.folder / file.path, file.sha256)
    return bundle, True


def _existing(options: BuildOptions, key: str) -> Bundle | None:
    """The bundle at its path, if it is whole and made from the same things; None if a new one may replace it."""
    folder = options.folder
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not (folder / MANIFEST_NAME).is_file():
        raise BuildError(f"{folder} exists and is no bundle, so it is kept, also with --force; choose another --out")
    try:
        bundle = Bundle.open(folder)
        bundle.check(known_sha256)
    except BundleError as error:
        if options.force:
            return None
        raise BuildError(f"{folder} exists and is kept ({error}); choose --force or another --out") from error
    if bundle.manifest.key != key:
        _check_against(options, bundle.manifest)
        if options.force:
            return None
        raise BuildError(
            f"{folder} exists and is kept (a bundle made from other weights, options or versions); "
            "replace it with --force, or choose another --out"
        )
    return bundle


def _check_against(options: BuildOptions, manifest: Manifest) -> None:
    """Raise BuildError or PlanError for a mistake that the bundle in place shows, which a new one would not mend."""
    if (options.source, options.variant) != (manifest.source, manifest.variant):
        return
    for size in options.sizes:
        if fault := size_fault(size, manifest.size_multiple):
            raise BuildError(f"size {fault}")
    for plan in options.plans:
        inherited_features(find_plan(plan), manifest.unet_units, manifest.variant)


def _make(job: BuildJob, progress: Progress) -> None:
    """Make a bundle, or its missing pieces, and move it to its path. Raises as ``build`` does."""
    from exporter.graph.segmentation import segments_of
    from exporter.segments.pool import write_all

    options = job.options
    with working_on(options.folder) as pieces:
        writer = job.writer(pieces)
        bare = segments_of(writer.graph, options.granularity, options.plans)
        _check_result(_manifest(job, writer.graph, writer.spec.sizes, bare, ()))
        keys = {key for segment in bare for key in writer.keys(segment).values()}
        if not options.fresh:
            artifact_index.reuse(pieces, keys, options.folder)
        pieces.prune(keys)
        reopen = partial(open_writer, options, job.made_from, pieces.hidden)
        segments = write_all(writer, bare, progress, options.jobs, reopen)
        files = tuple(_copy_files(job, pieces.folder))
        manifest = _manifest(job, writer.graph, writer.spec.sizes, segments, files)
        (pieces.folder / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=1) + "\n", "utf-8")


def _check_result(manifest: Manifest) -> None:
    """Raise BuildError, before anything is traced, for a bundle that nobody could open."""
    try:
        check_manifest(manifest)
        check_complete(manifest)
    except ManifestError as error:
        raise BuildError(f"no bundle can be built so: {error}") from error


def _copy_files(job: BuildJob, folder: Path) -> Iterator[File]:
    """Write the files of tokenizer and scheduler that a bundle gets."""
    for name, content in job.checkpoint.settings().items():
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(content)
        yield describe_file(folder, target)


def _manifest(
    job: BuildJob, graph: "Graph", sizes: Sequence[tuple[int, int]], segments: Sequence[Segment], files: tuple[File, ...]
) -> Manifest:
    options, made_from, checkpoint = job.options, job.options.made_from, job.checkpoint
    return Manifest(
        key=job.key,
        variant=options.variant,
        source=options.source,
        unet=made_from["unet"],
        recipe=made_from["recipe"],
        config=made_from["config"],
        variant_files=options.variant_files,
        vae=options.vae,
        loras=tuple(
            FusedLora(file=str(lora.path), scale=lora.scale, sha256=digest)
            for lora, digest in zip(options.loras, job.made_from["loras"], strict=True)
        ),
        notes=tuple(checkpoint.notes(options.variant)),
        source_sha256=job.made_from["source"],
        distilled=checkpoint.is_distilled(options.variant),
        precision=options.precision,
        vae_precision=None if options.vae_precision == options.precision else options.vae_precision,
        sizes=tuple(sizes),
        max_images=options.max_images,
        vae_images=1,
        static=options.static,
        granularity=options.granularity,
        plans=options.plans,
        latent_channels=graph.latent_channels,
        vae_scale=graph.vae_scale,
        size_multiple=graph.size_multiple,
        guidance_scale=checkpoint.guidance_scale,
        text_length=graph.text_length,
        text_chunks=options.text_chunks,
        clip_skip=options.clip_skip,
        vocabulary=graph.vocabulary,
        features=dict(graph.features),
        units=graph.units,
        segments=tuple(segments),
        files=files,
        made_with=versions(),
    )
