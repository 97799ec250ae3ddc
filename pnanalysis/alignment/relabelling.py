"""Permutations and sign flips of a network's hidden channels, applied to its states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pnanalysis.alignment.channel_groups import ChannelGroup, TensorAxis
from pnanalysis.io.weights import State


@dataclass(frozen=True)
class Relabelling:
    """A permutation of each group's channels, and signs: channel i becomes ``sign[i]`` times the old ``order[i]``.

    Groups are relabelled in their order, outer ones first: the channels of a head are those of the head that has
    moved to its place.

    Attributes
    ----------
    groups : list of ChannelGroup
    orders, signs : list of ndarray
    not_followed : tuple of str
        Operations of the network through which channels could not be followed, and so were left in their places.
    """

    groups: list[ChannelGroup]
    orders: list[NDArray[np.intp]]
    signs: list[NDArray[np.float64]]
    not_followed: tuple[str, ...] = ()

    @classmethod
    def identity(cls, groups: list[ChannelGroup]) -> Relabelling:
        """The relabelling that changes nothing."""
        return cls(groups, [np.arange(g.size) for g in groups], [np.ones(g.size) for g in groups])

    @classmethod
    def random(cls, groups: list[ChannelGroup], seed: int = 0, signs: bool = True) -> Relabelling:
        """Every group in a random order, and with random signs where a group allows them."""
        rng = np.random.default_rng(seed)
        orders = [rng.permutation(group.size) for group in groups]
        n_signs = [{"each": g.size, "joint": 1, "none": 0}[g.signs if signs else "none"] for g in groups]
        flips = [
            np.ones(g.size) * (rng.choice([-1.0, 1.0], n) if n else 1) for g, n in zip(groups, n_signs, strict=True)
        ]
        return cls(groups, orders, flips)

    @property
    def moved(self) -> list[int]:
        """Number of channels of each group whose place or sign changes."""
        return [
            int(np.sum((order != np.arange(len(order))) | (sign < 0)))
            for order, sign in zip(self.orders, self.signs, strict=True)
        ]

    @property
    def n_moved(self) -> int:
        """Number of channels whose place or sign changes."""
        return sum(self.moved)

    def summary(self) -> list[dict[str, str | int]]:
        """Groups by kind and size: how many there are, how their signs were free, and how many channels moved."""
        found: dict[tuple[str, int, str], dict[str, str | int]] = {}
        for group, moved in zip(self.groups, self.moved, strict=True):
            key = (group.kind, group.size, group.signs)
            entry = found.setdefault(
                key, {"kind": group.kind, "size": group.size, "signs": group.signs, "groups": 0, "moved": 0}
            )
            entry["groups"], entry["moved"] = int(entry["groups"]) + 1, int(entry["moved"]) + moved
        return list(found.values())

    def apply(self, state: Mapping[str, Tensor]) -> State:
        """A copy of the state with relabelled channels; tensors that no group indexes are shared with it."""
        by_tensor: dict[str, list[tuple[int, TensorAxis]]] = {}
        for k, group in enumerate(self.groups):
            for axis in group.axes:
                if axis.tensor in state:  # tied weights may be given by one of their names
                    by_tensor.setdefault(axis.tensor, []).append((k, axis))
        return {**state, **{name: self.apply_to_tensor(state[name], axes) for name, axes in by_tensor.items()}}

    def apply_to_tensor(self, tensor: Tensor, axes: Sequence[tuple[int, TensorAxis]]) -> Tensor:
        """A tensor with some of its axes, and the groups that index them, relabelled; the same one if none changes."""
        moving = [(k, axis) for k, axis in axes if not self.is_identity(k)]
        for dims in dict.fromkeys(axis.dims for _, axis in moving):
            tensor = self._apply_along(tensor, dims, [(k, axis) for k, axis in moving if axis.dims == dims])
        return tensor

    def is_identity(self, k: int) -> bool:
        """Whether the channels of group ``k`` stay as they are."""
        return bool((self.orders[k] == np.arange(len(self.orders[k]))).all() and (self.signs[k] > 0).all())

    def _apply_along(self, tensor: Tensor, dims: tuple[int, ...], axes: Sequence[tuple[int, TensorAxis]]) -> Tensor:
        """All relabellings along the same axes at once."""
        rows = flattened(tensor, dims)
        places, signs = np.arange(len(rows)), np.ones(len(rows))
        for k, axis in axes:
            own, sources = axis.index, axis.index[self.orders[k]]
            places[own], signs[own] = places[sources], signs[sources]
            if axis.signed:
                signs[own] *= self.signs[k][:, None]
        relabelled = rows[torch.as_tensor(places, device=tensor.device)]
        if (signs < 0).any():
            factors = torch.as_tensor(signs, device=tensor.device).to(tensor.dtype)
            relabelled *= factors.view(-1, *[1] * (rows.ndim - 1))
        return restored(relabelled, dims, tensor.shape)


def flattened(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The tensor with some axes in front, as one."""
    moved = tensor.movedim(dims, tuple(range(len(dims))))
    return moved.reshape(prod(tensor.shape[dim] for dim in dims), *moved.shape[len(dims) :])


def restored(rows: Tensor, dims: tuple[int, ...], shape: torch.Size) -> Tensor:
    """Undo :func:`flattened`."""
    rows = rows.reshape(*(shape[dim] for dim in dims), *rows.shape[1:])
    return rows.movedim(tuple(range(len(dims))), dims).contiguous()
