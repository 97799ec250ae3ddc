"""What all curvature operators share: data, parameters, and products batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, RandomSampler

from pnanalysis.curvature.parameters import (
    Named,
    Selection,
    join_tensors,
    requiring_grad,
    select_parameters,
    split_vector,
)
from pnanalysis.curvature.prepared_copy import PRECISIONS, autocast, float32_precision, prepared_copy
from pnanalysis.curvature.regulariser import Regulariser
from pnanalysis.curvature.tracing import Linearisation, Product, Untraceable, rehearse
from pnanalysis.errors import CurvatureError, PnError
from pnanalysis.evaluation.losses import check_targets, example_weights, known, loss_on
from pnanalysis.inputs.batches import as_arguments, batch_size, cut, map_tensors, move
from pnanalysis.inputs.models import Loss, parameter_layers
from pnanalysis.spectra.memory import free_bytes
from pnanalysis.torch_internals import BatchNormBase

_CACHE_SHARE = 0.25  # of the free memory, for what products of a batch share
_TRACE_FROM = 30  # products that pay for a trace


class CurvatureOperator:
    r"""What the three operators share: data, parameters, and products batch by batch.

    The matrix is that of the mean over all examples, :math:`\sum_b (n_b / N) M_b`, so that unequal batches count by
    their size. Where torch's cross-entropies ignore targets or weigh classes, :math:`n_b` is the sum of the weights
    that the mean over a batch divides by: the matrix does not depend on how examples are batched. The model is copied:
    later changes to it, or to its mode, have no effect here, nor has this on it.

    Parameters
    ----------
    model : torch.nn.Module
        Called as ``model(inputs)``, with a tuple as ``model(*inputs)`` and a mapping as ``model(**inputs)``.
    loss_fn : callable
        ``loss_fn(outputs, targets)``, a scalar: the mean over the batch, or its sum.
    batches : re-iterable of (inputs, targets)
        Lists, a ``DataLoader`` without shuffling, :class:`pnanalysis.inputs.data.Batches`...
    params : None, str, Parameter or sequence of these
        See :func:`pnanalysis.curvature.parameters.select_parameters`.
    dtype : torch.dtype, optional
        Cast model and floating-point data to it; the parameters' own by default.
    device : torch.device or str, optional
        Where to compute; the parameters' own by default. Batches are moved as they are read.
    bn_mode : {"eval", "train"}
        Batch normalisation with its running statistics or with each batch's own. All else, dropout for one, is in
        eval mode.
    reduction : {"mean", "sum"}
        What ``loss_fn`` does over the batch; with ``"sum"`` the matrix is that of the summed loss.
    weight_decay : float
        Adds ``weight_decay / 2 * ||theta||^2`` over the chosen parameters to the loss.
    penalty : callable, optional
        ``penalty(model)``, a scalar added to the loss, :class:`trainers.PersistentPenalty` for one.
    micro_batch : int, optional
        Take this many examples at a time; no influence on the result but for round-off.
    amp : {"no", "tf32", "bf16"}
        Passes over the network in TensorFloat-32 (on CUDA), or in bfloat16 under autocast; sums stay in ``dtype``.
    expected_products : int
        How many products are to come, roughly: few do not pay for a trace (see
        :mod:`pnanalysis.curvature.tracing`).

    Raises
    ------
    CurvatureError
        For an empty selection, no data, data that come in a new order on every pass, or batch normalisation in train
        mode on a single example.
    DataError
        For targets that the loss takes, but not as they are meant: see :func:`pnanalysis.evaluation.losses.check_targets`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Loss,
        batches: Iterable[tuple[Any, Any]],
        *,
        params: Selection = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        bn_mode: str = "eval",
        reduction: str = "mean",
        weight_decay: float = 0.0,
        penalty: Callable[[nn.Module], Tensor] | None = None,
        micro_batch: int | None = None,
        amp: str = "no",
        expected_products: int = 1000,
    ) -> None:
        for name, value, choices in (
            ("bn_mode", bn_mode, ("eval", "train")),
            ("reduction", reduction, ("mean", "sum")),
            ("amp", amp, PRECISIONS),
        ):
            if value not in choices:
                raise CurvatureError(f"{name} is {value!r}; it must be {' or '.join(choices)}")
        if micro_batch is not None and bn_mode == "train":
            raise CurvatureError("micro-batches would change the batch statistics of bn_mode='train'; drop one of them")
        self.names = select_parameters(model, params)
        first = model.get_parameter(self.names[0])
        self.dtype = dtype or first.dtype
        self.device = torch.device(device) if device is not None else first.device
        self.model = prepared_copy(model, bn_mode).to(self.device, self.dtype)
        self.loss_fn, self.batches = loss_on(loss_fn, self.device, self.dtype), batches
        self.reduction, self.weight_decay, self.penalty = reduction, weight_decay, penalty
        self.bn_mode, self.micro_batch, self.amp = bn_mode, micro_batch, amp
        self.expected_products = expected_products
        self.n_hvp = 0
        parameters, others = dict(self.model.named_parameters()), dict(self.model.named_buffers())
        self._theta: Named = {name: parameters.pop(name).detach() for name in self.names}
        self._others: Named = {**{name: p.detach() for name, p in parameters.items()}, **others}
        self._shapes = [tensor.shape for tensor in self._theta.values()]
        self.n_parameters = sum(tensor.numel() for tensor in self._theta.values())
        self._regulariser = Regulariser(self.model, self._theta, self._others, weight_decay, penalty)
        self._channels_last = False
        looked_at = [self._look_at(i, batch) for i, batch in enumerate(self._read())]
        self._sizes, self._masses = [size for size, _ in looked_at], [mass for _, mass in looked_at]
        if not self._sizes:
            raise CurvatureError("there are no batches; was the loader an iterator that is used up?")
        if isinstance(batches, DataLoader) and isinstance(batches.sampler, RandomSampler):
            raise CurvatureError("the batches come in a new order on every pass; make the loader with shuffle=False")
        self._finite = torch.ones(len(self._sizes), dtype=torch.bool, device=self.device)
        self._linearisation = Linearisation(self._product, self._rehearse) if expected_products >= _TRACE_FROM else None
        self._cache: dict[int, Product] = {}
        self._cached_bytes = 0
        self._cache_bytes = _CACHE_SHARE * free_bytes(self.device)
        if self.device.type == "cpu" and any(isinstance(module, nn.Conv2d) for module in self.model.modules()):
            self._try_channels_last()

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P)."""
        return self.n_parameters, self.n_parameters

    @property
    def n_examples(self) -> int:
        """Examples over all batches."""
        return sum(self._sizes)

    @property
    def mass(self) -> float:
        """What the mean over all batches divides by: the examples, or the sum of their weights in the loss."""
        return sum(self._masses)

    def matvec(self, v: Tensor) -> Tensor:
        """Product with one vector, ``(P,)`` to ``(P,)``."""
        if v.ndim != 1:
            raise CurvatureError(f"matvec takes a vector of {self.n_parameters} entries, not shape {tuple(v.shape)}")
        return self.matmat(v[:, None])[:, 0]

    def matmat(self, V: Tensor) -> Tensor:
        """Products with ``k`` vectors, ``(P, k)`` to ``(P, k)``; every batch is prepared once for all of them.

        Raises
        ------
        CurvatureError
            If the shape does not fit.
        """
        if V.ndim != 2 or V.shape[0] != self.n_parameters:
            raise CurvatureError(f"matmat takes {self.n_parameters} rows, not shape {tuple(V.shape)}")
        rows = V.T.to(self.device, self.dtype).contiguous()
        vectors = [split_vector(row, self._shapes) for row in rows]
        result = torch.zeros_like(rows)
        with float32_precision(self.amp):
            for i, (weight, product) in enumerate(self._products(vectors[0])):
                for v, into in zip(vectors, result, strict=True):
                    part = join_tensors(product(v)).to(self.dtype)
                    self._finite[i] &= part.sum().isfinite()
                    into.add_(part, alpha=weight)
        self._regulariser.add_products(result, rows)
        self.n_hvp += len(vectors)
        return result.T

    def check_finite(self) -> None:
        """Raise if any product so far was not finite, naming the batch; the one place that waits for the device.

        Raises
        ------
        CurvatureError
        """
        bad = (~self._finite).nonzero().flatten().tolist()
        if bad:
            raise CurvatureError(
                f"the products of batch {bad[0]} (of {len(self._sizes)}) are not finite; look at its data"
            )

    def loss(self) -> float:
        """The loss over all batches, weight decay and penalty included."""
        with torch.no_grad(), float32_precision(self.amp):
            values = [w * float(self._loss(self._fixed(batch), self._theta)) for w, batch in self._weighted()]
            return sum(values) + float(self._regulariser.value(self._theta))

    def gradient(self) -> Tensor:
        """Gradient of the loss over all batches, ``(P,)``."""
        total = torch.zeros(self.n_parameters, dtype=self.dtype, device=self.device)
        with float32_precision(self.amp):
            for weight, batch in self._weighted():
                theta = requiring_grad(self._theta)
                loss = self._loss(self._fixed(batch), theta)
                slope = torch.autograd.grad(loss, list(theta.values()), materialize_grads=True)
                total.add_(join_tensors(slope), alpha=weight)
        return total + self._regulariser.gradient() if self._regulariser else total

    def to_dense(self, chunk: int = 64) -> Tensor:
        """The matrix itself, ``(P, P)``, symmetrised; for small P."""
        eye = torch.eye(self.n_parameters, dtype=self.dtype, device=self.device)
        dense = torch.cat([self.matmat(part.T) for part in eye.split(chunk)], dim=1)
        return (dense + dense.T) / 2

    def per_layer(self) -> Iterator[tuple[str, CurvatureOperator]]:
        """The diagonal blocks, layer by layer: pairs of a layer's name and its operator."""
        for layer, own in parameter_layers(self.model):
            names = [name for name, _ in own if name in self.names]
            if names:
                yield layer, type(self)(
                    self.model, self.loss_fn, self.batches, params=names, dtype=self.dtype, device=self.device,
                    bn_mode=self.bn_mode, reduction=self.reduction, weight_decay=self.weight_decay,
                    penalty=self.penalty, micro_batch=self.micro_batch, amp=self.amp,
                    expected_products=self.expected_products,
                )  # fmt: skip

    # -- one batch ----------------------------------------------------------------------------------------------

    def _product(self, fixed: Any, v: list[Tensor]) -> list[Tensor]:
        """The matrix of one batch times ``v``, by transforms of functions; traced."""
        raise NotImplementedError

    def _direct(self, fixed: Any) -> Product:
        """The same by differentiating a recorded graph twice; for models that cannot be traced, and a few products."""
        raise NotImplementedError

    def _products(self, like: list[Tensor]) -> Iterator[tuple[float, Product]]:
        """For each batch, its weight and its product; those already prepared are used again."""
        if len(self._cache) == len(self._sizes):
            yield from zip(self._weights(), (self._cache[i] for i in range(len(self._sizes))), strict=True)
            return
        for i, (weight, batch) in enumerate(self._weighted()):
            if i in self._cache:
                yield weight, self._cache[i]
                continue
            product, n_bytes = self._prepare(batch, like)
            if n_bytes and self._cached_bytes + n_bytes <= self._cache_bytes:
                self._cache[i] = product
                self._cached_bytes += n_bytes
            yield weight, product

    def _prepare(self, batch: tuple[Any, Any], like: list[Tensor]) -> tuple[Product, int]:
        fixed = self._fixed(batch)
        if self._linearisation is not None:
            try:
                return self._linearisation.at(fixed, like)
            except Untraceable:
                self._linearisation = None
        return self._direct(fixed), 0

    def _rehearse(self, fixed: Any) -> Tensor:
        return self._loss(fixed, fixed[0])

    def _fixed(self, batch: tuple[Any, Any]) -> Any:
        return self._theta, self._others, batch[0], batch[1]

    def _outputs(self, fixed: Any, theta: Named) -> Any:
        _, others, inputs, _ = fixed
        arguments, keywords = as_arguments(inputs)
        with autocast(self.device, self.amp):
            return functional_call(self.model, (theta, others), arguments, keywords)

    def _data_loss(self, fixed: Any, outputs: Any) -> Tensor:
        return self.loss_fn(
            outputs.float() if self.amp == "bf16" and isinstance(outputs, Tensor) else outputs, fixed[3]
        )

    def _loss(self, fixed: Any, theta: Named) -> Tensor:
        return self._data_loss(fixed, self._outputs(fixed, theta))

    # -- all batches --------------------------------------------------------------------------------------------

    def _weighted(self) -> Iterator[tuple[float, tuple[Any, Any]]]:
        yield from zip(self._weights(), self._read(), strict=True)

    def _weights(self) -> list[float]:
        """What each batch's matrix counts in the whole."""
        return [mass / self.mass if self.reduction == "mean" else 1.0 for mass in self._masses]

    def _mass(self, batch: tuple[Any, Any]) -> float:
        """What the mean over a batch divides by."""
        if known(self.loss_fn) is None:
            return float(batch_size(batch))
        return float(example_weights(self.loss_fn, batch[1]).sum())

    def _read(self) -> Iterator[tuple[Any, Any]]:
        for inputs, targets in self.batches:
            batch = move(inputs, self.device, self.dtype), move(targets, self.device, self.dtype)
            if self._channels_last:
                batch = map_tensors(batch, _last)
            size = batch_size(batch)
            if self.micro_batch is None or size <= self.micro_batch:
                yield batch
                continue
            for start in range(0, size, self.micro_batch):
                yield cut(batch, slice(start, start + self.micro_batch))

    def _try_channels_last(self) -> None:
        """Channels last, quicker in oneDNN's convolutions, unless the model takes views that forbid it."""
        fixed = map_tensors(self._fixed(next(self._read())), _last)
        try:
            rehearse(self._rehearse, fixed)
        except Untraceable:
            return
        self._theta, self._others = fixed[:2]
        self._channels_last = True

    def _look_at(self, index: int, batch: tuple[Any, Any]) -> tuple[int, float]:
        """Its examples, and what its mean divides by."""
        size = batch_size(batch)
        if size == 0:
            raise CurvatureError(f"batch {index} is empty; leave it out")
        if size == 1 and self.bn_mode == "train" and any(isinstance(m, BatchNormBase) for m in self.model.modules()):
            raise CurvatureError(
                f"batch {index} holds one example, which has no batch statistics; "
                "use bn_mode='eval' or make the last batch larger (drop_last)"
            )
        mass = self._mass(batch)
        if not mass > 0:
            raise CurvatureError(f"batch {index} has no target that counts in the loss; leave it out")
        if index == 0:
            self._try_out(batch)
        return size, mass

    def _try_out(self, batch: tuple[Any, Any]) -> None:
        """Let network and loss speak up before a trace does: on two examples, on all where these are too few."""
        for part in (cut(batch, slice(0, 2)), batch):
            fixed = self._fixed(part)
            try:
                with float32_precision(self.amp):
                    outputs = self._outputs(fixed, self._theta)
                    check_targets(self.loss_fn, outputs, part[1])
                    self._data_loss(fixed, outputs)
                return
            except PnError:
                raise
            except Exception:  # whatever they raise, said by the caller in one sentence
                if part is batch:
                    raise


def _last(tensor: Tensor) -> Tensor:
    """Images with their channels last in memory; other tensors as they are."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
