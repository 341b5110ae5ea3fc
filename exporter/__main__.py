"""``python -m exporter build | verify | inspect | export-triton``."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engines import ENGINES, UserError
from engines.support.cli import Parser, parse_size, quiet_libraries, resumable, run_command
from engines.support.files import expanded
from runtime.embedded import DEFAULT

if TYPE_CHECKING:
    from rich.console import Console

_SOURCES = "emoji, mini, a diffusers folder, a hub id, a .safetensors file, or random:CONFIG (default: %(default)s)"
_BUILD = """A UNet in, a bundle out: ONNX segments and compiled engines that `python -m runtime` runs."""


def _parser(prog: str) -> Parser:
    parser = Parser(prog=prog, description="Build, verify, inspect and export bundles.")
    parser.add_version()
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    build = commands.add_parser("build", help="make a bundle", description=_BUILD)
    build.add_argument(
        "--variant", default="original", help="original, assembled, ..., or a recipe's .json (default: %(default)s)"
    )
    build.add_argument("--unet", type=Path, help="folder of the variant's UNet (default: the source's, or made by the recipe)")
    build.add_argument("--source", default=DEFAULT, help=_SOURCES)
    build.add_argument("--config", type=Path, help="folder of configurations, for a .safetensors file that is not SD 1.x/2.x")
    build.add_argument("--variant-files", help="variant of the weight files to read, such as fp16 (default: those without)")
    build.add_argument("--vae", help="a VAE instead of the source's: a diffusers folder, a hub id, or a .safetensors file")
    build.add_argument(
        "--lora", action="append", default=[], metavar="FILE[:SCALE]", help="a LoRA to fuse into the source; may be repeated"
    )
    build.add_argument("--engine", default="onnxruntime", help=f"one or more of {','.join(ENGINES)} (default: %(default)s)")
    build.add_argument("--granularity", help="largest segment: block, layer or unit (default: block, without --plan)")
    build.add_argument("--plan", action="append", default=[], help="segments as large as this plan allows; may be repeated")
    build.add_argument("--precision", default="fp32", help="fp32 or fp16 (default: %(default)s)")
    build.add_argument("--vae-precision", help="fp32, bf16 or fp16, for the VAE alone (default: --precision)")
    build.add_argument("--sizes", default="", help="HEIGHTxWIDTH,... for engines with a profile (default: the model's own)")
    build.add_argument("--batch", help="images per call, for engines with a profile (default: 1..4, with --static 1)")
    build.add_argument("--static", action="store_true", help="build these for one size and --batch images with guidance alone")
    build.add_argument(
        "--text-chunks", type=int, default=1, metavar="N", help="chunks of a long prompt, for engines with a profile (default: 1)"
    )
    build.add_argument(
        "--clip-skip", type=int, default=0, metavar="N", help="leave out the text encoder's last N layers (default: none)"
    )
    build.add_argument("--targets", default="", help="compute capabilities for engines built ahead of time, such as sm86,sm89")
    build.add_argument("--out", type=Path, help="the bundle's folder (default: bundles/SOURCE-VARIANT)")
    build.add_argument("--force", action="store_true", help="replace an existing bundle that differs")
    build.add_argument("--fresh", action="store_true", help="make every piece anew: reuse none of other bundles built here")
    build.add_argument("--jobs", type=int, default=1, help="segments worked on at once, each in a process (default: %(default)s)")
    build.add_argument("--json", action="store_true", help="print progress and result as lines of JSON")
    verify = commands.add_parser("verify", help="compare every segment and the chain with the torch model")
    verify.add_argument("bundle", type=Path)
    verify.add_argument("--engine", default="onnxruntime", help="the engine to verify (default: %(default)s)")
    verify.add_argument("--sizes", default="", help="HEIGHTxWIDTH,... to compare at (default: the bundle's own and one other)")
    verify.add_argument("--steps", type=int, help="denoising steps to compare latents after (default: 20 for fp16, else none)")
    verify.add_argument("--bisect", metavar="SEGMENT", help="find the first layer of a segment that the engine gets wrong")
    inspect = commands.add_parser("inspect", help="show what is in a bundle")
    inspect.add_argument("bundle", type=Path)
    inspect.add_argument("--kernels", action="store_true", help="compile with TensorRT-RTX, with or without a GPU; count kernels")
    inspect.add_argument("--target", help="compute capability to compile for, with --kernels (default: sm89)")
    inspect.add_argument("--json", action="store_true", help="with --kernels: print JSON")
    triton = commands.add_parser("export-triton", help="write a model repository for the Triton Inference Server")
    triton.add_argument("bundle", type=Path)
    triton.add_argument("folder", type=Path, help="the repository, which may have other models")
    triton.add_argument("--name", help="name of the model (default: that of the bundle's folder)")
    triton.add_argument("--engine", default="onnxruntime", help="what runs the segments (default: %(default)s)")
    triton.add_argument("--batch", type=int, default=8, help="pictures made at once (default: %(default)s)")
    triton.add_argument("--instances", type=int, default=1, help="processes on each device (default: %(default)s)")
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _max_images(text: str, static: bool) -> int:
    if static and not text.isdecimal():
        raise UserError(f"batch {text!r} is no number; with --static write the number of images of every call, such as 1")
    low, _, high = text.partition("..")
    if not low.isdecimal() or (high and not high.isdecimal()) or (high and int(low) != 1):
        raise UserError(f"batch {text!r} is no range; write 1..N, where N is the most images per call, such as 1..4")
    return int(high or low)


def main(arguments: Sequence[str], prog: str = "python -m exporter") -> None:
    """Run one command, which is called ``prog`` in messages; raises UserError for a user's mistake."""
    options = _parser(prog).parse_args(arguments)
    from rich.console import Console  # none of what the work takes is waited for by --help

    console = Console(markup=False)
    if options.command == "inspect":
        _inspect(options, console)
    elif options.command == "verify":
        _verify(options, console)
    elif options.command == "export-triton":
        _export_triton(options, console)
    else:
        _build(options, console)


