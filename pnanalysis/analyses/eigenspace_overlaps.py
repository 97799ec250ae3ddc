"""What the spaces of eigenvectors of several networks have in common, beside chance and other examples."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from pnanalysis.analyses.eigenpair_halves import overlap_error
from pnanalysis.analyses.network_eigenpairs import Found
from pnanalysis.spectra.subspaces import chance_overlap, overlap


def overlaps(found: Sequence[Found], labels: Sequence[str], shared_examples: bool = True) -> dict[str, Any]:
    """Overlaps of the spaces of several networks with one another, with what chance and other examples give.

    Parameters
    ----------
    found : sequence of Found
    labels : sequence of str
        What the networks are called in messages.
    shared_examples : bool
        Whether all are of the same examples: another choice of these then moves the spaces of both of a pair together.

    Returns
    -------
    dict
        Variables as (dims, values), dims ``checkpoint`` and ``other``; NaN between networks whose parameters have
        other names, shapes or another order, for then entries of their vectors are those of different parameters.
        ``overlap_halves`` is between spaces over different halves of the examples, and on its diagonal that of a
        network with itself: what two spaces of one matrix have in common where their examples differ.
        ``overlap_data_se``, where all half samples are known, is 0 on the diagonal.
    """
    n, apart = len(found), ""
    names = "overlap", "overlap_data_se", "overlap_chance", "overlap_chance_sd"
    table = {name: np.full((n, n), np.nan) for name in names}
    halves = {name: np.full((n, n), np.nan) for name in ("overlap_halves", "overlap_halves_spread")}
    for i, a in enumerate(found):
        for j, b in enumerate(found[: i + 1]):
            if a.shapes != b.shapes or len(a.vector) != len(b.vector):
                apart = apart or f"{labels[j]} and {labels[i]} ({_first_difference(b, a)})"
                continue
            here = [i, j], [j, i]
            table["overlap"][here] = overlap(a.vector, b.vector)
            error = overlap_error(a.vector, b.vector, a.halves, b.halves, shared_examples)
            table["overlap_data_se"][here] = error if i != j or np.isnan(error) else 0.0
            sizes = len(a.vector), a.vector.shape[1], b.vector.shape[1]
            table["overlap_chance"][here], table["overlap_chance_sd"][here] = chance_overlap(*sizes)
            if a.halves and b.halves:
                ways = [
                    overlap(a.halves[one], b.halves[other])
                    for first in range(0, min(len(a.halves), len(b.halves)), 2)
                    for one, other in ((first, first + 1), (first + 1, first))
                ]
                halves["overlap_halves"][here] = np.mean(ways)
                halves["overlap_halves_spread"][here] = np.nan if i == j else np.std(ways)
    if apart:
        warnings.warn(f"eigenvectors of different parameters have no overlap: {apart}", stacklevel=2)
    if np.isnan(table["overlap_data_se"]).all():
        del table["overlap_data_se"]
    if any(one.halves for one in found):
        table |= halves
    return {name: (("checkpoint", "other"), values) for name, values in table.items()}


def _first_difference(a: Found, b: Found) -> str:
    """Where the parameters of two networks differ, in words."""
    for one, other in zip_longest(a.shapes, b.shapes):
        if one != other:
            return f"{_named(one)} and {_named(other)}"
    return f"{len(a.vector):,} and {len(b.vector):,} parameters"


def _named(entry: tuple[str, tuple[int, ...]] | None) -> str:
    return "nothing" if entry is None else f"{entry[0]} of shape {entry[1]}"


__all__ = ["overlaps"]
