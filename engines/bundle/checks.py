"""A manifest that was read is not believed until it is checked: numbers, names, references, order. Once, when a bundle is opened.

A bundle may come from anybody. What passes here needs no guard further down: every size can be computed with, every name refers
to something, segments can run in the order in which they stand, and nothing is so large that looking at it takes long.
"""

import math
import re
from collections.abc import Iterable

from engines.bundle.manifest import Feature, File, Manifest, Segment
from engines.bundle.names import IMAGE, LATENTS, NOISE, OUTSIDE, SAMPLE, TEXT, TIMESTEP, TOKENS, VAE_DECODER, VAE_ENCODER
from engines.bundle.shapes import Dim, Shape, is_dim, resolve, size_fault

__all__ = ["LARGEST_MANIFEST", "ManifestError", "check_complete", "check_manifest"]

LARGEST_MANIFEST = 1 << 24
"""Bytes. A manifest of Stable Diffusion with each unit in a segment of its own has 300,000."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MOST = 4096
"""Units, segments, or features: Stable Diffusion has some 300."""
_GRANULARITIES = frozenset({None, "block", "layer", "unit"})
_LARGEST_SETTING = 1 << 26
"""Bytes of a file of tokenizer or scheduler, all of which is read into memory: CLIP's largest has 4 MB."""
_LONGEST_TEXT = 4096
"""Characters of a text that is there to be read, such as where a source was found."""
_LARGEST_DIM = 1 << 20
_MOST_DIMS = 8
_MOST_ELEMENTS = 1 << 29
"""Of one feature of two rows at the bundle's first size: 2 GiB in float32."""
_MOST_PIXELS = 1 << 24
_SIZES = ("batch", "images", "height", "width", "tokens")
_INPUTS = frozenset({TOKENS, SAMPLE, TIMESTEP, LATENTS, IMAGE})
_LIMITS = {
    "max_images": 1024, "latent_channels": 1024, "vae_scale": 1024, "size_multiple": 8192, "text_length": 4096,
    "text_chunks": 1024, "vocabulary": 1 << 24,
}  # fmt: skip
"""The largest values; the least is 1."""
_MOST_SKIPPED = 1024


class ManifestError(ValueError):
    """The manifest says what cannot be; the message names the field."""


def check_manifest(manifest: Manifest) -> None:
    """Check that a manifest's parts fit together.

    Raises:
        ManifestError: they do not.
    """
    _check_numbers(manifest)
    _check_texts(manifest)
    _check_files(manifest)
    _check_names(manifest)
    _check_features(manifest)
    _check_units(manifest)
    _check_segments(manifest)


def _check_numbers(manifest: Manifest) -> None:
    for field, largest in _LIMITS.items():
        if not 1 <= getattr(manifest, field) <= largest:
            raise ManifestError(f"{field} is {_short(getattr(manifest, field))}, expected 1 to {largest}")
    if manifest.vae_images is not None and not 1 <= manifest.vae_images <= _LIMITS["max_images"]:
        raise ManifestError(f"vae_images is {_short(manifest.vae_images)}, expected 1 to {_LIMITS['max_images']}")
    if not 0 <= manifest.clip_skip <= _MOST_SKIPPED:
        raise ManifestError(f"clip_skip is {_short(manifest.clip_skip)}, expected 0 to {_MOST_SKIPPED}")
    if not (math.isfinite(manifest.guidance_scale) and abs(manifest.guidance_scale) <= 1000):
        raise ManifestError(f"guidance_scale is {manifest.guidance_scale}, expected -1000 to 1000")
    if manifest.size_multiple % manifest.vae_scale:
        raise ManifestError(f"size_multiple is {manifest.size_multiple}, expected a multiple of vae_scale = {manifest.vae_scale}")
    if not 1 <= len(manifest.sizes) <= _MOST:
        raise ManifestError(f"sizes has {len(manifest.sizes)} entries, expected 1 to {_MOST}")
    if not all(math.isfinite(lora.scale) for lora in manifest.loras):
        raise ManifestError("loras has a scale that is no finite number")
    for height, width in manifest.sizes:
        if height * width > _MOST_PIXELS or size_fault((height, width), manifest.size_multiple):
            raise ManifestError(
                f"sizes has {_short(height)}x{_short(width)}, expected multiples of {manifest.size_multiple} and at most "
                f"{_MOST_PIXELS} pixels"
            )


