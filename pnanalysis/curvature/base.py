"""What all curvature operators share: parameters, products summed over batches, gradient, loss and layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy
from functools import partial
from typing import Self, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from pnanalysis.arrays import Array
from pnanalysis.checks import resolve_dtype
from pnanalysis.curvature.batch_matrix import BatchMatrix
from pnanalysis.curvature.batch_weights import BatchWeights, Weight
from pnanalysis.curvature.batches import Batch, WeightedBatches, takes_batch_statistics
from pnanalysis.curvature.blocks import Block
from pnanalysis.curvature.example_forms import EXAMPLES as EXAMPLE_UNIT
from pnanalysis.curvature.example_forms import ExampleForms
from pnanalysis.curvature.example_subset import ExampleSubset
from pnanalysis.curvature.finite_differences import FiniteDifferences
from pnanalysis.curvature.first_look import first_look
from pnanalysis.curvature.gradients import OperatorGradients
from pnanalysis.curvature.network_loss import LossArguments, NetworkLoss
from pnanalysis.curvature.own_examples import OwnExamples
from pnanalysis.curvature.parameters import (
    Named,
    Selection,
    join_tensors,
    select_unwrapped,
    split_vector,
)
from pnanalysis.curvature.passes import PRECISIONS, plain_passes
from pnanalysis.curvature.prepared_copy import in_place_activations, prepared_copy
from pnanalysis.curvature.product_check import ProductCheck, check_products
from pnanalysis.curvature.programs import Batches, Program, sharing_calls
from pnanalysis.curvature.regulariser import Regulariser
from pnanalysis.curvature.smaller_passes import until_it_fits
from pnanalysis.curvature.traced_products import TracedProducts
from pnanalysis.curvature.tracing import Linearisation, Product
from pnanalysis.errors import CurvatureError
from pnanalysis.evaluation.forward import prediction
from pnanalysis.evaluation.losses import class_scores, loss_on
from pnanalysis.inputs.batches import move
from pnanalysis.inputs.copies import as_real, in_precision, unwrapped
from pnanalysis.inputs.models import Loss, parameter_layers
from pnanalysis.inputs.random_states import random_states_kept
from pnanalysis.spectra.free_memory import free_bytes
from pnanalysis.spectra.linear_operator import ROUND_OFF, contiguous_columns, dense_matrix
from pnanalysis.spectra.random_vectors import random_signs

T = TypeVar("T")
#: How products may be computed.
METHODS = ("exact", "finite_difference")
#: Fraction of the free memory for what is kept of each batch between products.
_CACHE_FRACTION = 0.25
#: Tracing takes the time of some tens of products; with fewer to come it is not worth it.
_FEWEST_PRODUCTS_TO_TRACE = 30


class CurvatureOperator:
    r"""A curvature matrix of a loss over data, as a symmetric operator on the chosen parameters.

    The matrix is the one of the mean loss over all examples, :math:`\sum_b (n_b / N) M_b`: unequal batches count by
    their size. Where one of torch's cross-entropies ignores targets or weights classes, :math:`n_b` is the sum of
    weights that the mean over batch ``b`` divides by, so that the matrix does not depend on how the examples are
    batched. The operator works on a copy of the model: neither sees later changes to the other.

    Parameters
    ----------
    model : torch.nn.Module
        Called as ``model(inputs)``; as ``model(*inputs)`` if the inputs are a tuple, and ``model(**inputs)`` if they
        are a mapping.
    loss_fn : callable
        ``loss_fn(outputs, targets)``, a scalar: the mean over the batch, or its sum (see ``reduction``).
    batches : re-iterable of (inputs, targets)
        A list, a ``DataLoader`` without shuffling, :class:`pnanalysis.inputs.data.Batches`, ... It is read once per
        product unless the batches fit in memory, and must give the same batches every time.
    params : None, str, Parameter or sequence of these
        The parameters that span the matrix: all trainable ones by default, or layers, names or patterns. See
        :func:`pnanalysis.curvature.parameters.select_parameters`.
    dtype : torch.dtype or str, optional
        Precision of the model and of floating-point data; that of the first chosen parameter by default.
    device : torch.device or str, optional
        Where to compute; where the first chosen parameter is by default. Batches are moved there as they are read.
    bn_mode : {"eval", "train"}
        Batch normalisation with its running statistics, or as in a training step: with the statistics of each batch,
        but for layers in eval mode in a network in train mode, which are frozen. All other layers (dropout, for
        example) are in eval mode.
    reduction : {"mean", "sum"}
        What ``loss_fn`` does over the batch. With ``"sum"`` the matrix is that of the summed loss. A loss that turns
        out to be a sum is treated as one.
    weight : None, "examples", "batches" or callable, optional
        What a batch weighs in the mean over all data: its examples, 1, or ``weight(inputs, targets)``. By default what
        torch's own losses divide by; for all others it is measured (see
        :mod:`pnanalysis.curvature.batch_weights`), and refused where that leaves a choice.
    draws : int, optional
        For a network or loss that draws random numbers in eval mode: the mean over this many draws for each batch, by
        seeds that are the same in every product. By default such a network is refused.
    weight_decay : float
        Adds ``weight_decay / 2 * ||theta||^2`` over the chosen parameters to the loss.
    penalty : callable, optional
        ``penalty(model)``, a scalar that is added to the loss; :class:`trainers.PersistentPenalty`, for example.
    micro_batch : int, optional
        Examples per pass over the network, to save memory. Changes the result by roundoff only.
    amp : {"no", "tf32", "bf16"}
        Passes over the network in full precision, in TensorFloat-32 (on CUDA), or in bfloat16 under autocast.
        Sums over batches stay in ``dtype``.
    method : {"exact", "finite_difference"}
        Exact products, or for the Hessian differences of the gradient, which need no second derivative: see
        :mod:`pnanalysis.curvature.finite_differences`. :attr:`differences` then says how far they are off.
    expected_products : int
        Roughly how many products are to come. Below 30 the network is not traced (see
        :mod:`pnanalysis.curvature.tracing`).
    is_part : bool
        These batches are one process's part of the data (see
        :class:`pnanalysis.curvature.distributed.DistributedOperator`): finite differences are then fitted to all.
    checkpoint_activations : bool
        Compute the activations of the network's blocks again in the backward pass instead of keeping them: less memory,
        more time. See :func:`pnanalysis.curvature.recomputed.blocks_of` for what a block is.
    compile : bool
        Compile traced programs by ``torch.compile``: see :mod:`pnanalysis.curvature.tracing`.

    Notes
    -----
    Before the first product, one product on a few examples is computed in two independent ways, and every traced
    program is compared with an untraced product (see :mod:`pnanalysis.curvature.product_check`).

    A complex parameter counts as two real ones, its real and its imaginary part, which follow each other in vectors.

    Attributes
    ----------
    names : list of str
        The chosen parameters, or parts of them, in the order in which their entries follow each other in a vector.
    n_hvp : int
        Products so far.

    Raises
    ------
    CurvatureError
        If no parameters are chosen, there are no data, the data come in a new order on every pass, or batch
        normalisation in train mode meets a batch of a single example.
    DataError
        If the loss accepts the targets but would misinterpret them: see
        :func:`pnanalysis.evaluation.losses.check_targets`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Loss,
        batches: Iterable[Batch],
        *,
        params: Selection = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        bn_mode: str = "eval",
        reduction: str = "mean",
        weight_decay: float = 0.0,
        penalty: Callable[[nn.Module], Tensor] | None = None,
        micro_batch: int | None = None,
        amp: str = "no",
        expected_products: int = 1000,
        weight: Weight = None,
        draws: int | None = None,
        method: str = "exact",
        is_part: bool = False,
        checkpoint_activations: bool = False,
        compile: bool = False,
    ) -> None:
        for name, value, choices in (
            ("bn_mode", bn_mode, ("eval", "train")),
            ("reduction", reduction, ("mean", "sum")),
            ("amp", amp, PRECISIONS),
            ("method", method, METHODS),
        ):
            if value not in choices:
                raise CurvatureError(f"{name} is {value!r}; it must be {' or '.join(choices)}")
        if draws is not None and draws < 1:
            raise CurvatureError(f"draws is {draws}; it must be at least 1")
        if compile and (checkpoint_activations or draws is not None or method != "exact"):
            raise CurvatureError("compile is for traced products, without checkpoint_activations, draws or differences")
        if checkpoint_activations and draws is not None:
            raise CurvatureError("checkpoint_activations would draw other random numbers the second time; drop draws")
        wrapped, model = model, unwrapped(model)
        if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
            raise CurvatureError(
                "the network is sharded among processes (DTensor), and is not put together here; take "
                "pnanalysis.curvature.fully_sharded.FullyShardedHessian"
            )
        selected = select_unwrapped(wrapped, params)
        self.names = [one.label if isinstance(one, Block) else one for one in selected]
        self._blocks = {one.label: one for one in selected if isinstance(one, Block)}
        first = model.get_parameter(self.parameter_of(self.names[0]))
        self.dtype = resolve_dtype(dtype) if isinstance(dtype, str) else dtype or first.real.dtype
        self.device = torch.device(device) if device is not None else first.device
        self.model = in_precision(prepared_copy(model, bn_mode), self.dtype).to(self.device)
        #: What the layers do: ``"eval"`` where none takes statistics over a batch, such as where all are frozen.
        self.bn_mode = "train" if takes_batch_statistics(self.model) else "eval"
        if micro_batch is not None and self.bn_mode == "train":
            raise CurvatureError("micro-batches would change the batch statistics of bn_mode='train'; drop one of them")
        self._in_place = in_place_activations(self.model)
        self.loss_fn = loss_on(loss_fn, self.device, self.dtype)
        self.reduction, self.weight_decay, self.penalty = reduction, weight_decay, penalty
        self.micro_batch, self.amp = micro_batch, amp
        self.expected_products, self.weight, self.draws = expected_products, weight, draws
        self.checkpoint_activations, self.compile = checkpoint_activations, compile
        self.by_differences, self.is_part = method == "finite_difference", is_part
        if self.by_differences and not self._differences_are_derivatives:
            raise CurvatureError("finite differences of the gradient give products of the Hessian only")
        self.n_hvp = 0
        parameters, others = dict(self.model.named_parameters()), dict(self.model.named_buffers())
        parts = {label: block.of(parameters[block.parameter]) for label, block in self._blocks.items()}
        chosen = {name: (parts[name] if name in parts else parameters.pop(name)).detach() for name in self.names}
        self._theta: Named = {name: as_real(tensor) for name, tensor in chosen.items()}
        self._others: Named = {**{name: p.detach() for name, p in parameters.items()}, **others}
        self.parameter_shapes = [tensor.shape for tensor in self._theta.values()]
        self.n_parameters = sum(tensor.numel() for tensor in self._theta.values())
        complex_names = [name for name, tensor in chosen.items() if tensor.is_complex()]
        self._loss = NetworkLoss(self.model, self.loss_fn, self.device, self.dtype, amp, complex_names, self._blocks)
        self._regulariser = Regulariser(
            self.model, self._theta, self._others, weight_decay, penalty, self._loss.complex_names, self._blocks
        )
        #: What traces products. Operators on the same parameters over other examples share it, and so its programs.
        self.linearisation = Linearisation(self._product_in_passes, self._rehearse, compile)
        self._sharing: list[Batches] | None = None
        self._check: ProductCheck | None = None
        recurrent = any(isinstance(module, nn.RNNBase) for module in self.model.modules())
        self._passes = partial(plain_passes, self.device, amp, recurrent, twice=not self.by_differences)
        self._differences: FiniteDifferences | None = None
        self._forms: ExampleForms | None = None
        self._finite = torch.ones(1, dtype=torch.bool, device=self.device)
        self._read(batches)
        self._keep_nothing()
        if self.by_differences and not is_part:
            _ = self.differences  # before anything loops over batches and draws

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P)."""
        return self.n_parameters, self.n_parameters

    @property
    def n_examples(self) -> int:
        """Number of examples in all batches."""
        return sum(self.batches.sizes)

    @property
    def divisor(self) -> float:
        """What the mean over all batches divides by: the examples, or the sum of their weights in the loss."""
        return sum(self.batches.divisors)

    def matvec(self, v: Tensor) -> Tensor:
        """Multiply the matrix with one vector, ``(P,)`` to ``(P,)``.

        Raises
        ------
        CurvatureError
            If the shape does not fit.
        """
        if v.ndim != 1:
            raise CurvatureError(f"matvec takes a vector of {self.n_parameters} entries, not shape {tuple(v.shape)}")
        return self.matmat(v[:, None])[:, 0]

    @property
    def arithmetic(self) -> str:
        """What the passes are computed in; see :func:`pnanalysis.spectra.linear_operator.round_off`."""
        return {"bf16": "bfloat16", "tf32": "tf32"}.get(self.amp, str(self.dtype).removeprefix("torch."))

    def matmat(self, V: Tensor) -> Tensor:
        """Multiply the matrix with ``k`` vectors, ``(P, k)`` to ``(P, k)``.

        Cheaper than ``k`` calls of :meth:`matvec`: each batch is read, and its passes over the network that do not
        depend on the vectors are computed, once for all ``k``; finite differences have no such passes.

        Raises
        ------
        CurvatureError
            If the shape does not fit.
        """
        if V.ndim != 2 or V.shape[0] != self.n_parameters:
            raise CurvatureError(f"matmat takes {self.n_parameters} rows, not shape {tuple(V.shape)}")
        V = contiguous_columns(V.to(self.device, self.dtype))
        if self.by_differences:
            result = self.differences.products(V)
        else:
            result = self._in_passes_that_fit(lambda: self._sum_of_products(V))
        self._regulariser.add_products(result, V)
        self.n_hvp += V.shape[1]
        return result

    def product_without_data(self, V: Tensor) -> Tensor:
        """Multiply the part that no example has, of weight decay and penalty, with vectors ``(P, k)``."""
        result = torch.zeros_like(V)
        with self._passes():
            self._regulariser.add_products(result, V)
        return result

    def check_finite(self) -> None:
        """Raise an error if any product so far was not finite; the only method that waits for the device.

        Raises
        ------
        CurvatureError
            Naming the first batch whose products were not finite.
        """
        bad = (~self._finite).nonzero().flatten().tolist()
        if bad:
            raise CurvatureError(
                f"the products of batch {bad[0]} (of {len(self.batches)}) are not finite; look at its data"
            )

    def loss(self) -> float:
        """The loss over all batches, weight decay and penalty included."""
        # with gradients, which some networks compute on the way
        value = self._in_passes_that_fit(
            lambda: sum(w * float(self._loss_at_theta(at).detach()) for _, w, at in self._weighted())
        )
        with self._passes():
            return value + float(self._regulariser.value(self._theta))

    def loss_at(self, offset: Tensor) -> float:
        """The same at the chosen parameters plus an offset ``(P,)``."""
        theta = self._theta_at(offset)

        def compute() -> float:
            return sum(weight * float(self._loss(at, theta).detach()) for _, weight, at in self._weighted())

        value = self._in_passes_that_fit(compute)
        with self._passes():
            return value + float(self._regulariser.value(theta))

    def _theta_at(self, offset: Tensor) -> dict[str, Tensor]:
        parts = split_vector(offset.to(self.device, self.dtype), self.parameter_shapes)
        return {name: self._theta[name] + part for name, part in zip(self.names, parts, strict=True)}

    def gradient(self) -> Tensor:
        """Gradient of the loss over all batches, ``(P,)``, weight decay and penalty included."""
        total = self.gradient_without_regulariser()
        return total + self._regulariser.gradient() if self._regulariser else total

    def gradient_without_regulariser(self) -> Tensor:
        """The same, ``(P,)``, without weight decay and penalty."""
        return self._in_passes_that_fit(self._sum_of_gradients)

    def to_dense(self, chunk: int = 64) -> Tensor:
        """The matrix itself, ``(P, P)``, symmetrised; for small ``P``. Takes ``chunk`` columns at a time."""
        return dense_matrix(self, chunk)

    def per_layer(self) -> Iterator[tuple[str, CurvatureOperator]]:
        """The diagonal blocks: pairs of a layer's name and the operator on its parameters."""
        for layer, own in parameter_layers(self.model):
            held = {name for name, _ in own}
            names = [name for name in self.names if self.parameter_of(name) in held]
            if names:
                yield layer, self._again(self.batches.source, names, self.expected_products)

    def restricted(self, names: list[str], expected_products: int = 1000) -> Self:
        """The diagonal block of some of the parameters, or parts of these, that :attr:`names` lists."""
        return self._again(self.batches.source, names, expected_products)

    @property
    def tensors(self) -> list[tuple[str, str, int]]:
        """Name, layer and length of what follows each other in a vector: the parameters, or parts, of :attr:`names`."""
        layer_of = {name: layer for layer, own in parameter_layers(self.model) for name, _ in own}
        return [
            (name, layer_of.get(self.parameter_of(name), name), shape.numel())
            for name, shape in zip(self.names, self.parameter_shapes, strict=True)
        ]

    def vector_of(self, state: Mapping[str, Tensor]) -> Tensor:
        """The chosen parameters, ``(P,)``, of another state of the same network.

        Raises
        ------
        CurvatureError
            If it lacks one, or has it in another shape.
        """
        parts = []
        for name, shape in zip(self.names, self.parameter_shapes, strict=True):
            found = state.get(self.parameter_of(name))
            part = None if found is None else as_real(found.detach())
            if part is not None and name in self._blocks:
                part = self._blocks[name].of(part)
            if part is None or part.shape != shape:
                raise CurvatureError(f"{name!r} is not there, or of another shape, in the other state of the network")
            parts.append(part.to(self.device, self.dtype))
        return join_tensors(parts)

    def batch_gradients(self) -> Iterator[Tensor]:
        """The gradient of the loss of each batch, ``(P,)``, without weight decay and penalty.

        The batches are those that a pass takes, of :attr:`batches`: pieces of the given ones where these are cut; but
        not those without a target that counts.
        """
        for _, _, at in self._weighted():
            yield join_tensors(self._loss.gradient(at, self._theta))

    def batch_matrices(self) -> Iterator[BatchMatrix]:
        """The matrix of the loss of each batch, without weight decay and penalty; to be used before the next is taken.

        The batches are those of :meth:`batch_gradients`.
        """
        with self._passes():
            for _, _, product in self._products([torch.zeros_like(theta) for theta in self._theta.values()]):
                yield BatchMatrix(product, self.parameter_shapes, self.device, self.dtype)

    def products_by_batch(self, V: Tensor) -> Iterator[tuple[int, Tensor]]:
        """What each batch adds to the products with ``k`` vectors: its number and ``(P, k)``, without the regulariser.

        The batches are those of :meth:`batch_gradients`; all of them together are one product for each vector.
        """
        V = contiguous_columns(V.to(self.device, self.dtype))
        directions = [split_vector(v, self.parameter_shapes) for v in V.T]
        with self._passes():
            for i, weight, found in self._products_with(directions):
                yield i, torch.stack([weight * join_tensors(one).to(self.dtype) for one in found]).T
        self.n_hvp += V.shape[1]

    def batch_losses(self, offset: Tensor | None = None) -> Array:
        """What each batch adds to the loss, plus an offset ``(P,)``; without the regulariser."""
        parts = split_vector(torch.zeros(self.n_parameters) if offset is None else offset, self.parameter_shapes)
        theta = {
            name: self._theta[name] + part.to(self._theta[name]) for name, part in zip(self.names, parts, strict=True)
        }
        found = np.zeros(len(self.batches))
        with self._passes():
            for i, weight, at in self._weighted():
                found[i] += weight * float(self._loss(at, theta).detach())
        return found

    def take_weights(self, model: nn.Module) -> None:
        """Move to the weights and buffers that the network has now; data, checks and traced programs stay.

        Parameters
        ----------
        model : Module
            The network that the operator was made of, or another of the same layers.

        Raises
        ------
        CurvatureError
            If it lacks a parameter or buffer, or has it in another shape.
        """
        self.release()
        model = unwrapped(model)
        for mine, label in [(self._theta, label) for label in self._theta] + [(self._others, o) for o in self._others]:
            owner, _, leaf = self.parameter_of(label).rpartition(".")
            try:
                found = getattr(model.get_submodule(owner), leaf).detach()
            except AttributeError:
                found = None
            if found is not None:
                found = self._blocks[label].of(found) if label in self._blocks else found
                found = as_real(found) if mine is self._theta else found
            if found is None or found.shape != mine[label].shape:
                raise CurvatureError(f"{label!r} is not there, or of another shape, in the network given")
            mine[label].copy_(found)

    def release(self) -> None:
        """Give back the memory of what is kept between products at the same weights."""
        self._cache.clear()
        self._sharing = None
        self._cached_bytes = 0
        self._forms = self._differences = None
        self._finite.fill_(True)
        self._regulariser.forget()

    def forms(self, U: Tensor, V: Tensor) -> Tensor:
        r"""The forms :math:`u_j^\top H_g v_j` of the matrices of groups of examples, without the regulariser.

        The matrix is :math:`\sum_g w_g H_g` plus that of the regulariser, with ``group_weights`` :math:`w_g`. A group
        is a single example wherever that has a matrix of its own: see
        :mod:`pnanalysis.curvature.example_forms`. Columns of ``U`` and ``V`` that are equal take less time.

        Parameters
        ----------
        U, V : Tensor, shape (P, k)

        Returns
        -------
        Tensor, shape (k, G), float64, on the CPU

        Raises
        ------
        CurvatureError
            If the shapes do not fit, or forms are not finite.
        """
        for M in (U, V):
            if M.ndim != 2 or M.shape[0] != self.n_parameters or M.shape != U.shape:
                raise CurvatureError(f"forms takes two times {self.n_parameters} rows, not shape {tuple(M.shape)}")
        U, V = (M.to(self.device, self.dtype) for M in (U, V))
        return self._in_passes_that_fit(lambda: self.example_forms(U, V))

    @property
    def group_weights(self) -> Array:
        """The factor of each group's matrix in the whole, ``(G,)``."""
        return self.example_forms.weights

    @property
    def group_digest(self) -> str:
        """Equal for operators on the same examples in the same order and the same groups, however they are batched."""
        return self.example_forms.digest

    @property
    def example_forms(self) -> ExampleForms:
        """What :meth:`forms` is computed by. Made when it is first asked for, by one pass over the data."""
        if self._forms is None:
            self._forms = self._in_passes_that_fit(lambda: ExampleForms(self))
        return self._forms

    def subset(self, parts: Iterable[int], n_parts: int, seed: int = 0, expected_products: int = 1000) -> Self:
        """The same matrix over some of the examples: those in these parts of a random partition.

        Examples are taken one by one where a batch can be cut and each has a loss of its own, else batch by batch.
        Where the matrix is that of a sum over the examples, it is scaled to all of them.

        Parameters
        ----------
        parts : iterable of int
            Which parts to take, from 0 on.
        n_parts : int
            Into how many parts of equal size the examples are divided.
        seed : int
            Of the partition, which depends on nothing else but the number of examples.
        expected_products : int
            Roughly how many products with the result are to come.

        Raises
        ------
        CurvatureError
            If there are fewer examples than parts.
        """
        chosen = self.example_forms.chosen(set(parts), n_parts, seed)
        whole = self.batches
        refilled = self.example_forms.cuts_batches and self.weight != "batches"  # then each weighs 1, whatever is left
        subset = ExampleSubset(whole.pairs, chosen, max(whole.sizes) if refilled else None)
        return self._again(subset, self.names, expected_products)

    def parameter_of(self, name: str) -> str:
        """The parameter that a name of :attr:`names` belongs to: itself, or the whole of which it is a part."""
        return self._blocks[name].parameter if name in self._blocks else name

    def _again(self, batches: Iterable[Batch], names: list[str], expected_products: int) -> Self:
        """The same operator over other batches or parameters.

        On the same parameters, it takes over the programs that are traced, and the check of products.
        """
        other = type(self)(
            self.model, self.loss_fn, batches, params=names, dtype=self.dtype, device=self.device,
            bn_mode=self.bn_mode, reduction=self.reduction, weight=self.weight, weight_decay=self.weight_decay,
            penalty=self.penalty, micro_batch=self.micro_batch, amp=self.amp,
            expected_products=expected_products, draws=self.draws,
            method="finite_difference" if self.by_differences else "exact", is_part=self.is_part,
            checkpoint_activations=self.checkpoint_activations, compile=self.compile,
        )  # fmt: skip
        if names == self.names:
            other.linearisation, other._check = self.linearisation, self._check
        return other

    def trace_of_draws(self, n_probes: int = 10, seed: int = 0) -> Tensor:
        """Hutchinson's estimate of the trace for each draw, by the same probes, ``(draws,)``.

        Their scatter tells how far the mean over the draws is from that over all that the network may draw. The probes
        are drawn on the device, where each takes a byte for every parameter, and a whole vector in its turn.
        """
        signs = random_signs(self.n_parameters, range(n_probes), seed, self.device)
        forms = torch.zeros(self.draws or 1, dtype=torch.float64)

        def probe_of(i: int) -> list[Tensor]:
            return split_vector(signs[:, i].to(self.dtype), self.parameter_shapes)

        with self._passes():
            for k, (_, weight, at) in enumerate(self._weighted()):
                product, _ = self._prepare(at, probe_of(0))
                for probe in map(probe_of, range(n_probes)):
                    form = sum(float((a * b).sum()) for a, b in zip(probe, product(probe), strict=True))
                    forms[k % len(forms)] += weight * len(forms) * form / n_probes
        return forms

    @property
    def product_check(self) -> ProductCheck:
        """How products are computed, and how far they agree with a second way: see :class:`ProductCheck`.

        Raises
        ------
        CurvatureError
            If they cannot be computed, or every way is wrong.
        """
        if self.by_differences:
            return ProductCheck(False, False, self.differences.difference)
        if self._check is None:
            with self._passes():
                self._draw(0, 0)
                self._check = check_products(self, self._few)
            if self._check.note:
                warnings.warn(self._check.note, stacklevel=2)
            if self.checkpoint_activations and not self._check.forward:
                warnings.warn("products are computed by reverse mode alone, which keeps all activations", stacklevel=2)
        return self._check

    @property
    def differences(self) -> FiniteDifferences:
        """Step and errors of finite differences, where products are computed by these; fitted when first asked for."""
        if self._differences is None:
            self._differences = FiniteDifferences(OperatorGradients(self))
        return self._differences

    @differences.setter
    def differences(self, fitted: FiniteDifferences) -> None:
        self._differences = fitted

    @property
    def round_off(self) -> float:
        """Error of the products so far, relative to the norm of the matrix."""
        own = ROUND_OFF[self.arithmetic]
        return max(own, self.differences.round_off) if self.by_differences else own

    def note_error(self, error: float) -> None:
        """Count the error of products by differences that another process made before."""
        if self.by_differences:
            self.differences.earlier = max(self.differences.earlier, error)

    @property
    def method(self) -> str:
        """How most products so far were computed.

        ``traced``, ``forward mode``, ``reverse mode``, ``recomputed activations`` or ``finite differences``.
        """
        if self.by_differences:
            return "finite differences"
        if self._traces is not None and self._traces.n_programs:
            return "traced"
        check = self.product_check
        if check.forward and self.checkpoint_activations:
            return "recomputed activations"
        return "reverse mode" if check.reverse else "forward mode"

    #: Whether a trace of the product has a size that does not depend on the number of examples.
    _traceable = True
    #: Whether differences give the product itself, by parameters, and not one number that it determines.
    _differences_are_derivatives = False

    # -- the matrix of one batch, for subclasses ----------------------------------------------------------------

    def _product(self, at: LossArguments, v: list[Tensor]) -> list[Tensor]:
        """The matrix of one batch times ``v``, by torch.func's transforms, so that it can be traced."""
        raise NotImplementedError

    def _direct(self, at: LossArguments) -> Product:
        """The same product by differentiating a recorded graph twice: no trace, but more work per product."""
        raise NotImplementedError

    def _recomputed_product(self, at: LossArguments, v: list[Tensor]) -> list[Tensor]:
        """The same product by forward mode and one backward pass, in which blocks are recomputed."""
        raise NotImplementedError

    def _row_forms(self, at: LossArguments, u: list[Tensor], v: list[Tensor]) -> Tensor:
        """What each example adds to ``u'M v`` of the matrix of one batch, ``(n,)``, by forward mode.

        ``v`` is ``u`` itself where they are equal.
        """
        raise NotImplementedError

    def _row_slopes(self, at: LossArguments, v: list[Tensor]) -> Tensor:
        """What each example adds to the derivative of the loss of one batch along ``v``, ``(n,)``, by forward mode."""
        raise NotImplementedError

    def _rehearse(self, at: LossArguments) -> object:
        """Run what a product runs of the user's code, without transforms."""
        return self._loss_at_theta(at)

    def _by_differences(
        self, at: LossArguments, v: list[Tensor], product: list[Tensor], step: float
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """What a product determines: by differences of first derivatives ahead and behind, and from the product."""
        raise NotImplementedError

    # -- products batch by batch --------------------------------------------------------------------------------

    def _sum_of_products(self, V: Tensor) -> Tensor:
        directions = [split_vector(v, self.parameter_shapes) for v in V.T]
        result = torch.zeros_like(V)  # keeps the layout
        one_vector = len(directions) == 1
        for i, weight, found in self._in_shared_calls(*directions) if one_vector else self._products_with(directions):
            for one, into in zip(found, result.T, strict=True):
                part = join_tensors(one).to(self.dtype)
                # a sum is finite only if all terms are; noted on the device, for reading it back would wait for it
                self._finite[i] &= part.sum().isfinite()
                into.add_(part, alpha=weight)
        return result

    def _sum_of_gradients(self) -> Tensor:
        total = torch.zeros(self.n_parameters, dtype=self.dtype, device=self.device)
        for _, weight, at in self._weighted():
            total.add_(join_tensors(self._loss.gradient(at, self._theta)), alpha=weight)
        return total

    def _products_with(self, directions: list[list[Tensor]]) -> Iterator[tuple[int, float, Iterable[list[Tensor]]]]:
        """Number and weight of each batch that counts, and its products with one vector after the other."""
        for i, weight, product in self._products(directions[0]):
            yield i, weight, product.of_many(directions) if isinstance(product, Program) else map(product, directions)

    def _in_shared_calls(self, v: list[Tensor]) -> Iterator[tuple[int, float, Iterable[list[Tensor]]]]:
        """The same for a single vector, in any order: batches share calls where that is faster."""
        if self._sharing is None:
            self._sharing = []
            counting = self.batches.counting
            may_share = self._traces is not None and len(counting) > 1
            # those that are not kept end this at the first of them
            if may_share and all(i in self._cache for i, _, _ in self._products(v)):
                self._sharing = sharing_calls({i: self._cache[i] for i in counting})
        if not self._sharing:
            yield from self._products_with([v])
        for batches in self._sharing:
            yield from ((i, self.batches.weights[i], [one]) for i, one in batches.products(v))

    def _products(self, like: list[Tensor]) -> Iterator[tuple[int, float, Product]]:
        """Number and weight of each batch that counts, and its product; those in the cache need no data."""
        counting, weights = self.batches.counting, self.batches.weights
        if len(self._cache) == len(counting):
            yield from ((i, weights[i], self._cache[i]) for i in counting)
            return
        for i, weight, at in self._weighted():
            if i in self._cache:
                yield i, weight, self._cache[i]
                continue
            product, n_bytes = self._prepare(at, like)
            if n_bytes and self._cached_bytes + n_bytes <= self._cache_bytes:
                self._cache[i] = product
                self._cached_bytes += n_bytes
            yield i, weight, product

    def _weighted(self) -> Iterator[tuple[int, float, LossArguments]]:
        """Number and weight of each batch that counts, and what its loss depends on; once for every draw."""
        for i, weight, batch in self.batches.weighted():
            for draw in range(self.draws or 1):
                self._draw(i, draw)
                yield i, weight / (self.draws or 1), self._arguments(batch)

    def _draw(self, batch: int, draw: int) -> None:
        """Let passes draw the random numbers of one draw for one batch."""
        self._loss.seed = None if self.draws is None else batch * self.draws + draw

    def _prepare(self, at: LossArguments, like: list[Tensor]) -> tuple[Product, int]:
        """The product with the matrix of one batch, and the bytes to keep for it (0: do not keep it)."""
        if self.product_check.forward and self._traces is not None:
            traced = self._traces.at(at, like)
            if traced is not None:
                return traced
        return self._untraced(at), 0  # its graph holds all activations, which are too large to keep

    def _untraced(self, at: LossArguments) -> Product:
        if self.by_differences:
            return lambda v: self.differences.product(self, at, list(v))
        check = self.product_check
        if check.reverse and not (check.forward and self.checkpoint_activations):
            return self._reverse_mode(at)
        return lambda v: self._forward_mode(at, list(v))

    def _product_in_passes(self, at: LossArguments, v: list[Tensor]) -> list[Tensor]:
        with self._passes():  # a trace runs in a thread of its own, which some of the settings do not reach
            return self._product(at, v)

    def _forward_mode(self, at: LossArguments, v: list[Tensor]) -> list[Tensor]:
        return (self._recomputed_product if self.checkpoint_activations else self._product)(at, v)

    def _reverse_mode(self, at: LossArguments) -> Product:
        with self._loss.keeping_activations():
            return self._direct(at)

    def _arguments(self, batch: Batch) -> LossArguments:
        return LossArguments(self._theta, self._others, *batch)

    def _loss_at_theta(self, at: LossArguments) -> Tensor:
        return self._loss(at, at.theta)

    def _in_double(self, at: LossArguments) -> tuple[Self, LossArguments]:
        """This operator and its arguments in float64."""
        twin = copy(self)
        twin._loss, twin.dtype, twin.amp = self._loss.in_double(), torch.float64, "no"
        twin.loss_fn = twin._loss.loss_fn
        return twin, move(at, self.device, torch.float64)

    # -- reading the data ---------------------------------------------------------------------------------------

    def _read(self, batches: Iterable[Batch]) -> None:
        """Look at all batches once, cut where they do not fit into memory, and fit the passes to the first of them."""

        def look() -> None:
            weights = self._batch_weights(self.weight)
            if isinstance(batches, OwnExamples):
                batches.counts = weights.counts
            self.batches = WeightedBatches(batches, self.device, self.dtype, self.micro_batch, self.reduction)
            self.batches.inspect(
                self._fit_passes,
                weights,
                self._check_batch,
                needs_statistics=self.bn_mode == "train",
            )
            if self.batches.n_cut and not self.batches.weighing.separates(self._first_examples, self.batches.reduction):
                raise CurvatureError(
                    "the loss of a batch is not made up of the losses of its examples, so that micro-batches would "
                    "change the result; leave micro_batch out, and take smaller batches if memory does not suffice"
                )

        with self._passes(), random_states_kept():  # a network that draws is found out by passes that draw
            until_it_fits(look, self._halve_passes)
        self.reduction = self.batches.reduction
        self._finite = self._finite.all().repeat(len(self.batches))

    def _in_passes_that_fit(self, compute: Callable[[], T]) -> T:
        """What is computed from all batches; again, from smaller ones, where a batch does not fit into memory."""

        def halve() -> None:
            kept = self._cached_bytes
            if not kept:
                self._halve_passes()
                self._read(self.batches.source)
            self._keep_nothing()
            if kept:  # try without first
                self._cache_bytes = 0

        with self._passes():
            return until_it_fits(compute, halve)

    def _halve_passes(self) -> None:
        """Let passes take half as many examples from now on, and say so.

        Raises
        ------
        CurvatureError
            If that would change the result.
        """
        size = max(self.batches.sizes, default=1)
        reason = (
            "a pass over a single example takes too much" if size < 2
            else "the network takes statistics over each batch" if self.bn_mode == "train"
            else "its random numbers belong to whole batches" if self.draws is not None
            else "its batches cannot be cut" if not self.batches.can_be_cut
            else "its error of examples is taken from whole batches" if self._forms and self._forms.unit != EXAMPLE_UNIT
            else None
        )  # fmt: skip
        if reason:
            raise CurvatureError(
                f"{size} examples of {self.n_parameters:,} parameters do not fit into the memory of {self.device}, and "
                f"passes over fewer are not possible, as {reason}; take smaller batches, or a device with more memory"
            )
        self.micro_batch = (size + 1) // 2
        warnings.warn(
            f"{size} examples at a time do not fit into the memory of {self.device}; going on with {self.micro_batch}",
            stacklevel=2,
        )

    def _keep_nothing(self) -> None:
        """No traces, and nothing that products keep of batches, at the start and after these were cut anew."""
        # a trace would draw its numbers in another order
        many = self.expected_products >= _FEWEST_PRODUCTS_TO_TRACE or self.compile
        traceable = self._traceable and self.draws is None and not self.by_differences
        traceable &= not self.checkpoint_activations  # a traced program keeps all activations
        self._traces = TracedProducts(self) if many and traceable else None
        self._forms = None
        self._cache: dict[int, Product] = {}
        self._sharing = None
        self._cached_bytes = 0
        self._cache_bytes = int(_CACHE_FRACTION * free_bytes(self.device))

    def _batch_weights(self, weight: Weight) -> BatchWeights:
        return BatchWeights(
            self.loss_fn, "batches" if self.reduction == "sum" else weight, self.dtype,
            lambda batch: self._loss_at_theta(self._arguments(batch)),
            lambda batch: self._loss.outputs(self._arguments(batch), self._theta),
            self._loss.of_outputs,
            low_precision=self.amp != "no",
        )  # fmt: skip

    def _fit_passes(self, batch: Batch) -> None:
        """Run network and loss for the first time, check the targets, and choose the layout and what is folded."""
        self._draw(0, 0)
        self._first_examples = first_look(self, batch)

    def _check_batch(self, batch: Batch) -> None:
        """Refuse a batch that the matrix is not defined for."""

    @property
    def n_classes(self) -> int | None:
        """Number of classes of a classifier; ``None`` for other targets, and where the loss calls the network.

        ``None``, too, for networks that predict a class at each of many positions, such as language models: the number
        then says nothing about how many eigenvalues stand out.
        """
        if self.loss_fn.takes_model:
            return None
        at = self._few
        outputs = prediction(self._loss.outputs(at, at.theta))
        scores = None if outputs is None else class_scores(outputs, at.targets, self.loss_fn)
        return None if scores is None or scores.ndim > 2 else int(scores.shape[1])

    @property
    def _few(self) -> LossArguments:
        """A few examples of the first batch that counts."""
        return self._arguments(self._first_examples)
