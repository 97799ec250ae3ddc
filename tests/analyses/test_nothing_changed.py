"""Analyses leave everything as they found it: networks, data, random number generators and torch's settings."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import scipy.special  # noqa: F401
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pnanalysis as pn
from tests.cases import cases


class Eventful(nn.Module):
    """In train mode, with normalisation, dropout, buffers, hooks, a frozen layer, gradients and things of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.act = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh()
        self.drop, self.last, self.frozen = nn.Dropout(0.3), nn.Linear(6, 3), nn.Linear(4, 4)
        self.frozen.requires_grad_(False)
        self.norm.eval()  # in another mode than its parent
        self.register_buffer("passes", torch.zeros((), dtype=torch.long))
        self.calls, self.seen, self.kept = 0, [], {"scale": torch.ones(3)}
        self.last.register_forward_hook(lambda module, args, output: output * 1.5)
        self.first.register_forward_pre_hook(lambda module, args: None)
        self.act.register_full_backward_hook(lambda module, grad_input, grad_output: None)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(tuple(x.shape))
        self.passes += 1
        self.features = self.drop(self.act(self.norm(self.first(self.frozen(x)))))
        return self.last(self.features) * self.kept["scale"].to(x)


def eventful(seed: int) -> Eventful:
    torch.manual_seed(seed)
    network = Eventful()
    F.cross_entropy(network(X), Y).backward()
    return network


X = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
Y = torch.randint(3, (24,), generator=torch.Generator().manual_seed(1))
HESSIAN = {"n_lanczos": 4, "n_probes": 1}
ANALYSES: dict[str, Callable[..., Any]] = {
    "hessian": lambda nets, **k: pn.hessian(nets, **HESSIAN, **k),
    "ggn": lambda nets, **k: pn.hessian(nets, operator="ggn", **HESSIAN, **k),
    "fisher": lambda nets, **k: pn.hessian(nets, operator="fisher", **HESSIAN, **k),
    "eigenpairs": lambda nets, **k: pn.eigenpairs(nets, k=2, **k),
    "blocks": lambda nets, **k: pn.blocks(nets, n_hvp=16, bits=4, spectra=True, n_spectrum=4, **k),
    "saturation": lambda nets, loss, **k: pn.saturation(nets, **k),
    "trajectory": lambda nets, loss, data, **k: pn.trajectory(nets, **k),
    "line": lambda nets, **k: pn.landscape(nets[:2], n_points=3, **k),
    "curve": lambda nets, **k: pn.landscape(nets[:2], view="curve", n_points=3, n_steps=2, **k),
    "plane": lambda nets, **k: pn.landscape(nets, view="plane", n_points=2, **k),
    "random plane": lambda nets, **k: pn.landscape(nets[0], view="random", n_points=2, **k),
    "eigenvectors plane": lambda nets, **k: pn.landscape(nets[0], view="eigenvectors", n_points=2, **k),
    "sharpness": lambda nets, **k: pn.sharpness(nets, n_steps=2, n_starts=2, n_directions=2, **k),
    "functional_distance": pn.functional_distance,
    "compare": lambda nets, **k: pn.compare(nets, hessian=HESSIAN, **k),
}


def of_network(network: nn.Module) -> dict[str, Any]:
    """Everything about a network that an analysis could change."""
    found: dict[str, Any] = {}
    for name, module in network.named_modules():
        for key, value in vars(module).items():
            found[f"{name}.{key}"] = list(value) if isinstance(value, dict) else value
        found |= {f"{name}.{key} of own": value for key, value in vars(module).get("kept", {}).items()}
        found[f"{name}.seen"] = list(vars(module).get("seen", ()))
    for name, parameter in network.named_parameters():
        found |= {
            f"{name} itself": id(parameter),
            f"{name} trained": parameter.requires_grad,
            f"{name} grad": parameter.grad,
        }
    found |= {f"{name} value": tensor for name, tensor in network.state_dict().items()}
    return {key: value.detach().clone() if isinstance(value, Tensor) else value for key, value in found.items()}


def of_process() -> dict[str, Any]:
    """Everything about the process that an analysis could change."""
    return {
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
        "python": random.getstate(),
        "default dtype": torch.get_default_dtype(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "gradients": torch.is_grad_enabled(),
        "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "attention": torch.backends.cuda.flash_sdp_enabled(),
        "threads": torch.get_num_threads(),
        "warnings": list(warnings.filters),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for key, value in before.items():
        same = torch.equal(value, after[key]) if isinstance(value, Tensor) else value == after[key]
        assert same, f"{key} has changed from {value} to {after[key]}"


@pytest.mark.parametrize("name", cases({name: name for name in ANALYSES}, ("blocks",)))
def test_networks_data_and_process_are_as_before(name: str) -> None:
    nets, data = [eventful(seed) for seed in range(3)], (X.clone(), Y.clone())
    networks, process = [of_network(net) for net in nets], of_process()
    ANALYSES[name](nets, data=data, loss=F.cross_entropy, progress=False)
    assert_same(process, of_process())
    for net, before in zip(nets, networks, strict=True):
        assert_same(before, of_network(net))
    assert torch.equal(data[0], X)
    assert torch.equal(data[1], Y)


class OwnLoss(nn.Module):
    """A loss with a state of its own, which each call changes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        return F.cross_entropy(outputs, targets)


@pytest.mark.parametrize("name", ["line", "sharpness", "compare", "hessian"])
def test_a_loss_with_a_state_keeps_it(name: str) -> None:
    loss = OwnLoss()
    ANALYSES[name]([eventful(seed) for seed in range(2)], data=(X, Y), loss=loss, progress=False)
    assert float(loss.calls) == 0
