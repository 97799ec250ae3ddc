"""Choose parameters of a network by layer, and convert between one flat vector and a tensor for each of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pnanalysis.curvature.blocks import Block, block_of, check_disjoint, split_selection
from pnanalysis.errors import CurvatureError
from pnanalysis.inputs.copies import unwrapped
from pnanalysis.inputs.models import parameter_layers

Selection = str | nn.Parameter | Sequence["str | nn.Parameter"] | None
#: Tensors by the names of parameters or buffers.
Named = dict[str, Tensor]


def select_parameters(model: nn.Module, selection: Selection = None) -> list[str]:
    """Full names of the chosen parameters, in the model's order.

    Parameters
    ----------
    model : Module
    selection : None, str, Parameter or sequence of these
        ``None`` takes every trainable parameter. A string names a layer (all parameters below that module), a
        parameter, or is a pattern with ``*`` and ``?`` over these names. In brackets behind it may stand a part of the
        outputs of these layers (the first dim of parameters; the second of the weights of ``Conv1D`` in transformers):
        ``[q]``, ``[k]``, ``[v]`` of a layer that computes queries, keys and values one after the other; ``[3/8]``, the
        fourth of eight equal parts (heads, experts); ``[0:64]``, a range; or parts of parts, ``[q.3/12]``. With
        ``in.`` before it, ``[in.3/12]``, it is a part of the inputs.

    Raises
    ------
    CurvatureError
        If the selection is empty or matches nothing (the message lists the layers), a chosen parameter is frozen,
        uninitialised (lazy), or not of a floating-point or complex type, or has no such part.
    """
    return [block.label if isinstance(block, Block) else block for block in select_blocks(model, selection)]


def select_blocks(model: nn.Module, selection: Selection = None) -> list[str | Block]:
    """The chosen parameters, in the model's order: the names of whole ones, and parts of others.

    Raises
    ------
    CurvatureError
        See :func:`select_parameters`.
    """
    parameters = dict(model.named_parameters())
    parts: dict[str, Block] = {}
    if selection is None:
        chosen = {name for name, parameter in parameters.items() if parameter.requires_grad}
    else:
        chosen = set()
        for wanted in [selection] if isinstance(selection, str | nn.Parameter) else selection:
            layer, part = split_selection(wanted) if isinstance(wanted, str) else (wanted, "")
            found = {name for name, parameter in parameters.items() if _matches(name, parameter, layer)}
            if not found:
                label = wanted if isinstance(wanted, str) else f"a parameter of shape {tuple(wanted.shape)}"
                layers = ", ".join(layer for layer, _ in parameter_layers(model))
                raise CurvatureError(f"{label!r} matches no parameter; the layers are {layers}")
            if part:
                blocks = [block_of(model, name, part) for name in found]
                parts |= {block.label: block for block in blocks if block is not None}
                found = set()
            chosen |= found
    check_disjoint(list(parts.values()), chosen)
    chosen |= {block.parameter for block in parts.values()}
    if not chosen:
        raise CurvatureError("no parameters chosen: the model has none that are trainable, or the selection is empty")
    for name in sorted(chosen):
        if is_lazy(parameters[name]):
            raise CurvatureError(f"parameter {name!r} has no shape yet; run the network once, or load its weights")
        if not (parameters[name].is_floating_point() or parameters[name].is_complex()):
            raise CurvatureError(f"parameter {name!r} holds {parameters[name].dtype}, not floating-point numbers")
        if not parameters[name].requires_grad:
            raise CurvatureError(f"parameter {name!r} is frozen; call requires_grad_() on it or choose others")
    order = list(parameters)
    whole = [name for name in order if name in chosen - {block.parameter for block in parts.values()}]
    return sorted(
        [*whole, *parts.values()],
        key=lambda one: (order.index(one.parameter), one.start) if isinstance(one, Block) else (order.index(one), 0),
    )


def select_unwrapped(model: nn.Module, selection: Selection = None) -> list[str | Block]:
    """As :func:`select_blocks`, of the network inside wrappers; the selection may name them with or without these.

    Raises
    ------
    CurvatureError
    """
    inner = unwrapped(model)
    try:
        return select_blocks(inner, selection)
    except CurvatureError:
        if inner is model or selection is None:
            raise
    held = dict(model.named_parameters())
    names = {id(parameter): name for name, parameter in inner.named_parameters()}
    found: list[str | Block] = []
    for one in select_blocks(model, selection):
        name = names[id(held[one.parameter if isinstance(one, Block) else one])]
        found.append(one.renamed(name) if isinstance(one, Block) else name)
    return found


def _matches(name: str, parameter: nn.Parameter, wanted: str | nn.Parameter) -> bool:
    if not isinstance(wanted, str):
        return parameter is wanted
    layer = name.rpartition(".")[0]
    return (
        name == wanted
        or layer == wanted
        or name.startswith(f"{wanted}.")
        or any(fnmatchcase(text, wanted) for text in (name, layer))
    )


def as_given(theta: Named, complex_names: Collection[str]) -> Named:
    """Undo :func:`pnanalysis.inputs.copies.as_real`, given the names of the complex parameters."""
    # not a view: the numbers may be part of a longer vector, at any offset
    return {name: torch.complex(*t.unbind(-1)) if name in complex_names else t for name, t in theta.items()}


def split_vector(vector: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """The parts of a flat vector ``(P,)`` in the shapes of the parameters; views where that is safe."""
    parts = torch.split(vector, [prod(shape) for shape in shapes])
    # from an odd offset on, torch cannot view pairs of numbers as complex ones, as networks and their derivatives do
    safe = [part.clone() if part.storage_offset() % 2 else part for part in parts]
    return [part.view(shape) for part, shape in zip(safe, shapes, strict=True)]


def join_tensors(parts: Sequence[Tensor]) -> Tensor:
    """One flat vector ``(P,)`` of all the tensors' entries; undoes :func:`split_vector`."""
    return torch.cat([part.reshape(-1) for part in parts])


def pullback(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], keep: bool = True
) -> list[Tensor]:
    """Vector-Jacobian product on a recorded graph; zeros where the outputs do not depend on an input.

    ``keep`` says whether the graph is to be used again.
    """
    # autograd.grad refuses outputs without a graph (a gradient that is constant), whose part of the result is zero
    pairs = [(out, cotangent) for out, cotangent in zip(outputs, cotangents, strict=True) if out.requires_grad]
    if not pairs:
        return [torch.zeros_like(tensor) for tensor in inputs]
    differentiable, their_cotangents = zip(*pairs, strict=True)
    return list(
        torch.autograd.grad(differentiable, list(inputs), their_cotangents, retain_graph=keep, materialize_grads=True)
    )


def requiring_grad(theta: Named) -> Named:
    """The same tensors as leaves of a new autograd graph."""
    return {name: tensor.detach().requires_grad_() for name, tensor in theta.items()}
