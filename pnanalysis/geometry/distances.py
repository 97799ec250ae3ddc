"""Distances between networks in parameter space, as a whole and per layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pnanalysis.estimates import ratio
from pnanalysis.inputs.models import parameter_layers

Array = NDArray[np.float64]


def parameter_distances(networks: Sequence[nn.Module]) -> dict[str, Any]:
    """Euclidean distances and cosines between networks.

    Parameters
    ----------
    networks : sequence of Module
        Distances are NaN between two whose layers differ in name or shape.

    Returns
    -------
    dict
        Variables as (dims, values): ``norm`` (checkpoint), ``distance``, ``relative_distance`` (over the norm of
        ``other``) and ``cosine`` (checkpoint, other), ``layer_distance`` and ``layer_cosine`` (checkpoint, other,
        layer); and ``layer``, the names.

    Notes
    -----
    Layers are modules that own trainable parameters; buffers do not count. Sums run in float64.
    """
    layers = [_vectors(network) for network in networks]
    shapes = [_shapes(network) for network in networks]
    names = list(dict.fromkeys(name for own in layers for name in own))
    k = len(networks)
    squared, inner = (np.full((k, k, len(names)), np.nan) for _ in range(2))
    for i in range(k):
        for j in range(i + 1):
            for at, name in enumerate(names):
                if name in shapes[i] and shapes[i].get(name) == shapes[j].get(name):
                    a, b = layers[i][name].double(), layers[j][name].double()
                    squared[i, j, at] = squared[j, i, at] = float((a - b).square().sum())
                    inner[i, j, at] = inner[j, i, at] = float(a @ b)
    alike = np.array([[a == b for b in shapes] for a in shapes])
    own = np.array([[name in vectors for name in names] for vectors in layers])
    whole_squared, whole_inner = (
        np.where(alike, np.where(own[:, None], values, 0.0).sum(-1), np.nan) for values in (squared, inner)
    )
    norm = np.sqrt(np.diagonal(whole_inner))
    distance = np.sqrt(whole_squared)
    pair, third = ("checkpoint", "other"), ("checkpoint", "other", "layer")
    return {
        "norm": ("checkpoint", norm),
        "distance": (pair, distance),
        "relative_distance": (pair, ratio(distance, np.broadcast_to(norm, (k, k)))),
        "cosine": (pair, _cosine(whole_inner)),
        "layer_distance": (third, np.sqrt(squared)),
        "layer_cosine": (third, np.stack([_cosine(inner[..., at]) for at in range(len(names))], axis=-1)),
        "layer": names,
    }


def distance_between(a: nn.Module, state: dict[str, Tensor]) -> float:
    """Euclidean distance between a network's trainable parameters and those in a state dict."""
    parts = [
        (parameter.detach().double().cpu() - state[name].double()).square().sum()
        for _, own in parameter_layers(a)
        for name, parameter in own
    ]
    return float(torch.stack(parts).sum().sqrt())


def _vectors(network: nn.Module) -> dict[str, Tensor]:
    return {
        layer: torch.cat([parameter.detach().reshape(-1) for _, parameter in own])
        for layer, own in parameter_layers(network)
    }


def _shapes(network: nn.Module) -> dict[str, list[tuple[int, ...]]]:
    return {layer: [tuple(parameter.shape) for _, parameter in own] for layer, own in parameter_layers(network)}


def _cosine(inner: Array) -> Array:
    norm = np.sqrt(np.diagonal(inner))
    return np.clip(ratio(inner, norm[:, None] * norm[None, :]), -1.0, 1.0)
