"""Self- and cross-attention inherited by themselves, against diffusers' modules with hooks on them (T-GATE, arXiv 2404.02747)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from engines.bundle.manifest import Feature
from runtime import LoadedBundle, Plan, Rule
from runtime.errors import PartitionError, PlanError
from runtime.plans.key_steps import Explicit, Uniform
from runtime.plans.plan import UNetRange
from runtime.plans.presets import find_plan
from runtime.plans.words import Predict
from tests.support.denoise import denoise
from tests.support.reference import mini_text, mini_unet, reference_noise, reference_scheduler
from tests.support.reference_script import Script, reference_script
from tests.support.reference_words import Halves, reference_words
from tests.support.reference_words import Rule as Words
from tests.support.unets import (
    TEXT_WIDTH,
    TOKENS,
    live_network,
    manifest_of,
    relative_error,
    shared_network,
    shared_unet,
    small_unet,
)

TOLERANCE = 1e-4
"""Of the largest final latent: float32 sums in another order give 1e-6 a step; a wrong feature gives more than 1e-3."""
STEPS = 8
UNEVEN = ["down_blocks.0.attentions.0", "down_blocks.0.attentions.1", "down_blocks.1.attentions.0", "mid_block.attentions.0",
          "up_blocks.1.attentions.0", "up_blocks.1.attentions.1", "up_blocks.2.attentions.0", "up_blocks.2.attentions.1",
          "up_blocks.2.attentions.2"]  # fmt: skip


def inner(transformers: list[str], which: str) -> list[str]:
    return [f"{path}.transformer_blocks.0.{which}" for path in transformers]


# What a rule names, how, and the modules of diffusers whose outputs (or with them the sums they go into) are put back.
LEVELS: dict[str, tuple[tuple[str, ...], str, list[str], str]] = {
    "cross-attentions": (("*.attention.cross",), "residual", inner(UNEVEN, "attn2"), "output"),
    "self-attentions": (("*.attention.self",), "residual", inner(UNEVEN, "attn1"), "output"),
    "both": (("*.attention.self", "*.attention.cross"), "residual", inner(UNEVEN, "attn1") + inner(UNEVEN, "attn2"), "output"),
    "one": (("up.2.layer.1.attention.cross",), "residual", inner(["up_blocks.2.attentions.1"], "attn2"), "output"),
    "sums behind cross-attention": (("*.attention.cross",), "output", inner(UNEVEN, "attn2"), "sum"),
    "sums behind self-attention": (("up.*.attention.self",), "output", inner(UNEVEN[4:], "attn1"), "sum"),
    "projections": (("down.*.attention.input",), "output", [f"{path}.proj_in" for path in UNEVEN[:3]], "output"),
    "whole attentions": (("*.attention",), "residual", UNEVEN, "residual"),
    "whole attentions by output": (("up.2.*.attention",), "output", UNEVEN[6:], "output"),
}


def network(*plans: Plan, granularity: Any = None) -> LoadedBundle:
    return shared_network("uneven", granularity, "tgate:0.5", *plans)


def inputs(guidance: float, images: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    rows = images * (2 if guidance > 1 else 1)
    return torch.randn(images, 4, 8, 16, generator=generator), torch.randn(rows, TOKENS, TEXT_WIDTH, generator=generator)


def check(plan: Plan, networks: list[LoadedBundle], guidance: float, images: int, rules: list[Words], **reference: Any) -> None:
    """Each of the networks makes the reference's latents."""
    latents, text = inputs(guidance, images)
    noise, unet = reference_scheduler("ddim", STEPS), shared_unet("uneven")
    expected = reference_words(unet, noise, latents, text, guidance, rules, **reference)
    for loaded in networks:
        made, _ = denoise({"one": loaded}, reference_scheduler("ddim", STEPS), latents, text, plan, guidance)
        assert relative_error(made, expected) < TOLERANCE


@pytest.mark.parametrize("damping", [None, 0.75], ids=["reused", "forecast"])
@pytest.mark.parametrize("level", list(LEVELS))
def test_parts_of_transformers_by_both_kinds(level: str, damping: float | None) -> None:
    units, kind, paths, reference = LEVELS[level]
    predict = None if damping is None else Predict(damping=damping)
    reused = Rule(units=units, kind=kind, when=Uniform(every=3))
    plan = Plan(name=level, rules=(reused.model_copy(update={"predict": predict}),))
    rules = [Words(paths, {0, 3, 6}, reference, damping)]
    check(plan, [network(Plan(name=level, rules=(reused,)))], 1.0, 2, rules)  # bundles are cut alike for both


@pytest.mark.parametrize(("guidance", "images"), [(1.0, 1), (1.0, 3), (3.0, 1), (3.0, 2)])
@pytest.mark.parametrize(("share", "gate"), [("0.25", 2), ("0.5", 4), ("0.8", 6)])
def test_the_preset_gates_cross_attention(share: str, gate: int, guidance: float, images: int) -> None:
    rules = [Words(inner(UNEVEN, "attn2"), range(gate + 1))]
    plan = find_plan(f"tgate:{share}")
    check(plan, [network(), network(granularity="unit")], guidance, images, rules)


def test_it_joins_with_other_words() -> None:
    plan = find_plan("tgate:0.5+deepcache:3+guide:2")
    rules = [Words(inner(UNEVEN, "attn2"), range(5)), Words(["up_blocks.2.resnets.1", "up_blocks.2.attentions.1"], {0, 3, 6})]
    # Where a rule's part of the schedule begins, both halves of guidance are computed.
    check(plan, [network(plan)], 3.0, 2, rules, halves=Halves({0, 2, 4, 6}))


