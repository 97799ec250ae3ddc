"""What many tests share: a small run on digits, made once per session, and the order in which tests start."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.processes import Workers

if TYPE_CHECKING:
    from pnanalysis.io.runs import Run
    from trainers import Config

#: Folders whose tests take longest. They start first, so that no core is left with a long test at the end.
LONGEST = ("notebooks", "trainers/runs")
TINY = {"model": "tanh7", "model_options": {"input_shape": [1, 8, 8], "width": 16}, "data": "digits", "batch_size": 64}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of the longest folders first, and leave the others in their order."""
    first = tuple(f"{Path(__file__).parent / folder}/" for folder in LONGEST)
    items.sort(key=lambda item: not str(item.path).startswith(first))  # the sort is stable


def pytest_collection_finish() -> None:
    """Leave what is imported and collected out of later searches for garbage, which would take longer than tests."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Let modules go as usual."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def tiny_config() -> Config:
    """Three iterations of four epochs of a narrow tanh network."""
    # Not at the top of this file: the process that starts the workers reads it too, and need not wait for torch.
    from trainers import Config

    return Config(recipe="tiny", **TINY, iterations=3, epochs=4, checkpoint_every=1, lam=0.1)


@pytest.fixture(scope="session")
def tiny_run(tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run that tests share: do not change its files."""
    from trainers import train

    return train(tiny_config, tmp_path_factory.mktemp("runs") / "tiny", device="cpu", progress=False)


@pytest.fixture(scope="session")
def undamaged_run(tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The finished run of which :func:`own_run` gives copies."""
    from trainers import train

    config = replace(tiny_config, iterations=2, epochs=1)
    return train(config, tmp_path_factory.mktemp("runs") / "undamaged", device="cpu", progress=False)


@pytest.fixture
def own_run(undamaged_run: Run, tmp_path: Path) -> Run:
    """A finished run for one test alone, which may damage it."""
    from pnanalysis.io.runs import open_run

    return open_run(shutil.copytree(undamaged_run.path, tmp_path / "own"))


@pytest.fixture(scope="session")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """Processes that wait to be the ranks of a group."""
    started = Workers(tmp_path_factory.mktemp("groups"))
    yield started
    started.stop()
