"""Several fits as one: networks of one architecture, stacked along a new first dimension, take each step together.

A small network leaves a GPU idle: the time of a step depends on the number of kernels, not on their work. Stacked
(``torch.func.vmap``), twenty networks need as many kernels as one. Every network sees the batches, the penalty and the
optimiser that :func:`trainers.fit` would give it, so results agree with separate fits to round-off.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from pnanalysis.errors import PnError, TrainingError
from pnanalysis.inputs.copies import as_real
from pnanalysis.inputs.data import Split
from pnanalysis.inputs.models import Loss, resolve_loss
from trainers.loop.fit import (
    EVALUATION_BATCH,
    Epoch,
    EpochSums,
    OnEpoch,
    augment_batch,
    autocast,
    batch_order,
    check_options,
    check_weights,
    error_counter,
    load_optimizer_tensors,
    make_optimizer,
    n_counted,
    tensor_optimizer,
)
from trainers.loop.persistence import PersistentPenalty, repulsion
from trainers.seeds import derive_seed


@dataclass(frozen=True)
class SingleFit:
    """One of the fits that :func:`fit_together` runs.

    Attributes
    ----------
    model : torch.nn.Module
        Trained in place: its weights are written back after every epoch.
    seed : int
        Determines the order of its batches and its augmentation, as for :func:`trainers.fit`.
    penalty : PersistentPenalty, optional
    optimizer_state : mapping, optional
        Where to resume, as for :func:`trainers.fit`.
    on_epoch : callable, optional
        ``on_epoch(record, model, optimizer)`` after each epoch.
    """

    model: nn.Module
    seed: int = 0
    penalty: PersistentPenalty | None = None
    optimizer_state: Mapping[str, Tensor] | None = None
    on_epoch: OnEpoch | None = None


def fit_together(
    fits: Sequence[SingleFit],
    train: Split | tuple[Tensor, Tensor],
    *,
    epochs: int,
    batch_size: int = 256,
    lr: float = 1e-3,
    optimizer: str = "adam",
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    loss: str | Loss = "cross_entropy",
    validation: Split | None = None,
    test: Split | None = None,
    augment: Sequence[str] = (),
    amp: str = "no",
    compile: bool = False,
    start_epoch: int = 0,
    on_batch: Callable[[int], None] | None = None,
) -> list[list[Epoch] | PnError]:
    """Train several networks of one architecture in lockstep.

    Parameters
    ----------
    fits : sequence of SingleFit
        Their models must have the same modules; starting points, seeds and penalties (all of one form) may differ.
    train, epochs, batch_size, lr, optimizer, momentum, weight_decay, loss, validation, test, augment, amp, compile
        As for :func:`trainers.fit`, and the same for all.
    start_epoch : int
        Epochs already done.
    on_batch : callable, optional
        ``on_batch(n_examples)`` after each step, with the examples of all networks.

    Returns
    -------
    list
        For each fit its records, or the error that ended it: a loss that is not finite or an error raised by
        ``on_epoch`` ends that fit only.

    Raises
    ------
    TrainingError
        If there is no network, an option is unknown, penalties of several forms are mixed, or the network or the loss
        has no batched form (:func:`torch.func.vmap`), for example because it branches on a value or changes a tensor
        in place.

    Notes
    -----
    Dropout draws other masks than in separate fits.
    """
    check_options(optimizer, augment, amp, batch_size, epochs)
    split = train if isinstance(train, Split) else Split(*train)
    stack = _Stack(fits, resolve_loss(loss), amp, compile)
    counted = n_counted(stack.loss, split.targets)
    optim = tensor_optimizer(stack.trainable, optimizer, lr, momentum, weight_decay)
    states = [each.optimizer_state for each in fits]
    if all(states):
        load_optimizer_tensors(optim, {name: _stacked_entry(name, states) for name in states[0] or {}})
    # What on_epoch is given and may save: an optimiser for each network, with its slice of the common state.
    optimizers = [make_optimizer(each.model, optimizer, lr, momentum, weight_decay) for each in fits]
    results: list[list[Epoch] | PnError] = [[] for _ in fits]
    for epoch in range(start_epoch + 1, epochs + 1):
        begun = time.perf_counter()
        sums = _train_epoch(stack, optim, split, epoch, batch_size, augment, on_batch)
        validation_errors, test_errors = stack.errors(validation), stack.errors(test)
        stack.write_back(optim, optimizers)
        seconds = (time.perf_counter() - begun) / len(fits)
        for k, (each, records) in enumerate(zip(fits, results, strict=True)):
            if isinstance(records, PnError):
                continue
            try:
                means = sums.means(epoch, len(split), counted, k)
                check_weights(each.model, epoch)
                record = Epoch(epoch, *means, validation_errors[k], test_errors[k], seconds)
                records.append(record)
                if each.on_epoch is not None:
                    each.on_epoch(record, each.model, optimizers[k])
            except PnError as error:  # weights that are not finite or a full disk ends this fit only
                results[k] = error
        if all(isinstance(records, PnError) for records in results):
            break
    return results


def _train_epoch(
    stack: _Stack,
    optim: torch.optim.Optimizer,
    split: Split,
    epoch: int,
    batch_size: int,
    augment: Sequence[str],
    on_batch: Callable[[int], None] | None,
) -> EpochSums:
    seeds, n, device = [each.seed for each in stack.fits], len(split), split.inputs.device
    torch.manual_seed(derive_seed(seeds[0], "noise", epoch))
    orders, generators = zip(*(batch_order(n, seed, epoch, device) for seed in seeds), strict=True)
    sums = EpochSums(-(-n // batch_size), device, (len(seeds),))
    stack.skeleton.train()
    for step, index in enumerate(torch.stack(orders).split(batch_size, dim=1)):
        inputs, targets = split.take(index)
        if augment:
            inputs = torch.stack([augment_batch(x, augment, g) for x, g in zip(inputs, generators, strict=True)])
        outputs, losses = stack.losses(inputs, targets)
        terms = stack.penalties()
        optim.zero_grad(set_to_none=True)
        # The networks have no parameter in common: the gradient of the sum is each network's own.
        (losses if terms is None else losses + terms).sum().backward()
        optim.step()
        sums.add(step, index.shape[1], losses, terms, vmap(stack.sum_of_errors)(outputs.detach(), targets))
        if on_batch is not None:
            on_batch(index.numel())
    return sums


class _Stack:
    """Parameters and buffers of all networks, stacked along a first dimension, and passes through them."""

    def __init__(self, fits: Sequence[SingleFit], loss: Loss, amp: str, compile: bool) -> None:
        if not fits:
            raise TrainingError("no networks to train together")
        self.fits = fits
        models = [each.model.train() for each in fits]
        with _explain_vmap_errors("their parameters are not alike"):
            self.parameters, self.buffers = stack_module_state(models)
        self.trainable = [tensor for tensor in self.parameters.values() if tensor.requires_grad]
        self.skeleton = copy.deepcopy(models[0])  # the architecture; functional_call passes the weights
        self.loss, self.amp = loss, amp
        self.sum_of_errors = error_counter(loss)
        self.penalty = _StackedPenalty([each.penalty for each in fits], self.parameters)

        def call(parameters: dict[str, Tensor], buffers: dict[str, Tensor], inputs: Tensor) -> Tensor:
            output: Tensor = functional_call(self.skeleton, (parameters, buffers), (inputs,))
            return output

        self._on_own_batches: Callable[..., Tensor] = vmap(call, randomness="different")
        self._on_common_batch: Callable[..., Tensor] = vmap(call, in_dims=(0, 0, None))
        if compile:
            self._on_own_batches = torch.compile(self._on_own_batches)

    def losses(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs ``(K, B, ...)`` and mean losses ``(K,)`` of each network on its own batch."""
        with _explain_vmap_errors(), autocast(inputs.device, self.amp):
            outputs = self._on_own_batches(self.parameters, self.buffers, inputs)
            return outputs, vmap(self.loss)(outputs, targets)

    def penalties(self) -> Tensor | None:
        """The penalty of each network, ``(K,)``; ``None`` if none has one."""
        return self.penalty(self.parameters) if self.penalty.terms else None

    @torch.no_grad()
    def errors(self, split: Split | None) -> list[float]:
        """The mean error of each network over a split: see :func:`trainers.loop.fit.evaluate_error`."""
        n_networks = len(self.fits)
        if split is None:
            return [float("nan")] * n_networks
        self.skeleton.eval()
        total = torch.zeros(n_networks, dtype=torch.float64, device=split.inputs.device)
        # Smaller batches than for one network: all the activations are in memory at once.
        for inputs, targets in split.batches(max(EVALUATION_BATCH // n_networks, 100)):
            with _explain_vmap_errors():
                with autocast(inputs.device, self.amp):
                    outputs = self._on_common_batch(self.parameters, self.buffers, inputs)
                total += vmap(self.sum_of_errors, in_dims=(0, None))(outputs, targets)
        means: list[float] = (total / n_counted(self.loss, split.targets)).tolist()
        return means

    @torch.no_grad()
    def write_back(self, stacked: torch.optim.Optimizer, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Copy each network's slices into its model and its optimiser."""
        for k, (each, optimizer) in enumerate(zip(self.fits, optimizers, strict=True)):
            for name, parameter in each.model.named_parameters():
                parameter.copy_(self.parameters[name][k])
            for name, buffer in each.model.named_buffers():
                buffer.copy_(self.buffers[name][k])
            for whole, part in zip(stacked.param_groups[0]["params"], optimizer.param_groups[0]["params"], strict=True):
                optimizer.state[part] = {  # step counts, 0-d, are common
                    name: value[k] if isinstance(value, Tensor) and value.ndim else value
                    for name, value in stacked.state[whole].items()
                }


class _LayerTerm(NamedTuple):
    """A layer of the stacked penalty: its parameters' names, end points ``(K, n, P_l)`` and origins ``(K, P_l)``."""

    names: list[str]
    rows: Tensor
    origin: Tensor


class _StackedPenalty:
    """The persistent terms of all networks as one; rows of zeros fill up where a network has fewer end points."""

    def __init__(self, penalties: Sequence[PersistentPenalty | None], parameters: Mapping[str, Tensor]) -> None:
        active = [penalty for penalty in penalties if penalty is not None and len(penalty)]
        if len({penalty.form for penalty in active}) > 1:
            raise TrainingError("penalties of several forms cannot be trained together")
        self.form = active[0].form if active else "absolute"
        self.terms: list[_LayerTerm] = []
        layers = {layer: names for penalty in active for layer, names in penalty.layers.items()}
        if not active:
            return
        like = as_real(next(iter(parameters.values())))
        lam = [0.0 if penalty is None else penalty.lam for penalty in penalties]
        self.lam = torch.tensor(lam, dtype=torch.float64).to(like)
        for layer, names in layers.items():
            size = sum(as_real(parameters[name][0]).numel() for name in names)
            rows = like.new_zeros(len(penalties), max(len(penalty) for penalty in active), size)
            origin = like.new_zeros(len(penalties), size)
            for k, penalty in enumerate(penalties):
                if penalty is not None and layer in penalty.layers and len(penalty):
                    rows[k, : len(penalty)] = penalty.rows(layer, rows[k, 0])
                    if penalty.origin:
                        origin[k] = penalty.origin[layer].to(origin)
            self.terms.append(_LayerTerm(names, rows.detach(), origin.detach()))

    def __call__(self, parameters: Mapping[str, Tensor]) -> Tensor:
        total = torch.zeros_like(self.lam)
        for names, rows, origin in self.terms:
            theta = torch.cat([as_real(parameters[name]).flatten(1) for name in names], dim=1) - origin
            total = total + repulsion(self.form, rows, theta)
        return self.lam * total


@contextmanager
def _explain_vmap_errors(problem: str = "their forward pass or loss has no batched form") -> Iterator[None]:
    """Raise what ``vmap`` cannot do as a :class:`TrainingError` of one sentence."""
    try:
        yield
    except (PnError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].removeprefix("vmap: ").split(". ")[0]
        raise TrainingError(
            f"these networks cannot be trained together: {problem} ({reason.rstrip('.')}); leave out --together"
        ) from error


def _stacked_entry(name: str, states: Sequence[Mapping[str, Tensor] | None]) -> Tensor:
    """An entry of the optimiser states of all networks, stacked; step counts, 0-d, are common."""
    values = [state[name] for state in states if state]
    return torch.stack(values) if values[0].ndim else values[0]
