"""Kink regression with hundreds of small networks trained at once, as restarts and as persistent chains.

The iterations of one chain depend on each other, but chains (seeds and strengths) are trained in parallel; so are
restarts. Both give a dataset of the kind ``ensemble``, after every iteration if wanted, and both can resume from one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pnanalysis import schema
from pnanalysis.errors import DivergenceError, TrainingError
from pnanalysis.inputs.sources import resolve_device
from pnanalysis.terminal.progress import Advance, progress_bar
from trainers.problems.batched_relu import ReluBatch, Repulsion, fitting_threads, pack, predict
from trainers.seeds import derive_seed
from trainers.zoo.models import relu32

OnIteration = Callable[[xr.Dataset], None]
_GRID = 241  # points at which predictions are kept
_MARGIN = 0.15  # of the grid beyond the data on either side, relative to their range


def train_chains(
    x: Sequence[float] | np.ndarray,
    y: Sequence[float] | np.ndarray,
    *,
    seeds: Sequence[int] = (0,),
    lams: Sequence[float] = (0.01,),
    iterations: int = 12,
    width: int = 32,
    lr: float = 1e-3,
    momentum: float = 0.9,
    steps: int = 50_000,
    samples: int = 200,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
    on_iteration: OnIteration | None = None,
    resume: xr.Dataset | None = None,
) -> xr.Dataset:
    r"""Persistent chains of 1 -> h -> h -> 1 ReLU networks, every seed with every strength, all at once.

    Iteration 0 is plain training; each further one starts from the same He initialisation and is repelled from all
    earlier end points of its chain, layer by layer, weight and bias together, by
    :math:`\lambda\sum_k\sum_l|\langle\Theta_k^l,\theta^l\rangle|/\lVert\Theta_k^l\rVert^2`.

    Parameters
    ----------
    x, y : array_like, shape (n,)
        Inputs and targets; see :func:`trainers.zoo.kink.kink_data`.
    seeds : sequence of int
        A chain's starting point is ``relu32(width)`` built under this torch seed.
    lams : sequence of float
        Strengths of the penalty.
    iterations : int
        Number of trainings per chain, the plain one included.
    width : int
        Units in each hidden layer.
    lr, momentum, steps
        Full-batch gradient descent on mean squared error.
    samples : int
        Number of steps at which losses are kept, in addition to the start.
    device, dtype
        The same seeds, batch and device give the same numbers.
    progress : bool
        Show a bar on a terminal.
    on_iteration : callable, optional
        Called after each iteration with the dataset so far.
    resume : xarray.Dataset, optional
        An earlier dataset with the same settings: training continues after its last iteration. More ``iterations``
        extend a finished one.

    Returns
    -------
    xarray.Dataset
        Kind ``ensemble``; a member is a chain, with coordinates ``seed`` and ``lam``. ``loss`` (iteration, member,
        step), ``final_loss`` (iteration, member), ``parameters`` (iteration, member, parameter) in the order of
        :func:`trainers.problems.batched_relu.pack`, ``prediction`` (iteration, member, x), ``champion`` and
        ``champion_loss`` (member), ``data_x`` and ``data_y`` (point). Losses do not include the penalty.

    Raises
    ------
    TrainingError
        If the data or a setting is unusable, a loss stops being finite, or ``resume`` has other settings.

    References
    ----------
    Y. Min, "Persistent Neurons", arXiv:2007.01419, section 3.
    """
    for lam in lams:
        if not (math.isfinite(lam) and lam >= 0):
            raise TrainingError(f"lam is {lam}; it must be a finite number, zero or more")
    members = [_Member(seed, float(lam)) for lam in lams for seed in seeds]
    ensemble = _Ensemble("persistent", *_check_data(x, y), members, width, lr, momentum, steps, samples, device, dtype)
    return ensemble.run(iterations, progress, on_iteration, resume)


def train_restarts(
    x: Sequence[float] | np.ndarray,
    y: Sequence[float] | np.ndarray,
    *,
    seeds: Sequence[int] = (0,),
    iterations: int = 1,
    width: int = 32,
    lr: float = 1e-3,
    momentum: float = 0.9,
    steps: int = 50_000,
    samples: int = 200,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
    on_iteration: OnIteration | None = None,
    resume: xr.Dataset | None = None,
) -> xr.Dataset:
    """Plain trainings from fresh initialisations: the control of equal cost.

    A member's iteration 0 starts where the chain of the same seed does, each later iteration from a fresh draw
    (``init_seed`` is its seed). One iteration of many seeds shows what random re-initialisation achieves.

    Parameters and result are those of :func:`train_chains`, without the strengths (``lam`` is NaN).

    Raises
    ------
    TrainingError
        As for :func:`train_chains`.
    """
    members = [_Member(seed, math.nan) for seed in seeds]
    ensemble = _Ensemble("restart", *_check_data(x, y), members, width, lr, momentum, steps, samples, device, dtype)
    return ensemble.run(iterations, progress, on_iteration, resume)


def initial_parameters(seed: int, width: int = 32) -> Tensor:
    """He normal weights and zero biases, shape (P,), float32: those of ``relu32`` built under the torch seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return pack(relu32(width).state_dict())


