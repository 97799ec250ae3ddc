"""Products by traced programs: traced where that pays, and compared with untraced ones before they are used."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pnanalysis.curvature.batches import Shapes, shapes_of
from pnanalysis.curvature.network_loss import LossArguments
from pnanalysis.curvature.product_check import in_double, largest_difference, random_direction, tolerance
from pnanalysis.curvature.tracing import Product, Untraceable

if TYPE_CHECKING:
    from pnanalysis.curvature.base import CurvatureOperator

#: Shapes of batches that are traced without asking whether it pays: which those are must not depend on timings, on
#: which roundoff would then depend.
_ALWAYS = 4
#: A further trace has to pay within this fraction of the products to come, whose number is a guess.
_PATIENCE = 0.1
#: A traced product may be this many times as far from the one in float64 as an untraced product is.
_WORSE = 10.0


class TracedProducts:
    """Traced programs of an operator, by the shapes of batches.

    Parameters
    ----------
    op : CurvatureOperator
    """

    def __init__(self, op: CurvatureOperator) -> None:
        self.op = op
        self._counts = Counter(op.batches.shapes)
        self._always = {shapes for shapes, _ in self._counts.most_common(_ALWAYS)}
        self._verified: set[Shapes] = set()
        self._seconds_to_trace, self._seconds_saved = 0.0, 0.0
        self._failed = False

    def at(self, at: LossArguments, like: list[Tensor]) -> tuple[Product, int] | None:
        """The product with the matrix of one batch, and the bytes that it keeps; ``None`` if it is not to be traced."""
        shapes = shapes_of((at.inputs, at.targets))
        if self._failed or not (shapes in self._verified or self._pays(shapes)):
            return None
        start = time.perf_counter()
        try:
            product, n_bytes = self.op.linearisation.at(at, like)
            if shapes not in self._verified:
                self._seconds_to_trace = time.perf_counter() - start
                self._verify(at, product)
                self._verified.add(shapes)
        except Untraceable as error:
            self._failed = True  # the next batch would fail the same way
            if self.op.compile:
                warnings.warn(f"products are not compiled, as they cannot be traced: {error}", stacklevel=2)
            return None
        return product, n_bytes

    @property
    def n_programs(self) -> int:
        """How many have been traced and verified."""
        return len(self._verified)

    def _pays(self, shapes: Shapes) -> bool:
        if shapes in self._always or not self._verified:
            return True
        saved = self.op.expected_products * self._counts[shapes] * self._seconds_saved
        return self._seconds_to_trace < _PATIENCE * saved

    def _verify(self, at: LossArguments, product: Product) -> None:
        """Compare one product with an untraced one.

        Raises
        ------
        Untraceable
            If they differ.
        """
        op, v = self.op, random_direction(at.theta)
        start = time.perf_counter()
        reference = [part.detach() for part in op._untraced(at)(v)]
        _wait(op.device)
        between = time.perf_counter()
        traced = product(v)
        _wait(op.device)
        self._seconds_saved = max(2 * between - start - time.perf_counter(), 0.0)
        difference, where = largest_difference(traced, reference, op.names)
        if difference <= tolerance(op.dtype, op.amp) or self._explained_by_roundoff(at, v, traced, reference):
            return
        warnings.warn(
            f"the traced product of {type(op).__name__} differs from the untraced one by {difference:.2g}, most at "
            f"{where!r}; products are computed without tracing",
            stacklevel=2,
        )
        raise Untraceable(f"it differs at {where!r}")

    def _explained_by_roundoff(
        self, at: LossArguments, v: list[Tensor], traced: list[Tensor], untraced: list[Tensor]
    ) -> bool:
        """Whether the traced product is about as close to the one in float64 as the untraced one is."""
        doubled = None if self.op.dtype == torch.float64 else in_double(self.op, at, v)
        if doubled is None:
            return False
        twin, there, w = doubled
        exact = [part.detach() for part in twin._untraced(there)(w)]
        errors = [largest_difference(product, exact, self.op.names)[0] for product in (traced, untraced)]
        return errors[0] <= _WORSE * errors[1]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
