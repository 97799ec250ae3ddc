"""Vectors for the error that the choice of examples causes, handed on while a spectrum is sampled.

That error takes the quadratic forms of single examples in the leading Ritz vectors, and in random probes of the rest
of the space. Both are by-products of the sampling: nothing here costs a product with the operator.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pnanalysis.arrays import Array
from pnanalysis.spectra.inner_products import add_combinations, combinations, coordinates
from pnanalysis.spectra.lanczos import Lanczos
from pnanalysis.spectra.linear_operator import LinearOperator, empty_columns
from pnanalysis.spectra.sharing import part_of

#: Probes that are handed on at a time, and bytes that they may take: receivers hold several copies of them.
_AT_ONCE, _MOST_BYTES = 5, 2**22
#: Leading vectors that are made at a time in any case: each block of them is another pass over the data.
_FEWEST_LEADING = 4


class Receiver(Protocol):
    """What takes the vectors: see :class:`pnanalysis.spectra.data_error.DataForms`.

    Attributes
    ----------
    n_leading, n_probes : int
        The most leading Ritz vectors, and the most probes, that are of use.
    """

    n_leading: int
    n_probes: int

    def add_leading(self, value: Array, vectors: Iterable[Tensor]) -> None:
        """Ritz values ``(t,)``, descending, the last one the smallest; orthonormal vectors in blocks ``(P, b)``."""
        ...

    def add_probes(self, probe: Tensor, product: Tensor) -> None:
        """Probes ``z`` and their products ``H z``, ``(P, b)`` each; ``E[z z'] = I - U U'``, ``U`` the leading ones."""
        ...


class DataFeed:
    """Hands on the leading Ritz vectors of the first Krylov space, and probes of all that is orthogonal to them.

    A probe is a random combination of the other Ritz vectors of what is deflated, plus a random vector of its
    complement. Its product follows from those vectors' Ritz values and the first step of Lanczos on the random vector,
    up to the coupling of the deflated spaces to the rest.

    Parameters
    ----------
    operator : LinearOperator
        Whose spectrum is sampled.
    receiver : Receiver or None
        Without one, nothing is done.
    seed : int
        Of the random combinations.
    """

    def __init__(self, operator: LinearOperator, receiver: Receiver | None, seed: int) -> None:
        self._receiver, self._n_parameters, self._part = receiver, operator.shape[0], part_of(operator)
        self._generator = np.random.default_rng([seed, 2**32 - 1])
        self._left = 0 if receiver is None else receiver.n_probes
        self._leading: tuple[Array, Tensor] | None = None
        self._spaces: list[tuple[Array, Array, Tensor]] = []

    @property
    def wanted(self) -> bool:
        """Whether there is anything to do."""
        return self._receiver is not None

    def deflated(self, lanczos: Lanczos) -> None:
        """A Krylov space (of a single start vector) has been deflated."""
        if self._receiver is None:
            return
        value, vector = lanczos.ritz_pairs()
        basis = lanczos.basis[0, :, : len(value)]
        if not self._spaces:
            value, vector = self._hand_on_leading(self._receiver, value, vector, basis, lanczos.dtype)
        self._spaces.append((value, vector, basis))

    def plain(self, lanczos: Lanczos) -> None:
        """Lanczos on start vectors among which nothing is deflated: the first gives the leading Ritz vectors."""
        if self._receiver is None:
            return
        if self._leading is None:
            value, vector = lanczos.ritz_pairs()
            basis = lanczos.basis[0, :, : len(value)]
            self._hand_on_leading(self._receiver, value, vector, basis, lanczos.dtype, keep=True)
            # the leading vectors are combinations of the first probe, which is a fair one only by itself
            self._probes(lanczos, list(range(1, lanczos.n_probes)) or [0])
        else:
            self._probes(lanczos, list(range(lanczos.n_probes)))

    def probed(self, lanczos: Lanczos) -> None:
        """Lanczos on start vectors in the complement of all that has been deflated."""
        self._probes(lanczos, list(range(lanczos.n_probes)))

    def exact(self, value: Array, vector: Tensor) -> None:
        """All eigenvalues ``(P,)``, ascending, and eigenvectors ``(P, P)``, whole ones."""
        if self._receiver is None:
            return
        vector = self._part.of(vector)
        rest = self._hand_on_leading(self._receiver, value, np.eye(len(value)), vector, vector.dtype)
        self._spaces.append((*rest, vector))
        while self._left and len(rest[0]):
            self._hand_on(self._receiver, *self._combination(min(self._left, _AT_ONCE), vector))

    def _hand_on_leading(
        self, receiver: Receiver, value: Array, vector: Array, basis: Tensor, dtype: torch.dtype, keep: bool = False
    ) -> tuple[Array, Array]:
        """Returns the other Ritz values and the coordinates of their vectors.

        The leading vectors are kept where later probes are not orthogonal to them.
        """
        n = min(receiver.n_leading, len(value) - 1)
        leading = [*range(len(value) - 1, len(value) - 1 - n, -1), 0]
        if keep:
            whole = _combined(basis, vector[:, leading], dtype)
            self._leading = value[leading], whole
            receiver.add_leading(value[leading], [whole])
        else:
            receiver.add_leading(value[leading], _blocks(basis, vector[:, leading], dtype))
        others = slice(1, len(value) - n)
        return value[others], vector[:, others]

    def _probes(self, lanczos: Lanczos, columns: list[int]) -> None:
        if self._receiver is None:
            return
        columns = columns[: self._left]
        at_once = max(min(_AT_ONCE, _MOST_BYTES // (self._n_parameters * lanczos.dtype.itemsize)), 1)
        for begin in range(0, len(columns), at_once):
            some = columns[begin : begin + at_once]
            scale = (self._n_parameters - lanczos.n_deflated) ** 0.5
            probe, image = self._combination(len(some), lanczos.following)
            start, product = lanczos.first_products(some)
            if self._leading is not None and not self._spaces:  # not deflated: what lies along them is taken off
                value, vector = self._leading
                along = coordinates(vector, start, self._part.add).to(start.dtype)
                start = start - vector @ along
                product = product - vector @ (torch.from_numpy(value).to(along)[:, None] * along)
            probe += start.mul_(scale)
            image += product.mul_(scale)
            del start, product
            self._hand_on(self._receiver, probe, image)
            del probe, image  # before the next ones are made

    def _combination(self, n: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Random combinations ``(P, n)`` of the deflated Ritz vectors that are not leading, and their products."""
        probe, product = (empty_columns(len(like), n, like.dtype, like.device).zero_() for _ in range(2))
        for value, vector, basis in self._spaces:
            signs = self._generator.choice([-1.0, 1.0], size=(len(value), n))
            add_combinations(probe, basis, torch.from_numpy(vector @ signs))
            add_combinations(product, basis, torch.from_numpy(vector @ (value[:, None] * signs)))
        return probe, product

    def _hand_on(self, receiver: Receiver, probe: Tensor, product: Tensor) -> None:
        self._left -= probe.shape[1]
        receiver.add_probes(probe, product)


def _blocks(basis: Tensor, coordinates: Array, dtype: torch.dtype) -> Iterator[Tensor]:
    """Vectors ``(P, c)`` with the given coordinates ``(m, c)`` in a basis, some columns after the other."""
    at_once = max(_FEWEST_LEADING, _MOST_BYTES // max(len(basis) * dtype.itemsize, 1))
    for begin in range(0, coordinates.shape[1], at_once):
        yield _combined(basis, coordinates[:, begin : begin + at_once], dtype)


def _combined(basis: Tensor, coordinates: Array, dtype: torch.dtype) -> Tensor:
    """Vectors ``(P, c)`` with the given coordinates ``(m, c)`` in a basis ``(P, m)``."""
    return combinations(basis, torch.from_numpy(coordinates).to(basis.device, dtype))
