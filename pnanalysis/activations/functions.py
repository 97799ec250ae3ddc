"""The activation functions that are recognised, and their asymptotes."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite


@dataclass(frozen=True)
class Activation:
    """An activation function.

    Attributes
    ----------
    name : str
    low, high : float
        Horizontal asymptotes, infinite where there is none.
    rectifier : bool
        Whether the output is positive exactly where the input is.
    """

    name: str
    low: float = -inf
    high: float = inf
    rectifier: bool = False

    @property
    def bounded(self) -> bool:
        """Whether there are both asymptotes."""
        return isfinite(self.low) and isfinite(self.high)


def rectifier(name: str, low: float = 0.0, high: float = inf) -> Activation:
    """An activation function whose output is positive exactly where the input is."""
    return Activation(name, low, high, rectifier=True)


_GELU, _SILU, _HARDSIGMOID = rectifier("gelu"), rectifier("silu"), Activation("hardsigmoid", 0.0, 1.0)

#: The activation functions that are recognised, by name (see :func:`pnanalysis.activations.axis_rules.name_of`).
ACTIVATIONS: dict[str, Activation] = {
    "tanh": Activation("tanh", -1.0, 1.0),
    "sigmoid": Activation("sigmoid", 0.0, 1.0),
    "expit": Activation("sigmoid", 0.0, 1.0),
    "relu": rectifier("relu"),
    "relu6": rectifier("relu6", 0.0, 6.0),
    "leaky_relu": rectifier("leaky_relu", -inf),
    "rrelu": rectifier("rrelu", -inf),
    "prelu": rectifier("prelu", -inf),
    "elu": rectifier("elu", -1.0),
    "selu": rectifier("selu", -1.7580993408473766),
    "celu": rectifier("celu", -1.0),
    "gelu": _GELU,
    "silu": _SILU,
    "mish": rectifier("mish"),
    "hardtanh": Activation("hardtanh", -1.0, 1.0),
    "hardsigmoid": _HARDSIGMOID,
    "hardswish": rectifier("hardswish"),
    "softplus": Activation("softplus", 0.0),
    "softsign": Activation("softsign", -1.0, 1.0),
    "logsigmoid": Activation("logsigmoid", high=0.0),
    "log_sigmoid": Activation("logsigmoid", high=0.0),
}

#: Activation functions that are modules made of simpler functions, by the lower-case names of their classes without
#: ``Activation`` at the end.
COMPOSITES: dict[str, Activation] = {
    **dict.fromkeys(("gelu", "newgelu", "fastgelu", "quickgelu", "accurategelu", "approxgelu"), _GELU),
    **dict.fromkeys(("gelutanh", "pytorchgelutanh", "tanhgelu", "gelunew", "geluapprox"), _GELU),
    **dict.fromkeys(("silu", "swish"), _SILU),
    "mish": rectifier("mish"),
    **dict.fromkeys(("hardswish", "hswish"), rectifier("hardswish")),
    **dict.fromkeys(("hardsigmoid", "hsigmoid"), _HARDSIGMOID),
    **dict.fromkeys(("relusquared", "squaredrelu"), rectifier("relu_squared")),
    "laplace": Activation("laplace", 0.0, 1.0),
}

#: Names of those that cannot exceed one in size.
BOUNDED_BY_ONE = frozenset(
    activation.name
    for activation in (*ACTIVATIONS.values(), *COMPOSITES.values())
    if activation.low >= -1 and activation.high <= 1
)
