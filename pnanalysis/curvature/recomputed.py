r"""Activation checkpointing: blocks of a network whose activations are computed again instead of being kept.

Of each block only the inputs are kept. When the backward pass reaches it, the block is run again. For products, the
inputs carry their derivatives along the vector with them (forward mode), and so do the gradients that the backward pass
hands on, so that one backward pass gives the product: within a block they come from differentiating its gradient, whose
graph ends with the block. ``torch.utils.checkpoint`` can do neither: its second run sees the module's own parameters in
place of those that a functional call puts there, and a graph of the whole gradient keeps all activations that were
recomputed.

References
----------
A. Griewank, A. Walther, "Algorithm 799: revolve", ACM Transactions on Mathematical Software 26 (2000). T. Chen, B. Xu,
C. Zhang, C. Guestrin, "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from pnanalysis.curvature.parameters import Named
from pnanalysis.curvature.passes import unchanged
from pnanalysis.curvature.product_check import largest_difference, tolerance
from pnanalysis.errors import CurvatureError, reason
from pnanalysis.evaluation.forward import WithModel, within_model
from pnanalysis.inputs.functional_calls import functional_call
from pnanalysis.torch_internals import TreeSpec, tree_flatten, tree_unflatten

if TYPE_CHECKING:
    from pnanalysis.curvature.network_loss import LossArguments, NetworkLoss

#: Makes a tensor with a derivative, and takes one apart into value and derivative; torch has no types for them.
_make_dual: Callable[[Tensor, Tensor], Tensor] = forward_ad.make_dual
_unpack_dual: Callable[[Tensor], tuple[Tensor, Tensor | None]] = forward_ad.unpack_dual
_HERE = object()
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
#: In which precision, and by which functions, passes run.
Setting = Callable[[], AbstractContextManager[object]]


def blocks_of(model: nn.Module, checkpointed: Iterable[object] = ()) -> list[str]:
    """Names of the modules to recompute, none within another.

    Parameters
    ----------
    model : Module
    checkpointed : iterable
        What the network itself passes to ``torch.utils.checkpoint``. Modules among them are blocks.

    Returns
    -------
    list of str
        Besides those, the modules with layers of their own that stand in a ``Sequential``, ``ModuleList`` or
        ``ModuleDict``, such as the layers of a transformer or the blocks of a residual network.
    """
    own = [_module_of(function) for function in checkpointed]
    found = _blocks(model, "", False, [module for module in own if module is not None and module is not model])
    return list({model.get_submodule(name): name for name in found}.values())  # shared ones have several names


def _blocks(module: nn.Module, name: str, contained: bool, own: list[nn.Module]) -> Iterator[str]:
    children = dict(module.named_children())
    nested = any(next(child.children(), None) is not None for child in children.values())
    is_block = contained and children and not (type(module) in _CONTAINERS and nested)
    if (is_block or any(module is one for one in own)) and not isinstance(module, torch.jit.ScriptModule):
        yield name
        return
    for key, child in children.items():
        yield from _blocks(child, f"{name}.{key}" if name else key, isinstance(module, _CONTAINERS), own)


def _module_of(function: Any) -> nn.Module | None:
    """The module that a function is a call of."""
    while isinstance(function, partial):
        function = function.func
    if not isinstance(function, nn.Module) and getattr(function, "__name__", "") in ("forward", "__call__"):
        function = getattr(function, "__self__", None)
    return function if isinstance(function, nn.Module) else None


def recomputable_blocks(loss: NetworkLoss, at: LossArguments, names: Sequence[str]) -> list[str]:
    """The :func:`blocks_of` a network, once the gradient on a few examples is the same with them recomputed.

    Raises
    ------
    CurvatureError
        If there are none, or it is not.
    """
    blocks = blocks_of(loss.model, loss.checkpointed_by(at))
    if not blocks:
        raise CurvatureError(
            "checkpoint_activations finds no blocks in this network: modules with layers of their own in a Sequential "
            "or ModuleList, or passed to torch.utils.checkpoint; arrange it so, or take smaller batches"
        )
    expected = loss.gradient(at, at.theta)
    loss.recomputed = blocks
    try:
        difference, where = largest_difference(loss.gradient(at, at.theta), expected, names)
        why = f"the gradient by {where!r} is then another"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a user's block may raise anything when it is called again
        difference, why = torch.inf, reason(error)
    if difference > tolerance(loss.dtype, loss.amp):
        # each call of a layer appends its keys and values
        caches = getattr(getattr(loss.model, "config", None), "use_cache", False)
        raise CurvatureError(
            f"checkpoint_activations computes blocks such as {blocks[0]!r} twice, which this network does not allow "
            f"({why}); a block must depend on its arguments and parameters alone and keep nothing for other modules"
            + ("; set model.config.use_cache = False, since its layers keep keys and values" if caches else "")
        )
    return blocks


@contextmanager
def recomputing(model: nn.Module, names: Sequence[str], setting: Setting) -> Iterator[None]:
    """Within the body, passes that record a graph for autograd do so without the activations of these blocks.

    What they return may be differentiated after the body, but once only.
    """
    own = [vars(model.get_submodule(name)) for name in names]
    before = [{"forward": attributes["forward"]} if "forward" in attributes else {} for attributes in own]
    for name, attributes in zip(names, own, strict=True):
        block = model.get_submodule(name)
        attributes["forward"] = partial(_run, block, block.forward, setting)
    try:
        yield
    finally:
        for attributes, kept in zip(own, before, strict=True):
            attributes.pop("forward", None)
            attributes.update(kept)


def dual(theta: Named, v: Sequence[Tensor]) -> Named:
    """Parameters that require gradients and have ``v`` for their derivatives, in the current dual level."""
    parts = zip(theta.items(), v, strict=True)
    return {name: _make_dual(tensor.detach().requires_grad_(), part) for (name, tensor), part in parts}


def tangents(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The derivatives that tensors have; zeros where they have none."""
    pairs = [_unpack_dual(tensor) for tensor in tensors]
    return [torch.zeros_like(primal) if tangent is None else tangent for primal, tangent in pairs]


