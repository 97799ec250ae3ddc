r"""Neighbourhoods of a point in parameter space, and what is drawn from them.

A perturbation is :math:`\delta = \rho\, c \odot u`, with a scale :math:`c_i \ge 0` of each parameter and a point
:math:`u` of the unit ball of a norm. For averages, the entries of :math:`u` are standard normal where that is the
Euclidean norm, and uniform between -1 and 1 where it is the largest entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pnanalysis.errors import ModelError
from pnanalysis.inputs.copies import as_real
from pnanalysis.io.weights import State
from pnanalysis.spectra.random_vectors import normal_numbers

#: Streams of random numbers, which the seed is combined with.
DIRECTIONS, STARTS = 1, 2


def _ones(value: Tensor) -> Tensor:
    return torch.ones_like(value)


def _filters(value: Tensor) -> Tensor:
    """The root mean square of the filter that each entry belongs to; zeros for tensors without filters."""
    if value.ndim < 2:
        return torch.zeros_like(value)
    rows = value.flatten(1)
    return rows.square().mean(1, keepdim=True).sqrt().expand_as(rows).reshape(value.shape)


@dataclass(frozen=True)
class Kind:
    """A kind of neighbourhood.

    Attributes
    ----------
    scale : callable
        :math:`c` of the entries of a parameter, given their values.
    is_box : bool
        Whether the norm is the largest entry instead of the Euclidean one.
    radius, average_radius : float
        Where none is given: for the worst case, and for averages.
    """

    scale: Callable[[Tensor], Tensor]
    is_box: bool
    radius: float
    average_radius: float


#: Kinds of neighbourhoods by name.
KINDS = {
    "ball": Kind(_ones, False, 0.05, 0.01),
    "adaptive": Kind(torch.abs, False, 0.5, 0.1),
    "filter": Kind(_filters, False, 0.5, 0.1),
    "box": Kind(lambda value: value.abs() + 1, True, 1e-3, 0.02),
    "linf": Kind(_ones, True, 1e-3, 0.02),
    "adaptive-linf": Kind(torch.abs, True, 0.01, 0.2),
}


@dataclass(frozen=True)
class Neighbourhoods:
    """Neighbourhoods of one point, one for each row of a matrix ``(k, P)``.

    Attributes
    ----------
    centre : Tensor, shape (P,)
    scale : Tensor, shape (k, P)
        Radius times :math:`c`.
    is_box : Tensor, shape (k, 1)
    """

    centre: Tensor
    scale: Tensor
    is_box: Tensor

    def points(self, u: Tensor) -> Tensor:
        """The points of parameter space at ``u`` ``(k, P)``."""
        return self.centre + self.scale * u

    def projected(self, u: Tensor) -> Tensor:
        """The nearest points of the unit balls."""
        norm = torch.linalg.vector_norm(u, dim=1, keepdim=True, dtype=torch.float64)
        return torch.where(self.is_box, u.clamp(-1.0, 1.0), (u / norm.clamp_min(1.0)).to(u.dtype))

    def farthest(self, slope: Tensor) -> Tensor:
        """The points of the unit balls that lie farthest along ``slope``, the centre where it is zero."""
        norm = torch.linalg.vector_norm(slope, dim=1, keepdim=True, dtype=torch.float64)
        scaled = torch.where(norm > 0, slope / torch.where(norm > 0, norm, 1.0), 0.0).to(slope.dtype)
        return torch.where(self.is_box, slope.sign(), scaled)

    def rows(self, index: slice | Tensor) -> Neighbourhoods:
        """Those of some of the rows."""
        return Neighbourhoods(self.centre, self.scale[index], self.is_box[index])


def scale_of(kind: str, state: State, names: Sequence[str]) -> Tensor:
    """The scale ``(P,)`` of a kind of neighbourhood of a state.

    Raises
    ------
    ModelError
        If it is zero for all parameters.
    """
    scale = torch.cat([KINDS[kind].scale(as_real(state[name])).flatten() for name in names])
    if not bool((scale > 0).any()):
        why = "no parameter has filters" if kind == "filter" else "all parameters are zero"
        raise ModelError(f"the neighbourhood {kind!r} is a single point, for {why}; choose another, such as ball")
    return scale


def checked_radii(radii: Mapping[str, float | Sequence[float]], what: str = "radius") -> dict[str, tuple[float, ...]]:
    """Radii of each neighbourhood, ascending.

    Raises
    ------
    ModelError
        If a neighbourhood is unknown, none is named, a radius is not positive, or the numbers of radii differ.
    """
    if not radii:
        raise ModelError(f"no neighbourhood is named; there are {', '.join(KINDS)}")
    found = {}
    for kind, given in radii.items():
        if kind not in KINDS:
            raise ModelError(f"unknown neighbourhood {kind!r}; there are {', '.join(KINDS)}")
        values = list(given) if isinstance(given, Sequence | np.ndarray) and not isinstance(given, str) else [given]
        if not values:
            raise ModelError(f"no {what} of the {kind} is given; leave {kind} out to leave it out")
        for value in values:
            if not _is_positive(value):
                raise ModelError(f"the {what} of the {kind} is {value!r}; it must be a number above 0")
        found[kind] = tuple(sorted(float(value) for value in values))
    if len({len(values) for values in found.values()}) > 1:
        counts = ", ".join(f"{len(values)} of the {kind}" for kind, values in found.items())
        raise ModelError(f"the numbers of radii differ ({counts}); give as many for each neighbourhood")
    return found


def around(radius: float, n: int) -> tuple[float, ...]:
    """``n`` radii around one, each twice the one before."""
    return tuple(radius * 2.0 ** (i - (n - 1) / 2) for i in range(n))


def direction(kind: str, n: int, index: int, seed: int, like: Tensor) -> Tensor:
    """A random :math:`u` ``(n,)`` for averages: the same normal numbers for all kinds, seeds and indices alike."""
    normal = normal_numbers(n, index, seed, like.device, stream=DIRECTIONS)
    if KINDS[kind].is_box:  # uniform numbers of the same ranks
        normal = torch.erf(normal / math.sqrt(2.0))
    return normal.to(like.dtype)


def _is_positive(value: object) -> bool:
    try:
        return not isinstance(value, str | bytes | bool) and 0 < float(value) < 1e100  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return False
