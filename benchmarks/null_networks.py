"""Pairs of networks between which nothing differs, for benchmarks of false claims."""

from __future__ import annotations

from copy import deepcopy
from itertools import pairwise

import numpy as np
import torch
from torch import nn


def permuted_units(network: nn.Sequential, rng: np.random.Generator) -> nn.Sequential:
    """The same function with the hidden units of its linear layers in another order."""
    network = deepcopy(network)
    layers = [layer for layer in network if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        for layer, following in pairwise(layers):
            order = torch.from_numpy(rng.permutation(layer.out_features))
            layer.weight.copy_(layer.weight[order])
            layer.bias.copy_(layer.bias[order])
            following.weight.copy_(following.weight[:, order])
    return network


class CoinNetwork(nn.Module):
    """Answers each example with the first network where the example's first feature is 1, else with the second.

    With coins tossed for each example, the network and its ``swapped`` twin are equal on average over coins, whatever
    the two networks are; on a set of examples they differ as two draws of the same thing do.
    """

    def __init__(self, first: nn.Module, second: nn.Module, swapped: bool) -> None:
        super().__init__()
        self.first, self.second, self.swapped = deepcopy(first), deepcopy(second), swapped

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        coin = 1 - x[:, :1] if self.swapped else x[:, :1]
        return coin * self.first(x[:, 1:]) + (1 - coin) * self.second(x[:, 1:])


def pairs_by_coin(first: nn.Module, second: nn.Module) -> dict[str, nn.Module]:
    """A :class:`CoinNetwork` and its swapped twin."""
    return {"a": CoinNetwork(first, second, False).eval(), "b": CoinNetwork(first, second, True).eval()}