def _run(block: nn.Module, forward: Callable[..., Any], setting: Setting, *arguments: Any, **keywords: Any) -> Any:
    """A call of a block, of which only the arguments are kept."""
    segment = _Segment(block, forward, setting, (arguments, keywords))
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in segment.tensors):
        return forward(*arguments, **keywords)
    with torch.no_grad():  # which forward mode sees through
        outputs = [_unpack_dual(output) for output in segment(segment.tensors)]
    values, derivatives = [value.detach() for value, _ in outputs], [derivative for _, derivative in outputs]
    is_dual = any(_unpack_dual(tensor)[1] is not None for tensor in segment.tensors)
    constant = [
        value
        for value, derivative in zip(values, derivatives, strict=True)
        if not (value.is_floating_point() or value.is_complex()) or (is_dual and derivative is None)
    ]
    written = {i: segment.tensors[i] for i in segment.written}
    tensors = [tensor.clone() if i in written else tensor for i, tensor in enumerate(segment.tensors)]
    found = _Recomputed.apply(segment, values, derivatives, constant, *tensors)
    for tensor, value in zip(written.values(), found[len(found) - len(written) :], strict=True):
        tensor.copy_(value)  # what follows finds its argument as the block left it
    return segment.in_place_of(found)


class _Segment:
    """One call of a block as a function of all tensors that it depends on.

    Attributes
    ----------
    tensors : list of Tensor
        Its parameters and buffers, and the tensors among its arguments; held until the call is recorded.
    written : list of int
        Those arguments that the last call wrote into.
    """

    def __init__(self, block: nn.Module, forward: Callable[..., Any], setting: Setting, given: Any) -> None:
        self._bound = WithModel(block, lambda _, arguments, keywords: forward(*arguments, **keywords))
        self._setting = setting
        state = {**dict(block.named_parameters()), **dict(block.named_buffers())}
        own, self._rest, self._spec = _apart(given)
        self._returned: tuple[list[Any], TreeSpec] = self._rest, self._spec
        self._names, self.tensors = list(state), [*state.values(), *own]
        self.written: list[int] = []

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors that the call returns, and then what it has made of the arguments that it writes into."""
        n = len(self._names)
        # blocks that write into their arguments must find the same ones the next time
        copies = [tensor.clone() for tensor in tensors[n:]]
        before = [copy._version for copy in copies]
        arguments, keywords = _together(copies, self._rest, self._spec)
        state = within_model(dict(zip(self._names, tensors[:n], strict=True)))
        with self._setting(), unchanged(self._bound.model):
            outputs = functional_call(self._bound, state, (arguments, keywords))
        found, rest, spec = _apart(outputs)
        self._returned = rest, spec
        self.written = [n + i for i, copy in enumerate(copies) if copy._version != before[i]]
        return [*found, *(copies[i - n] for i in self.written)]

    def in_place_of(self, outputs: Sequence[Tensor]) -> Any:
        """What the last call returned, with other tensors."""
        return _together(outputs, *self._returned)


class _Recomputed(torch.autograd.Function):
    """The outputs of a segment, which are known, as a function of its tensors."""

    @staticmethod
    def forward(
        ctx: Any, segment: _Segment, values: list[Tensor], derivatives: list[Tensor | None], constant: list[Tensor],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        ctx.segment, ctx.derivatives = segment, derivatives
        segment.tensors = []
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(*constant)
        return tuple(values)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> tuple[Tensor | None, ...]:
        derivatives = ctx.derivatives
        ctx.derivatives = None  # else all of them would stay
        return tuple(derivatives)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[4:]
        pairs = [_unpack_dual(tensor) for tensor in ctx.saved_tensors]
        along = [derivative for _, derivative in pairs]
        moving = [needed or v is not None for needed, v in zip(wanted, along, strict=True)]
        tensors = [value.detach().requires_grad_(moves) for (value, _), moves in zip(pairs, moving, strict=True)]
        with torch.enable_grad():
            outputs = ctx.segment(tensors)
        live = [
            (output, *_unpack_dual(slope))
            for output, slope in zip(outputs, slopes, strict=True)
            if output.requires_grad
        ]
        leaves = [tensor for tensor in tensors if tensor.requires_grad]
        gradients = _gradients_and_changes(live, leaves, [v for v, moves in zip(along, moving, strict=True) if moves])
        found = [next(gradients) if moves else None for moves in moving]
        return None, None, None, None, *(one if needed else None for one, needed in zip(found, wanted, strict=True))


def _gradients_and_changes(
    live: Sequence[tuple[Tensor, Tensor, Tensor | None]], leaves: Sequence[Tensor], along: Sequence[Tensor | None]
) -> Iterator[Tensor | None]:
    """Gradients of a block for its leaves, with their derivatives along the vector.

    The gradient ``g = J' s`` changes by ``J' ds + d(J' s)``, and the second is the Hessian of ``s'f`` times the vector,
    the gradient of ``g`` times the vector. Forward mode would give it, too, but while a graph is recorded it records
    the derivatives' own graph as well, in cycles that keep all activations until the dual level ends.

    Parameters
    ----------
    live : sequence of (Tensor, Tensor, Tensor or None)
        Outputs of the block, gradients of the loss for them, and how these change along the vector.
    leaves, along : sequences
        What the outputs depend on, and the vector's part for each.
    """
    if not live:
        return iter([None] * len(leaves))
    ends, slopes, changes = zip(*live, strict=True)
    moves = any(each is not None for each in (*along, *changes))
    gradients = torch.autograd.grad(ends, leaves, slopes, allow_unused=True, create_graph=moves)
    if not moves:
        return iter(gradients)
    second = [(g, v) for g, v in zip(gradients, along, strict=True) if g is not None and g.requires_grad]
    terms = [(one, v) for one, v in (*second, *zip(ends, changes, strict=True)) if v is not None]
    if not terms:
        return iter([None if g is None else g.detach() for g in gradients])
    differentiated, directions = zip(*terms, strict=True)
    found = torch.autograd.grad(differentiated, leaves, directions, allow_unused=True)
    return (
        g if g is None else g.detach() if change is None else _make_dual(g.detach(), change)
        for g, change in zip(gradients, found, strict=True)
    )


def _apart(nest: Any) -> tuple[list[Tensor], list[Any], TreeSpec]:
    """The tensors of a nest, all else in it, and what it takes to put it together."""
    leaves, spec = tree_flatten(nest)
    held = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return held, [_HERE if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec


def _together(tensors: Sequence[Tensor], rest: list[Any], spec: TreeSpec) -> Any:
    given = iter(tensors)
    return tree_unflatten([next(given) if leaf is _HERE else leaf for leaf in rest], spec)


__all__ = ["blocks_of", "dual", "recomputable_blocks", "recomputing", "tangents"]
