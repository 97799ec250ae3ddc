"""Groups of interchangeable channels: which entries of which tensors each channel owns, and which groups lie in it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class TensorAxis:
    """An axis of a parameter or buffer, or several, that the channels of a group index.

    Attributes
    ----------
    tensor : str
    dims : tuple of int
        The axes, flattened to one in this order.
    index : ndarray of int, shape (size, entries)
        Places along them that each channel owns: several where channels are flattened with pixels, or packed.
    signed : bool
        Whether entries change sign with their channel, as a weight does and a running variance does not.
    """

    tensor: str
    dims: tuple[int, ...]
    index: NDArray[np.intp]
    signed: bool


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Interchangeable channels, and every axis of every tensor that they index.

    Attributes
    ----------
    size : int
        Number of channels.
    axes : tuple of TensorAxis
    signs : {"each", "joint", "none"}
        Whether the sign of each channel may be flipped as well, since all functions applied to it are odd; or that of
        all channels at once, as before a normalisation that subtracts their mean.
    kind : str
        What the channels are: ``units``, ``stream`` (of residual connections), ``heads``, ``query-key`` or ``value``
        (channels within a head), ``tokens`` (that are parameters), ``blocks`` (of a grouped convolution).
    inner : tuple of tuple of int
        For each channel, the numbers of the groups that lie in it, such as those of the channels of a head; their
        channels may be permuted in each on its own. Empty where there are none.
    linear : bool
        Whether the channels may be rotated, by any orthogonal matrix, since they only enter linear maps and products
        of two of them.
    """

    size: int
    axes: tuple[TensorAxis, ...]
    signs: str
    kind: str = "units"
    inner: tuple[tuple[int, ...], ...] = ()
    linear: bool = False

    @property
    def odd(self) -> bool:
        """Whether the sign of each channel may be flipped."""
        return self.signs == "each"
