"""Curvature while a network trains: sharpness beside the stability threshold of the optimizer, in any training loop."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import nn

from pnanalysis import schema
from pnanalysis.checks import at_least, check_seed, one_of, positive
from pnanalysis.curvature.batches import has_batch_norm
from pnanalysis.errors import ModelError, PnError, reason
from pnanalysis.inputs.copies import unwrapped
from pnanalysis.inputs.data import DataLike, as_splits
from pnanalysis.inputs.models import Loss, resolve_loss
from pnanalysis.inputs.random_states import random_states_kept
from pnanalysis.inputs.splits import Split
from pnanalysis.io.datasets import check_destination, load, save
from pnanalysis.kinds import SCHEMAS
from pnanalysis.monitoring.cost import CostCap
from pnanalysis.monitoring.measurement import Measurement, Reader, Record, Wanted
from pnanalysis.monitoring.preconditioners import Preconditioner, read_preconditioner
from pnanalysis.monitoring.sinks import as_sink

#: Cost where neither a cap nor a number of steps is given.
DEFAULT_COST = 0.05
#: Under a cap, the network is not traced before there is so much time for it.
TRACING_SECONDS = 20.0
#: Products for which it is not.
_FEW = 10


class CurvatureMonitor:
    """Record curvature along a training: sharpness beside the threshold at which the optimizer's steps are unstable.

    Measurements are made right after a step of the optimizer, on a copy of the network. Weights, gradients, modes of
    modules, random numbers and the optimizer's state stay as they are, so that training is the same with and without
    a monitor. An error in the first measurement is raised; later ones, of a network that has diverged for example, are
    warned of, and training goes on.

    Parameters
    ----------
    model : torch.nn.Module
        The network that is trained; compiled and wrapped ones too.
    optimizer : torch.optim.Optimizer
        What trains it. The preconditioners of SGD, Adam, AdamW, RMSprop and Adagrad are known.
    data : (inputs, targets), DataLoader, Dataset, list of batches or mapping of splits
        What to measure on: the training data, for the edge of stability. Read once, at the start.
    loss : str or callable
        As for :class:`pnanalysis.HessianOperator`, or the name of a loss.
    every : int, optional
        Steps from one measurement to the next (``len(loader)`` for one per epoch), the first before the first step.
        By default as often as ``max_cost`` allows.
    max_cost : float, optional
        The most time that measurements may take, relative to training: measurements are put off until they are within
        it. 0.05 if ``every`` is not given, else no cap. The first measurement, before any training, is paid for by
        what follows; a training too short for that is warned of. The network is traced, which makes products faster,
        once that can be afforded.
    n : int or None
        Examples to measure on, drawn by ``seed``; of a loader, the leading batches. All if ``None``.
    batch_size : int
        Most examples per pass, where the data are not batches already. The gradient noise scale needs several batches.
    top : int
        How many eigenvalues of the Hessian.
    trace_probes : int
        Products for the trace; 0 for no trace.
    batches : bool
        Whether to find the largest eigenvalue of each batch, too, which keeps an eigenvector for each.
    data_error : {"examples", "none"}
        Whether to find standard errors for the choice of examples, ``NAME_se``: of the eigenvalues, with and without
        preconditioner, for one or two products more for each; of the trace (its part ``trace_data_se``), the loss, the
        norm of the gradient and the critical sharpness, for a few forward passes. ``batch_lambda_max`` has none.
        In networks with batch normalisation by batches, whole batches take the place of examples, if there are eight.
    tolerance : float
        Largest residual of an eigenvalue relative to the largest magnitude; others are NaN.
    max_hvp : int
        The most products for the eigenvalues of one matrix.
    path : path, optional
        Save the dataset there after each measurement. A file that is there is replaced, unless a training is resumed.
    first_step : int
        Steps that the optimizer has made before, where a training is resumed. Measurements go on from there, after
        those up to this step that are in ``path`` and in CSV files; those of later steps are dropped.
    sinks : sequence
        Functions of the step and a mapping of numbers, or paths of CSV files; see :mod:`pnanalysis.monitoring.sinks`
        for TensorBoard and Weights & Biases.
    preconditioner : callable, optional
        For other optimizers: a function of the optimizer and the parameters by name that returns a
        :class:`pnanalysis.monitoring.preconditioners.Preconditioner`.
    seed : int
    **options
        Passed to :class:`pnanalysis.HessianOperator`: ``params`` (by default those that the optimizer trains),
        ``dtype``, ``weight_decay``... Batch normalisation takes the statistics of each batch, as the steps do, but for
        layers that are in eval mode while the network is in train mode, unless ``bn_mode="eval"`` or ``micro_batch`` is
        given.

    Raises
    ------
    PnError
        If an argument is out of range, the data or the loss do not fit the network, or it has no such parameters; if
        the loss is a sum over examples, whose sharpness depends on how many a step takes, and neither ``weight`` nor
        ``reduction`` says what to take.

    Examples
    --------
    >>> import torch
    >>> x, y = torch.randn(64, 4), torch.randn(64, 1)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with CurvatureMonitor(model, optimizer, (x, y), loss="mse", every=10) as monitor:
    ...     for _ in range(20):
    ...         optimizer.zero_grad()
    ...         torch.nn.functional.mse_loss(model(x), y).backward()
    ...         optimizer.step()
    >>> ds = monitor.dataset()
    >>> ds.step.values.tolist(), ds.threshold.values.tolist()
    ([0, 10, 20], [20.0, 20.0, 20.0])
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        data: DataLike,
        loss: str | Loss = "cross_entropy",
        *,
        every: int | None = None,
        max_cost: float | None = None,
        n: int | None = 1000,
        batch_size: int = 250,
        top: int = 1,
        trace_probes: int = 8,
        batches: bool = False,
        data_error: str = "examples",
        tolerance: float = 0.01,
        max_hvp: int = 200,
        path: str | os.PathLike[str] | None = None,
        first_step: int = 0,
        sinks: Sequence[Any] = (),
        preconditioner: Reader | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        at_least(1, every=every, n=n, batch_size=batch_size, top=top, max_hvp=max_hvp)
        positive(max_cost=max_cost, tolerance=tolerance)
        one_of(("examples", "none"), data_error=data_error)
        at_least(0, first_step=first_step)
        check_seed(seed=seed)
        if trace_probes:
            at_least(2, trace_probes=trace_probes)
        if every is None and max_cost is None:
            max_cost = DEFAULT_COST
        self.model, self.optimizer = model, _inner_optimizer(optimizer)
        self.every, self.step = every or 1, first_step
        self.path = None if path is None else check_destination(path)
        self._sinks = [as_sink(one, first_step) for one in sinks]
        self._records: list[Record] = []
        self._steps: list[int] = []
        self._seconds: list[float] = []
        self._hooks = ExitStack()
        self._read_by: Reader = preconditioner or read_preconditioner
        self._said: set[str] = set()
        self._n_failed = 0
        self._before: dict[str, torch.Tensor] | None = None  # parameters before the step that is under way
        self._attrs: dict[str, Any] = {
            "optimizer": type(self.optimizer).__name__, "model": type(unwrapped(model)).__name__, "every": every,
            "max_cost": max_cost, "seed": seed, "top": top, "trace_probes": trace_probes, "tolerance": tolerance,
            "max_hvp": max_hvp,
        }  # fmt: skip
        options.setdefault("dtype", _precision(model))
        if has_batch_norm(unwrapped(model)) and options.get("micro_batch") is None:
            options.setdefault("bn_mode", "train")
        device = torch.device(options.get("device") or next(unwrapped(model).parameters()).device)
        self._cost = CostCap(max_cost, device)
        self._traces_later = max_cost is not None and "expected_products" not in options
        if self._traces_later:
            options["expected_products"] = _FEW
        with self._cost.measured(), _untouched():
            splits = as_splits(data)
            whole, part = splits.get("train"), splits.examples("train", n, seed, device, options["dtype"])
            size = _even(len(part), batch_size) if isinstance(part, Split) else batch_size
            wanted = Wanted(top, trace_probes, tolerance, max_hvp, seed, batches, data_error != "none")
            self._measurement = Measurement(
                model, resolve_loss(loss), part.batches(size), wanted, self.optimizer, self._reading, **options
            )
        if self.path is not None and first_step and self.path.exists():
            self.resume(load(self.path))
        operator = self._measurement.operator
        n_used, n_all = operator.n_examples, len(whole) if isinstance(whole, Split) else None
        self._attrs |= {
            "n": n_used, "n_all": n_all, "all_examples": n is None or n_used < n or n_used == n_all,
            "device": str(device), "dtype": str(operator.dtype).split(".")[-1],
        }  # fmt: skip
        if has_batch_norm(operator.model):
            self._attrs["bn_mode"] = operator.bn_mode

    def __enter__(self) -> CurvatureMonitor:
        self.start()
        self._hooks.enter_context(self.watching())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.close()
        self.stop()

    def start(self) -> None:
        """Training goes on from here; the first measurement is made."""
        if not self._steps or self._steps[-1] != self.step:
            self.measure()
        self._cost.start()

    def stop(self) -> None:
        """Training has ended."""
        self._cost.stop()
        if self._cost.is_exceeded:
            self._warn(
                f"measurements took {self.cost:.0%} of the time of the training, more than max_cost, "
                f"{self._cost.share:.0%}: it was too short to pay for the first".replace("%", " %")
            )
        if self.path is not None and self._steps:
            self.save(self.path)  # with the cost of the whole training

    @contextmanager
    def watching(self) -> Iterator[None]:
        """In the body, each step of the optimizer counts and may be followed by a measurement."""
        with ExitStack() as hooks:
            hooks.callback(self.optimizer.register_step_pre_hook(self._before_step).remove)
            hooks.callback(self.optimizer.register_step_post_hook(self._after_step).remove)
            yield

    def resume(self, ds: xr.Dataset) -> None:
        """Go on after the measurements of an earlier part of the training, up to the step that it resumes at.

        Parameters
        ----------
        ds : xarray.Dataset
            Kind ``curvature_monitor``, along ``step``.

        Raises
        ------
        PnError
            If it is no such dataset, or has other eigenvalues.
        """
        if ds.attrs.get("kind") != "curvature_monitor" or "step" not in ds.dims:
            raise PnError(f"what is to be continued is no curvature along a training but {ds.attrs.get('kind')!r}")
        if ds.sizes["pair"] != self._attrs["top"]:
            raise PnError(
                f"top is {self._attrs['top']}, but the training that is resumed has {ds.sizes['pair']} eigenvalue(s)"
            )
        ds = ds.sel(step=ds.step <= self.step)
        names = [name for name in SCHEMAS["curvature_monitor"] if name in ds and name != "seconds"]
        rows = [{str(name): np.asarray(ds[name][i]) for name in names} for i in range(ds.sizes["step"])]
        self._records = [{name: one if one.ndim else float(one) for name, one in row.items()} for row in rows]
        self._steps, self._seconds = ds.step.values.tolist(), ds.seconds.values.tolist()
        self._n_failed = int(ds.attrs.get("n_failed", 0))
        training = float(ds.attrs.get("training_seconds", 0.0))
        self._cost.resume(training, float(ds.attrs["cost"]) * training if "cost" in ds.attrs else sum(self._seconds))

    @property
    def cost(self) -> float:
        """Time of measurements so far relative to that of training."""
        return self._cost.cost

    def measure(self) -> None:
        """Measure now, whatever the cost; once for each step.

        Raises
        ------
        PnError
            If the loss or a product is not finite.
        """
        if self._steps and self._steps[-1] == self.step:
            return
        with self._cost.measured(), _untouched():
            record = self._measurement(self._before)
        self._records.append(record)
        self._steps.append(self.step)
        self._seconds.append(self._cost.last)
        with self._cost.measured(continued=True):
            for sink in self._sinks:
                sink(self.step, {name: float(record.get(name, np.nan)) for name in _SCALARS})
            if self.path is not None:
                self.save(self.path)

    def dataset(self) -> xr.Dataset:
        """All measurements so far: kind ``curvature_monitor``, along ``step`` (of the optimizer, from 0).

        Raises
        ------
        ModelError
            If there are none.
        """
        if not self._steps:
            raise ModelError(
                "nothing has been measured: the optimizer made no step within the monitor's `with`, or the training "
                "was too short for max_cost"
            )
        ds = xr.Dataset(coords={"step": self._steps, "pair": np.arange(1, self._attrs["top"] + 1)})
        for name in SCHEMAS["curvature_monitor"]:
            if name == "seconds":
                ds[name] = "step", self._seconds
            elif name == "batch_lambda_max" and any(name in record for record in self._records):
                rows = [np.atleast_1d(record.get(name, np.nan)) for record in self._records]
                most = max(map(len, rows))  # batches are cut where memory has become short
                ds[name] = (
                    ("step", "batch"),
                    np.stack([np.pad(r, (0, most - len(r)), constant_values=np.nan) for r in rows]),
                )
            elif name in ("eigenvalue", "eigenvalue_se", "residual"):
                if any(name in record for record in self._records):  # not those of an earlier part without errors
                    unknown = np.full(self._attrs["top"], np.nan)
                    ds[name] = ("step", "pair"), np.stack([record.get(name, unknown) for record in self._records])
            elif any(name in record for record in self._records):
                ds[name] = "step", [float(record.get(name, np.nan)) for record in self._records]
        cost, errors = self.cost, self._measurement.errors
        return schema.finish(
            ds, "curvature_monitor", **self._attrs, cost=cost if np.isfinite(cost) else None,
            n_failed=self._n_failed or None, data_error="none" if errors.reason else "examples",
            no_data_error=errors.note or None,
            training_seconds=self._cost.training,
        )  # fmt: skip

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write :meth:`dataset` as NetCDF4, or as Zarr if the path ends in ``.zarr``."""
        return save(self.dataset(), path)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if (self.step + 1) % self.every == 0 and self._cost.affordable():
            parameters = unwrapped(self.model).named_parameters()
            self._before = {name: parameter.detach().clone() for name, parameter in parameters}

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.step += 1
        if self.step % self.every == 0 and self._cost.affordable():
            try:
                self._trace_if_affordable()
                self.measure()
            except Exception as error:  # of a network that has diverged, a full disk, a sink: training goes on
                self._n_failed += 1
                self._warn(str(error) if isinstance(error, PnError) else reason(error), f"step {self.step}: ")
        self._before = None

    def _trace_if_affordable(self) -> None:
        if self._traces_later and self._cost.spare > TRACING_SECONDS:
            self._traces_later = False
            with self._cost.measured(), _untouched():
                self._measurement.expect_many_products()

    def _reading(
        self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
    ) -> Preconditioner | None:
        """The preconditioner, if it is known; if not, that is said once."""
        try:
            return self._read_by(optimizer, parameters)
        except ModelError as error:
            self._warn(f"no threshold and no preconditioned Hessian: {error}")
            return None

    def _warn(self, text: str, where: str = "") -> None:
        """Say it once, however often it happens."""
        if text not in self._said:
            self._said.add(text)
            warnings.warn(f"curvature monitor: {where}{text}", stacklevel=2)


@contextmanager
def _untouched() -> Iterator[None]:
    """Random numbers and torch's modes are left as the user has them; in the body, gradients can be computed."""
    with random_states_kept(), torch.inference_mode(False), torch.enable_grad():
        yield


#: The scalars of a measurement, in the order of the dataset.
_SCALARS = tuple(name for name, one in SCHEMAS["curvature_monitor"].items() if not one.dims and name != "seconds")


def _even(n: int, batch_size: int) -> int:
    """At most the size given, and such that all batches are equal if that takes no more than twice as many."""
    fewest = -(-n // batch_size)
    return -(-n // next((k for k in range(fewest, 2 * fewest + 1) if n % k == 0), fewest))


def _inner_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside the wrappers of Accelerate and Lightning.

    Raises
    ------
    ModelError
        If there is none.
    """
    inner = optimizer
    while inner is not None and type(inner).__module__.partition(".")[0] in (
        "accelerate",
        "lightning",
        "pytorch_lightning",
    ):
        inner = getattr(inner, "optimizer", None)
    if not isinstance(inner, torch.optim.Optimizer):
        raise ModelError(f"a {type(optimizer).__name__} is no torch.optim.Optimizer, whose steps can be watched")
    return inner


def _precision(model: nn.Module) -> torch.dtype:
    """That of the parameters, but at least single."""
    found = [p.real.dtype for p in unwrapped(model).parameters() if p.is_floating_point() or p.is_complex()]
    return torch.promote_types(found[0], torch.float32) if found else torch.float32
