"""The persistent penalty: repulsion from every earlier end point, for use in any training loop."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Mapping, Sequence
from operator import attrgetter

import torch
from torch import Tensor, nn

from pnanalysis.errors import TrainingError
from pnanalysis.inputs.copies import as_real
from pnanalysis.inputs.models import parameter_layers
from trainers.choices import check_choice
from trainers.loop import long_sums

Layers = str | int | Sequence[str | int]


class PersistentPenalty:
    r"""The persistent term of a loss (Min 2020, eq. 4 and 5).

    .. math:: \lambda \sum_k \sum_l |\langle\Theta_k^l, \theta^l\rangle| / \lVert\Theta_k^l\rVert^2

    where :math:`\theta^l` is the vector of all trainable parameters that layer *l* owns, weight and bias together, and
    :math:`\Theta_k` the earlier end points.

    On the CPU a call costs about two passes over the parameters, however many end points there are: between sign
    changes the term is linear in :math:`\theta`, so one signed sum represents all end points, and an inner product is
    computed again only once the parameters have moved far enough for its sign to change (:class:`_SignedSum`). On
    other devices value and gradient are one matrix-vector product each.

    Parameters
    ----------
    model : torch.nn.Module
        The network to train; its parameters are read at every call.
    lam : float
        Strength, :math:`\lambda \ge 0`.
    layers : "all", "random", str, int or sequence of these
        Layers to repel, by module name or by position; ``"random"`` draws one.
    seed : int
        Seed of that draw.
    form : {"absolute", "squared", "cosine"}
        With :math:`p = \langle\Theta_k^l, \theta^l\rangle`: the paper's :math:`|p| / \lVert\Theta_k^l\rVert^2`, or its
        square, smooth where the paper's has a kink, or the cosine
        :math:`|p| / (\lVert\Theta_k^l\rVert \lVert\theta^l\rVert)`, which does not reward small parameters.
    origin : Module or mapping of str to Tensor, optional
        Measure all parameters from this point, for example from the common start: :math:`\theta - \theta_0` in place of
        :math:`\theta`. By default the term depends on where the origin of parameter space lies, as in the paper.

    Raises
    ------
    TrainingError
        If ``lam`` is negative or not finite, the form is unknown, a layer does not exist (the message lists them), or
        the origin has other parameters than the network; if the network has none that are trainable.

    Notes
    -----
    A complex parameter counts as two real ones. The sign of a zero inner product counts as zero. A layer of an end
    point that is all zeros has no direction: it is left out, with one warning.

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

    def __init__(
        self,
        model: nn.Module,
        lam: float = 0.01,
        layers: Layers = "all",
        seed: int = 0,
        *,
        form: str = "absolute",
        origin: nn.Module | Mapping[str, Tensor] | None = None,
    ) -> None:
        if not (math.isfinite(lam) and lam >= 0):
            raise TrainingError(f"lam is {lam}; it must be a finite number, zero or more")
        check_choice("penalty", form)
        self.model = model
        self.lam = float(lam)
        self.form = form
        found = {name: [full for full, _ in own] for name, own in parameter_layers(model)}
        if not found:
            raise TrainingError("the network has no trainable parameters, so that there is no layer to repel")
        self.layers: dict[str, list[str]] = {name: found[name] for name in choose_layers(list(found), layers, seed)}
        self._anchors: dict[str, Tensor] = {}
        self._sums: dict[str, _SignedSum] = {}
        self.origin: dict[str, Tensor] = {}
        self._count = 0
        self._warned = False
        if origin is not None:
            state = _named_tensors(origin)
            self.origin = {layer: self._vector(names, state) for layer, names in self.layers.items()}

    def __len__(self) -> int:
        """Number of end points."""
        return self._count

    def add(self, end: nn.Module | Mapping[str, Tensor]) -> None:
        """Repel from another end point from now on.

        Parameters
        ----------
        end : Module or mapping of str to Tensor
            A trained network, or its state dict; it is copied.

        Raises
        ------
        TrainingError
            If a parameter of a repelled layer is missing or of another shape.
        """
        state = _named_tensors(end)
        for layer, names in self.layers.items():
            row = self._row(layer, names, state)
            previous = self._anchors.get(layer)
            self._anchors[layer] = row[None] if previous is None else torch.cat([previous, row[None]])
        self._count += 1
        self._sums.clear()

    def inner_products(self, model: nn.Module | None = None) -> dict[str, Tensor]:
        """``<Theta_k, theta> / ||Theta_k||^2`` per layer, shape (number of end points,)."""
        model = self.model if model is None else model
        return {
            layer: long_sums.products(self.rows(layer, theta), theta)
            for layer in self.layers
            for theta in [self._theta(layer, model)]
        }

    def __call__(self, model: nn.Module | None = None) -> Tensor:
        """The penalty at the model's current parameters, a differentiable scalar."""
        model = self.model if model is None else model
        terms = [self._term(layer, self._theta(layer, model), model) for layer in self.layers]
        return self.lam * torch.stack(terms).sum()

    def _term(self, layer: str, theta: Tensor, model: nn.Module) -> Tensor:
        # The signed sum reads the values of the parameters. That would stall a GPU, and inside torch.func's transforms,
        # where the parameters are replaced by wrapped tensors, there are no values to read.
        readable = theta.device.type == "cpu" and all(
            isinstance(attrgetter(name)(model), nn.Parameter) for name in self.layers[layer]
        )
        if self.form != "absolute" or not readable or not self._count:
            return repulsion(self.form, self.rows(layer, theta), theta)
        if layer not in self._sums or self._sums[layer].rows.dtype != theta.dtype:
            self._sums[layer] = _SignedSum(self.rows(layer, theta))
        return self._sums[layer].at(theta)

    def _theta(self, layer: str, model: nn.Module) -> Tensor:
        theta = torch.cat([as_real(attrgetter(name)(model)).reshape(-1) for name in self.layers[layer]])
        return theta - self.origin[layer].to(theta) if self.origin else theta

    def rows(self, layer: str, like: Tensor) -> Tensor:
        """The layer's end points over their squared norms, ``(n, P_l)``, with the device and dtype of ``like``."""
        anchors = self._anchors.get(layer)
        if anchors is None:
            return like.detach().new_zeros(0, len(like))
        if anchors.device != like.device or anchors.dtype != like.dtype:
            anchors = self._anchors[layer] = anchors.to(like.device, like.dtype)
        return anchors

    def _row(self, layer: str, names: list[str], state: Mapping[str, Tensor]) -> Tensor:
        vector = self._vector(names, state)
        if self.origin:
            vector = vector - self.origin[layer]
        squared_norm = vector.double().square().sum()
        if squared_norm == 0:
            if not self._warned:
                warnings.warn(
                    f"layer {layer!r} of an end point is all zeros: it repels nothing and is left out", stacklevel=3
                )
            self._warned = True
            return torch.zeros_like(vector)
        return (vector.double() / squared_norm).to(vector.dtype)

    def _vector(self, names: list[str], state: Mapping[str, Tensor]) -> Tensor:
        parts = []
        for name in names:
            own = self.model.get_parameter(name)
            if name not in state or state[name].shape != own.shape:
                raise TrainingError(f"the end point has no parameter {name!r} of shape {tuple(own.shape)}")
            parts.append(as_real(state[name].detach().to(own)).reshape(-1))
        return torch.cat(parts)


