"""Formulas that whole spectra exercise only together with others, each against its definition."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
import xarray as xr
from scipy.stats import t as student_t

from pnanalysis.errors import CurvatureError
from pnanalysis.estimates import Estimate
from pnanalysis.spectra.density import spectral_density
from pnanalysis.spectra.differences import _mean_root_factor, _probe_noise, compare_spectra
from pnanalysis.spectra.ends import _share
from pnanalysis.spectra.half_samples import distance_between_halves
from pnanalysis.spectra.linear_operator import DiagonalOperator, not_symmetric
from pnanalysis.spectra.moments import Moments
from pnanalysis.spectra.quadrature import SpectralMeasure
from pnanalysis.spectra.summary import _without_noise
from tests.spectra.test_differences import over_examples


def test_error_of_a_root_is_half_that_of_the_square_over_the_root() -> None:
    norm = Moments(Estimate(1.0, 0.1), Estimate(9.0, 0.6, dof=7)).frobenius_norm
    assert (norm.value, norm.se, norm.dof) == pytest.approx((3.0, 0.1, 7))
    assert Moments(Estimate(0.0), Estimate(-1e-20, 0.6)).frobenius_norm.se == 0


def test_a_part_of_the_trace_has_the_relative_error_of_the_trace() -> None:
    share = _share(2.0, 0.5, Estimate(10.0, 0.4, dof=np.inf), 0.95)
    assert share.value == pytest.approx(0.2)
    assert share.se / share.value == pytest.approx(0.4 / 10)
    assert share.low == pytest.approx(2 / (10 + 1.96 * 0.4), rel=1e-4)
    assert share.high == pytest.approx(2.5 / (10 - 1.96 * 0.4), rel=1e-4)
    assert math.isnan(_share(2.0, 0.5, Estimate(1.0, 0.6), 0.95).value)  # a trace that may be negative


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


def test_a_norm_by_finite_differences_may_be_all_noise() -> None:
    ds = xr.Dataset({"n_parameters": 100}, attrs={"finite_differences": 1})
    norm = _without_noise(Estimate(2.0, 0.1), ds, 0.15)
    assert norm.low == pytest.approx(math.sqrt((2 - 1.96 * 0.1) ** 2 - 100 * 0.15**2), rel=1e-3)
    assert _without_noise(Estimate(0.5, 0.1), ds, 0.15).low == 0  # 100 errors of 0.15 have a norm of 1.5


class Skewed(DiagonalOperator):
    """Products that are off by a small skew matrix."""

    def __init__(self, size: float, dtype: torch.dtype) -> None:
        super().__init__(torch.linspace(-1, 1, 400, dtype=dtype))
        self.size = size

    def matmat(self, V: torch.Tensor) -> torch.Tensor:
        return super().matmat(V) + self.size * (V.roll(1, 0) - V.roll(-1, 0)) / 2


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 0.5), (torch.float64, 1e-3)])
def test_matrices_that_are_not_symmetric_are_refused(dtype: torch.dtype, size: float) -> None:
    operator = Skewed(size, dtype)
    with pytest.raises(CurvatureError, match="not symmetric.*every product must use the same data"):
        spectral_density(operator, n_hvp=40, progress=False)
    operator.by_differences = True
    assert "finite differences are too coarse" in str(not_symmetric(operator, "of some kind"))


@pytest.mark.parametrize("by_differences", [True, False])
def test_differences_are_as_skew_as_their_own_error_says(by_differences: bool) -> None:
    operator = Skewed(1e-3, torch.float32)
    operator.by_differences, operator.round_off = by_differences, 1e-3
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        spectral_density(operator, n_hvp=40, progress=False)
    assert any("not quite symmetric" in str(one.message) for one in caught) == (not by_differences)
