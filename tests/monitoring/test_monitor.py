"""The curvature monitor: numbers of the dense matrices, and a training that does not notice it."""

from __future__ import annotations

import copy
import csv
import doctest
import importlib
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pnanalysis as pn
from pnanalysis.errors import ModelError, PnError
from pnanalysis.inputs.random_states import random_states
from pnanalysis.monitoring.measurement import Measurement, Wanted, _Tracked
from pnanalysis.monitoring.preconditioners import Preconditioner, read_preconditioner
from tests.curvature.conftest import NETWORKS, dense_hessian, images, squared_error

#: Too few products for a trace of the network to pay; and the network at its running statistics.
FEW: dict[str, Any] = {"expected_products": 10, "bn_mode": "eval"}
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "adam": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5}),
}


def data(n: int = 60, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(n, 3, generator=generator, dtype=dtype), torch.randint(2, (n,), generator=generator)


def network(dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 2)
    ).to(dtype)  # fmt: skip


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Everything that a training carries from step to step."""
    return {
        "weights": model.state_dict(), "gradients": [p.grad for p in model.parameters()],
        "modes": [module.training for module in model.modules()], "optimizer": optimizer.state_dict(),
        "torch": torch.get_rng_state(), "numpy and python": random_states()[1:3],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
        "modes of torch": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }  # fmt: skip


def assert_same(one: Any, other: Any, where: str = "") -> None:
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}/{i}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, np.ndarray):
        assert np.array_equal(one, other), where
    else:
        assert one == other, where


@pytest.mark.parametrize("name", [pytest.param("momentum", marks=pytest.mark.slow), "adam"])
def test_training_is_the_same_bit_by_bit(name: str) -> None:
    """Dropout, batch normalisation, a loader that shuffles by its own generator, which is also the monitor's data."""
    kind, settings = OPTIMIZERS[name]
    states = []
    for watched in (False, True):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        model = network(dropout=0.3)
        optimizer = kind(model.parameters(), **settings)
        loader = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(*data()), batch_size=20, shuffle=True,
            generator=torch.Generator().manual_seed(1),
        )  # fmt: skip
        monitor = pn.CurvatureMonitor(model, optimizer, loader, every=2, **FEW) if watched else None
        if monitor:
            monitor.__enter__()
        for _ in range(2):
            for x, y in loader:
                step(model, optimizer, x, y)
        if monitor:
            monitor.__exit__(None, None, None)
            assert monitor.dataset().step.values.tolist() == [0, 2, 4, 6]
        assert not optimizer._optimizer_step_post_hooks
        assert not optimizer._optimizer_step_pre_hooks
        states.append(copy.deepcopy(state_of(model, optimizer)))
    assert_same(*states)


@pytest.mark.parametrize(
    "name", ["momentum", "adamw", *(pytest.param(name, marks=pytest.mark.slow) for name in ("adam", "rmsprop"))]
)
def test_numbers_are_those_of_the_dense_matrices(name: str) -> None:
    kind, settings = OPTIMIZERS[name]
    x, y = data(dtype=torch.float64)
    model = network(torch.float64)
    optimizer = kind(model.parameters(), **settings)
    options: dict[str, Any] = {"every": 3, "top": 3, "tolerance": 1e-7, "batch_size": 20, "trace_probes": 1000, **FEW}
    with pn.CurvatureMonitor(model, optimizer, (x, y), **options) as monitor:
        for i in range(1, 7):
            step(model, optimizer, x[: 10 * i], y[: 10 * i])
            if i % 3:
                continue
            ds = monitor.dataset().sel(step=i)
            operator = pn.HessianOperator(model, F.cross_entropy, [(x, y)], **FEW)
            dense = operator.to_dense()
            values = torch.linalg.eigvalsh(dense).flip(0)
            np.testing.assert_allclose(ds.eigenvalue, values[:3], rtol=1e-9)
            assert float(ds.lambda_max) == pytest.approx(float(values[0]))
            assert float(ds.trace) == pytest.approx(float(dense.trace()))  # as many probes as parameters: exact
            parameters = dict(model.named_parameters())
            found = read_preconditioner(optimizer, parameters)
            assert found.inverse is not None
            inverse = torch.cat([found.inverse[key].flatten() for key in operator.names])
            decay = 0.0 if name == "adamw" else settings.get("weight_decay", 0.0)
            seen = dense + decay * torch.eye(len(dense)).to(dense)
            expected = torch.linalg.eigvals(inverse[:, None] * (seen)).real.max()
            assert float(ds.preconditioned_lambda_max) == pytest.approx(float(expected), rel=1e-9)
            assert float(ds.threshold) == found.threshold
            model.eval()
            loss = F.cross_entropy(model(x), y)
            gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
            model.train()
            assert float(ds.loss) == pytest.approx(float(loss.detach()))
            assert float(ds.gradient_norm) == pytest.approx(float(gradient.norm()))
            assert float(ds.residual.max()) <= 2e-7 * float(values.abs().max())


