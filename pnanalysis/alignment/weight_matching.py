"""Relabel the hidden units of one network to bring it as close as possible to another of the same architecture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from pnanalysis.alignment.channel_groups import ChannelGroup, TensorAxis
from pnanalysis.alignment.permutation_symmetries import find_groups
from pnanalysis.alignment.relabelling import Relabelling
from pnanalysis.errors import ModelError
from pnanalysis.evaluation.forward import forward
from pnanalysis.inputs.copies import as_real, copied, in_precision
from pnanalysis.terminal.progress import Advance, progress_bar
from pnanalysis.torch_internals import tree_leaves, tree_map

_MAX_SWEEPS = 100
# Gains below this fraction of the largest similarity are float32 round-off; without the bound, two orders that are
# equally good could alternate for ever.
_ROUND_OFF = 1e-6
_SAME_FUNCTION = 1e-6  # largest relative deviation between outputs, in float64, of the same function


def align(
    model: nn.Module,
    reference: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    inputs: Any,
    *,
    signs: bool = True,
    n_restarts: int = 5,
    seed: int = 0,
    progress: bool = False,
) -> Relabelling:
    r"""The relabelling of ``state`` that brings its weights closest to those of ``reference``: weight matching.

    Searches the permutations (and signs) :math:`\pi` of hidden channels for the one that maximises the similarity
    :math:`\langle\theta_A, \pi(\theta_B)\rangle`, and so minimises the distance. With all groups but one held fixed,
    the best permutation of that one solves a linear assignment problem, except for groups that index both axes of one
    weight. This coordinate descent visits the groups in order, or in random orders, until none improves.

    Parameters
    ----------
    model : Module
        The architecture, in eval mode.
    reference, state : mapping of tensors
        Two states of it.
    inputs : Tensor
        A few examples, to trace the network with.
    signs : bool
        Also flip the signs of channels where all functions they pass through are odd (tanh networks).
    n_restarts : int
        Number of coordinate descents, the first in the order of the network, the others in orders drawn with
        ``seed``; the best result counts.
    seed : int
    progress : bool

    Returns
    -------
    Relabelling
        To :meth:`~Relabelling.apply` to ``state``.

    Raises
    ------
    ModelError
        If the network cannot be followed (see :func:`pnanalysis.alignment.permutation_symmetries.find_groups`).

    Notes
    -----
    The descent ends in a local optimum. Networks that coincide afterwards are the same up to relabelling; networks
    that do not may still be.

    *Both axes of one weight.* Where a layer maps a residual stream onto itself, :math:`x + W x`, one permutation
    :math:`P` acts on both sides of its weight, and :math:`\langle W_A, P W_B P^\top\rangle` is a quadratic assignment
    problem, for which no efficient method is known. Two candidates are then tried: each axis matched with the other
    held fixed, or only the weights matched that have one such axis. The better one is accepted if it increases the
    similarity itself. Steps of such a group never lose, but need not be optimal; restarts begin it in random orders.

    References
    ----------
    S. Ainsworth, J. Hayase, S. Srinivasa, "Git Re-Basin: Merging Models modulo Permutation Symmetries", ICLR 2023,
    arXiv:2209.04836, algorithm 1. Signs: H. Sussmann, "Uniqueness of the weights for minimal feedforward nets with a
    given input-output map", Neural Networks 5 (1992).
    """
    groups = find_groups(model, inputs)
    names = {name for name, _ in model.named_parameters()}
    rng = np.random.default_rng(seed)
    # The identity is a candidate, too: a descent from a random start may end farther away than the state is.
    best, similarity = Relabelling.identity(groups), _inner(reference, state, names)
    with progress_bar("aligning", n_restarts, progress) as advance:
        for restart in range(max(n_restarts, 1)):
            matching = _Matching(groups, names, reference, state, signs)
            found = _descend(matching, rng if restart else None, advance)
            new_similarity = _inner(reference, found.apply(state), names)
            if new_similarity > similarity:
                best, similarity = found, new_similarity
            advance(text=f"similarity {similarity:.5g}")
    return best


@torch.no_grad()
def check_preserved(model: nn.Module, before: Mapping[str, Tensor], after: Mapping[str, Tensor], inputs: Any) -> float:
    """Check that two states compute the same function on some inputs.

    Returns
    -------
    float
        Largest deviation between their outputs, relative to the largest output, in float64.

    Raises
    ------
    ModelError
        If it exceeds round-off.
    """
    network = in_precision(copied(model), torch.float64).eval()

    def to_double(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    first, second = (
        tree_leaves(forward(network, tree_map(to_double, inputs), {n: to_double(t) for n, t in state.items()}))
        for state in (before, after)
    )
    deviation = max(
        float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) for a, b in zip(first, second, strict=True)
    )
    if not deviation <= _SAME_FUNCTION:
        raise ModelError(
            f"relabelling changed what the network computes (relative deviation {deviation:.2g}); compare it unaligned"
        )
    return deviation


class _Assignment(NamedTuple):
    """An order and signs of one group's channels, and what they gain."""

    order: NDArray[np.intp]
    signs: NDArray[np.float64]
    gain: float
    scale: float  # the largest similarity, for comparison with the gain


