"""A picture's call as a Python program and as a command, which make the same picture again."""

import shlex
from pathlib import Path

from runtime import Generation, Pipeline, Plan, PlanError, Request, find_plan

__all__ = ["IMAGE", "MASK", "as_command", "as_python", "bundle_name"]

IMAGE, MASK, PLAN = "image.png", "mask.png", "plan.json"
"""The files that the texts read; the page offers those that were painted for download."""


def bundle_name(folder: Path) -> str:
    """The bundle's folder as the texts name it: below the server's working directory, or else by its name alone."""
    try:
        return folder.resolve().relative_to(Path.cwd().resolve()).as_posix()
    except ValueError:
        return f"bundles/{folder.name}"


def as_python(made: Generation, pipeline: Pipeline) -> str:
    """A program that makes the picture again and writes ``out.png``; a plan of the visitor's own stands in it."""
    request, plan = _request(made), made.plan
    given: dict[str, object] = {
        "negative_prompt": request.negative_prompt or None,
        "steps": request.steps,
        "guidance_scale": made.guidance_scale,
        "seed": made.seeds[0],
        "height": request.height,
        "width": request.width,
        "scheduler": request.scheduler,
        "image": IMAGE if request.image is not None else None,
        "strength": request.strength if request.image is not None else None,
        "mask": MASK if request.mask is not None else None,
        "bundle": bundle_name(pipeline.bundle.folder),
        "engine": pipeline.engine.name,
    }
    lines = [f"    {name}={value!r}," for name, value in given.items() if value is not None]
    shown = repr(plan.name) if _is_preset(plan) else f"unet_heirloom.Plan.model_validate_json({plan.model_dump_json()!r})"
    head = ["import unet_heirloom", "", "made = unet_heirloom.generate(", f"    {request.prompts[0]!r},", f"    plan={shown},"]
    return "\n".join([*head, *lines, ")", 'made.save("out.png")', ""])


def as_command(made: Generation, pipeline: Pipeline) -> str:
    """A command for a POSIX shell that makes the picture again and writes ``out.png``; before it, what writes its plan file."""
    request, plan = _request(made), made.plan
    words = ["python", "-m", "runtime", "--plan", plan.name if _is_preset(plan) else PLAN]
    words += ["--bundle", bundle_name(pipeline.bundle.folder), "--engine", pipeline.engine.name]
    words += ["--steps", str(request.steps), "--scheduler", request.scheduler, "--guidance", repr(made.guidance_scale)]
    words += [f"--seed={made.seeds[0]}", "--size", f"{request.height}x{request.width}"]
    words += [f"--negative={request.negative_prompts[0]}"] if request.negative_prompts[0] else []
    if request.image is not None:
        words += ["--image", IMAGE, "--strength", repr(request.strength)]
    words += ["--mask", MASK] if request.mask is not None else []
    command = shlex.join([*words, "--", request.prompts[0]])
    file = "" if _is_preset(plan) else f"cat > {PLAN} <<'END'\n{plan.model_dump_json(indent=1)}\nEND\n"
    return f"{file}{command}\n"


def _request(made: Generation) -> Request:
    assert made.request is not None, "the page makes pictures out of requests"
    return made.request


def _is_preset(plan: Plan) -> bool:
    """Whether a plan's name says all of it."""
    try:
        return not plan.name.endswith(".json") and find_plan(plan.name) == plan
    except PlanError:
        return False
