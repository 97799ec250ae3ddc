"""What uniform quantisation of a network's weights does to them, and to the loss."""

from __future__ import annotations

import torch
from torch import Tensor

#: Bits that weights may be rounded to.
FEWEST_BITS, MOST_BITS = 2, 16


def rounded(weights: Tensor, bits: int) -> Tensor:
    """Weights rounded to the nearest of ``2^bits - 1`` evenly spaced numbers, symmetric about zero.

    The largest of them in size is that of the weights. A tensor of zeros stays as it is.

    Parameters
    ----------
    weights : Tensor
    bits : int

    Examples
    --------
    >>> rounded(torch.tensor([1.0, -0.4, 0.1]), 2)
    tensor([1., 0., 0.])
    """
    step = weights.abs().max() / (2 ** (bits - 1) - 1)
    return weights if not step > 0 else torch.round(weights / step) * step


def rounding_error(weights: Tensor, bits: int) -> Tensor:
    """What :func:`rounded` adds to weights; nothing to biases, norms and other parameters of one dim."""
    return rounded(weights, bits) - weights if weights.ndim > 1 else torch.zeros_like(weights)


__all__ = ["FEWEST_BITS", "MOST_BITS", "rounded", "rounding_error"]
