"""Balanced half samples of the examples, and the error that the spectra of complementary halves tell.

The examples are cut at random into eight equal parts. Each row of a Hadamard matrix of order 8, but for the first, says
which four parts make one half; the other four are its complement. For a number that is linear in the examples, half the
difference of the two halves' values has the variance of the number itself, and the seven differences are uncorrelated.
The same probes are used in both halves, so that their noise nearly cancels.

References
----------
P. J. McCarthy, Pseudo-replication: half samples, Review of the International Statistical Institute 37 (1969).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from scipy.linalg import hadamard
from scipy.stats import t as student_t

from pnanalysis.arrays import Array
from pnanalysis.errors import Indivisible
from pnanalysis.kinds import INTERVALS
from pnanalysis.spectra.averaged import AveragedOperator
from pnanalysis.spectra.data_error import DataForms
from pnanalysis.spectra.finished import saved_or_computed
from pnanalysis.spectra.lanczos import Lanczos

#: Parts that the examples are cut into.
N_PARTS = 8
#: Lanczos steps on each of two halves, from the leading Ritz vector.
STEPS_PER_HALF = 4


def half_samples() -> list[tuple[list[int], list[int]]]:
    """The parts of each half and of its complement."""
    return [(np.flatnonzero(row > 0).tolist(), np.flatnonzero(row < 0).tolist()) for row in hadamard(N_PARTS)[1:]]


def sample_examples(
    forms: DataForms, data_error: str, of_half: Callable[..., xr.Dataset], state: Path | None, title: str
) -> xr.Dataset:
    """Everything about the choice of examples that a spectrum is stored with.

    Parameters
    ----------
    forms : DataForms
        That have been fed.
    data_error : {"examples", "groups"}
    of_half : callable
        Spectrum of an operator; takes ``state`` and ``title`` too.
    state : path, optional
        A folder for what is finished.
    title : str
        Label of progress bars.

    Returns
    -------
    xarray.Dataset
        What :meth:`pnanalysis.spectra.data_error.DataForms.dataset`, :func:`half_sample_spectra` and
        :func:`lambda_max_of_halves` give, with the attributes ``data_error`` and ``n_hvp_data``.
    """
    ds, n_hvp = forms.dataset(), 0.0
    found = "none" if forms.reason else "examples"
    if forms.top_vector is not None:
        with suppress(Indivisible):  # the nodes of a single graph, for example
            ds["lambda_max_half"], n_hvp = lambda_max_of_halves(forms.operator, forms.top_vector)
    if data_error == "groups":
        spectra = half_sample_spectra(forms.operator, of_half, state, title)
        ds, found, n_hvp = ds.merge(spectra), "groups", n_hvp + spectra.attrs["n_hvp_data"]
    return ds.assign_attrs(data_error=found, n_hvp_data=n_hvp)


def lambda_max_of_halves(operator: AveragedOperator, start: torch.Tensor) -> tuple[float, float]:
    """Mean largest eigenvalue over two halves of the examples, and the products that it took.

    The largest eigenvalue of a sample is biased upwards, the more so the fewer the examples: if that over half as many
    is much larger, that over all of them is still too large.

    Parameters
    ----------
    operator : AveragedOperator
    start : torch.Tensor
        ``(P,)``, about the eigenvector over all examples, from which a few Lanczos steps are taken.
    """
    n_steps, values = min(STEPS_PER_HALF, len(start)), []
    for part in (0, 1):
        half = operator.subset([part], 2, expected_products=n_steps)
        lanczos = Lanczos(half, start[:, None], n_steps, symmetry_tolerance=np.inf).extend(n_steps)
        values.append(float(lanczos.ritz_pairs()[0][-1]))
        del half, lanczos  # and their vectors, before those of the other half
    return float(np.mean(values)), float(n_steps)


def half_sample_spectra(
    operator: AveragedOperator, of_half: Callable[..., xr.Dataset], state: Path | None, title: str
) -> xr.Dataset:
    """Spectra of all half samples.

    Returns
    -------
    xarray.Dataset
        ``replicate_node`` and ``replicate_weight`` (replicate, half, replicate_quadrature), padded with NaN, and
        ``replicate_value`` (statistic, replicate, half), the numbers with an error.
    """
    pairs: list[list[xr.Dataset]] = []
    for i, pair in enumerate(half_samples(), start=1):
        pairs.append([])
        for parts, end in zip(pair, "ab", strict=True):
            half = operator.subset(parts, N_PARTS)  # the same parts in every spectrum, for differences by replicate
            compute = partial(of_half, half, title=f"{title}, half sample {i}{end} of {N_PARTS - 1}")
            file = None if state is None else state / f"half-{i}{end}.nc"
            pairs[-1].append(compute() if file is None else saved_or_computed(file, half, compute))
    names = [name for name in INTERVALS if name in pairs[0][0]]
    values = [[[float(half[name]) for half in pair] for pair in pairs] for name in names]
    return xr.Dataset(
        {
            "replicate_node": (("replicate", "half", "replicate_quadrature"), _padded(pairs, "node")),
            "replicate_weight": (("replicate", "half", "replicate_quadrature"), _padded(pairs, "weight")),
            "replicate_value": (("statistic", "replicate", "half"), np.array(values)),
        },
        {"statistic": names},
        {"n_hvp_data": sum(half.attrs["n_hvp"] for pair in pairs for half in pair) / 2},
    )


def _padded(pairs: Sequence[Sequence[xr.Dataset]], name: str) -> Array:
    longest = max(half[name].size for pair in pairs for half in pair)
    table = np.full((len(pairs), 2, longest), np.nan)
    for row, pair in zip(table, pairs, strict=True):
        for place, half in zip(row, pair, strict=True):
            place[: half[name].size] = half[name].values
    return table


@dataclass(frozen=True)
class Contrasts:
    """Differences ``(replicate, ...)`` of a number, or of several, between halves and their complements."""

    values: Array

    @property
    def variance(self) -> Array:
        """Of the number over all the examples, ``(...)``."""
        return np.asarray(np.mean(self.values**2, axis=0) / 4)

    @property
    def se(self) -> float:
        """Standard error of a single number for the choice of examples."""
        return float(np.sqrt(self.variance))

    @property
    def dof(self) -> int:
        """Degrees of freedom of the standard error."""
        return len(self.values)

    def minus(self, other: Contrasts) -> Contrasts:
        """Those of the difference of two numbers, of the same half samples."""
        return Contrasts(self.values - other.values)

    def half_width(self) -> float:
        """Of the 95 % interval."""
        return float(student_t.ppf(0.975, self.dof)) * self.se


def has_half_samples(ds: xr.Dataset) -> bool:
    """Whether a ``"spectral_density"`` dataset of one checkpoint holds the spectra of half samples."""
    return "replicate_node" in ds and bool(np.isfinite(ds["replicate_node"].values).any())


def contrasts(ds: xr.Dataset) -> dict[str, Contrasts]:
    """The contrasts of all numbers with an interval, by name; empty without half samples."""
    if not has_half_samples(ds):
        return {}
    values = {str(name): ds["replicate_value"].sel(statistic=name).values for name in ds["statistic"].values}
    return {
        name: Contrasts(halves[:, 0] - halves[:, 1]) for name, halves in values.items() if np.isfinite(halves).all()
    }


def contrasts_of_means(ds: xr.Dataset, f: Callable[[Array], Array]) -> Contrasts:
    """The contrasts of averages over the spectrum.

    Parameters
    ----------
    ds : xarray.Dataset
    f : callable
        Values ``(n, quadrature)`` of ``n`` functions at nodes ``(quadrature,)``.
    """
    means = []
    for nodes, weights in zip(ds["replicate_node"].values, ds["replicate_weight"].values, strict=True):
        keep = np.isfinite(nodes)
        means.append([f(node[k]) @ weight[k] for node, weight, k in zip(nodes, weights, keep, strict=True)])
    return Contrasts(np.array([a - b for a, b in means]))


def distance_between_halves(ds_a: xr.Dataset, ds_b: xr.Dataset, same: bool) -> tuple[float, int]:
    """The mean Wasserstein-1 distance of two estimates of equal spectra that the choice of examples alone causes.

    Parameters
    ----------
    ds_a, ds_b : xarray.Dataset
        With half samples.
    same : bool
        Whether they are of the same examples: what these do to both spectra then cancels.

    Returns
    -------
    distance : float
    dof : int
        Its degrees of freedom.

    Notes
    -----
    The distance is the integral of the absolute difference of two quantile functions, in which an eigenvalue that moves
    gives a difference in proportion (unlike in the cumulative distribution). Half the contrast of a quantile has the
    distribution of its error over all the examples, hence the mean over replicates. Those of different examples are
    combined in all ways, with either sign.
    """
    halves = [_distributions(ds) for ds in (ds_a, ds_b)]
    levels = np.unique(np.concatenate([cumulative for side in halves for pair in side for _, cumulative in pair]))
    centres, widths = (levels[1:] + levels[:-1]) / 2, np.diff(levels)
    a, b = ([_quantiles(half, centres) - _quantiles(other, centres) for half, other in side] for side in halves)
    if same:
        differences = [theirs - ours for ours, theirs in zip(a, b, strict=True)]
    else:
        differences = [theirs + sign * ours for ours in a for theirs in b for sign in (-1, 1)]
    distances = [np.abs(difference) @ widths / 2 for difference in differences]
    return float(np.mean(distances)), len(a) if same else len(a) + len(b)


def _distributions(ds: xr.Dataset) -> list[list[tuple[Array, Array]]]:
    """For each replicate and half the ascending nodes, and the mass up to each."""
    pairs = []
    for nodes, weights in zip(ds["replicate_node"].values, ds["replicate_weight"].values, strict=True):
        orders = [np.argsort(node)[: np.isfinite(node).sum()] for node in nodes]
        pairs.append([(n[o], np.cumsum(w[o])) for n, w, o in zip(nodes, weights, orders, strict=True)])
    return pairs


def _quantiles(distribution: tuple[Array, Array], levels: Array) -> Array:
    node, cumulative = distribution
    values: Array = node[np.searchsorted(cumulative, levels).clip(max=len(node) - 1)]
    return values
