"""A Triton model repository: a model's folder with its configuration, the code that Triton loads, and the bundle."""

import re
import shutil
from pathlib import Path

from engines import Bundle, engine_class
from engines.support.files import atomic_directory, exists, real_path
from engines.support.version import our_version
from exporter.errors import BuildError

__all__ = ["export_triton", "model_configuration"]

_INPUTS = (
    ("PROMPT", "TYPE_STRING", True),
    ("NEGATIVE_PROMPT", "TYPE_STRING", False),
    ("SEED", "TYPE_INT64", False),
    ("STEPS", "TYPE_INT32", False),
    ("GUIDANCE_SCALE", "TYPE_FP32", False),
    ("HEIGHT", "TYPE_INT32", False),
    ("WIDTH", "TYPE_INT32", False),
    ("SCHEDULER", "TYPE_STRING", False),
    ("PLAN", "TYPE_STRING", False),
)
"""Name, type, and whether a request must have it; each is one value for each picture."""
_README = """# {name}: a model of the Triton Inference Server

`1/model.py` runs the bundle in `1/bundle` in Triton's Python backend with the {engine} engine. The Python of the server needs
`unet-heirloom` of the version that wrote this, {version}; the project's `docker/Dockerfile` makes such an image.

    tritonserver --model-repository FOLDER_OF_{name}

PROMPT alone is needed. Rows of a request are pictures: they may differ in PROMPT, NEGATIVE_PROMPT and SEED, and in nothing else.
IMAGE is (rows, height, width, 3) of 8 bits; MADE_FROM tells as JSON what a picture was made from.
"""


def export_triton(bundle: Bundle, folder: Path, name: str, engine: str, batch: int, instances: int) -> Path:
    """Write a model's folder into a model repository, whole or not at all; its path.

    Args:
        bundle: what the model runs; it is copied.
        folder: the repository, which may have other models.
        name: of the model.
        engine: what runs the bundle's segments.
        batch: pictures at once; engines with a profile take as many as they were built for.
        instances: processes on each device.

    Raises:
        BuildError: the name is none, the folder is the bundle's or has a model of the name, or the engine is not in the bundle.
        BundleError: the bundle is damaged.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise BuildError(f"--name {name!r:.60} is no name for a model; write letters, digits, and - or _")
    target = folder / name
    if real_path(folder).is_relative_to(real_path(bundle.folder)):
        raise BuildError(f"{folder!s:.200} is inside of the bundle, which takes nothing else; give another folder")
    if exists(target):
        raise BuildError(f"{target!s:.200} is there already; remove it, or give another --name")
    most = _most_at_once(bundle, engine, batch)
    bundle.check()
    with atomic_directory(target) as temporary:
        (temporary / "1").mkdir()
        shutil.copyfile(Path(__file__).with_name("model.py"), temporary / "1" / "model.py")
        bundle.copy_to(temporary / "1" / "bundle")
        (temporary / "config.pbtxt").write_text(model_configuration(name, engine, most, instances), encoding="utf-8")
        (temporary / "README.md").write_text(_README.format(name=name, engine=engine, version=our_version()), encoding="utf-8")
    return target


def model_configuration(name: str, engine: str, batch: int, instances: int) -> str:
    """The model's ``config.pbtxt``, in the text form of Triton's ``inference.ModelConfig``."""
    inputs = ",\n".join(_field(*each) for each in _INPUTS)
    return f"""# Written by `python -m exporter export-triton`.
name: "{name}"
backend: "python"
max_batch_size: {batch}
input [
{inputs}
]
output [
  {{ name: "IMAGE" data_type: TYPE_UINT8 dims: [ -1, -1, 3 ] }},
  {{ name: "MADE_FROM" data_type: TYPE_STRING dims: [ 1 ] }}
]
dynamic_batching {{ max_queue_delay_microseconds: 5000 }}
instance_group [ {{ kind: KIND_AUTO count: {instances} }} ]
parameters {{ key: "engine" value {{ string_value: "{engine}" }} }}
"""


def _field(name: str, kind: str, needed: bool) -> str:
    return f'  {{ name: "{name}" data_type: {kind} dims: [ 1 ]{"" if needed else " optional: true"} }}'


def _most_at_once(bundle: Bundle, engine: str, batch: int) -> int:
    """Pictures at once, which an engine with a profile bounds; raises EngineError or BuildError for one that is not to be had."""
    if not engine_class(engine).has_profile:
        return batch
    if any(engine not in segment.engines for segment in bundle.manifest.segments):
        raise BuildError(f"{bundle.folder} has no {engine} engines; add them with: {bundle.rebuild_command(engine)}")
    return min(batch, bundle.manifest.max_images)
