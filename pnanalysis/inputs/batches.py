"""Batches: tensors nested in mappings, tuples and lists."""

from __future__ import annotations

import hashlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pnanalysis.errors import CurvatureError, DataError
from pnanalysis.inputs.copies import matching_dtype, unwrapped
from pnanalysis.torch_internals import tree_map

#: Entries of a mapping that hold the targets, the first that there is.
LABELS = ("labels", "label", "targets", "target", "y")
#: The target that torch's cross-entropy ignores by default.
IGNORED = -100
_FORMS = (
    "give pairs (inputs, targets), tuples (input, ..., input, targets), or mappings with the targets under one of "
    + ", ".join(LABELS)
)


def as_pair(batch: Any) -> tuple[Any, Any]:
    """A batch of any form as inputs and targets; NumPy arrays in it as tensors.

    Parameters
    ----------
    batch : tuple, list or mapping
        A pair; a longer tuple or list, whose last entry holds the targets; or a mapping with the targets under one of
        :data:`LABELS`, all of which is the inputs (:func:`as_arguments` leaves out what a network does not take).

    Raises
    ------
    DataError
        If it is none of these.
    """
    if not isinstance(batch, Mapping) and hasattr(batch, "keys") and not hasattr(batch, "to"):  # a mapping but in name
        batch = {name: batch[name] for name in batch.keys()}  # noqa: SIM118
    nest = as_tensors(batch)
    if isinstance(nest, Mapping):
        label = next((name for name in LABELS if nest.get(name) is not None), None)
        if label is None:
            raise DataError(f"a mapping of {', '.join(map(str, nest)) or 'nothing'} has no targets; {_FORMS}")
        return nest, nest[label]
    if isinstance(nest, tuple | list):
        parts = tuple(nest)
        if len(parts) == 2 and next(tensors(parts), None) is not None:
            return parts[0], parts[1]
        if len(parts) > 2 and all(next(tensors(part), None) is not None for part in parts):
            return parts[:-1], parts[-1]
    got = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, tuple | list) else type(batch).__name__
    raise DataError(f"a {got} is not a batch of inputs and targets; {_FORMS}")


