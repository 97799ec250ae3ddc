r"""Energies of all blocks of a symmetric matrix as means over pairs of random vectors, with their errors.

See :mod:`pnanalysis.spectra.block_moments`. What a group :math:`g` of examples adds to :math:`\lVert H_{kl} \rVert_F^2`
is :math:`2\, \mathrm{tr}(H_{lk} H_{g,kl})`, which is estimated in the same way, from forms of the group and of the
whole.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from pnanalysis.arrays import Array
from pnanalysis.spectra.block_products import BlockForms
from pnanalysis.spectra.two_errors import Moment, group_factors

#: Part of the jackknife's variance that is taken for that of the influences of groups; between a half and one.
_JACKKNIFE = 0.75
#: Forms of a block that are no larger, relative to the largest of all blocks, are round-off: they are kept in float32.
_ROUND_OFF = 8 * float(np.finfo(np.float32).eps)


class Energies(NamedTuple):
    """Of all blocks; those off the diagonal summed for each block, and their part of all energies of the block.

    ``own`` are the energies of the diagonal blocks, with what each sign vector adds to their errors; ``network_share``,
    of shape ``(1,)``, is the part of those off the diagonal of the energy of the whole matrix.
    """

    energy: Moment
    own: Moment
    coupling: Moment
    share: Moment
    network_share: Moment


def energies_of(found: BlockForms) -> Energies:
    """Squared Frobenius norms of all blocks, and how they are coupled."""
    total, known, q = found.total, found.known, found.n_probes
    n, groups = len(total), len(found.share)
    energy, apart, part = (_Columns.zeros(shape, groups) for shape in ((n, n), (n,), (n,)))
    influences = _Influences(found, total)
    size = np.abs(total).max((1, 2))
    is_flat = size <= _ROUND_OFF * size.max()  # the matrix has no such rows, and the share would be one of noise
    whole, deviation = _Columns.zeros((1,), groups), np.zeros((q, n))
    in_all = [[np.zeros((q, q)), np.zeros((q, groups))] for _ in ("own", "others")]  # pairs and steps of all blocks
    for k in range(n):
        pairs = total[k] * total.swapaxes(1, 2) - known[k] * known.swapaxes(1, 2)
        steps = influences.of(k)  # (q, group, block)
        own_parts, all_parts = (pairs[k], steps[..., k]), (pairs.sum(0), steps.sum(-1))
        for i in (0, 1):
            in_all[0][i] += own_parts[i]
            in_all[1][i] += all_parts[i] - own_parts[i]
        deviation[:, k] = deviations(pairs[k])
        energy.fill(k, pairs, steps, found.share, found.known_energy[k])
        off_known = found.known_energy[k].sum() - found.known_energy[k, k]
        apart.fill(k, all_parts[0] - own_parts[0], all_parts[1] - own_parts[1], found.share, off_known)
        own, others = (np.nan, np.nan) if is_flat[k] else (energy.value[k, k], apart.value[k])
        by_own, by_others = slopes_of_share(own, others)
        linear = [by_others * (every - mine) + by_own * mine for every, mine in zip(all_parts, own_parts, strict=True)]
        part.fill(k, linear[0], linear[1], found.share, 0.0)
        part.value[k] = share_of_others(own, others)
    own, others = np.trace(energy.value), apart.value.sum()
    by_own, by_others = slopes_of_share(own, others)
    linear = [by_own * mine + by_others * rest for mine, rest in zip(*in_all, strict=True)]
    whole.fill(0, linear[0], linear[1], found.share, 0.0)
    whole.value[0] = share_of_others(own, others)
    every, *others = (columns.moment(q - 1, found.share) for columns in (energy, apart, part, whole))
    return Energies(every, replace(diagonal(every), deviation=deviation), *others)


def diagonal(energy: Moment) -> Moment:
    """The energies of diagonal blocks among those of all blocks."""
    return Moment(
        np.diag(energy.value), np.diag(energy.probe_se), energy.probe_dof, np.einsum("gkk->gk", energy.form),
        np.diag(energy.noise), energy.share,
    )  # fmt: skip


def share_of_others(own: Array | float, others: Array | float) -> Array:
    """``others / (own + others)``; NaN where their sum is not positive."""
    return np.asarray(others / _positive(own + others))


def slopes_of_share(own: Array | float, others: Array | float) -> tuple[Array, Array]:
    """How :func:`share_of_others` changes with the two; NaN where it is."""
    whole = _positive(own + others)
    return np.asarray(-others / whole**2), np.asarray(own / whole**2)


def _positive(energy: Array | float) -> Array:
    return np.where(np.asarray(energy) > 0, energy, np.nan)


class _Columns(NamedTuple):
    """Values, errors and influences of several numbers, filled in one after the other."""

    value: Array
    probe_se: Array
    form: Array
    noise: Array

    @classmethod
    def zeros(cls, shape: tuple[int, ...], groups: int) -> _Columns:
        value, probe_se, noise = (np.zeros(shape) for _ in range(3))
        return cls(value, probe_se, np.zeros((groups, *shape)), noise)

    def fill(self, k: int, pairs: Array, steps: Array, share: Array, known: Array | float) -> None:
        """Take pairs ``(..., q, q)``, and each sign vector's part of the influences, ``(q, group, ...)``."""
        self.value[k], self.probe_se[k] = mean_over_pairs(pairs)
        self.value[k] += known
        q = len(steps)
        self.form[:, k] = steps.sum(0) / (q * (q - 1))
        centred = steps - np.einsum("g,ag...->a...", share, steps)[:, None] / share.sum()
        # the jackknife's, of which the part that comes from pairs counts twice; how much that is, is not known
        scatter = 4 * np.square(centred - centred.mean(0)).sum(0) / (q * (q - 1) * (q - 2) ** 2)
        self.noise[k] = _JACKKNIFE * np.tensordot(group_factors(share), scatter, 1)

    def moment(self, dof: int, share: Array) -> Moment:
        return Moment(self.value, self.probe_se, dof, self.form, self.noise, share)