@pytest.mark.parametrize(
    "name",
    [
        "conv",
        "layernorm",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("linear", "tanh", "maxpool", "batchnorm")),
    ],
)
def test_numbers_of_six_networks_are_those_of_the_dense_matrices(name: str) -> None:
    loss, model, (batch,) = squared_error if name == "linear" else F.cross_entropy, NETWORKS[name](), images((24,))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    options: dict[str, Any] = {"every": 2, "top": 3, "tolerance": 1e-7, "trace_probes": 1000, "data_error": "none"}
    with pn.CurvatureMonitor(model, optimizer, batch, loss, **options, **FEW) as monitor:
        for _ in range(2):
            optimizer.zero_grad()
            loss(model(batch[0]), batch[1]).backward()
            optimizer.step()
    ds = monitor.dataset().sel(step=2)
    dense = dense_hessian(model, [batch], loss)
    values = torch.linalg.eigvalsh(dense).flip(0)
    copies = 3 if name == "linear" else 1  # one for each output, which a Krylov space holds once
    np.testing.assert_allclose(ds.eigenvalue, values[: 3 * copies : copies], rtol=1e-8)
    assert float(ds.lambda_max) == pytest.approx(float(values[0]))
    assert float(ds.trace) == pytest.approx(float(dense.trace()))
    found = read_preconditioner(optimizer, dict(model.named_parameters()))
    assert found.inverse is not None
    inverse = torch.cat([found.inverse[key].flatten() for key, _ in model.named_parameters()])
    scaled = inverse.sqrt()[:, None] * dense * inverse.sqrt()
    assert float(ds.preconditioned_lambda_max) == pytest.approx(float(torch.linalg.eigvalsh(scaled)[-1]), rel=1e-8)


def test_a_new_largest_eigenvalue_is_found_from_a_start_that_has_no_part_of_it() -> None:
    values = torch.linspace(0.0, 1.0, 400, dtype=torch.float64)
    tracked = _Tracked(Wanted(tolerance=1e-3))
    values[7] = 2.0
    assert tracked.pairs(torch.diag(values), 1)[0] == pytest.approx(2.0, abs=1e-4)
    tracked._last = torch.eye(400, dtype=torch.float64)[:, 7:8]  # an exact eigenvector
    values[100] = 2.3
    assert tracked.pairs(torch.diag(values), 1)[0] == pytest.approx(2.3, abs=1e-4)


def test_what_has_not_converged_is_not_a_number() -> None:
    matrix = torch.diag(torch.linspace(0.99, 1.0, 300, dtype=torch.float64))
    value, residual = _Tracked(Wanted(tolerance=1e-7, max_hvp=5)).pairs(matrix, 2)
    assert np.isnan(value).all()
    assert (residual > 1e-7).all()


