"""Permutations, sign flips and rotations of a network's hidden channels, applied to its states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pnanalysis.alignment.channel_groups import ChannelGroup, TensorAxis
from pnanalysis.io.weights import State


class Change(NamedTuple):
    """What becomes of a group's channels: channel i is ``signs[i]`` times the old ``order[i]``.

    With a rotation, it is the combination ``rotation[i]`` of the old ones instead.
    """

    order: NDArray[np.intp]
    signs: NDArray[np.float64]
    rotation: NDArray[np.float64] | None = None

    @classmethod
    def none(cls, size: int) -> Change:
        return cls(np.arange(size), np.ones(size))

    @property
    def moved(self) -> NDArray[np.bool_]:
        """Which channels are not what they were."""
        if self.rotation is not None:
            return np.abs(self.rotation - np.eye(len(self.order))).max(axis=1) > 1e-6
        return (self.order != np.arange(len(self.order))) | (self.signs < 0)

    def value(self, signed: NDArray[np.float64], unsigned: NDArray[np.float64]) -> float:
        """The similarity that it attains, from those of all pairs of channels."""
        if self.rotation is not None:
            return float(np.sum(self.rotation * signed))
        rows = np.arange(len(self.order))
        return float(np.sum(self.signs * signed[rows, self.order] + unsigned[rows, self.order]))


@dataclass(frozen=True)
class Relabelling:
    """A change of each group's channels that leaves the network's function as it is.

    Groups are relabelled in their order, outer ones first: the channels of a head are those of the head that has
    moved to its place.

    Attributes
    ----------
    groups : list of ChannelGroup
    changes : list of Change
    not_followed : tuple of str
        Operations of the network through which channels could not be followed, and so were left in their places.
    """

    groups: list[ChannelGroup]
    changes: list[Change]
    not_followed: tuple[str, ...] = ()

    @classmethod
    def identity(cls, groups: list[ChannelGroup]) -> Relabelling:
        """The relabelling that changes nothing."""
        return cls(groups, [Change.none(group.size) for group in groups])

    @classmethod
    def random(
        cls, groups: list[ChannelGroup], seed: int = 0, signs: bool = True, rotations: bool = False
    ) -> Relabelling:
        """Every group in a random order, with random signs or rotations where a group allows them."""
        rng = np.random.default_rng(seed)
        orders = [rng.permutation(group.size) for group in groups]
        n_signs = [{"each": g.size, "joint": 1, "none": 0}[g.signs if signs else "none"] for g in groups]
        flips = [
            np.ones(g.size) * (rng.choice([-1.0, 1.0], n) if n else 1) for g, n in zip(groups, n_signs, strict=True)
        ]
        turns = [
            np.linalg.qr(rng.normal(size=(group.size, group.size)))[0] if rotations and group.linear else None
            for group in groups
        ]
        return cls(groups, list(map(Change, orders, flips, turns)))

    def with_changes(self, changes: Mapping[int, Change]) -> Relabelling:
        """A copy in which some groups change in another way."""
        return replace(self, changes=[changes.get(k, change) for k, change in enumerate(self.changes)])

    @property
    def n_moved(self) -> int:
        """Number of channels whose place or sign changes, or that are rotated."""
        return sum(int(change.moved.sum()) for change in self.changes)

    def summary(self) -> list[dict[str, str | int]]:
        """Groups by kind and size: how many there are, what was free besides their order, how many channels moved."""
        found: dict[tuple[str, int, str], dict[str, str | int]] = {}
        for group, change in zip(self.groups, self.changes, strict=True):
            freedom = "rotations" if change.rotation is not None else group.signs
            entry = found.setdefault(
                (group.kind, group.size, freedom),
                {"kind": group.kind, "size": group.size, "signs": freedom, "groups": 0, "moved": 0},
            )
            entry["groups"] = int(entry["groups"]) + 1
            entry["moved"] = int(entry["moved"]) + int(change.moved.sum())
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
        moving = [(self.changes[k], axis) for k, axis in axes if self.changes[k].moved.any()]
        for dims in dict.fromkeys(axis.dims for _, axis in moving):
            tensor = _changed(tensor, dims, [(change, axis) for change, axis in moving if axis.dims == dims])
        return tensor


def _changed(tensor: Tensor, dims: tuple[int, ...], changes: Sequence[tuple[Change, TensorAxis]]) -> Tensor:
    """A tensor with all changes along the same axes: first of orders and signs, all at once, then rotations.

    What is rotated has no groups within, so that it may come last.
    """
    rows = flattened(tensor, dims)
    places, signs = np.arange(len(rows)), np.ones(len(rows))
    for change, axis in changes:
        if change.rotation is None:
            own, sources = axis.index, axis.index[change.order]
            places[own], signs[own] = places[sources], signs[sources]
            if axis.signed:
                signs[own] *= change.signs[:, None]
    relabelled = rows[torch.as_tensor(places, device=tensor.device)]
    if (signs < 0).any():
        factors = torch.as_tensor(signs, device=tensor.device).to(tensor.dtype)
        relabelled *= factors.view(-1, *[1] * (rows.ndim - 1))
    for change, axis in changes:
        if change.rotation is not None:
            own_rows = torch.as_tensor(axis.index.reshape(-1), device=tensor.device)
            matrix = torch.as_tensor(change.rotation, device=tensor.device).to(tensor.dtype)
            block = relabelled[own_rows]
            relabelled[own_rows] = (matrix @ block.reshape(len(matrix), -1)).reshape(block.shape)
    return restored(relabelled, dims, tensor.shape)


def flattened(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The tensor with some axes in front, as one."""
    moved = tensor.movedim(dims, tuple(range(len(dims))))
    return moved.reshape(prod(tensor.shape[dim] for dim in dims), *moved.shape[len(dims) :])


def restored(rows: Tensor, dims: tuple[int, ...], shape: torch.Size) -> Tensor:
    """Undo :func:`flattened`."""
    rows = rows.reshape(*(shape[dim] for dim in dims), *(size for k, size in enumerate(shape) if k not in dims))
    return rows.movedim(tuple(range(len(dims))), dims).contiguous()
