r"""Traces, Frobenius norms and energies of all blocks of a symmetric matrix from one set of products, with errors.

With the forms :math:`M_l[a, b] = z_a^\top P_l H z_b` of :math:`q` vectors of independent random signs
(:mod:`pnanalysis.spectra.block_products`), for blocks :math:`k, l` and :math:`a \neq b`

.. math:: E\, M_l[a, a] = \mathrm{tr}\, H_{ll}, \qquad E\, M_k[a, b]\, M_l[b, a] = \lVert H_{kl} \rVert_F^2,

since in :math:`\sum_{m, n} (z_{a,k}^\top H_{km} z_{b,m}) (z_{b,l}^\top H_{ln} z_{a,n})` all other terms have signs that
are independent of one another. So :math:`q` products give the energies between all pairs of blocks, as means over
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
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pnanalysis.arrays import Array
from pnanalysis.spectra.block_diagonal import DiagonalSums
from pnanalysis.spectra.block_energies import diagonal as diagonal_of
from pnanalysis.spectra.block_energies import energies_of, share_of_others, slopes_of_share
from pnanalysis.spectra.block_products import BlockForms, GroupedOperator, Partition, by_group
from pnanalysis.spectra.data_error import variance_of_forms
from pnanalysis.spectra.linear_operator import LinearOperator
from pnanalysis.spectra.two_errors import Moment, group_factors

#: Columns of the identity that are multiplied at a time.
_AT_ONCE = 64


@dataclass(frozen=True)
class BlockMoments:
    """What is known of all blocks.

    Attributes
    ----------
    partition : Partition
    trace : Moment, (block,)
    energy : Moment, (block, block)
        Squared Frobenius norms of all blocks.
    own_energy : Moment, (block,)
        Those of the diagonal blocks.
    coupling, coupling_share : Moment, (block,)
        The sum of a block's energies with all others, and its part of all energies of the block.
    network_share : Moment, ()
        The part that energies between different blocks have of that of the whole matrix.
    concentration : Moment, ()
        :func:`concentration` of the traces in few blocks.
    network_trace : Moment, ()
    n_hvp, n_probes, n_known : int
    exact : bool
    diagonal : DiagonalSums, optional
    """

    partition: Partition
    trace: Moment
    energy: Moment
    own_energy: Moment
    coupling: Moment
    coupling_share: Moment
    network_share: Moment
    concentration: Moment
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
    n_blocks = len(found.partition.names)
    everything = Partition(("all",), (0,), (sum(found.partition.length),))
    whole = trace_of(found.merged(everything, np.ones((1, n_blocks))))
    energies, trace = energies_of(found), trace_of(found)
    value, slopes = concentration(trace.value)
    spread = trace_of(found, slopes[None])
    return BlockMoments(
        found.partition, trace, *energies[:4], _only(energies.network_share),
        _only(replace(spread, value=np.array([value]))), _only(whole), found.n_hvp, found.n_probes, found.n_known,
        False, found.diagonal,
    )  # fmt: skip


def concentration(trace: Array) -> tuple[float, Array]:
    r"""How far the traces of blocks are those of a few, :math:`\sum_k t_k^2 / (\sum_k \lvert t_k \rvert)^2`.

    Returns
    -------
    (float, ndarray)
        From 1 over the number of blocks, where all have the same, to 1, where a single block has all; NaN where all
        are zero. And how it changes with each of them.
    """
    size = float(np.abs(trace).sum())
    if not size > 0:
        return np.nan, np.full(trace.shape, np.nan)
    value = float(np.square(trace).sum() / size**2)
    return value, np.asarray(2 * (trace / size - value * np.sign(trace)) / size)


def trace_of(found: BlockForms, member: Array | None = None) -> Moment:
    """Traces of the diagonal blocks, or sums of them with the weights ``member`` (sum, block)."""
    q = found.n_probes
    samples = np.diagonal(found.total - found.known, axis1=1, axis2=2).T  # (q, block)
    own = np.diagonal(found.forms, axis1=2, axis2=3).astype(np.float64) / found.share[:, None, None]
    known = found.known_trace
    if member is not None:
        samples, own, known = samples @ member.T, member @ own, member @ known
    mean = samples.mean(0)
    deviation = (samples - mean) / np.sqrt(q * (q - 1))
    centred = own - np.tensordot(found.share, own, 1) / found.share.sum()  # what all groups have in common cancels
    noise = np.tensordot(group_factors(found.share), centred.var(-1, ddof=1) / q, 1)
    return Moment(
        known + mean, np.sqrt(np.square(deviation).sum(0)), q - 1, own.mean(-1), noise, found.share,
        deviation,
    )  # fmt: skip


def _only(moment: Moment) -> Moment:
    """The number of a single block."""
    deviation = None if moment.deviation is None else moment.deviation[:, 0]
    return Moment(
        moment.value[0],
        moment.probe_se[0],
        moment.probe_dof,
        moment.form[:, 0],
        moment.noise[0],
        moment.share,
        deviation,
    )


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
    for begin in range(0, n, _AT_ONCE):
        columns = slice(begin, min(begin + _AT_ONCE, n))
        some = eye[:, columns]
        for group, product in by_group(operator, some):
            own[group][:, columns] += _numbers(product)
        if hasattr(operator, "product_without_data"):
            rest[:, columns] = _numbers(operator.product_without_data(some))
        advance(some.shape[1])
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
        sums.data_se = np.sqrt(variance_of_forms(share, parts))

    def moment(values: Array, form: Array) -> Moment:
        return Moment(values, np.zeros(values.shape), 1, form, np.zeros(values.shape), share)

    apart = (energy * off).sum(-1)
    coupling = (value * off).sum(1)
    by_own, by_others = slopes_of_share(np.diag(value), coupling)
    part = by_own * np.einsum("gkk->gk", energy) + by_others * apart
    inside, between = np.trace(value), coupling.sum()
    by_inside, by_between = slopes_of_share(inside, between)
    whole = by_inside * np.einsum("gkk->g", energy) + by_between * apart.sum(1)
    traces = member @ np.diag(matrix)
    concentrated, slopes = concentration(traces)
    energies = moment(value, energy)
    return BlockMoments(
        partition, moment(traces, trace), energies, diagonal_of(energies), moment(coupling, apart),
        moment(share_of_others(np.diag(value), coupling), part), moment(share_of_others(inside, between), whole),
        moment(np.asarray(concentrated), trace @ slopes), moment(np.trace(matrix), trace.sum(1)), n, n, 0, True, sums,
    )  # fmt: skip


def _numbers(product: Tensor) -> Array:
    found: Array = product.double().cpu().numpy()
    return found


__all__ = ["BlockMoments", "Moment", "concentration", "exact_moments", "moments_of", "trace_of"]
