"""What is trained and measured at each scale, as data: what the tables say of settings comes from here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from pnanalysis.checks import one_of
from pnanalysis.errors import PnError

PERSISTENT, RESTART = "persistent", "restart"
Options = Mapping[str, Any]


@dataclass(frozen=True)
class Setting:
    """How an experiment is done at one scale.

    Attributes
    ----------
    recipe : str
        Of the trainer.
    options : mapping
        Its options, by the names of its configuration; those that are not given are the recipe's.
    variants : mapping of str to mapping
        Options of each variant: initialisations, data sets, the points of a sweep. A single one has no name.
    arms : tuple of str
        ``persistent`` (a chain, with the plain training as its iteration 0) and ``restart`` (as many plain trainings).
    variant_arms : mapping of str to tuple of str
        The arms of variants that have others.
    arm_options : mapping of str to mapping
        Options of one arm alone.
    measures : mapping of str to mapping
        What is measured at the end, and how: see :mod:`pnanalysis.reproduce.measures`.
    n_train : int or None
        Train on so many of the images, the same number of each class.
    most_seeds : int or None
        Further seeds add nothing, or cost too much.
    rank : int
        Experiments of a lower rank are done first, for all seeds.
    """

    recipe: str
    options: Options = field(default_factory=dict)
    variants: Mapping[str, Options] = field(default_factory=lambda: {"": {}})
    arms: tuple[str, ...] = (PERSISTENT, RESTART)
    variant_arms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    arm_options: Mapping[str, Options] = field(default_factory=dict)
    measures: Mapping[str, Options] = field(default_factory=lambda: {"end_points": {}})
    n_train: int | None = None
    most_seeds: int | None = None
    rank: int = 1

    def arms_of(self, variant: str) -> tuple[str, ...]:
        """The arms of a variant."""
        return self.variant_arms.get(variant, self.arms)

    def training(self, variant: str, arm: str) -> dict[str, Any]:
        """The options of one training."""
        return {**self.options, **self.variants[variant], **self.arm_options.get(arm, {})}


@dataclass(frozen=True)
class Scale:
    """A whole study: its settings by experiment, its data and how often each is repeated by default."""

    summary: str
    data: str
    seeds: int
    settings: Mapping[str, Setting]


_KINK = {"kink6": {"data": "kink6"}, "kink20": {"data": "kink20"}}
_INITS = {"init1": {"init_std": 0.2}, "init2": {"init_std": 0.05}}
_SATURATION = {"end_points": {}, "saturation": {"n": 1000}}
_DIGITS = {"batch_size": 64}
#: ResNet-18 with an eighth of its channels: its layers are those of the paper, and it takes a fiftieth of the time.
_NARROW = {"input_shape": [1, 8, 8], "width": 8}


@dataclass(frozen=True)
class Sweep:
    """The points of S9-sweep: a chain at each, and for each initialisation and width restarts as their control.

    Attributes
    ----------
    lams : tuple of float
    stds : tuple of float or None
        Standard deviations of initial parameters; ``None`` is Xavier's initialisation.
    widths : tuple of int
    """

    lams: tuple[float, ...]
    stds: tuple[float | None, ...]
    widths: tuple[int, ...]

    def variants(self, **model_options: Any) -> dict[str, Options]:
        """Options by the name of the point, such as ``width64-std0.1-lam0.01``, or of the control."""
        found: dict[str, Options] = {}
        for width, std in product(self.widths, self.stds):
            shared: dict[str, Any] = {"model_options": {"width": width, **model_options}}
            shared |= {} if std is None else {"init_std": std}
            found |= {point_name(width, std, lam): {"lam": lam, **shared} for lam in self.lams}
            found[point_name(width, std)] = shared
        return found

    @property
    def arms(self) -> dict[str, tuple[str, ...]]:
        """The arms of the controls, which have no strength; points have a chain."""
        return {point_name(width, std): (RESTART,) for width, std in product(self.widths, self.stds)}


def point_name(width: int, std: float | None, lam: float | None = None) -> str:
    """The name of a point of the sweep, or without ``lam`` of the control of points."""
    parts = [f"width{width}", "xavier" if std is None else f"std{std:g}", None if lam is None else f"lam{lam:g}"]
    return "-".join(part for part in parts if part)


def _spectrum(n: int, n_hvp: int, checkpoints: str = "ends") -> Options:
    return {"n": n, "n_hvp": n_hvp, "checkpoints": checkpoints}


def control_of(point: str) -> str:
    """The name of a point's control."""
    return point.rpartition("-lam")[0]


_LAMS = (1e-3, 1e-2, 1e-1, 1.0)
_FEW_POINTS = Sweep((1e-3, 1.0), (None,), (32,))
#: Xavier's standard deviation of hidden layers is 0.125 for a width of 64, and 0.0625 for 256.
_POINTS = Sweep(_LAMS, (None, 0.02, 0.1, 0.3), (64, 256))
_ALL_POINTS = Sweep(_LAMS, (None, 0.02, 0.1, 0.3), (64, 256, 1024))


