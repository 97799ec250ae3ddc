"""Random vectors: the hash against its definition, normal numbers, and independence of chunks, devices and lengths."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from pnanalysis.spectra import random_vectors
from pnanalysis.spectra.linear_operator import DiagonalOperator
from pnanalysis.spectra.random_vectors import hashed, normal_numbers, random_unit_vectors

MASK = 2**64 - 1


def split_mix(key: int, n: int) -> list[int]:
    """SplitMix64 in whole numbers without bounds."""
    found = []
    for i in range(1, n + 1):
        z = (key + i * 0x9E3779B97F4A7C15) & MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        found.append(z ^ (z >> 31))
    return found


@pytest.mark.parametrize("key", [0, 1234567, 2**63, 2**64 - 5])
def test_the_hash_is_split_mix(key: int) -> None:
    assert [int(bits) & MASK for bits in hashed(torch.arange(50), key)] == split_mix(key, 50)


def test_a_published_output() -> None:
    assert int(hashed(torch.zeros(1, dtype=torch.int64), 1234567)) & MASK == 6457827717110365317


def operator(n: int, dtype: torch.dtype = torch.float64) -> DiagonalOperator:
    return DiagonalOperator(torch.ones(n, dtype=dtype))


@pytest.mark.parametrize("n", [1, 2, 5, 1000, 1001])
def test_chunks_do_not_matter(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = random_unit_vectors(operator(n), range(3), 7)
    torch.testing.assert_close(torch.linalg.vector_norm(whole, dim=0), torch.ones(3, dtype=torch.float64))
    monkeypatch.setattr(random_vectors, "_CHUNK", 3)
    torch.testing.assert_close(random_unit_vectors(operator(n), range(3), 7), whole, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_precisions_are_the_same_numbers_rounded(dtype: torch.dtype) -> None:
    exact = random_unit_vectors(operator(3000), [4], 1)
    rounded = random_unit_vectors(operator(3000, dtype), [4], 1)
    assert rounded.dtype == dtype
    error = (rounded.double() - exact).abs() / exact.abs().clamp_min(1e-3)
    assert float(error.max()) <= 2 * torch.finfo(dtype).eps  # rounded before and after it is normalised


def test_entries_are_normal_and_independent() -> None:
    n, k = 200_000, 4
    vectors = random_unit_vectors(operator(n), range(k), 3).numpy() * n**0.5
    for x in vectors.T:
        assert stats.kstest(x, "norm").pvalue > 1e-4
        neighbours = [np.corrcoef(f(x[:-lag]), f(x[lag:]))[0, 1] for lag in (1, 2, 3) for f in (np.asarray, np.square)]
        assert np.abs(neighbours).max() * n**0.5 < 5
    between = np.corrcoef(vectors.T)[np.triu_indices(k, 1)]
    assert np.abs(between).max() * n**0.5 < 5


def test_seeds_and_indices_give_other_vectors() -> None:
    first = random_unit_vectors(operator(10), [0, 1], 0)
    other = random_unit_vectors(operator(10), [0, 1], 1)
    assert len({tuple(v.tolist()) for v in (*first.T, *other.T)}) == 4


def test_normal_numbers_go_on_where_others_end() -> None:
    cpu, n = torch.device("cpu"), 2**18 + 6  # several chunks
    numbers = normal_numbers(n, 3, 1, cpu)
    assert torch.equal(numbers, torch.cat([normal_numbers(10, 3, 1, cpu), normal_numbers(n - 10, 3, 1, cpu, first=5)]))
    assert torch.equal(normal_numbers(7, 3, 1, cpu), numbers[:7])
    assert not torch.equal(normal_numbers(n, 4, 1, cpu), numbers)
    assert abs(float(numbers.mean())) < 4 / n**0.5
    assert abs(float(numbers.square().mean()) - 1) < 4 * (2 / n) ** 0.5