class _SignedSum:
    r""":math:`\sum_k |\langle a_k, \theta\rangle|` along a path, mostly without reading the rows :math:`a_k`.

    A sign cannot change before :math:`\theta` has moved by :math:`|\langle a_k, \theta\rangle| / \lVert a_k\rVert`
    (by the Cauchy-Schwarz inequality). The movement is at most the length of the path so far, so each row has a mark on
    that length before which its sign cannot have changed; only rows past their mark are multiplied again.
    """

    _SLACK = 1e-5  # relative to the norm of theta: well above the round-off of an inner product

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.norms = long_sums.norm(rows)
        self.signs = torch.zeros_like(self.norms)
        # Rows of zeros are never due: their sign is always zero.
        self.due = torch.where(self.norms > 0, -math.inf, math.inf).double()
        self.first_due = float(self.due.min())
        self.sum = torch.zeros_like(rows[0])
        self.travelled = 0.0
        self.before: Tensor | None = None

    def at(self, theta: Tensor) -> Tensor:
        """The sum at ``theta``, differentiable."""
        here = theta.detach()
        if self.before is not None:
            self.travelled += long_sums.distance(here, self.before)
        self.before = here
        if not self.travelled < self.first_due:  # so written, NaN parameters update the signs too
            self._update_signs(here)
        value = torch.dot(self.sum, theta)
        # The gradient is right in any case. To correct the value alone takes less time than to differentiate chunks.
        return value + (long_sums.dot(self.sum, here) - value.detach())

    def _update_signs(self, here: Tensor) -> None:
        index = (self.due <= self.travelled).nonzero().flatten()
        rows = self.rows if len(index) == len(self.rows) else self.rows[index]
        products = long_sums.products(rows, here)
        room = products.abs() / self.norms[index] - self._SLACK * long_sums.norm(here)
        self.due[index] = self.travelled + room.clamp_min(0).double()
        self.first_due = float(self.due.min())
        signs = products.sign()
        if not torch.equal(signs, self.signs[index]):
            self.signs[index] = signs
            self.sum = self.signs @ self.rows


def repulsion(form: str, rows: Tensor, theta: Tensor) -> Tensor:
    """A layer's term of the penalty without its strength: rows ``(..., n, P_l)``, parameters ``(..., P_l)``.

    Rows are end points over their squared norms; a row of zeros adds nothing.
    """
    products = long_sums.products(rows, theta)
    if form == "absolute":
        return products.abs().sum(-1)
    if form == "squared":
        return products.square().sum(-1)
    tiny = torch.finfo(theta.dtype).tiny
    norms, length = long_sums.norm(rows), long_sums.norm(theta)
    cosines = torch.where(norms > 0, products / norms.clamp_min(tiny), 0)
    return torch.where(length > 0, cosines.abs().sum(-1) / length.clamp_min(tiny), 0)


def _named_tensors(point: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return dict(point.named_parameters(remove_duplicate=False)) if isinstance(point, nn.Module) else point


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
