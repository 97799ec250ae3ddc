r"""Critical sharpness: how far the optimizer could have gone along its update before the loss rises again.

With the update :math:`-\eta \Delta` from :math:`\theta`, the critical learning rate :math:`\eta_c` is the smallest at
which :math:`L(\theta - \eta_c \Delta)` exceeds :math:`L(\theta)`, and :math:`2 / \eta_c` the critical sharpness
(definition 1 of [1]_). For a quadratic loss with gradient :math:`g` and Hessian :math:`H` it is
:math:`\Delta^\top H \Delta / \Delta^\top g`: for gradient descent the curvature along the gradient, which at the edge
of stability is close to the largest eigenvalue; for a preconditioned gradient the same of the preconditioned Hessian,
whose largest eigenvalue bounds it.

As in [1]_, a search by factors of two is followed by bisection, and takes forward passes only. There, bisection ends
at a relative width of 1/16 with the middle of the interval, and the loss is that of the batch that made the update.
Here it ends at 5 % with the geometric middle, and the loss is that of the data of the monitor: where these are not the
batch, it may rise however short the step, which has no critical sharpness then.

Changes of the loss below its round-off say nothing. Close to a minimum all of them are, and there is no number; else
the interval grows by what round-off hides.

References
----------
.. [1] D. S. Kalra, J.-C. Gagnon-Audet, A. Gromov, I. Mediratta, K. Niu, A. H. Miller, M. Shvartsman, "A Scalable
   Measure of Loss Landscape Curvature for Analyzing the Training Dynamics of LLMs", arXiv:2601.16979.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

#: Factors of two that are tried, of the step made.
_DOUBLINGS = 60
#: Ratio of the ends of the interval that is found where round-off hides nothing, and the largest of one that says
#: something.
_ACCURACY, _WIDEST = 1.05, 2.0
#: Factors of two in a row, on the way down, at which round-off hides the change: from here on it hides all.
_HIDDEN = 3


def critical_scale(loss: Callable[[float], float], round_off: float = 0.0) -> tuple[float, float]:
    """An interval of a few per cent with the multiple of the step at which the loss rises above that before it.

    Parameters
    ----------
    loss : callable
        The loss after this multiple of the step.
    round_off : float
        Changes of the loss that are no larger are taken for none.

    Returns
    -------
    (float, float)
        NaN where the loss rises at any multiple that is tried, or at none, or round-off hides where it does. Where the
        loss rises and falls several times along the way, the first of these places that factors of two see.
    """
    start = loss(0.0)

    @cache
    def rises(scale: float) -> bool | None:
        """Whether the loss has risen there; ``None`` if round-off hides it."""
        change = loss(scale) - start
        if abs(change) < round_off:
            return None
        return not change <= 0  # not finite, too

    low, high = _bracket(rises)
    if np.isnan(low):
        return np.nan, np.nan
    # the same places, unless round-off hides what happens between the two
    end_of_fall = _first(lambda scale: rises(scale) is not False, low, high)[0]
    begin_of_rise = _first(lambda scale: rises(scale) is True, low, high)[1]
    return (end_of_fall, begin_of_rise) if begin_of_rise <= _WIDEST * end_of_fall else (np.nan, np.nan)


def _bracket(rises: Callable[[float], bool | None]) -> tuple[float, float]:
    """Where the loss clearly falls, and where it clearly rises beyond; NaN if there are no such places."""
    low, high = np.nan, 1.0
    for _ in range(_DOUBLINGS):
        risen = rises(high)
        if risen:
            break
        low, high = low if risen is None else high, 2 * high
    else:
        return np.nan, np.nan
    if not np.isnan(low):
        return low, high
    low, hidden = high, 0
    for _ in range(_DOUBLINGS):
        low /= 2
        risen = rises(low)
        if risen is False:
            return low, high
        high, hidden = (low, 0) if risen else (high, hidden + 1)
        if hidden == _HIDDEN:
            break
    return np.nan, np.nan


def _first(holds: Callable[[float], bool], low: float, high: float) -> tuple[float, float]:
    """A narrow interval at whose upper end it holds and at whose lower end it does not."""
    while high > _ACCURACY * low:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if holds(middle) else (middle, high)
    return low, high
