"""Graph networks of torch_geometric."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo.entry import Entry
from tests.zoo.families.structures import graphs


class Convolved(nn.Module):
    """A convolution over nodes, and the mean over each graph."""

    def __init__(self) -> None:
        super().__init__()
        from torch_geometric.nn import GCNConv

        self.conv, self.act, self.head = GCNConv(3, 4), nn.Tanh(), nn.Linear(4, 1)

    def forward(self, nodes: Tensor, edges: Tensor, graph: Tensor) -> Tensor:
        from torch_geometric.nn import global_mean_pool

        return self.head(global_mean_pool(self.act(self.conv(nodes, edges)), graph))[:, 0]


class Attending(nn.Module):
    """Attention over neighbours; a class for each node of one graph."""

    def __init__(self) -> None:
        super().__init__()
        from torch_geometric.nn import GATConv

        self.conv, self.act, self.head = GATConv(3, 4), nn.ELU(), nn.Linear(4, 3)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        return self.head(self.act(self.conv(nodes, edges)))


def nodes() -> list[tuple[tuple[Tensor, Tensor], Tensor]]:
    return [((torch.randn(8, 3), torch.randint(8, (2, 20))), torch.randint(3, (8,)))]


PACKAGE = ("torch_geometric",)

ENTRIES = [
    Entry("torch_geometric", "GCN", Convolved, graphs, F.mse_loss, packages=PACKAGE, cuts_outputs=True),
    Entry("torch_geometric", "GAT, classes of nodes", Attending, nodes, packages=PACKAGE, cuts_outputs=True),
]