def test_a_warm_start_saves_products() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(300, 300, dtype=torch.float64, generator=generator)
    matrix = torch.diag(torch.linspace(0, 1, 300, dtype=torch.float64)) + 0.01 * (noise + noise.T)
    counts = []

    class Counting:
        shape, dtype, device = (300, 300), torch.float64, torch.device("cpu")

        def matmat(self, V: torch.Tensor) -> torch.Tensor:
            counts[-1] += V.shape[1]
            return matrix @ V

        def matvec(self, v: torch.Tensor) -> torch.Tensor:
            return self.matmat(v[:, None])[:, 0]

    tracked = _Tracked(Wanted(tolerance=1e-3))
    for _ in range(2):
        counts.append(0)
        found = tracked.pairs(Counting(), 2)[0]
        np.testing.assert_allclose(found, torch.linalg.eigvalsh(matrix).flip(0)[:2], rtol=1e-5)
    assert counts[1] < counts[0]


def test_single_batches_have_eigenvalues_of_their_own() -> None:
    (x, y), model = data(dtype=torch.float64), network(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options: dict[str, Any] = {"every": 1, "batch_size": 20, "batches": True, "tolerance": 1e-6, "trace_probes": 0}
    with pn.CurvatureMonitor(model, optimizer, (x, y), n=None, **options, **FEW) as monitor:
        step(model, optimizer, x, y)
    ds = monitor.dataset().sel(step=1)
    parts = [(x[i : i + 20], y[i : i + 20]) for i in (0, 20, 40)]
    dense = [pn.HessianOperator(model, F.cross_entropy, [part], **FEW).to_dense() for part in parts]
    np.testing.assert_allclose(ds.batch_lambda_max, [torch.linalg.eigvalsh(one)[-1] for one in dense], rtol=1e-9)
    assert len(pn.plots.plot(monitor.dataset()).axes) == 4


def test_measurements_are_saved_and_given_to_sinks(tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    table, seen = tmp_path / "curvature.csv", []
    sinks = [table, lambda at, numbers: seen.append((at, dict(numbers)))]
    with pn.CurvatureMonitor(
        model, optimizer, data(), every=1, path=tmp_path / "curvature.nc", sinks=sinks, max_cost=1e6, **FEW
    ) as monitor:
        step(model, optimizer, *data())
        assert pn.load(tmp_path / "curvature.nc").sizes["step"] == 2
    ds = pn.load(tmp_path / "curvature.nc")
    assert ds.attrs["max_cost"] == 1e6
    assert ds.attrs["cost"] > 0
    rows = list(csv.DictReader(table.open()))
    assert [row["step"] for row in rows] == ["0", "1"]
    for i, (at, numbers) in enumerate(seen):
        assert at == i
        for name in ("lambda_max", "trace", "threshold", "preconditioned_lambda_max"):
            expected = float(ds[name][i])
            assert [float(rows[i][name]), numbers[name]] == pytest.approx([expected] * 2, nan_ok=True)
    assert pn.load(monitor.save(tmp_path / "again.zarr")).equals(monitor.dataset())
    with pytest.raises(PnError, match="csv"):
        pn.CurvatureMonitor(model, optimizer, data(), sinks=[tmp_path / "x.txt"])


def test_a_resumed_training_goes_on_after_the_measurements_of_its_first_part(tmp_path: Path) -> None:
    """What was measured beyond the step at which it resumes is measured anew."""
    files: dict[str, Any] = {"path": tmp_path / "curvature.nc", "sinks": [tmp_path / "curvature.csv"]}
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    options: dict[str, Any] = {"every": 2, "batches": True, "batch_size": 20, "data_error": "none", **FEW}
    with pn.CurvatureMonitor(model, optimizer, data(), **options, **files) as first:
        for i in range(7):
            if i == 5:
                saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            step(model, optimizer, *data())
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    with pn.CurvatureMonitor(model, optimizer, data(), first_step=5, **options, **files) as second:
        for _ in range(3):
            step(model, optimizer, *data())
    whole, before = second.dataset(), first.dataset()
    assert whole.step.values.tolist() == [0, 2, 4, 5, 6, 8]
    for name in ("lambda_max", "trace", "critical_sharpness", "batch_lambda_max", "seconds", "n_hvp"):
        np.testing.assert_array_equal(whole[name][:3], before[name][:3])
    np.testing.assert_allclose(whole.loss.sel(step=6), before.loss.sel(step=6), rtol=1e-6)
    assert whole.attrs["training_seconds"] > before.attrs["training_seconds"]
    assert pn.load(files["path"]).equals(whole)
    rows = list(csv.DictReader(files["sinks"][0].open()))
    assert [int(row["step"]) for row in rows] == whole.step.values.tolist()
    np.testing.assert_allclose([float(row["lambda_max"]) for row in rows], whole.lambda_max)
    with pytest.raises(PnError, match="top is 2, .* 1 eigenvalue"):
        pn.CurvatureMonitor(model, optimizer, data(), first_step=5, top=2, **options, **files)
    with pn.CurvatureMonitor(model, optimizer, data(), first_step=5, **options) as third:  # without files
        step(model, optimizer, *data())
    assert third.dataset().step.values.tolist() == [5, 6]


def test_without_a_number_of_steps_the_cost_is_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = pn.CurvatureMonitor(model, optimizer, data(), **FEW)
    clock = [0.0]
    monkeypatch.setattr(monitor._cost, "clock", lambda: clock[0])
    monitor._cost.measuring = monitor._cost._total = 0.0

    class Slow:
        def __call__(self, at: int, numbers: Any) -> None:
            clock[0] += 1.0

    monitor._sinks.append(Slow())
    with monitor:
        for _ in range(100):
            clock[0] += 1.0
            step(model, optimizer, *data())
    ds = monitor.dataset()
    assert ds.step.values.tolist() == [0, 40, 60, 80, 100]  # each is paid for by 20 steps, the first afterwards
    assert ds.attrs["cost"] == pytest.approx(0.05)
    assert ds.attrs["training_seconds"] == pytest.approx(100)


@pytest.mark.parametrize(("steps", "warned"), [(10, True), pytest.param(80, False, marks=pytest.mark.slow)])
def test_a_training_too_short_for_its_cap_is_said_to_be(
    steps: int, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each measurement takes a second, each step another; products are traced once tracing is affordable."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = pn.CurvatureMonitor(model, optimizer, data(), max_cost=0.5, trace_probes=0, data_error="none")
    clock, traced = [0.0], []
    monkeypatch.setattr(monitor._cost, "clock", lambda: clock[0])
    monkeypatch.setattr("pnanalysis.monitoring.monitor.TRACING_SECONDS", 30.0)
    monkeypatch.setattr(Measurement, "expect_many_products", lambda self: traced.append(clock[0]))
    monitor._cost.measuring = monitor._cost._total = 0.0
    assert monitor._measurement.operator._traces is None

    def slow(at: int, numbers: Any) -> None:
        clock[0] += 12.0 if at == 0 else 0.1

    monitor._sinks.append(slow)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with monitor:
            for _ in range(steps):
                clock[0] += 2.0
                step(model, optimizer, *data())
    text = "measurements took 60 % of the time of the training, more than max_cost, 50 %"
    assert any(text in str(one.message) for one in said) == warned
    assert len(traced) == (not warned)


def test_a_monitor_can_begin_to_trace_without_losing_where_it_was() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = pn.CurvatureMonitor(model, optimizer, data(), max_cost=0.5, trace_probes=0)
    monitor.measure()
    monitor._measurement.expect_many_products()
    assert monitor._measurement.operator._traces is not None
    step(model, optimizer, *data())
    monitor.step += 1
    monitor.measure()
    ds = monitor.dataset()
    dense = pn.HessianOperator(model, F.cross_entropy, [data()], bn_mode="train", expected_products=10).to_dense()
    assert float(ds.lambda_max[1]) == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]), rel=1e-3)
    assert ds.n_hvp[1] < ds.n_hvp[0]


