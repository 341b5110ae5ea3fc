"""What tests of the service share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from starlette.testclient import TestClient

from engines import Bundle
from serving import Limits, make_app
from tests.support.gated import GatedPipeline

Client = Callable[..., TestClient]


@pytest.fixture
def gated(mini_bundle: Bundle) -> GatedPipeline:
    """The embedded model on the null engine, which runs when it is let."""
    return GatedPipeline(mini_bundle)


@pytest.fixture
def client(gated: GatedPipeline) -> Iterator[Client]:
    """A client of an app that runs until the test's end; takes limits by name, and the key."""
    with ExitStack() as running:

        def make(key: str | None = None, **limits: Any) -> TestClient:
            app = make_app({"mini": gated}, Limits(**limits), key)
            return running.enter_context(TestClient(app, raise_server_exceptions=False))

        yield make
        gated.open()
