"""What is compared fits the engines of a default build: those of the VAE take one picture, static ones one shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from engines import Bundle, Runner, Segment
from engines.ort.engine import OnnxRuntime
from exporter import verify
from exporter.segments.writer import profile_of
from exporter.verification.bisect import bisect
from exporter.verification.verify import CHAIN, TOLERANCE, Reference

SIZE = (64, 64)


class Profiled(OnnxRuntime):
    """ONNX Runtime, with segments that take no other shapes than those that a build makes engines with a profile for."""

    has_profile = True

    def load(self, bundle: Bundle, segment: Segment) -> Runner:
        runner: Any = super().load(bundle, segment)
        made, manifest = runner.run, bundle.manifest
        sizes, most, scale = manifest.sizes, manifest.max_images, manifest.vae_scale
        profile = profile_of(segment, manifest.features, sizes, most, scale, manifest.static, manifest.text_chunks)

        def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            for name in segment.inputs:
                limits = zip(profile.minimum[name], inputs[name].shape, profile.maximum[name], strict=True)
                assert all(low <= got <= high for low, got, high in limits), (segment.name, name, inputs[name].shape)
            return made(inputs)

        runner.run = run
        return runner


@pytest.fixture(scope="module")
def reference(mini_bundle: Bundle) -> Reference:
    return Reference.load(mini_bundle)


def built(bundle: Bundle, **options: object) -> Bundle:
    """The bundle as if its engines had been built with these options."""
    return replace(bundle, manifest=bundle.manifest.model_copy(update=options))


@pytest.mark.parametrize(
    ("options", "images"), [({}, {1, 3}), ({"max_images": 2}, {1, 2}), ({"static": True, "max_images": 2}, {2})]
)
def test_every_segment_is_given_what_its_engine_takes(
    mini_bundle: Bundle, reference: Reference, options: dict[str, object], images: set[int]
) -> None:
    bundle = built(mini_bundle, **options)
    found = list(verify(bundle, Profiled(), [SIZE], reference))
    assert {comparison.images for comparison in found} == images
    assert {comparison.segment for comparison in found} == {CHAIN, *(segment.name for segment in bundle.manifest.segments)}
    assert max(comparison.error for comparison in found) < TOLERANCE["fp32"]


@pytest.mark.parametrize(("segment", "images"), [("vae_decoder", 1), ("vae_encoder", 1), ("mid", 2)])
def test_a_static_segment_is_bisected_at_its_one_shape(
    mini_bundle: Bundle, reference: Reference, segment: str, images: int
) -> None:
    found = bisect(built(mini_bundle, static=True, max_images=2), Profiled(), segment, SIZE, reference)
    assert found.setting.images == images
    assert found.culprit is None
    assert max(found.graph_error, found.engine_error) < TOLERANCE["fp32"]
