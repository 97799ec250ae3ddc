"""Balanced half samples of examples."""

from __future__ import annotations

import numpy as np
import pytest

from pnanalysis.errors import CurvatureError, Indivisible
from pnanalysis.spectra.density import smooth, spectral_density
from pnanalysis.spectra.half_samples import (
    Contrasts,
    contrasts,
    contrasts_of_means,
    half_samples,
    lambda_max_of_halves,
)
from tests.spectra.averaged_operators import Population
from tests.spectra.known_spectra import QUIET, spiked


def test_halves_are_complementary_and_balanced():
    signs = np.array([[1 if part in half else -1 for part in range(8)] for half, _ in half_samples()])
    for half, other in half_samples():
        assert sorted(half + other) == list(range(8))
        assert len(half) == len(other) == 4
    np.testing.assert_array_equal(signs @ signs.T, 8 * np.eye(7))


def test_contrasts_of_a_mean_give_the_variance_of_means_of_parts():
    parts = np.random.default_rng(0).standard_normal(8)
    values = [parts[half].mean() - parts[other].mean() for half, other in half_samples()]
    assert float(Contrasts(np.array(values)).variance) == pytest.approx(parts.var(ddof=1) / 8)


def test_every_number_gets_an_error_and_the_density_too():
    operator = Population(60, rank=2).draw(64, 0)
    ds = spectral_density(operator, n_hvp=24, data_error="groups", **QUIET)
    assert ds.attrs["data_error"] == "groups"
    # 14 spectra over half the examples, and 4 steps on each of two halves
    assert ds.attrs["n_hvp_data"] == 7 * 24 + 4
    for name in ("effective_rank", "effective_dimension"):
        own, data = float(ds[f"{name}_probe_se"]), float(ds[f"{name}_data_se"])
        assert data > 0
        assert float(ds[f"{name}_se"]) == pytest.approx(np.hypot(own, data))
        assert ds[f"{name}_high"] - ds[name] >= 2.3 * data
    grid = np.linspace(-1, 8, 50)
    smoothed = smooth(ds, grid, 0.5)
    np.testing.assert_allclose(smoothed.density_se, np.hypot(smoothed.density_probe_se, smoothed.density_data_se))
    assert float(smoothed.density_data_se.max()) > 0


def test_halves_of_exact_spectra_have_exact_contrasts():
    operator = Population(30, rank=2).draw(64, 0)
    ds = spectral_density(operator, n_hvp=30, data_error="groups", **QUIET)
    assert ds.attrs["method"] == "exact"
    eigenvalues = [[np.linalg.eigvalsh(operator.subset(parts, 8).matrix) for parts in pair] for pair in half_samples()]
    squares = [(np.abs(a).sum() ** 2 / (a**2).sum() - np.abs(b).sum() ** 2 / (b**2).sum()) for a, b in eigenvalues]
    np.testing.assert_allclose(contrasts(ds)["effective_rank"].values, squares)
    means = contrasts_of_means(ds, lambda node: node[None] ** 2)
    np.testing.assert_allclose(means.values[:, 0], [(a**2).mean() - (b**2).mean() for a, b in eigenvalues])


def test_interrupted_work_is_taken_up_again(tmp_path, monkeypatch):
    two = half_samples()[:2]  # fewer files
    monkeypatch.setattr("pnanalysis.spectra.half_samples.half_samples", lambda: two)

    class Interrupting(Exception):
        pass

    def spectrum(operator, state):
        return spectral_density(operator, n_hvp=8, data_error="groups", state=state, **QUIET)

    population = Population(30, rank=2)
    operator, whole = population.draw(32, 0), population.draw(32, 0)
    n_subsets = 0

    def subset(*arguments, **options):
        nonlocal n_subsets
        n_subsets += 1
        if n_subsets > 5:
            raise Interrupting
        return type(operator).subset(operator, *arguments, **options)

    operator.subset = subset
    with pytest.raises(Interrupting):
        spectrum(operator, tmp_path / "state")
    assert len(list((tmp_path / "state").glob("half-*.nc"))) == 3
    again, expected = spectrum(whole, tmp_path / "state"), spectrum(whole, None)
    assert (tmp_path / "state").is_dir()  # until its caller has saved the dataset
    np.testing.assert_array_equal(again.replicate_node, expected.replicate_node)
    np.testing.assert_array_equal(again.effective_rank_se, expected.effective_rank_se)


def test_largest_eigenvalue_over_halves():
    operator = Population(60, rank=2).draw(64, 0)
    vector = np.linalg.eigh(operator.matrix)[1][:, -1]
    found, n_products = lambda_max_of_halves(operator, operator.tensor(vector))
    halves = [np.linalg.eigvalsh(operator.subset([part], 2).matrix)[-1] for part in (0, 1)]
    assert n_products == 4  # of half the cost, on each of two halves
    assert found == pytest.approx(np.mean(halves), rel=1e-2)
    assert found <= np.mean(halves) + 1e-12  # Ritz values lie within the spectrum


def test_examples_that_cannot_be_divided_have_no_halves(monkeypatch):
    """As the nodes of one graph, which have forms of their own but no networks of their own."""
    operator = Population(60, rank=2).draw(64, 0)

    def subset(*_: object, **__: object) -> None:
        raise Indivisible("cannot take the parts")

    monkeypatch.setattr(operator, "subset", subset)
    ds = spectral_density(operator, n_hvp=20, **QUIET)
    assert float(ds.trace_data_se) > 0
    assert "lambda_max_half" not in ds
    with pytest.raises(Indivisible):
        spectral_density(operator, n_hvp=20, data_error="groups", **QUIET)


def test_groups_are_refused_without_examples():
    with pytest.raises(CurvatureError, match="needs an operator over examples"):
        spectral_density(np.diag(spiked()), n_hvp=24, data_error="groups", **QUIET)
