"""What quantisation of a network's weights does to them: rounding to evenly spaced numbers, or any scheme."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pnanalysis.errors import CurvatureError

#: Bits that weights may be rounded to.
FEWEST_BITS, MOST_BITS = 2, 16
#: What stands for the bits of weights that are given.
GIVEN = 0
#: What becomes of a parameter, by its name and values: values of the same shape.
Scheme = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class Quantisation:
    """What a scheme does to a network.

    Attributes
    ----------
    bits : int
        That weights are rounded to; :data:`GIVEN` for any other scheme.
    change : dict of str to Tensor
        What is added to each parameter.
    covered : frozenset of str
        The parameters that are quantised.
    """

    bits: int
    change: dict[str, Tensor]
    covered: frozenset[str]

    @property
    def digest(self) -> str:
        """Equal for equal changes of equal parameters."""
        found = hashlib.sha256()
        for name, tensor in sorted(self.change.items()):
            numbers = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
            found.update(
                f"{name}{tuple(tensor.shape)}".encode() + numbers.double().cpu().contiguous().numpy().tobytes()
            )
        return found.hexdigest()


def rounded(weights: Tensor, bits: int) -> Tensor:
    """Weights rounded to the nearest of ``2^bits - 1`` evenly spaced numbers, symmetric about zero.

    The largest of them in size is that of the weights. A tensor of zeros stays as it is.

    Parameters
    ----------
    weights : Tensor
    bits : int

    Examples
    --------
    >>> rounded(torch.tensor([1.0, -0.4, 0.1]), 2)
    tensor([1., 0., 0.])
    """
    if weights.is_complex():
        return torch.view_as_complex(rounded(torch.view_as_real(weights.resolve_conj()), bits))
    if not weights.numel():
        return weights
    step = weights.abs().max() / (2 ** (bits - 1) - 1)
    return weights if not step > 0 else torch.round(weights / step) * step


def rounding(parameters: Mapping[str, Tensor], bits: int) -> Quantisation:
    """By :func:`rounded`; biases, norms and other parameters of one dim stay as they are."""
    weights = frozenset(name for name, tensor in parameters.items() if tensor.ndim > 1)
    change = {
        name: rounded(tensor.detach(), bits) - tensor.detach() if name in weights else torch.zeros_like(tensor)
        for name, tensor in parameters.items()
    }
    return Quantisation(bits, change, weights)


def quantisation(parameters: Mapping[str, Tensor], scheme: Scheme) -> Quantisation:
    """By any scheme, which covers the parameters that it changes.

    Raises
    ------
    CurvatureError
        If the scheme gives no finite numbers of the same shape.
    """
    change = {}
    for name, parameter in parameters.items():
        found = scheme(name, parameter.detach().clone())
        if not isinstance(found, Tensor) or found.shape != parameter.shape:
            what = f"of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise CurvatureError(f"{name!r} has the shape {tuple(parameter.shape)}, and is {what} when quantised")
        found = found.dequantize() if found.is_quantized else found.detach()
        if not found.dtype.is_floating_point:
            raise CurvatureError(f"{name!r} is quantised to {found.dtype}; give the numbers that these stand for")
        change[name] = found.to(parameter) - parameter.detach()
        if not bool(torch.isfinite(change[name]).all()):
            raise CurvatureError(f"{name!r} is not finite when quantised")
    covered = frozenset(name for name, tensor in change.items() if bool(tensor.any()))
    return Quantisation(GIVEN, change, covered)


def scheme_of(state: Mapping[str, Tensor], known: Collection[str], first_names: Mapping[str, str]) -> Scheme:
    """The scheme that gives the weights of a state dict; those that it lacks stay as they are.

    Parameters
    ----------
    state : mapping
    known : collection of str
        Names of all parameters and buffers of the network.
    first_names : mapping
        Of every name of a tied tensor to its first, which schemes are asked for; a file may have another.

    Raises
    ------
    CurvatureError
        If the network has no such tensor, or one of its tensors is given with two values.
    """
    unknown = [name for name in state if name not in known]
    if unknown:
        raise CurvatureError(f"the quantised weights have {unknown[0]!r}, which the network does not have")
    for name, tensor in state.items():
        first = first_names.get(name, name)
        if first in state and not torch.equal(state[first], tensor):
            raise CurvatureError(f"the quantised weights {first!r} and {name!r} differ, and are one in the network")
    by_first_name = {first_names.get(name, name): tensor for name, tensor in state.items()}
    return lambda name, parameter: by_first_name.get(name, parameter)


__all__ = [
    "FEWEST_BITS",
    "GIVEN",
    "MOST_BITS",
    "Quantisation",
    "Scheme",
    "quantisation",
    "rounded",
    "rounding",
    "scheme_of",
]
