r"""The gradient noise scale: the batch size at which the noise of a batch's gradient equals the gradient.

For batches of :math:`b_i` examples with gradients :math:`g_i` and mean :math:`\bar g` over all :math:`N`, unbiased
estimates are :math:`\mathrm{tr}\,\Sigma = \sum_i b_i |g_i - \bar g|^2 / (K - 1)` and
:math:`|G|^2 = |\bar g|^2 - \mathrm{tr}\,\Sigma / N`, whose ratio is the scale. For batches of one size they are those
of McCandlish et al., arXiv 1812.06162, appendix A.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pnanalysis.arrays import Array


@dataclass(frozen=True)
class NoiseScale:
    """The simple noise scale in examples, and its standard error by the jackknife over batches.

    Both are NaN where there are too few batches, or the gradient is lost in noise: ``|G|^2`` is not positive.
    """

    value: float
    se: float


def noise_scale(sizes: Array, squares: Array, along_mean: Array, mean_square: float) -> NoiseScale:
    """The scale from inner products of the gradients.

    Parameters
    ----------
    sizes : ndarray
        Examples of each batch, ``(K,)``.
    squares : ndarray
        :math:`|g_i|^2`, ``(K,)``.
    along_mean : ndarray
        :math:`g_i \\cdot \\bar g`, ``(K,)``.
    mean_square : float
        :math:`|\\bar g|^2`.
    """
    k = len(sizes)
    if k < 2:
        return NoiseScale(np.nan, np.nan)
    total = sizes.sum()
    value = _ratio(k, total, (sizes * squares).sum(), mean_square)
    if k < 3:
        return NoiseScale(value, np.nan)
    left = total - sizes
    # |mean without i|^2, from (N g - b_i g_i) / (N - b_i)
    means = (total**2 * mean_square - 2 * total * sizes * along_mean + sizes**2 * squares) / left**2
    without = _ratio(k - 1, left, (sizes * squares).sum() - sizes * squares, means)
    se = float(np.sqrt((k - 1) / k * ((without - without.mean()) ** 2).sum()))  # NaN if any is
    return NoiseScale(value, se if np.isfinite(value) else np.nan)


def _ratio(k, total, weighted_squares, mean_square):  # type: ignore[no-untyped-def]
    """tr(Sigma) / |G|^2 for ``k`` batches; arrays or numbers."""
    noise = (weighted_squares - total * mean_square) / (k - 1)
    signal = mean_square - noise / total
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.where(signal > 0, np.maximum(noise, 0.0) / signal, np.nan)
    return found if found.ndim else float(found)
