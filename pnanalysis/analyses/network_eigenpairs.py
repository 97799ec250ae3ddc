"""Eigenpairs of one matrix as a dataset, with what they say about the network, its gradient and its classes."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from torch import Tensor

from pnanalysis.analyses.eigenpair_halves import PAIRS_OF_HALVES, pairs_over_halves
from pnanalysis.analyses.eigenpair_numbers import GRADIENTS_KEPT, gradient_errors, jackknife_se, numbers_of
from pnanalysis.checks import at_least, check_room, check_seed, human, one_of, positive, resolve_dtype
from pnanalysis.curvature import class_structure
from pnanalysis.curvature.base import METHODS, CurvatureOperator
from pnanalysis.curvature.batch_weights import Weight
from pnanalysis.errors import CurvatureError
from pnanalysis.io.unfinished import Unfinished
from pnanalysis.spectra.averaged import is_averaged
from pnanalysis.spectra.data_error import DataForms
from pnanalysis.spectra.forecast import Forecast, Work
from pnanalysis.spectra.linear_operator import LinearOperator
from pnanalysis.spectra.memory import memory_limit
from pnanalysis.spectra.pairs_plan import WORKING, PairsPlan, plan_pairs, storage_of
from pnanalysis.spectra.restarted import WHICH
from pnanalysis.spectra.subspaces import participation
from pnanalysis.spectra.verified_pairs import VerifiedPairs, check_limit, verified_pairs
from pnanalysis.terminal.progress import Advance

#: Which error for the choice of examples: of the eigenvalues, of the spaces too, or of all that is said of them.
DATA_ERRORS = ("none", "examples", "halves", "groups")
#: To expect.
_PRODUCTS_PER_PAIR = 12


@dataclass(frozen=True)
class EigenpairOptions:
    """Which pairs of which matrix, and what is to be known of them: see :func:`pnanalysis.eigenpairs`."""

    k: int = 10
    which: str = "largest"
    operator: str = "hessian"
    params: Any = None
    bn_mode: str = "eval"
    dtype: str = "float32"
    amp: str = "no"
    weight: Weight = None
    draws: int | None = None
    method: str = "exact"
    tolerance: float = 1e-4
    max_hvp: int = 1000
    data_error: str = "halves"
    classes: bool = True
    seed: int = 0
    max_memory_bytes: int | None = None

    def __post_init__(self) -> None:
        at_least(1, k=self.k, max_hvp=self.max_hvp, draws=self.draws)
        one_of(WHICH, which=self.which)
        one_of(("hessian", "ggn", "fisher"), operator=self.operator)
        one_of(METHODS, method=self.method)
        one_of(DATA_ERRORS, data_error=self.data_error)
        positive(tolerance=self.tolerance, max_memory_bytes=self.max_memory_bytes)
        check_seed(seed=self.seed)
        resolve_dtype(self.dtype)

    @property
    def weight_name(self) -> str:
        """What batches weigh by, in words; empty by default."""
        return self.weight if isinstance(self.weight, str) else getattr(self.weight, "__qualname__", "")

    @property
    def n_products(self) -> int:
        """Roughly how many products are to come: Lanczos takes some ten for each pair."""
        return min(self.max_hvp, _PRODUCTS_PER_PAIR * self.k)


class Found(NamedTuple):
    """Eigenpairs of one matrix.

    Attributes
    ----------
    dataset : xarray.Dataset
        Variables of kind ``eigenpairs``, without the vectors.
    vector : Tensor
        ``(P, k)``, on the CPU.
    halves : tuple of Tensor
        The vectors over halves of the examples, each followed by its complement; empty where there are none.
    shapes : tuple of (str, tuple of int)
        Names and shapes of the parameters that follow each other in a vector; empty for a matrix of no network.
    """

    dataset: xr.Dataset
    vector: Tensor
    halves: tuple[Tensor, ...] = ()
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @property
    def with_vector(self) -> xr.Dataset:
        """The dataset with the vectors in it."""
        return self.dataset.assign(vector=(("pair", "parameter"), self.vector.T.numpy()))


def matrix_eigenpairs(
    operator: LinearOperator,
    options: EigenpairOptions,
    *,
    update: Tensor | None = None,
    advance: Advance | None = None,
    state: Unfinished | None = None,
    title: str = "",
) -> Found:
    """Eigenpairs of one operator.

    Parameters
    ----------
    operator : LinearOperator
        Of a :class:`~pnanalysis.curvature.base.CurvatureOperator`, layers, gradient, classes and the error for the
        choice of examples are known too.
    options : EigenpairOptions
    update : Tensor, optional
        The last step of the training, ``(P,)``.
    advance : callable, optional
        Called with the products of each step.
    state : Unfinished, optional
        Where unfinished searches are saved and taken up again.
    title : str
        Under which it is said on standard error what is to come, after the first products; not at all by default.

    Raises
    ------
    CurvatureError
    """
    plan, work = planned_work(operator, options, state)
    forecast = Forecast(operator.device, title, bool(title))
    watched, note = forecast.watch(operator, advance or _nothing, work)
    pairs = verified_pairs(
        watched, options.k, options.which, tolerance=options.tolerance, max_hvp=options.max_hvp, seed=options.seed,
        advance=note, state=state, plan=plan,
    )  # fmt: skip
    ds = _pairs(pairs, operator.shape[0])
    halves: tuple[Tensor, ...] = ()
    notes: dict[str, Any] = {"tolerance": options.tolerance, "complete": int(pairs.complete)}
    notes |= {"basis_bytes": work.peak, "n_vectors": plan.n_vectors}
    half_width = np.zeros_like(pairs.value)
    covers = ["residual", "round-off"]
    if is_averaged(operator) and options.data_error != "none":
        forms = DataForms(operator, 0)
        forms.add_leading(pairs.value, [pairs.vector], pairs.scale)
        if influences := forms.leading_influences:
            ds["value_data_se"] = "pair", [one.se for one in influences]
            ds["value_form"] = ("pair", "group"), np.stack([one.form for one in influences])
            ds["group_weight"] = "group", influences[0].weight
            half_width = np.array([one.half_width() for one in influences])
            covers.append(f"choice of examples (first order, {len(influences[0].weight)} groups)")
        else:
            notes["data_error_note"] = forms.reason
            warnings.warn(f"no error for the choice of examples: {forms.reason}", stacklevel=2)
    ds["value_low"], ds["value_high"] = ("pair", pairs.value - pairs.bound - half_width), (
        "pair", pairs.value + pairs.bound + half_width,
    )  # fmt: skip
    notes["interval_covers"] = ", ".join(covers)
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = ()
    if isinstance(operator, CurvatureOperator):
        shapes = tuple(zip(operator.names, map(tuple, operator.parameter_shapes), strict=True))
        directions = options.which == "largest"

        def numbers(part: CurvatureOperator, vector: Tensor) -> xr.Dataset:
            return numbers_of(part, vector, update, directions, directions and options.classes)

        own = numbers(operator, pairs.vector)
        ds = ds.drop_vars("participation").merge(own).assign_attrs(own.attrs)
        if directions:
            parts, noise = gradient_errors(operator, pairs.vector[:, : own.attrs["n_top"]])
            ds = ds.assign(
                gradient_top_se=jackknife_se(parts), gradient_noise=noise, gradient_top_without=("without_group", parts)
            )
        if options.data_error in ("halves", "groups"):
            found = pairs_over_halves(
                operator, pairs, options.which, all_half_samples=options.data_error == "groups", numbers=numbers,
                tolerance=options.tolerance, max_hvp=options.max_hvp, n_products=options.n_products,
                seed=options.seed, advance=advance, state=state, plan=plan,
            )  # fmt: skip
            halves = found.vectors
            if halves:
                ds = ds.assign(found.errors.data_vars)  # that of the gradient with its space
                if len(found.gradient_top):
                    ds["gradient_top_half"] = "half", found.gradient_top
                ds["value_half"] = ("half", "pair"), found.value
                ds["n_hvp"] = ds.n_hvp + found.n_hvp
            else:
                notes["data_error_note"] = found.reason
        notes |= {"hvp_method": operator.method, "n_classes": operator.n_classes}
        ds = ds.assign_coords(tensors=json.dumps(operator.tensors))
    notes["data_error"] = options.data_error if halves else "examples" if "value_data_se" in ds else "none"
    ds = ds.assign_attrs({name: value for name, value in notes.items() if value not in (None, "")})
    return Found(ds, pairs.vector.cpu(), halves, shapes)


def planned_work(
    operator: LinearOperator, options: EigenpairOptions, state: Unfinished | None
) -> tuple[PairsPlan, Work]:
    """How many vectors to search in, and what is planned as far as it is known.

    Raises
    ------
    CurvatureError
        If there is no room for the vectors, or for the class structure.
    PnError
        If the disk cannot hold the unfinished work.
    """
    n, storage = operator.shape[0], storage_of(operator)
    n_halves = 2 * PAIRS_OF_HALVES.get(options.data_error, 0) if isinstance(operator, CurvatureOperator) else 0
    k = min(options.k, n)
    # the pairs over one half are searched while those over all the examples and over the other halves are kept
    beside = n_halves * k
    check_limit(options.max_hvp, k, n)
    plan = plan_pairs(
        operator, k, options.max_hvp, beside=beside, max_memory_bytes=options.max_memory_bytes, state=state
    )
    kept = max(plan.kept + beside, _for_numbers(operator, options, k + beside))
    if state is not None:
        # the basis of a search beside the pairs that were found, which are there twice at the end
        check_room(
            state.folder, storage.vectors_bytes(n, plan.n_vectors + 2 * (k + beside)), "the unfinished work may take",
            "make room, save elsewhere (--output), or look for fewer pairs (-k)",
        )  # fmt: skip
    n_products = options.n_products * (1 + n_halves // 2)  # a product over half of the examples is half a product
    work = Work(
        n, n_products, storage, storage.vectors_bytes(n, kept), storage.vectors_bytes(n, WORKING),
        n_read=n_products * 2 * k, products=f"some {n_products:,} products",
    )  # fmt: skip
    return plan, work


def _for_numbers(operator: LinearOperator, options: EigenpairOptions, n_pairs: int) -> int:
    """Vectors that are kept while it is found out what the pairs say about a network.

    Raises
    ------
    CurvatureError
        If there is no room for them.
    """
    if not isinstance(operator, CurvatureOperator) or options.which != "largest":
        return 0
    n, dtype = operator.shape[0], operator.dtype
    has_classes = options.classes and not class_structure.why_none(operator)
    means = class_structure.vectors_needed(operator.n_classes or 0, n, dtype) if has_classes else 0
    limit = memory_limit(operator, dtype, operator.device, options.max_memory_bytes)
    kept = n_pairs + max(means, GRADIENTS_KEPT)
    need = kept * n * dtype.itemsize
    if need > limit and means <= GRADIENTS_KEPT:
        raise CurvatureError(
            f"pairs and gradients of {n:,} parameters take {human(need)} ({kept} vectors), the bound is "
            f"{human(limit)}: look for fewer pairs (k, -k), or raise max_memory_bytes (--memory)"
        )
    if need > limit:
        raise CurvatureError(
            f"the class structure of {operator.n_classes} classes and {n:,} parameters takes {human(need)}, the bound "
            f"is {human(limit)}: leave it out (classes=False, --no-classes), or raise max_memory_bytes (--memory)"
        )
    return kept


def _nothing(steps: float = 1, text: str = "") -> None:
    """No progress bar."""


def _pairs(pairs: VerifiedPairs, n_parameters: int) -> xr.Dataset:
    columns = {
        "value": pairs.value, "residual": pairs.residual, "value_bound": pairs.bound,
        "converged": pairs.converged.astype(np.int8), "sin_theta": pairs.angles.vector,
        "cluster": pairs.angles.cluster, "space_sin_theta": pairs.angles.space,
        "participation": participation(pairs.vector),
    }  # fmt: skip
    ds = xr.Dataset({name: ("pair", column) for name, column in columns.items()})
    ds = ds.assign(n_parameters=n_parameters, n_hvp=pairs.n_hvp)
    return ds.assign_coords(pair=np.arange(1, len(pairs.value) + 1))
