"""Memory for Lanczos bases."""

from __future__ import annotations

import pytest
import torch

from pnanalysis.errors import CurvatureError
from pnanalysis.spectra.memory import basis_bytes, probes_at_once, vectors_at_once


def test_memory_bound_groups_probes_or_refuses():
    unit = 1000 * 8
    assert basis_bytes(1000, 20, 3, torch.float64, 5) == (23 * 3 + 5) * unit
    sizes = {
        "n_parameters": 1000,
        "n_lanczos": 20,
        "n_probes": 9,
        "dtype": torch.float64,
        "device": torch.device("cpu"),
    }
    assert probes_at_once(**sizes, n_deflated=5, max_memory_bytes=(2 * 23 + 5) * unit) == 2
    assert probes_at_once(**sizes) == 9
    with pytest.raises(CurvatureError, match=r"needs 180 KiB, the bound is 179 KiB: lower n_lanczos"):
        probes_at_once(**sizes, max_memory_bytes=23 * unit - 1000)


@pytest.mark.parametrize(("bound", "n"), [(3, 0), (4, 1), (9, 6), (50, 10), (1, 0)])
def test_vectors_fit_beside_three_to_work_with(bound: int, n: int) -> None:
    unit = 1000 * 4
    found = [vectors_at_once(1000, 10, torch.float32, torch.device("cpu"), bound * unit + spare) for spare in (0, 999)]
    assert found == [n, n]
