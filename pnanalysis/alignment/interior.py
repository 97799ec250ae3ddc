"""Matching one group's channels, and the inside of channels that hold groups of their own, such as heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from pnanalysis.alignment.channel_groups import ChannelGroup, TensorAxis
from pnanalysis.alignment.relabelling import Change

_MAX_SWEEPS = 20


class Assignment(NamedTuple):
    """The best change of one group's channels, and the similarity that it attains."""

    change: Change
    value: float
    scale: float  # the largest similarity, for comparison with gains


def assign(signed: NDArray[np.float64], unsigned: NDArray[np.float64], freedom: str) -> Assignment:
    """The change of one group that matches the channels of two networks best.

    Parameters
    ----------
    signed, unsigned : ndarray, shape (size, size)
        Similarities of channel i of the reference with channel j of the state, over tensors whose entries change sign
        with their channel, and over others.
    freedom : {"rotations", "each", "joint", "none"}
        What is free besides the order: see :class:`~pnanalysis.alignment.channel_groups.ChannelGroup`.
    """
    size, scale = len(signed), float(np.abs(signed).max() + np.abs(unsigned).max())
    if freedom == "rotations":  # the orthogonal Procrustes problem
        left, values, right = np.linalg.svd(signed)
        return Assignment(Change.none(size)._replace(rotation=left @ right), float(values.sum()), scale)
    # Where signs are free, each pair of channels takes the better one: the assignment is still a linear problem.
    scores = {
        "each": [np.abs(signed) + unsigned],
        "joint": [signed + unsigned, unsigned - signed],
        "none": [signed + unsigned],
    }[freedom]
    candidates = []
    for flip, score in zip((1.0, -1.0), scores, strict=False):
        rows, order = linear_sum_assignment(score, maximize=True)
        signs = np.where(signed[rows, order] < 0, -1.0, 1.0) if freedom == "each" else np.full(size, flip)
        candidates.append(Assignment(Change(order, signs), float(score[rows, order].sum()), scale))
    return max(candidates, key=lambda candidate: candidate.value)


def best_value(signed: NDArray[np.float64], unsigned: NDArray[np.float64], freedom: str) -> float:
    """The similarity that :func:`assign` attains; of rotations without finding the rotation, which takes longer."""
    if freedom == "rotations":
        return float(np.linalg.svd(signed, compute_uv=False).sum())
    return assign(signed, unsigned, freedom).value


class Inside(NamedTuple):
    """How one channel's inside is matched with another's: changes of the groups in it, and its own sign."""

    changes: list[Change]
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
    freedoms : list of str
        What is free in each besides the order.
    k : int
        The outer group.
    axes : sequence of TensorAxis
        Its axes that count.
    """

    def __init__(self, groups: list[ChannelGroup], freedoms: Sequence[str], k: int, axes: Sequence[TensorAxis]) -> None:
        outer = groups[k]
        self.axes = list(axes)
        self.members = [groups[number] for number in outer.inner[0]]
        self.freedoms = [freedoms[number] for number in outer.inner[0]]
        self.flips = (1.0, -1.0) if freedoms[k] == "each" else (1.0,)
        self.slots = [self._slots(member) for member in self.members]
        # Groups that share entries, as query heads of one group and channels of each do, depend on each other.
        touched = [
            (slot.axis, place) for own in self.slots for slot in own for place in slot.index.reshape(-1).tolist()
        ]
        taken = set(touched)
        self.coupled = len(taken) < len(touched)
        self._alone = [  # entries of the channel that no group within it has
            np.array([place for place in range(axis.index.shape[1]) if (number, place) not in taken], dtype=np.intp)
            for number, axis in enumerate(self.axes)
        ]

    def _slots(self, member: ChannelGroup) -> list[_Slot]:
        slots = []
        for number, axis in enumerate(self.axes):
            places = np.full(int(axis.index.max()) + 1, -1)
            places[axis.index[0]] = np.arange(axis.index.shape[1])
            for own in member.axes:
                if (own.tensor, own.dims) == (axis.tensor, axis.dims):
                    slots.append(_Slot(number, places[own.index], own.signed))
        return slots

    def value(self, products: Sequence[NDArray[np.float64]]) -> float:
        """The similarity that :meth:`match` attains, in less time where the groups inside do not share entries."""
        return self.match(products).value if self.coupled else max(self._value(products, flip) for flip in self.flips)

    def _value(self, products: Sequence[NDArray[np.float64]], flip: float) -> float:
        total = 0.0
        for axis, own, places in zip(self.axes, products, self._alone, strict=True):
            total += float(own[places, places].sum()) * (flip if axis.signed else 1.0)
        for m, freedom in enumerate(self.freedoms):
            total += best_value(*self._similarity(products, flip, (), m), freedom)
        return total

    def match(self, products: Sequence[NDArray[np.float64]]) -> Inside:
        """The best changes inside a channel, from the products of its entries with those of another's.

        Parameters
        ----------
        products : sequence of ndarray, shape (entries, entries)
            For each axis.
        """
        return max((self._descend(products, flip) for flip in self.flips), key=lambda inside: inside.value)

    def _descend(self, products: Sequence[NDArray[np.float64]], flip: float) -> Inside:
        """Match the groups one after another; again where they depend on each other, until none improves."""
        changes = [Change.none(member.size) for member in self.members]
        value = -np.inf
        for _ in range(_MAX_SWEEPS if self.coupled else 1):
            for m in range(len(self.members)):
                changes[m] = assign(*self._similarity(products, flip, changes, m), self.freedoms[m]).change
            before, value = value, self.total(products, flip, changes)
            if value <= before + 1e-9 * abs(before):
                break
        return Inside(changes, flip, self.total(products, flip, changes))

    def _similarity(
        self, products: Sequence[NDArray[np.float64]], flip: float, changes: Sequence[Change], m: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        size = self.members[m].size
        signed, unsigned = np.zeros((size, size)), np.zeros((size, size))
        for slot in self.slots[m]:
            arranged = self._arranged(products[slot.axis], slot.axis, flip, changes, leave_out=m)
            target = signed if slot.signed else unsigned
            target += arranged[slot.index[:, None], slot.index[None]].sum(axis=2)
        return signed, unsigned

    def _arranged(
        self,
        products: NDArray[np.float64],
        axis: int,
        flip: float,
        changes: Sequence[Change],
        leave_out: int | None = None,
    ) -> NDArray[np.float64]:
        """The products along one axis, with the entries of the second channel changed."""
        columns = products * (flip if self.axes[axis].signed else 1.0)
        if leave_out is not None and not self.coupled:
            return columns
        for m, slots in enumerate(self.slots):
            change = changes[m]
            for slot in slots:
                if m == leave_out or slot.axis != axis:
                    continue
                if change.rotation is not None:
                    columns[:, slot.index] = np.einsum("cd,nde->nce", change.rotation, columns[:, slot.index])
                    continue
                columns[:, slot.index] = columns[:, slot.index[change.order]]
                if slot.signed:
                    columns[:, slot.index] *= change.signs[:, None]
        return columns

    def total(self, products: Sequence[NDArray[np.float64]], flip: float, changes: Sequence[Change]) -> float:
        """The similarity of two channels with these changes inside the second."""
        return sum(float(np.trace(self._arranged(own, axis, flip, changes))) for axis, own in enumerate(products))
