"""Matching the inside of two channels that hold groups of their own: the channels of a head, for example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from pnanalysis.alignment.channel_groups import ChannelGroup, TensorAxis

_MAX_SWEEPS = 20


class Assignment(NamedTuple):
    """An order and signs of one group's channels, and the similarity that they attain."""

    rows: NDArray[np.intp]
    order: NDArray[np.intp]
    signs: NDArray[np.float64]
    value: float
    scale: float  # the largest similarity, for comparison with gains


def assign(signed: NDArray[np.float64], unsigned: NDArray[np.float64], signs: str) -> Assignment:
    """The order and signs of one group that match the channels of two networks best.

    Parameters
    ----------
    signed, unsigned : ndarray, shape (size, size)
        Similarities of channel i of the reference with channel j of the state, over tensors whose entries change sign
        with their channel, and over others.
    signs : {"each", "joint", "none"}
        See :class:`~pnanalysis.alignment.channel_groups.ChannelGroup`.
    """
    # Where signs are free, each pair of channels takes the better one: the assignment is still a linear problem.
    scores = {
        "each": [np.abs(signed) + unsigned],
        "joint": [signed + unsigned, unsigned - signed],
        "none": [signed + unsigned],
    }[signs]
    best: Assignment | None = None
    for flip, score in zip((1.0, -1.0), scores, strict=False):
        rows, order = linear_sum_assignment(score, maximize=True)
        value = float(score[rows, order].sum())
        if best is None or value > best.value:
            each = np.where(signed[rows, order] < 0, -1.0, 1.0) if signs == "each" else np.full(len(order), flip)
            best = Assignment(rows, order, each, value, float(np.abs(score).max()))
    assert best is not None
    return best


class Inside(NamedTuple):
    """How one channel's inside is matched with another's: orders and signs of the groups in it, and of itself."""

    orders: list[NDArray[np.intp]]
    signs: list[NDArray[np.float64]]
    sign: float
    value: float


@dataclass(frozen=True)
class _Slot:
    """Where a group within a channel lies among the channel's entries along one axis."""

    axis: int
    index: NDArray[np.intp]
    signed: bool


class Interior:
    """The groups within the channels of an outer group, in coordinates of one channel.

    Parameters
    ----------
    groups : list of ChannelGroup
    signs : list of str
        What flips each may have.
    k : int
        The outer group.
    axes : sequence of TensorAxis
        Its axes that count.
    """

    def __init__(self, groups: list[ChannelGroup], signs: Sequence[str], k: int, axes: Sequence[TensorAxis]) -> None:
        outer = groups[k]
        self.axes = list(axes)
        self.members = [groups[number] for number in outer.inner[0]]
        self.signs = [signs[number] for number in outer.inner[0]]
        self.flips = (1.0, -1.0) if signs[k] == "each" else (1.0,)
        self.slots = [self._slots(member) for member in self.members]
        # Groups that share entries, as query heads of one group and channels of each do, depend on each other's order.
        touched = [np.concatenate([slot.index.reshape(-1) + 10**9 * slot.axis for slot in own]) for own in self.slots]
        self.coupled = len(np.unique(np.concatenate(touched))) < sum(map(len, touched)) if touched else False

    def _slots(self, member: ChannelGroup) -> list[_Slot]:
        slots = []
        for number, axis in enumerate(self.axes):
            places = np.full(int(axis.index.max()) + 1, -1)
            places[axis.index[0]] = np.arange(axis.index.shape[1])
            for own in member.axes:
                if (own.tensor, own.dims) == (axis.tensor, axis.dims):
                    slots.append(_Slot(number, places[own.index], own.signed))
        return slots

    def match(self, products: Sequence[NDArray[np.float64]]) -> Inside:
        """The best orders and signs inside a channel, from the products of its entries with those of another's.

        Parameters
        ----------
        products : sequence of ndarray, shape (entries, entries)
            For each axis.
        """
        candidates = [self._descend(products, flip) for flip in self.flips]
        return max(candidates, key=lambda inside: inside.value)

    def _descend(self, products: Sequence[NDArray[np.float64]], flip: float) -> Inside:
        """Match the groups one after another; again where they depend on each other, until none improves."""
        orders = [np.arange(member.size) for member in self.members]
        signs = [np.ones(member.size) for member in self.members]
        value = -np.inf
        for _ in range(_MAX_SWEEPS if self.coupled else 1):
            for m in range(len(self.members)):
                signed, unsigned = self._similarity(products, flip, orders, signs, m)
                found = assign(signed, unsigned, self.signs[m])
                orders[m], signs[m] = found.order, found.signs
            before, value = value, self._total(products, flip, orders, signs)
            if value <= before + 1e-9 * abs(before):
                break
        return Inside(orders, signs, flip, self._total(products, flip, orders, signs))

    def _similarity(
        self,
        products: Sequence[NDArray[np.float64]],
        flip: float,
        orders: Sequence[NDArray[np.intp]],
        signs: Sequence[NDArray[np.float64]],
        m: int,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        size = self.members[m].size
        signed, unsigned = np.zeros((size, size)), np.zeros((size, size))
        for slot in self.slots[m]:
            places, factors = self._relabelled(slot.axis, flip, orders, signs, leave_out=m)
            chosen = products[slot.axis][slot.index[:, None], places[slot.index][None]] * factors[slot.index][None]
            target = signed if slot.signed else unsigned
            target += chosen.sum(axis=2)
        return signed, unsigned

    def _relabelled(
        self,
        axis: int,
        flip: float,
        orders: Sequence[NDArray[np.intp]],
        signs: Sequence[NDArray[np.float64]],
        leave_out: int | None = None,
    ) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        """The entries that are at each place along an axis, and their signs."""
        n = self.axes[axis].index.shape[1]
        places, factors = np.arange(n), np.full(n, flip if self.axes[axis].signed else 1.0)
        for m, slots in enumerate(self.slots):
            for slot in slots:
                if m != leave_out and slot.axis == axis:
                    sources = slot.index[orders[m]]
                    places[slot.index], factors[slot.index] = places[sources], factors[sources]
                    if slot.signed:
                        factors[slot.index] *= signs[m][:, None]
        return places, factors

    def _total(
        self,
        products: Sequence[NDArray[np.float64]],
        flip: float,
        orders: Sequence[NDArray[np.intp]],
        signs: Sequence[NDArray[np.float64]],
    ) -> float:
        total = 0.0
        for axis, own in enumerate(products):
            places, factors = self._relabelled(axis, flip, orders, signs)
            total += float(np.sum(own[np.arange(len(places)), places] * factors))
        return total


__all__ = ["Assignment", "Inside", "Interior", "assign"]
