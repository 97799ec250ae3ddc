"""Distances between networks in parameter space, as a whole and layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pnanalysis.arrays import Array
from pnanalysis.errors import ModelError
from pnanalysis.estimates import ratio
from pnanalysis.inputs.copies import as_real
from pnanalysis.inputs.models import parameter_layers


def parameter_distances(networks: Sequence[nn.Module]) -> dict[str, Any]:
    """Euclidean distances and cosines between networks.

    Parameters
    ----------
    networks : sequence of Module
        The distance between networks whose layers differ in name or shape is NaN.

    Returns
    -------
    dict
        Variables as (dims, values): ``norm`` (checkpoint), ``distance``, ``relative_distance`` (over the norm of
        ``other``) and ``cosine`` (checkpoint, other), ``layer_distance`` and ``layer_cosine`` (checkpoint, other,
        layer); and ``layer``, the names.

    Notes
    -----
    Layers are modules that own trainable parameters; buffers take no part. A complex parameter counts as two real
    ones. Sums run in float64.
    """
    vectors = [_layer_vectors(network) for network in networks]
    shapes = [_layer_shapes(network) for network in networks]
    names = list(dict.fromkeys(name for layers in vectors for name in layers))
    if not names:
        raise ModelError("none of these networks has trainable parameters, so they have no distances")
    k = len(networks)
    squared, inner = (np.full((k, k, len(names)), np.nan) for _ in range(2))
    for i in range(k):
        for j in range(i + 1):
            for at, name in enumerate(names):
                if name in shapes[i] and shapes[i].get(name) == shapes[j].get(name):
                    a, b = vectors[i][name].double(), vectors[j][name].double()
                    squared[i, j, at] = squared[j, i, at] = float((a - b).square().sum())
                    inner[i, j, at] = inner[j, i, at] = float(a @ b)
    same_shapes = np.array([[a == b for b in shapes] for a in shapes])
    has_layer = np.array([[name in layers for name in names] for layers in vectors])
    # Networks of one architecture may lack layers that others have, whose NaN must not spread to their sums.
    whole_squared, whole_inner = (
        np.where(same_shapes, np.where(has_layer[:, None], values, 0.0).sum(-1), np.nan) for values in (squared, inner)
    )
    norm = np.sqrt(np.diagonal(whole_inner))
    distance = np.sqrt(whole_squared)
    pair, pair_and_layer = ("checkpoint", "other"), ("checkpoint", "other", "layer")
    return {
        "norm": ("checkpoint", norm),
        "distance": (pair, distance),
        "relative_distance": (pair, ratio(distance, np.broadcast_to(norm, (k, k)))),
        "cosine": (pair, _cosine(whole_inner)),
        "layer_distance": (pair_and_layer, np.sqrt(squared)),
        "layer_cosine": (pair_and_layer, np.stack([_cosine(inner[..., at]) for at in range(len(names))], axis=-1)),
        "layer": names,
    }


def distance_between(network: nn.Module, state: Mapping[str, Tensor]) -> float:
    """Euclidean distance from a network's trainable parameters to those in a state."""
    parameters = {name: parameter for _, own in parameter_layers(network) for name, parameter in own}
    return state_distance(parameters, state, list(parameters))


def state_distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor], names: Sequence[str]) -> float:
    """Euclidean distance over the named tensors of two states, in float64; complex numbers are pairs of real ones."""
    squares = [(_vector(a[name]).double().cpu() - _vector(b[name]).double().cpu()).square().sum() for name in names]
    return float(torch.stack(squares).sum().sqrt())


def _vector(tensor: Tensor) -> Tensor:
    """Its real numbers, flat."""
    return as_real(tensor.detach()).reshape(-1)


def _layer_vectors(network: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters of each layer, flattened into one vector."""
    return {layer: torch.cat([_vector(parameter) for _, parameter in own]) for layer, own in parameter_layers(network)}


def _layer_shapes(network: nn.Module) -> dict[str, list[tuple[int, ...]]]:
    return {
        layer: [tuple(as_real(parameter).shape) for _, parameter in own] for layer, own in parameter_layers(network)
    }


def _cosine(inner: Array) -> Array:
    """Cosines (k, k) from inner products (k, k)."""
    norm = np.sqrt(np.diagonal(inner))
    return np.clip(ratio(inner, norm[:, None] * norm[None, :]), -1.0, 1.0)
