"""What is right, computed independently of the package, in float64, by reverse mode over reverse mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.zoo.entry import ROUND_OFF, Entry, leaves, mapped


def double(nest: Any) -> Any:
    """A nest of tensors in double precision; complex ones stay complex, integers stay as they are."""
    return mapped(nest, lambda t: t.to(_double_type(t)).clone())


def double_network(entry: Entry, seed: int = 0) -> nn.Module:
    """The network of an entry in double precision, out of its wrappers."""
    network = entry.twin_network(seed)
    network = network.module if isinstance(network, nn.DataParallel) else getattr(network, "_orig_mod", network)
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.data = tensor.data.to(_double_type(tensor))
    return network


def double_loss(entry: Entry) -> Callable[[Any, Any], Tensor]:
    """The loss of an entry, with the weights of its classes in double precision."""
    return deepcopy(entry.loss).double() if isinstance(entry.loss, nn.Module) else entry.loss


def call(network: nn.Module, inputs: Any) -> Any:
    """The outputs for copies of inputs by position or by keyword. Fused attention has no second derivative."""
    inputs = mapped(inputs, torch.clone)
    with plain_attention():
        if isinstance(inputs, dict):
            return network(**inputs)
        return network(*inputs) if isinstance(inputs, tuple | list) else network(inputs)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention by its plain implementation, and encoders layer by layer."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


#: Where classes of activation functions are defined.
ACTIVATION_MODULES = ("torch.nn.modules.activation", "transformers.activations", "timm.layers.activations")
NO_ACTIVATIONS = (nn.MultiheadAttention, nn.Softmax)


class Truth:
    """Products of the curvature matrices of an entry's loss with vectors, one batch after the other.

    Parameters
    ----------
    entry : Entry
    names : sequence of str, optional
        The parameters that span the matrices; all trainable ones by default. Complex ones count as their real and
        imaginary parts.
    """

    def __init__(self, entry: Entry, names: Sequence[str] | None = None) -> None:
        self.entry = entry
        self.network = double_network(entry)
        named = {n: p for n, p in self.network.named_parameters() if p.requires_grad and (names is None or n in names)}
        self.names, self.parameters = list(named), list(named.values())
        self.batches = [(double(inputs), double(targets)) for inputs, targets in entry.batches()]
        self.loss = double_loss(entry)

    @property
    def size(self) -> int:
        """P."""
        return len(self._flat([torch.zeros_like(p) for p in self.parameters]))

    def hessian(self, v: Tensor) -> Tensor:
        """The Hessian times a vector, confirmed by its symmetry: torch's own second derivatives can be wrong."""
        if self.entry.differences:
            return self._difference(v)
        u = v.flip(0)
        product, other = (self._mean(lambda x, t, w=w: self._hessian(x, t, w)) for w in (v, u))
        assert abs(float(u @ product - v @ other)) <= max(self.entry.tolerance, ROUND_OFF) * float(
            v.norm() * product.norm()
        )
        return product

    def gauss_newton(self, v: Tensor) -> Tensor:
        return self._mean(lambda inputs, targets: self._gauss_newton(inputs, targets, v))

    def fisher(self, v: Tensor) -> Tensor:
        """The mean over examples of the outer products of their own gradients, times ``v``; the sum, under a sum."""
        total, weight = torch.zeros(self.size, dtype=torch.float64), 0.0
        for inputs, targets in self.batches:
            given = self.entry.example_weights
            n = len(next(leaves(targets)))
            weights = torch.ones(n, dtype=torch.float64) if given is None else given(targets).double()
            for i in range(n):
                if weights[i] == 0:  # nothing counts, and the mean over nothing is not a number
                    continue
                slope = self._flat(self._grad(self._loss_of_example(inputs, targets, slice(i, i + 1))))
                total += weights[i] * slope * (slope @ v)
            weight += float(weights.sum())
        is_sum = sum(self.entry.batch_weights()) > 1 + ROUND_OFF  # else they share the loss
        return total if is_sum else total / weight

    def _loss_of_example(self, inputs: Any, targets: Any, part: slice) -> Tensor:
        one = mapped(targets, lambda t: t[part])
        if self.entry.cuts_outputs:
            return self.loss(mapped(call(self.network, inputs), lambda t: t[part]), one)
        return self.loss(call(self.network, mapped(inputs, lambda t: t[part])), one)

    def dense_hessian(self) -> Tensor:
        """The Hessian itself, (P, P)."""
        eye = torch.eye(self.size, dtype=torch.float64)
        if self.entry.differences:
            return torch.stack([self._difference(row) for row in eye])
        return self._mean(lambda inputs, targets: self._hessian(inputs, targets, eye))

    def _hessian(self, inputs: Any, targets: Any, v: Tensor) -> Tensor:
        """The Hessian of one batch times a vector, or times each row of a matrix."""
        slope = self._flat(self._grad(self.loss(call(self.network, inputs), targets), create_graph=True))
        rows = [self._flat(self._grad(slope @ row)) for row in v.reshape(-1, self.size)]
        return torch.stack(rows).view_as(v)

    def _difference(self, v: Tensor) -> Tensor:
        """The derivative of the gradient along ``v`` by central differences of fourth order."""
        return self._along(
            v, lambda: [self._mean(lambda x, t: self._flat(self._grad(self.loss(call(self.network, x), t))))]
        )[0]

    def _pushed_by_differences(self, inputs: Any, v: Tensor) -> list[Tensor]:
        """The derivative of the outputs along ``v``, likewise."""
        return self._along(v, lambda: [t for t in leaves(call(self.network, inputs)) if t.requires_grad])

    def _along(self, v: Tensor, value: Callable[[], list[Tensor]]) -> list[Tensor]:
        step = 1e-5 / float(v.norm())
        at = {k: self._shifted(k * step * v, value) for k in (-2, -1, 1, 2)}
        pairs = zip(at[-2], at[-1], at[1], at[2], strict=True)
        return [(8 * (high - low) - (highest - lowest)) / (12 * step) for lowest, low, high, highest in pairs]

    def _shifted(self, shift: Tensor, value: Callable[[], list[Tensor]]) -> list[Tensor]:
        """A value at shifted parameters."""
        before = [p.detach().clone() for p in self.parameters]
        parts = shift.split([(2 if p.is_complex() else 1) * p.numel() for p in self.parameters])
        try:
            for p, part in zip(self.parameters, parts, strict=True):
                p.data += torch.view_as_complex(part.reshape(*p.shape, 2)) if p.is_complex() else part.view_as(p)
            return [t.detach().clone() for t in value()]
        finally:
            for p, old in zip(self.parameters, before, strict=True):
                p.data.copy_(old)

    def _gauss_newton(self, inputs: Any, targets: Any, v: Tensor) -> Tensor:
        outputs = call(self.network, inputs)
        through = [t for t in leaves(outputs) if t.requires_grad]
        if self.entry.differences:
            pushed = self._pushed_by_differences(inputs, v)
        else:  # J v by reverse mode twice: the derivative by u of (J^T u) v
            dual = [torch.zeros_like(t, requires_grad=True) for t in through]
            pulled = self._flat(self._grad(through, dual, create_graph=True))
            pushed = torch.autograd.grad(pulled @ v, dual, allow_unused=True, materialize_grads=True)
        cuts = [t.detach().requires_grad_() for t in through]
        at = iter(cuts)
        replaced = mapped(outputs, lambda t: next(at) if t.requires_grad else t)
        slopes = torch.autograd.grad(self.loss(replaced, targets), cuts, create_graph=True, materialize_grads=True)
        if not any(slope.requires_grad for slope in slopes):  # a linear loss
            return torch.zeros_like(v)
        along = sum((s * p).sum() for s, p in zip(slopes, pushed, strict=True))
        curved = torch.autograd.grad(along, cuts, allow_unused=True, materialize_grads=True)
        return self._flat(self._grad(through, list(curved)))

    def _grad(self, of: Any, along: Any = None, create_graph: bool = False) -> list[Tensor]:
        if isinstance(of, Tensor) and not of.requires_grad:  # the gradient of a linear loss
            assert torch.ones((), requires_grad=True).mul(2).requires_grad, "torch no longer records graphs"
            return [torch.zeros_like(p) for p in self.parameters]
        with plain_attention():
            found = torch.autograd.grad(
                of, self.parameters, along, create_graph=create_graph, retain_graph=True, allow_unused=True,
                materialize_grads=True,
            )  # fmt: skip
        return list(found)

    def _flat(self, tensors: Sequence[Tensor]) -> Tensor:
        """One real vector."""
        dense = [t.to_dense() if t.is_sparse else t for t in tensors]
        return torch.cat([(torch.view_as_real(t) if t.is_complex() else t).reshape(-1) for t in dense])

    def _mean(self, of: Callable[[Any, Any], Tensor]) -> Tensor:
        parts = zip(self.entry.batch_weights(), self.batches, strict=True)
        return sum(weight * of(*batch) for weight, batch in parts)  # type: ignore[return-value]


