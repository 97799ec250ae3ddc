"""Many 1 -> h -> h -> 1 ReLU networks trained by full-batch gradient descent with momentum, with gradients by hand.

A step of so small a network takes less time than launching its operations, so there are as few operations as possible,
each for all networks, into memory allocated once. A layer is one block of numbers per network: its weights, input by
input, then its biases, so that with a constant 1 appended to its input a layer is one batched matrix product, forwards
and backwards. The blocks of all layers and networks are in one tensor, so that a momentum step is one operation.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

_GRAPH_STEPS = 25  # steps in one CUDA graph: few enough to record at once, enough to hide the launch
_WARM_UP_STEPS = 3
_WORTH_THREADS = 4_000_000  # multiplications in the middle layer; with fewer, threads cost more than they save
_relu_backward = torch.ops.aten.threshold_backward.grad_input


def layer_sizes(width: int) -> tuple[int, int, int]:
    """Parameters of the three layers, weight and bias together."""
    return 2 * width, (width + 1) * width, width + 1


def pack(state: Mapping[str, Tensor]) -> Tensor:
    """The parameters ``(P,)`` of a ``relu32`` network's state dict, in the order used here."""
    parts = []
    for layer in ("fc1", "fc2", "fc3"):
        parts += [state[f"{layer}.weight"].T.reshape(-1), state[f"{layer}.bias"]]
    return torch.cat(parts).detach()


def unpack(parameters: Tensor, width: int) -> dict[str, Tensor]:
    """The state dict of the ``relu32`` network (of this width) with the given parameters ``(P,)``."""
    state = {}
    blocks = parameters.split(layer_sizes(width))
    for layer, block, n_out in zip(("fc1", "fc2", "fc3"), blocks, (width, width, 1), strict=True):
        matrix = block.reshape(-1, n_out)
        state[f"{layer}.weight"], state[f"{layer}.bias"] = matrix[:-1].T.contiguous(), matrix[-1].clone()
    return state


def predict(parameters: Tensor, x: Tensor, width: int) -> Tensor:
    """Outputs ``(B, n)`` of the networks ``parameters`` ``(B, P)`` at inputs ``x`` ``(n,)``."""
    first, second, third = parameters.split(layer_sizes(width), dim=1)
    hidden = (first[:, None, :width] * x[:, None] + first[:, None, width:]).relu()
    middle = second.reshape(len(parameters), width + 1, width)
    hidden = (hidden @ middle[:, :-1] + middle[:, -1:]).relu()
    return (hidden @ third[:, :-1, None])[..., 0] + third[:, -1:]


class Repulsion:
    """Gradient of the persistent penalty for each network of a batch.

    Parameters
    ----------
    ends : Tensor, shape (n, B, P)
        End points of the n earlier iterations of each network.
    lams : Tensor, shape (B,)
        Strength for each network.
    width : int

    Notes
    -----
    The gradient is a sum of signed, scaled end points. It is summed again only when a sign has changed; on a GPU at
    every step, since there checking the signs would stall the device.
    """

    def __init__(self, ends: Tensor, lams: Tensor, width: int) -> None:
        n, b, p = ends.shape
        self.anchors, zero_layers = [], 0
        for block in ends.double().split(layer_sizes(width), dim=2):
            norm = block.square().sum(2, keepdim=True)
            zero_layers += int((norm == 0).sum())
            scale = torch.where(norm > 0, lams.double()[:, None] / norm, 0.0)
            self.anchors.append((block * scale).to(ends.dtype).transpose(0, 1).contiguous())  # (B, n, size of layer)
        if zero_layers:
            warnings.warn(
                f"{zero_layers} layers of end points are zero: they repel nothing and are left out", stacklevel=4
            )
        self.gradient = ends.new_zeros(b * p)
        sizes = [anchor.shape[2] for anchor in self.anchors]
        self._parts = [f.view(b, 1, size) for f, size in zip(_segments(self.gradient, b, sizes), sizes, strict=True)]
        self._anchors_t = [anchor.mT for anchor in self.anchors]
        self._products = ends.new_zeros(3, b, 1, n)
        # NaN differs from every sign: the first update always sums.
        self._signs, self._new_signs = ends.new_full((3, b, 1, n), math.nan), ends.new_zeros(3, b, 1, n)
        self._always = ends.device.type != "cpu"

    def update(self, layers: list[Tensor]) -> Tensor:
        """The gradient at the layers' parameters, each ``(B, 1, size)``, as one vector, layer by layer."""
        for product, anchor_t, theta in zip(self._products, self._anchors_t, layers, strict=True):
            torch.bmm(theta, anchor_t, out=product)
        torch.sign(self._products, out=self._new_signs)
        if self._always or not torch.equal(self._signs, self._new_signs):
            self._signs.copy_(self._new_signs)
            for part, sign, anchor in zip(self._parts, self._signs, self.anchors, strict=True):
                torch.bmm(sign, anchor, out=part)
        return self.gradient


