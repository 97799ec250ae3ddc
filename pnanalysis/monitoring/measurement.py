"""One measurement along training: extreme eigenvalues from where the last ones were, trace, gradients, loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pnanalysis.arrays import Array
from pnanalysis.curvature.batches import Batch
from pnanalysis.curvature.operators import HessianOperator
from pnanalysis.curvature.parameters import select_parameters
from pnanalysis.curvature.prepared_copy import frozen_norms
from pnanalysis.errors import CurvatureError
from pnanalysis.inputs.copies import unwrapped
from pnanalysis.inputs.models import Loss
from pnanalysis.monitoring.critical_sharpness import critical_scale
from pnanalysis.monitoring.example_errors import ExampleErrors
from pnanalysis.monitoring.noise_scale import noise_scale
from pnanalysis.monitoring.preconditioners import (
    PreconditionedOperator,
    Preconditioner,
    read_preconditioner,
    trained_parameters,
    training_groups,
)
from pnanalysis.spectra.inner_products import inner_products, norms
from pnanalysis.spectra.linear_operator import LinearOperator, arithmetic, as_operator
from pnanalysis.spectra.random_vectors import random_signs, random_unit_vectors
from pnanalysis.spectra.restarted import extreme_pairs

#: A measured number, or several.
Record = dict[str, float | Array]
#: A function of the optimizer and the parameters by name, in place of :func:`read_preconditioner`.
Reader = Callable[[torch.optim.Optimizer, Mapping[str, nn.Parameter]], Preconditioner | None]

#: Length of the random part of a start vector, relative to that of the last eigenvectors. It finds eigenvalues that
#: have come to the top since, of which these have no part.
_RANDOM = 0.2
#: How many times the loss is seen with weights moved by their round-off, and how much larger what is believed is.
_NEAR, _SAFE = 3, 4.0
#: Half the distance of two numbers near one in the format of matrix products that keeps 10 bits.
_TENSOR_FLOAT = 2.0**-11
#: So many products pay for a trace of the network.
_MANY = 1000
#: Vectors of the Lanczos basis beyond two for each eigenvalue: from a good start, few products suffice.
_FURTHER = 6


@dataclass(frozen=True)
class Wanted:
    """What to measure, and how well.

    Attributes
    ----------
    top : int
        Eigenvalues of the Hessian.
    trace_probes : int
        Products for the trace; none if 0.
    tolerance : float
        Largest residual of an eigenvalue, relative to the largest magnitude.
    max_hvp : int
        Products for the eigenvalues of one matrix.
    seed : int
    batches : bool
        Whether to find the largest eigenvalue of each batch, too.
    data_error : bool
        Whether to find errors for the choice of examples.
    """

    top: int = 1
    trace_probes: int = 8
    tolerance: float = 0.01
    max_hvp: int = 200
    seed: int = 0
    batches: bool = False
    data_error: bool = True


class Measurement:
    """Measures a network again and again, on the same data.

    Parameters
    ----------
    model : Module
    loss : callable
    batches : re-iterable of (inputs, targets)
    wanted : Wanted
    optimizer : Optimizer
    read : callable
        See :data:`Reader`.
    **options
        Of :class:`pnanalysis.HessianOperator`.
    """

    def __init__(
        self, model: nn.Module, loss: Loss, batches: Iterable[Batch], wanted: Wanted,
        optimizer: torch.optim.Optimizer, read: Reader = read_preconditioner, **options: Any,
    ) -> None:  # fmt: skip
        self.model, self.wanted, self.optimizer, self.read = model, wanted, optimizer, read
        self._params = options.pop("params", None)
        self._knows_reduction = options.keys() & {"reduction", "weight"}
        self._of_parameters = partial(HessianOperator, model, loss, batches, **options)
        self.operator = self._begin()

    def _make_operator(self) -> HessianOperator:
        """The operator of the parameters that are trained now, with batch normalisation as it is now."""
        self._frozen_norms = frozen_norms(unwrapped(self.model))
        return self._of_parameters(params=self._trained if self._params is None else self._params)

    @property
    def _trained(self) -> list[nn.Parameter]:
        return trained_parameters(self.optimizer, unwrapped(self.model))

    def _begin(self) -> HessianOperator:
        """A new operator, and nothing to start from."""
        operator = self._make_operator()
        if operator.reduction == "sum" and not self._knows_reduction:
            raise CurvatureError(
                "the loss is a sum over the examples of a batch, so that the sharpness of a step depends on how many "
                "it takes; give the batches of the training as data and weight='batches', or, where each step takes "
                "all data, reduction='sum'"
            )
        if self.wanted.top >= operator.n_parameters:
            raise CurvatureError(
                f"top is {self.wanted.top}, but there are only {operator.n_parameters} parameters; ask for fewer"
            )
        self._hessian, self._preconditioned = _Tracked(self.wanted), _Tracked(self.wanted)
        self._by_batch: dict[int, _Tracked] = {}
        self.errors = ExampleErrors("" if self.wanted.data_error else "not asked for")
        return operator

    def expect_many_products(self) -> None:
        """From now on, take the time to trace the network, which many products pay for."""
        self._take_weights()
        self._of_parameters = partial(self._of_parameters, expected_products=_MANY)
        self.operator = self._make_operator()

    def _take_weights(self) -> None:
        """Move to the weights that the network has now, with what has been frozen or unfrozen meanwhile."""
        model = unwrapped(self.model)
        moved = self._params is None and select_parameters(model, self._trained) != self.operator.names
        if moved or (model.training and frozen_norms(model) != self._frozen_norms):
            self.operator = self._begin()
        else:
            self.operator.take_weights(self.model)

    def __call__(self, before: Mapping[str, Tensor] | None = None) -> Record:
        """Measure at the weights that the network has now.

        Parameters
        ----------
        before : mapping of str to Tensor, optional
            The parameters before the optimizer's last step, for the critical sharpness.

        Raises
        ------
        CurvatureError
            If the loss or a product is not finite.
        """
        self._take_weights()
        op, wanted = self.operator, self.wanted
        n_before, self.errors.n_forms = op.n_hvp, 0
        try:
            values, residuals = self._hessian.pairs(op, wanted.top)
            record: Record = {"eigenvalue": values, "residual": residuals, "lambda_max": values[0]}
            if wanted.data_error:
                se = self.errors.of_eigenvalues(op, values, self._hessian.vectors)
                record |= {"eigenvalue_se": se, "lambda_max_se": se[0]}
            record["n_parameters"] = float(op.n_parameters)
            record |= self._stability(values[0], residuals[0], record.get("lambda_max_se"))
            if wanted.trace_probes:
                record |= self.errors.trace(op, wanted.trace_probes, wanted.seed)
            record |= self._gradients()
            each = self._batches() if wanted.batches else ()
            record |= {"batch_lambda_max": np.array([value for value, _ in each])} if wanted.batches else {}
            if before is not None:
                record |= self._critical(before)
            n_hvp = op.n_hvp - n_before + self.errors.n_forms + sum(n for _, n in each)
            record |= {"loss_se": self.errors.of_loss(op)} if wanted.data_error else {}
            return record | {"loss": op.loss(), "n_hvp": n_hvp}
        finally:
            op.release()

    def _stability(self, lambda_max: float, residual: float, se: float | Array | None) -> Record:
        """The largest eigenvalue of the preconditioned Hessian beside its threshold, given that of the Hessian."""
        parameters = dict(unwrapped(self.model).named_parameters())
        found = self.read(self.optimizer, parameters)
        if found is None:
            return {}
        record: Record = {"learning_rate": found.learning_rate, "threshold": found.threshold}
        op = self.operator
        # one term, whether the optimizer adds it to the gradient or the monitor was given it, too
        counted = op.weight_decay if any(found.decay.values()) else 0.0
        if found.constant and all(parameters[op.parameter_of(name)].requires_grad for name in op.names):
            moved = lambda_max + next(iter(found.decay.values())) - counted
            record |= {"preconditioned_lambda_max": moved, "preconditioned_residual": residual}
            return record if se is None else record | {"preconditioned_lambda_max_se": se}
        if found.inverse is None:  # before the first step
            return record
        inverse = op.vector_of(found.inverse)
        decay = op.vector_of(
            {name: torch.full_like(tensor, found.decay[name] - counted) for name, tensor in found.inverse.items()}
        )
        moved_operator = PreconditionedOperator(op, inverse, decay)
        values, residuals = self._preconditioned.pairs(moved_operator, 1)
        record |= {"preconditioned_lambda_max": values[0], "preconditioned_residual": residuals[0]}
        if se is None:
            return record
        top = self._preconditioned.vectors[:, :1]  # the preconditioner and the decay are no part of the examples
        value = values[0] - float(inner_products(top, moved_operator.shift * top))
        error = self.errors.of_eigenvalues(op, np.array([value]), moved_operator.root * top)[0]
        return record | {"preconditioned_lambda_max_se": error}

    def _batches(self) -> list[tuple[float, float]]:
        """The largest eigenvalue of each batch, and its products, as parts of one over all data."""
        found = []
        for i, matrix in enumerate(self.operator.batch_matrices()):
            tracked = self._by_batch.setdefault(i, _Tracked(self.wanted))
            found.append((float(tracked.pairs(matrix, 1)[0][0]), matrix))
        return [(value, matrix.n_hvp / len(found)) for value, matrix in found]

    def _critical(self, before: Mapping[str, Tensor]) -> Record:
        """The critical sharpness of the last step, and an interval that it is in."""
        op, parameters = self.operator, dict(unwrapped(self.model).named_parameters())
        groups = training_groups(self.optimizer, parameters) or self.optimizer.param_groups
        rate = max(float(group["lr"]) for group in groups)
        back = op.vector_of(before) - op.vector_of(parameters)  # made with each group's own learning rate
        # each number in its own precision: a step that is lost in their round-off has no direction
        spacing = op.vector_of({name: p.detach() * torch.finfo(p.dtype).eps for name, p in parameters.items()})
        low = high = round_off = np.nan
        if rate > 0 and float(back.norm()) > float(spacing.norm()):
            round_off = self._round_off_of_loss(parameters)
            low, high = critical_scale(lambda scale: op.loss_at((1 - scale) * back), round_off)
        scale = (low * high) ** 0.5
        low, high = 2 / (rate * high) if rate else np.nan, 2 / (rate * low) if rate else np.nan
        value = (low * high) ** 0.5
        record: Record = {
            "critical_sharpness": value, "critical_sharpness_low": low, "critical_sharpness_high": high,
        }  # fmt: skip
        if self.wanted.data_error:
            record["critical_sharpness_se"] = self.errors.of_critical_sharpness(op, back, scale, value, round_off)
        return record

    def _round_off_of_loss(self, parameters: Mapping[str, Tensor]) -> float:
        """By how much the loss may change for nothing: seen where all weights move to the next numbers, up or down."""
        op = self.operator
        eps = _TENSOR_FLOAT if arithmetic(op) == "tf32" else torch.finfo(op.dtype).eps
        near, value = op.vector_of(parameters) * eps, op.loss()
        signs = random_signs(len(near), range(_NEAR), self.wanted.seed, op.device)
        changes = [abs(op.loss_at(near * one) - value) for one in signs.T]
        return _SAFE * max(eps * abs(value), *changes)

    def _gradients(self) -> Record:
        """Norm of the gradient over all data, and the noise scale from those of batches."""
        op = self.operator
        gradient = op.gradient().double()
        record: Record = {"gradient_norm": float(gradient.norm())}
        if self.wanted.data_error:
            record["gradient_norm_se"] = self.errors.of_gradient_norm(op, gradient)
        sizes, weights = np.array(op.batches.sizes, dtype=float), np.array(op.batches.weights)
        if len(sizes) < 2 or not np.allclose(weights, sizes / sizes.sum()):
            return record | {"gradient_noise_scale": np.nan, "gradient_noise_scale_se": np.nan}
        mean = torch.zeros_like(gradient)
        for size, one in zip(sizes, op.batch_gradients(), strict=True):
            mean.add_(one.double(), alpha=size / sizes.sum())
        products = [(float(one.double() @ one.double()), float(one.double() @ mean)) for one in op.batch_gradients()]
        squares, along = np.array(products).T
        noise = noise_scale(sizes, squares, along, float(mean @ mean))
        return record | {"gradient_noise_scale": noise.value, "gradient_noise_scale_se": noise.se}


class _Tracked:
    """The largest eigenvalues of a matrix that changes slowly."""

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self._last: Tensor | None = None

    @property
    def vectors(self) -> Tensor:
        """The last eigenvectors ``(P, k)``, of the largest eigenvalues."""
        assert self._last is not None
        return self._last

    def pairs(self, operator: Any, k: int) -> tuple[Array, Array]:
        """The ``k`` largest eigenvalues, NaN where they have not converged, and the residuals of all."""
        operator, wanted = as_operator(operator), self.wanted
        n_vectors = min(2 * k + _FURTHER, operator.shape[0])
        found = extreme_pairs(
            operator, k, n_vectors=n_vectors, tolerance=wanted.tolerance, max_hvp=wanted.max_hvp, seed=wanted.seed,
            start=self._start(operator),
        )  # fmt: skip
        # by products of their own: the recurrence would not notice if products were not those of one symmetric matrix
        rest = operator.matmat(found.vector) - found.vector * torch.from_numpy(found.value).to(found.vector)
        residual = norms(rest).cpu().numpy().astype(float)
        self._last = found.vector
        value = np.where(residual <= 2 * wanted.tolerance * found.scale, found.value, np.nan)
        short = k - len(value)  # an invariant space of fewer dimensions was found
        return np.pad(value, (0, short), constant_values=np.nan), np.pad(residual, (0, short), constant_values=np.nan)

    def _start(self, operator: LinearOperator) -> Tensor | None:
        if self._last is None:
            return None
        random = random_unit_vectors(operator, [0], self.wanted.seed)
        last = self._last.to(random)
        return torch.cat([last, random * (_RANDOM * last.shape[1] ** 0.5)], dim=1)
