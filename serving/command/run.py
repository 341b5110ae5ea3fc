"""The work of ``unet-heirloom serve`` once its arguments are read."""

import logging
import sys
import warnings
from argparse import Namespace
from importlib.util import find_spec
from typing import TYPE_CHECKING

from engines.support.extras import need
from runtime import Pipeline, load
from runtime.api import default_bundle
from serving.command.api_key import VARIABLE, is_loopback, read_key
from serving.command.arguments import limits_of, named_bundles
from serving.errors import ServingError
from serving.limits import Limits

if TYPE_CHECKING:
    from fastapi import FastAPI

__all__ = ["run"]

_LOG = logging.getLogger("serving")


def run(options: Namespace) -> None:
    """Serve until a signal; raises UserError for a user's mistake."""
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        need(package, "serving", "serve", ServingError)
    from serving.command.server import bind, make_server
    from serving.http.app import make_app

    _log(options)
    key, limits = read_key(options.api_key_file), limits_of(options)
    if key is None and not is_loopback(options.host):
        _LOG.warning(
            "listening at %s without a key: whoever reaches it can have pictures made; give --api-key-file or %s",
            options.host,
            VARIABLE,
        )
    listening = bind(options.host, options.port)  # refused now rather than after loading
    pipelines = _loaded(options)
    app = make_app(pipelines, limits, key)
    if not options.no_page:
        app = _with_page(app, limits, key)
    if key is None and is_loopback(options.host):
        _answer_own_names_only(app, options.host)
    make_server(app, options.stop_timeout, options.quiet).run([listening])
    _LOG.info("stopped")


def _log(options: Namespace) -> None:
    """Have everything in one log on standard error, warnings of the runtime too.

    Each of them, for Python remembers those that it tells once, and callers choose their words.
    """
    level = logging.WARNING if options.quiet else logging.INFO
    logging.basicConfig(stream=sys.stderr, level=level, format="%(asctime)s %(levelname)s %(message)s")
    logging.captureWarnings(True)
    warnings.simplefilter("always", UserWarning)


def _loaded(options: Namespace) -> dict[str, Pipeline]:
    bundles = named_bundles(options.bundle or [str(default_bundle())])
    pipelines: dict[str, Pipeline] = {}
    for name, folder in bundles.items():
        pipelines[name] = load(folder, options.engine)
        _LOG.info("serving %s from %s with %s", name, folder, options.engine)
    return pipelines


def _answer_own_names_only(app: "FastAPI", host: str) -> None:
    """Have requests refused that are for a name which is not this machine's.

    A site can give a name of its own this machine's address; its pages would then pass for the service's in a browser here.
    """
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]", host])


def _with_page(app: "FastAPI", limits: Limits, key: str | None) -> "FastAPI":
    """The app with the page for browsers at ``/``, whose calls wait in the same queue; without it where Gradio is not installed.

    With a key, the page asks for it as the password of any name.
    """
    if find_spec("gradio") is None:
        _LOG.info("no page: gradio is not installed")
        return app
    from serving.http.app import keep_own_addresses
    from serving.http.keys import same_key
    from serving.page.app import mount_page

    def is_known(name: str, password: str) -> bool:
        return key is not None and same_key(password, key)

    keep_own_addresses(app)
    return mount_page(app, app.state.service, may_enter=None if key is None else is_known, upload_bytes=limits.picture_bytes)
