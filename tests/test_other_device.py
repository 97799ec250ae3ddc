"""Whole analyses and trainings on a device of which every tensor must be, with the numbers of the CPU."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import pnanalysis as pn
from pnanalysis.geometry.directions import random_directions
from pnanalysis.inputs.data import Split
from pnanalysis.spectra.linear_operator import DiagonalOperator
from pnanalysis.spectra.random_vectors import random_signs
from pnanalysis.spectra.restarted import extreme_pairs
from pnanalysis.spectra.trace import trace_estimate
from tests.curvature.conftest import NETWORKS, images
from tests.other_device import DEVICE, Elsewhere, other_device
from trainers import PersistentPenalty
from trainers.loop.batched_fit import SingleFit, fit_together
from trainers.loop.fit import fit

CPU = torch.device("cpu")
EIGENVALUES = torch.linspace(-1, 3, 300, dtype=torch.float64) ** 3


def network(device: torch.device, kind: Any = pn.HessianOperator, **options: Any) -> Any:
    batches = [(x.to(device), y.to(device)) for x, y in images()]
    return kind(NETWORKS["tanh"]().to(device), cross_entropy, batches, **options)


def assert_same(found: Any, expected: Any, tolerance: float = 1e-9) -> None:
    assert found.attrs["device"] == str(DEVICE)
    for name, variable in expected.data_vars.items():
        if np.issubdtype(variable.dtype, np.floating):
            np.testing.assert_allclose(found[name], variable, rtol=tolerance, atol=tolerance, err_msg=name)


def test_the_device_holds_values_and_mixes_with_nothing() -> None:
    with other_device() as device:
        x = torch.arange(3.0).to(device)
        assert isinstance(x, Elsewhere)
        assert (x.device, float(x[[2]] + 1)) == (device, 3)
        x[1:] += 1
        assert x.cpu().tolist() == [0, 2, 3]
        for mix in (lambda: x + torch.ones(3), lambda: x.add_(torch.ones(3)), lambda: torch.cat([x, torch.ones(1)])):
            with pytest.raises(RuntimeError, match="two devices"):
                mix()


def test_directions_and_probes_are_drawn_there() -> None:
    state = {"w": torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), "b": torch.ones(5)}
    expected = random_directions(state, ["w", "b"], seed=3)[1]["w"]
    traces = network(CPU, draws=2).trace_of_draws(3)
    with other_device() as device:
        there = {name: tensor.to(device) for name, tensor in state.items()}
        torch.testing.assert_close(random_directions(there, ["w", "b"], seed=3)[1]["w"].cpu(), expected)
        torch.testing.assert_close(network(device, draws=2).trace_of_draws(3), traces)


@pytest.mark.parametrize("options", [{}, {"basis": "half"}, {"basis": "none"}, {"n_lanczos": 8, "n_probes": 3}])
def test_spectra_of_any_operator(options: dict[str, Any]) -> None:
    options = {"n_hvp": None if "n_probes" in options else 40, "progress": False} | options
    expected = pn.spectral_density(DiagonalOperator(EIGENVALUES), **options)
    with other_device() as device:
        assert_same(pn.spectral_density(DiagonalOperator(EIGENVALUES.to(device)), **options), expected)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (pn.HessianOperator, {}),
        pytest.param(pn.GGNOperator, {}, marks=pytest.mark.slow),
        (pn.HessianOperator, {"method": "finite_difference"}),
    ],
)
def test_spectra_of_networks(kind: Any, options: dict[str, Any]) -> None:
    expected = pn.spectral_density(network(CPU, kind, **options), n_hvp=16, progress=False)
    with other_device() as device:
        found = pn.spectral_density(network(device, kind, **options), n_hvp=16, progress=False)
    # of differences, to their error
    assert_same(found, expected, 1e-6 if "method" in options else 1e-9)


def test_eigenpairs_traces_and_signs() -> None:
    op = DiagonalOperator(EIGENVALUES)
    with other_device() as device:
        there = DiagonalOperator(EIGENVALUES.to(device))
        np.testing.assert_allclose(extreme_pairs(there, k=3).value, extreme_pairs(op, k=3).value, rtol=1e-9)
        for method in ("xtrace", "hutchinson"):
            assert trace_estimate(there, method, n_hvp=24).value == pytest.approx(
                trace_estimate(op, method, n_hvp=24).value, rel=1e-9
            )
        signs = random_signs(1000, [0, 1], 3, device)
    assert torch.equal(signs.held, random_signs(1000, [0, 1], 3, CPU))


def test_verified_eigenpairs() -> None:
    options = {"k": 3, "progress": False}
    expected = pn.eigenpairs(DiagonalOperator(EIGENVALUES), **options)
    plain = {"data_error": "none", "classes": False}
    of_network = pn.eigenpairs(network(CPU), **options, **plain)
    with other_device() as device:
        found = pn.eigenpairs(DiagonalOperator(EIGENVALUES.to(device)), **options)
        np.testing.assert_allclose(found.value, expected.value, rtol=1e-9)
        found = pn.eigenpairs(network(device), **options, **plain)
    for name in ("value", "layer_part", "gradient_part"):
        np.testing.assert_allclose(found[name], of_network[name], rtol=1e-6, err_msg=name)


def _unfused(kind: Any, parameters: Any, **options: Any) -> torch.optim.Optimizer:
    """Fused steps exist on the devices that torch knows."""
    made: torch.optim.Optimizer = kind(parameters, **options | {"fused": False, "foreach": False})
    return made


@pytest.mark.parametrize("form", ["absolute", "squared", "cosine"])
def test_training_with_a_penalty(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim, "SGD", partial(_unfused, torch.optim.SGD))
    torch.manual_seed(0)
    data = torch.randn(24, 1, 6, 6).double(), torch.randint(3, (24,))
    start, end = NETWORKS["tanh"](), NETWORKS["tanh"]()
    for parameter in end.parameters():
        parameter.data.mul_(1.1)

    def trained(device: torch.device) -> list[torch.Tensor]:
        model = deepcopy(start).to(device)
        penalty = PersistentPenalty(model, lam=0.1, form=form)
        penalty.add(deepcopy(end).to(device))
        fit(
            model,
            tuple(part.to(device) for part in data),
            epochs=2,
            batch_size=8,
            lr=0.1,
            optimizer="sgd",
            penalty=penalty,
        )
        return [parameter.detach() for parameter in model.parameters()]

    expected = trained(CPU)
    with other_device() as device:
        found = trained(device)
    for there, here in zip(found, expected, strict=True):
        torch.testing.assert_close(there.held, here, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_training_several_networks_together(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SGD", "Adam"):
        monkeypatch.setattr(torch.optim, name, partial(_unfused, getattr(torch.optim, name)))
    torch.manual_seed(0)
    data = torch.randn(24, 1, 6, 6).double(), torch.randint(3, (24,))
    starts = [NETWORKS["tanh"]() for _ in range(2)]

    def trained(device: torch.device) -> list[torch.Tensor]:
        models = [deepcopy(start).to(device) for start in starts]
        penalty = PersistentPenalty(models[1], lam=0.1)
        penalty.add(deepcopy(starts[0]).to(device))
        fits = [SingleFit(models[0]), SingleFit(models[1], seed=1, penalty=penalty)]
        split = Split(*(part.to(device) for part in data))
        options: dict[str, Any] = {"epochs": 2, "batch_size": 8, "lr": 0.1, "optimizer": optimizer}
        for records in fit_together(fits, split, validation=split, **options):
            assert isinstance(records, list), records
        return [parameter.detach() for model in models for parameter in model.parameters()]

    expected = trained(CPU)
    with other_device() as device:
        found = trained(device)
    for there, here in zip(found, expected, strict=True):
        torch.testing.assert_close(there.held, here, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_curvature_while_a_network_trains(name: str) -> None:
    torch.manual_seed(0)
    data = torch.randn(24, 1, 6, 6).double(), torch.randint(3, (24,))
    start = NETWORKS["tanh"]()

    def watched(device: torch.device) -> Any:
        model = deepcopy(start).to(device)
        x, y = (part.to(device) for part in data)
        optimizer = _unfused(getattr(torch.optim, name), model.parameters(), lr=0.01)
        options: dict[str, Any] = {"every": 2, "top": 1, "batch_size": 12, "trace_probes": 4, "expected_products": 10}
        with pn.CurvatureMonitor(model, optimizer, (x, y), **options) as monitor:
            for _ in range(2):
                optimizer.zero_grad()
                cross_entropy(model(x), y).backward()
                optimizer.step()
            return monitor.dataset()

    expected = watched(CPU)
    with other_device() as device:
        found = watched(device)
    assert set(found.data_vars) == set(expected.data_vars)
    for variable in expected.data_vars:
        if "seconds" not in variable and np.issubdtype(expected[variable].dtype, np.floating):
            np.testing.assert_allclose(found[variable], expected[variable], rtol=1e-6, atol=1e-9, err_msg=variable)


def _analyses(device: torch.device) -> dict[str, Any]:
    """Whole analyses of one network, whose data come from the CPU."""
    torch.manual_seed(0)
    model = NETWORKS["tanh"]()
    x, y = (torch.cat(parts) for parts in zip(*images(), strict=True))
    options = {"loss": cross_entropy, "n": None, "device": str(device), "dtype": "float64", "progress": False}
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=10)
    return {
        "hessian of a loader": pn.hessian(model, data=loader, n_hvp=12, data_error="none", **options),
        "blocks": pn.blocks(model, data=(x, y), n_hvp=16, **options),
    }


def test_whole_analyses() -> None:
    expected = _analyses(CPU)
    with other_device() as device:
        found = _analyses(device)
    for name, ds in expected.items():
        assert_same(found[name], ds, 1e-6)


def test_saturation_while_a_network_trains() -> None:
    x, _ = images()[0]

    def observed(device: torch.device) -> Any:
        torch.manual_seed(0)
        model = NETWORKS["tanh"]().to(device).train()
        with pn.SaturationMonitor(model) as monitor:
            model(x.to(device))
        return monitor.dataset()

    expected = observed(CPU)
    with other_device() as device:
        found = observed(device)
    for name, variable in expected.data_vars.items():
        np.testing.assert_allclose(found[name], variable, rtol=1e-9, err_msg=name)
