"""Formulas that whole spectra exercise only together with others, each against its definition."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xarray as xr
from scipy.stats import t as student_t

from pnanalysis.estimates import Estimate
from pnanalysis.spectra import inner_products
from pnanalysis.spectra.data_error import Influence, _effective_influences
from pnanalysis.spectra.density import spectral_density
from pnanalysis.spectra.differences import _distance, _mean_root_factor, _probe_noise, compare_spectra
from pnanalysis.spectra.ends import _share, class_numbers
from pnanalysis.spectra.half_samples import distance_between_halves, sample_examples
from pnanalysis.spectra.merged import MergedSpaces
from pnanalysis.spectra.moments import Moments, moments
from pnanalysis.spectra.quadrature import SpectralMeasure, ritz
from pnanalysis.spectra.rule_error import _PLACES, _with_added_node
from pnanalysis.spectra.summary import _without_noise
from pnanalysis.spectra.total_error import _interval
from tests.spectra.known_spectra import spectrum, spiked
from tests.spectra.test_differences import over_examples


def test_error_of_a_root_is_half_that_of_the_square_over_the_root() -> None:
    norm = Moments(Estimate(1.0, 0.1), Estimate(9.0, 0.6, dof=7)).frobenius_norm
    assert (norm.value, norm.se, norm.dof) == pytest.approx((3.0, 0.1, 7))
    assert Moments(Estimate(0.0), Estimate(-1e-20, 0.6)).frobenius_norm.se == 0


def test_what_couples_the_deflated_space_counts_twice_in_the_sum_of_squares() -> None:
    ds = spectrum(spiked(40), n_lanczos=6, n_probes=2, deflate=False)
    measure = SpectralMeasure.from_dataset(ds)
    without, coupled = (moments(ds.assign(coupling=coupling), measure).square.value for coupling in (0.0, 3.0))
    assert coupled - without == pytest.approx(2 * 3.0**2)


def test_a_part_of_the_trace_has_the_relative_error_of_the_trace() -> None:
    part = Estimate(2.0, low=2.0, high=2.5)
    share = _share(part, Estimate(10.0, 0.4, dof=np.inf), 0.95)
    assert share.value == pytest.approx(0.2)
    assert share.se / share.value == pytest.approx(0.4 / 10)
    assert share.low == pytest.approx(2 / (10 + 1.96 * 0.4), rel=1e-4)
    assert share.high == pytest.approx(2.5 / (10 - 1.96 * 0.4), rel=1e-4)
    assert math.isnan(_share(part, Estimate(1.0, 0.6), 0.95).value)  # a trace that may be negative


def test_standard_deviations_of_small_normal_samples_are_too_small_by_c4() -> None:
    np.testing.assert_allclose(_mean_root_factor(np.array([1.0, 4.0, 1e9])), [0.797885, 0.939986, 1.0], rtol=1e-6)


def test_error_of_a_distance_adds_that_of_probes_and_examples() -> None:
    a, b = over_examples(64, 0, data_error="groups"), over_examples(64, 1, 0.05, "groups")
    found = compare_spectra(a, b)
    probes = _probe_noise(SpectralMeasure.from_dataset(a), SpectralMeasure.from_dataset(b))
    examples, dof = distance_between_halves(a, b, False)
    assert float(found.wasserstein1_noise) == pytest.approx(probes + examples)
    # a normal number of standard deviation s has a mean magnitude of s sqrt(2 / pi)
    expected = (probes + examples * student_t.ppf(0.975, dof) / 1.96) * math.sqrt(math.pi / 2)
    assert float(found.wasserstein1_se) == pytest.approx(expected)


def test_distances_of_spectra_by_finite_differences_have_the_errors_of_both() -> None:
    a, b = (spectrum(spiked(40), seed, n_lanczos=6, n_probes=2, deflate=False) for seed in (0, 1))
    exact, _ = _distance(a, b, same=False)
    off = {"finite_differences": 1, "round_off": 1e-3}
    found, _ = _distance(a.assign_attrs(off), b.assign_attrs(off), same=False)
    more = 1e-3 * float(np.abs(a.node).max() + np.abs(b.node).max())
    for name in ("wasserstein1_noise", "wasserstein1_se"):
        assert found[name] == pytest.approx(exact[name] + more, rel=1e-12)


def test_a_norm_by_finite_differences_may_be_all_noise() -> None:
    ds = xr.Dataset({"n_parameters": 100}, attrs={"finite_differences": 1})
    norm = _without_noise(Estimate(2.0, 0.1), ds, 0.15)
    assert norm.low == pytest.approx(math.sqrt((2 - 1.96 * 0.1) ** 2 - 100 * 0.15**2), rel=1e-3)
    assert _without_noise(Estimate(0.5, 0.1), ds, 0.15).low == 0  # 100 errors of 0.15 have a norm of 1.5


def three_values(n_probes: int) -> SpectralMeasure:
    """Eigenvalues 1, -1, 0 and 0, as each of some probes of four dimensions would see them on average."""
    node, probe = np.tile([1.0, -1.0, 0.0, 0.0], n_probes), np.repeat(np.arange(1, n_probes + 1), 4)
    return SpectralMeasure(node, np.full(4 * n_probes, 0.25 / n_probes), probe, np.zeros(4 * n_probes, int), 4)


def test_degrees_of_freedom_of_a_mean_come_from_the_kurtosis() -> None:
    measure = three_values(n_probes=3)
    found = measure.mean(7.0 * measure.node)
    # the variance, 1/2 of 7², is that of the form of a random direction in four dimensions, over three of these
    assert found.se == pytest.approx(math.sqrt(49 / 2 * 2 / (4 + 2) / 3))
    # squared deviations of mean 1/2 and mean square 1/2: a relative variance of 1, of which three probes see a part
    assert found.dof == pytest.approx(2 / (2 / (4 + 2) / 3))


def test_other_rules_keep_mean_and_mean_square() -> None:
    measure = three_values(n_probes=2)
    nodes = [np.array([-1.2, 0.3, 1.4]), np.array([-0.9, -0.1, 0.8])]
    found = measure.with_rules([(node, np.array([0.3, 0.4, 0.3])) for node in nodes])
    np.testing.assert_array_equal(found.node, np.concatenate(nodes))
    assert found.weight @ found.node == pytest.approx(measure.weight @ measure.node, abs=1e-12)
    assert found.weight @ found.node**2 == pytest.approx(measure.weight @ measure.node**2)


def test_a_node_is_added_within_the_cell_about_zero() -> None:
    rule = ritz(np.array([0.1, -0.2, 0.3, 0.0]), np.array([1.0, 0.7, 0.5, 0.2]))
    below, above = rule.value[1:3]
    assert -1 < below < 0 < above < 1
    points = [0.0, *(below + _PLACES * (above - below))]
    for point, (node, weight) in zip(points, _with_added_node(rule, -9.0, 9.0), strict=True):
        assert len(node) == 5
        assert np.abs(node - point).min() < 1e-12
        assert weight @ node**2 == pytest.approx(rule.weight @ rule.value**2)
    # rather than a node beyond the bounds
    assert all(node is rule.value for node, _ in _with_added_node(rule, -9.0, rule.value[-1]))


def test_what_couples_spaces_is_counted_as_often_as_they_are_left_out() -> None:
    """For a function's sum: all spaces together, less what an estimate with the first k counts of them."""
    random = np.random.default_rng(0)
    tridiagonal = [(random.normal(size=n), random.uniform(0.5, 1, size=n)) for n in (3, 2, 2)]
    spaces = MergedSpaces([0.6 * np.eye(1, 4)[0], 0.8 * np.eye(1, 2)[0], np.zeros(0)], np.eye(3))
    fractions = np.array([0.4, 0.3, 0.2, 0.1])
    matrix = spaces._matrix(tridiagonal)
    whole = np.linalg.eigvalsh(matrix)
    node, weight = spaces.correction(tridiagonal, whole, fractions)
    expected = 0.0
    for k, end in ((1, 3), (2, 5), (3, 7)):
        singles = [matrix[own, own] for own in (slice(0, 3), slice(3, 5), slice(5, 7))[:k]]
        counted = sum(np.exp(np.linalg.eigvalsh(one)).sum() for one in [*singles, matrix[end:, end:]])
        expected += fractions[k] * (np.exp(whole).sum() - counted)
    assert weight @ np.exp(node) == pytest.approx(expected)
    assert weight.sum() == pytest.approx(0, abs=1e-12)


