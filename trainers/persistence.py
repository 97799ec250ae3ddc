"""The persistent penalty: repulsion from every earlier end point, usable in anyone's training loop."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Mapping, Sequence
from operator import attrgetter

import torch
from torch import Tensor, nn

from pnanalysis.errors import TrainingError
from pnanalysis.models import parameter_layers

Layers = str | int | Sequence[str | int]


class PersistentPenalty:
    r"""The persistent term of a loss (Min 2020, eq. 4 and 5).

    .. math:: \lambda \sum_k \sum_l |\langle\Theta_k^l, \theta^l\rangle| / \lVert\Theta_k^l\rVert^2

    where :math:`\theta^l` is the vector of all trainable parameters that layer *l* owns, weight and bias together, and
    :math:`\Theta_k` the earlier end points. All end points of a layer are the rows of one matrix, so that value and
    gradient cost one matrix-vector product each, however many end points there are.

    Parameters
    ----------
    model : torch.nn.Module
        The network in training; its parameters are read at every call.
    lam : float
        Strength, :math:`\lambda \ge 0`.
    layers : "all", "random", str, int or sequence of these
        Layers to repel, by module name or by position; ``"random"`` draws one by ``seed``.
    seed : int
        For ``"random"``.

    Raises
    ------
    TrainingError
        If ``lam`` is negative or not finite, or a layer does not exist (the message lists them).

    Notes
    -----
    The sign of a zero inner product counts as zero. A layer of an end point that is all zeros has no direction to
    repel from: it is left out, and a warning says so once.

    References
    ----------
    Y. Min, "Persistent Neurons", arXiv:2007.01419.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(2, 1)
    >>> penalty = PersistentPenalty(model, lam=0.01)
    >>> penalty.add(model)
    >>> loss = model(torch.ones(1, 2)).square().mean() + penalty()
    """

    def __init__(self, model: nn.Module, lam: float = 0.01, layers: Layers = "all", seed: int = 0) -> None:
        if not (math.isfinite(lam) and lam >= 0):
            raise TrainingError(f"lam is {lam}; it must be a finite number, zero or more")
        self.model = model
        self.lam = float(lam)
        found = {name: [full for full, _ in own] for name, own in parameter_layers(model)}
        self.layers: dict[str, list[str]] = {name: found[name] for name in choose_layers(list(found), layers, seed)}
        self._anchors: dict[str, Tensor] = {}
        self._count = 0
        self._warned = False

    def __len__(self) -> int:
        """Number of end points."""
        return self._count

    def add(self, end: nn.Module | Mapping[str, Tensor]) -> None:
        """Remember an end point.

        Parameters
        ----------
        end : Module or mapping of str to Tensor
            A trained network, or its state dict; it is copied.

        Raises
        ------
        TrainingError
            If a parameter of a repelled layer is missing or of another shape.
        """
        state = dict(end.named_parameters()) if isinstance(end, nn.Module) else end
        for layer, names in self.layers.items():
            row = self._row(layer, names, state)
            previous = self._anchors.get(layer)
            self._anchors[layer] = row[None] if previous is None else torch.cat([previous, row[None]])
        self._count += 1

    def inner_products(self, model: nn.Module | None = None) -> dict[str, Tensor]:
        """``<Theta_k, theta> / ||Theta_k||^2`` per layer, shape (number of end points,)."""
        model = self.model if model is None else model
        products = {}
        for layer, names in self.layers.items():
            theta = torch.cat([attrgetter(name)(model).reshape(-1) for name in names])
            anchors = self._anchors.get(layer)
            if anchors is None:
                products[layer] = theta[:0]
                continue
            if anchors.device != theta.device or anchors.dtype != theta.dtype:
                anchors = self._anchors[layer] = anchors.to(theta)
            products[layer] = anchors @ theta
        return products

    def __call__(self, model: nn.Module | None = None) -> Tensor:
        """The penalty at the model's present parameters, a scalar that can be differentiated."""
        products = self.inner_products(model)
        return self.lam * torch.cat(list(products.values())).abs().sum()

    def _row(self, layer: str, names: list[str], state: Mapping[str, Tensor]) -> Tensor:
        parts = []
        for name in names:
            own = self.model.get_parameter(name)
            if name not in state or state[name].shape != own.shape:
                raise TrainingError(f"the end point has no parameter {name!r} of shape {tuple(own.shape)}")
            parts.append(state[name].detach().to(own).reshape(-1))
        vector = torch.cat(parts)
        norm = vector.double().square().sum()
        if norm == 0:
            if not self._warned:
                warnings.warn(f"layer {layer!r} of an end point is zero and repels nothing: left out", stacklevel=3)
            self._warned = True
            return torch.zeros_like(vector)
        return (vector.double() / norm).to(vector.dtype)


def choose_layers(names: Sequence[str], layers: Layers, seed: int = 0) -> list[str]:
    """Names of the chosen layers, in the network's order.

    Raises
    ------
    TrainingError
        If a name or position does not exist.
    """
    if layers == "all":
        return list(names)
    if layers == "random":
        return [random.Random(seed).choice(list(names))]
    wanted = [layers] if isinstance(layers, str | int) else list(layers)
    chosen = set()
    for layer in wanted:
        if isinstance(layer, int) and -len(names) <= layer < len(names):
            chosen.add(names[layer])
        elif layer in names:
            chosen.add(str(layer))
        else:
            raise TrainingError(f"no layer {layer!r}; there are {', '.join(names)}")
    return [name for name in names if name in chosen]
