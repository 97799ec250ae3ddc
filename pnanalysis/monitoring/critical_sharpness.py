r"""Critical sharpness: how far the optimizer could have gone along its update before the loss rises again.

With the update :math:`-\eta \Delta` from :math:`\theta`, the critical learning rate :math:`\eta_c` is the smallest at
which :math:`L(\theta - \eta_c \Delta)` exceeds :math:`L(\theta)`, and :math:`2 / \eta_c` the critical sharpness. For
gradient descent on a quadratic loss it is the curvature along the gradient, which at the edge of stability is close to
the largest eigenvalue. It takes forward passes only (arXiv 2601.16979).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

#: Factors of two that are tried, of the step made.
_DOUBLINGS = 12
#: Ratio of the ends of the interval that is found.
_ACCURACY = 1.05


def critical_scale(loss: Callable[[float], float]) -> tuple[float, float]:
    """An interval of a few per cent with the multiple of the step at which the loss rises above that before it.

    Parameters
    ----------
    loss : callable
        The loss after this multiple of the step.

    Returns
    -------
    (float, float)
        NaN where the loss rises at any multiple that is tried, or at none. Where the loss rises and falls several times
        along the way, the first of these places that factors of two see.
    """
    start = loss(0.0)
    low = high = 1.0
    if loss(1.0) > start:
        for _ in range(_DOUBLINGS):
            high, low = low, low / 2
            if loss(low) <= start:
                break
        else:
            return np.nan, np.nan
    else:
        for _ in range(_DOUBLINGS):
            low, high = high, high * 2
            if not loss(high) <= start:  # not finite, too
                break
        else:
            return np.nan, np.nan
    while high > _ACCURACY * low:
        middle = (low * high) ** 0.5
        if loss(middle) <= start:
            low = middle
        else:
            high = middle
    return low, high
