"""Batches: tensors nested in mappings, tuples and lists."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pnanalysis.errors import CurvatureError
from pnanalysis.inputs.copies import matching_dtype


def as_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments for a model: tuples by position, mappings by keyword, anything else as it is."""
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
    """Number of examples in a batch, from its first tensor.

    Raises
    ------
    CurvatureError
        If it holds no tensor.
    """
    for tensor in tensors(batch):
        return len(tensor)
    raise CurvatureError("a batch holds no tensor; give pairs (inputs, targets)")


def map_tensors(nest: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every tensor and keep the structure."""
    if isinstance(nest, Tensor):
        return function(nest)
    if isinstance(nest, Mapping):
        return {key: map_tensors(value, function) for key, value in nest.items()}
    if isinstance(nest, tuple | list):
        parts = [map_tensors(value, function) for value in nest]
        return (
            type(nest)(*parts) if hasattr(nest, "_fields") else type(nest)(parts)
        )  # named tuples take their fields one by one
    return nest


def move(nest: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Move to a device; floating-point tensors also to ``dtype``, complex ones to the matching complex type."""
    return map_tensors(nest, lambda t: t.to(device, matching_dtype(t, dtype)))


def cut(batch: tuple[Any, Any], part: slice) -> tuple[Any, Any]:
    """Some of the examples of a batch."""
    inputs, targets = map_tensors(batch, lambda t: t[part])
    return inputs, targets
