"""Sums over layers of millions of parameters, against float64."""

from __future__ import annotations

import pytest
import torch

from trainers.loop import long_sums

EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("size", [10, 2**16, 3_000_001])
def test_sums_keep_the_digits_of_their_terms(size: int) -> None:
    a = torch.randn(size, generator=torch.Generator().manual_seed(0))
    b = a + 0.1 * torch.randn(size, generator=torch.Generator().manual_seed(1))
    exact = [float(a.double() @ b.double()), float(b.double().norm()), float((a.double() - b.double()).norm())]
    found = [float(long_sums.dot(a, b)), float(long_sums.norm(b)), long_sums.distance(a, b)]
    assert found == pytest.approx(exact, rel=50 * EPS)  # what one chunk loses
    assert long_sums.products(torch.stack([a, b]), b).tolist() == pytest.approx([exact[0], exact[1] ** 2], rel=50 * EPS)


def test_derivatives_pass_through_the_chunks() -> None:
    rows, vector = torch.randn(2, 600_000), torch.randn(600_000, requires_grad=True)
    torch.testing.assert_close(torch.autograd.grad(long_sums.dot(rows[0], vector), vector)[0], rows[0])
    torch.testing.assert_close(torch.autograd.grad(long_sums.products(rows, vector).sum(), vector)[0], rows.sum(0))
    length = long_sums.norm(vector)
    torch.testing.assert_close(torch.autograd.grad(length, vector)[0], (vector / length).detach())
