r"""The error that the choice of examples causes, from quadratic forms of the matrices of single examples.

For ``H = sum_g w_g H_g`` over ``n`` groups of examples, a smooth function of ``H`` changes by a sum over groups to
first order: a group that weighs more by ``dw_g`` adds ``dw_g q_g``. The trace has ``q_g = tr H_g``, the Frobenius norm
``tr(H H_g) / |H|``, and an eigenvalue ``u' H_g u`` of its eigenvector. The variance over samples of as many groups is
then, with ``q`` the mean by ``w``,

.. math:: \frac{n}{n - 1} \sum_g w_g^2 (q_g - \bar q)^2

(the infinitesimal jackknife). Traces are estimated by the same probes in every group. What that adds to the variance is
taken off: the probes are cut into two halves, and the product of their two deviations takes the place of the square.

References
----------
L. A. Jaeckel, The infinitesimal jackknife, Bell Laboratories (1972). B. Efron, The Jackknife, the Bootstrap and Other
Resampling Plans (1982), ch. 6. W. G. Cochran, Sampling Techniques (1977), ch. 6, for means with weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from scipy.stats import t as student_t
from torch import Tensor

from pnanalysis.arrays import Array
from pnanalysis.errors import CurvatureError, ProcessLost
from pnanalysis.spectra.averaged import AveragedOperator
from pnanalysis.spectra.inner_products import inner_products
from pnanalysis.spectra.quadrature import SpectralMeasure
from pnanalysis.spectra.sharing import part_of, processes_of

#: What the option ``data_error`` may be: each includes what is before it.
DATA_ERRORS = ("none", "examples", "groups")
#: With fewer groups there is no error.
FEWEST_GROUPS = 8
#: Largest eigenvalues whose forms are kept where the number of classes is not known.
N_LEADING = 3
#: And the most where it is.
MOST_LEADING = 21
#: Probes of the rest of the space: one for so many products, within limits.
PRODUCTS_PER_PROBE, FEWEST_PROBES, MOST_PROBES = 50, 2, 16
#: Numbers whose error by forms is an approximation, see :func:`_effective_influences`.
NEARLY = ("effective_rank", "effective_dimension")
#: Largest deviation of the sum of forms from a Ritz value, relative to the largest magnitude, by the products' dtype.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}


class DataForms:
    """Collects the forms of groups while the vectors of a spectrum are in memory.

    Parameters
    ----------
    operator : AveragedOperator
    n_products : int
        Products of the spectrum. A form costs up to one product, and their number is a tenth of this or so.
    n_classes : int, optional
        Forms are kept for one eigenvalue more than there are classes.

    Attributes
    ----------
    n_leading, n_probes : int
        How many vectors :meth:`add_leading` (without the last one) and :meth:`add_probes` are to be given.
    reason : str
        Why there is no data error; empty if there is one.
    top_vector : torch.Tensor or None
        The Ritz vector ``(P,)`` of the largest Ritz value.
    """

    def __init__(self, operator: AveragedOperator, n_products: int, n_classes: int | None = None) -> None:
        self.operator = operator
        self.n_leading = N_LEADING
        if n_classes is not None and N_LEADING <= n_classes < MOST_LEADING:
            self.n_leading = n_classes + 1
        self.n_probes = int(np.clip(n_products // PRODUCTS_PER_PROBE, FEWEST_PROBES, MOST_PROBES))
        self.reason = ""
        self.top_vector: Tensor | None = None
        self._leading: Array | None = None
        self._squares: Array | None = None
        self._probes: list[Array] = []  # (2, group) for each: the forms of the trace and of the squares
        # ways to compute forms are compared here, while no basis takes memory
        self._attempt(lambda: self.operator.group_weights)

    def add_leading(self, value: Any, vectors: Iterable[Tensor], scale: float | None = None) -> None:
        """Take Ritz values ``(t,)`` and their vectors: the largest ones, descending, and last the smallest.

        The vectors come in blocks ``(P, b)`` of some columns, of which one is held at a time.

        The forms add up to the Ritz values, up to the part of the matrix that no example has: this is checked, to a
        fraction of ``scale``, the largest magnitude of the matrix's eigenvalues; by default that of the values given.
        """
        value = np.asarray(value, dtype=np.float64)
        found, without_data = [], []
        top: Tensor | None = None
        for block in vectors:
            of_block = self._forms(block, block)
            if of_block is None:
                return
            found.append(of_block)
            without_data.append(self._without_data(block))
            top = block[:, 0].clone() if top is None else top
            del block  # before the next one is made
        forms, expected = np.concatenate(found), value - np.concatenate(without_data)
        deviation = np.abs(forms @ self.operator.group_weights - expected).max()
        scale = float(np.abs(value).max()) if scale is None else scale
        adds_up = bool(deviation <= _TOLERANCE[self.operator.dtype] * scale)
        if not processes_of(self.operator).decided(adds_up):
            self.reason = (
                f"the curvatures of single examples add up to eigenvalues that are off by "
                f"{deviation / (scale or 1.0):.1%} of the largest"
            )
            return
        self._leading, self._squares, self.top_vector = forms, value @ forms, top

    @property
    def leading_influences(self) -> list[Influence]:
        """What each group adds to each of the values that :meth:`add_leading` was given; empty without forms."""
        leading, weight = self._leading, self.operator.group_weights
        return [] if leading is None else [Influence(weight, form, np.zeros_like(form)) for form in leading]

    def add_probes(self, probe: Tensor, product: Tensor) -> None:
        """Take probes ``(P, b)`` of the space orthogonal to all leading vectors, and the products with them."""
        if self._leading is None:
            return
        of_trace = self._forms(probe, probe)
        of_squares = self._forms(probe, product)
        if of_trace is not None and of_squares is not None:
            self._probes += list(np.stack([of_trace, of_squares], axis=1))

    def _forms(self, U: Tensor, V: Tensor) -> Array | None:
        """``(k, group)``, or ``None`` from the first failure on."""
        device, dtype = self.operator.device, self.operator.dtype
        forms = self._attempt(lambda: self.operator.forms(U.to(device, dtype), V.to(device, dtype)).numpy())
        if forms is None:
            return None
        if len(self.operator.group_weights) < FEWEST_GROUPS:
            self.reason = f"there are {forms.shape[1]} groups of examples, fewer than {FEWEST_GROUPS}"
        elif not np.isfinite(forms).all():
            self.reason = "the curvature of an example is not finite"
        return None if self.reason else forms

    def _attempt(self, compute: Callable[[], Array]) -> Array | None:
        """What is computed, or ``None`` and a reason from the first failure on."""
        if not self.reason:
            try:
                return compute()
            except ProcessLost:
                raise
            except CurvatureError as error:
                self.reason = str(error)
        return None

    def _without_data(self, vector: Tensor) -> Array:
        """Quadratic forms ``(t,)`` of the part of the matrix that no example has, one after the other."""
        vector = vector.to(self.operator.device, self.operator.dtype)
        add, each = part_of(self.operator).add, torch.split(vector, 1, dim=1)
        forms = [inner_products(one, self.operator.product_without_data(one), add) for one in each]
        return np.asarray(torch.cat(forms).cpu().numpy())

    def dataset(self) -> xr.Dataset:
        """The forms, or an empty dataset and a warning where there are none.

        Returns
        -------
        xarray.Dataset
            ``group_weight``, ``trace_form``, ``square_form`` (group), the latter two with the half difference of the
            two halves of the probes as ``NAME_spread``; ``top_form`` (leading, group); ``lambda_min_form`` (group); and
            the scalar coordinate ``group_digest``.
        """
        leading, squares, probes = self._leading, self._squares, np.array(self._probes)
        if leading is None or squares is None or not len(probes):
            self.reason = self.reason or "the budget is too small for probes"
        if self.reason or leading is None or squares is None:
            warnings.warn(f"no error for the choice of examples: {self.reason}", stacklevel=2)
            return xr.Dataset()
        # one vector alone is the largest and the smallest
        top, smallest = leading[:-1] if len(leading) > 1 else leading, leading[-1]
        first, second = (probes[half::2].mean(0) if len(probes) > 1 else probes[0] for half in (0, 1))
        mean, spread = (first + second) / 2, (first - second) / 2
        return xr.Dataset(
            {
                "group_weight": ("group", self.operator.group_weights),
                "trace_form": ("group", leading.sum(0) + mean[0]),
                "trace_form_spread": ("group", spread[0]),
                "square_form": ("group", squares + mean[1]),
                "square_form_spread": ("group", spread[1]),
                "top_form": (("leading", "group"), top),
                "lambda_min_form": ("group", smallest),
            },
            {"group_digest": self.operator.group_digest},
        )


def weights_of_groups(operator: Any) -> Array:
    """Weights of an operator's groups of examples, ``(group,)``.

    Raises
    ------
    CurvatureError
        If there are too few groups to tell an error by.
    """
    weight: Array = np.asarray(operator.group_weights)
    if len(weight) < FEWEST_GROUPS:
        raise CurvatureError(f"there are {len(weight)} groups of examples, fewer than {FEWEST_GROUPS}")
    return weight


def variance_of_forms(weight: Array, form: Array) -> Array:
    """Variance of numbers over samples of as many groups, ``(...)``; NaN for fewer than :data:`FEWEST_GROUPS`.

    Parameters
    ----------
    weight : ndarray, shape (group,)
    form : ndarray, shape (group, ...)
        What each group adds to the numbers.
    """
    n = int((weight > 0).sum())
    if n < FEWEST_GROUPS:
        return np.full(form.shape[1:], np.nan)
    centred = form - np.tensordot(weight, form, 1) / weight.sum()
    return np.asarray(n / (n - 1) * np.tensordot(weight**2, centred**2, 1))


@dataclass(frozen=True)
class Influence:
    """What each group adds to a number to first order.

    Attributes
    ----------
    weight, form : ndarray
        ``(group,)``.
    spread : ndarray
        ``(group,)``, half the difference of two independent estimates of ``form``, whose mean ``form`` is; 0 where the
        form is exact.
    """

    weight: Array
    form: Array
    spread: Array

    @property
    def variance(self) -> float:
        """Of the number, over samples of as many groups."""
        variance, noise = (float(variance_of_forms(self.weight, values)) for values in (self.form, self.spread))
        # all groups see the same few probes, whose noise is known badly: more than half is never taken for noise
        return float(np.maximum(variance - noise, variance / 2))

    @property
    def se(self) -> float:
        """Standard error of the number for the choice of examples."""
        return float(np.sqrt(self.variance))

    @property
    def dof(self) -> int:
        """Degrees of freedom of the standard error."""
        return int((self.weight > 0).sum()) - 1

    def minus(self, other: Influence) -> Influence:
        """The influence on the difference of two numbers of the same groups."""
        return Influence(self.weight, self.form - other.form, self.spread - other.spread)

    def half_width(self) -> float:
        """Of the 95 % interval."""
        return float(student_t.ppf(0.975, self.dof)) * self.se


def influences(ds: xr.Dataset) -> dict[str, Influence]:
    """The influence of each group on the numbers of a spectrum; empty without forms.

    Parameters
    ----------
    ds : xarray.Dataset
        A ``"spectral_density"`` dataset of one checkpoint.

    Returns
    -------
    dict of str to Influence
        By name, for ``trace``, ``frobenius_norm``, ``lambda_max``, ``lambda_min``, and where they are known
        ``class_ratio``, ``class_gap``, ``class_trace``; and, as an approximation, ``effective_rank`` and
        ``effective_dimension``.
    """
    if "group_weight" not in ds or not np.isfinite(ds["group_weight"].values).any():
        return {}
    return {name: influence for name, influence in _influences(ds) if np.isfinite(influence.form).all()}


def moving_pieces(ds: xr.Dataset) -> list[Influence]:
    """The influence of each group on the leading eigenvalues, and on the sum of all others; empty without forms."""
    found = influences(ds)
    if "trace" not in found:
        return []
    keep = np.isfinite(ds["group_weight"].values)
    return _pieces(found["trace"], ds["top_form"].values[:, keep])


def _pieces(trace: Influence, top: Array) -> list[Influence]:
    """See :func:`moving_pieces`; forms ``(leading, group)`` that are not known count among the rest."""
    top = top[np.isfinite(top).all(axis=1)]
    rest = Influence(trace.weight, trace.form - top.sum(0), trace.spread)
    return [*(Influence(trace.weight, form, np.zeros_like(form)) for form in top), rest]


def _influences(ds: xr.Dataset) -> Iterator[tuple[str, Influence]]:
    keep = np.isfinite(ds["group_weight"].values)

    def of(name: str) -> Array:
        return np.asarray(ds[name].values[..., keep])

    weight, zero = of("group_weight"), np.zeros(keep.sum())
    trace = Influence(weight, of("trace_form"), of("trace_form_spread"))
    square = Influence(weight, of("square_form"), of("square_form_spread"))
    top = of("top_form")
    norm = float(ds["frobenius_norm"])
    yield "trace", trace
    yield "lambda_max", Influence(weight, top[0], zero)
    yield "lambda_min", Influence(weight, of("lambda_min_form"), zero)
    if norm > 0:
        yield "frobenius_norm", Influence(weight, square.form / norm, square.spread / norm)
    yield from _effective_influences(ds, trace, square, top)
    yield from _class_influences(ds, trace, top)


def _effective_influences(
    ds: xr.Dataset, trace: Influence, square: Influence, top: Array
) -> Iterator[tuple[str, Influence]]:
    """For the effective rank and dimension, which are no forms: nearly.

    The rank is taken as if the sum of absolute eigenvalues were the trace, as it is in positive semidefinite matrices;
    the dimension as if all eigenvalues but the leading ones grew or shrank together, by as much as these do.
    """
    measure = SpectralMeasure.from_dataset(ds)
    size, weight = np.abs(measure.node), measure.n_parameters * measure.weight
    absolute, squared = float(weight @ size), float(ds["frobenius_norm"]) ** 2
    if not (squared > 0 and float(ds["trace"]) > 0):
        return
    by_trace, by_square = (2 * float(ds["effective_rank"]) / total for total in (absolute, squared))
    form, spread = (
        by_trace * of_trace - by_square * of_square
        for of_trace, of_square in ((trace.form, square.form), (trace.spread, square.spread))
    )
    yield "effective_rank", Influence(trace.weight, form, spread)
    *pieces, rest = _pieces(trace, top)
    ridge, leading = float(ds.attrs.get("ridge", 1.0)), np.array([max(p.weight @ p.form, 0.0) for p in pieces])
    slope = ridge / (leading + ridge) ** 2
    positive = np.maximum(measure.node, 0)
    # what the effective dimension gains where the rest grows by a unit, relative
    gain = max(float(weight @ (ridge * positive / (positive + ridge) ** 2)) - float(slope @ leading), 0.0)
    relative = [piece.se / size for piece, size in zip(pieces, leading, strict=True) if size]
    scale = gain * float(np.sqrt(np.mean(np.square(relative)))) / rest.se if relative and rest.se > 0 else 0.0
    form = sum((s * piece.form for s, piece in zip(slope, pieces, strict=True)), scale * rest.form)
    yield "effective_dimension", Influence(trace.weight, form, scale * rest.spread)


def _class_influences(ds: xr.Dataset, trace: Influence, top: Array) -> Iterator[tuple[str, Influence]]:
    """For the numbers of spectra of classifiers, of ``n_classes`` outputs."""
    n_classes = ds.attrs.get("n_classes", np.nan)
    if not np.isfinite(n_classes):
        return
    n, zero = int(n_classes), np.zeros(len(trace.weight))
    for name, other in (("class_ratio", n - 1), ("class_gap", n)):
        ratio, largest = float(ds.get(name, np.nan)), float(ds["lambda_max"])
        if 0 < other < len(top) and np.isfinite(ratio) and largest > 0:
            yield name, Influence(trace.weight, ratio / largest * (top[0] - ratio * top[other]), zero)
    if "class_trace" in ds and n <= len(top) and float(ds["trace"]) != 0:
        share, whole = float(ds["class_trace"]), float(ds["trace"])
        form = (top[:n].sum(0) - share * trace.form) / whole
        yield "class_trace", Influence(trace.weight, form, -share * trace.spread / whole)
