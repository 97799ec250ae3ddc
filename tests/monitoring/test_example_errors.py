"""Errors for the choice of examples: the infinitesimal jackknife of dense matrices, and the scatter over samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch import nn
from torch.nn import functional as F

import pnanalysis as pn
from pnanalysis.errors import PnError
from pnanalysis.monitoring.preconditioners import read_preconditioner

FEW: dict[str, Any] = {"expected_products": 10, "tolerance": 1e-8, "every": 1}


def data(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, generator=generator, dtype=torch.float64), torch.randint(2, (n,), generator=generator)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def of_examples(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The Hessian of each example, ``(n, P, P)``."""
    parameters = dict(model.named_parameters())
    shapes = [one.shape for one in parameters.values()]

    def loss(theta: torch.Tensor, inputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        parts = theta.split([shape.numel() for shape in shapes])
        named = {name: part.view(shape) for name, part, shape in zip(parameters, parts, shapes, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, named, (inputs,)), target)

    theta = torch.cat([one.detach().flatten() for one in parameters.values()])
    return torch.func.vmap(torch.func.hessian(loss), (None, 0, 0))(theta, x, y)


def jackknife(forms: np.ndarray) -> float:
    """Standard error of the mean of ``(n,)``, with n - 1."""
    return float(forms.std(ddof=1) / len(forms) ** 0.5)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_they_are_those_of_the_matrices_of_single_examples(kind: Any) -> None:
    (x, y), model = data(30), network()
    optimizer = kind(model.parameters(), lr=0.1, weight_decay=0.3)
    with pn.CurvatureMonitor(model, optimizer, (x, y), batch_size=10, top=3, trace_probes=1000, **FEW) as monitor:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    ds = monitor.dataset().sel(step=1)
    matrices = of_examples(model, x, y)
    whole = matrices.mean(0)
    top = torch.linalg.eigh(whole)[1][:, -1]
    assert float(ds.lambda_max_se) == pytest.approx(jackknife((matrices @ top @ top).numpy()), rel=1e-5)
    for pair in (1, 2, 3):
        v = torch.linalg.eigh(whole)[1][:, -pair]
        assert float(ds.eigenvalue_se.sel(pair=pair)) == pytest.approx(jackknife((matrices @ v @ v).numpy()), rel=1e-4)
    each = F.cross_entropy(model(x), y, reduction="none")
    assert float(ds.loss_se) == pytest.approx(jackknife(each.detach().numpy()), rel=1e-9)
    gradients = np.stack([torch.cat([g.flatten() for g in torch.autograd.grad(one, list(model.parameters()),
                          retain_graph=True)]).numpy() for one in each])  # fmt: skip
    along = gradients @ gradients.mean(0) / np.linalg.norm(gradients.mean(0))
    assert float(ds.gradient_norm_se) == pytest.approx(jackknife(along), rel=1e-9)
    traces = torch.einsum("npp->n", matrices).numpy()
    assert float(ds.trace_data_se) == pytest.approx(jackknife(traces))
    assert float(ds.trace_se) == pytest.approx(jackknife(traces))
    assert float(ds.trace_probe_se) == 0
    operator = pn.HessianOperator(model, F.cross_entropy, [(x, y)], expected_products=10)
    inverse = operator.vector_of(read_preconditioner(optimizer, dict(model.named_parameters())).inverse or {})
    root = inverse.sqrt()
    moved = root[:, None] * (whole + 0.3 * torch.eye(len(root))) * root
    top = root * torch.linalg.eigh(moved)[1][:, -1]
    expected = jackknife((matrices @ top @ top).numpy())
    assert float(ds.preconditioned_lambda_max_se) == pytest.approx(expected, rel=1e-4)
    assert monitor.dataset().attrs["data_error"] == "examples"


def test_errors_of_critical_sharpness_are_how_it_changes_with_the_weights_of_examples() -> None:
    (x, y), model = data(30), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: one.detach().clone() for name, one in model.state_dict().items()}
    with pn.CurvatureMonitor(model, optimizer, (x, y), trace_probes=0, **FEW) as monitor:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    ds = monitor.dataset().sel(step=1)
    after = model.state_dict()

    def losses(scale: float) -> np.ndarray:
        moved = {name: before[name] + scale * (after[name] - before[name]) for name in before}
        return F.cross_entropy(torch.func.functional_call(model, moved, (x,)), y, reduction="none").detach().numpy()

    def sharpness(weights: np.ndarray) -> float:
        scale = brentq(lambda s: float(weights @ (losses(s) - losses(0.0))), 2.0, 400.0, xtol=1e-12)
        return 2 / (0.1 * scale)

    ones = np.ones(30)
    whole = sharpness(ones)
    assert float(ds.critical_sharpness_low) <= whole <= float(ds.critical_sharpness_high)
    influence = np.array([30 * (sharpness(ones + 1e-4 * one) - whole) / 1e-4 for one in np.eye(30)])
    # the monitor takes the middle of an interval of 5 %
    assert float(ds.critical_sharpness_se) == pytest.approx(jackknife(influence), rel=0.08)
    first = monitor.dataset().sel(step=0)  # there was no step before
    assert np.isnan(first.get("critical_sharpness_se", np.nan))


def test_probes_and_examples_are_told_apart() -> None:
    (x, y), model = data(200), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pn.CurvatureMonitor(model, optimizer, (x, y), n=100, trace_probes=8, **FEW) as monitor:
        pass
    ds = monitor.dataset()
    np.testing.assert_allclose(ds.trace_se, np.hypot(ds.trace_probe_se, ds.trace_data_se))
    assert bool((ds.trace_probe_se > 0).all())
    assert bool((ds.trace_data_se > 0).all())
    assert [ds.attrs[name] for name in ("n", "n_all", "all_examples")] == [100, 200, 0]


def test_without_matrices_of_examples_there_are_none_and_the_reason_is_kept() -> None:
    (x, y) = data(60)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pn.CurvatureMonitor(model, optimizer, (x, y), batch_size=20, **FEW) as monitor:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    ds = monitor.dataset()
    for name in ("lambda_max_se", "eigenvalue_se", "loss_se", "gradient_norm_se", "critical_sharpness_se"):
        assert ds[name].isnull().all()
    assert bool((ds.trace_se > 0).all())
    assert ds.attrs["data_error"] == "none"
    assert "fewer than 8" in ds.attrs["no_data_error"]
    with pn.CurvatureMonitor(model, optimizer, (x, y), bn_mode="eval", data_error="none", **FEW) as monitor:
        pass
    assert not [name for name in monitor.dataset() if str(name).endswith("_se") and not str(name).startswith("trace")
                and name != "gradient_noise_scale_se"]  # fmt: skip
    with pytest.raises(PnError, match="data_error"):
        pn.CurvatureMonitor(model, optimizer, (x, y), data_error="groups", **FEW)
