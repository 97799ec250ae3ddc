"""Copies of networks that share nothing with the original, without wrappers, in a chosen precision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from pnanalysis.errors import ModelError, reason

#: The complex type whose real and imaginary parts have a given type.
_COMPLEX = {torch.float64: torch.complex128}


def copied(network: nn.Module) -> nn.Module:
    """A copy that shares nothing with the network, and is not wrapped: see :func:`unwrapped`.

    Tensors with a graph, which ``copy.deepcopy`` refuses (results of an earlier forward pass that the network keeps,
    the weight that hook-form ``weight_norm`` computes), are copied without it.

    Raises
    ------
    ModelError
        If it cannot be copied.
    """
    network = unwrapped(network)
    memo: dict[int, Any] = {id(tensor): tensor.detach().clone() for tensor in _with_graph(network)}
    for buffer in network.buffers():  # of lazy modules, which deepcopy refuses where it takes lazy parameters
        if isinstance(buffer, nn.UninitializedBuffer):
            memo[id(buffer)] = nn.UninitializedBuffer(device=buffer.device, dtype=buffer.dtype)  # type: ignore[call-arg]
    try:
        copy = deepcopy(network, memo)
    except Exception as error:  # locks, open files: whatever a network may hold
        raise ModelError(
            f"this {type(network).__name__} cannot be copied ({reason(error)}); give its state_dict() with a factory "
            "as model="
        ) from error
    for module in copy.modules():
        module._compiled_call_impl = None  # of Module.compile(): compiled for the original
    return copy


def unwrapped(network: nn.Module) -> nn.Module:
    """The network inside ``DataParallel``, ``DistributedDataParallel`` and ``torch.compile``, in any order."""
    while True:
        if isinstance(network, nn.DataParallel | nn.parallel.DistributedDataParallel):
            network = network.module
        elif isinstance(getattr(network, "_orig_mod", None), nn.Module):
            network = network._orig_mod  # type: ignore[assignment]
        else:
            return network


def matching_dtype(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """What a tensor's type becomes in a precision: complex numbers stay complex, integers stay as they are."""
    if dtype is None or not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor.dtype
    return _COMPLEX.get(dtype, torch.complex64) if tensor.is_complex() else dtype


def as_real(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs of real ones, along a last axis of two; other tensors as they are."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def in_precision(network: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """Cast the parameters and buffers of a network, in place; complex ones to the matching complex type.

    ``Module.to(dtype)`` would cast complex tensors to real ones, and drop their imaginary parts.
    """
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.dtype != matching_dtype(tensor, dtype):
            tensor.data = tensor.data.to(matching_dtype(tensor, dtype))
    return network


def _with_graph(network: nn.Module) -> Iterator[Tensor]:
    """Tensors that are results of recorded computations, wherever modules keep them."""
    seen: set[int] = set()
    waiting: list[Any] = [vars(module) for module in network.modules()]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if not value.is_leaf:
                yield value
        elif isinstance(value, Mapping):
            waiting.extend(value.values())
        elif isinstance(value, list | tuple | set):
            waiting.extend(value)
        elif not isinstance(value, nn.Module | type) and hasattr(value, "__dict__") and not callable(value):
            waiting.append(vars(value))  # caches and outputs are objects of their own