@pytest.mark.filterwarnings("error")
def test_training_goes_on_where_nothing_can_be_measured() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pn.CurvatureMonitor(model, optimizer, data(), every=1, **FEW) as monitor:
        with torch.no_grad():
            model[0].weight.fill_(float("nan"))
        with pytest.warns(UserWarning, match="step 1: "):
            step(model, optimizer, *data())
        step(model, optimizer, *data())  # said once: warnings are errors here
    ds = monitor.dataset()
    assert ds.step.values.tolist() == [0]
    assert ds.attrs["n_failed"] == 2
    with pytest.raises(PnError):  # before training, it is an error
        pn.CurvatureMonitor(model, optimizer, data(), every=1, **FEW).__enter__()


def test_an_optimizer_that_is_not_known_has_no_threshold_unless_it_is_given() -> None:
    model = network()
    optimizer = torch.optim.Adamax(model.parameters(), lr=0.01)
    with (
        pytest.warns(UserWarning, match="preconditioner of Adamax"),
        pn.CurvatureMonitor(model, optimizer, data(), every=1, **FEW) as monitor,
    ):
        step(model, optimizer, *data())
    assert "threshold" not in monitor.dataset()
    assert bool(monitor.dataset().lambda_max.notnull().all())

    def own(optimizer: torch.optim.Optimizer, parameters: Any) -> Preconditioner:
        inverse = {name: torch.full_like(p.detach(), 2.0) for name, p in parameters.items()}
        return Preconditioner(inverse, dict.fromkeys(inverse, 0.0), 0.01, 42.0)

    with pn.CurvatureMonitor(model, optimizer, data(), every=1, preconditioner=own, **FEW) as monitor:
        step(model, optimizer, *data())
    ds = monitor.dataset()
    assert float(ds.threshold[1]) == 42
    np.testing.assert_allclose(ds.preconditioned_lambda_max, 2 * ds.lambda_max, rtol=1e-3)


