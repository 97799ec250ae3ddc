"""Quantiles of a stream: within the sketch's bound of order statistics, however it is split and merged."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pnanalysis.activations.quantile_sketch import RELATIVE_ERROR, QuantileSketch


@pytest.mark.parametrize(
    ("limits", "whole_limit"),
    [
        ((0, 0), 0),
        ((10**6, 10**6), 10**6),
        ((10**6, 100), 0),  # a sketch that is merged into exact numbers makes them a sketch
        ((100, 10**6), 100),
        ((3000, 3000), 3000),  # both exact, and together too many
    ],
)
def test_sketches_merge_to_what_all_numbers_give(limits: tuple[int, int], whole_limit: int) -> None:
    values = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    merged, other = (QuantileSketch(limit) for limit in limits)
    whole = QuantileSketch(whole_limit)
    merged.add(values[:1500])
    for sketch, part in ((other, values[1500:]), (whole, values)):
        sketch.add(part)
    merged.merge(other)
    assert merged.count == 4000
    assert merged.exact == whole.exact
    levels = np.linspace(0, 1, 9)
    np.testing.assert_array_equal(merged.quantiles(levels), whole.quantiles(levels))
    ordered = np.sort(values.numpy())[np.floor(levels * 3999).astype(int)]
    np.testing.assert_allclose(merged.quantiles(levels), ordered, rtol=RELATIVE_ERROR, atol=2e-3)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000), scale=st.sampled_from([1e-3, 1.0, 1e4]), parts=st.integers(1, 5), relu=st.booleans()
)
def test_the_sketch_stays_within_its_bound_of_an_order_statistic(
    seed: int, scale: float, parts: int, relu: bool
) -> None:
    values = scale * torch.randn(2001, generator=torch.Generator().manual_seed(seed))
    values = values.relu() if relu else values
    sketch = QuantileSketch(exact_limit=100)
    for part in values.chunk(parts):
        sketch.add(part)
    assert not sketch.exact
    levels = np.array([0.0, 0.02, 0.25, 0.5, 0.75, 0.98, 1.0])
    for absolute in (False, True):
        ordered = np.sort(np.abs(values.numpy()) if absolute else values.numpy()).astype(np.float64)
        reference = ordered[np.round(levels * 2000).astype(int)]  # 2001 values: the levels fall on order statistics
        np.testing.assert_allclose(sketch.quantiles(levels, absolute), reference, rtol=RELATIVE_ERROR, atol=1e-38)


def test_the_sketchs_histogram_counts_all_but_values_near_an_edge() -> None:
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    sketch, exact = QuantileSketch(0), QuantileSketch()
    sketch.add(values)
    exact.add(values)
    edges = np.linspace(-4, 4, 21)
    difference = np.abs(sketch.histogram(edges) - exact.histogram(edges)) * np.diff(edges)
    # values within half a bucket (2^-10 relative) of an edge, of density at most 0.4, may be counted next door
    assert difference.max() < 2 * 4 * 2.0**-9 * 0.4