def test_bounds_of_the_share_of_classes_are_those_of_their_eigenvalues() -> None:
    ds = xr.Dataset(
        {
            "ritz_value": (("probe", "ritz"), [[0.1, 2.0, 3.0, 6.0]]),
            "ritz_residual": (("probe", "ritz"), [[0.0, 0.002, 0.01, 0.03]]),
            "ritz_coupling": ("probe", [0.0]),
        }
    )
    found = class_numbers(ds, 2, Estimate(20.0, 0.0), 0.95, slack=1e-3)["class_trace"]
    assert found.value == pytest.approx((6 + 3) / 20)
    assert (found.low, found.high) == pytest.approx(((6 + 3 - 2e-3) / 20, (6.03 + 3.01 + 2e-3) / 20))


def test_chunks_of_bases_in_another_precision_are_of_bounded_size() -> None:
    V, basis = torch.zeros(300_000, 1), torch.zeros(1, 400, dtype=torch.float64).expand(300_000, 400)
    chunks = inner_products._chunks(V, [basis])
    assert all(400 * (chunk.stop - chunk.start) <= inner_products._MOST_COPIED for chunk in chunks)
    assert (chunks[0].start, chunks[-1].stop >= 300_000) == (0, True)
    assert all(one.stop == other.start for one, other in itertools.pairwise(chunks))