SCALES: dict[str, Scale] = {
    "smoke": Scale(
        "handwritten digits and small networks, minutes: shows that everything runs, and nothing about the paper",
        "digits", 2,
        {
            "S1": Setting("two-well", arm_options={RESTART: {"iterations": 20}}, measures={"descent": {}},
                          most_seeds=1, rank=0),
            "S2": Setting("kink", {"iterations": 4, "epochs": 2000, "chains": 3}, _KINK, measures={"ensemble": {}},
                          most_seeds=1, rank=0),
            "S3": Setting("lenet5-full", {"iterations": 2, "epochs": 2, **_DIGITS}, _INITS, most_seeds=1),
            "S4": Setting("lenet5", {"iterations": 3, "epochs": 2, "lam": 0.1, **_DIGITS},
                          measures={"end_points": {}, "hessian": _spectrum(64, 24)}),
            "S5": Setting("alexnet", {"iterations": 2, "epochs": 1, "batch_size": 256,
                                      "model_options": {"input_shape": [1, 16, 16], "width": 16}},
                          most_seeds=1, rank=2),
            "S6": Setting("resnet18", {"iterations": 2, "epochs": 1, "model_options": _NARROW}, most_seeds=1, rank=2),
            "S7": Setting("gradient-split", {"iterations": 2, "epochs": 3, **_DIGITS}, arms=(PERSISTENT,),
                          measures={"gradients": {"n": 256}}, most_seeds=1, rank=0),
            "S8": Setting("spectrum", {"iterations": 2, "epochs": 1, "model_options": _NARROW},
                          measures={"end_points": {}, "hessian": _spectrum(64, 60)}, most_seeds=1, rank=2),
            "S9": Setting("tanh7", {"iterations": 3, "epochs": 4, "lam": 0.1, "checkpoint_every": 2, **_DIGITS,
                                    "model_options": {"input_shape": [1, 8, 8], "width": 32}},
                          measures={"end_points": {}, "saturation": {"n": 200}}),
            "S9-sweep": Setting("tanh7", {"iterations": 2, "epochs": 2, "checkpoint_every": 2, **_DIGITS},
                                _FEW_POINTS.variants(input_shape=[1, 8, 8]), (PERSISTENT,), _FEW_POINTS.arms,
                                most_seeds=1,
                                measures={"saturation": {"n": 200, "histograms": False}}),
        },
    ),
    "cpu": Scale(
        "CIFAR-10 on two CPU cores: S1 and S2 in full, S3 and S4 shortened, S7 and S9 with settings that the paper "
        "leaves open, and S5, S6 and S8 at the largest setting that takes about an hour each, with fewer channels, "
        "images and epochs", "cifar10", 3,
        {
            "S1": Setting("two-well", arm_options={RESTART: {"iterations": 100}}, measures={"descent": {}},
                          most_seeds=1, rank=0),
            "S2": Setting("kink", {"iterations": 100, "epochs": 50_000, "chains": 20}, _KINK,
                          measures={"ensemble": {}}, most_seeds=1, rank=0),
            "S7": Setting("gradient-split", {"iterations": 4, "epochs": 20}, arms=(PERSISTENT,),
                          measures={"gradients": {"n": 2048}}, most_seeds=1, rank=0),
            "S4": Setting("lenet5", {"iterations": 10, "epochs": 30, "checkpoint_every": 30},
                          measures={"end_points": {}, "hessian": _spectrum(1024, 150)}),
            "S3": Setting("lenet5-full", {"iterations": 10, "epochs": 30, "checkpoint_every": 30}, _INITS),
            "S9": Setting("tanh7", {"iterations": 10, "epochs": 30, "checkpoint_every": 5}, measures=_SATURATION),
            "S9-sweep": Setting("tanh7", {"iterations": 6, "epochs": 10, "checkpoint_every": 10},
                                _POINTS.variants(), (PERSISTENT,), _POINTS.arms,
                                measures={"saturation": {"n": 1000, "histograms": False}}),
            # About 20 minutes of one core for a cell of S5, S6 and S8, 30 for the restarts of S8 (ten and the plain
            # model): an hour for all six of them on two cores. A thousand images of an epoch take 1.6 s in AlexNet of
            # 16 channels, 2.2 s in ResNet-18 of 8, 1 s in one of 4; those that are only evaluated take a quarter to a
            # half of that. A spectrum of the latter takes 100 s; with fewer products its class numbers are unknown.
            "S5": Setting("alexnet", {"iterations": 5, "epochs": 10, "checkpoint_every": 10,
                                      "model_options": {"width": 16}}, n_train=10_000, rank=2),
            "S6": Setting("resnet18", {"iterations": 5, "epochs": 8, "checkpoint_every": 8,
                                       "model_options": {"width": 8}}, n_train=10_000, rank=2),
            "S8": Setting("spectrum", {"iterations": 5, "epochs": 4, "checkpoint_every": 4,
                                       "model_options": {"width": 4}},
                          arm_options={RESTART: {"iterations": 11}}, n_train=5_000,
                          measures={"end_points": {}, "hessian": _spectrum(256, 120)}, rank=2),
        },
    ),
    "paper": Scale(
        "CIFAR-10 with the paper's own settings, for a GPU", "cifar10", 3,
        {
            "S1": Setting("two-well", arm_options={RESTART: {"iterations": 100}}, measures={"descent": {}},
                          most_seeds=1, rank=0),
            "S2": Setting("kink", {"iterations": 100, "epochs": 50_000, "chains": 20}, _KINK,
                          measures={"ensemble": {}}, most_seeds=1, rank=0),
            "S7": Setting("gradient-split", {}, arms=(PERSISTENT,), measures={"gradients": {"n": 2048}},
                          most_seeds=1, rank=0),
            "S4": Setting("lenet5", {"checkpoint_every": 150},
                          measures={"end_points": {}, "hessian": _spectrum(2048, 300)}),
            "S3": Setting("lenet5-full", {"checkpoint_every": 150}, _INITS),
            "S9": Setting("tanh7", {}, measures={"end_points": {}, "saturation": {"n": 5000}}),
            "S9-sweep": Setting("tanh7", {"checkpoint_every": 15},
                                _ALL_POINTS.variants(), (PERSISTENT,), _ALL_POINTS.arms,
                                measures={"saturation": {"n": 5000, "histograms": False}}, rank=2),
            "S5": Setting("alexnet", {"checkpoint_every": 150}),
            "S6": Setting("resnet18", {"checkpoint_every": 350}, rank=2),
            "S8": Setting("spectrum", {}, measures={"end_points": {}, "hessian": _spectrum(2048, 300)}, rank=2),
        },
    ),
}  # fmt: skip

