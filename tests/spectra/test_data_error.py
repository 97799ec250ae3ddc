"""Standard errors for the choice of examples, against populations of examples of which everything is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pnanalysis.errors import CurvatureError, ProcessLost
from pnanalysis.spectra.data_error import FEWEST_GROUPS, DataForms, Influence, influences
from pnanalysis.spectra.density import spectral_density
from tests.spectra.averaged_operators import Population, SyntheticAverage
from tests.spectra.known_spectra import QUIET

N = 128


def spectrum(operator: SyntheticAverage, seed: int = 0, **options):
    return spectral_density(operator, seed=seed, **({"n_hvp": 40} | options), **QUIET)


def exact_forms(operator: SyntheticAverage) -> dict[str, np.ndarray]:
    """The forms of each group from dense matrices."""
    matrices = np.einsum("gr,grp,grq->gpq", operator.coefficients, operator.factors, operator.factors)
    eigenvalues, vectors = np.linalg.eigh(operator.matrix)
    norm = np.linalg.norm(eigenvalues)
    return {
        "trace": np.trace(matrices, axis1=1, axis2=2),
        "frobenius_norm": np.einsum("gpq,pq->g", matrices, operator.matrix) / norm,
        "lambda_max": np.einsum("p,gpq,q->g", vectors[:, -1], matrices, vectors[:, -1]),
        "lambda_min": np.einsum("p,gpq,q->g", vectors[:, 0], matrices, vectors[:, 0]),
    }


def exact_se(operator: SyntheticAverage, form: np.ndarray) -> float:
    weight, n = operator.group_weights, len(form)
    return float(np.sqrt(n / (n - 1) * np.sum((weight * (form - weight @ form / weight.sum())) ** 2)))


@pytest.mark.parametrize("ridge", [0.0, 0.5])
@pytest.mark.parametrize("weighted", [False, True])
def test_exact_spectra_have_the_exact_error_up_to_probes(ridge, weighted):
    operator = Population(30, rank=2).draw(N, 0)
    operator.ridge = ridge
    if weighted:
        weights = np.random.default_rng(1).random(N)
        operator.group_weights = weights / weights.sum()
    ds = spectrum(operator)
    assert ds.attrs["method"] == "exact"
    for name, form in exact_forms(operator).items():
        # probes see the rest of the space: exactly what is there in the sum over all, with noise in each group
        tolerance = 1e-8 if name.startswith("lambda") else 0.03
        assert float(ds[f"{name}_data_se"]) == pytest.approx(exact_se(operator, form), rel=tolerance)


def test_noise_of_the_probes_is_taken_off():
    """Little of the trace is in the leading vectors: two probes alone would make the variance 1.3 times too large."""
    operator = Population(120, spikes=(1.0, 0.8), tail=0.1).draw(N, 0)
    truth = exact_se(operator, exact_forms(operator)["trace"])
    found = []
    for seed in range(20):
        influence = influences(spectrum(operator, seed))["trace"]
        plain = Influence(influence.weight, influence.form, np.zeros(N)).variance
        found.append((influence.variance, plain))
    corrected, plain = np.mean(found, axis=0) / truth**2
    spread = np.std([one for one, _ in found]) / truth**2 / 20**0.5
    assert plain > 1.3
    assert corrected == pytest.approx(1, abs=4 * spread)


@pytest.mark.parametrize(
    "population",
    [
        pytest.param(Population(60), id="apart", marks=pytest.mark.slow),
        pytest.param(Population(60, spikes=(10.0, 10.0)), id="degenerate", marks=pytest.mark.slow),
        pytest.param(Population(60, tail=0.3, negative=0.45), id="negative", marks=pytest.mark.slow),
    ],
)
def test_fresh_examples_differ_by_the_stated_error(population):
    n_pairs = 40
    deviations = {name: [] for name in ("trace", "frobenius_norm", "lambda_max")}
    for i in range(n_pairs):
        a, b = (spectrum(population.draw(N, 2 * i + half), 2 * i + half, n_hvp=20) for half in (0, 1))
        for name, found in deviations.items():
            found.append(float((a[name] - b[name]) / np.hypot(a[f"{name}_se"], b[f"{name}_se"])))
    for name, found in deviations.items():
        # 5 % are expected beyond 1.96, fewer where eigenvalues cross; 7 or more of 40 have probability 0.3 %
        assert np.sum(np.abs(found) > 1.96) <= 6, name
        # the errors are not far too large either: the spread of 40 is known to 11 %
        assert np.std(found) > 0.6, name


def test_the_stated_error_is_the_total_of_its_parts():
    ds = spectrum(Population(60).draw(N, 0), n_hvp=30)
    assert ds.attrs["data_error"] == "examples"
    for name in ("trace", "frobenius_norm"):
        probe, data = float(ds[f"{name}_probe_se"]), float(ds[f"{name}_data_se"])
        assert float(ds[f"{name}_se"]) == pytest.approx(np.hypot(probe, data))
        assert ds[f"{name}_low"] < ds[f"{name}_bound_low"] < ds[name] < ds[f"{name}_bound_high"] < ds[f"{name}_high"]
    assert float(ds.lambda_max_se) == float(ds.lambda_max_data_se)
    reach = float(ds.lambda_max_high - ds.lambda_max_bound_high)
    assert 1.96 < reach / float(ds.lambda_max_data_se) < 2.0  # Student's, of N - 1


def test_no_product_more_is_spent_on_forms():
    operator, plain = (Population(60).draw(N, 0) for _ in range(2))
    with_forms, without = spectrum(operator, n_hvp=30), spectrum(plain, n_hvp=30, data_error="none")
    assert operator.n_products == plain.n_products
    np.testing.assert_array_equal(with_forms.node, without.node)
    assert without.attrs["data_error"] == "none"
    assert "trace_data_se" not in without


def test_classes_get_the_error_of_their_eigenvalues():
    operator = Population(60, spikes=(12.0, 8.0, 6.0)).draw(N, 0)
    ds = spectrum(operator, n_hvp=250, n_classes=3)
    value = ds.top_value.values
    ds = ds.assign(
        class_ratio=value[0] / value[2], class_gap=value[0] / value[3], class_trace=value[:3].sum() / ds.trace
    )
    found = influences(ds)
    # by finite differences: one group weighs more, and the rest of the weights stays
    step = 1e-5
    for g in (0, 17):
        operator.group_weights[g] += step
        moved = np.linalg.eigvalsh(operator.matrix)[::-1]
        operator.group_weights[g] -= step
        for name, new in (
            ("class_ratio", moved[0] / moved[2]),
            ("class_gap", moved[0] / moved[3]),
            ("class_trace", moved[:3].sum() / moved.sum()),
        ):
            slope = (new - float(ds[name])) / step
            form, spread = found[name].form, found[name].spread
            noise = np.sqrt(np.mean(spread**2))  # of the probes, in the trace
            assert form[g] == pytest.approx(slope, abs=4 * noise + 0.01 * np.abs(form).max()), name


def test_effective_rank_of_a_positive_semidefinite_operator():
    operator = Population(30, rank=2, negative=0.0).draw(N, 0)
    ds = spectrum(operator).assign_attrs(positive_semidefinite=1)
    found, step = influences(ds)["effective_rank"], 1e-5
    operator.group_weights[5] += step
    moved = np.linalg.eigvalsh(operator.matrix)
    slope = (moved.sum() ** 2 / (moved**2).sum() - float(ds.effective_rank)) / step
    assert found.form[5] == pytest.approx(slope, abs=0.1 * np.abs(found.form).max())


def test_forms_that_do_not_add_up_are_not_used():
    class Wrong(SyntheticAverage):
        def forms(self, U, V):
            return 1.01 * super().forms(U, V)

    operator = Population(60).draw(N, 0)
    wrong = Wrong(operator.factors, operator.coefficients, operator.group_weights)
    with pytest.warns(UserWarning, match="add up to eigenvalues that are off by 1.0%"):
        ds = spectrum(wrong, n_hvp=30)
    assert ds.attrs["data_error"] == "none"
    assert "trace_data_se" not in ds


def test_forms_that_cannot_be_had_are_left_out_with_the_reason():
    class Refusing(SyntheticAverage):
        def forms(self, U, V):
            raise CurvatureError("single examples cannot be had")

    operator = Population(60).draw(N, 0)
    with pytest.warns(UserWarning, match="single examples cannot be had"):
        spectrum(Refusing(operator.factors, operator.coefficients, operator.group_weights), n_hvp=30)
    few = Population(60).draw(FEWEST_GROUPS - 1, 0)
    with pytest.warns(UserWarning, match="7 groups of examples, fewer than 8"):
        spectrum(few, n_hvp=30)


def test_a_lost_process_ends_a_spectrum_rather_than_its_forms_alone():
    class Losing(SyntheticAverage):
        def forms(self, U, V):
            raise ProcessLost("process 1 is gone")

    operator = Population(60).draw(N, 0)
    with pytest.raises(ProcessLost, match="process 1 is gone"):
        spectrum(Losing(operator.factors, operator.coefficients, operator.group_weights), n_hvp=30)


def test_half_precision_forms_pass_the_check_within_its_round_off():
    operator = Population(20).draw(N, 0)
    values, vectors = np.linalg.eigh(operator.matrix)
    operator.dtype = torch.bfloat16
    forms = DataForms(operator, 100)
    operator.forms = lambda U, V: SyntheticAverage.forms(operator, U.double(), V.double())
    operator.product_without_data = torch.zeros_like
    forms.add_leading(values[[-1, -2, 0]], [operator.tensor(vectors[:, part]) for part in ([-1, -2], [0])])
    assert not forms.reason
