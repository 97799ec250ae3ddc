"""Relabel the hidden units of one network to bring it as close as possible to another of the same architecture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from pnanalysis.alignment.channel_groups import ChannelGroup, TensorAxis
from pnanalysis.alignment.interior import Interior, assign
from pnanalysis.alignment.permutation_symmetries import find_symmetries, tensors_in_output
from pnanalysis.alignment.relabelling import Change, Relabelling
from pnanalysis.alignment.similarities import Similarities
from pnanalysis.errors import ModelError
from pnanalysis.evaluation.forward import forward
from pnanalysis.inputs.copies import as_real, copied, in_precision, matching_dtype
from pnanalysis.terminal.progress import Advance, progress_bar
from pnanalysis.torch_internals import tree_map

_MAX_SWEEPS = 100
# Gains below this fraction of the largest similarity are float32 round-off; without the bound, two orders that are
# equally good could alternate for ever.
_ROUND_OFF = 1e-6
# Largest relative deviation between outputs, in float64, of the same function; some networks compute norms and angles
# in float32 whatever their precision.
_SAME_FUNCTION = 1e-5


def align(
    model: nn.Module,
    reference: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    inputs: Any,
    *,
    signs: bool = True,
    rotations: bool = True,
    n_restarts: int = 5,
    seed: int = 0,
    progress: bool = False,
) -> Relabelling:
    r"""The relabelling of ``state`` that brings its weights closest to those of ``reference``: weight matching.

    Searches the permutations (signs, rotations) :math:`\pi` of hidden channels for the one that maximises the
    similarity :math:`\langle\theta_A, \pi(\theta_B)\rangle`, and so minimises the distance. With all groups but one
    held fixed, the best permutation of that one solves a linear assignment problem, except for groups that index both
    axes of one weight, and the best rotation an orthogonal Procrustes problem. This coordinate descent visits the
    groups in order, or in random orders, until none improves.

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
    rotations : bool
        Also rotate channels that only enter linear maps and products of two of them (within heads of attention).
    n_restarts : int
        Number of coordinate descents. The first begins with the groups matched one after another, each by weights
        whose other axes are matched already; the second with all as it is; the others, too, but they take the groups
        in orders drawn with ``seed``. The best result counts.
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

    *Heads.* A permutation of heads moves all channels of each, and those within a head may be permuted in any way,
    too. Each pair of heads is matched inside first, queries with keys and values with outputs; the similarities that
    the pairs attain are those of the assignment problem between heads.

    *Both axes of one weight.* Where a layer maps a residual stream onto itself, :math:`x + W x`, one permutation
    :math:`P` acts on both sides of its weight, and :math:`\langle W_A, P W_B P^\top\rangle` is a quadratic assignment
    problem, for which no efficient method is known. Two candidates are then tried: each axis matched with the other
    held fixed, or only the weights matched that have one such axis. The better one is accepted if it increases the
    similarity itself. Steps of such a group never lose, but need not be optimal; restarts begin it in random orders.

    References
    ----------
    S. Ainsworth, J. Hayase, S. Srinivasa, "Git Re-Basin: Merging Models modulo Permutation Symmetries", ICLR 2023,
    arXiv:2209.04836, algorithm 1. Signs: H. Sussmann, "Uniqueness of the weights for minimal feedforward nets with a
    given input-output map", Neural Networks 5 (1992). Heads: N. Verma, M. Elbayad, "Merging Text Transformer Models
    from Different Initializations", arXiv:2403.00986; M. Imfeld et al., "Transformer Fusion with Optimal Transport",
    arXiv:2310.05719. Rotations: A. Theus et al., "Generalized Linear Mode Connectivity for Transformers",
    arXiv:2506.22712.
    """
    groups, not_followed = find_symmetries(model, inputs)
    names = {name for name, _ in model.named_parameters()}
    rng = np.random.default_rng(seed)
    # The identity is a candidate, too: a descent from a random start may end farther away than the state is.
    best, similarity = Relabelling.identity(groups), _inner(reference, state, names)
    matching = Similarities(groups, names, reference, state, [_freedom(group, signs, rotations) for group in groups])
    with progress_bar("aligning", n_restarts, progress) as advance:
        for restart in range(max(n_restarts, 1)):
            start = _anchored(matching) if restart == 0 else Relabelling.identity(groups)
            if restart > 1:
                quadratic = filter(matching.is_quadratic, matching.visited)
                start = start.with_changes(
                    {k: Change(rng.permutation(groups[k].size), np.ones(groups[k].size)) for k in quadratic}
                )
            found = _descend(matching, start, rng if restart > 1 else None, advance)
            new_similarity = _inner(reference, found.apply(state), names)
            if new_similarity > similarity:
                best, similarity = found, new_similarity
            advance(text=f"similarity {similarity:.5g}")
    return replace(best, not_followed=not_followed)


def _freedom(group: ChannelGroup, signs: bool, rotations: bool) -> str:
    """What is free in a group besides the order of its channels."""
    return "rotations" if rotations and group.linear else group.signs if signs else "none"


@torch.no_grad()
def check_relabelling(model: nn.Module, state: Mapping[str, Tensor], relabelling: Relabelling, inputs: Any) -> float:
    """:func:`check_preserved` for a state and its relabelling, which is done in float64 for the purpose."""
    exact = {name: _to_double(tensor) for name, tensor in state.items()}
    return check_preserved(model, exact, relabelling.apply(exact), inputs)


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
    held = {name for name, _ in (*network.named_parameters(), *network.named_buffers())}  # tied weights once

    first, second = (
        tensors_in_output(
            forward(network, tree_map(_to_double, inputs), {n: _to_double(t) for n, t in state.items() if n in held})
        )
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


def _to_double(value: Any) -> Any:
    return value.to(matching_dtype(value, torch.float64)) if isinstance(value, Tensor) else value


def _descend(
    matching: Similarities, current: Relabelling, rng: np.random.Generator | None, advance: Advance
) -> Relabelling:
    """Coordinate descent; in the order of the network, or in a new random order in each sweep."""
    visited = matching.visited
    pending = set(visited)  # groups that may still improve
    for _ in range(_MAX_SWEEPS):
        for k in visited if rng is None else rng.permutation(visited).tolist():
            if k in pending:
                pending.discard(k)
                advance(0, text=f"{len(pending) + 1} of {len(visited)} groups may improve")
                improved = _improved(matching, current, k)
                if improved is not None:
                    current = improved
                    pending |= matching.neighbours(k)
        if not pending:
            break
    return current


def _improved(matching: Similarities, current: Relabelling, k: int) -> Relabelling | None:
    """The relabelling with the best change of group k, all others held fixed; ``None`` if that is no improvement."""
    if matching.within[k]:
        return _improved_nested(matching, current, k)
    if matching.is_quadratic(k):
        return _improved_quadratic(matching, current, k)
    signed, unsigned = matching.similarity(k, current, matching.axes[k])
    best = assign(signed, unsigned, matching.freedoms[k])
    if best.value - current.changes[k].value(signed, unsigned) <= _ROUND_OFF * best.scale:
        return None
    return current.with_changes({k: best.change})


def _improved_quadratic(matching: Similarities, current: Relabelling, k: int) -> Relabelling | None:
    """:func:`_improved` for a group that indexes both axes of a weight: the better of two candidates, if either gains.

    They match both axes with the other one held fixed, or only the tensors of which the group indexes one axis.
    """
    before = similarity = matching.total_similarity(k, current)
    best: Relabelling | None = None
    axes = matching.axes[k]
    single = [axis for axis in axes if sum(other.tensor == axis.tensor for other in axes) == 1]
    for matched in (axes, single):
        candidate = assign(*matching.similarity(k, current, matched), matching.freedoms[k])
        trial = current.with_changes({k: candidate.change})
        # The gain of the assignment is that of a linear problem, which this is not: compare the similarity itself.
        new_similarity = matching.total_similarity(k, trial)
        if new_similarity > max(similarity, before + _ROUND_OFF * candidate.scale):
            best, similarity = trial, new_similarity
    return best


def _improved_nested(matching: Similarities, current: Relabelling, k: int) -> Relabelling | None:
    """:func:`_improved` for a group whose channels hold groups of their own, such as heads."""
    trial, scale = _nested(matching, current, k, matching.axes[k])
    before, after = (matching.total_similarity(k, relabelling) for relabelling in (current, trial))
    return trial if after - before > _ROUND_OFF * max(scale, abs(before)) else None


def _nested(
    matching: Similarities, current: Relabelling, k: int, considered: Sequence[TensorAxis]
) -> tuple[Relabelling, float]:
    """The best order of a group whose channels hold groups of their own, and of these; the largest similarity.

    Each pair of a channel of the reference and one of the state is matched inside first; what that attains is the
    similarity of the pair.
    """
    rows = [matching.rows(k, axis, current) for axis in considered]
    interior = Interior(matching.groups, matching.freedoms, k, considered)
    size = matching.groups[k].size
    values = np.zeros((size, size))
    for i in range(size):
        products = [  # of all entries of channel i with all of every channel j
            torch.tensordot(ours[i], theirs, ([1], [2])).permute(1, 0, 2).double().cpu().numpy()
            for ours, theirs in rows
        ]
        values[i] = [interior.value([part[j] for part in products]) for j in range(size)]
    order = linear_sum_assignment(values, maximize=True)[1]
    chosen = [
        interior.match([(ours[i] @ theirs[j].T).double().cpu().numpy() for ours, theirs in rows])
        for i, j in enumerate(order)
    ]
    changes = {k: Change(order, np.array([inside.sign for inside in chosen]))}
    for numbers, inside in zip(matching.groups[k].inner, chosen, strict=True):
        changes |= dict(zip(numbers, inside.changes, strict=True))
    return current.with_changes(changes), float(np.abs(values).max())


def _anchored(matching: Similarities) -> Relabelling:
    """A start for the descent: groups one after another, each by weights whose other axes are in order already.

    First comes the group with the largest part of its weights beside inputs, outputs and biases alone. Of two networks
    that differ in the order of their channels only, that finds the order, where weights whose other axes are in
    disorder would have a say, too. Groups that these weights leave undetermined wait: what is arbitrary in a rotation
    would be taken for known by all that follow, and the descent may not find its way back.
    """
    current, known = Relabelling.identity(matching.groups), set[int]()
    while remaining := [k for k in matching.visited if k not in known]:
        anchored = {k: matching.beside(k, known) for k in remaining}
        share = {k: matching.n_entries(k, own) / matching.n_entries(k, matching.axes[k]) for k, own in anchored.items()}
        determined = {k: matching.determine(k, own) for k, own in anchored.items()}
        k = max(remaining, key=lambda number: (determined[number], share[number]))
        axes = anchored[k] or matching.axes[k]
        if matching.within[k]:
            current = _nested(matching, current, k, axes)[0]
        else:
            found = assign(*matching.similarity(k, current, axes), matching.freedoms[k])
            current = current.with_changes({k: found.change})
        known |= {k, *matching.within[k]}
    return current


def _inner(a: Mapping[str, Tensor], b: Mapping[str, Tensor], names: set[str]) -> float:
    """Inner product of the named tensors of two states, in float64; complex numbers are pairs of real ones."""
    return sum(float((as_real(a[name]).double() * as_real(b[name]).double()).sum()) for name in sorted(names))
