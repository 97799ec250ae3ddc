"""Distances between spectra of blocks: their standard errors beside the scatter over repetitions."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from pnanalysis.spectra.block_spectra import spectrum_distances

NAMES = ("js_divergence", "wasserstein1")


def drawn(rng: np.random.Generator, scale: float, n: int = 60) -> xr.Dataset:
    """An estimate of the spectrum of a block, whose nodes and weights scatter."""
    node = scale * rng.gamma(2.0, size=n)
    return xr.Dataset({"node": ("quadrature", node), "weight": ("quadrature", rng.dirichlet(np.ones(n)))})


@pytest.fixture(scope="module")
def repeated() -> xr.Dataset:
    rng = np.random.default_rng(0)
    found = [spectrum_distances([[drawn(rng, scale) for scale in (1, 3, 9)] for _ in range(2)]) for _ in range(120)]
    kept = [f"{name}{end}" for name in NAMES for end in ("", "_se", "_low", "_high")]
    return xr.concat([ds[kept] for ds in found], "repetition")


@pytest.mark.parametrize("name", NAMES)
def test_standard_errors_of_distances_are_their_scatter(repeated: xr.Dataset, name: str) -> None:
    off = ~np.eye(3, dtype=bool)
    scatter = repeated[name].std("repetition", ddof=1).values[off]
    stated = np.sqrt(np.square(repeated[f"{name}_se"]).mean("repetition")).values[off]
    # over 120 repetitions: 7 % for the scatter, and 9 % for the mean of squares of two degrees of freedom
    np.testing.assert_allclose(stated / scatter, 1.0, atol=0.3)


@pytest.mark.parametrize("name", NAMES)
def test_intervals_of_distances_hold_their_mean(repeated: xr.Dataset, name: str) -> None:
    off = ~np.eye(3, dtype=bool)
    value, se, low, high = (repeated[f"{name}{end}"].values[:, off] for end in ("", "_se", "_low", "_high"))
    mean = value.mean(0)
    held = ((low <= mean) & (mean <= high)).mean()
    # three pairs of 120 repetitions, whose blocks are shared: 5 % of failures are known to 1.6
    assert 0.90 < held < 0.99
    assert (np.abs(value - mean) <= 1.96 * se).mean() < 0.88  # what intervals of a known error would do
    assert (low >= 0).all()
    half = high - value  # of Student's distribution with one to two degrees of freedom
    most = np.log(2) if name == "js_divergence" else np.inf
    free = high < most
    assert (half[free] > 4.30 * se[free]).all()
    assert (half <= 12.71 * se).all()
    assert (high <= most).all()


def test_one_block_has_no_error_but_its_noise(repeated: xr.Dataset) -> None:
    for name in NAMES:
        own = np.einsum("rkk->rk", repeated[f"{name}_se"].values)
        assert np.isnan(own).all()
        assert np.isnan(np.einsum("rkk->rk", repeated[f"{name}_low"].values)).all()
        np.testing.assert_array_equal(repeated[name], repeated[name].transpose("repetition", "other", "block"))


def test_what_all_spectra_have_in_common_has_no_error() -> None:
    """Two halves that agree leave nothing to chance."""
    half = [drawn(np.random.default_rng(seed), scale) for seed, scale in enumerate((1, 3))]
    ds = spectrum_distances([half, half])
    for name in NAMES:
        assert ds[name].values[0, 1] > 0
        assert ds[f"{name}_se"].values[0, 1] == pytest.approx(0, abs=1e-12)
