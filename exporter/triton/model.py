"""A bundle in Triton's Python backend. `python -m exporter export-triton` copies this file beside the bundle.

Triton's own module is imported when a call comes; all else is ``runtime``, which the server's Python needs to have installed.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime import Generation, Pipeline, Request

__all__ = ["TritonPythonModel"]

_TEXTS = ("NEGATIVE_PROMPT", "SCHEDULER", "PLAN")
_NUMBERS = {"STEPS": int, "HEIGHT": int, "WIDTH": int, "GUIDANCE_SCALE": float}


class TritonPythonModel:
    """The model that Triton loads, calls and ends; an object for each instance, in a process of its own."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the bundle on the instance's device."""
        if args["model_instance_kind"] == "GPU":
            os.environ["CUDA_VISIBLE_DEVICES"] = args["model_instance_device_id"]  # before anything looks for devices
        try:
            import runtime
        except ImportError as error:
            raise RuntimeError(
                f"this server's Python lacks {error.name}: install unet-heirloom in it (docker/Dockerfile)"
            ) from error

        engine = json.loads(args["model_config"])["parameters"]["engine"]["string_value"]
        self._pipeline: Pipeline = runtime.load(Path(__file__).resolve().parent / "bundle", engine)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """The answers to requests, in their order; those of one kind are made at once."""
        import triton_python_backend_utils as pb_utils

        from engines import UserError

        answers: list[Any] = [None] * len(requests)

        def refuse(number: int, error: Exception) -> None:
            answers[number] = pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))

        def make(group: Sequence[tuple[int, "Request"]]) -> None:
            try:
                made = self._pipeline.generate(_merged([request for _, request in group]))
            except UserError as error:
                if len(group) == 1:
                    refuse(group[0][0], error)
                    return
                for each in group:  # one's fault is not the others'
                    make([each])
                return
            at = 0
            for number, request in group:
                answers[number] = pb_utils.InferenceResponse(_tensors(made, at, request.images, pb_utils.Tensor))
                at += request.images

        groups: list[list[tuple[int, Request]]] = []
        for number, given in enumerate(requests):
            try:
                request = _read(lambda name, given=given: pb_utils.get_input_tensor_by_name(given, name))
            except UserError as error:
                refuse(number, error)
                continue
            same = next((group for group in groups if self._can_share(group[0][1], request)), None)
            if same is None:
                groups.append([(number, request)])
            else:
                same.append((number, request))
        for group in groups:
            make(group)
        return answers

    def _can_share(self, one: "Request", other: "Request") -> bool:
        """Whether two requests' pictures can be made at once, each the one that it would be alone.

        Longer prompts lengthen all others'.
        """
        if _kind(one) != _kind(other) or not self._pipeline.can_share(one):
            return False
        return all(self._pipeline.reads_whole(replace(request, long_prompts="cut")) for request in (one, other))


def _kind(request: "Request") -> "Request":
    """All in which requests that are made at once have to be alike."""
    return replace(request, prompt="-", negative_prompt="", seed=0)


def _merged(requests: Sequence["Request"]) -> "Request":
    prompts = [prompt for request in requests for prompt in request.prompts]
    negatives = [text for request in requests for text in request.negative_prompts]
    seeds = [seed for request in requests for seed in request.picture_seeds]
    return replace(requests[0], prompt=prompts, negative_prompt=negatives, seed=seeds)


def _read(tensor: Any) -> "Request":
    """The request that Triton's tensors make; ``tensor`` gives one by its name, or None.

    Raises:
        RequestError, PlanError: as ``runtime.Request``; or rows differ in more than prompts and seeds.
    """
    from runtime import Request

    prompts = _texts("PROMPT", tensor("PROMPT"))
    fields: dict[str, Any] = {"prompt": prompts, "seed": list(range(len(prompts)))}
    for name in _TEXTS:
        if (given := tensor(name)) is not None:
            values = _texts(name, given)
            fields[name.lower()] = values if name == "NEGATIVE_PROMPT" else _same(name, values)
    if isinstance(fields.get("plan"), str):
        fields["plan"] = _plan(fields["plan"])
    for name, kind in _NUMBERS.items():
        if (given := tensor(name)) is not None:
            fields[name.lower()] = kind(_same(name, given.as_numpy().reshape(-1).tolist()))
    if (given := tensor("SEED")) is not None:
        fields["seed"] = given.as_numpy().reshape(-1).tolist()
    if "negative_prompt" not in fields:
        fields["negative_prompt"] = [""] * len(prompts)
    return Request(**fields)


def _plan(text: str) -> Any:
    """A plan from presets; names of the server's files are none."""
    from runtime.plans.presets import join_presets

    return join_presets(text, "presets joined by +")


def _texts(name: str, tensor: Any) -> list[str]:
    from runtime import RequestError

    try:
        return [bytes(value).decode("utf-8") for value in tensor.as_numpy().reshape(-1)]
    except UnicodeDecodeError as error:
        raise RequestError(f"{name} is no text in UTF-8") from error


def _same(name: str, values: Sequence[Any]) -> Any:
    from runtime import RequestError

    if len(set(values)) != 1:
        raise RequestError(f"{name} has unlike values {list(values)!r:.60} in one request; send requests of their own")
    return values[0]


def _tensors(made: "Generation", at: int, count: int, kind: Any) -> list[Any]:
    """The output tensors of a request whose pictures stand in a batch from ``at`` on."""
    import numpy as np

    pictures = np.stack([np.asarray(image, np.uint8) for image in made.images[at : at + count]])
    told = [json.dumps(made.metadata(number)).encode() for number in range(at, at + count)]
    return [kind("IMAGE", pictures), kind("MADE_FROM", np.array(told, object).reshape(count, 1))]
