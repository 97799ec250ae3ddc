"""A copy of a model that is ready for products: eval mode, few activations in place, cheap batch norm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor, fx, nn

from pnanalysis.curvature.passes import unchanged
from pnanalysis.inputs.copies import copied
from pnanalysis.torch_internals import BatchNormBase, convolve

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def prepared_copy(model: nn.Module, bn_mode: str) -> nn.Module:
    """A copy in eval mode; with ``bn_mode="train"``, on the statistics of each batch but for :func:`frozen_norms`.

    Names of parameters and buffers stay.
    """
    frozen = frozen_norms(model)
    prepared = copied(model).eval()
    for name, module in prepared.named_modules():
        for attribute, value in list(vars(module).items()):
            if isinstance(value, Tensor):
                # a constant that is not a buffer would be built into a trace, which torch refuses under transforms
                delattr(module, attribute)
                module.register_buffer(attribute, value.detach(), persistent=False)
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            module.sparse = False  # sparse gradients have no second derivative
        if isinstance(module, BatchNormBase) and bn_mode == "train" and name not in frozen:
            module.train()
            module.track_running_stats = False  # running statistics are then neither used nor changed
    return prepared


def frozen_norms(model: nn.Module) -> set[str]:
    """The batch normalisations whose running statistics a training step uses: in eval mode, with the network or others
    of its normalisations in train mode, as in fine-tuning. Where all are in eval mode, it is not known: none.
    """
    norms = {name: module for name, module in model.named_modules() if isinstance(module, BatchNormBase)}
    if not model.training and not any(module.training for module in norms.values()):
        return set()
    return {name for name, module in norms.items() if not module.training and module.running_mean is not None}


def in_place_activations(model: nn.Module) -> list[nn.Module]:
    """The layers that write into their argument, as two derivatives, which need the values before, cannot have it."""
    return [module for module in model.modules() if getattr(module, "inplace", False) is True]


def set_in_place(layers: Iterable[nn.Module], in_place: bool) -> None:
    """Let layers write into their argument, or not.

    Where a network uses the argument again, as in ``x + block(x)``, that is another function.
    """
    for layer in layers:
        layer.inplace = in_place  # type: ignore[assignment]


def fold_norms(model: nn.Module) -> list[nn.Module]:
    """Let each convolution apply the batch normalisation behind it, where nothing else uses its output.

    The normalisation then costs no pass over the activations. Layers with hooks, whose code would see something else,
    and parametrised ones are left alone. How the layers follow each other is read off a symbolic trace, which may take
    another branch than the data do: compare outputs before and after, and :func:`unfold_norms` if they differ.

    Returns
    -------
    list of Module
        The layers that compute something else than before.
    """
    modules = dict(model.named_modules())
    try:
        with unchanged(model):
            nodes = fx.symbolic_trace(model).graph.nodes
    except Exception:  # a user's model may raise anything on symbols: it is left unchanged
        return []
    calls = [node for node in nodes if node.op == "call_module"]
    times_called = Counter(node.target for node in calls)
    folded: list[nn.Module] = []
    for node in calls:
        source: Any = node.args[0] if node.args else None
        if source not in calls or len(source.users) > 1:
            continue
        if times_called[source.target] > 1 or times_called[node.target] > 1:  # shared layers: other calls differ
            continue
        conv, norm = modules[source.target], modules[node.target]
        # exact types, for a subclass may compute something else
        known = type(conv) in _CONVOLUTIONS and type(norm) in _NORMS and norm.running_mean is not None
        if known and _as_written(conv) and _as_written(norm):
            conv.forward = partial(_convolve_and_normalise, conv, norm)
            norm.forward = _identity
            folded += [conv, norm]
    return folded


def unfold_norms(folded: list[nn.Module]) -> None:
    """Undo :func:`fold_norms`."""
    for module in folded:
        del module.forward


def _as_written(module: nn.Module) -> bool:
    """Whether a call of the module runs its class's forward and nothing else."""
    return "forward" not in vars(module) and not any(getattr(module, name) for name in _HOOKS)


def _convolve_and_normalise(conv: Any, norm: Any, inputs: Tensor) -> Tensor:
    """A convolution and the normalisation behind it, which is affine per channel, as one convolution."""
    # computed from the parameters in every pass, so that derivatives with respect to all of them come out right
    scale = (norm.running_var + norm.eps).rsqrt()
    shift = -norm.running_mean * scale
    if norm.affine:
        scale, shift = scale * norm.weight, shift * norm.weight + norm.bias
    if conv.bias is not None:
        shift = shift + scale * conv.bias
    weight = conv.weight * scale.view(-1, *[1] * (conv.weight.ndim - 1))
    return convolve(conv, inputs, weight, shift)


def _identity(inputs: Tensor) -> Tensor:
    return inputs


__all__ = ["fold_norms", "in_place_activations", "prepared_copy", "set_in_place", "unfold_norms"]
