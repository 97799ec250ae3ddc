"""Inner products of checkpoints: blocks of parameters, and sums by hand."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pnanalysis.geometry.gram import _blocks, displacement_gram


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=6), width=st.integers(1, 40))
def test_blocks_cover_every_entry_once(sizes: list[int], width: int) -> None:
    blocks = list(_blocks([(str(i), size) for i, size in enumerate(sizes)], width))
    seen = [(name, k) for pieces in blocks for name, begin, end in pieces for k in range(begin, end)]
    assert seen == [(str(i), k) for i, size in enumerate(sizes) for k in range(size)]
    assert all(sum(end - begin for _, begin, end in pieces) == width for pieces in blocks[:-1])


def test_displacement_gram_equals_dense_inner_products() -> None:
    states = [{"a": torch.randn(3, 4), "b": torch.randn(5), "n": torch.tensor(i)} for i in range(3)]
    flat = np.stack([torch.cat([s["a"].reshape(-1), s["b"]]).double().numpy() for s in states])
    moved = flat - flat[0]
    np.testing.assert_allclose(displacement_gram(states, ["a", "b"]), moved @ moved.T, rtol=1e-13)


def test_complex_tensors_count_as_pairs_of_real_numbers() -> None:
    states = [{"a": torch.randn(3, 4, dtype=torch.complex64), "b": torch.randn(5)} for _ in range(3)]
    pairs = [{"a": torch.view_as_real(state["a"]), "b": state["b"]} for state in states]
    assert np.array_equal(displacement_gram(states, ["a", "b"]), displacement_gram(pairs, ["a", "b"]))
