r"""What an optimizer makes of the gradient: its preconditioner, and the curvature at which its steps become unstable.

A step is :math:`\theta \leftarrow \theta - \eta P^{-1} m` with a diagonal :math:`P` and momentum :math:`m` of the
gradients. On a quadratic loss with a constant :math:`P` it is unstable exactly if the largest eigenvalue of
:math:`P^{-1/2} H P^{-1/2}` exceeds a threshold that depends on the momentum:

============================================  ==================================================================
gradient descent                              :math:`2 / \eta`
momentum :math:`\mu`, dampening :math:`\tau`  :math:`2 (1 + \mu) / ((1 - \tau) \eta)`, none for :math:`\tau \ge 1`
Nesterov momentum                             :math:`2 (1 + \mu) / ((1 + 2 \mu) \eta)`
averaged gradients (Adam)                     :math:`2 (1 + \beta_1) / ((1 - \beta_1) \eta)`
============================================  ==================================================================

Weight decay that is added to the gradient (SGD, Adam, RMSprop) is part of the curvature; decoupled weight decay (AdamW)
is not preconditioned and left out.

References
----------
Cohen et al., arXiv 2103.00065 (gradient descent). Cohen et al., arXiv 2207.14484 (adaptive methods).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pnanalysis.errors import ModelError
from pnanalysis.spectra.linear_operator import LinearOperator

#: Thresholds of parameter groups that agree within this are one.
_SAME = 1e-6


@dataclass(frozen=True)
class Preconditioner:
    """The preconditioner of an optimizer as it is after a step.

    Attributes
    ----------
    inverse : mapping of str to Tensor, or None
        The diagonal of ``1 / P`` by the names of the parameters, in their shapes; parameters that the optimizer does
        not move have zeros. Where groups have their own learning rates, it includes their ratio to ``learning_rate``.
        ``None`` before the first step of an optimizer that adapts.
    decay : mapping of str to float
        Weight decay that the optimizer adds to the gradient, by parameter.
    learning_rate : float
        The largest of the groups that train parameters of the network: see :func:`training_groups`.
    threshold : float
        Largest eigenvalue of the preconditioned Hessian at which steps are stable; NaN if groups differ in it.
    constant : bool
        Whether all parameters have the same ``1 / P`` and the same decay.
    """

    inverse: Mapping[str, Tensor] | None
    decay: Mapping[str, float]
    learning_rate: float
    threshold: float
    constant: bool = False


def read_preconditioner(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> Preconditioner:
    """The preconditioner of SGD, Adam, AdamW, RMSprop or Adagrad, from the optimizer's state.

    Parameters
    ----------
    optimizer : Optimizer
    parameters : mapping of str to Parameter
        Those of the network, by name.

    Returns
    -------
    Preconditioner
        Its tensors are not those of the optimizer.

    Raises
    ------
    ModelError
        If the optimizer is of another class, maximises, or trains none of the parameters.
    """
    name = type(optimizer).__name__
    rule = _RULES.get(type(optimizer))
    if rule is None:
        known = ", ".join(kind.__name__ for kind in _RULES)
        raise ModelError(
            f"the preconditioner of {name} is not known (those of {known} are); give preconditioner=, "
            "a function of the optimizer and the parameters by name"
        )
    names = {id(parameter): name for name, parameter in parameters.items()}
    groups = training_groups(optimizer, parameters)
    if not groups:
        raise ModelError(f"this {name} trains none of the parameters of the network; give the one that does")
    if any(group.get("maximize") for group in groups):
        raise ModelError(f"this {name} maximises, for which there is no threshold")
    if any(parameters[names[id(p)]].is_complex() for group in groups for p in group["params"] if id(p) in names):
        raise ModelError("the preconditioners of complex parameters are not supported")
    rate = max(float(group["lr"]) for group in groups)
    inverse: dict[str, Tensor] = {}
    decay: dict[str, float] = {}
    factors: list[float] = []
    for group in groups:
        factors.append(_momentum_factor(group, averaged="betas" in group))
        scale = float(group["lr"]) / rate if rate else 1.0
        coupled = 0.0 if _is_decoupled(optimizer, group) else float(group["weight_decay"])
        for parameter in group["params"]:
            if id(parameter) in names and parameter.requires_grad:
                one = rule(group, optimizer.state.get(parameter, {}), parameter.detach())
                inverse[names[id(parameter)]] = one.mul_(scale)
                decay[names[id(parameter)]] = coupled
    missing = parameters.keys() - inverse.keys()
    same_factor = all(math.isclose(one, factors[0], rel_tol=_SAME) for one in factors)
    is_whole = not any(parameters[name].requires_grad for name in missing)
    inverse |= {name: torch.zeros_like(parameters[name].detach()) for name in missing}
    started = type(optimizer) is torch.optim.SGD or any(bool(one.any()) for one in inverse.values())
    return Preconditioner(
        inverse if started else None,
        {**decay, **dict.fromkeys(missing, 0.0)},
        rate,
        (factors[0] / rate if rate else float("inf")) if same_factor else float("nan"),
        constant=type(optimizer) is torch.optim.SGD and is_whole and len({float(g["lr"]) for g in groups}) == 1
        and len(set(decay.values())) == 1,
    )  # fmt: skip


def training_groups(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> list[dict[str, Any]]:  # fmt: skip
    """The groups of an optimizer with any of these parameters that is not frozen: the others move none of them."""
    own = {id(parameter) for parameter in parameters.values() if parameter.requires_grad}
    return [group for group in optimizer.param_groups if any(id(p) in own for p in group["params"])]


def trained_parameters(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[nn.Parameter]:
    """The parameters of a network that an optimizer moves; all that are not frozen where it holds copies of them."""
    unfrozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [parameter for parameter in unfrozen if id(parameter) in held] or unfrozen


def _momentum_factor(group: Mapping[str, Any], averaged: bool) -> float:
    """The threshold times the learning rate; infinite where gradients are dampened to nothing, NaN beyond."""
    if averaged:
        beta = float(group["betas"][0])
        return 2 * (1 + beta) / (1 - beta)
    momentum = float(group.get("momentum", 0.0))
    if group.get("nesterov"):
        return 2 * (1 + momentum) / (1 + 2 * momentum)
    dampening = float(group.get("dampening", 0.0)) if momentum else 0.0
    if dampening >= 1:
        return math.inf if dampening == 1 else math.nan
    return 2 * (1 + momentum) / (1 - dampening)


def _is_decoupled(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> bool:
    return isinstance(optimizer, torch.optim.AdamW) or bool(group.get("decoupled_weight_decay"))


def _of_sgd(group: Mapping[str, Any], state: Mapping[str, Any], parameter: Tensor) -> Tensor:
    return torch.ones_like(parameter)


def _of_adam(group: Mapping[str, Any], state: Mapping[str, Any], parameter: Tensor) -> Tensor:
    if not state:
        return _without_state(parameter)
    step = float(state["step"])
    beta1, beta2 = map(float, group["betas"])
    square = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
    root = (square.to(_at_least_single(square)) / (1 - beta2**step)).sqrt() + float(group["eps"])
    return (root * (1 - beta1**step)).reciprocal()


def _of_rmsprop(group: Mapping[str, Any], state: Mapping[str, Any], parameter: Tensor) -> Tensor:
    if not state:
        return _without_state(parameter)
    square = state["square_avg"].to(_at_least_single(parameter))
    if group["centered"]:
        square = square - state["grad_avg"].to(square) ** 2
    return (square.sqrt() + float(group["eps"])).reciprocal()


def _of_adagrad(group: Mapping[str, Any], state: Mapping[str, Any], parameter: Tensor) -> Tensor:
    step = float(state["step"]) if state else 0.0
    if step < 1:
        return _without_state(parameter)
    slowed = 1 + (step - 1) * float(group["lr_decay"])
    return (slowed * (state["sum"].to(_at_least_single(parameter)).sqrt() + float(group["eps"]))).reciprocal()


def _without_state(parameter: Tensor) -> Tensor:
    """Of a parameter that has had no gradient so far and has not been moved."""
    return torch.zeros_like(parameter, dtype=_at_least_single(parameter))


def _at_least_single(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


_Rule = Callable[[Mapping[str, Any], Mapping[str, Any], Tensor], Tensor]
_RULES: dict[type[torch.optim.Optimizer], _Rule] = {
    torch.optim.SGD: _of_sgd,
    torch.optim.Adam: _of_adam,
    torch.optim.AdamW: _of_adam,
    torch.optim.RMSprop: _of_rmsprop,
    torch.optim.Adagrad: _of_adagrad,
}


class PreconditionedOperator:
    r""":math:`P^{-1/2} (H + W) P^{-1/2}` with the diagonal matrices of a preconditioner and of weight decay.

    Its eigenvalues are those of :math:`P^{-1} (H + W)`.

    Parameters
    ----------
    operator : LinearOperator
        The Hessian.
    inverse : Tensor
        Diagonal of ``1 / P``, ``(P,)``, not negative.
    decay : Tensor
        Weight decay of each parameter, ``(P,)``, beyond that in the operator.
    """

    def __init__(self, operator: LinearOperator, inverse: Tensor, decay: Tensor) -> None:
        self.operator = operator
        self.shape, self.device, self.dtype = operator.shape, operator.device, operator.dtype
        self.root = inverse.to(self.device, torch.float64).sqrt().to(self.dtype)[:, None]
        self.shift = (inverse * decay).to(self.device, self.dtype)[:, None]

    def matvec(self, v: Tensor) -> Tensor:
        return self.matmat(v[:, None])[:, 0]

    def matmat(self, V: Tensor) -> Tensor:
        return self.root * self.operator.matmat(self.root * V) + self.shift * V
