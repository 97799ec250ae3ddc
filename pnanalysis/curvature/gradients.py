"""What finite differences are taken of: gradients of the first batch and of all data, in one process or in several."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor, nn

from pnanalysis.curvature.parameters import Named, join_tensors
from pnanalysis.curvature.passes import plain_passes
from pnanalysis.curvature.product_check import check_products, random_direction
from pnanalysis.spectra.sharing import ALONE, Alone

if TYPE_CHECKING:
    from pnanalysis.curvature.base import CurvatureOperator
    from pnanalysis.curvature.finite_differences import FiniteDifferences
    from pnanalysis.curvature.network_loss import LossArguments

T = TypeVar("T")
#: Errors that two products of the same vector may be apart.
_EXPLAINED = 3.0


class Gradients(Protocol):
    """Gradients of a loss; vectors are lists in the shapes of the parameters, or of the parts that a process holds.

    Attributes
    ----------
    theta : list of Tensor
        The parameters.
    noise : float
        Relative round-off of a gradient, roughly.
    advice : str
        What to do where differences mean nothing.
    processes : Alone
        Those that share the data.
    """

    theta: list[Tensor]
    noise: float
    advice: str

    @property
    def processes(self) -> Alone: ...

    def of_first(self, place: list[Tensor]) -> list[Tensor]:
        """Gradient of the first batch."""
        ...

    def of_all(self, places: Sequence[list[Tensor]]) -> list[Tensor]:
        """Gradients of all data, of all processes, at several places: flat vectors."""
        ...

    def random_direction(self) -> list[Tensor]:
        """A random vector of length 1."""
        ...

    def others_length(self) -> float:
        """Norm of all parameters of the network."""
        ...

    def unexplained(self, differences: FiniteDifferences, random: list[Tensor]) -> float:
        """What errors leave unexplained of the difference from exact products, relative to the norm; NaN without."""
        ...

    def from_first_batch(self, compute: Callable[[], float]) -> float:
        """A number that gradients of the first batch give, equal in all processes."""
        ...

    def send(self, part: Tensor) -> None:
        """Overwrite a part of a vector that was computed in :meth:`from_first_batch` by the one that counts."""
        ...

    def add(self, sums: Tensor) -> Tensor:
        """Sums over all entries of vectors, from those over the entries that this process holds."""
        ...

    def largest(self, own: Tensor) -> Tensor:
        """The largest of a number over all entries of vectors."""
        ...

    def is_largest(self, own: float) -> bool:
        """Whether no process has a larger number, or the same and a lower rank."""
        ...

    def decided(self, value: T) -> T:
        """What follows from gradients of the first batch, equal in all that compute it together."""
        ...


class OperatorGradients:
    """Of a curvature operator, whose vectors are whole; in one process, or summed over several.

    Parameters
    ----------
    op : CurvatureOperator
        Over the data of this process.
    processes : Alone
    whole : callable, optional
        Makes the gradient of the data of all processes of that of this one.
    """

    def __init__(
        self, op: CurvatureOperator, processes: Alone = ALONE, whole: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.op, self.processes, self._whole = op, processes, whole
        self.theta = list(op._theta.values())
        self.noise = {"bf16": 4e-3, "tf32": 5e-4}.get(op.amp, torch.finfo(op.dtype).eps)
        other = "" if op.dtype == torch.float64 and op.amp == "no" else "compute in float64, or "
        self.advice = f"{other}take exact products"
        self._first: LossArguments | None = None
        self._cut = op.micro_batch
        self._padding: dict[str, int] | None = None

    def of_first(self, place: list[Tensor]) -> list[Tensor]:
        op = self.op

        def gradient() -> list[Tensor]:
            if self._first is None or self._cut != op.micro_batch:  # it did not fit into memory
                self._cut, (_, _, self._first) = op.micro_batch, next(op._weighted())
            op._draw(0, 0)
            return op._loss.gradient(self._first, self._named(place))

        return op._in_passes_that_fit(gradient)

    def of_all(self, places: Sequence[list[Tensor]]) -> list[Tensor]:
        op = self.op
        named = [self._named(place) for place in places]

        def gradients() -> list[Tensor]:
            totals = [torch.zeros(op.n_parameters, dtype=op.dtype, device=op.device) for _ in places]
            for i, weight, at in op._weighted():
                for place, into in zip(named, totals, strict=True):
                    part = join_tensors(op._loss.gradient(at, place)).to(op.dtype)
                    op._finite[i] &= part.sum().isfinite()
                    into.add_(part, alpha=weight)
            return totals

        totals = op._in_passes_that_fit(gradients)
        return totals if self._whole is None else [self._whole(total) for total in totals]

    def random_direction(self) -> list[Tensor]:
        return random_direction(self.op._theta)

    def others_length(self) -> float:
        others = [p.detach() for p in self.op.model.parameters() if p.is_floating_point()]
        return math.sqrt(sum(float(part.double().square().sum()) for part in others))

    def unexplained(self, differences: FiniteDifferences, random: list[Tensor]) -> float:
        op, few = self.op, self.op._few
        gaps, norms = [], []
        try:
            with plain_passes(op.device, op.amp, True):  # and not the fused kernels that differentiate once
                check, here = check_products(op, few), op._loss.gradient(few, few.theta)
                if math.isnan(check.difference):  # it could not be confirmed
                    return math.nan
                # torch leaves out of a derivative, without a word, what passes a function that is differentiable once
                exact = op._reverse_mode(few) if check.reverse else lambda v: op._forward_mode(few, v)
                for v in (random, differences.turned(random)):
                    product, places = exact(v), (self._moved(v, s) for s in (differences.step, -differences.step))
                    ahead, behind = (op._loss.gradient(few, place) for place in places)
                    size, error = differences.size_and_error(here, ahead, behind, v, differences.step)
                    gap = differences.distance(list(product), differences.product(op, few, v))
                    if not math.isfinite(gap + error):
                        return math.inf
                    gaps.append(max(gap - _EXPLAINED * error, 0.0))
                    norms.append(max(size, differences.distance(list(product), [torch.zeros_like(p) for p in product])))
        except Exception:  # torch lacks the derivative, or there is no memory for it
            return math.nan
        finally:
            self._first = None  # which may be large
        return max(gaps) / max(norms) if max(norms) > 0 else 0.0

    def from_first_batch(self, compute: Callable[[], float]) -> float:
        return self.processes.by_first(compute)

    def send(self, part: Tensor) -> None:
        self.processes.send(part)

    def add(self, sums: Tensor) -> Tensor:
        return sums

    def largest(self, own: Tensor) -> Tensor:
        return own

    def is_largest(self, own: float) -> bool:
        return True

    def decided(self, value: T) -> T:
        return value

    def _named(self, place: list[Tensor]) -> Named:
        named = dict(zip(self.op._theta, place, strict=True))
        if self._padding is None:
            self._padding = self._rows_of_padding()
        for name, row in self._padding.items():
            named[name] = named[name].clone()
            named[name][row] = self.op._theta[name][row]
        return named

    def _rows_of_padding(self) -> dict[str, int]:
        """The rows of embeddings that no gradient sees, by parameter: they must not move, as the loss does see them."""
        op, rows = self.op, {}
        for name, module in op.model.named_modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                rows[f"{name}.weight" if name else "weight"] = module.padding_idx
        rows = {name: row for name, row in rows.items() if name in op._theta}
        if not rows or (first := next(op._weighted(), None)) is None:  # a process may have no data
            return {}
        _, _, at = first
        gradient = dict(zip(op._theta, op._in_passes_that_fit(lambda: op._loss.gradient(at, op._theta)), strict=True))
        used = [name for name, row in rows.items() if bool(gradient[name][row].any())]
        if used:
            warnings.warn(
                f"the vector of padding_idx in {used[0]!r} is used elsewhere, too: finite differences are right only "
                "if the data have no padding; take exact products if they have",
                stacklevel=2,
            )
        return {name: row for name, row in rows.items() if name not in used}

    def _moved(self, v: list[Tensor], step: float) -> Named:
        return self._named([tensor + step * part for tensor, part in zip(self.theta, v, strict=True)])


__all__ = ["Gradients", "OperatorGradients"]
