"""Standard errors over examples: per-example formulas, and coverage on clustered numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from pnanalysis.activations.cluster_errors import CumulativeFractions, ExampleMoments
from pnanalysis.activations.functions import ACTIVATIONS, Activation
from pnanalysis.activations.statistics import LayerActivity, Measures

TANH = ACTIVATIONS["tanh"]
BETWEEN, WITHIN = 1.0, 0.7  # standard deviations of an example's level, and of the numbers around it
SPREAD = float(np.hypot(BETWEEN, WITHIN))


def clustered(n: int, seed: int) -> torch.Tensor:
    """tanh of numbers that share a level within an example, (n, 4, 10)."""
    generator = torch.Generator().manual_seed(seed)
    level = BETWEEN * torch.randn(n, 1, 1, generator=generator)
    return (level + WITHIN * torch.randn(n, 4, 10, generator=generator)).tanh()


def truths() -> dict[str, float]:
    """Limits of the estimates for many examples, by quadrature over the normal distribution."""

    def expect(f: object) -> float:
        return integrate.quad(lambda z: f(np.tanh(SPREAD * z)) * stats.norm.pdf(z), -9, 9, limit=200)[0]

    beyond = 2 * stats.norm.sf(np.arctanh(0.95) / SPREAD)
    in_bin = stats.norm.cdf(np.arctanh([0.5, 0.6]) / SPREAD)
    return {
        "mean": 0.0,
        "std": np.sqrt(expect(np.square)),
        "saturation_measure": expect(np.abs),
        "saturated_share": beyond,
        "median": 0.0,
        "p98": np.tanh(SPREAD * stats.norm.ppf(0.98)),
        "abs75": np.tanh(SPREAD * stats.norm.ppf(0.875)),
        "bin": (in_bin[1] - in_bin[0]) / 0.1,
    }


def estimates(variables: dict) -> dict[str, tuple[float, float]]:
    def pick(name: str, *at: int) -> tuple[float, float]:
        return tuple(float(np.asarray(variables[key][1])[at]) for key in (name, f"{name}_se"))

    own = {name: pick(name) for name in ("mean", "std", "saturation_measure", "saturated_share")}
    return own | {
        "median": pick("percentile", 2), "p98": pick("percentile", 4), "abs75": pick("abs_percentile", 3),
        "bin": pick("histogram", 15),
    }  # fmt: skip


@pytest.mark.parametrize("exact_limit", [0, 10**6], ids=["sketch", "exact"])
def test_intervals_cover_what_the_estimates_converge_to(exact_limit: int) -> None:
    n, repeats, true = 200, 300, truths()
    hits = dict.fromkeys(true, 0)
    naive = 0
    for seed in range(repeats):
        layer = LayerActivity(TANH, Measures(bins=20, exact_limit=exact_limit), (-1.0, 1.0))
        values = clustered(n, seed)
        layer.add(values)
        found = estimates(layer.variables())
        for name, (value, se) in found.items():
            hits[name] += abs(value - true[name]) <= 1.96 * se
        naive += abs(found["mean"][0]) <= 1.96 * float(values.std()) / values.numel() ** 0.5
    # 95 %, less 0.3 points for 199 degrees of freedom; four binomial standard errors, and two points of bias for
    # skewed estimates
    slack = 4 * np.sqrt(0.05 * 0.95 / repeats)
    for name, hit in hits.items():
        assert 0.947 - slack - 0.02 <= hit / repeats <= 0.947 + slack + 0.02, name
    assert naive / repeats < 0.5  # numbers of one example are far from independent


@pytest.mark.parametrize("cross", [False, True])
def test_the_variance_of_a_ratio(cross: bool) -> None:
    generator = np.random.default_rng(0)
    moments, other = ExampleMoments(cross), ExampleMoments(cross)
    rows, counts = generator.normal(2.0, 1.0, (9, 3)), np.repeat([5, 2], [4, 5])
    moments.add(torch.from_numpy(rows[:4]), 5)
    other.add(torch.from_numpy(rows[4:]), 2)
    moments.merge(other)
    mean = rows.sum(0) / counts.sum()
    away = rows - np.outer(counts, mean)
    expected = 9 / 8 * away.T @ away / counts.sum() ** 2
    np.testing.assert_allclose(moments.mean(), mean, rtol=1e-13)
    np.testing.assert_allclose(moments.covariance(), expected if cross else np.diag(expected), rtol=1e-11, atol=1e-15)
    np.testing.assert_allclose(moments.standard_error(), np.sqrt(np.diag(expected)), rtol=1e-11)


def test_standard_errors_of_fractions_are_exact_at_borders_of_buckets() -> None:
    values = clustered(50, 1).flatten(1)
    fractions = CumulativeFractions()
    for part in values.split(20):
        fractions.add(part)
    for border in (0.5, 0.75):  # powers of two and their eighths are borders
        for absolute in (False, True):
            below = ((values.abs() if absolute else values) < border).double().mean(1).numpy()
            se = fractions.standard_error(np.array([below.mean()]), absolute)
            np.testing.assert_allclose(se, below.std(ddof=1) / np.sqrt(50), rtol=1e-6)


def test_numbers_that_are_all_equal_have_no_error() -> None:
    layer = LayerActivity(Activation("relu", 0.0, rectifier=True), Measures(), (0.0, 1.0))
    layer.add(torch.zeros(30, 5))
    variables = layer.variables()
    for name in ("percentile_se", "abs_percentile_se", "mean_se", "std_se", "saturated_share_se"):
        np.testing.assert_array_equal(variables[name][1], 0.0)
    assert variables["dead_units"][1] == 5


def test_one_example_has_no_standard_error() -> None:
    layer = LayerActivity(TANH, Measures(), (-1.0, 1.0))
    layer.add(clustered(1, 0))
    variables = layer.variables()
    assert np.isfinite(variables["percentile"][1]).all()
    for name in ("percentile_se", "histogram_se", "mean_se", "saturated_share_se", "saturation_measure_se"):
        assert np.isnan(variables[name][1]).all(), name


@pytest.mark.parametrize("exact_limit", [0, 1500, 10**6])
def test_layers_merge_to_what_one_pass_gives(exact_limit: int) -> None:
    measures = Measures(per_unit=True, saturation_bins=5, exact_limit=exact_limit)
    whole, *parts = (LayerActivity(TANH, measures, (-1.0, 1.0)) for _ in range(4))
    values = clustered(60, 3)
    whole.add(values)
    for part, own in zip(parts, values.split([10, 1, 49]), strict=True):
        part.add(own)
    merged = LayerActivity(TANH, measures, (-1.0, 1.0))
    for part in parts:
        merged.merge(part)
    expected = whole.variables()
    for name, (_, value) in merged.variables().items():
        np.testing.assert_allclose(value, expected[name][1], rtol=1e-9, atol=1e-12, err_msg=name)
