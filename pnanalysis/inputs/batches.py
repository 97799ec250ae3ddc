"""Batches as nests of mappings, tuples and lists with tensors in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pnanalysis.errors import CurvatureError


def as_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments for a model: a tuple is spread, a mapping named, all else passed whole."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}


def tensors(nest: Any) -> Iterator[Tensor]:
    """All tensors in a nest of mappings, tuples and lists, in order."""
    if isinstance(nest, Tensor):
        yield nest
    elif isinstance(nest, Mapping):
        for value in nest.values():
            yield from tensors(value)
    elif isinstance(nest, tuple | list):
        for value in nest:
            yield from tensors(value)


def batch_size(batch: Any) -> int:
    """Examples in a batch, by its first tensor.

    Raises
    ------
    CurvatureError
        If there is no tensor in it.
    """
    for tensor in tensors(batch):
        return len(tensor)
    raise CurvatureError("a batch holds no tensor; it must be (inputs, targets)")


def map_tensors(nest: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same nest with every tensor replaced by ``function(tensor)``."""
    if isinstance(nest, Tensor):
        return function(nest)
    if isinstance(nest, Mapping):
        return {key: map_tensors(value, function) for key, value in nest.items()}
    if isinstance(nest, tuple | list):
        parts = [map_tensors(value, function) for value in nest]
        return type(nest)(*parts) if hasattr(nest, "_fields") else type(nest)(parts)  # a named tuple, or not
    return nest


def move(nest: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The nest on a device, its floating-point tensors in ``dtype``."""
    return map_tensors(nest, lambda t: t.to(device, dtype if t.is_floating_point() else t.dtype))


def cut(batch: tuple[Any, Any], part: slice) -> tuple[Any, Any]:
    """Some of the examples of a batch."""
    inputs, targets = map_tensors(batch, lambda t: t[part])
    return inputs, targets
