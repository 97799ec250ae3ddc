"""Fixtures for all tests: small runs on the built-in digits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pnanalysis.io.runs import Run
from trainers import Config, train

TINY = {"model": "tanh7", "model_options": {"input_shape": [1, 8, 8], "width": 16}, "data": "digits", "batch_size": 64}


@pytest.fixture(scope="session")
def tiny_config() -> Config:
    """Three iterations of four epochs of a narrow tanh network."""
    return Config(recipe="tiny", **TINY, iterations=3, epochs=4, checkpoint_every=1, lam=0.1)


@pytest.fixture(scope="session")
def tiny_run(tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of that configuration, trained once per session; not to be changed."""
    return train(tiny_config, tmp_path_factory.mktemp("runs") / "tiny", device="cpu", progress=False)


@pytest.fixture
def own_run(tiny_config: Config, tmp_path: Path) -> Run:
    """A shorter finished run for one test only, which may change or damage it."""
    return train(replace(tiny_config, iterations=2, epochs=1), tmp_path / "own", device="cpu", progress=False)
