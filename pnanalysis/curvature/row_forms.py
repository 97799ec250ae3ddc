"""Forms of the matrices of a batch's single examples, along many pairs of directions.

Where passes over the network are long they are computed by a traced program, in which what does not depend on the
directions is computed once, as with products. Where they are short, calling torch's functions takes longer than what
these compute, and tracing them longer still: many directions then share a pass.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils.flop_counter import FlopCounterMode

from pnanalysis.curvature.network_loss import LossArguments
from pnanalysis.curvature.product_check import tolerance
from pnanalysis.curvature.tracing import Linearisation, Product, Untraceable
from pnanalysis.inputs.batches import batch_size

if TYPE_CHECKING:
    from pnanalysis.curvature.base import CurvatureOperator

#: Operations of a forward pass over all data from which on a trace saves more than it takes, with some tens of forms.
_OPERATIONS_TO_TRACE = 2e8
#: Shapes of batches that are traced.
_TRACED_SHAPES = 4
#: Directions that share a pass, and bytes that these may take: a pass holds several copies of them, and calls take
#: little time beside what long directions do.
_AT_ONCE, _MOST_BYTES = 16, 2**23

Direction = list[Tensor]
#: Two directions; one and the same where they are equal, which takes fewer operations.
Pair = tuple[Direction, Direction]


class Forms(Protocol):
    """The terms that the units of a batch add to the forms of its matrix, ``(k, n)``."""

    def __call__(self, pairs: Sequence[Pair]) -> Tensor: ...


def row_forms(op: CurvatureOperator) -> MappedForms | TracedForms:
    """The faster of two ways of computing the forms of an operator's examples."""
    small = _operations(op) < _OPERATIONS_TO_TRACE
    return MappedForms(op, small) if small or op._traces is None else TracedForms(op)


class MappedForms:
    """Along many directions in one pass, where that is asked for, and right.

    Parameters
    ----------
    op : CurvatureOperator
    maps : bool
        Whether directions share passes.
    """

    def __init__(self, op: CurvatureOperator, maps: bool) -> None:
        self.op = op
        self._at_once = min(_AT_ONCE, _MOST_BYTES // (op.n_parameters * op.dtype.itemsize))
        self._maps = maps and self._at_once > 1
        self._verified: set[bool] = set()

    def need_no_data(self, pairs: Sequence[Pair]) -> bool:
        """Whether these forms can be had without the data."""
        return False

    def __call__(self, i: int, at: Any, pairs: Sequence[Pair]) -> Tensor:
        """Those of batch ``i``, ``(k, n)``."""
        found: dict[int, Tensor] = {}
        for one in (True, False):
            places = [j for j, (u, v) in enumerate(pairs) if (u is v) == one]
            found.update(zip(places, self._along(at, [pairs[j] for j in places], one), strict=True))
        return torch.stack([found[j] for j in range(len(pairs))])

    def _along(self, at: LossArguments, pairs: Sequence[Pair], one: bool) -> Sequence[Tensor]:
        """Along one direction each, or along two."""
        if len(pairs) > 1 and self._maps:
            try:
                mapped = self._mapped(at, pairs, one)
                if one in self._verified or self._is_right(at, mapped[-1], pairs[-1]):
                    self._verified.add(one)
                    return mapped.unbind()
            except torch.OutOfMemoryError:
                raise
            except Exception:  # vmap cannot map all that can be differentiated
                pass
            self._maps = False
        return [self.op._row_forms(at, u, v) for u, v in pairs]

    def _mapped(self, at: LossArguments, pairs: Sequence[Pair], one: bool) -> Tensor:
        starts = range(0, len(pairs), self._at_once)
        return torch.cat([self._in_one_pass(at, pairs[i : i + self._at_once], one) for i in starts])

    def _in_one_pass(self, at: LossArguments, pairs: Sequence[Pair], one: bool) -> Tensor:
        first, second = zip(*pairs, strict=True)
        u = [torch.stack(parts) for parts in zip(*first, strict=True)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # vmap names operations that it repeats in a loop
            if one:
                return vmap(lambda u: self.op._row_forms(at, u, u))(u)
            v = [torch.stack(parts) for parts in zip(*second, strict=True)]
            return vmap(partial(self.op._row_forms, at))(u, v)

    def _is_right(self, at: LossArguments, found: Tensor, pair: Pair) -> bool:
        expected = self.op._row_forms(at, *pair)
        return close(found, expected, expected, tolerance(self.op.dtype, self.op.amp))


class TracedForms:
    """By traced programs, which are compared with untraced passes before they are used.

    Parameters
    ----------
    op : CurvatureOperator
    """

    def __init__(self, op: CurvatureOperator) -> None:
        self.op = op
        self._linearisations = {one: Linearisation(partial(self._function, one), op._rehearse) for one in (True, False)}
        self._shapes = {shapes for shapes, _ in Counter(op.batches.shapes).most_common(_TRACED_SHAPES)}
        self._verified: set[Any] = set()
        self._kept: dict[tuple[int, bool], Product] = {}
        self._failed = False

    def need_no_data(self, pairs: Sequence[Pair]) -> bool:
        """Whether these forms can be had without the data."""
        return all((i, u is v) in self._kept for i in self.op.batches.counting for u, v in pairs)

    def __call__(self, i: int, at: LossArguments | None, pairs: Sequence[Pair]) -> Tensor:
        """Those of batch ``i``, ``(k, n)``."""
        programs: dict[bool, Product] = {}
        found = []
        for u, v in pairs:
            one, given = (True, u) if u is v else (False, u + v)
            if one not in programs:
                programs[one] = self._kept.get((i, one)) or self._program(i, at, one, given)
            found.append(programs[one](given)[0])
        return torch.stack(found)

    def _function(self, one: bool, at: Any, given: Sequence[Tensor]) -> list[Tensor]:
        u = list(given if one else given[: len(given) // 2])
        with self.op._passes():  # the trace runs in a thread of its own, which some of the settings do not reach
            return [self.op._row_forms(at, u, u if one else list(given[len(u) :]))]

    def _program(self, i: int, at: Any, one: bool, given: Direction) -> Product:
        op, shapes = self.op, self.op.batches.shapes[i]
        untraced = partial(self._function, one, at)
        if self._failed or shapes not in self._shapes:
            return untraced
        try:
            program, n_bytes = self._linearisations[one].at(at, given)
            if (shapes, one) not in self._verified:
                expected = untraced(given)[0]
                if not close(program(given)[0], expected, expected, tolerance(op.dtype, op.amp)):
                    raise Untraceable("it differs from the untraced one")
                self._verified.add((shapes, one))
        except Untraceable:
            self._failed = True  # the next batch would fail the same way
            return untraced
        if op._cached_bytes + n_bytes <= op._cache_bytes:
            self._kept[i, one] = program
            op._cached_bytes += n_bytes
        return program


def close(one: Tensor, other: Tensor, forms: Tensor, slack: float) -> bool:
    """Whether terms are equal up to round-off, relative to the sizes of all terms."""
    return float((one - other).abs().sum()) <= slack * float(forms.abs().sum())


def _operations(op: CurvatureOperator) -> float:
    """Floating-point operations of a forward pass over all data, of those that torch counts."""
    few = op._few
    try:
        with FlopCounterMode(display=False) as counter:
            op._loss_at_theta(few)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a user's network may not run under a counter
        return 0.0
    return float(counter.get_total_flops()) * op.n_examples / batch_size((few.inputs, few.targets))


__all__ = ["Direction", "Forms", "MappedForms", "Pair", "TracedForms", "close", "row_forms"]
