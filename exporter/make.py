"""What a build does once it is known that there is something to build."""

import shutil
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from engines import Bundle, BundleError, Manifest, Segment
from engines.bundle.folder import MANIFEST_NAME, describe_file
from engines.bundle.manifest import File
from exporter.build import BuildOptions, versions
from exporter.graph.checkpoint import Checkpoint
from exporter.graph.graph import Graph
from exporter.graph.partition import Granularity, partition
from exporter.segments.artifacts import Artifacts, working_on
from exporter.segments.pool import prepare, write_all
from exporter.segments.progress import Progress
from exporter.segments.writer import Writer
from runtime.plans.plan import Plan, matching
from runtime.plans.presets import find_plan

__all__ = ["DEFAULT_PLANS", "make", "segments_of"]

DEFAULT_PLANS = ("block:2", "deepcache:2")
"""Plans that every bundle is cut for; the number makes no difference to the cuts."""


def segments_of(graph: Graph, granularity: Granularity | None, plans: Sequence[str] = ()) -> tuple[Segment, ...]:
    """The text encoder, the UNet cut for the plans (with a granularity, for the default ones too), and both halves of the VAE.

    Raises:
        PlanError: a plan is unknown, or names a unit that the UNet does not have.
    """
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


def make(options: BuildOptions, key: str, made_from: Mapping[str, Any], progress: Progress) -> None:
    """Make a bundle, or what of it is missing, and put it in its place.

    Args:
        options: what to build.
        key: of the bundle.
        made_from: what all its pieces depend on: weights, variant, precision, versions, code.
        progress: told before every step.

    Raises:
        SourceError: weights cannot be read.
        EngineError: an engine refuses a segment.
        PlanError: a plan to cut for is unknown or names a unit that the UNet does not have.
        BuildError: a size is none that the UNet takes, or another build is at work.
    """
    graph, engines, wanted = prepare(options, made_from)
    bare = segments_of(graph, options.granularity, options.plans)
    with working_on(options.folder) as pieces:
        writer = Writer(graph, engines, wanted, pieces)
        keys = {key for segment in bare for key in writer.keys(segment).values()}
        _reuse_replaced(pieces, options.folder, keys)
        pieces.prune(keys)
        segments = write_all(writer, bare, options, progress)
        files = tuple(_copy_files(graph.parts.checkpoint, pieces.folder))
        manifest = _manifest(options, key, writer, segments, files)
        (pieces.folder / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=1) + "\n", "utf-8")


def _reuse_replaced(pieces: Artifacts, folder: Path, wanted: Container[str]) -> None:
    """What still holds of the bundle that is to be replaced need not be made again."""
    if folder.exists():
        try:
            pieces.reuse_from(Bundle.open(folder), wanted)
        except BundleError:  # it is none, or a damaged one
            return


def _copy_files(checkpoint: Checkpoint, folder: Path) -> Iterator[File]:
    """Copy the tokenizer and the scheduler configuration."""
    for part in ("tokenizer", "scheduler"):
        for path in sorted((checkpoint.folder / part).iterdir()):
            target = folder / part / path.name
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
            yield describe_file(folder, target)


def _manifest(options: BuildOptions, key: str, writer: Writer, segments: Sequence[Segment], files: tuple[File, ...]) -> Manifest:
    graph, made_from = writer.graph, options.made_from
    return Manifest(
        key=key,
        variant=options.variant,
        source=options.source,
        unet=made_from["unet"],
        config=made_from["config"],
        source_sha256=writer.wanted.made_from["source"],
        distilled=graph.parts.checkpoint.is_distilled(options.variant),
        precision=options.precision,
        sizes=tuple(writer.wanted.sizes),
        max_images=options.max_images,
        static=options.static,
        granularity=options.granularity,
        plans=options.plans,
        latent_channels=graph.latent_channels,
        vae_scale=graph.vae_scale,
        size_multiple=graph.size_multiple,
        guidance_scale=graph.parts.checkpoint.guidance_scale,
        text_length=graph.text_length,
        vocabulary=graph.vocabulary,
        features=dict(graph.features),
        units=graph.units,
        segments=tuple(segments),
        files=files,
        made_with=versions(),
    )
