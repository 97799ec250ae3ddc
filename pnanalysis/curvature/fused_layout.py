"""Whether layers that compute queries, keys and values together have them one after the other, as their names say.

Queries that are twice as large give the same attention with keys that are half as large, which is exact in floating
point. Where other rows are scaled, as of a layer with its heads first, the outputs change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pnanalysis.curvature.blocks import block_of
from pnanalysis.errors import CurvatureError
from pnanalysis.evaluation.forward import forward
from pnanalysis.torch_internals import tree_leaves

if TYPE_CHECKING:
    from pnanalysis.curvature.base import CurvatureOperator

#: Relative to the largest output: a normalisation of queries or keys knows their size by its epsilon.
_TOLERANCE = 1e-3


@torch.no_grad()
def check_fused_layouts(op: CurvatureOperator, layers: Mapping[str, list[str]]) -> None:
    """Refuse fused layers of an operator's network whose outputs say that queries and keys are elsewhere.

    Parameters
    ----------
    op : CurvatureOperator
        Nothing is checked where only its loss can call the network.
    layers : mapping of str to list of str
        The parameters of each fused layer.

    Raises
    ------
    CurvatureError
    """
    if not layers or op.loss_fn.takes_model:
        return
    model, inputs = op.model, op._first_examples[0]
    state = {name: tensor.detach() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    written = _outputs(model, inputs, state)
    for layer, names in layers.items():
        scaled = dict(state)
        for name in names:
            scaled[name] = state[name].clone()
            for part, factor in (("[q]", 2.0), ("[k]", 0.5)):
                block = block_of(model, name, part)
                if block is not None:
                    scaled[name].narrow(block.dim, block.start, block.stop - block.start).mul_(factor)
        if not all(map(_close, _outputs(model, inputs, scaled), written)):
            raise CurvatureError(
                f"{layer!r} does not hold queries, keys and values one after the other, as its name says: outputs "
                "change where queries are scaled against keys; give ranges such as [0:64] instead"
            )


def _outputs(model: nn.Module, inputs: Any, state: Mapping[str, Tensor]) -> list[Tensor]:
    found = tree_leaves(forward(model, inputs, state))
    return [leaf for leaf in found if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _close(one: Tensor, other: Tensor) -> bool:
    size = other.abs().max() if other.numel() else torch.zeros(())
    return bool(((one - other).abs() <= _TOLERANCE * size).all())
