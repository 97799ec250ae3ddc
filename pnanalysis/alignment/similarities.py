"""Similarities between the channels of two states of one network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pnanalysis.alignment.channel_groups import ChannelGroup, TensorAxis
from pnanalysis.alignment.relabelling import Relabelling, flattened
from pnanalysis.inputs.copies import as_real


class Similarities:
    """Similarities between the channels of a reference and those of a state, for coordinate descent."""

    def __init__(
        self,
        groups: list[ChannelGroup],
        names: set[str],
        reference: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        freedoms: Sequence[str],
    ) -> None:
        self.groups, self.reference, self.state = groups, reference, state
        self.freedoms = list(freedoms)
        # Only parameters count: running statistics follow from them, and have units of their own.
        self.axes = [[axis for axis in group.axes if axis.tensor in names] for group in groups]
        self.by_tensor: dict[str, list[tuple[int, TensorAxis]]] = {}
        for k, axes in enumerate(self.axes):
            for axis in axes:
                self.by_tensor.setdefault(axis.tensor, []).append((k, axis))
        #: Groups inside others are matched along with them.
        self.within = [set(chain(*group.inner)) for group in groups]
        self.visited = sorted(set(range(len(groups))) - set().union(*self.within))
        for k in filter(self.is_quadratic, range(len(groups))):  # whose best rotation is not known in closed form
            self.freedoms[k] = groups[k].signs if self.freedoms[k] == "rotations" else self.freedoms[k]

    def rows(self, k: int, axis: TensorAxis, current: Relabelling) -> tuple[Tensor, Tensor]:
        """The channels of group k along one axis, in the reference and in the state, each flattened to rows of entries.

        The other axes of the state are relabelled as in ``current``; this one, and those of groups within, are not.
        """
        others = [
            (j, other)
            for j, other in self.by_tensor[axis.tensor]
            if not ((j == k and other.dims == axis.dims) or j in self.within[k])
        ]
        theirs = current.apply_to_tensor(self.state[axis.tensor], others)
        places = torch.as_tensor(axis.index.reshape(-1), device=theirs.device)
        ours, theirs = (
            flattened(tensor, axis.dims)[places].reshape(*axis.index.shape, -1)
            for tensor in (as_real(self.reference[axis.tensor]), as_real(theirs))
        )
        return ours, theirs

    def similarity(
        self, k: int, current: Relabelling, axes: Sequence[TensorAxis]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Inner products between channel i of the reference and channel j of the state, in group k.

        Returns
        -------
        signed, unsigned : ndarray, shape (size, size)
            Over the tensors whose entries change sign with their channel, and over the others.
        """
        size = self.groups[k].size
        signed, unsigned = np.zeros((size, size)), np.zeros((size, size))
        for axis in axes:
            a, b = (rows.flatten(1) for rows in self.rows(k, axis, current))
            products = (a @ b.T).double().cpu().numpy()
            if axis.signed:
                signed += products
            else:
                unsigned += products
        return signed, unsigned

    def beside(self, k: int, known: set[int]) -> list[TensorAxis]:
        """Axes of group k in tensors that no other groups index but known ones."""
        free = known | self.within[k]
        return [
            axis
            for axis in self.axes[k]
            if all(j in free or (j == k and other is axis) for j, other in self.by_tensor[axis.tensor])
        ]

    def n_entries(self, k: int, axes: Sequence[TensorAxis]) -> int:
        """Number of weights along some axes of group k."""
        return sum(
            self.state[axis.tensor].numel()
            * axis.index.size
            // prod(self.state[axis.tensor].shape[d] for d in axis.dims)
            for axis in axes
        )

    def determine(self, k: int, axes: Sequence[TensorAxis]) -> bool:
        """Whether weights along some axes of group k can determine its change, and those of the groups within it.

        A rotation of n channels takes n weights of each; an order or signs take one that differs between channels.
        """
        places = {(axis.tensor, axis.dims) for axis in axes}
        for j in (k, *self.within[k]):
            own = [axis for axis in self.axes[j] if (axis.tensor, axis.dims) in places]
            size = self.groups[j].size
            if self.n_entries(j, own) < (size * size if self.freedoms[j] == "rotations" else size):
                return False
        return True

    def is_quadratic(self, k: int) -> bool:
        """Whether group k indexes two axes of one tensor."""
        tensors = [axis.tensor for axis in self.axes[k]]
        return len(set(tensors)) < len(tensors)

    def total_similarity(self, k: int, current: Relabelling) -> float:
        """Inner product over all tensors that group k indexes."""
        total = 0.0
        for name in {axis.tensor for axis in self.axes[k]}:
            theirs = current.apply_to_tensor(self.state[name], self.by_tensor[name])
            total += float((as_real(self.reference[name]).double() * as_real(theirs).double()).sum())
        return total

    def neighbours(self, k: int) -> set[int]:
        """Visited groups that share a tensor with group k, and so have similarities that depend on its order."""
        shared = [self.by_tensor[axis.tensor] for axis in self.axes[k]]
        return {j for indexed in shared for j, _ in indexed if len(indexed) > 1} & set(self.visited)
