"""The global random number generators of torch, NumPy and Python, which belong to the user."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

# ruff: noqa: NPY002 - it is the generator that users' code draws from


def random_states() -> list[Any]:
    """The states of all global generators."""
    cuda = [torch.cuda.get_rng_state(i) for i in _cuda_devices()]
    return [torch.get_rng_state(), np.random.get_state(), random.getstate(), cuda]


def set_random_states(states: list[Any]) -> None:
    """Put all global generators into states that :func:`random_states` gave."""
    of_torch, of_numpy, of_python, of_cuda = states
    torch.set_rng_state(of_torch)
    np.random.set_state(of_numpy)
    random.setstate(of_python)
    for i, state in enumerate(of_cuda):
        torch.cuda.set_rng_state(state, i)


def seeded_states(seed: int) -> list[Any]:
    """The states that a seed puts all generators into."""
    cuda = [torch.Generator(f"cuda:{i}").manual_seed(seed).get_state() for i in _cuda_devices()]
    return [
        torch.Generator().manual_seed(seed).get_state(),
        np.random.RandomState(seed % 2**32).get_state(),
        random.Random(seed).getstate(),
        cuda,
    ]


def set_seed(seed: int) -> None:
    """Seed all global generators."""
    set_random_states(seeded_states(seed))


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Put all global generators back to where they were before the body."""
    before = random_states()
    try:
        yield
    finally:
        set_random_states(before)


def _cuda_devices() -> range:
    return range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)