class _Influences:
    """What groups add to energies, by sign vectors."""

    def __init__(self, found: BlockForms, total: Array) -> None:
        self.share = found.share.astype(np.float32)
        q = found.n_probes
        self.total = total.astype(np.float32)
        self.total[:, np.arange(q), np.arange(q)] = 0
        # rows a of matrices over b: products with these are those of BLAS
        self.columns = np.ascontiguousarray(found.forms.transpose(3, 0, 1, 2))
        self.rows = np.ascontiguousarray(found.forms.transpose(2, 0, 1, 3))

    def of(self, k: int) -> Array:
        """Sums over pairs with sign vector ``a`` of the energies of block ``k``, ``(a, group, block)``."""
        q, groups, n, _ = self.rows.shape
        found = self.rows[:, :, k] @ self.total.transpose(2, 1, 0)
        found += self.columns[:, :, k] @ self.total.transpose(1, 2, 0)
        own = self.total[k]
        for table, vectors in ((self.columns, own), (self.rows, own.T)):
            found += (table.reshape(q, groups * n, q) @ vectors[:, :, None]).reshape(q, groups, n)
        return np.asarray(found / (2 * self.share[:, None]), dtype=np.float64)


def mean_over_pairs(pairs: Array) -> tuple[Array, Array]:
    """Mean of ``(..., q, q)`` over pairs of different indices, and its standard error."""
    q = pairs.shape[-1]
    pairs = (pairs + pairs.swapaxes(-1, -2)) / 2
    pairs[..., np.arange(q), np.arange(q)] = 0
    rows = pairs.sum(-1)
    n_pairs = q * (q - 1)
    mean = rows.sum(-1) / n_pairs
    jackknife = 4 * np.square(rows - rows.mean(-1, keepdims=True)).sum(-1) / (q * (q - 1) * (q - 2) ** 2)
    # A pair is a sum of what each of its vectors adds and of what is left. Of the latter the jackknife tells more than
    # twice the variance; how much it is follows from the variance of pairs.
    of_pair = np.square(pairs).sum((-1, -2)) / n_pairs - mean**2 + jackknife
    excess = 4 / (q * (q - 2)) - 2 / (q * (q - 1))
    left = np.maximum(of_pair - q * jackknife / 2, 0) / (1 - 2 / (q - 2) + excess)
    least = (q - 2) / (2 * (q - 1)) * jackknife
    return mean, np.sqrt(np.maximum(jackknife - excess * left, least))


def deviations(pairs: Array) -> Array:
    """What each vector adds to the error of the mean of ``(q, q)`` over pairs, ``(q,)``: the jackknife's.

    The sum of their squares is the jackknife's variance; that of the squares of differences, for two matrices, is that
    of the difference of their means. Both are never too small on average (Efron and Stein).
    """
    q = len(pairs)
    pairs = (pairs + pairs.T) / 2
    rows = pairs.sum(1) - np.diag(pairs)
    return np.asarray(2 * (rows - rows.mean()) / (np.sqrt(q * (q - 1)) * (q - 2)))


__all__ = ["Energies", "deviations", "diagonal", "energies_of", "mean_over_pairs", "share_of_others", "slopes_of_share"]
