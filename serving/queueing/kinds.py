"""Which requests can be made at once, and how many pictures of them: a picture must be the one that it would be alone."""

from dataclasses import replace

from runtime import Pipeline, Request, RequestError
from runtime.pipeline import Callback
from runtime.prepared import Prepared
from runtime.report.cost import peak_bytes
from runtime.report.memory import memory_bytes
from serving.limits import Limits
from serving.queueing.ticket import Kind, Ticket, singles

__all__ = ["admit"]

_SHARE = 4
"""The features between segments of one batch may fill this part of the memory: a choice of our own, for what engines add."""


def admit(pipeline: Pipeline, request: Request, limits: Limits, step: Callback | None = None) -> Ticket:
    """A request checked against the bundle and the limits, ready to wait; alone where ``step`` is to be told of its steps.

    Raises:
        RequestError, PlanError: as ``Pipeline.prepare``; it asks for more than the limits allow; or a prompt is too long to be
            read and is not asked to be cut.
    """
    limits.check(request)
    whole = pipeline.reads_whole(request)
    if not whole and request.long_prompts != "cut":
        raise RequestError("a prompt is longer than this model reads; shorten it, or have it cut with long_prompts: 'cut'")
    kind = _kind(pipeline, request, limits) if whole and step is None and pipeline.can_share(request) else None
    if kind is None:
        prepared = pipeline.prepare(request)
        limits.check_size(prepared.height, prepared.width)
    return Ticket(request, kind, limits.seconds, step)


def _kind(pipeline: Pipeline, request: Request, limits: Limits) -> Kind | None:
    """The kind of a request's pictures; None where its prompts need texts of unlike lengths: its own call evens them out."""
    pairs = dict.fromkeys((each.prompt, each.negative_prompt) for each in singles(request))
    one = replace(request, prompt="-", negative_prompt="", seed=0, num_images=1)
    prepared = [pipeline.prepare(replace(one, prompt=prompt, negative_prompt=negative)) for prompt, negative in pairs]
    if len({each.sizes["tokens"] for each in prepared}) > 1:
        return None
    found = prepared[0]
    limits.check_size(found.height, found.width)
    common = replace(one, height=found.height, width=found.width, guidance_scale=found.guidance_scale)
    return Kind(common, found.sizes["tokens"], _most(pipeline, found, limits))


def _most(pipeline: Pipeline, prepared: Prepared, limits: Limits) -> int:
    """Pictures of a kind that are made at once: as many as engine, memory and limits allow."""
    most = min(limits.batch, pipeline.manifest.max_images if pipeline.engine.has_profile else limits.batch)
    each = peak_bytes(prepared.schedule, prepared.sizes)
    return max(1, min(most, memory_bytes(pipeline.engine.device) // _SHARE // max(each, 1)))
