"""Eigenpairs over halves of the examples, and the errors for the choice of examples that they tell.

A pair of complementary halves moves eigenvectors in opposite ways, each as far as another choice of all the examples
would. Half the difference of what two such halves give has therefore the variance of a number over all the examples,
and pairs of balanced half samples give differences that are uncorrelated: see :mod:`pnanalysis.spectra.half_samples`.
This takes no derivatives of eigenvectors, and holds where two eigenvalues change places.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from torch import Tensor

from pnanalysis.arrays import Array
from pnanalysis.curvature.base import CurvatureOperator
from pnanalysis.errors import Indivisible
from pnanalysis.io.unfinished import Unfinished
from pnanalysis.spectra.half_samples import N_PARTS, Contrasts, half_samples
from pnanalysis.spectra.pairs_plan import PairsPlan
from pnanalysis.spectra.subspaces import overlap
from pnanalysis.spectra.verified_pairs import VerifiedPairs, verified_pairs
from pnanalysis.terminal.progress import Advance

#: Numbers with an error by half samples, and the name of that error.
ERRORS = {
    "participation": "participation_data_se", "layer_part": "layer_part_data_se",
    "gradient_part": "gradient_part_data_se", "gradient_top": "gradient_top_se",
    "update_part": "update_part_data_se", "update_top": "update_top_data_se",
    "level_part": "level_part_data_se", "class_part": "class_part_data_se", "cross_part": "cross_part_data_se",
}  # fmt: skip
#: Pairs of halves without which there is no standard error.
FEWEST_REPLICATES = len(half_samples())
#: Pairs of halves by the error that is wanted.
PAIRS_OF_HALVES = {"halves": 1, "groups": FEWEST_REPLICATES}
#: Residuals over half of the examples, whose matrix differs more than that from the whole.
_TOLERANCE = 1e-3


class Halves(NamedTuple):
    """Eigenpairs over halves of the examples, each followed by its complement.

    Attributes
    ----------
    vectors : tuple of Tensor
        ``(P, k)`` each; empty where the examples cannot be divided.
    value : ndarray
        ``(half, k)``.
    errors : xarray.Dataset
        Standard errors of the numbers of the vectors, by the names of :data:`ERRORS`; empty for a single pair.
    n_hvp : int
        Products, of which those over half of the examples count as half.
    gradient_top : ndarray
        ``(half,)``, the part of each half's gradient in its own top space; empty where that is not known.
    reason : str
        Why there are no halves; empty where there are.
    """

    vectors: tuple[Tensor, ...]
    value: Array
    errors: xr.Dataset
    n_hvp: int
    gradient_top: Array
    reason: str = ""


def pairs_over_halves(
    operator: CurvatureOperator,
    pairs: VerifiedPairs,
    which: str,
    *,
    all_half_samples: bool,
    numbers: Callable[[CurvatureOperator, Tensor], xr.Dataset],
    tolerance: float,
    max_hvp: int,
    n_products: int,
    seed: int,
    advance: Advance | None = None,
    state: Unfinished | None = None,
    plan: PairsPlan | None = None,
) -> Halves:
    """The same eigenpairs over halves of the examples, searched from those over all of them.

    Parameters
    ----------
    operator : CurvatureOperator
    pairs : VerifiedPairs
        Over all the examples.
    which : {"largest", "smallest", "magnitude"}
    all_half_samples : bool
        Seven pairs of balanced half samples, which tell errors, or one pair of halves.
    numbers : callable
        What errors are wanted of: a function of an operator and its eigenvectors.
    tolerance, max_hvp, seed, advance, state, plan
        See :func:`pnanalysis.spectra.verified_pairs.verified_pairs`.
    n_products : int
        Roughly how many products each half takes.

    Warns
    -----
    UserWarning
        If pairs over all the examples have converged and some over halves have not.
    """
    n_parts = N_PARTS if all_half_samples else 2
    both = half_samples() if all_half_samples else [([0], [1])]
    found: list[VerifiedPairs] = []
    tables: list[xr.Dataset] = []
    for i, parts in enumerate(part for pair in both for part in pair):
        try:
            products = min(n_products, operator.shape[0])
            half = operator.subset(parts, n_parts, seed=seed, expected_products=products)
        except Indivisible as error:  # a single graph, for example
            return Halves((), np.empty(0), xr.Dataset(), 0, np.empty(0), str(error))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of each half by itself; see below
            one = verified_pairs(
                half, len(pairs.value), which, tolerance=max(tolerance, _TOLERANCE), max_hvp=max_hvp, seed=seed,
                start=pairs.vector, advance=advance, state=state, name=f"half-{i}",
                plan=plan,
            )  # fmt: skip
        found.append(one)
        if all_half_samples:
            tables.append(numbers(half, one.vector))
    _warn_unconverged(pairs, found)
    n_hvp = sum(one.n_hvp for one in found) // 2  # each over half of the examples
    value = np.stack([one.value for one in found])
    tops = np.array([float(table["gradient_top"]) for table in tables if "gradient_top" in table])
    return Halves(tuple(one.vector.cpu() for one in found), value, _errors(tables), n_hvp, tops)


def difference_se(halves_of_a: Array, halves_of_b: Array) -> float:
    """Standard error of the difference of two numbers ``(half,)`` of the same half samples of the same examples."""
    return _contrasts(halves_of_a - halves_of_b).se


def overlap_error(
    V: Tensor, W: Tensor, halves_of_v: tuple[Tensor, ...], halves_of_w: tuple[Tensor, ...], same_examples: bool
) -> float:
    """Standard error of the overlap of two spaces for the choice of examples; NaN without all half samples.

    Parameters
    ----------
    V, W : Tensor
        Over all the examples, ``(P, a)`` and ``(P, b)``.
    halves_of_v, halves_of_w : tuple of Tensor
        Over half samples, each followed by its complement.
    same_examples : bool
        Whether the half samples of both are the same: another choice then moves both spaces together.
    """
    if min(len(halves_of_v), len(halves_of_w)) < 2 * FEWEST_REPLICATES:
        return np.nan
    if same_examples:
        return _contrasts([overlap(a, b) for a, b in zip(halves_of_v, halves_of_w, strict=True)]).se
    of_v = _contrasts([overlap(half, W) for half in halves_of_v])
    of_w = _contrasts([overlap(V, half) for half in halves_of_w])
    return float(np.hypot(of_v.se, of_w.se))


def _contrasts(of_halves: Any) -> Contrasts:
    """Of numbers ``(half, ...)``, each followed by that of its complement."""
    values = np.asarray(of_halves)
    return Contrasts(values[::2] - values[1::2])


def _errors(tables: list[xr.Dataset]) -> xr.Dataset:
    known = [name for name in ERRORS if tables and all(name in table for table in tables)]
    variances = {name: _contrasts([table[name].values for table in tables]).variance for name in known}
    return xr.Dataset({ERRORS[name]: (tables[0][name].dims, np.sqrt(variance)) for name, variance in variances.items()})


def _warn_unconverged(pairs: VerifiedPairs, found: list[VerifiedPairs]) -> None:
    missing = max(int((~one.converged).sum()) for one in found)
    if missing and pairs.converged.all():
        warnings.warn(
            f"{missing} of {len(pairs.value)} eigenpairs over half of the examples have not converged after "
            f"{max(one.n_hvp for one in found)} products; raise max_hvp, or the tolerance",
            stacklevel=4,
        )


__all__ = ["ERRORS", "FEWEST_REPLICATES", "Halves", "difference_se", "overlap_error", "pairs_over_halves"]
