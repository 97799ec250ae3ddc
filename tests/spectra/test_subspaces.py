"""Overlaps, angles and parts of vectors, where they are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from scipy.stats import beta, kstest

from pnanalysis.errors import CurvatureError
from pnanalysis.spectra.subspaces import angle_bounds, chance_overlap, chance_p, overlap, participation, squared_cosines


def frame(n: int, k: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64))[0]


def test_the_same_space_overlaps_by_one_in_any_basis() -> None:
    V = frame(50, 4, 0)
    assert overlap(V, V @ frame(4, 4, 1)) == pytest.approx(1, abs=1e-14)
    assert overlap(V, V[:, :2]) == pytest.approx(1, abs=1e-14)  # a part of it


def test_orthogonal_spaces_do_not_overlap() -> None:
    eye = torch.eye(10)
    assert overlap(eye[:, :3], eye[:, 3:8]) == 0


def test_it_is_the_mean_squared_cosine_of_principal_angles() -> None:
    V, W = frame(12, 3, 0), frame(12, 3, 1)
    assert overlap(V, W) == pytest.approx(np.mean(np.cos(subspace_angles(V.numpy(), W.numpy())) ** 2), abs=1e-12)
    one = torch.tensor([[1.0], [0.0]])
    half = torch.tensor([[1.0], [1.0]]) / 2**0.5
    assert overlap(one, half) == pytest.approx(0.5)


@pytest.mark.parametrize(("n", "a", "b"), [(40, 5, 5), (30, 2, 7), (6, 3, 3)])
def test_random_spaces_overlap_as_chance_says(n: int, a: int, b: int) -> None:
    found = np.array([overlap(frame(n, a, 2 * i), frame(n, b, 2 * i + 1)) for i in range(600)])
    mean, sd = chance_overlap(n, a, b)
    assert abs(found.mean() - mean) < 4 * sd / 600**0.5
    assert found.std() == pytest.approx(sd, rel=0.15)  # five standard errors of a standard deviation from 600 draws
    assert chance_overlap(1, 1, 1) == (1.0, 0.0)
    assert chance_overlap(3, 3, 2) == (1.0, 0.0)  # all of space holds the other


@pytest.mark.parametrize(("n", "a", "b"), [(12, 1, 1), (12, 1, 4), (40, 3, 3), (30, 2, 6)])
def test_p_values_of_random_spaces_are_uniform(n: int, a: int, b: int) -> None:
    mean, sd = chance_overlap(n, a, b)
    rng = np.random.default_rng(0)
    V = np.linalg.qr(rng.standard_normal((4000, n, a)))[0]
    found = np.square(V[:, :b]).sum((1, 2)) / min(a, b)  # with the space of the first axes
    p = chance_p(found, np.full(4000, mean), np.full(4000, sd))
    assert kstest(p, "uniform").pvalue > 1e-3
    if a == 1:  # a squared length of part of a random direction
        exact = beta(b / 2, (n - b) / 2)
        np.testing.assert_allclose(p, 2 * np.minimum(exact.cdf(found), exact.sf(found)), rtol=1e-9)


def test_spaces_that_coincide_are_no_chance_and_those_of_all_dimensions_say_nothing() -> None:
    for n, a in ((50, 3), (10_000, 10)):
        mean, sd = (np.array(one) for one in chance_overlap(n, a, a))
        assert chance_p(np.array(1.0), mean, sd) < 1e-12
        assert chance_p(mean, mean, sd) > 0.8
    assert np.isnan(chance_p(np.array(1.0), np.array(1.0), np.array(0.0)))
    assert np.isnan(chance_p(np.array(np.nan), np.array(0.1), np.array(0.1)))


def test_spaces_of_other_sizes_are_refused() -> None:
    with pytest.raises(CurvatureError, match="have no overlap"):
        overlap(frame(5, 2, 0), frame(6, 2, 0))


def test_squared_cosines_add_up_to_the_part_in_the_space() -> None:
    V, vector = frame(20, 3, 0), frame(20, 1, 5)[:, 0] * 7
    parts = squared_cosines(V, vector)
    assert parts.sum() == pytest.approx(float((V.T @ vector).square().sum()) / 49)
    assert squared_cosines(V, 3 * V[:, 1] + 4 * V[:, 2]) == pytest.approx([0, 9 / 25, 16 / 25], abs=1e-14)
    assert np.isnan(squared_cosines(V, torch.zeros(20))).all()


def test_participation_is_one_for_a_single_entry_and_least_for_equal_ones() -> None:
    vectors = torch.stack([torch.eye(16)[3], torch.full((16,), 0.25)], dim=1)
    assert participation(vectors) == pytest.approx([1, 1 / 16])


def test_bounds_of_angles_by_hand() -> None:
    found = angle_bounds(np.array([5.0, 3.0]), np.diag([0.1, 0.2]) ** 2, (1.0, 0.5), "largest", 0.0)
    # from 3 it is 2 to 5, less 0.2, by which any of the two eigenvalues may be off; and 1.5 to the rest
    assert found.vector == pytest.approx([0.1 / 1.8, 0.2 / 1.5])
    assert found.cluster.tolist() == [0, 1]
    mirrored = angle_bounds(np.array([-5.0, -3.0]), np.diag([0.1, 0.2]) ** 2, (-1.0, 0.5), "smallest", 0.0)
    assert mirrored.vector == pytest.approx(found.vector)
    either = angle_bounds(np.array([-5.0, 3.0]), np.diag([0.1, 0.2]) ** 2, (1.0, 0.5), "magnitude", 0.0)
    assert either.vector == pytest.approx([0.1 / 3.5, 0.2 / 1.5])
