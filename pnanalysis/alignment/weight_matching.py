"""Relabel the hidden units of one network so that it is as close as possible to another of the same architecture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from pnanalysis.alignment.channel_groups import Group, IndexedAxis
from pnanalysis.alignment.permutation_symmetries import find_groups
from pnanalysis.errors import ModelError
from pnanalysis.evaluation.forward import forward
from pnanalysis.io.weights import State
from pnanalysis.terminal.progress import Advance, progress_bar
from pnanalysis.torch_internals import tree_leaves, tree_map

_MAX_SWEEPS = 100
_ROUND_OFF = 1e-6  # relative to the largest similarity; smaller gains are round-off and could cycle for ever
_SAME = 1e-6  # relative deviation of outputs in float64 that summing in another order explains


@dataclass(frozen=True)
class Relabelling:
    """Permutations of each group's channels, and signs: new channel i is ``sign[i]`` times old channel ``order[i]``."""

    groups: list[Group]
    orders: list[NDArray[np.intp]]
    signs: list[NDArray[np.float64]]

    @classmethod
    def identity(cls, groups: list[Group]) -> Relabelling:
        """The relabelling that changes nothing."""
        return cls(groups, [np.arange(g.size) for g in groups], [np.ones(g.size) for g in groups])

    @classmethod
    def random(cls, groups: list[Group], seed: int = 0, signs: bool = True) -> Relabelling:
        """Shuffles every group, and flips about half of the signs where a group allows it."""
        rng = np.random.default_rng(seed)
        orders = [rng.permutation(group.size) for group in groups]
        flips = [rng.choice([-1.0, 1.0], g.size) if g.odd and signs else np.ones(g.size) for g in groups]
        return cls(groups, orders, flips)

    @property
    def n_moved(self) -> int:
        """Number of channels that change place or sign."""
        return sum(
            int(np.sum((order != np.arange(len(order))) | (sign < 0)))
            for order, sign in zip(self.orders, self.signs, strict=True)
        )

    def apply(self, state: Mapping[str, Tensor]) -> State:
        """A copy of the state with relabelled channels; tensors that no group indexes are shared."""
        moved = dict(state)
        for k, group in enumerate(self.groups):
            for use in group.uses:
                moved[use.tensor] = self._moved(moved[use.tensor], k, use)
        return moved

    def _moved(self, tensor: Tensor, k: int, use: IndexedAxis) -> Tensor:
        """The tensor with one axis reordered and its signs flipped."""
        index = self.orders[k][:, None] * use.repeat + np.arange(use.repeat)
        moved = tensor.index_select(use.dim, torch.as_tensor(index.reshape(-1), device=tensor.device))
        if use.signed and (self.signs[k] < 0).any():
            signs = torch.as_tensor(self.signs[k].repeat(use.repeat), device=tensor.device, dtype=tensor.dtype)
            moved *= signs.view(-1, *[1] * (tensor.ndim - 1 - use.dim))
        return moved


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
    r"""The relabelling of ``state`` that minimises the distance of its weights from those of ``reference``.

    Weight matching: among all permutations (and signs) :math:`\pi` of hidden channels, find one that maximises
    :math:`\langle\theta_A, \pi(\theta_B)\rangle`, which minimises the distance. With all other groups fixed, the best
    permutation of a group is a linear assignment problem, unless the group indexes both axes of one weight. The groups
    are improved in turn, in order or in random orders, until none gains.

    Parameters
    ----------
    model : Module
        The architecture, in eval mode.
    reference, state : mapping of tensors
        Two states of it.
    inputs : Tensor
        A few examples, to trace the network with.
    signs : bool
        Also flip signs of channels where all functions they pass through are odd (tanh networks).
    n_restarts : int
        Runs of the coordinate descent, of which the best counts: the first in the order of the network, the others in
        random orders.
    seed : int
    progress : bool

    Returns
    -------
    Relabelling
        To :meth:`~Relabelling.apply` to ``state``.

    Raises
    ------
    ModelError
        If the network cannot be traced (see :func:`pnanalysis.alignment.permutation_symmetries.find_groups`).

    Notes
    -----
    The descent ends in a local optimum: networks that stay apart may still be equal up to relabelling; networks that
    coincide afterwards are.

    *Both axes of one weight.* Where a layer maps a residual stream onto itself, :math:`x + W x`, one permutation
    :math:`P` acts on both sides of its weight, and :math:`\langle W_A, P W_B P^\top\rangle` is a quadratic assignment
    problem, for which no efficient method is known. A step is then the better of two: match each axis with the other
    held fixed, or match the other weights alone; it is taken only if the similarity itself grows. So no step loses, but
    only where no weight has both axes is it the best for its group; further runs start such groups in random orders.

    References
    ----------
    S. Ainsworth, J. Hayase, S. Srinivasa, "Git Re-Basin: Merging Models modulo Permutation Symmetries", ICLR 2023,
    arXiv:2209.04836, algorithm 1. Signs: H. Sussmann, "Uniqueness of the weights for minimal feedforward nets with a
    given input-output map", Neural Networks 5 (1992).
    """
    groups = find_groups(model, inputs)
    names = {name for name, _ in model.named_parameters()}
    rng = np.random.default_rng(seed)
    best, nearest = Relabelling.identity(groups), _inner(reference, state, names)  # so the result is never farther away
    with progress_bar("aligning", n_restarts, progress) as advance:
        for restart in range(max(n_restarts, 1)):
            matching = _Matching(groups, names, reference, state, signs)
            found = _descend(matching, rng if restart else None, advance)
            similarity = _inner(reference, found.apply(state), names)
            if similarity > nearest:
                best, nearest = found, similarity
            advance(text=f"similarity {nearest:.5g}")
    return best


