"""The queue: what is made at once, that it is what it would be alone, what is refused, given up and stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from engines import Bundle, EngineError, make_engine
from runtime import Pipeline, PlanError, Request, RequestError
from serving import Limits, Service, ServingError
from serving.errors import BusyError, LateError, StoppingError, UnknownModelError
from serving.queueing.ticket import Ticket
from tests.support.diffusers_pipelines import picture
from tests.support.gated import PATIENCE, GatedPipeline, wait_for

pytestmark = pytest.mark.shared_pieces
PROMPTS = ["a red star on a blue background", "a green ring", "a yellow square"]


@pytest.fixture
def service(gated: GatedPipeline) -> Iterator[Callable[..., Service]]:
    """A running service of the gated pipeline with limits by name."""
    with ExitStack() as running:

        def make(**limits: Any) -> Service:
            found = Service({"mini": gated}, Limits(**limits))
            found.start()
            running.callback(found.end)
            running.callback(gated.open)
            return found

        yield make


def behind(service: Service, gated: GatedPipeline, *requests: Request) -> list[Ticket]:
    """Tickets of requests that wait together behind one that runs, until the gate opens."""
    first = service.submit(None, Request("a cross", steps=1, seed=99))
    gated.wait_until_running()
    tickets = [service.submit(None, request) for request in requests]
    gated.open()
    first.future.result(PATIENCE)
    for ticket in tickets:
        ticket.future.exception(PATIENCE)
    return tickets


def images_of(ticket: Ticket) -> np.ndarray:
    return np.stack([np.asarray(image, np.int16) for image in ticket.future.result(PATIENCE).images])


@pytest.mark.parametrize("scheduler", ["dpm++", "euler a"])
def test_pictures_of_a_batch_are_those_that_each_request_gets_alone(
    mini_bundle: Bundle, mini_pipeline: Pipeline, scheduler: str
) -> None:
    common: dict[str, Any] = {"steps": 4, "scheduler": scheduler, "plan": "deepcache:2"}
    requests = [
        Request(PROMPTS[0], seed=5, **common),
        Request(PROMPTS[1], "a red ring", seed=7, num_images=2, **common),
        Request(PROMPTS[2], seed=3, guidance_scale=mini_pipeline.manifest.guidance_scale, **common),
    ]
    served = Pipeline(mini_bundle, make_engine("onnxruntime"))  # its own: a service says what plans may switch to
    service = Service({"mini": served}, Limits(batch_wait=5.0, batch=4))  # they fill the batch, which then begins
    service.start()
    try:
        tickets = [service.submit(None, request) for request in requests]
        for request, ticket in zip(requests, tickets, strict=True):
            alone = mini_pipeline.generate(request)
            expected = np.stack([np.asarray(image, np.int16) for image in alone.images])
            # Rounding of other batch sizes: a level at the edge between two.
            assert np.abs(images_of(ticket) - expected).max() <= 1
            made = ticket.future.result()
            assert made.batches == (4,)
            assert made.seeds == alone.seeds
            assert [record.ran for record in made.steps] == [record.ran for record in alone.steps]
            assert [told["prompt"] for told in made.made_from] == [request.prompt] * request.images
    finally:
        service.end()


def test_what_is_of_one_kind_is_made_at_once_and_nothing_else(service: Callable[..., Service], gated: GatedPipeline) -> None:
    base: dict[str, Any] = {"steps": 2}
    others: list[dict[str, Any]] = [
        {"steps": 3},
        {"width": 128},
        {"scheduler": "ddim"},
        {"plan": "block:2"},
        {"guidance_scale": 2.0},
        {"allow_nonfinite": True},
        {"image": picture()},
        {"plan": "adaptive:0.3"},
        {"prompt": "a red star " * 30},
    ]
    requests = [
        Request(**{"prompt": PROMPTS[number % 3], "seed": number, **base, **other}) for number, other in enumerate(others)
    ]
    alike = [Request("a ring", seed=21, **base), Request("a star", "a ring", seed=22, **base)]
    with gated.closed():
        tickets = behind(service(), gated, alike[0], *requests, alike[1], *requests[:1])
    sizes = [ticket.future.result(PATIENCE).batches for ticket in tickets]
    assert sizes == [(2,), (2,), *[(1,)] * (len(others) - 1), (2,), (2,)]
    assert gated.requests[1].prompts == ("a ring", "a star")
    assert gated.requests[1].picture_seeds == (21, 22)
    assert gated.requests[1].negative_prompts == ("", "a ring")


def test_pictures_of_a_request_share_batches_with_others_and_come_in_order(
    service: Callable[..., Service], gated: GatedPipeline
) -> None:
    many = Request(PROMPTS[:2], steps=1, num_images=3, seed=[5, 3, 8, 1, 9, 2])
    with gated.closed():
        tickets = behind(service(batch=4), gated, many, Request("a ring", steps=1, seed=4))
    assert [list(request.picture_seeds) for request in gated.requests[1:]] == [[5, 3, 8, 1], [9, 2, 4]]
    made = tickets[0].future.result(PATIENCE)
    assert (made.batches, made.seeds, len(made.images)) == ((4, 3), (5, 3, 8, 1, 9, 2), 6)
    assert [told["seed"] for told in made.made_from] == [5, 3, 8, 1, 9, 2]
    assert [told["prompt"] for told in made.made_from] == [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3


def test_prompts_of_unlike_lengths_run_in_a_call_of_their_own(service: Callable[..., Service], gated: GatedPipeline) -> None:
    ticket = service().submit(None, Request(["a ring", "a red star " * 30], steps=1))
    assert ticket.kind is None
    assert len(ticket.future.result(PATIENCE).images) == 2
    assert gated.requests == [ticket.request]


def test_an_engine_with_a_profile_gets_no_more_than_it_was_built_for(
    gated: GatedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(gated.engine), "has_profile", True)
    service = Service({"mini": gated}, Limits(batch=6))
    assert gated.manifest.max_images == 4
    kind = service.submit(None, Request("a ring", steps=1, num_images=8)).kind
    assert kind is not None
    assert kind.most == 4


def test_what_does_not_fit_into_a_part_of_the_memory_is_made_one_by_one(
    gated: GatedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.queueing.kinds.memory_bytes", lambda device: 2**16)
    kind = Service({"mini": gated}).submit(None, Request("a ring", steps=1)).kind
    assert kind is not None
    assert kind.most == 1


def test_no_more_wait_than_may(service: Callable[..., Service], gated: GatedPipeline) -> None:
    crowded = service(queue=3)
    with gated.closed():
        running = crowded.submit(None, Request("a star", steps=1))
        gated.wait_until_running()
        waiting = crowded.submit(None, Request("a ring", steps=1, num_images=2))
        with pytest.raises(BusyError, match="2 pictures are waiting, and no more can; ask again in .* s") as refusal:
            crowded.submit(None, Request("a ring", steps=1, num_images=2))
        assert refusal.value.retry_after >= 1
        one = crowded.submit(None, Request("a ring", steps=1))
        with pytest.raises(BusyError):
            crowded.submit(None, Request("a ring", steps=1))
        waiting.future.cancel()
        again = crowded.submit(None, Request("a ring", steps=1, num_images=2))
    for ticket in (running, one, again):
        assert ticket.future.result(PATIENCE).images
    assert crowded.submit(None, Request("a ring", steps=1, num_images=8)).future.result(PATIENCE).images, "more than may wait"


def test_what_is_given_up_is_not_made_and_what_runs_for_nobody_is_stopped(
    service: Callable[..., Service], gated: GatedPipeline
) -> None:
    running_service = service()
    with gated.closed():
        running = running_service.submit(None, Request("a star", steps=4))
        gated.wait_until_running()
        waiting, other = (running_service.submit(None, Request(name, steps=4)) for name in ("a ring", "a cross"))
        assert running.future.cancel()
        assert waiting.future.cancel()
    assert other.future.result(PATIENCE).batches == (1,)
    assert [request.prompts for request in gated.requests] == [("a star",), ("a cross",)]
    assert gated.records == 4, "no step of the first was let pass, all of the last"
    wait_for(lambda: running_service.is_idle)


def test_a_batch_goes_on_while_somebody_waits_for_one_of_its_pictures(
    service: Callable[..., Service], gated: GatedPipeline
) -> None:
    running = service(batch_wait=5.0, batch=2)
    with gated.closed():
        one, other = (running.submit(None, Request(name, steps=2)) for name in ("a star", "a ring"))
        gated.wait_until_running()
        assert one.future.cancel()
    assert other.future.result(PATIENCE).batches == (2,)


def test_what_is_late_is_answered_so_and_made_no_further(service: Callable[..., Service], gated: GatedPipeline) -> None:
    impatient = service(seconds=1.0)
    with gated.closed():
        running = impatient.submit(None, Request("a star", steps=4))
        gated.wait_until_running()
        waiting = impatient.submit(None, Request("a ring", steps=4))
        wait_for(lambda: running.is_over and waiting.is_over)
    for ticket in (running, waiting):
        with pytest.raises(LateError, match="not finished in the time"):
            ticket.future.result(PATIENCE)
    assert [request.prompts for request in gated.requests] == [("a star",)]
    assert gated.records == 0


def test_a_request_that_fails_in_a_batch_takes_no_other_with_it(
    service: Callable[..., Service], gated: GatedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = gated.generate

    def stumble(request: Request, **options: Any) -> Any:
        if "a ring" in request.prompts:
            raise EngineError("cannot make a ring")
        return generate(request, **options)

    monkeypatch.setattr(gated, "generate", stumble)
    with gated.closed():
        star, ring, cross = behind(service(), gated, *(Request(name, steps=2) for name in ("a star", "a ring", "a cross")))
    assert star.future.result().batches == cross.future.result().batches == (1,)
    with pytest.raises(EngineError, match="cannot make a ring"):
        ring.future.result()
    assert Ticket(Request("a star"), None, 1.0).waiting == 1


def test_a_service_that_stops_finishes_what_it_took(service: Callable[..., Service], gated: GatedPipeline) -> None:
    stopping = service()
    with gated.closed():
        tickets = [stopping.submit(None, Request("a star", steps=2))]
        gated.wait_until_running()
        tickets.append(stopping.submit(None, Request("a ring", steps=3)))
        stopping.stop_accepting()
        assert not stopping.is_ready
        assert not stopping.is_idle
        with pytest.raises(StoppingError, match="is being stopped"):
            stopping.submit(None, Request("a ring"))
    assert [ticket.future.result(PATIENCE).batches for ticket in tickets] == [(1,), (1,)]
    wait_for(lambda: stopping.is_idle)


def test_a_service_that_ends_answers_what_it_took(service: Callable[..., Service], gated: GatedPipeline) -> None:
    ending = service()
    with gated.closed():
        tickets = [ending.submit(None, Request("a star", steps=2))]
        gated.wait_until_running()
        tickets.append(ending.submit(None, Request("a ring", steps=3)))
        ending.end()
        for ticket in tickets:
            with pytest.raises(StoppingError, match="stopped before the request was finished"):
                ticket.future.result(PATIENCE)
    wait_for(lambda: ending.is_idle)
    assert gated.records == 0
    ending.workers["mini"].join(PATIENCE)
    assert not ending.workers["mini"].is_alive()


@pytest.mark.parametrize(
    ("options", "limits", "message"),
    [
        ({"num_images": 9}, {}, "9 pictures are asked for; this service makes 8 at most"),
        ({"prompt": ["a"] * 3, "num_images": 3}, {}, "9 pictures are asked for"),
        ({"steps": 151}, {}, "steps = 151; this service takes 150 at most"),
        ({"prompt": "a" * 2001}, {}, "a prompt has 2001 characters; this service takes 2000"),
        ({"negative_prompt": "a" * 2001}, {}, "a prompt has 2001 characters"),
        ({"height": 2048, "width": 1024}, {}, r"size 2048x1024 \(height x width\): this service makes pictures of 1048576"),
        ({"height": 64 * 10**30}, {}, "height = 64000000000000000000; this service"),
        ({"height": 1024, "width": 64}, {"pixels": 64 * 64}, "size 1024x64"),
        ({"image": picture()}, {"pixels": 32 * 32}, "size 64x64"),
        ({}, {"pixels": 32 * 32}, "size 64x64"),
        ({"height": 65}, {}, "must be multiples of 64"),
        ({"clip_skip": 3}, {}, "clip_skip = 3"),
    ],
)
def test_what_a_service_does_not_make(
    gated: GatedPipeline, options: dict[str, Any], limits: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        Service({"mini": gated}, Limits(**limits)).submit(None, Request(**{"prompt": "a star", **options}))
    assert gated.requests == []


def test_prompts_that_would_be_cut_are_refused_unless_that_is_asked_for(
    gated: GatedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service({"mini": gated})
    long: dict[str, Any] = {"prompt": "a red star " * 30, "steps": 1}
    assert service.submit(None, Request(**long)).kind is not None
    assert service.submit(None, Request(**long, long_prompts="cut")).kind is None
    monkeypatch.setattr(type(gated.engine), "has_profile", True)
    with pytest.raises(RequestError, match="a prompt is longer than this model reads; shorten it, or have it cut"):
        service.submit(None, Request(**long))


def test_plans_switch_to_bundles_that_are_served_and_to_no_others(
    mini_bundle: Bundle, assembled_bundle: Bundle, gated: GatedPipeline
) -> None:
    request = Request("a star", steps=4, plan="switch:0.4")
    alone = Service({"mini": gated})
    assert assembled_bundle.folder.parent == mini_bundle.folder.parent, "it lies beside"
    with pytest.raises(PlanError, match="runs the UNet 'assembled', and no bundle that may be taken"):
        alone.submit(None, request)
    assert Service({"mini": gated, "small": GatedPipeline(assembled_bundle)}).submit(None, request).kind is not None


def test_models_have_names_and_the_first_needs_none(gated: GatedPipeline) -> None:
    service = Service({"mini": gated, "other": gated})
    assert service.worker(None) is service.worker("mini") is not service.worker("other")
    with pytest.raises(UnknownModelError, match="there is no model 'minni'; did you mean mini\\? choose from: mini, other"):
        service.worker("minni")
    with pytest.raises(ServingError, match="no bundle to serve"):
        Service({})
