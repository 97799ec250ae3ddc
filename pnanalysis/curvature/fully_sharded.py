"""The Hessian of a network that ``torch.distributed.fsdp.fully_shard`` has sharded, by finite differences.

Each process holds its shard of parameters, directions, gradients and basis vectors; whole layers exist only within
passes over the network, as in training. Second derivatives do not pass through the hooks that gather and scatter there,
so that products are differences of gradients (:mod:`pnanalysis.curvature.finite_differences`), with errors that are
measured and stated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from pnanalysis.curvature.batch_weights import BatchWeights, Weight
from pnanalysis.curvature.batches import NOTHING_COUNTS, Batch, WeightedBatches
from pnanalysis.curvature.finite_differences import FiniteDifferences
from pnanalysis.curvature.parameters import Selection, join_tensors, select_parameters
from pnanalysis.curvature.processes import Processes
from pnanalysis.errors import CurvatureError
from pnanalysis.evaluation.forward import forward
from pnanalysis.evaluation.losses import loss_on
from pnanalysis.inputs.batches import tensors
from pnanalysis.inputs.models import Loss
from pnanalysis.spectra.linear_operator import ROUND_OFF, dense_matrix
from pnanalysis.spectra.random_vectors import random_unit_vectors
from pnanalysis.spectra.sharing import Part

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

T = TypeVar("T")
#: Steps along the gradient over which the loss is compared with it, relative to the parameters, and the largest
#: relative difference that curvature may explain.
_STEPS, _TOLERANCE = (1e-2, 1e-3, 1e-4), 0.05


class FullyShardedHessian:
    """The Hessian of the mean loss over the data of all processes, for a network sharded with ``fully_shard``.

    The network is not copied: passes run on it, in eval mode, and weights, gradients and modes are afterwards what they
    were. All methods are called by all processes.

    Parameters
    ----------
    model : torch.nn.Module
        All of whose chosen parameters are sharded along their first dim, over one mesh with one dim.
    loss_fn : callable
        ``loss_fn(outputs, targets)``, the mean over a batch.
    batches : re-iterable of (inputs, targets)
        Those of this process. Processes may have different numbers of batches and examples.
    params : optional
        The parameters that span the matrix; see :func:`pnanalysis.curvature.parameters.select_parameters`.
    weight : "examples", "batches" or callable, optional
        What a batch weighs, where the loss is not one of torch's own; see :class:`pnanalysis.HessianOperator`.
    weight_decay : float
        Adds ``weight_decay / 2 * ||theta||^2`` over the chosen parameters to the loss.

    Attributes
    ----------
    shape : tuple of int
        ``(P, P)``, of the whole matrix. Vectors are the entries ``(p, k)`` of this process.
    part : Part
        Which these are. A whole vector has the parameters one after the other, as for any other operator.
    differences : FiniteDifferences
        Step and errors.

    Raises
    ------
    CurvatureError
        If there is no process group, parameters are not sharded in this way, it is not known what batches weigh, no
        step gives products that mean anything, or gradients are not those of the mean loss.

    Examples
    --------
    Under ``torchrun``::

        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
        ds = pn.spectral_density(FullyShardedHessian(model, F.cross_entropy, own_batches), n_hvp=100)
    """

    by_differences = True

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Loss,
        batches: Iterable[Batch],
        *,
        params: Selection = None,
        weight: Weight = None,
        weight_decay: float = 0.0,
    ) -> None:
        self.model, self.weight_decay = model, weight_decay
        self._reshard()
        self.names = select_parameters(model, params)
        self._parameters: list[DTensor] = [_sharded(model, name) for name in self.names]
        first = self._parameters[0]
        mesh = first.device_mesh
        self.processes = Processes(mesh.get_group())
        if any(parameter.device_mesh != mesh or parameter.dtype != first.dtype for parameter in self._parameters):
            raise CurvatureError("the parameters are sharded over several meshes, or of several dtypes; choose params")
        self._local = [parameter.to_local().detach() for parameter in self._parameters]
        self.device, self.dtype = self._local[0].device, self._local[0].dtype
        self.arithmetic = str(self.dtype).removeprefix("torch.")
        n_parameters = sum(parameter.numel() for parameter in self._parameters)
        self.shape = n_parameters, n_parameters
        self.part = self._own_part()
        self.is_first, self.n_processes = self.processes.is_first, self.processes.n
        place = (
            torch.device(mesh.device_type, torch.cuda.current_device()) if mesh.device_type == "cuda" else self.device
        )
        self.loss_fn = loss_on(loss_fn, place, self.dtype)
        self.batches = self.processes.by_all(lambda: self._read(batches, place, weight))
        self._divisors = self.processes.gathered([divisor for divisor in self.batches.divisors if divisor])
        if not any(self._divisors):
            raise CurvatureError(NOTHING_COUNTS)
        self.n_hvp = 0
        gradients = _ShardGradients(self)
        gradients.check()
        self.differences = FiniteDifferences(gradients)

    @property
    def n_examples(self) -> int:
        """Number of examples in all processes."""
        return sum(self.processes.gathered(sum(self.batches.sizes)))

    @property
    def round_off(self) -> float:
        """Error of the products so far, relative to the norm of the matrix."""
        return max(ROUND_OFF[self.arithmetic], self.differences.round_off)

    def note_error(self, error: float) -> None:
        """Count the error of products that other processes made before."""
        self.differences.earlier = max(self.differences.earlier, error)

    def matvec(self, v: Tensor) -> Tensor:
        """Product with one vector, ``(p,)`` to ``(p,)``."""
        return self.matmat(v[:, None])[:, 0]

    def matmat(self, V: Tensor) -> Tensor:
        """Products with ``k`` vectors, ``(p, k)`` to ``(p, k)``, one after the other.

        Raises
        ------
        CurvatureError
            If the shape does not fit.
        """
        if V.ndim != 2 or V.shape[0] != self.part.length:
            raise CurvatureError(f"matmat takes this process's {self.part.length} rows, not shape {tuple(V.shape)}")
        V = V.to(self.device, self.dtype)
        result = self.differences.products(V)
        self.n_hvp += V.shape[1]
        return result.add_(V, alpha=self.weight_decay)

    def to_dense(self, chunk: int = 64) -> Tensor:
        """The matrix itself, ``(P, P)``, symmetrised, in every process; for small ``P``."""
        return dense_matrix(self, chunk)

    def gradient(self) -> Tensor:
        """This process's entries ``(p,)`` of the gradient, weight decay included."""
        gradient = join_tensors(self.sum_of_gradients(self._local))
        return gradient.add_(join_tensors(self._local), alpha=self.weight_decay)

    def loss(self) -> float:
        """The loss over the data of all processes, weight decay included."""
        squares = torch.stack([tensor.double().square().sum() for tensor in self._local]).sum()
        return self.loss_at(self._local) + self.weight_decay / 2 * float(self.part.add(squares))

    def sum_of_gradients(self, place: Sequence[Tensor], only_first: bool = False) -> list[Tensor]:
        """This process's part of the gradient of the loss over all data, or over each process's first batch."""
        with self._at(place):
            for share, batch in self._in_step(only_first):
                # passes end with the mean over all processes of their gradients
                loss = self._loss(batch) * (share * self.n_processes) if share else self._nothing(batch)
                loss.backward()  # type: ignore[no-untyped-call]
            return [_local_gradient(parameter) for parameter in self._parameters]

    def loss_at(self, place: Sequence[Tensor]) -> float:
        """The loss over all data elsewhere, without weight decay."""
        with self._at(place), torch.no_grad():
            own = [
                share * float(self._loss(batch)) if share else float(self._nothing(batch))
                for share, batch in self._in_step(False)
            ]
        return sum(self.processes.gathered(sum(own)))

    def _loss(self, batch: Batch) -> Tensor:
        inputs, targets = batch
        value: Tensor = self.loss_fn(forward(self.model, inputs), targets)
        return value

    def _nothing(self, batch: Batch) -> Tensor:
        """Zero, by a pass of which all processes are a part; the loss itself may be 0 / 0."""
        outputs = [output for output in tensors(forward(self.model, batch[0])) if output.is_floating_point()]
        return torch.stack([output.sum() for output in outputs]).sum() * 0

    def _in_step(self, only_first: bool) -> Iterator[tuple[float, Batch]]:
        """Batches that count and their weights, as many in all processes: those with fewer add one of weight zero."""
        total = sum(sum(own[:1] if only_first else own) for own in self._divisors)
        n = 1 if only_first else max(len(own) for own in self._divisors)
        n_own = min(len(self.batches.counting), n)
        for i, _, batch in islice(self.batches.weighted(), n_own):
            yield self.batches.divisors[i] / total, batch
        if n_own < n:
            any_batch = next(iter(self.batches))
            yield from [(0.0, any_batch)] * (n - n_own)

    @contextmanager
    def _at(self, place: Sequence[Tensor]) -> Iterator[None]:
        """Run passes with other weights; afterwards all is as before."""
        modes = [(module, module.training) for module in self.model.modules()]
        slopes = [(parameter, parameter.grad) for parameter in self.model.parameters()]
        moves = place is not self._local
        kept = [tensor.clone() for tensor in self._local] if moves else []
        try:
            self.model.eval()
            for parameter, _ in slopes:
                parameter.grad = None
            if moves:
                _copy(self._local, place)
            yield
        finally:
            self._reshard()
            _copy(self._local, kept)
            for module, training in modes:
                module.training = training
            for parameter, slope in slopes:
                parameter.grad = slope

    def _reshard(self) -> None:
        """Let go of whole parameters that passes have kept, for they would be used again instead of the shards."""
        from torch.distributed.fsdp import FSDPModule

        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _own_part(self) -> Part:
        """Where the rows of this process lie in a whole vector."""
        rows = [local.shape[0] for local in self._local]
        by_rank = self.processes.gathered(rows)
        ranges, offset = [], 0
        for i, parameter in enumerate(self._parameters):
            size = parameter.numel() // max(parameter.shape[0], 1)
            begin = offset + size * sum(each[i] for each in by_rank[: self.processes.rank])
            if rows[i]:
                ranges.append((begin, begin + size * rows[i]))
            offset += parameter.numel()
        largest = max(self.processes.gathered(sum(end - begin for begin, end in ranges)))
        return Part(tuple(ranges), self.processes, largest)

    def _read(self, batches: Iterable[Batch], device: torch.device, weight: Weight) -> WeightedBatches:
        def no_pass(*_: Any) -> Any:
            raise AssertionError("passes run in all processes at once")

        weights = BatchWeights(self.loss_fn, weight, self.dtype, no_pass, no_pass, no_pass)
        if weights.measures:
            raise CurvatureError(
                "it is not known what batches weigh in a loss of your own; give weight='examples', weight='batches', "
                "or a function weight(inputs, targets)"
            )
        read = WeightedBatches(batches, device, self.dtype, None, "mean")
        read.inspect(lambda _: None, weights, lambda _: None, needs_statistics=False, is_part=True)
        return read


