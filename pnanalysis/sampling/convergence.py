"""Whether several Markov chains have reached one distribution, and how many independent draws theirs are worth.

References
----------
A. Vehtari, A. Gelman, D. Simpson, B. Carpenter, P.-C. Bürkner, "Rank-normalization, folding, and localization: an
improved R-hat for assessing convergence of MCMC", Bayesian Analysis 16 (2021) 667, arXiv:1903.08008. C. Geyer,
"Practical Markov chain Monte Carlo", Statistical Science 7 (1992) 473.
"""

from __future__ import annotations

import numpy as np

from pnanalysis.arrays import Array


def rank_normalised_rhat(draws: Array) -> float:
    """The larger of the split R-hats of the ranks and of the folded ranks of all draws.

    Parameters
    ----------
    draws : ndarray, shape (chain, draw)
        At least four draws a chain.

    Returns
    -------
    float
        1 for chains that cannot be told apart; NaN where draws are not finite, or all the same.
    """
    halves = _halves(draws)
    if not np.isfinite(halves).all() or np.ptp(halves) == 0:
        return np.nan
    folded = np.abs(halves - np.median(halves))
    return max(_rhat(_normal_scores(halves)), _rhat(_normal_scores(folded)))


def spread_of_halves(draws: Array) -> float:
    """The largest difference of the means of two halves of chains, relative to the mean of all draws.

    Parameters
    ----------
    draws : ndarray, shape (chain, draw)
        Positive numbers, at least four a chain.
    """
    means = _halves(draws).mean(axis=1)
    return float(np.ptp(means) / means.mean())


def effective_sample_size(draws: Array) -> float:
    """How many independent draws would give the mean of all draws with the same error.

    Parameters
    ----------
    draws : ndarray, shape (chain, draw)
        At least four draws a chain.

    Returns
    -------
    float
        From autocorrelations within halves of chains and the scatter between these; 0 where draws are not finite, and
        the number of draws where all are the same.
    """
    halves = _halves(draws)
    if not np.isfinite(halves).all():
        return 0.0
    n_chains, n = halves.shape
    if np.ptp(halves) == 0:
        return float(halves.size)
    within, total = _variances(halves)
    autocovariance = _autocovariance(halves).mean(axis=0)
    correlation = 1 - (within - autocovariance) / total
    correlation[0] = 1.0
    # sums of neighbours are positive and fall for any reversible chain: what comes after their first negative is noise
    pairs = correlation[: n - n % 2].reshape(-1, 2).sum(axis=1)
    end = int(np.argmax(pairs < 0)) if (pairs < 0).any() else len(pairs)
    pairs = np.minimum.accumulate(pairs[: max(end, 1)])
    time = max(2 * float(pairs.sum()) - 1, 1 / np.log10(n_chains * n))
    return n_chains * n / time


def _halves(draws: Array) -> Array:
    """Both halves of every chain, ``(2 * chain, draw // 2)``: a chain that still drifts differs from itself.

    They are scaled to at most 1, for squares of diverging chains overflow.
    """
    half = draws.shape[1] // 2
    if half < 2:
        raise ValueError("at least four draws a chain are needed")
    halves = np.concatenate([draws[:, :half], draws[:, draws.shape[1] - half :]])
    largest = float(np.abs(halves).max())
    return halves / largest if 0 < largest < np.inf else halves


def _normal_scores(draws: Array) -> Array:
    from scipy.stats import norm, rankdata  # here, so that command lines start without SciPy

    ranks = rankdata(draws).reshape(draws.shape)
    scores: Array = norm.ppf((ranks - 0.375) / (draws.size + 0.25))
    return scores


def _rhat(draws: Array) -> float:
    within, total = _variances(draws)
    return float(np.sqrt(total / within)) if within > 0 else np.inf


def _variances(draws: Array) -> tuple[float, float]:
    """Variance within chains, and that of the distribution, estimated from within and between them."""
    n = draws.shape[1]
    within = float(draws.var(axis=1, ddof=1).mean())
    between = float(draws.mean(axis=1).var(ddof=1))
    return within, (n - 1) / n * within + between


def _autocovariance(draws: Array) -> Array:
    """Autocovariances of each chain at all lags, ``(chain, draw)``."""
    n = draws.shape[1]
    centred = draws - draws.mean(axis=1, keepdims=True)
    transform = np.fft.rfft(centred, 2 * n, axis=1)
    covariances: Array = np.fft.irfft(transform * transform.conj(), axis=1)[:, :n] / n
    # with the divisor of the variance at lag 0, as within chains
    return covariances * (n / (n - 1))