def test_its_steps_compute_no_cross_attention_behind_the_gate() -> None:
    latents, text = inputs(1.0, 1)
    loaded = network()
    crosses = {segment.name for segment in loaded.manifest.segments if segment.name.endswith(".cross")}
    assert len(crosses) == len(UNEVEN)
    _, records = denoise({"one": loaded}, reference_scheduler("ddim", STEPS), latents, text, find_plan("tgate:0.5"))
    assert [crosses.intersection(record.ran) for record in records] == [crosses] * 5 + [set()] * 3


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("carry", [False, True])
def test_across_a_switch(carry: bool, guidance: float) -> None:
    """From one UNet to another of the same units: the second computes its own features afresh unless the plan carries them."""
    torch.manual_seed(9)
    unets = {"one": small_unet("uneven"), "two": small_unet("uneven", norm_eps=0.3)}
    plan = Plan(
        name="switched",
        unets=(UNetRange(unet="one", start=0, stop=4), UNetRange(unet="two", start=4)),
        switch_by="steps",
        rules=(Rule(units=("*.attention.cross",), kind="residual", when=Explicit(steps=(0,)), start=0.25),),
        carry=carry,
    )
    loaded = {name: live_network(unet, manifest_of(unet, None, [plan])) for name, unet in unets.items()}
    latents, text = inputs(guidance, 2)
    made, _ = denoise(loaded, reference_scheduler("ddim", STEPS), latents, text, plan, guidance)
    paths = dict.fromkeys(inner(UNEVEN, "attn2"), "output")
    keys = {0, 1, 2} if carry else {0, 1, 2, 4}
    script: Script = [("one" if i < 4 else "two", {} if i in keys else paths) for i in range(STEPS)]
    expected = reference_script(unets, reference_scheduler("ddim", STEPS), latents, text, guidance, script)
    assert relative_error(made, expected) < TOLERANCE
    assert keys == {0, 1, 2} or relative_error(expected, latents) > TOLERANCE


def test_the_embedded_model() -> None:
    """Its weights were trained, and its text matters: gated late its latents are near those of full, early they are not."""
    unet = mini_unet()
    manifest = manifest_of(unet, None, ["tgate:0.5"])
    features = {
        **manifest.features,
        "text_encoder": Feature(dtype="float32", shape=("batch", 32, unet.config.cross_attention_dim)),
    }
    loaded = live_network(unet, manifest.model_copy(update={"features": features}))
    text, latents = mini_text(["", "a red star on a blue background"]), reference_noise(3, 1, 4, 8, 8)
    attentions = [name for name, module in unet.named_modules() if type(module).__name__ == "Transformer2DModel"]
    assert len(attentions) == 16
    found = {}
    for share, gate in (("0.2", 1), ("0.8", 5)):
        noise = reference_scheduler("dpm++", 6)
        made, _ = denoise({"one": loaded}, noise, latents, text, find_plan(f"tgate:{share}"), 3.0)
        rules = [Words(inner(attentions, "attn2"), range(gate + 1))]
        expected = reference_words(unet, reference_scheduler("dpm++", 6), latents, text, 3.0, rules)
        assert relative_error(made, expected) < TOLERANCE
        found[share] = made
    full = reference_words(unet, reference_scheduler("dpm++", 6), latents, text, 3.0)
    assert relative_error(found["0.8"], full) < TOLERANCE  # of six steps it gates none: the last is its key step
    assert relative_error(found["0.2"], full) > 10 * TOLERANCE


def test_a_bundle_with_whole_transformers_says_what_it_needs() -> None:
    loaded = shared_network("uneven", "unit", "unit:2")
    latents, text = inputs(1.0, 1)
    with pytest.raises(
        PartitionError, match=r"plan tgate:0.5, UNet one: rules.0.units names '\*.attention.cross', a part of attentions"
    ):
        denoise({"one": loaded}, reference_scheduler("ddim", STEPS), latents, text, find_plan("tgate:0.5"))
    counted = Plan(name="own", rules=(Rule(units=("up.-2.layer.0.attention.cross",), when=Explicit(steps=(0,))),))
    with pytest.raises(PartitionError, match="names 'up.-2.layer.0.attention.cross', a part of attentions"):
        denoise({"one": loaded}, reference_scheduler("ddim", STEPS), latents, text, counted)
    unknown = Plan(name="own", rules=(Rule(units=("*.attention.crosses",), when=Explicit(steps=(0,))),))
    with pytest.raises(PlanError, match=r"names '\*.attention.crosses', which this UNet does not have; its units: time, stem"):
        denoise({"one": loaded}, reference_scheduler("ddim", STEPS), latents, text, unknown)
    projected = Plan(name="own", rules=(Rule(units=("*.input",), kind="residual", when=Explicit(steps=(0,))),))
    with pytest.raises(PlanError, match=r"down.0.layer.0.attention.input has no residual branch"):
        denoise({"one": network()}, reference_scheduler("ddim", STEPS), latents, text, projected)


@pytest.mark.parametrize("text", ["0", "1", "1.5", "", "x", "-0.1", "nan"])
def test_shares_that_are_none(text: str) -> None:
    with pytest.raises(PlanError, match=r"tgate takes a number between 0 and 1, such as 0.4"):
        find_plan(f"tgate:{text}")
