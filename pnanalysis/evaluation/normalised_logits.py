"""Networks whose logits have a fixed size, so that a loss cannot be changed by scaling the last layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pnanalysis.errors import ModelError
from pnanalysis.evaluation.losses import kind_of
from pnanalysis.inputs.copies import copied
from pnanalysis.inputs.models import Loss

_SMALLEST = 1e-10  # norm of logits that are divided by their norm


def with_normalised_logits(network: nn.Module, loss: Loss, label: str = "network") -> nn.Module:
    """A copy of a classifier whose logits are centred and divided by their Euclidean norm, over dim 1.

    Raises
    ------
    ModelError
        If the loss takes no logits of classes. The copy raises it if it returns anything but a tensor ``(N, C, ...)``.

    References
    ----------
    M. Andriushchenko et al., "A Modern Look at the Relationship between Sharpness and Generalization", ICML 2023,
    arXiv:2302.07011.
    """
    if kind_of(loss) in ("numbers", "sides"):
        raise ModelError(f"{label}: its outputs are no logits of classes, which could be normalised; leave that out")
    copy = copied(network)
    copy.register_forward_hook(_normalised)
    return copy


def _normalised(network: nn.Module, arguments: Any, outputs: Any) -> Tensor:
    """Hook: normalised logits in place of the logits."""
    if not isinstance(outputs, Tensor) or outputs.ndim < 2 or outputs.shape[1] < 2:
        shown = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
        raise ModelError(
            f"the network returns {shown}, where logits (N, C, ...) can be normalised; wrap it in a module that "
            "returns these alone, or leave normalising out"
        )
    centred = outputs - outputs.mean(1, keepdim=True)
    return centred / centred.norm(dim=1, keepdim=True).clamp_min(_SMALLEST)