class _Matching:
    """Similarities between the channels of a reference and those of a state, for coordinate descent."""

    def __init__(
        self,
        groups: list[ChannelGroup],
        names: set[str],
        reference: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        signs: bool,
    ) -> None:
        self.groups, self.reference, self.state, self.signs = groups, reference, state, signs
        # Only parameters count: running statistics follow from them, and have units of their own.
        self.axes = [[axis for axis in group.axes if axis.tensor in names] for group in groups]
        self.by_tensor: dict[str, list[tuple[int, TensorAxis]]] = {}
        for k, axes in enumerate(self.axes):
            for axis in axes:
                self.by_tensor.setdefault(axis.tensor, []).append((k, axis))

    def similarity(
        self, k: int, current: Relabelling, axes: Sequence[TensorAxis]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Inner products between channel i of the reference and channel j of the state, in group k.

        The other axes of each tensor are relabelled as in ``current``.

        Returns
        -------
        signed, unsigned : ndarray, shape (size, size)
            Over the tensors whose entries change sign with their channel, and over the others.
        """
        size = self.groups[k].size
        signed, unsigned = np.zeros((size, size)), np.zeros((size, size))
        for axis in axes:
            theirs = self.state[axis.tensor]
            for j, other in self.by_tensor[axis.tensor]:
                if (j, other.dim) != (k, axis.dim):
                    theirs = current.apply_to_axis(theirs, j, other)
            a, b = (
                as_real(tensor).movedim(axis.dim, 0).reshape(size, axis.repeat, -1).flatten(1)
                for tensor in (self.reference[axis.tensor], theirs)
            )
            products = (a @ b.T).double().cpu().numpy()
            if axis.signed:
                signed += products
            else:
                unsigned += products
        return signed, unsigned

    def is_quadratic(self, k: int) -> bool:
        """Whether group k indexes two axes of one tensor."""
        tensors = [axis.tensor for axis in self.axes[k]]
        return len(set(tensors)) < len(tensors)

    def total_similarity(self, k: int, current: Relabelling) -> float:
        """Inner product over all tensors that group k indexes."""
        total = 0.0
        for name in {axis.tensor for axis in self.axes[k]}:
            theirs = self.state[name]
            for j, axis in self.by_tensor[name]:
                theirs = current.apply_to_axis(theirs, j, axis)
            total += float((as_real(self.reference[name]).double() * as_real(theirs).double()).sum())
        return total

    def neighbours(self, k: int) -> set[int]:
        """Groups that share a tensor with group k, and so have similarities that depend on its order."""
        shared = [self.by_tensor[axis.tensor] for axis in self.axes[k]]
        return {j for indexed in shared for j, _ in indexed if len(indexed) > 1}


def _descend(matching: _Matching, rng: np.random.Generator | None, advance: Advance) -> Relabelling:
    """Coordinate descent from the identity; in the order of the network, or in a new random order in each sweep."""
    current, n = Relabelling.identity(matching.groups), len(matching.groups)
    if rng is not None:
        for k in filter(matching.is_quadratic, range(n)):
            current.orders[k] = rng.permutation(matching.groups[k].size)
    pending = set(range(n))  # groups that may still improve
    for _ in range(_MAX_SWEEPS):
        for k in range(n) if rng is None else rng.permutation(n).tolist():
            if k in pending:
                pending.discard(k)
                advance(0, text=f"{len(pending) + 1} of {n} groups may improve")
                if _improve(matching, current, k):
                    pending |= matching.neighbours(k)
        if not pending:
            break
    return current


def _improve(matching: _Matching, current: Relabelling, k: int) -> bool:
    """Give group k its best order and signs, with all others held fixed; whether that is an improvement."""
    if matching.is_quadratic(k):
        return _improve_quadratic(matching, current, k)
    best = _assign(matching, current, k, matching.axes[k])
    if best.gain <= _ROUND_OFF * best.scale:
        return False
    current.orders[k], current.signs[k] = best.order, best.signs
    return True


def _improve_quadratic(matching: _Matching, current: Relabelling, k: int) -> bool:
    """:func:`_improve` for a group that indexes both axes of a weight: the better of two candidates, if either gains.

    They match both axes with the other one held fixed, or only the tensors of which the group indexes one axis.
    """
    before = similarity = matching.total_similarity(k, current)
    best = current.orders[k], current.signs[k]
    axes = matching.axes[k]
    single = [axis for axis in axes if sum(other.tensor == axis.tensor for other in axes) == 1]
    for matched in (axes, single):
        candidate = _assign(matching, current, k, matched)
        trial = Relabelling(current.groups, list(current.orders), list(current.signs))
        trial.orders[k], trial.signs[k] = candidate.order, candidate.signs
        # The gain of the assignment is that of a linear problem, which this is not: compare the similarity itself.
        new_similarity = matching.total_similarity(k, trial)
        if new_similarity > max(similarity, before + _ROUND_OFF * candidate.scale):
            best, similarity = (candidate.order, candidate.signs), new_similarity
    current.orders[k], current.signs[k] = best
    return similarity > before


def _assign(matching: _Matching, current: Relabelling, k: int, axes: Sequence[TensorAxis]) -> _Assignment:
    """The best order and signs of group k for these axes."""
    signed, unsigned = matching.similarity(k, current, axes)
    flips = matching.signs and matching.groups[k].odd
    # Where signs are free, each pair of channels takes the better one: the assignment is still a linear problem.
    score = np.abs(signed) + unsigned if flips else signed + unsigned
    rows, order = linear_sum_assignment(score, maximize=True)
    old = current.orders[k]
    before = float(np.sum(current.signs[k] * signed[rows, old] + unsigned[rows, old]))
    signs = np.where(signed[rows, order] < 0, -1.0, 1.0) if flips else current.signs[k]
    return _Assignment(order, signs, float(score[rows, order].sum()) - before, float(np.abs(score).max()))


def _inner(a: Mapping[str, Tensor], b: Mapping[str, Tensor], names: set[str]) -> float:
    """Inner product of the named tensors of two states, in float64; complex numbers are pairs of real ones."""
    return sum(float((as_real(a[name]).double() * as_real(b[name]).double()).sum()) for name in sorted(names))
