"""Eigenpairs of one matrix as a dataset, with what they say about the network, its gradient and its classes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pnanalysis.arrays import Array
from pnanalysis.checks import at_least, check_seed, one_of, positive, resolve_dtype
from pnanalysis.curvature import class_structure
from pnanalysis.curvature.base import METHODS, CurvatureOperator
from pnanalysis.curvature.batch_weights import Weight
from pnanalysis.errors import CurvatureError, Indivisible
from pnanalysis.io.unfinished import Unfinished
from pnanalysis.spectra.averaged import is_averaged
from pnanalysis.spectra.data_error import FEWEST_GROUPS, DataForms
from pnanalysis.spectra.forecast import Forecast, Work
from pnanalysis.spectra.inner_products import coordinates, norms
from pnanalysis.spectra.lanczos import basis_dtype
from pnanalysis.spectra.linear_operator import LinearOperator
from pnanalysis.spectra.memory import Storage
from pnanalysis.spectra.restarted import WHICH
from pnanalysis.spectra.subspaces import chance_overlap, overlap, participation, squared_cosines
from pnanalysis.spectra.verified_pairs import VerifiedPairs, vectors_needed, verified_pairs
from pnanalysis.terminal.progress import Advance

#: Which error for the choice of examples: of the eigenvalues, or of the spaces too.
DATA_ERRORS = ("none", "examples", "halves")
#: Groups of examples whose gradients are compared.
_GROUPS = FEWEST_GROUPS
#: To expect.
_PRODUCTS_PER_PAIR = 12
#: Residuals over half of the examples, whose matrix differs more than that from the whole.
_HALF_TOLERANCE = 1e-3


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

    def __post_init__(self) -> None:
        at_least(1, k=self.k, max_hvp=self.max_hvp, draws=self.draws)
        one_of(WHICH, which=self.which)
        one_of(("hessian", "ggn", "fisher"), operator=self.operator)
        one_of(METHODS, method=self.method)
        one_of(DATA_ERRORS, data_error=self.data_error)
        positive(tolerance=self.tolerance)
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
        The vectors over two halves of the examples; empty where there are none.
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
    forecast = Forecast(operator.device, title, bool(title))
    watched, note = forecast.watch(operator, advance or _nothing, _work(operator, options))
    pairs = verified_pairs(
        watched, options.k, options.which, tolerance=options.tolerance, max_hvp=options.max_hvp, seed=options.seed,
        advance=note, state=state,
    )  # fmt: skip
    ds = _pairs(pairs, operator.shape[0])
    halves: tuple[Tensor, ...] = ()
    notes: dict[str, Any] = {"tolerance": options.tolerance, "complete": int(pairs.complete)}
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
        ds = ds.merge(_by_layer(operator, pairs.vector))
        if options.data_error == "halves":
            halves, values, n_hvp = _half_pairs(operator, pairs, options, advance, state)
            if halves:
                ds["value_half"] = ("half", "pair"), values
                ds["n_hvp"] = ds.n_hvp + n_hvp
        if options.which == "largest":
            ds = _with_directions(ds, operator, pairs, update)
            if options.classes:
                ds, notes["class_note"] = _with_classes(ds, operator, pairs.vector)
        notes |= {"hvp_method": operator.method, "n_classes": operator.n_classes}
        ds = ds.assign_coords(tensors=json.dumps(operator.tensors))
    notes["data_error"] = "none" if "value_data_se" not in ds else "halves" if halves else "examples"
    ds = ds.assign_attrs({name: value for name, value in notes.items() if value not in (None, "")})
    return Found(ds, pairs.vector.cpu(), tuple(half.cpu() for half in halves), shapes)


def _work(operator: LinearOperator, options: EigenpairOptions) -> Work:
    """What is planned, as far as it is known."""
    n, halves = operator.shape[0], isinstance(operator, CurvatureOperator) and options.data_error == "halves"
    storage = Storage(basis_dtype(operator), operator.device)
    k, n_products = min(options.k, n), options.n_products * (2 if halves else 1)
    # those over a half of the examples come with the pairs over all of them, and those over the other half
    kept = vectors_needed(n, k, options.max_hvp) + (2 * k if halves else 0)
    if isinstance(operator, CurvatureOperator) and options.which == "largest" and options.classes:
        means = class_structure.vectors_needed(operator.n_classes or 0, n, operator.dtype)
        kept = max(kept, means + (3 * k if halves else k))
    return Work(
        n, n_products, storage, storage.vectors_bytes(n, kept), 0, n_read=n_products * 2 * k,
        products=f"some {n_products:,} products",
    )  # fmt: skip


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


def _by_layer(operator: CurvatureOperator, V: Tensor) -> xr.Dataset:
    """The part of each vector, and of the parameters, in each layer."""
    layers = list(dict.fromkeys(layer for _, layer, _ in operator.tensors))
    part, size = np.zeros((V.shape[1], len(layers))), np.zeros(len(layers))
    begin = 0
    for _, layer, n in operator.tensors:
        at = layers.index(layer)
        part[:, at] += norms(V[begin : begin + n]).square().cpu().numpy()
        size[at] += n
        begin += n
    total = part.sum(1, keepdims=True)
    return xr.Dataset(
        {"layer_part": (("pair", "layer"), part / total), "layer_share": ("layer", size / size.sum())},
        {"layer": layers},
    )


def _half_pairs(
    operator: CurvatureOperator,
    pairs: VerifiedPairs,
    options: EigenpairOptions,
    advance: Advance | None,
    state: Unfinished | None,
) -> tuple[tuple[Tensor, ...], Array, int]:
    """Vectors and values over each of two halves of the examples, and the products that they took."""
    found = []
    for part in (0, 1):
        try:
            products = min(options.n_products, operator.shape[0])
            half = operator.subset([part], 2, seed=options.seed, expected_products=products)
        except Indivisible:  # a single graph, for example
            return (), np.empty(0), 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of each half by itself; see below
            one = verified_pairs(
                half, len(pairs.value), options.which, tolerance=max(options.tolerance, _HALF_TOLERANCE),
                max_hvp=options.max_hvp, seed=options.seed, start=pairs.vector, advance=advance, state=state,
                name=f"half-{part}",
            )  # fmt: skip
        found.append(one)
    missing = max(int((~one.converged).sum()) for one in found)
    if missing and pairs.converged.all():
        warnings.warn(
            f"{missing} of {len(pairs.value)} eigenpairs over half of the examples have not converged after "
            f"{max(one.n_hvp for one in found)} products; raise max_hvp, or the tolerance",
            stacklevel=2,
        )
    n_hvp = sum(one.n_hvp for one in found) // 2  # each over half of the examples
    return tuple(one.vector for one in found), np.stack([one.value for one in found]), n_hvp


def _with_directions(
    ds: xr.Dataset, operator: CurvatureOperator, pairs: VerifiedPairs, update: Tensor | None
) -> xr.Dataset:
    """The parts of the gradient and of the last update along the vectors, and in the space of as many as classes."""
    V, n_classes = pairs.vector, operator.n_classes
    n_top = V.shape[1] if n_classes is None else min(n_classes, V.shape[1])
    gradient = operator.gradient()
    along = squared_cosines(V, gradient)
    ds = ds.assign(
        gradient_part=("pair", along), gradient_top=along[:n_top].sum(), top_chance=n_top / operator.shape[0],
        gradient_norm=float(norms(gradient[:, None])),
    ).assign_attrs(n_top=n_top)  # fmt: skip
    ds["gradient_top_se"], ds["gradient_noise"] = (((), value) for value in _gradient_errors(operator, V[:, :n_top]))
    if update is not None:
        along = squared_cosines(V, update)
        ds = ds.assign(
            update_part=("pair", along), update_top=along[:n_top].sum(), update_norm=float(norms(update[:, None]))
        )
    return ds


def _gradient_errors(operator: CurvatureOperator, V: Tensor) -> tuple[float, float]:
    """Standard error of the part of the gradient in a space, and the norm of the gradient's own error.

    Both are for the choice of examples, by leaving out one of eight groups of them at a time; the space stays.
    """
    try:
        parts = [operator.subset([i], _GROUPS, expected_products=1).gradient() for i in range(_GROUPS)]
    except Indivisible:
        return np.nan, np.nan
    each = torch.stack(parts, dim=1)
    gram = coordinates(each, each).cpu().double().numpy()
    inner = coordinates(V.to(each), each).cpu().double().numpy()
    others = (1 - np.eye(_GROUPS)) / (_GROUPS - 1)
    inside = np.square(inner @ others).sum(0)
    whole = np.einsum("ai,ab,bi->i", others, gram, others)
    part = np.divide(inside, whole, out=np.full(_GROUPS, np.nan), where=whole > 0)
    scatter = max(float(np.trace(gram) - gram.sum() / _GROUPS), 0.0)
    return (
        float(np.sqrt((_GROUPS - 1) * part.var())),
        float(np.sqrt(scatter / (_GROUPS * (_GROUPS - 1)))),
    )  # fmt: skip


def _with_classes(ds: xr.Dataset, operator: CurvatureOperator, V: Tensor) -> tuple[xr.Dataset, str]:
    """The class structure, and why there is none where that is so."""
    try:
        found = class_structure.class_structure(operator, V)
    except CurvatureError as error:
        return ds, str(error)
    whole = found.level_form.sum(0)
    n = operator.shape[0]
    part = np.divide(found.level_form, whole, out=np.zeros(found.level_form.shape), where=whole > 0)
    ds = ds.assign(
        level_part=(("level", "pair"), part),
        ggn_value=("pair", whole), class_part=("pair", found.class_part), cross_part=("pair", found.cross_part),
        class_value=("class", found.class_value), class_chance=found.class_rank / n,
    )  # fmt: skip
    if len(found.cross_value):
        ds = ds.assign(cross_value=("class_pair", found.cross_value), cross_chance=found.cross_rank / n)
    return ds.assign_coords(level=list(class_structure.LEVELS)), ""


def overlaps(found: Sequence[Found], labels: Sequence[str]) -> dict[str, Any]:
    """Overlaps of the spaces of several networks with one another, with what chance and other examples give.

    Parameters
    ----------
    found : sequence of Found
    labels : sequence of str
        What the networks are called in messages.

    Returns
    -------
    dict
        Variables as (dims, values), dims ``checkpoint`` and ``other``; NaN between networks whose parameters have
        other names, shapes or another order, for then entries of their vectors are those of different parameters.
        ``overlap_halves`` is between spaces over different halves of the examples, and on its diagonal that of a
        network with itself: what two spaces of one matrix have in common where their examples differ.
    """
    n, apart = len(found), ""
    table = {name: np.full((n, n), np.nan) for name in ("overlap", "overlap_chance", "overlap_chance_sd")}
    halves = {name: np.full((n, n), np.nan) for name in ("overlap_halves", "overlap_halves_spread")}
    for i, a in enumerate(found):
        for j, b in enumerate(found[: i + 1]):
            if a.shapes != b.shapes or len(a.vector) != len(b.vector):
                apart = apart or f"{labels[j]} and {labels[i]} ({_first_difference(b, a)})"
                continue
            here = [i, j], [j, i]
            table["overlap"][here] = overlap(a.vector, b.vector)
            sizes = len(a.vector), a.vector.shape[1], b.vector.shape[1]
            table["overlap_chance"][here], table["overlap_chance_sd"][here] = chance_overlap(*sizes)
            if a.halves and b.halves:
                ways = overlap(a.halves[0], b.halves[1]), overlap(a.halves[1], b.halves[0])
                halves["overlap_halves"][here] = np.mean(ways)
                halves["overlap_halves_spread"][here] = np.nan if i == j else abs(ways[0] - ways[1]) / 2
    if apart:
        warnings.warn(f"eigenvectors of different parameters have no overlap: {apart}", stacklevel=2)
    if any(one.halves for one in found):
        table |= halves
    return {name: (("checkpoint", "other"), values) for name, values in table.items()}


def _first_difference(a: Found, b: Found) -> str:
    """Where the parameters of two networks differ, in words."""
    for one, other in zip_longest(a.shapes, b.shapes):
        if one != other:
            return f"{_named(one)} and {_named(other)}"
    return f"{len(a.vector):,} and {len(b.vector):,} parameters"


def _named(entry: tuple[str, tuple[int, ...]] | None) -> str:
    return "nothing" if entry is None else f"{entry[0]} of shape {entry[1]}"