def _verify(given: object, console: "Console") -> None:
    options = vars(given)
    quiet_libraries()
    sizes = tuple(parse_size(size) for size in _names(options["sizes"]))
    if options["bisect"] is None:
        from exporter.verification.command import verify_command

        good = verify_command(options["bundle"], options["engine"], sizes, options["steps"], console)
    elif options["steps"] is not None:
        raise UserError("--steps does not go with --bisect, which runs one step; leave one of them out")
    else:
        from exporter.verification.bisect_command import bisect_command

        good = bisect_command(options["bundle"], options["engine"], options["bisect"], sizes, console)
    if not good:
        sys.exit(1)


def _inspect(given: object, console: "Console") -> None:
    from engines import Bundle

    options = vars(given)
    if not options["kernels"]:
        if options["target"] is not None or options["json"]:
            raise UserError(
                f"--{'json' if options['target'] is None else 'target'} goes with --kernels; add that, or leave it out"
            )
        from exporter.tables import show_bundle

        bundle = Bundle.open(options["bundle"])
        bundle.check_complete()
        show_bundle(bundle, console)
        return
    from exporter.kernels import DEFAULT_TARGET, show_kernels

    target = DEFAULT_TARGET if options["target"] is None else options["target"]
    show_kernels(Bundle.open(options["bundle"]), console, target, as_json=options["json"])


def _export_triton(given: object, console: "Console") -> None:
    from engines import Bundle
    from exporter.triton.repository import export_triton

    options = vars(given)
    for name in ("batch", "instances"):
        if not 1 <= options[name] <= 1000:
            raise UserError(f"--{name} {options[name]}: give a number from 1 to 1000")
    bundle = Bundle.open(options["bundle"])
    name = options["name"] or bundle.folder.resolve().name
    target = export_triton(bundle, options["folder"], name, options["engine"], options["batch"], options["instances"])
    console.print(f"wrote {target}; serve it with: tritonserver --model-repository {options['folder']}", soft_wrap=True)


def _variant(given: str) -> tuple[str, Path | None]:
    """The variant's name, and the file of its recipe if that was given."""
    if not given.endswith(".json"):
        return given, None
    from tuning import recipe

    path = expanded(given)
    return recipe(str(path)).name, path


def _build(given: object, console: "Console") -> None:
    from exporter.build import build
    from exporter.options import BuildOptions
    from exporter.segments.progress_display import show_progress
    from exporter.tables import show_built
    from tuning.loras.lora import Lora

    values = vars(given)
    variant, recipe = _variant(values["variant"])
    options = BuildOptions(
        variant=variant,
        recipe=recipe,
        source=values["source"],
        unet=values["unet"],
        config=values["config"],
        variant_files=values["variant_files"],
        vae=values["vae"],
        loras=tuple(Lora.parse(text) for text in values["lora"]),
        engines=_names(values["engine"]),
        granularity=values["granularity"] or (None if values["plan"] else "block"),
        plans=tuple(values["plan"]),
        precision=values["precision"],
        vae_precision=values["vae_precision"],
        sizes=tuple(parse_size(size) for size in _names(values["sizes"])),
        max_images=_max_images(values["batch"] or ("1" if values["static"] else "1..4"), values["static"]),
        static=values["static"],
        text_chunks=values["text_chunks"],
        clip_skip=values["clip_skip"],
        targets=_names(values["targets"]),
        out=values["out"],
        force=values["force"],
        fresh=values["fresh"],
        jobs=values["jobs"],
    )
    with resumable(), show_progress(console, as_json=values["json"]) as progress:
        bundle, built = build(options, progress)
    show_built(bundle, built, console, as_json=values["json"])


if __name__ == "__main__":
    run_command(main)