def as_arguments(inputs: Any, model: nn.Module | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments for a model: tuples by position, mappings by keyword, anything else as it is.

    Targets in a mapping (:data:`LABELS`) that the forward of ``model`` does not take are left out.
    """
    if not isinstance(inputs, Mapping):
        return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}
    labels = [] if model is None else [name for name in LABELS if name in inputs]
    refused = {name for name in labels if model is not None and not _takes(model, name)}
    return (), {name: value for name, value in inputs.items() if name not in refused}


def _takes(model: nn.Module, name: str) -> bool:
    """Whether the forward of a network, without its wrappers, has a parameter of this name."""
    network: Any = unwrapped(model)
    if hasattr(network, "get_base_model"):  # adapters pass on whatever they are given
        network = network.get_base_model()
    try:
        parameters = inspect.signature(network.forward).parameters
    except (TypeError, ValueError):  # compiled code has no signature
        return True
    return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


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


def leading_size(*nests: Any) -> int:
    """Length of the first tensor that has any dims.

    Raises
    ------
    CurvatureError
        If there is none.
    """
    for tensor in tensors(nests):
        if tensor.ndim:
            return len(tensor)
    raise CurvatureError("a batch holds no tensor with a dim for its examples; give pairs (inputs, targets)")


def batch_size(batch: Any) -> int:
    """Number of examples in a pair of inputs and targets: that of the targets, or of the inputs where they have none.

    Inputs may count something else first: a batch of graphs has a row for each node, and a target for each graph.

    Raises
    ------
    CurvatureError
        If no tensor has a dim for the examples.
    """
    pair = isinstance(batch, tuple | list) and len(batch) == 2
    return leading_size(batch[1], batch[0]) if pair else leading_size(batch)


def map_tensors(nest: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every tensor and keep the structure."""
    return _map(nest, Tensor, function)


def _map(nest: Any, kind: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(nest, kind):
        return function(nest)
    if isinstance(nest, Mapping):
        return {key: _map(value, kind, function) for key, value in nest.items()}
    if isinstance(nest, tuple | list):
        parts = [_map(value, kind, function) for value in nest]
        return (
            type(nest)(*parts) if hasattr(nest, "_fields") else type(nest)(parts)
        )  # named tuples take their fields one by one
    return nest


def as_tensors(nest: Any) -> Any:
    """The same nest with NumPy arrays and numbers as tensors, which share their memory.

    Raises
    ------
    DataError
        If an array holds what no tensor can.
    """
    return _map(nest, np.ndarray | np.generic, _as_tensor)


def _as_tensor(array: Any) -> Tensor:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing here writes to it
            return torch.as_tensor(array)
    except (TypeError, ValueError) as error:  # objects, strings, dates, bytes in another order
        raise DataError(f"an array of {array.dtype} cannot become a tensor; give numbers") from error


def move(nest: Any, device: torch.device | str, dtype: torch.dtype | None) -> Any:
    """Move to a device; floating-point tensors also to ``dtype``, complex ones to the matching complex type."""
    return map_tensors(nest, lambda t: t.to(device, matching_dtype(t, dtype)))


def rows(nest: Any, index: Tensor | slice) -> Any:
    """Some of the rows of every tensor; tensors without dims stay as they are."""
    return map_tensors(nest, lambda t: t[index] if t.ndim else t)


def can_cut(batch: Any) -> bool:
    """Whether all tensors of a batch have a row for each example, so that some of the examples can be taken.

    Those of a batch of graphs do not: they have rows for nodes, edges and graphs.
    """
    return len({len(tensor) for tensor in tensors(batch) if tensor.ndim}) <= 1


def cut(batch: tuple[Any, Any], part: slice) -> tuple[Any, Any]:
    """Some of the examples of a batch.

    Raises
    ------
    DataError
        If not all of its tensors have a row for each example.
    """
    if not can_cut(batch):
        sizes = ", ".join(str(len(tensor)) for tensor in tensors(batch) if tensor.ndim)
        raise DataError(
            f"a batch whose tensors have {sizes} rows cannot be cut into examples; make its batches as small as they "
            "have to be in the loader"
        )
    inputs, targets = rows(batch, part)
    return inputs, targets


def joined(one: Any, other: Any) -> Any:
    """Two nests of the same structure, with the rows of every tensor one after the other.

    Raises
    ------
    RuntimeError
        If tensors have rows of unequal shapes, or none.
    ValueError
        If the structures differ, or what they hold beside tensors.
    """

    def both(a: Any, b: Any) -> Any:
        if isinstance(a, Tensor):
            return torch.cat([a, b])
        if a != b:
            raise ValueError(f"the nests hold {a!r} and {b!r}")
        return a

    return tree_map(both, one, other)


def first_examples(batch: tuple[Any, Any], n: int) -> tuple[Any, Any]:
    """The first few examples of a batch; the whole batch where it cannot be cut."""
    return cut(batch, slice(0, n)) if can_cut(batch) else batch


def numbers(tensor: Tensor) -> Tensor:
    """The numbers that a tensor stores: itself, or the values of a sparse one."""
    if tensor.layout is torch.strided:
        return tensor
    return (tensor.coalesce() if tensor.layout is torch.sparse_coo else tensor).values()


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite; minus infinity is allowed beside zeros, in masks that are added to attention."""
    found = numbers(tensor.detach())
    if not (found.is_floating_point() or found.is_complex()) or bool(found.isfinite().all()):
        return True
    return not found.is_complex() and bool(((found == 0) | (found == -torch.inf)).all())


def fingerprint(*given: Tensor) -> str:
    """SHA-256 over shapes, dtypes and contents, shortened to 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for tensor in given:
        digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(contents(tensor))
    return digest.hexdigest()[:16]


def contents(tensor: Tensor) -> np.ndarray:
    """The bytes of the numbers that a tensor stores, in order."""
    stored = numbers(tensor.detach()).cpu().contiguous().resolve_conj().resolve_neg()
    return stored.view(-1).view(torch.uint8).numpy()


def channels_last(tensor: Tensor) -> Tensor:
    """Images and filters with their channels last in memory; other tensors unchanged."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