def loss_of(entry: Entry, seed: int = 0) -> float:
    """The loss of an entry's network over all data."""
    network, loss = double_network(entry, seed), double_loss(entry)
    parts = zip(entry.batch_weights(), entry.batches(), strict=True)
    return sum(w * float(loss(call(network, double(x)), double(t))) for w, (x, t) in parts)


def outputs_of(entry: Entry, seed: int) -> Tensor:
    """The outputs for all examples, as one tensor (n, ...)."""
    network = double_network(entry, seed)
    outputs = [call(network, double(inputs)) for inputs, _ in entry.batches()]
    return torch.cat([next(leaves(getattr(each, "logits", each))).detach() for each in outputs])


def distance(entry: Entry, first: int, second: int) -> float:
    """Euclidean distance between the trainable parameters of two networks."""
    pairs = zip(double_network(entry, first).parameters(), double_network(entry, second).parameters(), strict=True)
    return sum(float((p - q).detach().abs().square().sum()) for p, q in pairs if p.requires_grad) ** 0.5


def activation_means(entry: Entry, seed: int = 0) -> dict[str, float]:
    """Mean output of each activation module over all examples, by name; of its first call in a pass."""
    network = double_network(entry, seed)
    outputs: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Callable[..., None]:
        def record(module: nn.Module, arguments: Any, output: Tensor) -> None:
            passed.setdefault(name, output.detach().clone())

        return record

    for name, module in network.named_modules():
        if type(module).__module__ in ACTIVATION_MODULES and not isinstance(module, NO_ACTIVATIONS):
            module.register_forward_hook(hook(name))
    for inputs, _ in entry.batches():
        passed: dict[str, Tensor] = {}
        call(network, double(inputs))
        for name, output in passed.items():
            outputs.setdefault(name, []).append(output.flatten())
    return {name: float(torch.cat(parts).mean()) for name, parts in outputs.items()}


def _double_type(tensor: Tensor) -> torch.dtype:
    if tensor.is_complex():
        return torch.complex128
    return torch.float64 if tensor.is_floating_point() else tensor.dtype
