"""`first:X`: key steps by the change of what the first block's attention adds, against diffusers' modules with hooks on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.plans.checks import check_runs
from runtime.plans.presets import find_plan
from runtime.plans.schedule import Schedule
from tests.support.denoise import denoise
from tests.support.reference import reference_scheduler
from tests.support.unets import TEXT_WIDTH, TOKENS, live_network, manifest_of, relative_error, small_unet

TOLERANCE = 1e-4
"""Of the largest final latent: float32 sums in another order give 1e-6 a step; a wrong feature gives more than 1e-3."""
STEPS, GUIDANCE, ABOVE = 8, 3.0, 0.12
FIRST, INHERITED = "down_blocks.0.attentions.0", "up_blocks.2.attentions.1"


class Reference:
    """Runs the whole UNet to decide a step, and once more with the feature of the last key step put back."""

    def __init__(self, unet: Any) -> None:
        self.unet, self.keys = unet, list[int]()
        self.added = self.kept = self.made = self.feature = torch.zeros(1)

    def predict(self, index: int, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        first, inherited = (self.unet.get_submodule(path) for path in (FIRST, INHERITED))
        hooks = [first.register_forward_hook(self.see_first), inherited.register_forward_hook(self.see_feature)]
        with torch.no_grad():
            prediction: Tensor = self.unet(sample, timestep, text).sample
        hooks.pop().remove()
        hooks.pop().remove()
        if not self.keys or float((self.added - self.kept).norm()) > ABOVE * float(self.kept.norm()):
            self.keys.append(index)
            self.kept, self.feature = self.added, self.made
            return prediction
        hook = inherited.register_forward_hook(lambda module, args, output: (self.feature,))
        with torch.no_grad():
            prediction = self.unet(sample, timestep, text).sample
        hook.remove()
        return prediction

    def see_first(self, module: Any, args: Any, output: Any) -> None:
        self.added = output[0] - args[0]

    def see_feature(self, module: Any, args: Any, output: Any) -> None:
        self.made = output[0]


def reference(unet: Any, latents: Tensor, text: Tensor) -> tuple[Tensor, list[int]]:
    """Final latents and key steps."""
    noise, run = reference_scheduler("ddim", STEPS), Reference(unet)
    for index, timestep in enumerate(noise.timesteps):
        negative, positive = run.predict(index, torch.cat([latents, latents]), timestep, text).chunk(2)
        latents = noise.step(negative + GUIDANCE * (positive - negative), timestep, latents).prev_sample
    return latents, run.keys


def test_key_steps_and_latents() -> None:
    unet = small_unet("uneven")
    plan = find_plan(f"first:{ABOVE}")
    generator = torch.Generator().manual_seed(5)
    latents, text = torch.randn(2, 4, 8, 16, generator=generator), torch.randn(4, TOKENS, TEXT_WIDTH, generator=generator)
    expected, keys = reference(unet, latents, text)
    assert 1 < len(keys) < STEPS
    loaded = live_network(unet, manifest_of(unet, None, [plan]))
    made, records = denoise({"one": loaded}, reference_scheduler("ddim", STEPS), latents, text, plan, GUIDANCE)
    assert [record.index for record in records if record.kind == "key"] == keys
    assert relative_error(made, expected) < TOLERANCE


@pytest.mark.parametrize("granularity", [None, "unit"])
def test_bundles_that_are_partitioned_for_it(granularity: Any) -> None:
    """With parts of attention for another plan too; its inherit steps run the first layer, the last one and the head."""
    plan = find_plan("first:0.1")
    manifest = manifest_of(small_unet("uneven"), granularity, [plan, find_plan("tgate:0.4")])
    schedule = Schedule(plan, {"one": manifest}, [900.0, 600.0, 300.0])
    check_runs(schedule)
    segments = schedule.subgraph(schedule.resolve(1, changed=False)).segments
    ran = [unit for segment in segments for unit in segment.units]
    assert {"up.2.layer.2.attention", "head"} <= set(ran)
    assert not any(unit.startswith(("down.1", "down.2", "mid", "up.0", "up.1")) for unit in ran)
