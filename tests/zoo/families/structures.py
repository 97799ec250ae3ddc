"""Graphs, physics, flows, mixtures and other networks of unusual structure; networks that draw at random."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from tests.zoo.entry import Batch, Entry, numbers, vectors
from tests.zoo.families.plain import NO_PREDICTION, perceptron


class Graphs(nn.Module):
    """Message passing and a sum over the nodes of each graph."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.act, self.head = nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)

    def forward(self, nodes: Tensor, edges: Tensor, graph: Tensor) -> Tensor:
        hidden = self.act(self.embed(nodes))
        hidden = hidden + torch.zeros_like(hidden).index_add(0, edges[1], hidden[edges[0]])
        total = hidden.new_zeros(int(graph.max()) + 1, 4).index_add(0, graph, hidden)
        return self.head(total)[:, 0]


def joined(*sizes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes, edges and the graph of each node, for graphs of some sizes side by side."""
    first = [sum(sizes[:i]) for i in range(len(sizes))]
    edges = torch.cat([torch.randint(n, (2, 2 * n)) + start for n, start in zip(sizes, first, strict=True)], 1)
    return torch.randn(sum(sizes), 3), edges, torch.repeat_interleave(torch.tensor(sizes))


def graphs() -> list[Batch]:
    """Two large and four small graphs."""
    return [(joined(9, 11), torch.randn(2)), (joined(3, 2, 4, 3), torch.randn(4))]


def own_squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return ((outputs - targets) ** 2).mean()


class Physics(nn.Module):
    """A solution of an ordinary differential equation, and its derivative by the input."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().clone().requires_grad_()
        u = self.body(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return torch.cat([u, slope], 1)


def residual(outputs: Tensor, targets: Tensor) -> Tensor:
    return ((outputs[:, 1:] + outputs[:, :1] - targets) ** 2).mean()


def times() -> list[Batch]:
    return [(x, x.cos()) for x in (torch.rand(5, 1), torch.rand(3, 1))]


class Coupling(nn.Module):
    """One affine coupling of a normalising flow: the transformed vector and its log-determinant."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = perceptron(2, 2), perceptron(2, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept, moved = x.chunk(2, 1)
        scale = torch.tanh(self.scale(kept))
        return torch.cat([kept, moved * scale.exp() + self.shift(kept)], 1), scale.sum(1)


def likelihood(outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
    return (0.5 * outputs[0].square().sum(1) - outputs[1]).mean()


class Hyper(nn.Module):
    """One network makes the weights of another."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.act, self.target = nn.Linear(2, 15), nn.Tanh(), nn.Linear(4, 3)
        self.task = nn.Parameter(torch.randn(2))
        self.target.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        made = self.make(self.task)
        weights = {"weight": made[:12].view(3, 4), "bias": made[12:]}
        return functional_call(self.target, weights, (self.act(x),))


class Experts(nn.Module):
    """Each example goes to the two best of three experts."""

    def __init__(self) -> None:
        super().__init__()
        self.route, self.act = nn.Linear(4, 3), nn.Tanh()
        self.experts = nn.ModuleList(nn.Linear(4, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.route(x).softmax(1).topk(2, 1)
        out = x.new_zeros(len(x), 3)
        for i, expert in enumerate(self.experts):
            rows, slots = (chosen == i).nonzero(as_tuple=True)
            out = out.index_add(0, rows, weights[rows, slots, None] * expert(x[rows]))
        return self.act(out)


class Equilibrium(nn.Module):
    """A fixed point by iteration until it changes little."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.again, self.act, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        fed, z = self.into(x), torch.zeros_like(x)
        for _ in range(60):
            before, z = z, self.act(0.4 * self.again(z) + fed)
            if float((z - before).detach().abs().max()) < 1e-12:
                break
        return self.head(z)


class UNet(nn.Module):
    """Down, up and a connection across; a class for each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.mid, self.act = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1), nn.SiLU()
        self.up, self.head = nn.ConvTranspose2d(3, 3, 2, stride=2), nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        across = self.act(self.down(x))
        up = self.up(torch.tanh(self.mid(F.max_pool2d(across, 2))))
        return self.head(torch.cat([across, up], 1))


def pixels() -> list[Batch]:
    return [(torch.randn(n, 1, 6, 6), torch.randint(3, (n, 6, 6))) for n in (3, 2)]


class Detector(nn.Module):
    """Computes its own losses from the targets that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.boxes, self.classes = (
            nn.Sequential(nn.Linear(4, 5), nn.Tanh()),
            nn.Linear(5, 4),
            nn.Linear(5, 3),
        )

    def forward(self, x: Tensor, boxes: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = self.body(x)
        return {
            "boxes": F.smooth_l1_loss(self.boxes(hidden), boxes),
            "classes": F.cross_entropy(self.classes(hidden), labels),
        }


def objects() -> list[Batch]:
    return [
        ({"x": torch.randn(n, 4), "boxes": torch.rand(n, 4), "labels": torch.randint(3, (n,))}, torch.zeros(n))
        for n in (5, 3)
    ]


def own_losses(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    return outputs["boxes"] + outputs["classes"]


class Variational(nn.Module):
    """Samples its latent variables in every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.act, self.decode = nn.Linear(4, 4), nn.Tanh(), nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        mean, logvar = self.act(self.encode(x)).chunk(2, 1)
        return self.decode(mean + (0.5 * logvar).exp() * torch.randn_like(mean))


class DropoutOn(nn.Module):
    """Drops units at evaluation, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.dropout(self.act(self.first(x)), 0.3, training=True))


def reconstructed() -> list[Batch]:
    drawn = [torch.randn(n, 4) for n in (5, 3)]
    return [(x, x.clone()) for x in drawn]


GRAPHS, PHYSICS, STRUCTURE, PIXELS, RANDOM = (
    "graph networks", "physics-informed networks", "unusual structure", "segmentation and detection", "random forwards",
)  # fmt: skip
DRAWS = {"*": "random"}

#: The network returns its losses, and no predictions.
OWN = {"Gauss-Newton": "returns the loss", **NO_PREDICTION}

ENTRIES = [
    Entry(GRAPHS, "message passing", Graphs, graphs, F.mse_loss, cuts_outputs=True),
    Entry(GRAPHS, "message passing, own loss", Graphs, graphs, own_squares, cuts_outputs=True),
    Entry(PHYSICS, "derivative in the forward", Physics, times, residual),
    Entry(STRUCTURE, "normalising flow", Coupling, numbers(5, 3), likelihood),
    Entry(STRUCTURE, "hypernetwork", Hyper, vectors(5, 3)),
    Entry(STRUCTURE, "mixture of experts", Experts, vectors(5, 3)),
    Entry(STRUCTURE, "deep equilibrium", Equilibrium, vectors(5, 3), not_for=("saturation",)),
    Entry(PIXELS, "U-Net", UNet, pixels, slow=True),
    Entry(PIXELS, "losses in the forward", Detector, objects, own_losses, refused=OWN, slow=True),
    Entry(
        RANDOM,
        "variational autoencoder",
        Variational,
        reconstructed,
        F.mse_loss,
        refused=DRAWS,
        not_for=("trajectory",),
    ),
    Entry(RANDOM, "dropout left on", DropoutOn, vectors(5, 3), refused=DRAWS, not_for=("trajectory",)),
]
