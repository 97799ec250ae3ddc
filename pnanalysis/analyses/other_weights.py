"""Weights that are given beside those of the networks: before the last update, or quantised."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from pnanalysis.checks import shown
from pnanalysis.errors import CurvatureError
from pnanalysis.inputs.copies import unwrapped
from pnanalysis.io.weights import State, is_state_dict, read_weights

#: A network, its state dict, or the file of one.
Weights = nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]
T = TypeVar("T")


def by_label(option: str, given: Any, labels: Sequence[str], of: Callable[[str, Any], T]) -> dict[str, T]:
    """What is given for each network, by the names of the networks.

    Parameters
    ----------
    option : str
        What it is called in messages.
    given : object, mapping of str to objects, or None
        A single one where there is a single network.
    labels : sequence of str
    of : callable
        What to make of it: a function of the option's name and one object.

    Raises
    ------
    PnError
        If it is not clear of which network they are.
    """
    if given is None:
        return {}
    if isinstance(given, Mapping) and not is_state_dict(given):
        unknown = [name for name in given if name not in labels]
        if unknown:
            raise CurvatureError(f"{option} has {shown(unknown[0])}; the networks are {', '.join(map(shown, labels))}")
        return {name: of(option, one) for name, one in given.items()}
    if len(labels) != 1:
        raise CurvatureError(f"{option} is one state, of {len(labels)} networks; give a mapping by their names")
    return {labels[0]: of(option, given)}


def parameters_of(option: str, given: Any) -> State:
    """The tensors of a network, a state dict or a file.

    Raises
    ------
    PnError
        If it is none of these, or a file holds none.
    """
    if isinstance(given, nn.Module):
        return {name: parameter.detach() for name, parameter in unwrapped(given).named_parameters()}
    if isinstance(given, Mapping) and is_state_dict(given):
        return dict(given)
    if isinstance(given, str | os.PathLike):
        return read_weights(given)
    raise CurvatureError(f"{option} is a {type(given).__name__}; give a Module, a state dict or the path of weights")


__all__ = ["Weights", "by_label", "parameters_of"]
