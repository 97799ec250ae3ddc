"""A function of two numbers and its gradient, traced once and rewritten as plain Python or NumPy arithmetic.

A step of gradient descent in two dimensions is some fifty additions, products and exponentials. As torch operations
they cost some hundred microseconds, as Python floats two. The function is traced through torch (so its derivative is
torch's own), constants are folded, and what is left becomes straight-line code.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import reduce
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

Surface = Callable[[Tensor, Tensor], Tensor]
Gradient = Callable[[Any, Any], tuple[Any, Any, Any]]

_aten = torch.ops.aten
_ELEMENTARY = ("exp", "expm1", "log", "log1p", "sqrt", "sin", "cos", "tan", "sinh", "cosh", "tanh", "atan", "asinh")
_OPERATORS: dict[Any, Callable[..., Any]] = {
    _aten.mul.Tensor: operator.mul,
    _aten.mul.Scalar: operator.mul,
    _aten.div.Tensor: operator.truediv,
    _aten.div.Scalar: operator.truediv,
    _aten.neg.default: operator.neg,
    _aten.abs.default: operator.abs,
}
_SUMS: dict[Any, Callable[..., Any]] = {
    _aten.add.Tensor: operator.add,
    _aten.add.Scalar: operator.add,
    _aten.sub.Tensor: operator.sub,
    _aten.sub.Scalar: operator.sub,
}
_SAME = {_aten.alias.default, _aten.detach.default, _aten.clone.default, _aten.lift_fresh_copy.default}
_SIGNS = {_aten.sgn.default, _aten.sign.default}
_CONSTANTS = {_aten.ones_like.default: 1.0, _aten.zeros_like.default: 0.0}


class _Unknown(Exception):
    """An operation that has no plain counterpart here."""


def compile_gradient(surface: Surface, numbers: Literal["float", "array"]) -> Gradient | None:
    """A function ``(x, y) -> (df/dx, df/dy, f)`` of Python floats, or of NumPy arrays elementwise.

    Parameters
    ----------
    surface : callable
        Function of two 0-d float64 tensors, made of torch operations.
    numbers : {"float", "array"}
        Floats raise :class:`ArithmeticError` or :class:`ValueError` where torch would give infinity or NaN.

    Returns
    -------
    callable or None
        ``None`` if the surface cannot be traced or holds operations unknown here.
    """

    def gradient(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        slopes, value = torch.func.grad_and_value(surface, argnums=(0, 1))(x, y)
        return *slopes, value

    point = torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.25, dtype=torch.float64)
    try:
        traced = make_fx(gradient)(*point)
        return _rewrite(traced, math if numbers == "float" else np)
    except (_Unknown, RuntimeError, TypeError):
        return None


def _rewrite(traced: fx.GraphModule, module: Any) -> Gradient:
    """The traced graph as code over ``module``'s functions (``math`` or ``numpy``)."""
    code = _Code(module)
    values: dict[fx.Node, Any] = {}
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            values[node] = code.graph.placeholder("xy"[len(values)])
        elif node.op == "call_function":
            args = [values[arg] if isinstance(arg, fx.Node) else arg for arg in node.args]
            values[node] = code.operation(node.target, args, node.kwargs)
        elif node.op == "output":
            code.graph.output(tuple(values[arg] for arg in node.args[0]))
        else:  # a tensor the surface holds
            values[node] = _number(getattr(traced, node.target))
    code.graph.eliminate_dead_code()
    return fx.GraphModule({}, code.graph).forward


class _Code:
    """A graph of plain arithmetic under construction; constants are worked out at once, never written."""

    def __init__(self, module: Any) -> None:
        self.module, self.graph = module, fx.Graph()
        self._known: dict[tuple[Any, ...], fx.Node] = {}

    def operation(self, target: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """The counterpart of one torch operation."""
        if target in _SAME:
            return args[0]
        if target in _CONSTANTS:
            return _CONSTANTS[target]
        if target in (_aten.full_like.default, _aten.scalar_tensor.default):
            return args[-1]
        if target in _SUMS:
            alpha = kwargs.get("alpha", args[2] if len(args) > 2 else 1)
            return self.call(_SUMS[target], args[0], self.call(operator.mul, args[1], alpha))
        if target in _OPERATORS:
            return self.call(_OPERATORS[target], *args)
        if target in _SIGNS:
            sign: Callable[..., Any] = _sign if self.module is math else np.sign
            return self.call(sign, args[0])
        if target in _COMPOSED:
            return _COMPOSED[target](self, *args)
        name = str(target).removeprefix("aten.").removesuffix(".default")
        if name in _ELEMENTARY:
            return self.function(name, args[0])
        raise _Unknown(str(target))

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """``function(*args)``: its value if all are constants, one of them if the rest is neutral, else code."""
        if not any(isinstance(arg, fx.Node) for arg in args):
            return function(*args)
        if function is operator.mul and 1 in args:
            return args[0] if args[1] == 1 else args[1]
        if function is operator.truediv and args[1] == 1:
            return args[0]
        key = (function, *args)
        if key not in self._known:
            self._known[key] = self.graph.call_function(function, args)
        return self._known[key]

    def power(self, base: Any, exponent: Any) -> Any:
        """Small whole powers as products, the others by the module's function."""
        if exponent in (1, 2, 3, 4):
            half = self.power(base, exponent // 2) if exponent > 1 else 1
            square = self.call(operator.mul, half, half)
            return self.call(operator.mul, square, base) if exponent % 2 else square
        power: Callable[..., Any] = math.pow if self.module is math else np.power
        return self.call(power, base, exponent)

    def function(self, name: str, argument: Any) -> Any:
        """A function by its name in ``math``."""
        return self.call(getattr(self.module, _renamed(name, self.module)), argument)

    def sigmoid(self, x: Any) -> Any:
        """1 / (1 + exp(-x))."""
        return self.over(1.0, self.call(operator.add, 1.0, self.function("exp", self.call(operator.neg, x))))

    def over(self, a: Any, b: Any) -> Any:
        """a / b."""
        return self.call(operator.truediv, a, b)

    def times(self, *factors: Any) -> Any:
        """The product."""
        return reduce(lambda a, b: self.call(operator.mul, a, b), factors)

    def minus(self, a: Any, b: Any) -> Any:
        """a - b."""
        return self.call(operator.sub, a, b)


_COMPOSED: dict[Any, Callable[..., Any]] = {
    _aten.pow.Tensor_Scalar: _Code.power,
    _aten.pow.Scalar: _Code.power,
    _aten.rsub.Scalar: lambda code, x, c: code.minus(c, x),
    _aten.reciprocal.default: lambda code, x: code.over(1.0, x),
    _aten.rsqrt.default: lambda code, x: code.over(1.0, code.function("sqrt", x)),
    _aten.sigmoid.default: _Code.sigmoid,
    _aten.sigmoid_backward.default: lambda code, slope, s: code.times(slope, s, code.minus(1.0, s)),
    _aten.tanh_backward.default: lambda code, slope, t: code.times(slope, code.minus(1.0, code.times(t, t))),
}


def _number(constant: Tensor) -> float:
    if constant.ndim:
        raise _Unknown("a constant that is not one number")
    return float(constant)


def _sign(x: float) -> float:
    return float((x > 0) - (x < 0))


def _renamed(name: str, module: Any) -> str:
    return {"atan": "arctan", "asinh": "arcsinh"}.get(name, name) if module is np else name