def test_by_default_batches_are_normalised_as_in_the_steps() -> None:
    (x, y), model = data(dtype=torch.float64), network(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options: dict[str, Any] = {"trace_probes": 0, "tolerance": 1e-7, "expected_products": 10}
    with pn.CurvatureMonitor(model, optimizer, (x, y), every=1, **options) as monitor:
        step(model, optimizer, x, y)
    ds = monitor.dataset()
    assert ds.attrs["bn_mode"] == "train"
    operator = pn.HessianOperator(model, F.cross_entropy, [(x, y)], bn_mode="train", expected_products=10)
    assert float(ds.lambda_max[1]) == pytest.approx(float(torch.linalg.eigvalsh(operator.to_dense())[-1]), rel=1e-9)
    assert float(ds.loss[1]) == pytest.approx(operator.loss())


def test_frozen_normalisations_keep_their_running_statistics() -> None:
    (x, y), model = data(dtype=torch.float64), network(torch.float64)
    model.train()(2 * x + 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options: dict[str, Any] = {"trace_probes": 0, "tolerance": 1e-7, "expected_products": 10}
    with pn.CurvatureMonitor(model, optimizer, (x, y), every=1, **options) as monitor:
        step(model, optimizer, x, y)
        model[1].eval()
        step(model, optimizer, x, y)
        by_running = pn.HessianOperator(model, F.cross_entropy, [(x, y)], expected_products=10)
    ds = monitor.dataset()
    top = float(torch.linalg.eigvalsh(by_running.to_dense())[-1])
    assert float(ds.lambda_max[2]) == pytest.approx(top, rel=1e-9)
    assert float(ds.loss[2]) == pytest.approx(float(F.cross_entropy(model(x), y)))
    assert float(ds.lambda_max[2]) != pytest.approx(float(ds.lambda_max[1]), rel=1e-3)
    as_in_a_step = pn.HessianOperator(model, F.cross_entropy, [(x, y)], bn_mode="train", expected_products=10)
    torch.testing.assert_close(as_in_a_step.to_dense(), by_running.to_dense(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adagrad])
def test_what_the_optimizer_does_not_hold_is_not_trained(make: Any) -> None:
    model = network()
    optimizer = make(model[4].parameters(), lr=0.1)
    with pn.CurvatureMonitor(model, optimizer, data(), every=1, trace_probes=0, **FEW) as monitor:
        step(model, optimizer, *data())
        head = pn.HessianOperator(model, F.cross_entropy, [data()], params=["4"], **FEW).to_dense()
        optimizer.add_param_group({"params": model[0].parameters()})
        step(model, optimizer, *data())
        both = pn.HessianOperator(model, F.cross_entropy, [data()], params=["0", "4"], **FEW).to_dense()
    ds = monitor.dataset()
    assert ds.n_parameters.values.tolist() == [len(head), len(head), len(both)]
    for found, dense in zip(ds.lambda_max[1:].values, (head, both), strict=True):
        assert found == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]), rel=1e-3)