#: What each experiment is about, in the order of the paper.
TITLES = {
    "S1": "two-well surface",
    "S2": "kink regression",
    "S3": "LeNet-5, every layer repelled",
    "S4": "LeNet-5, one layer repelled",
    "S5": "AlexNet, one layer repelled",
    "S6": "ResNet-18, one layer repelled",
    "S7": "split of the persistent gradient",
    "S8": "Hessian spectrum",
    "S9": "saturation of a seven-layer tanh network",
    "S9-sweep": "at which strength, initial scale and width saturation changes",
}


@dataclass(frozen=True)
class Accuracies:
    """Accuracies in the paper, in per cent: of the plain model and of the champion."""

    plain_validation: float
    plain_test: float
    champion_validation: float
    champion_test: float


#: The paper's table, by experiment and variant.
PAPER: dict[tuple[str, str], Accuracies] = {
    ("S3", "init1"): Accuracies(70.74, 69.94, 71.64, 71.78),
    ("S3", "init2"): Accuracies(71.58, 71.48, 72.76, 73.22),
    ("S4", ""): Accuracies(72.94, 72.60, 73.60, 73.22),
    ("S5", ""): Accuracies(80.46, 78.92, 80.74, 79.44),
    ("S6", ""): Accuracies(92.20, 91.94, 92.40, 92.18),
}

#: Channels of the first layer in the networks of the paper, by the recipe, where a setting may have fewer.
PAPER_CHANNELS = {"alexnet": 64, "resnet18": 64, "spectrum": 64}

#: Iterations, where they are given, and epochs (or steps) in the paper.
PAPER_LENGTHS: dict[str, tuple[int | None, int]] = {
    "S1": (2, 50_000),
    "S2": (100, 50_000),
    "S3": (20, 150),
    "S4": (20, 150),
    "S5": (20, 150),
    "S6": (20, 350),
    "S8": (20, 350),
    "S9": (None, 30),
}


def find_scale(name: str) -> Scale:
    """The scale of this name.

    Raises
    ------
    PnError
        If there is none; the message lists them.
    """
    one_of(tuple(SCALES), scale=name)
    return SCALES[name]


def find_experiments(names: list[str], scale: Scale) -> list[str]:
    """Experiments by id, in the scale's order; ``all``, or none, for all of them, and S9 includes its sweep.

    Raises
    ------
    PnError
        If there is no such experiment.
    """
    wanted = {name.upper().replace("-SWEEP", "-sweep") for name in names if name.lower() != "all"}
    unknown = wanted - set(scale.settings)
    if unknown:
        raise PnError(f"no experiment {sorted(unknown)[0]!r}; there are {', '.join(TITLES)} and all")
    if not wanted or len(wanted) < len({name.lower() for name in names}):  # one of the names is all
        return list(scale.settings)
    return [name for name in scale.settings if name in wanted or name.removesuffix("-sweep") in wanted]