class ReluBatch:
    """``B`` networks with their momentum and workspace, on one device and in one dtype.

    Parameters
    ----------
    x, y : Tensor, shape (n,)
        The data, the same for all networks.
    initial : Tensor, shape (B, P)
        Starting points, which also determine device and dtype. See :func:`pack` for the order.
    lr, momentum : float
        As in ``torch.optim.SGD``.
    repulsion : Repulsion, optional
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        initial: Tensor,
        width: int,
        lr: float,
        momentum: float,
        repulsion: Repulsion | None = None,
    ) -> None:
        b, n = len(initial), len(x)
        self.lr, self.momentum, self.repulsion = lr, momentum, repulsion
        sizes = layer_sizes(width)
        blocks = initial.split(sizes, dim=1)
        self._theta = torch.cat([block.reshape(-1) for block in blocks])
        self._velocity = torch.zeros_like(self._theta)
        self._layers = [f.view(b, 1, size) for f, size in zip(_segments(self._theta, b, sizes), sizes, strict=True)]
        self._prepare_weights(b, width)
        new = initial.new_empty
        self._x = x.to(initial)[None, :, None]
        self._y = y.to(initial)[None, :, None]
        self._scale = 2 / n
        self._minus_scaled_y = -self._scale * self._y
        self._z1, self._z2, self._delta2 = new(b, n, width), new(b, n, width), new(b, n, width)
        self._a1, self._a2 = initial.new_ones(2, b, n, width + 1)  # the last unit is the bias's constant 1
        self._a1_units, self._a2_units, self._a1_t = self._a1[..., :-1], self._a2[..., :-1], self._a1.mT
        self._output, self._a2_delta3, self._gradient3 = new(b, n, 1), new(b, n, width + 1), new(b, 1, width + 1)
        self._delta1 = new(2, b, n, width)  # times x, and alone
        self._gradient1 = new(2, b, width)
        self._gradient1_t = self._gradient1.transpose(0, 1)
        self._graph: torch.cuda.CUDAGraph | None = None

    def _prepare_weights(self, b: int, width: int) -> None:
        first, second, third = self._layers
        self._w1, self._b1 = first[..., :width], first[..., width:]
        self._w2 = second.view(b, width + 1, width)
        self._w2_t = self._w2[:, :-1].mT
        self._w3, self._w3_units = third.mT, third[..., :-1]
        v1, v2, v3 = _segments(self._velocity, b, layer_sizes(width))
        self._v1, self._v2, self._v3 = v1.view(b, 2, width), v2.view(b, width + 1, width), v3.view(b, 1, width + 1)

    @property
    def parameters(self) -> Tensor:
        """A copy of the parameters, shape (B, P)."""
        return torch.cat(self._layers, dim=2)[:, 0]

    def losses(self) -> Tensor:
        """Mean squared error of each network, shape (B,), float64."""
        self._forward()
        return (self._output - self._y).double().square().mean((1, 2))

    def advance(self, steps: int) -> None:
        """Take ``steps`` steps; on a GPU by replaying a recorded graph, without launching each operation."""
        if self._theta.device.type == "cuda" and steps > _GRAPH_STEPS + _WARM_UP_STEPS:
            with torch.cuda.device(self._theta.device):
                if self._graph is None:
                    steps -= self._record()
                assert self._graph is not None
                for _ in range(steps // _GRAPH_STEPS):
                    self._graph.replay()
            steps %= _GRAPH_STEPS
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        """One step of gradient descent on mean squared error and penalty, with momentum."""
        momentum = self.momentum
        self._forward()
        # delta: gradient of the loss in a layer's outputs before ReLU
        delta3 = torch.add(self._minus_scaled_y, self._output, alpha=self._scale, out=self._output)
        delta2 = torch.mul(delta3, self._w3_units, out=self._delta2)
        _relu_backward(delta2, self._z2, 0, grad_input=delta2)
        delta1_x, delta1 = self._delta1
        torch.bmm(delta2, self._w2_t, out=delta1)
        _relu_backward(delta1, self._z1, 0, grad_input=delta1)
        torch.mul(delta1, self._x, out=delta1_x)
        # velocity = gradient + momentum * velocity
        torch.mul(self._a2, delta3, out=self._a2_delta3)
        torch.sum(self._a2_delta3, 1, keepdim=True, out=self._gradient3)
        torch.add(self._gradient3, self._v3, alpha=momentum, out=self._v3)
        torch.baddbmm(self._v2, self._a1_t, delta2, beta=momentum, out=self._v2)
        torch.sum(self._delta1, 2, out=self._gradient1)
        torch.add(self._gradient1_t, self._v1, alpha=momentum, out=self._v1)
        if self.repulsion is not None:
            self._velocity.add_(self.repulsion.update(self._layers))
        self._theta.add_(self._velocity, alpha=-self.lr)

    def _forward(self) -> None:
        torch.addcmul(self._b1, self._w1, self._x, out=self._z1)
        torch.clamp_min(self._z1, 0, out=self._a1_units)
        torch.bmm(self._a1, self._w2, out=self._z2)
        torch.clamp_min(self._z2, 0, out=self._a2_units)
        torch.bmm(self._a2, self._w3, out=self._output)

    def _record(self) -> int:
        """Record the CUDA graph; returns the number of steps taken to warm up (recording itself takes none)."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_STEPS):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for _ in range(_GRAPH_STEPS):
                self.step()
        return _WARM_UP_STEPS


@contextmanager
def fitting_threads(n_networks: int, n_points: int, width: int) -> Iterator[None]:
    """Use one CPU thread while the body runs, unless the batch is large enough for several."""
    before = torch.get_num_threads()
    if n_networks * n_points * width**2 < _WORTH_THREADS:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _segments(flat: Tensor, b: int, sizes: tuple[int, ...] | list[int]) -> tuple[Tensor, ...]:
    return flat.split([b * size for size in sizes])