def test_a_sum_is_measured_in_the_batches_of_the_steps_or_not_at_all() -> None:
    (x, _), model = data(dtype=torch.float64), network(torch.float64)
    y, loss = (x[:, 0] > 0).long(), torch.nn.CrossEntropyLoss(reduction="sum")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options: dict[str, Any] = {"trace_probes": 0, "tolerance": 1e-7, **FEW}
    with pytest.raises(PnError, match="sum over the examples .* weight='batches'"):
        pn.CurvatureMonitor(model, optimizer, (x, y), loss, every=1, **options)
    batches = list(zip(x.split(5), y.split(5), strict=True))
    found = {}
    for name, given, chosen in (("mean", F.cross_entropy, {}), ("sum", loss, {"weight": "batches"})):
        monitor = pn.CurvatureMonitor(model, optimizer, batches, given, every=1, **chosen, **options)
        monitor.measure()
        found[name] = monitor.dataset().isel(step=0)
    for variable in ("lambda_max", "loss", "gradient_norm"):
        assert float(found["sum"][variable]) == pytest.approx(5 * float(found["mean"][variable]), rel=1e-6)
    assert float(found["sum"].lambda_max_se) > 0
    assert float(found["sum"].gradient_noise_scale) == pytest.approx(float(found["mean"].gradient_noise_scale))


def test_part_of_the_parameters_and_a_wrapped_network() -> None:
    model = network()
    wrapped = nn.DataParallel(model)
    optimizer = torch.optim.Adam(model.parameters())
    with pn.CurvatureMonitor(wrapped, optimizer, data(), every=1, params=["4"], trace_probes=0, **FEW) as monitor:
        step(model, optimizer, *data())
    ds = monitor.dataset()
    assert "trace" not in ds
    dense = pn.HessianOperator(model, F.cross_entropy, [data()], params=["4"], **FEW).to_dense()
    assert float(ds.lambda_max[1]) == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]), rel=1e-3)


