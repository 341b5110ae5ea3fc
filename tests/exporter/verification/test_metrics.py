"""Measures of closeness order what is wrong after what is near, also where numbers are not finite."""

from __future__ import annotations

import math

import torch

from exporter.verification.metrics import cosine, psnr, relative_error


def test_what_is_not_finite_is_the_farthest() -> None:
    reference = torch.tensor([1.0, -2.0])
    for wrong in (math.nan, math.inf, -math.inf):
        made = torch.tensor([1.0, wrong])
        assert relative_error(made, reference) == math.inf
        assert cosine(made, reference) == -1
        assert psnr(made, reference) == -math.inf


def test_what_is_equal_is_the_nearest() -> None:
    reference = torch.tensor([1.0, -2.0])
    assert (relative_error(reference, reference), psnr(reference, reference)) == (0, math.inf)
    assert math.isclose(cosine(reference, reference), 1)


def test_a_reference_of_zeros() -> None:
    zeros, ones = torch.zeros(3), torch.ones(3)
    assert (relative_error(zeros, zeros), cosine(zeros, zeros)) == (0, 1)
    assert (relative_error(ones, zeros), cosine(ones, zeros)) == (1, -1)
