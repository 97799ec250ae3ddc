"""Permutations and sign flips of a network's hidden channels, applied to its states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pnanalysis.alignment.channel_groups import ChannelGroup, TensorAxis
from pnanalysis.io.weights import State


@dataclass(frozen=True)
class Relabelling:
    """A permutation of each group's channels, and signs: channel i becomes ``sign[i]`` times the old ``order[i]``."""

    groups: list[ChannelGroup]
    orders: list[NDArray[np.intp]]
    signs: list[NDArray[np.float64]]

    @classmethod
    def identity(cls, groups: list[ChannelGroup]) -> Relabelling:
        """The relabelling that changes nothing."""
        return cls(groups, [np.arange(g.size) for g in groups], [np.ones(g.size) for g in groups])

    @classmethod
    def random(cls, groups: list[ChannelGroup], seed: int = 0, signs: bool = True) -> Relabelling:
        """Every group in a random order, and with random signs where a group allows them."""
        rng = np.random.default_rng(seed)
        orders = [rng.permutation(group.size) for group in groups]
        flips = [rng.choice([-1.0, 1.0], g.size) if g.odd and signs else np.ones(g.size) for g in groups]
        return cls(groups, orders, flips)

    @property
    def n_moved(self) -> int:
        """Number of channels whose place or sign changes."""
        return sum(
            int(np.sum((order != np.arange(len(order))) | (sign < 0)))
            for order, sign in zip(self.orders, self.signs, strict=True)
        )

    def apply(self, state: Mapping[str, Tensor]) -> State:
        """A copy of the state with relabelled channels; tensors that no group indexes are shared with it."""
        relabelled = dict(state)
        for k, group in enumerate(self.groups):
            for axis in group.axes:
                relabelled[axis.tensor] = self.apply_to_axis(relabelled[axis.tensor], k, axis)
        return relabelled

    def apply_to_axis(self, tensor: Tensor, k: int, axis: TensorAxis) -> Tensor:
        """A copy of a tensor with one axis, indexed by group ``k``, in the new order and with the new signs."""
        index = self.orders[k][:, None] * axis.repeat + np.arange(axis.repeat)
        relabelled = tensor.index_select(axis.dim, torch.as_tensor(index.reshape(-1), device=tensor.device))
        if axis.signed and (self.signs[k] < 0).any():
            signs = torch.as_tensor(self.signs[k].repeat(axis.repeat), device=tensor.device, dtype=tensor.dtype)
            relabelled *= signs.view(-1, *[1] * (tensor.ndim - 1 - axis.dim))
        return relabelled