def test_layers_that_are_frozen_or_unfrozen_meanwhile_leave_and_join() -> None:
    model = network()
    model[4].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pn.CurvatureMonitor(model, optimizer, data(), every=1, trace_probes=0, **FEW) as monitor:
        dense = []
        for trained in ((0, 1), (0, 1, 4), (0, 1, 4), (4,)):
            for i in (0, 1, 4):
                model[i].requires_grad_(i in trained)
            step(model, optimizer, *data())
            dense.append(pn.HessianOperator(model, F.cross_entropy, [data()], **FEW).to_dense())
    ds = monitor.dataset().isel(step=slice(1, None))
    assert ds.n_parameters.values.tolist() == [len(one) for one in dense]
    assert len(set(ds.n_parameters.values.tolist())) == 3
    np.testing.assert_allclose(ds.lambda_max, [float(torch.linalg.eigvalsh(one)[-1]) for one in dense], rtol=1e-3)
    assert "n_failed" not in ds.attrs


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adagrad])
def test_chosen_layers_that_are_frozen_are_not_preconditioned(make: Any) -> None:
    model = network()
    optimizer = make(model.parameters(), lr=0.1, weight_decay=0.2)
    options: dict[str, Any] = {"params": ["0", "4"], "trace_probes": 0}
    with pn.CurvatureMonitor(model, optimizer, data(), every=1, **options, **FEW) as monitor:
        step(model, optimizer, *data())
        model[0].requires_grad_(False)
        step(model, optimizer, *data())
    rest = pn.HessianOperator(model, F.cross_entropy, [data()], params=["4"], **FEW)
    state = dict(model.named_parameters())
    inverse = rest.vector_of(read_preconditioner(optimizer, state).inverse or {})
    root = inverse.sqrt()
    moved = root[:, None] * (rest.to_dense() + 0.2 * torch.eye(len(root))) * root
    found = float(monitor.dataset().preconditioned_lambda_max[-1])
    assert found == pytest.approx(float(torch.linalg.eigvalsh(moved)[-1]), rel=1e-3)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.RMSprop, torch.optim.AdamW])
def test_weight_decay_of_optimizer_and_monitor_is_one_term(make: Any) -> None:
    """The decay that the optimizer adds to the gradient takes the place of that among the monitor's options."""
    (x, y), model = data(dtype=torch.float64), network(torch.float64)
    optimizer = make([{"params": model[4].parameters()}, {"params": model[:2].parameters(), "weight_decay": 0.2}],
                     lr=0.1, weight_decay=0.5)  # fmt: skip
    options: dict[str, Any] = {"weight_decay": 0.5, "trace_probes": 0, "tolerance": 1e-7}
    with pn.CurvatureMonitor(model, optimizer, (x, y), every=1, **options, **FEW) as monitor:
        step(model, optimizer, x, y)
    ds = monitor.dataset().sel(step=1)
    operator = pn.HessianOperator(model, F.cross_entropy, [(x, y)], **FEW)
    dense, found = operator.to_dense(), read_preconditioner(optimizer, dict(model.named_parameters()))
    assert float(ds.lambda_max) == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]) + 0.5, rel=1e-9)
    decay = operator.vector_of({n: torch.full_like(p, found.decay[n]) for n, p in model.named_parameters()})
    if make is torch.optim.AdamW:  # decoupled: that of the options is part of the loss
        decay = torch.full_like(decay, 0.5)
    root = operator.vector_of(found.inverse or {}).sqrt()
    moved = root[:, None] * (dense + decay.diag()) * root
    assert float(ds.preconditioned_lambda_max) == pytest.approx(float(torch.linalg.eigvalsh(moved)[-1]), rel=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every is 0"),
        ({"first_step": -1}, "first_step is -1"),
        ({"max_cost": -1.0}, "max_cost is -1"),
        ({"top": 100}, "top is 100"),
        ({"trace_probes": 1}, "trace_probes is 1"),
        ({"params": ["nothing"]}, "matches no parameter"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    model = network()
    with pytest.raises(PnError, match=message):
        pn.CurvatureMonitor(model, torch.optim.SGD(model.parameters(), lr=0.1), data(), **FEW, **options)


def test_without_a_measurement_there_is_no_dataset() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ModelError, match="nothing has been measured"):
        pn.CurvatureMonitor(model, optimizer, data(), **FEW).dataset()
    with pytest.raises(ModelError, match="is no torch.optim.Optimizer"):
        pn.CurvatureMonitor(model, model, data())  # type: ignore[arg-type]


def test_the_example_of_its_docstring_runs() -> None:
    module = importlib.import_module("pnanalysis.monitoring.monitor")
    state = torch.random.get_rng_state()
    try:
        assert doctest.testmod(module).failed == 0
    finally:
        torch.random.set_rng_state(state)
