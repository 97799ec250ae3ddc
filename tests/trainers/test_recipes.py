"""Recipes and configurations: found by name, checked, and stored as JSON."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from pnanalysis.errors import TrainingError
from trainers import Config, configure, find_recipe, train
from trainers.recipes import RECIPES


def test_recipes_are_found_by_id_and_by_name_and_keep_the_papers_settings() -> None:
    assert [recipe.id for recipe in RECIPES.values()] == [f"S{i}" for i in range(1, 10)]
    assert find_recipe("s4") is find_recipe("lenet5")
    config = find_recipe("S4").config
    assert (config.batch_size, config.epochs, config.lam, config.lr, config.iterations) == (256, 150, 1e-3, 1e-3, 20)
    assert configure(find_recipe("S3"), init_std=0.05, epochs=None).init_std == 0.05
    assert configure(find_recipe("S4"), strategy="persistent").layers == "all"
    with pytest.raises(TrainingError, match="S9 tanh7"):
        find_recipe("S10")


def test_a_config_survives_json(tiny_config: Config) -> None:
    assert Config.from_dict(tiny_config.to_dict()) == tiny_config
    with pytest.raises(TrainingError, match="speed"):
        Config.from_dict({"speed": 3})


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        (name, value)
        for name, values in {
            "lr": (-1.0, 0.0, math.nan, math.inf),
            "momentum": (2.0, 1.0, -0.1, math.nan),
            "weight_decay": (-1.0, math.nan),
            "init_std": (-1.0, math.inf),
            "lam": (math.nan,),
        }.items()
        for value in values
    ],
)
def test_numbers_out_of_range_are_refused(tiny_config: Config, setting: str, value: float) -> None:
    with pytest.raises(TrainingError, match=f"^{setting} is {value}; it must be"):
        replace(tiny_config, **{setting: value})


@pytest.mark.parametrize("setting", ["iterations", "epochs", "batch_size", "checkpoint_every", "seed", "split_seed"])
@pytest.mark.parametrize("value", [2**63, 10**30, 0.5, "many"])
def test_whole_numbers_have_bounds(tiny_config: Config, setting: str, value: object) -> None:
    """Numbers that no generator, file or memory holds are refused before anything is drawn, stored or allocated."""
    with pytest.raises(TrainingError, match=f"^{setting} is .*; it must be"):
        replace(tiny_config, **{setting: value})


def test_the_history_of_a_run_has_a_bound(tiny_config: Config) -> None:
    replace(tiny_config, iterations=100, epochs=100_000)
    with pytest.raises(TrainingError, match="history of at most 10,000,000; lower one"):
        replace(tiny_config, iterations=101, epochs=100_000)
    with pytest.raises(TrainingError, match="at most 100,000"):
        replace(tiny_config, iterations=100_001, epochs=1)


@pytest.mark.parametrize("seed", [-1, -(2**63) + 1, 2**63 - 1])
def test_seeds_at_the_bounds_train(tiny_config: Config, tmp_path: Path, seed: int) -> None:
    config = replace(tiny_config, seed=seed, split_seed=seed, iterations=1, epochs=1)
    run = train(config, tmp_path / "run", device="cpu", progress=False)
    assert run.manifest["config"]["seed"] == int(run.history.attrs["seed"]) == seed