def _check_texts(manifest: Manifest) -> None:
    for field in ("key", "source_sha256"):
        if not _DIGEST.fullmatch(getattr(manifest, field)):
            raise ManifestError(f"{field} is {_short(getattr(manifest, field))!r}, expected a hash of 64 letters")
    if manifest.granularity not in _GRANULARITIES:
        raise ManifestError(f"granularity is {_short(manifest.granularity)!r}, expected block, layer or unit")
    texts = {field: [value] for field, value in manifest if isinstance(value, str)}
    texts |= {
        "plans": [*manifest.plans], "notes": [*manifest.notes],
        "loras": [text for lora in manifest.loras for text in (lora.file, lora.sha256)],
        "made_with": [text for pair in manifest.made_with.items() for text in pair],
    }  # fmt: skip
    for field, found in texts.items():
        if len(found) > _MOST or not all(len(text) <= _LONGEST_TEXT and text.isprintable() for text in found):
            raise ManifestError(f"{field} is not one line of at most {_LONGEST_TEXT} characters")


def _check_files(manifest: Manifest) -> None:
    known: dict[str, File] = {}
    for file in manifest.all_files:
        if not file.path.isprintable() or len(file.path) > _LONGEST_TEXT or file.path == "manifest.json":
            raise ManifestError(f"path {_short(file.path)!r} is not allowed for a file of a bundle")
        if not _DIGEST.fullmatch(file.sha256) or not 0 <= file.bytes < 1 << 50:
            raise ManifestError(f"the hash or size of {file.path} is not valid")
        if known.setdefault(file.path, file) != file:
            raise ManifestError(f"{file.path} is listed twice, with different hashes or sizes")
    for file in manifest.files:
        if file.bytes > _LARGEST_SETTING:
            raise ManifestError(f"{file.path} has {file.bytes} bytes, expected at most {_LARGEST_SETTING}")
    if len(known) > 16 * _MOST:
        raise ManifestError(f"{len(known)} files are listed, expected at most {16 * _MOST}")


def _check_names(manifest: Manifest) -> None:
    units, segments = ([entry.name for entry in entries] for entries in (manifest.units, manifest.segments))
    for field, names in {"features": list(manifest.features), "units": units, "segments": segments}.items():
        if not 1 <= len(names) <= _MOST:
            raise ManifestError(f"{field} has {len(names)} entries, expected 1 to {_MOST}")
        for name in names:
            if not _NAME.fullmatch(name):
                raise ManifestError(f"{field} has the name {_short(name)!r}, expected letters, digits, dots, _ and -")
        if len(set(names)) < len(names):
            raise ManifestError(f"{field} has the name {_twice(names)} twice")


def _check_features(manifest: Manifest) -> None:
    for name, feature in manifest.features.items():
        if not 1 <= len(feature.shape) <= _MOST_DIMS or not all(_is_dim(dim) for dim in feature.shape):
            raise ManifestError(f"features.{name}.shape is {_short(feature.shape)}, expected 1 to {_MOST_DIMS} dimensions")
        _check_largest(manifest, name, feature)


def _is_dim(dim: Dim) -> bool:
    return 1 <= dim <= _LARGEST_DIM if isinstance(dim, int) else is_dim(dim, _SIZES, _LARGEST_DIM)


