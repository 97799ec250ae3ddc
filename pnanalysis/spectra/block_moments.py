r"""Traces, Frobenius norms and energies of all blocks of a symmetric matrix from one set of products, with errors.

With the forms :math:`M_l[a, b] = z_a^\top P_l H z_b` of :math:`q` vectors of independent random signs
(:mod:`pnanalysis.spectra.block_products`), for blocks :math:`k, l` and :math:`a \neq b`

.. math:: E\, M_l[a, a] = \mathrm{tr}\, H_{ll}, \qquad E\, M_k[a, b]\, M_l[b, a] = \lVert H_{kl} \rVert_F^2,

since in :math:`\sum_{m, n} (z_{a,k}^\top H_{km} z_{b,m}) (z_{b,l}^\top H_{ln} z_{a,n})` the signs of all other terms are
independent of one another. So :math:`q` products give the energies between all pairs of blocks, as means over
:math:`q (q - 1)` pairs (U-statistics). A fixed matrix :math:`T`, whose traces and energies are known, is taken off as a
control variate: :math:`M_l - N_l` takes the place of :math:`M_l`, and :math:`M_k M_l^\top - N_k N_l^\top` that of
:math:`M_k M_l^\top`, where :math:`N` are the forms of :math:`T`.

The variance of a trace is that of a mean. For energies it is the jackknife's over sign vectors, less what that
overestimates of the part in which pairs are uncorrelated (Efron and Stein: it is never too small on average). The
error for the choice of examples is the infinitesimal jackknife of :mod:`pnanalysis.spectra.data_error` over groups of
examples.

References
----------
M. Hutchinson, Communications in Statistics 19 (1990). W. Hoeffding, Annals of Mathematical Statistics 19 (1948), on
U-statistics. B. Efron, C. Stein, Annals of Statistics 9 (1981).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import t as student_t
from torch import Tensor

from pnanalysis.arrays import Array
from pnanalysis.spectra.block_diagonal import DiagonalSums
from pnanalysis.spectra.block_products import BlockForms, GroupedOperator, Partition, _by_group
from pnanalysis.spectra.data_error import variance_of_forms
from pnanalysis.spectra.linear_operator import LinearOperator

#: Columns of the identity that are multiplied at a time.
_AT_ONCE = 64


@dataclass(frozen=True)
class Moment:
    """Numbers of all blocks with their errors.

    Attributes
    ----------
    value : ndarray, shape (...)
    probe_se : ndarray, shape (...)
        Standard errors for the random vectors; 0 where there are none.
    probe_dof : int
    form, spread : ndarray, shape (group, ...)
        What each group of examples adds to the numbers to first order, and half the difference of two estimates of it;
        see :class:`pnanalysis.spectra.data_error.Influence`.
    share : ndarray, shape (group,)
    deviation : ndarray, shape (q, ...), optional
        Random vectors' contributions to the error: times independent normal numbers, their sum has its covariance.
    """

    value: Array
    probe_se: Array
    probe_dof: int
    form: Array
    spread: Array
    share: Array
    deviation: Array | None = None

    @property
    def data_se(self) -> Array:
        """Standard errors for the choice of examples; NaN without groups."""
        return np.sqrt(variance_of_forms(self.share, self.form, self.spread))

    @property
    def data_dof(self) -> int:
        """Degrees of freedom of these."""
        return int((self.share > 0).sum()) - 1

    @property
    def se(self) -> Array:
        """Of both, as far as they are known."""
        return np.asarray(np.hypot(self.probe_se, np.nan_to_num(self.data_se)))

    @property
    def half_width(self) -> Array:
        """Of the 95 % interval."""
        probes = student_t.ppf(0.975, self.probe_dof) * self.probe_se
        examples = student_t.ppf(0.975, max(self.data_dof, 1)) * np.nan_to_num(self.data_se)
        return np.asarray(np.hypot(probes, examples))

    def root(self) -> Moment:
        """Square roots, to first order; NaN of estimates that are not positive."""
        size = np.sqrt(np.where(self.value > 0, self.value, np.nan))
        form, spread = self.form / (2 * size), self.spread / (2 * size)
        return Moment(size, self.probe_se / (2 * size), self.probe_dof, form, spread, self.share)

    def divided(self, by: Array) -> Moment:
        """Divided by known numbers."""
        deviation = None if self.deviation is None else self.deviation / by
        return Moment(
            self.value / by, self.probe_se / by, self.probe_dof, self.form / by, self.spread / by, self.share, deviation
        )


@dataclass(frozen=True)
class BlockMoments:
    """What is known of all blocks.

    Attributes
    ----------
    partition : Partition
    trace : Moment, (block,)
    energy : Moment, (block, block)
        Squared Frobenius norms of all blocks.
    coupling, coupling_share : Moment, (block,)
        The sum of a block's energies with all others, and its part of all energies of the block.
    network_trace : Moment, ()
    n_hvp, n_probes, n_known : int
    exact : bool
    diagonal : DiagonalSums, optional
    """

    partition: Partition
    trace: Moment
    energy: Moment
    coupling: Moment
    coupling_share: Moment
    network_trace: Moment
    n_hvp: int
    n_probes: int
    n_known: int
    exact: bool
    diagonal: DiagonalSums | None = None


def moments_of(found: BlockForms) -> BlockMoments:
    """Everything that the forms tell.

    Parameters
    ----------
    found : BlockForms
        Of at least four sign vectors.
    """
    trace = trace_of(found)
    return BlockMoments(
        found.partition, trace, *_energies(found), _summed(trace), found.n_hvp, found.n_probes, found.n_known, False,
        found.diagonal,
    )  # fmt: skip


def trace_of(found: BlockForms) -> Moment:
    """Traces of the diagonal blocks."""
    q = found.n_probes
    samples = np.diagonal(found.total - found.known, axis1=1, axis2=2).T  # (q, block)
    mean = samples.mean(0)
    deviation = (samples - mean) / np.sqrt(q * (q - 1))
    own = np.diagonal(found.forms, axis1=2, axis2=3).astype(np.float64) / found.share[:, None, None]
    first, second = own[..., ::2].mean(-1), own[..., 1::2].mean(-1)
    return Moment(
        found.known_trace + mean, np.sqrt(np.square(deviation).sum(0)), q - 1, (first + second) / 2,
        (first - second) / 2, found.share, deviation,
    )  # fmt: skip


def _summed(moment: Moment) -> Moment:
    """The sum over the last axis."""
    deviation = None if moment.deviation is None else moment.deviation.sum(-1)
    probe_se = np.zeros(()) if deviation is None else np.sqrt(np.square(deviation).sum(0))
    return Moment(
        moment.value.sum(-1), np.asarray(probe_se), moment.probe_dof, moment.form.sum(-1), moment.spread.sum(-1),
        moment.share, deviation,
    )  # fmt: skip


def _energies(found: BlockForms) -> tuple[Moment, Moment, Moment]:
    """Squared Frobenius norms of all blocks; sums of those off the diagonal, and their part of the sum of all."""
    total, known, q = found.total, found.known, found.n_probes
    n = len(total)
    value, coupling = np.zeros((n, n)), np.zeros(n)
    probe_se, coupling_se = np.zeros((n, n)), np.zeros(n)
    steps = np.zeros((2, q, n))  # of the jackknife: for energies on the diagonal, and off it
    for k in range(n):
        pairs = total[k] * total.swapaxes(1, 2) - known[k] * known.swapaxes(1, 2)
        value[k], probe_se[k], deviation = _mean_over_pairs(pairs)
        coupling[k], coupling_se[k], steps[1, :, k] = _mean_over_pairs(pairs.sum(0) - pairs[k])
        steps[0, :, k] = deviation[k]
    value += found.known_energy
    coupling += found.known_energy.sum(1) - np.diag(found.known_energy)
    halves = [_energy_forms(found, total, part) for part in (slice(0, None, 2), slice(1, None, 2))]
    form, spread = (halves[0] + halves[1]) / 2, (halves[0] - halves[1]) / 2
    off = 1 - np.eye(n)
    energy = Moment(value, probe_se, q - 1, form, spread, found.share)
    others = Moment(coupling, coupling_se, q - 1, (form * off).sum(-1), (spread * off).sum(-1), found.share)
    return energy, others, _share(energy, others, steps)


def _share(energy: Moment, others: Moment, steps: Array | None = None) -> Moment:
    """The part that energies with other blocks have of all energies of each block, to first order."""
    own, apart = np.diag(energy.value), others.value
    whole = np.where(own + apart > 0, own + apart, np.nan)

    def change(of_own: Array, of_others: Array) -> Array:
        return np.asarray((own * of_others - apart * of_own) / whole**2)

    probe_se = np.zeros(len(own)) if steps is None else np.sqrt(np.square(change(*steps)).sum(0))
    form, spread = (
        change(np.einsum("gkk->gk", one), other)
        for one, other in ((energy.form, others.form), (energy.spread, others.spread))
    )
    return Moment(apart / whole, probe_se, others.probe_dof, form, spread, energy.share)


def _energy_forms(found: BlockForms, total: Array, part: slice) -> Array:
    """Twice ``tr(H_lk H_g,kl)`` for every group, ``(group, block, block)``, from some of the sign vectors."""
    own = found.forms[..., part, part].astype(np.float64) / found.share[:, None, None, None]
    whole = total[:, part, part].swapaxes(1, 2)
    q = whole.shape[-1]
    off = 1 - np.eye(q)
    half = np.einsum("gkab,lab->gkl", own, whole * off, optimize=True) / (q * (q - 1))
    return np.asarray(half + half.swapaxes(1, 2))


def _mean_over_pairs(pairs: Array) -> tuple[Array, Array, Array]:
    """Mean of ``(..., q, q)`` over pairs of different indices, its standard error, and the steps ``(..., q)`` of the
    jackknife, whose squares add up to its variance.
    """
    q = pairs.shape[-1]
    pairs = (pairs + pairs.swapaxes(-1, -2)) / 2
    pairs[..., np.arange(q), np.arange(q)] = 0
    rows = pairs.sum(-1)
    n_pairs = q * (q - 1)
    mean = rows.sum(-1) / n_pairs
    steps = 2 * (rows - rows.mean(-1, keepdims=True)) / (np.sqrt(q * (q - 1)) * (q - 2))
    jackknife = np.square(steps).sum(-1)
    # the variance of a pair is that of two vectors' own parts, and of what is left of pairs; of the mean of the latter,
    # the jackknife tells twice the variance
    of_pair = np.maximum(np.square(pairs).sum((-1, -2)) / n_pairs - mean**2, 0)
    left = np.maximum(of_pair - q * jackknife / 2, 0) / (1 - 2 / q)
    return mean, np.sqrt(np.maximum(jackknife - 2 * left / q**2, jackknife / 2)), steps


def exact_moments(
    operator: LinearOperator | GroupedOperator, partition: Partition, diagonal: bool = False,
    advance: Callable[[float], None] = lambda steps: None,
) -> BlockMoments:  # fmt: skip
    """The same from the matrix itself, at P products; all that is left is the error for the choice of examples.

    Parameters
    ----------
    operator : LinearOperator or GroupedOperator
    partition : Partition
    diagonal : bool
    advance : callable
        Called with the products of each step.
    """
    n = operator.shape[0]
    share = operator.shares if hasattr(operator, "shares") else np.ones(1)
    own, rest = np.zeros((len(share), n, n)), np.zeros((n, n))
    eye = torch.eye(n, dtype=operator.dtype, device=operator.device)
    for columns in torch.split(torch.arange(n), _AT_ONCE):
        some = eye[:, columns]
        for group, product in _by_group(operator, some):
            own[group][:, columns] += _numbers(product)
        if hasattr(operator, "product_without_data"):
            rest[:, columns] = _numbers(operator.product_without_data(some))
        advance(len(columns))
    own = (own + own.swapaxes(1, 2)) / 2
    matrix = own.sum(0) + (rest + rest.T) / 2
    own /= share[:, None, None]
    member = partition.sums(np.eye(n))  # (block, P)
    trace = np.einsum("lp,gpp->gl", member, own, optimize=True)
    energy = 2 * np.einsum("kp,gpr,lr->gkl", member, own * matrix, member, optimize=True)
    off = 1 - np.eye(len(member))
    value = member @ matrix**2 @ member.T
    sums = None
    if diagonal:
        parts = np.einsum("gpp->gp", own)
        sums = DiagonalSums.zeros(n, len(share))
        sums.value, sums.probe_se = np.diag(matrix).copy(), np.zeros(n)
        sums.data_se = np.sqrt(variance_of_forms(share, parts, np.zeros_like(parts)))

    def moment(values: Array, form: Array) -> Moment:
        return Moment(values, np.zeros(values.shape), 1, form, np.zeros_like(form), share)

    whole, energies = moment(member @ np.diag(matrix), trace), moment(value, energy)
    others = moment((value * off).sum(1), (energy * off).sum(-1))
    return BlockMoments(
        partition, whole, energies, others, _share(energies, others), _summed(whole), n, n, 0, True, sums
    )


def _numbers(product: Tensor) -> Array:
    found: Array = product.double().cpu().numpy()
    return found


__all__ = ["BlockMoments", "Moment", "exact_moments", "moments_of", "trace_of"]
