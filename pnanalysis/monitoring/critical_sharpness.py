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

References
----------
.. [1] D. S. Kalra, J.-C. Gagnon-Audet, A. Gromov, I. Mediratta, K. Niu, A. H. Miller, M. Shvartsman, "A Scalable
   Measure of Loss Landscape Curvature for Analyzing the Training Dynamics of LLMs", arXiv:2601.16979.
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
