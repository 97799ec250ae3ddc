"""Several trainings as one: networks of one architecture stacked along a new first dimension, a step for all at once.

A small network leaves a GPU idle: its step is bound by the number of kernels, not by their work. Stacked
(``torch.func.vmap``), twenty networks take the kernels of one. Every member sees the batches, the penalty and the
optimiser that :func:`trainers.fit` would give it, so results agree with separate trainings to round-off.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from pnanalysis.errors import PnError, TrainingError
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
    error_counter,
    load_optimizer_tensors,
    make_optimizer,
    optimise,
)
from trainers.loop.persistence import PersistentPenalty, repulsion
from trainers.seeds import derive_seed


@dataclass(frozen=True)
class Member:
    """One training among several.

    Attributes
    ----------
    model : torch.nn.Module
        Trained in place: it holds its own weights again after every epoch.
    seed : int
        Order of its batches and augmentation, as for :func:`trainers.fit`.
    penalty : PersistentPenalty, optional
    optimizer_state : mapping, optional
        Where to go on from, as for :func:`trainers.fit`.
    on_epoch : callable, optional
        ``on_epoch(record, model, optimizer)`` after each epoch.
    """

    model: nn.Module
    seed: int = 0
    penalty: PersistentPenalty | None = None
    optimizer_state: Mapping[str, Tensor] | None = None
    on_epoch: OnEpoch | None = None


def fit_together(
    members: Sequence[Member],
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
    members : sequence of Member
        Their models must have the same modules; starting points, seeds and penalties (of one form) are their own.
    on_batch : callable, optional
        ``on_batch(n_examples)`` after each step, with the examples of all members.

    All else is as for :func:`trainers.fit`, and common to the members. Dropout draws other masks than separate
    trainings would.

    Returns
    -------
    list
        For each member its records, or the error that ended it: a loss that is not finite, or what ``on_epoch``
        raised, stops its own member only.

    Raises
    ------
    TrainingError
        If there is no member, an option is unknown, penalties of several forms are mixed, or the network or the loss
        has no batched form (:func:`torch.func.vmap`): it looks at values, say, or changes a tensor in place.
    """
    check_options(optimizer, augment, amp, batch_size, epochs)
    split = train if isinstance(train, Split) else Split(*train)
    stack = _Stack(members, resolve_loss(loss), amp, compile)
    optim = optimise(stack.trainable, optimizer, lr, momentum, weight_decay)
    states = [member.optimizer_state for member in members]
    if all(states):
        load_optimizer_tensors(optim, {name: _joined(name, states) for name in states[0] or {}})
    own = [make_optimizer(member.model, optimizer, lr, momentum, weight_decay) for member in members]
    n, device = len(split), split.inputs.device
    ended: list[list[Epoch] | PnError] = [[] for _ in members]
    for epoch in range(start_epoch + 1, epochs + 1):
        begun = time.perf_counter()
        torch.manual_seed(derive_seed(members[0].seed, "noise", epoch))
        orders, generators = zip(*(batch_order(n, member.seed, epoch, device) for member in members), strict=True)
        sums = EpochSums(-(-n // batch_size), device, (len(members),))
        stack.skeleton.train()
        for step, index in enumerate(torch.stack(orders).split(batch_size, dim=1)):
            inputs, targets = split.take(index)
            if augment:
                inputs = torch.stack([augment_batch(x, augment, g) for x, g in zip(inputs, generators, strict=True)])
            outputs, losses = stack.losses(inputs, targets)
            terms = stack.penalties()
            optim.zero_grad(set_to_none=True)
            (losses if terms is None else losses + terms).sum().backward()
            optim.step()
            sums.add(step, index.shape[1], losses, terms, vmap(stack.count)(outputs.detach(), targets))
            if on_batch is not None:
                on_batch(index.numel())
        errors = [stack.errors(part) for part in (validation, test)]
        stack.write_back(optim, own)
        seconds = (time.perf_counter() - begun) / len(members)
        for k, (member, records) in enumerate(zip(members, ended, strict=True)):
            if isinstance(records, PnError):
                continue
            try:
                train_loss, penalty, train_error = sums.means(epoch, n, k)
            except TrainingError as error:
                ended[k] = error
                continue
            record = Epoch(epoch, train_loss, penalty, train_error, errors[0][k], errors[1][k], seconds)
            records.append(record)
            if member.on_epoch is not None:
                try:
                    member.on_epoch(record, member.model, own[k])
                except PnError as error:  # a full disk, say: the others go on
                    ended[k] = error
        if all(isinstance(records, PnError) for records in ended):
            break
    return ended


class _Stack:
    """Parameters and buffers of all members with a first dimension of their own, and passes over them."""

    def __init__(self, members: Sequence[Member], loss: Loss, amp: str, compile: bool) -> None:
        if not members:
            raise TrainingError("no networks to train together")
        self.members = members
        models = [member.model.train() for member in members]
        with _batched("their parameters are not alike"):
            self.parameters, self.buffers = stack_module_state(models)
        self.trainable = [tensor for tensor in self.parameters.values() if tensor.requires_grad]
        self.skeleton = copy.deepcopy(models[0])
        self.loss, self.amp = loss, amp
        self.count = error_counter(loss)
        self.push = _StackedPenalty([member.penalty for member in members], self.parameters)

        def call(parameters: Any, buffers: Any, inputs: Tensor) -> Tensor:
            output: Tensor = functional_call(self.skeleton, (parameters, buffers), (inputs,))
            return output

        self._own: Callable[..., Tensor] = vmap(call, randomness="different")
        self._shared: Callable[..., Tensor] = vmap(call, in_dims=(0, 0, None))
        if compile:
            self._own = torch.compile(self._own)

    def losses(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs ``(K, B, ...)`` and mean losses ``(K,)`` of each member on its own batch."""
        with _batched(), autocast(inputs.device, self.amp):
            outputs = self._own(self.parameters, self.buffers, inputs)
            return outputs, vmap(self.loss)(outputs, targets)

    def penalties(self) -> Tensor | None:
        """The members' penalties ``(K,)``, or None where none has one."""
        return self.push(self.parameters) if self.push.terms else None

    @torch.no_grad()
    def errors(self, split: Split | None) -> list[float]:
        """What :func:`trainers.loop.fit.evaluate_error` gives for each member."""
        n_members = len(self.members)
        if split is None:
            return [float("nan")] * n_members
        self.skeleton.eval()
        total = torch.zeros(n_members, dtype=torch.float64, device=split.inputs.device)
        for inputs, targets in split.batches(max(EVALUATION_BATCH // n_members, 100)):
            with _batched():
                with autocast(inputs.device, self.amp):
                    outputs = self._shared(self.parameters, self.buffers, inputs)
                total += vmap(self.count, in_dims=(0, None))(outputs, targets)
        shares: list[float] = (total / len(split)).tolist()
        return shares

    @torch.no_grad()
    def write_back(self, stacked: torch.optim.Optimizer, own: Sequence[torch.optim.Optimizer]) -> None:
        """Give each member's model and optimiser their own slices."""
        for k, (member, optimizer) in enumerate(zip(self.members, own, strict=True)):
            for name, parameter in member.model.named_parameters():
                parameter.copy_(self.parameters[name][k])
            for name, buffer in member.model.named_buffers():
                buffer.copy_(self.buffers[name][k])
            for group, slices in zip(
                stacked.param_groups[0]["params"], optimizer.param_groups[0]["params"], strict=True
            ):
                optimizer.state[slices] = {
                    name: value[k] if isinstance(value, Tensor) and value.ndim else value
                    for name, value in stacked.state[group].items()
                }


class _StackedPenalty:
    """The members' persistent terms as one: rows ``(K, n, P_l)`` a layer, zeros where a member repels from nothing."""

    def __init__(self, penalties: Sequence[PersistentPenalty | None], parameters: Mapping[str, Tensor]) -> None:
        active = [penalty for penalty in penalties if penalty is not None and len(penalty)]
        if len({penalty.form for penalty in active}) > 1:
            raise TrainingError("penalties of several forms cannot be trained together")
        self.form = active[0].form if active else "absolute"
        self.terms: list[tuple[list[str], Tensor, Tensor]] = []
        layers = {layer: names for penalty in active for layer, names in penalty.layers.items()}
        if not active:
            return
        like = next(iter(parameters.values()))
        self.lam = like.new_tensor([0.0 if penalty is None else penalty.lam for penalty in penalties])
        for layer, names in layers.items():
            size = sum(parameters[name][0].numel() for name in names)
            rows = like.new_zeros(len(penalties), max(len(penalty) for penalty in active), size)
            origin = like.new_zeros(len(penalties), size)
            for k, penalty in enumerate(penalties):
                if penalty is not None and layer in penalty.layers and len(penalty):
                    rows[k, : len(penalty)] = penalty.rows(layer, rows[k, 0])
                    if penalty.origin:
                        origin[k] = penalty.origin[layer].to(origin)
            self.terms.append((names, rows.detach(), origin.detach()))

    def __call__(self, parameters: Mapping[str, Tensor]) -> Tensor:
        total = torch.zeros_like(self.lam)
        for names, rows, origin in self.terms:
            theta = torch.cat([parameters[name].flatten(1) for name in names], dim=1) - origin
            total = total + repulsion(self.form, rows, theta)
        return self.lam * total


@contextmanager
def _batched(what: str = "their forward pass or loss has no batched form") -> Iterator[None]:
    """What ``vmap`` cannot do, as one sentence."""
    try:
        yield
    except (PnError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].removeprefix("vmap: ").split(". ")[0]
        raise TrainingError(
            f"these networks cannot be trained together: {what} ({reason.rstrip('.')}); leave out --together"
        ) from error


def _joined(name: str, states: Sequence[Mapping[str, Tensor] | None]) -> Tensor:
    """An entry of the members' optimiser states, stacked; step counts are common."""
    values = [state[name] for state in states if state]
    return torch.stack(values) if values[0].ndim else values[0]
