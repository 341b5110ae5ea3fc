"""The arguments of ``unet-heirloom serve``, and the limits and names that they make."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engines.support.cli import Parser
from serving.errors import ServingError

if TYPE_CHECKING:
    from serving.limits import Limits

__all__ = ["limits_of", "named_bundles", "parse"]

_MIB = 2**20
_BOUNDS = {
    "max_pixels": ("pixels", 1),
    "max_images": ("images", 1),
    "max_steps": ("steps", 1),
    "max_prompt": ("prompt", 1),
    "max_body_mib": ("body", _MIB),
    "max_picture_mib": ("picture_bytes", _MIB),
    "max_picture_pixels": ("picture_pixels", 1),
    "max_queue": ("queue", 1),
    "max_batch": ("batch", 1),
}
"""Option -> the limit that it sets, and in what it counts."""


def parse(arguments: Sequence[str], prog: str) -> Namespace:
    """The arguments by name; raises UserError for a mistake."""
    options = _parser(prog).parse_args(arguments)
    for name in (*_BOUNDS, "timeout", "stop_timeout"):
        value = getattr(options, name)
        if value is not None and not 0 < value < 10**9:
            raise ServingError(f"--{name.replace('_', '-')} {value}: give a number above 0")
    if not 0 <= options.batch_wait_ms <= 60_000:
        raise ServingError(f"--batch-wait-ms {options.batch_wait_ms:g}: give milliseconds from 0 to 60000")
    if not 0 <= options.port < 2**16:
        raise ServingError(f"--port {options.port}: give one from 0 (any that is free) to {2**16 - 1}")
    return options


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        description="Serve pictures over HTTP: OpenAI's image API, /generate, and a page. The key, where there is one, is in a "
        "file or in UNET_HEIRLOOM_API_KEY, because others can read what is on a command line.",
    )
    add = parser.add_argument
    parser.add_version()
    add(
        "--bundle",
        action="append",
        metavar="[NAME=]DIR",
        help="a bundle to serve, which requests call by its folder's name or the one given; may be repeated "
        "(default: the one in ./bundles that was built last)",
    )
    add("--engine", default="onnxruntime", help="what runs the segments (default: %(default)s)")
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 for all of this machine (default: %(default)s)")
    add("--port", type=int, default=7860, help="port to listen at; 0 for any that is free (default: %(default)s)")
    add("--api-key-file", type=Path, metavar="FILE", help="a file whose first line is the key that requests must carry")
    add("--no-page", action="store_true", help="serve no page for browsers")
    add("--max-queue", type=int, help="pictures that may wait for each bundle; beyond that the answer is 429 (default: 64)")
    add("--max-batch", type=int, help="pictures made at once, where engine and memory allow it (default: 8)")
    add("--batch-wait-ms", type=float, default=5.0, help="milliseconds to wait for requests of one kind (default: %(default)g)")
    add("--timeout", type=float, help="seconds that a request may wait and run; then the answer is 504 (default: 300)")
    add("--stop-timeout", type=float, default=60.0, help="seconds to finish what was taken when stopped (default: %(default)g)")
    add("--max-pixels", type=int, help="pixels of a picture (default: 1048576)")
    add("--max-images", type=int, help="pictures of a request (default: 8)")
    add("--max-steps", type=int, help="denoising steps (default: 150)")
    add("--max-prompt", type=int, help="characters of a prompt (default: 2000)")
    add("--max-body-mib", type=int, help="MiB of a request (default: 16)")
    add("--max-picture-mib", type=int, help="MiB of a picture or mask that is sent (default: 8)")
    add("--max-picture-pixels", type=int, help="pixels of a picture or mask that is sent (default: 4194304)")
    add("--quiet", action="store_true", help="log warnings and errors only, not every request")
    return parser


def limits_of(options: Namespace) -> "Limits":
    """The limits that the options set; the others are the usual ones."""
    from serving.limits import Limits

    given = {limit: getattr(options, name) * unit for name, (limit, unit) in _BOUNDS.items() if getattr(options, name)}
    if options.timeout:
        given["seconds"] = options.timeout
    return Limits(**given, batch_wait=options.batch_wait_ms / 1000)


def named_bundles(given: Sequence[str]) -> dict[str, str]:
    """Folders by the names that requests call them.

    Raises:
        ServingError: two have one name, or a name cannot be part of an address.
    """
    found: dict[str, str] = {}
    for text in given:
        before, sign, after = text.partition("=")
        # A folder's own name may have the sign in it.
        name, folder = (before, after) if sign and "/" not in before and "\\" not in before else ("", text)
        name = name or Path(folder).expanduser().resolve().name
        if not name or len(name) > 200 or not name.isprintable() or "/" in name:
            raise ServingError(f"--bundle {text!r:.100}: {name!r:.60} is no name for it; write NAME={folder:.100}")
        if name in found:
            raise ServingError(f"--bundle: two are called {name!r:.60}; give one another name, as NAME={folder:.100}")
        found[name] = folder
    return found