@torch.no_grad()
def check_preserved(model: nn.Module, before: Mapping[str, Tensor], after: Mapping[str, Tensor], inputs: Any) -> float:
    """Largest relative deviation of the outputs of two states on some inputs, in float64.

    Raises
    ------
    ModelError
        If their outputs differ by more than round-off.
    """
    twin = deepcopy(model).double().eval()

    def widened(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    first, second = (
        tree_leaves(forward(twin, tree_map(widened, inputs), {n: widened(t) for n, t in state.items()}))
        for state in (before, after)
    )
    deviation = max(
        float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) for a, b in zip(first, second, strict=True)
    )
    if not deviation <= _SAME:
        raise ModelError(f"relabelling its channels changed what the network computes (by {deviation:.2g}, relative)")
    return deviation


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor], names: Sequence[str]) -> float:
    """Euclidean distance of the named tensors of two states, in float64."""
    return float(np.sqrt(sum(float((a[name].double() - b[name].double()).square().sum()) for name in names)))


class _Assignment(NamedTuple):
    """A new order and signs of one group, the similarity gained, and the scale of similarities."""

    order: NDArray[np.intp]
    signs: NDArray[np.float64]
    gain: float
    scale: float


class _Matching:
    """Similarities for coordinate descent: of channel i of the reference and channel j of the other network."""

    def __init__(
        self,
        groups: list[Group],
        names: set[str],
        reference: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        signs: bool,
    ) -> None:
        self.groups, self.reference, self.state, self.signs = groups, reference, state, signs
        self.uses = [[use for use in group.uses if use.tensor in names] for group in groups]
        self.by_tensor: dict[str, list[tuple[int, IndexedAxis]]] = {}
        for k, uses in enumerate(self.uses):
            for use in uses:
                self.by_tensor.setdefault(use.tensor, []).append((k, use))

    def similarity(
        self, k: int, current: Relabelling, uses: Sequence[IndexedAxis]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Inner products (size, size) of the weights of group k's channels, in tensors with its signs and in others."""
        size = self.groups[k].size
        parts = [np.zeros((size, size)), np.zeros((size, size))]
        for use in uses:
            other = self.state[use.tensor]
            for j, another in self.by_tensor[use.tensor]:
                if (j, another.dim) != (k, use.dim):
                    other = current._moved(other, j, another)
            a, b = (
                tensor.movedim(use.dim, 0).reshape(size, use.repeat, -1).flatten(1)
                for tensor in (self.reference[use.tensor], other)
            )
            parts[0 if use.signed else 1] += (a @ b.T).double().cpu().numpy()
        return parts[0], parts[1]

    def quadratic(self, k: int) -> bool:
        """Whether the group indexes two axes of one tensor."""
        tensors = [use.tensor for use in self.uses[k]]
        return len(set(tensors)) < len(tensors)

    def whole(self, k: int, current: Relabelling) -> float:
        """Inner product over all tensors that group k indexes."""
        total = 0.0
        for name in {use.tensor for use in self.uses[k]}:
            other = self.state[name]
            for j, use in self.by_tensor[name]:
                other = current._moved(other, j, use)
            total += float((self.reference[name].double() * other.double()).sum())
        return total

    def neighbours(self, k: int) -> set[int]:
        """Groups whose similarities depend on the order of group k."""
        shared = [self.by_tensor[use.tensor] for use in self.uses[k]]
        return {j for users in shared for j, _ in users if len(users) > 1}


def _descend(matching: _Matching, rng: np.random.Generator | None, advance: Advance) -> Relabelling:
    """Coordinate descent from the identity; in the order of the network, or in a new random order each sweep."""
    current, n = Relabelling.identity(matching.groups), len(matching.groups)
    if rng is not None:
        for k in filter(matching.quadratic, range(n)):
            current.orders[k] = rng.permutation(matching.groups[k].size)
    pending = set(range(n))  # groups that may still gain
    for _ in range(_MAX_SWEEPS):
        for k in range(n) if rng is None else rng.permutation(n).tolist():
            if k in pending:
                pending.discard(k)
                advance(0, text=f"{len(pending) + 1} of {n} groups may gain")
                if _improve(matching, current, k):
                    pending |= matching.neighbours(k)
        if not pending:
            break
    return current


def _improve(matching: _Matching, current: Relabelling, k: int) -> bool:
    """Set the best order (and signs) of group k with all others fixed; returns whether that is a gain."""
    if matching.quadratic(k):
        return _improve_quadratic(matching, current, k)
    found = _best_assignment(matching, current, k, matching.uses[k])
    if found.gain <= _ROUND_OFF * found.scale:
        return False
    current.orders[k], current.signs[k] = found.order, found.signs
    return True


def _improve_quadratic(matching: _Matching, current: Relabelling, k: int) -> bool:
    """The same for a group that indexes both axes of a weight: the better of two steps, if it is a gain.

    Either both axes are matched with the other held fixed, or only the tensors that the group indexes once.
    """
    best, nearest = (current.orders[k], current.signs[k]), matching.whole(k, current)
    before = nearest
    once = [use for use in matching.uses[k] if sum(other.tensor == use.tensor for other in matching.uses[k]) == 1]
    for uses in (matching.uses[k], once):
        found = _best_assignment(matching, current, k, uses)
        trial = Relabelling(current.groups, list(current.orders), list(current.signs))
        trial.orders[k], trial.signs[k] = found.order, found.signs
        similarity = matching.whole(k, trial)
        if similarity > max(nearest, before + _ROUND_OFF * found.scale):
            best, nearest = (found.order, found.signs), similarity
    current.orders[k], current.signs[k] = best
    return nearest > before


def _best_assignment(matching: _Matching, current: Relabelling, k: int, uses: Sequence[IndexedAxis]) -> _Assignment:
    """The best assignment for these axes of group k."""
    signed, plain = matching.similarity(k, current, uses)
    flips = matching.signs and matching.groups[k].odd
    score = np.abs(signed) + plain if flips else signed + plain
    rows, order = linear_sum_assignment(score, maximize=True)
    old = current.orders[k]
    before = float(np.sum(current.signs[k] * signed[rows, old] + plain[rows, old]))
    signs = np.where(signed[rows, order] < 0, -1.0, 1.0) if flips else current.signs[k]
    return _Assignment(order, signs, float(score[rows, order].sum()) - before, float(np.abs(score).max()))


def _inner(a: Mapping[str, Tensor], b: Mapping[str, Tensor], names: set[str]) -> float:
    return sum(float((a[name].double() * b[name].double()).sum()) for name in sorted(names))