class _Member(NamedTuple):
    """A chain, or a sequence of restarts (``lam`` is NaN)."""

    seed: int
    lam: float


@dataclass
class _Ensemble:
    """All trainings of one call of :func:`train_chains` or :func:`train_restarts`."""

    strategy: str
    x: np.ndarray
    y: np.ndarray
    members: list[_Member]
    width: int
    lr: float
    momentum: float
    steps: int
    samples: int
    device: str | torch.device
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if not self.members:
            raise TrainingError("no seeds or no strengths are given; give at least one of each")
        for name in ("width", "steps", "samples"):
            if getattr(self, name) < 1:
                raise TrainingError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not (math.isfinite(self.lr) and self.lr > 0 and 0 <= self.momentum < 1):
            raise TrainingError(f"lr {self.lr} must be positive and momentum {self.momentum} in [0, 1)")
        self.device = resolve_device(self.device)
        self.sampled = np.unique(np.linspace(0, self.steps, self.samples + 1).round().astype(int))
        span = np.ptp(self.x) * _MARGIN
        self.grid = np.linspace(self.x.min() - span, self.x.max() + span, _GRID)

    def run(
        self, iterations: int, progress: bool, on_iteration: OnIteration | None, resume: xr.Dataset | None
    ) -> xr.Dataset:
        """Train the iterations that ``resume`` does not hold yet."""
        if iterations < 1:
            raise TrainingError(f"iterations is {iterations}; it must be at least 1")
        done = [] if resume is None else self._restore(resume)
        total = max(iterations - len(done), 0) * self.steps
        bar = progress_bar(f"{len(self.members)} networks, {self.strategy}", total, progress)
        # ReluBatch computes its gradients by hand: recording operations for autograd would only cost time.
        with bar as advance, fitting_threads(len(self.members), len(self.x), self.width), torch.inference_mode():
            for iteration in range(len(done), iterations):
                done.append(self._train(iteration, done, advance))
                if on_iteration is not None:
                    on_iteration(self._dataset(done))
        return self._dataset(done)

    def init_seeds(self, iteration: int) -> list[int]:
        """Torch seeds of the members' starting points."""
        if iteration == 0 or self.strategy != "restart":
            return [member.seed for member in self.members]
        return [derive_seed(member.seed, "restart", iteration) for member in self.members]

    def _train(self, iteration: int, done: list[_Iteration], advance: Advance) -> _Iteration:
        initial = torch.stack([initial_parameters(seed, self.width) for seed in self.init_seeds(iteration)])
        initial = initial.to(self.device, self.dtype)
        x, y = torch.from_numpy(self.x), torch.from_numpy(self.y)
        batch = ReluBatch(x, y, initial, self.width, self.lr, self.momentum, self._repulsion(done))
        losses = [self._losses(batch, iteration, 0)]
        for before, now in pairwise(self.sampled.tolist()):
            batch.advance(now - before)
            losses.append(self._losses(batch, iteration, now))
            advance(now - before, f"iteration {iteration}, best loss {np.min(losses[-1]):.3g}")
        grid = torch.from_numpy(self.grid).to(initial)
        parameters = batch.parameters
        prediction = predict(parameters, grid, self.width)
        return _Iteration(np.stack(losses, axis=1), parameters.cpu().numpy(), prediction.cpu().numpy())

    def _repulsion(self, done: list[_Iteration]) -> Repulsion | None:
        if self.strategy != "persistent" or not done or not any(member.lam for member in self.members):
            return None
        ends = torch.from_numpy(np.stack([entry.parameters for entry in done])).to(self.device)
        lams = torch.tensor([member.lam for member in self.members], dtype=torch.float64, device=self.device)
        return Repulsion(ends, lams, self.width)

    def _losses(self, batch: ReluBatch, iteration: int, step: int) -> np.ndarray:
        losses = batch.losses().cpu().numpy()
        bad = np.flatnonzero(~np.isfinite(losses))
        if len(bad):
            seed, lam = self.members[bad[0]]
            strength = "" if math.isnan(lam) else f", lam {lam:g}"
            raise DivergenceError(
                f"the loss of seed {seed}{strength} became {losses[bad[0]]} by step {step} of iteration {iteration}; "
                "try a smaller lr or lam"
            )
        return losses

    def _dataset(self, done: list[_Iteration]) -> xr.Dataset:
        final = np.stack([entry.loss[:, -1] for entry in done])
        champion = final.argmin(axis=0)
        variables = {
            "loss": (("iteration", "member", "step"), np.stack([entry.loss for entry in done])),
            "final_loss": (("iteration", "member"), final),
            "parameters": (("iteration", "member", "parameter"), np.stack([entry.parameters for entry in done])),
            "prediction": (("iteration", "member", "x"), np.stack([entry.prediction for entry in done])),
            "champion": ("member", champion),
            "champion_loss": ("member", final.min(axis=0)),
            "data_x": ("point", self.x),
            "data_y": ("point", self.y),
        }
        coords = {
            "iteration": np.arange(len(done)),
            "step": self.sampled,
            "x": self.grid,
            "seed": ("member", [member.seed for member in self.members]),
            "lam": ("member", [member.lam for member in self.members]),
            "init_seed": (("iteration", "member"), [self.init_seeds(i) for i in range(len(done))]),
        }
        return schema.finish(xr.Dataset(variables, coords=coords), "ensemble", **self._settings())

    def _settings(self) -> dict[str, Any]:
        return {
            "strategy": self.strategy,
            "width": self.width,
            "lr": self.lr,
            "momentum": self.momentum,
            "steps": self.steps,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def _restore(self, ds: xr.Dataset) -> list[_Iteration]:
        schema.validate(ds, "ensemble")
        if not {"loss", "parameters", "prediction", "data_x", "data_y"} <= set(ds.variables):
            raise TrainingError("cannot resume from a dataset without losses and parameters; start a new one")
        ours = {**self._settings(), "members": self.members, "data": [self.x, self.y], "step": self.sampled}
        theirs = {name: ds.attrs.get(name) for name in self._settings()}
        theirs["members"] = list(zip(ds["seed"].values.tolist(), ds["lam"].values.tolist(), strict=True))
        theirs |= {"data": [ds["data_x"].values, ds["data_y"].values], "step": ds["step"].values}
        del ours["device"], theirs["device"]  # an ensemble may move to another device
        for name, value in ours.items():
            if not _equal(value, theirs[name]):
                raise TrainingError(f"cannot resume from a dataset with another {name}; use the same or begin again")
        return [
            _Iteration(*(ds[name].values[i] for name in ("loss", "parameters", "prediction")))
            for i in range(ds.sizes["iteration"])
        ]


class _Iteration(NamedTuple):
    """Results of one iteration: losses (B, steps), final parameters (B, P), predictions (B, grid)."""

    loss: np.ndarray
    parameters: np.ndarray
    prediction: np.ndarray


def _equal(a: Any, b: Any) -> bool:
    """Whether two settings are equal: texts, numbers or arrays, in which NaN equals NaN."""
    if isinstance(a, str):
        return bool(a == b)
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    return a.shape == b.shape and np.array_equal(a, b, equal_nan=True)


def _check_data(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if x.ndim != 1 or y.ndim != 1 or len(x) != len(y):
        raise TrainingError(f"x has shape {x.shape} and y {y.shape}; both must be one-dimensional, of the same length")
    if not len(x) or not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise TrainingError("x and y must hold at least one point, all finite")
    return x, y
