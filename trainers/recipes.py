"""The named experiments S1 to S9, as configurations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from pnanalysis.checks import LARGEST_SEED, MOST_ITERATIONS, at_least, check_seed
from pnanalysis.errors import PnError, RunError, TrainingError
from trainers.choices import CHOICES, check_choice

#: Of all iterations of a run together: its history, which is held in memory and saved again and again, is half a GB.
_MOST_EPOCHS = 10_000_000


@dataclass(frozen=True)
class Config:
    """Everything that determines a training run; stored whole in its manifest.

    Attributes
    ----------
    recipe : str
        The name given on the command line.
    model, model_options, data, loss
        See :mod:`pnanalysis.inputs.models` and :mod:`pnanalysis.inputs.data`.
    strategy : {"plain", "persistent", "partial", "restart"}
        ``persistent`` repels all layers, ``partial`` one; ``restart`` is the control of equal cost.
    iterations, epochs : int
        Number of trainings, of which the plain one is iteration 0, and epochs of each.
    lam : float
        Strength of the persistent term.
    layers : str
        ``all``, ``random`` (drawn once per run), ``random-each`` (drawn for each iteration), or names joined by commas.
    penalty : {"absolute", "squared", "cosine"}
        Form of the persistent term; see :class:`trainers.PersistentPenalty`.
    origin : {"zero", "start"}
        The point from which the persistent term measures parameters: zero, as in the paper, or the common start.
    init_std : float or None
        Draw all parameters from N(0, init_std^2) instead of initialising them as the model does.
    checkpoint_every : int
        Epochs between saved checkpoints; the start and the end are always saved.
    """

    recipe: str = "custom"
    model: str = "lenet5"
    model_options: dict[str, Any] = field(default_factory=dict)
    data: str = "cifar10"
    loss: str = "cross_entropy"
    strategy: str = "partial"
    iterations: int = 20
    epochs: int = 150
    batch_size: int = 256
    optimizer: str = "adam"
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.0
    lam: float = 1e-3
    layers: str = "random"
    penalty: str = "absolute"
    origin: str = "zero"
    init_std: float | None = None
    augment: tuple[str, ...] = ()
    amp: str = "no"
    compile: bool = False
    seed: int = 0
    split_seed: int = 0
    checkpoint_every: int = 5

    def __post_init__(self) -> None:
        for name in CHOICES:
            check_choice(name, getattr(self, name))
        try:
            names = ("iterations", "epochs", "batch_size", "checkpoint_every")
            at_least(1, **{name: getattr(self, name) for name in names})
            check_seed(-LARGEST_SEED, seed=self.seed, split_seed=self.split_seed)
        except PnError as error:
            raise TrainingError(str(error)) from error
        if self.iterations > MOST_ITERATIONS:
            raise TrainingError(f"iterations is {self.iterations:,}; a run has at most {MOST_ITERATIONS:,}")
        if self.iterations * self.epochs > _MOST_EPOCHS:
            raise TrainingError(
                f"iterations x epochs is {self.iterations * self.epochs:,}, and a run keeps the history of at most "
                f"{_MOST_EPOCHS:,}; lower one of them"
            )
        for name in ("lam", "weight_decay", "init_std"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise TrainingError(f"{name} is {value}; it must be a finite number, zero or more")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise TrainingError(f"lr is {self.lr}; it must be a finite number above zero")
        if not 0 <= self.momentum < 1:
            raise TrainingError(f"momentum is {self.momentum}; it must be at least zero and below one")
        if self.strategy == "plain" and self.iterations != 1:  # frozen, hence the detour
            object.__setattr__(self, "iterations", 1)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return {**asdict(self), "augment": list(self.augment)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """The configuration that :meth:`to_dict` made into a dictionary.

        Raises
        ------
        TrainingError
            If there is an unknown entry.
        """
        unknown = set(values) - {entry.name for entry in fields(cls)}
        if unknown:
            raise TrainingError(f"unknown setting {', '.join(sorted(unknown))}")
        return cls(**{**values, "augment": tuple(values.get("augment", ()))})


#: ``images`` are trained by :mod:`trainers.runs.strategies`, the others by :mod:`trainers.runs.small_problems`.
Problem = Literal["images", "two-well", "kink"]


@dataclass(frozen=True)
class Recipe:
    """An experiment of the paper: its id, what it shows, its settings and the problem that it trains on."""

    id: str
    summary: str
    config: Config
    problem: Problem = "images"


def _recipe(id: str, name: str, summary: str, problem: Problem = "images", **settings: Any) -> Recipe:
    return Recipe(id, summary, Config(recipe=name, **settings), problem)


RECIPES: dict[str, Recipe] = {
    recipe.config.recipe: recipe
    for recipe in (
        _recipe(
            "S1", "two-well", "gradient descent on the two-well surface", "two-well",
            model="point", data="", loss="mse", strategy="persistent", iterations=2, epochs=50_000, lr=1e-3, lam=0.1,
            layers="all", optimizer="sgd", momentum=0.0, batch_size=1, checkpoint_every=500,
        ),
        _recipe(
            "S2", "kink", "1-D regression where re-initialising gets stuck", "kink",
            model="relu32", data="kink6", loss="mse", strategy="persistent", iterations=100, epochs=50_000, lr=1e-3,
            lam=0.01, layers="all", optimizer="sgd", momentum=0.9, batch_size=6, checkpoint_every=50_000,
        ),
        _recipe(
            "S3", "lenet5-full", "LeNet-5, every layer repelled, from a bad or good normal init",
            strategy="persistent", lam=0.01, layers="all", init_std=0.2,
        ),
        _recipe("S4", "lenet5", "LeNet-5, one layer repelled"),
        _recipe("S5", "alexnet", "AlexNet, one layer repelled", model="alexnet", batch_size=128),
        _recipe(
            "S6", "resnet18", "ResNet-18, one layer repelled", model="resnet18", batch_size=128, epochs=350,
            checkpoint_every=10,
        ),
        _recipe(
            "S7", "gradient-split", "LeNet-5 with every epoch kept, to split the persistent gradient",
            strategy="persistent", lam=0.01, layers="all", init_std=0.05, iterations=6, epochs=50, checkpoint_every=1,
        ),
        _recipe(
            "S8", "spectrum", "ResNet-18, plain and champion, for their Hessian spectra", model="resnet18",
            batch_size=128, epochs=350, checkpoint_every=350,
        ),
        _recipe(
            "S9", "tanh7", "seven-layer tanh network, every epoch kept, for its saturation", model="tanh7",
            iterations=10, epochs=30, checkpoint_every=1,
        ),
    )
}  # fmt: skip


def find_recipe(name: str) -> Recipe:
    """A recipe by name or by id (S1 to S9).

    Raises
    ------
    TrainingError
        If there is none; the message lists them.
    """
    for key, recipe in RECIPES.items():
        if name.lower() in (key, recipe.id.lower()):
            return recipe
    raise TrainingError(f"unknown recipe {name!r}; there are {', '.join(f'{r.id} {k}' for k, r in RECIPES.items())}")


def configure(base: Recipe, /, **settings: Any) -> Config:
    """A recipe's configuration with some settings replaced (``None`` keeps the recipe's)."""
    given = {name: value for name, value in settings.items() if value is not None}
    # The recipes' layers suit their strategies: another strategy brings other layers, unless these are given too.
    if given.get("strategy") == "persistent" and base.config.strategy == "partial":
        given.setdefault("layers", "all")
    if given.get("strategy") == "partial" and base.config.layers == "all":
        given.setdefault("layers", "random")
    return replace(base.config, **given)


def check_same(before: Mapping[str, Any], config: Config, out: Path) -> None:
    """Check that a run is resumed with the settings it was begun with; only more iterations are allowed.

    Raises
    ------
    RunError
        The message names the first setting that differs.
    """
    after = config.to_dict()
    for name, value in before.items():
        longer = name == "iterations" and after[name] >= value
        if after.get(name) != value and not longer:
            raise RunError(
                f"{out}: was begun with {name}={value!r}, not {after.get(name)!r}; resume with the same settings"
            )
