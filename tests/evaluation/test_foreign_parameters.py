"""A term of the loss in parameters of the caller's own network is refused: it would be a constant of every copy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pnanalysis as pn
from pnanalysis.errors import PnError

X, Y = torch.randn(24, 4, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3
QUIET: dict[str, Any] = {"progress": False}


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def square(model: nn.Module) -> Tensor:
    return torch.stack([parameter.square().sum() for parameter in model.parameters()]).sum()


class Decaying(nn.Module):
    """A loss that holds the network."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets) + 0.1 * square(self.model)


class Tied(nn.Module):
    """Its decoder, a function, refers to the network that it was made for."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 3)
        self.decoder = lambda hidden: hidden @ self.encoder.weight

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.decoder(torch.tanh(self.encoder(inputs)))
        return out


ANALYSES: dict[str, Callable[[nn.Module, Any], object]] = {
    "hessian": lambda net, loss: pn.hessian(net, data=(X, Y), loss=loss, n_hvp=20, data_error="none", **QUIET),
    "eigenpairs": lambda net, loss: pn.eigenpairs(net, data=(X, Y), loss=loss, data_error="none", **QUIET),
    "blocks": lambda net, loss: pn.blocks(net, data=(X, Y), loss=loss, **QUIET),
    "sharpness": lambda net, loss: pn.sharpness(net, data=(X, Y), loss=loss, **QUIET),
    "learning coefficient": lambda net, loss: pn.learning_coefficient(net, data=(X, Y), loss=loss, **QUIET),
    "landscape": lambda net, loss: pn.landscape({"a": net, "b": network(1)}, data=(X, Y), loss=loss, **QUIET),
    "compare": lambda net, loss: pn.compare({"a": net, "b": network(1)}, data=(X, Y), loss=loss, **QUIET),
    "operator": lambda net, loss: pn.HessianOperator(net, loss, [(X, Y)], dtype="float64"),
}


@pytest.mark.parametrize("analysis", ANALYSES)
def test_losses_that_refer_to_the_network_are_refused(analysis: str) -> None:
    net = network()

    def closed(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets) + 0.1 * square(net)

    for loss in (closed, Decaying(net)):
        with pytest.raises(PnError, match=r"parameters of the network from outside \('0.weight' and 3 more\)"):
            ANALYSES[analysis](net, loss)


def test_networks_that_refer_to_themselves_from_outside_are_refused() -> None:
    with pytest.raises(PnError, match=r"from outside \('encoder.weight'\)"):
        pn.HessianOperator(Tied(), F.mse_loss, [(X, X)])


def test_the_same_term_of_the_model_that_a_loss_is_given_is_part_of_the_matrix() -> None:
    net = network().double()
    data = [(X.double(), Y)]

    def decaying(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1]) + 0.1 * square(model)

    plain = pn.HessianOperator(net, F.cross_entropy, data).to_dense()
    decayed = pn.HessianOperator(net, decaying, data).to_dense()
    torch.testing.assert_close(decayed, plain + 0.2 * torch.eye(len(plain), dtype=torch.float64))


@pytest.mark.parametrize("meant", ["no gradients", "detached", "another network", "a parameter of its own"])
def test_constants_are_allowed(meant: str) -> None:
    net = network()
    teacher = copy.deepcopy(net) if meant in ("no gradients", "detached") else network(1)
    centre = nn.Parameter(torch.zeros(3))  # equal to a bias of zeros by chance
    nn.init.zeros_(net[2].bias)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        if meant == "a parameter of its own":
            return F.cross_entropy(outputs - centre, targets)
        with torch.set_grad_enabled(meant != "no gradients"):
            wanted = teacher(X[: len(outputs)])
        return F.mse_loss(outputs, wanted.detach() if meant == "detached" else wanted)

    assert pn.HessianOperator(net, loss, [(X, Y)], weight="examples").gradient().isfinite().all()


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*is not a leaf Tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
def test_networks_whose_parameters_are_no_leaves_are_compared() -> None:
    networks = {name: torch.jit.script(network(seed)) for seed, name in enumerate("ab")}
    few: dict[str, Any] = {"hessian": False, "saturation": False, "cka": False}
    ds = pn.compare(networks, data=(X, Y), loss=F.cross_entropy, **few, **QUIET)
    expected = (networks["a"](X).argmax(1) != networks["b"](X).argmax(1)).double().mean()
    assert float(ds.disagreement[0, 1]) == pytest.approx(float(expected))
    assert all(parameter.requires_grad for parameter in network().parameters())
