"""A device that does not exist: tensors hold values, and mixing them with those of the CPU is an error, as on a GPU.

A tensor says that it is on ``meta`` and holds one of the CPU, on which its operations run. Reading a value back works,
so that whole analyses can run there. Numbers (tensors without dims) and indices may be on the CPU, as on CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
_aten = torch.ops.aten
#: Operations that may see both devices.
_BETWEEN = (_aten.copy_.default, _aten._to_copy.default, _aten.index.Tensor, _aten.index_put_.default)


class Elsewhere(Tensor):
    """A tensor of the other device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        found = Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=DEVICE,
        )  # fmt: skip
        found.held = held
        return found

    def tolist(self) -> Any:
        """As of any tensor; torch has none for subclasses."""
        return self.held.tolist()

    def __getitem__(self, index: Any) -> Any:
        """As of any tensor; torch would make indices of lists on ``meta``, without their values."""
        return super().__getitem__(_index(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_index(index), value)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Intercepting(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def other_device() -> Iterator[torch.device]:
    """The device, whose tensors can be made within the body."""
    with patch.object(torch, "autocast", lambda *_, **__: nullcontext()), _Intercepting():  # unknown there
        yield DEVICE


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    n_there = sum(isinstance(tensor, Elsewhere) for tensor in tensors)
    given = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    strangers = [tensor for tensor in tensors if not isinstance(tensor, Elsewhere) and tensor.ndim]
    assert all(tensor.device != DEVICE for tensor in strangers), f"{func}: a tensor without values"
    if n_there and strangers and func not in _BETWEEN:
        raise RuntimeError(f"{func}: tensors of two devices, {[tuple(each.shape) for each in strangers]} on the CPU")
    goes_there = given == DEVICE if given is not None else n_there > 0
    if given is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    inner_args, inner_kwargs = tree_map(_held, (args, kwargs))
    found = func(*inner_args, **inner_kwargs)
    if func is _aten.copy_.default:
        return args[0]
    if not goes_there:
        return found
    found = tree_map(lambda each: Elsewhere(each) if isinstance(each, Tensor) else each, found)
    # views share the storage of what they are a view of, and operations in place return their argument
    return return_and_correct_aliasing(func, args, kwargs, found) if n_there else found


def _index(index: Any) -> Any:
    parts = index if isinstance(index, tuple) else (index,)
    made = tuple(torch.as_tensor(part) if isinstance(part, (list, np.ndarray)) else part for part in parts)
    return made if isinstance(index, tuple) else made[0]


def _held(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, Elsewhere) else leaf