def test_errors_of_examples_widen_intervals() -> None:
    found = _interval("trace", 10.0, (1.0, 2.0), 3.0, statistical=True)
    assert found == pytest.approx({"trace_low": 10 - math.hypot(1, 3), "trace_high": 10 + math.hypot(2, 3)})
    found = _interval("trace", 10.0, (1.0, 2.0), 3.0, statistical=False)
    assert found == {"trace_low": 6, "trace_high": 15}
    found = _interval("negative_mass", 0.5, (0.1, 0.1), 0.7, statistical=False)
    assert found == {"negative_mass_low": 0, "negative_mass_high": 1}  # a part of the whole


def test_without_leading_vectors_no_product_is_made_for_halves() -> None:
    forms = SimpleNamespace(dataset=xr.Dataset, reason="no forms", top_vector=None)
    found = sample_examples(forms, "examples", spectral_density, None, "")
    assert found.attrs == {"data_error": "none", "n_hvp_data": 0}


def test_effective_dimension_varies_as_its_derivative_says() -> None:
    eigenvalue, ridge, zero = np.array([4.0, 1.0, 0.5, 0.0]), 2.0, np.zeros(16)
    ds = xr.Dataset(
        {
            "node": ("quadrature", eigenvalue),
            "weight": ("quadrature", np.full(4, 0.25)),
            "node_run": ("quadrature", np.zeros(4)),
            "node_n_before": ("quadrature", np.zeros(4)),
            "n_parameters": 4,
            "frobenius_norm": np.linalg.norm(eigenvalue),
            "trace": eigenvalue.sum(),
            "effective_rank": eigenvalue.sum() ** 2 / (eigenvalue**2).sum(),
        },
        attrs={"ridge": ridge},
    )
    random = np.random.default_rng(0)
    weight, (first, others) = np.full(16, 1 / 16), random.exponential(size=(2, 16))
    leading = Influence(weight, 4 * first / first.mean(), zero)
    rest = Influence(weight, 1.5 * others / others.mean(), zero)
    trace = Influence(weight, leading.form + rest.form, zero)
    found = dict(_effective_influences(ds, trace, trace, leading.form[None]))["effective_dimension"]
    # d/dx of x / (x + ridge) is ridge / (x + ridge)²; the others grow together, by as much as the leading one does
    slope, others_gain = ridge / (4 + ridge) ** 2, sum(ridge * x / (x + ridge) ** 2 for x in (1.0, 0.5))
    grown = (leading.se / 4) / rest.se * rest.form
    np.testing.assert_allclose(found.form, slope * leading.form + others_gain * grown, rtol=1e-12)