def _check_largest(manifest: Manifest, name: str, feature: Feature) -> None:
    height, width = (side // manifest.vae_scale for side in manifest.sizes[0])
    try:
        shape = resolve(feature.shape, {"batch": 2, "images": 1, "height": height, "width": width})
    except ValueError as error:
        raise ManifestError(f"features.{name}.shape: {error}") from error
    if math.prod(shape) > _MOST_ELEMENTS:
        raise ManifestError(f"features.{name} has {math.prod(shape)} numbers, expected at most {_MOST_ELEMENTS}")


def _check_units(manifest: Manifest) -> None:
    made: set[str] = set()
    names = {unit.name for unit in manifest.units}
    for unit in manifest.units:
        for name in unit.inputs:
            if name not in manifest.features:
                raise ManifestError(f"unit {unit.name} reads {_short(name)!r}, which is no feature")
            if name in names and name not in made:
                raise ManifestError(f"unit {unit.name} reads {name}, which no unit before it makes")
        if unit.name not in manifest.features:
            raise ManifestError(f"unit {unit.name} makes no feature: features has no entry of its name")
        counts = (unit.parameters, unit.macs, unit.macs_fixed, unit.macs_quadratic)
        if min(counts) < 0 or max(counts) >= 1 << 62 or unit.macs_fixed + unit.macs_quadratic > unit.macs:
            raise ManifestError(f"unit {unit.name}: parameters or macs is not a valid count")
        if len(unit.inputs) > _MOST or len(unit.kind) > _LONGEST_TEXT or not unit.kind.isprintable():
            raise ManifestError(f"unit {unit.name}: its kind is not a short text of one line, or it has too many inputs")
        made.add(unit.name)


def _check_segments(manifest: Manifest) -> None:
    units = {unit.name: unit for unit in manifest.units}
    placed = [name for segment in manifest.segments for name in segment.units]
    if missing := sorted(units.keys() - set(placed)):
        raise ManifestError(f"unit {missing[0]} is in no segment")
    if len(set(placed)) < len(placed):
        raise ManifestError(f"unit {_twice(placed)} is in two segments")
    made: set[str] = set()
    for segment in manifest.segments:
        for field, known in (("units", units.keys()), ("inputs", manifest.features.keys()), ("outputs", set(segment.units))):
            for name in getattr(segment, field):
                if name not in known:
                    raise ManifestError(f"segment {segment.name}: {field} has {_short(name)!r}, which does not exist")
        if not segment.units or not segment.outputs or len({*segment.outputs}) < len(segment.outputs):
            raise ManifestError(f"segment {segment.name} has no units, no outputs, or an output twice")
        for name in segment.inputs:
            if name in units and name not in made:
                raise ManifestError(f"segment {segment.name} reads {name}, which no segment before it makes")
        _check_inside(segment, [(name, units[name].inputs) for name in segment.units])
        _check_engines(segment)
        made.update(segment.outputs)


def _check_inside(segment: Segment, units: Iterable[tuple[str, tuple[str, ...]]]) -> None:
    """Raise ManifestError unless all that a segment's units read is made inside it or is one of its inputs."""
    given = {*segment.inputs, *segment.units}
    for unit, inputs in units:
        for name in inputs:
            if name not in given:
                raise ManifestError(f"segment {segment.name}: its unit {unit} reads {name}, which is none of its inputs")


def _check_engines(segment: Segment) -> None:
    if not math.isfinite(segment.seconds) or not 0 <= segment.seconds < 1e9:
        raise ManifestError(f"segment {segment.name}: seconds is {segment.seconds}")
    for name, compiled in segment.engines.items():
        texts = (segment.key, compiled.key, compiled.version, *compiled.targets)
        one_line = all(text.isprintable() and len(text) <= _LONGEST_TEXT for text in texts)
        if len(texts) > _MOST or not one_line or not _NAME.fullmatch(name):
            raise ManifestError(f"segment {segment.name}: engines has a name, key, version or target that is not valid")


def check_complete(manifest: Manifest) -> None:
    """Check that a manifest has what making pictures takes: the graph's inputs, text encoder, UNet and VAE decoder.

    A VAE encoder may be missing; older bundles have none.

    Raises:
        ManifestError: it has not.
    """
    scale, channels = manifest.vae_scale, manifest.latent_channels
    latents: Shape = (channels, "height", "width")
    picture: Shape = ("images", 3, _times(scale, "height"), _times(scale, "width"))
    wanted: dict[str, Feature] = {
        TOKENS: Feature(dtype="int64", shape=("batch", manifest.text_length)),
        SAMPLE: Feature(dtype="float32", shape=("batch", *latents)),
        TIMESTEP: Feature(dtype="float32", shape=(1,)),
        NOISE: Feature(dtype="float32", shape=("batch", *latents)),
        LATENTS: Feature(dtype="float32", shape=("images", *latents)),
        VAE_DECODER: Feature(dtype="float32", shape=picture),
    }
    names = {unit.name for unit in manifest.units}
    if VAE_ENCODER in names:
        wanted[IMAGE] = Feature(dtype="float32", shape=picture)
        # Latents, or their distribution: means, then deviations.
        both = Feature(dtype="float32", shape=("images", 2 * channels, "height", "width"))
        alone = Feature(dtype="float32", shape=("images", *latents))
        wanted[VAE_ENCODER] = alone if manifest.features.get(VAE_ENCODER) == alone else both
    for name, feature in wanted.items():
        if (found := manifest.features.get(name)) != feature:
            says = "is missing" if found is None else f"is {found.dtype} {_short(found.shape)}"
            raise ManifestError(f"features.{name} {says}, expected {feature.dtype} {feature.shape}")
    _check_text(manifest)
    inputs = {TEXT: (TOKENS,), VAE_DECODER: (LATENTS,), VAE_ENCODER: (IMAGE,)}
    for unit in manifest.units:
        strange = [name for name in unit.inputs if name not in names and name not in _INPUTS]
        if strange:
            raise ManifestError(f"unit {unit.name} reads {strange[0]}, which nothing makes")
        if (unit.kind in OUTSIDE or unit.name in OUTSIDE) and (unit.kind != unit.name or unit.inputs != inputs[unit.name]):
            raise ManifestError(f"unit {unit.name} of kind {unit.kind}: text encoder and VAE have their own names and inputs")
        if unit.kind not in OUTSIDE and not {TOKENS, LATENTS, IMAGE, VAE_DECODER, VAE_ENCODER}.isdisjoint(unit.inputs):
            raise ManifestError(f"unit {unit.name} of the UNet reads what is not the UNet's")
    _check_apart(manifest)
    if missing := sorted({TEXT, NOISE, VAE_DECODER} - names):
        raise ManifestError(f"unit {missing[0]} is missing")


def _check_text(manifest: Manifest) -> None:
    text = manifest.features.get(TEXT)
    shape = () if text is None else text.shape
    lengths = (manifest.text_length, f"tokens={manifest.text_length}")
    if len(shape) != 3 or shape[0] != "batch" or shape[1] not in lengths or not isinstance(shape[2], int):
        raise ManifestError(f"features.{TEXT}.shape is {_short(shape)}, expected (batch, {manifest.text_length}, width)")


def _check_apart(manifest: Manifest) -> None:
    """The text encoder and both halves of the VAE are segments of their own, and what the UNet reads is made."""
    for segment in manifest.segments:
        if not OUTSIDE.isdisjoint(segment.units) and segment.units != segment.outputs:
            raise ManifestError(f"segment {segment.name} holds more than {', '.join(OUTSIDE.intersection(segment.units))}")
    made = {name for segment in manifest.segments for name in segment.outputs}
    for name in (TEXT, NOISE, VAE_DECODER):
        if name not in made:
            raise ManifestError(f"no segment makes {name}")


def _times(factor: int, name: str) -> str:
    return f"{factor}*{name}" if factor != 1 else name


def _twice(names: Iterable[str]) -> str:
    seen: set[str] = set()
    return next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]


def _short(value: object) -> str:
    """A value as messages show it: no longer than a line has room for."""
    try:
        text = str(value)
    except ValueError:  # numbers of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."