class _ShardGradients:
    """What :class:`FiniteDifferences` takes; all processes compute together, and each has its part of every vector."""

    def __init__(self, op: FullyShardedHessian) -> None:
        self.op, self.processes = op, op.processes
        self.theta = [tensor.clone() for tensor in op._local]
        self.noise = torch.finfo(op.dtype).eps
        self.advice = "compute in float64" if op.dtype != torch.float64 else "look for jumps of the gradient"

    def check(self) -> None:
        """Refuse gradients that are not those of the loss, through a factor of one's own in the sums of FSDP, say.

        Raises
        ------
        CurvatureError
        """
        op = self.op
        gradient = op.sum_of_gradients(op._local)
        squares = [
            torch.stack([part.double().square().sum() for part in parts]).sum() for parts in (gradient, self.theta)
        ]
        slope, size = (math.sqrt(float(self.add(square))) for square in squares)
        if not slope > 0:
            return
        unit, gaps = [part / slope for part in gradient], []
        for relative in _STEPS:
            step = relative * (size or 1.0)
            ahead, behind = (
                op.loss_at([tensor + s * part for tensor, part in zip(self.theta, unit, strict=True)])
                for s in (step, -step)
            )
            gap = abs((ahead - behind) / (2 * step) / slope - 1) - 10 * self.noise * abs(ahead) / step / slope
            gaps.append(gap)
        if self.decided(not min(gaps) < _TOLERANCE):
            raise CurvatureError(
                "the gradients of the sharded network are not those of the mean loss: the loss changes along them by "
                f"{1 + min(gaps):.2f} times as much; look at the factor by which FSDP divides gradients, at mixed "
                "precision and at hooks"
            )

    def of_first(self, place: list[Tensor]) -> list[Tensor]:
        return self.op.sum_of_gradients(place, only_first=True)

    def of_all(self, places: Sequence[list[Tensor]]) -> list[Tensor]:
        return [join_tensors(self.op.sum_of_gradients(place)) for place in places]

    def random_direction(self) -> list[Tensor]:
        flat = random_unit_vectors(self.op, [0], seed=2**32 - 2)[:, 0]
        shapes = [tensor.shape for tensor in self.theta]
        parts = torch.split(flat, [shape.numel() for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def others_length(self) -> float:
        local = [getattr(p, "to_local", lambda p=p: p)().detach() for p in self.op.model.parameters()]
        squares = torch.stack([tensor.double().square().sum() for tensor in local if tensor.is_floating_point()]).sum()
        return math.sqrt(float(self.add(squares)))

    def unexplained(self, differences: FiniteDifferences, random: list[Tensor]) -> float:
        return float("nan")  # there are no exact products

    def from_first_batch(self, compute: Callable[[], float]) -> float:
        return compute()

    def send(self, part: Tensor) -> None:
        """All have computed their part."""

    def add(self, sums: Tensor) -> Tensor:
        return self.op.part.add(sums)

    def largest(self, own: Tensor) -> Tensor:
        return own.new_tensor(max(self.processes.gathered(float(own))))

    def is_largest(self, own: float) -> bool:
        found = self.processes.gathered(own)
        return found.index(max(found)) == self.processes.rank

    def decided(self, value: T) -> T:
        return self.processes.decided(value)


def _sharded(model: nn.Module, name: str) -> DTensor:
    """A parameter that is sharded along its first dim."""
    from torch.distributed.tensor import DTensor, Shard

    parameter: Any = model.get_parameter(name)
    if not isinstance(parameter, DTensor):
        raise CurvatureError(f"parameter {name!r} is not sharded; call fully_shard(model) last, on the whole network")
    if parameter.placements != (Shard(0),):
        raise CurvatureError(
            f"parameter {name!r} is placed by {parameter.placements}; the Hessian takes parameters that are sharded "
            "along their first dim, over a mesh with one dim"
        )
    if parameter.is_complex():
        raise CurvatureError(f"parameter {name!r} is complex, and the Hessian of sharded networks takes real ones")
    return parameter


def _local_gradient(parameter: DTensor) -> Tensor:
    local = parameter.to_local()
    if parameter.grad is None:
        return torch.zeros_like(local)
    gradient: Any = parameter.grad
    found: Tensor = gradient.to_local().detach().to(local.dtype)
    return found


def _copy(into: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for own, tensor in zip(into, tensors, strict=False):
            own.copy_(tensor)


__all__ = ["FullyShardedHessian"]
