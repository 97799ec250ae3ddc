"""Calls of a network with other tensors in the place of its parameters and buffers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def functional_call(
    module: nn.Module, state: Mapping[str, Tensor], arguments: Any, keywords: Mapping[str, Any] | None = None
) -> Any:
    """:func:`torch.func.functional_call`, which leaves a network as it was, whatever it shares.

    torch replaces a tensor under each of its names, and then puts back what it found there, in the same order. Where
    one module has two names, it finds its own replacement under the second one, and leaves that in the network. Here
    each place that holds a tensor is therefore named once.

    What hooks before a pass compute and keep in a module, as the hook forms of ``weight_norm`` and ``spectral_norm`` do
    with its weight, is put back, too: it may be a tensor of a trace or of a transform, which means nothing outside.

    Parameters
    ----------
    module : Module
    state : mapping of tensors
        By name; tied tensors may be given by any of their names.
    arguments, keywords
        Of the call.
    """
    given, named = dict(state), dict(keywords or {})
    with _computed_kept(module):
        if not _shares_modules(module):
            return torch.func.functional_call(module, given, arguments, named)
        return torch.func.functional_call(module, _by_place(module, given), arguments, named, tie_weights=False)


@contextmanager
def _computed_kept(module: nn.Module) -> Iterator[None]:
    """Tensors that are neither parameters nor buffers, of modules with hooks before a pass, are as they were before."""
    hooked = [vars(one) for one in module.modules() if one._forward_pre_hooks]
    before = [{name: value for name, value in own.items() if isinstance(value, Tensor)} for own in hooked]
    try:
        yield
    finally:
        for own, values in zip(hooked, before, strict=True):
            own.update(values)


def _shares_modules(module: nn.Module) -> bool:
    """Whether one of its modules has several names."""
    return sum(1 for _ in module.named_modules(remove_duplicate=False)) > sum(1 for _ in module.modules())


def _by_place(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state under one name for each place, those of tied ones among them."""
    values, known = {}, set[str]()
    for listed in (module.named_parameters, module.named_buffers):
        for name, tensor in listed(remove_duplicate=False):
            if name in state:
                values[id(tensor)] = state[name]
                known.add(name)
    found = {name: tensor for name, tensor in state.items() if name not in known}
    for prefix, one in module.named_modules():
        for name, tensor in (*one.named_parameters(recurse=False, remove_duplicate=False),
                             *one.named_buffers(recurse=False, remove_duplicate=False)):  # fmt: skip
            if id(tensor) in values:
                found[f"{prefix}.{name}" if prefix else name] = values[id(tensor)]
    return found
