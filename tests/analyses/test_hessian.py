"""Spectra of runs and of users' own networks, beside PyHessian's, and after an interruption."""

from __future__ import annotations

import errno
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

import pnanalysis as pn
from pnanalysis.errors import CurvatureError, RunError
from pnanalysis.inputs.data import load_data
from pnanalysis.inputs.models import build_model, parameter_layers
from pnanalysis.inputs.sources import as_source
from pnanalysis.io.runs import Run
from pnanalysis.spectra.density import spectral_density
from trainers import fit

SMALL = {"n": 128, "n_lanczos": 16, "n_probes": 3, "progress": False}


def test_plain_and_champion_share_grid_and_examples(tiny_run: Run) -> None:
    ds = pn.hessian(tiny_run, **SMALL)
    assert ds.checkpoint.values.tolist() == ["plain", "champion"]
    assert ds.density.dims == ("checkpoint", "eigenvalue")
    np.testing.assert_allclose(ds.weight.sum("quadrature"), 1.0, rtol=1e-12)
    assert ds.iteration.values.tolist() == [0, tiny_run.champion.iteration]
    assert ds.attrs["data_fingerprint"] == tiny_run.manifest["data"]["fingerprint"]


def test_the_spectrum_is_that_of_the_dense_hessian(tiny_run: Run) -> None:
    ds = pn.hessian(tiny_run, checkpoints=["plain"], n=128, n_lanczos=60, n_probes=6, dtype="float64", progress=False)
    source = as_source(tiny_run)
    model = source.model(tiny_run.plain).double()
    part = source.data.train.subset(128, 0)
    op = pn.HessianOperator(model, source.loss, part.batches(512))
    exact = torch.linalg.eigvalsh(op.to_dense())
    at = ds.isel(checkpoint=0)
    assert float(at.lambda_max) == pytest.approx(float(exact[-1]), rel=1e-8)
    # five standard errors: a false alarm in a million, were the errors normal
    assert abs(float(at.trace) - float(exact.sum())) < 5 * float(at.trace_se) + 1e-9
    assert 0 < float(at.trace_se) < 0.1 * abs(float(exact.sum()))


def test_several_runs_are_told_apart_by_name(tiny_run: Run, own_run: Run) -> None:
    ds = pn.hessian(tiny_run, own_run, checkpoints=["plain"], **SMALL)
    assert ds.checkpoint.values.tolist() == ["tiny/plain", "own/plain"]


@pytest.mark.parametrize("operator", ["ggn", "fisher"])
def test_gauss_newton_and_fisher_have_no_negative_eigenvalues(tiny_run: Run, operator: str) -> None:
    ds = pn.hessian(tiny_run, checkpoints=["plain"], operator=operator, dtype="float64", **SMALL)
    assert float(ds.lambda_min[0]) > -1e-9 * float(ds.lambda_max[0])


def test_an_interrupted_spectrum_goes_on_to_the_same_result(tiny_run: Run, tmp_path: Path, monkeypatch) -> None:
    options = {**SMALL, "checkpoints": ["plain"]}
    whole = pn.hessian(tiny_run, **options)
    calls = 0
    product = pn.HessianOperator.matmat

    def interrupted(self: pn.HessianOperator, V: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise KeyboardInterrupt
        return product(self, V)

    with monkeypatch.context() as patch:
        patch.setattr(pn.HessianOperator, "matmat", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pn.hessian(tiny_run, **options, state=tmp_path / "state")
    calls = -1000
    resumed = pn.hessian(tiny_run, **options, state=tmp_path / "state")
    for name in whole:
        np.testing.assert_array_equal(whole[name], resumed[name], err_msg=str(name))


def test_a_spectrum_that_cannot_be_saved_is_not_computed_again(tiny_run: Run, tmp_path: Path, monkeypatch) -> None:
    options = {**SMALL, "checkpoints": ["plain"], "state": tmp_path / "state"}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pnanalysis.spectra.finished.netcdf.save", full)
        with pytest.warns(UserWarning, match="cannot be written, No space left on device; going on without"):
            whole = pn.hessian(tiny_run, **options)
    products, product = [], pn.HessianOperator.matmat

    def counted(self: pn.HessianOperator, V: torch.Tensor) -> torch.Tensor:
        products.append(V.shape[1])
        return product(self, V)

    monkeypatch.setattr(pn.HessianOperator, "matmat", counted)
    resumed = pn.hessian(tiny_run, **options)
    assert sum(products) < int(resumed.n_hvp) / 2  # one for each saved state, to check that it is still this operator
    assert not any((tmp_path / "state").glob("*/"))
    xr.testing.assert_equal(resumed, whole)


def test_finished_spectra_are_kept_while_others_are_under_way(tiny_run: Run, tmp_path: Path, monkeypatch) -> None:
    options = {**SMALL, "checkpoints": ["plain", "start"], "state": tmp_path / "state"}
    whole = pn.hessian(tiny_run, **{**options, "state": None})
    computed = []

    def counted(*arguments: object, title: str, **others: object) -> xr.Dataset:
        if len(computed) == 1:
            computed.append("interrupted")
            raise KeyboardInterrupt
        computed.append(title)
        return spectral_density(*arguments, title=title, **others)

    monkeypatch.setattr(sys.modules["pnanalysis.analyses.hessian"], "spectral_density", counted)
    with pytest.raises(KeyboardInterrupt):
        pn.hessian(tiny_run, **options)
    resumed = pn.hessian(tiny_run, **options)
    assert computed == ["plain", "interrupted", "start"]
    xr.testing.assert_identical(resumed.drop_attrs(), whole.drop_attrs())
    assert resumed.attrs.keys() == whole.attrs.keys()
    with pytest.raises(CurvatureError, match="unfinished work with seed 0, not 1"):
        pn.hessian(tiny_run, **{**options, "seed": 1})


def test_two_calls_do_not_share_their_unfinished_work(tiny_run: Run, tmp_path: Path, monkeypatch) -> None:
    options = {**SMALL, "checkpoints": ["plain"], "state": tmp_path / "state"}

    def another(*_: object, **__: object) -> xr.Dataset:
        with pytest.raises(RunError, match="state: is being written by process"):
            pn.hessian(tiny_run, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["pnanalysis.analyses.hessian"], "spectral_density", another)
    with pytest.raises(KeyboardInterrupt):
        pn.hessian(tiny_run, **options)
    monkeypatch.undo()
    pn.hessian(tiny_run, **options)  # the lock went with the call


def test_a_finished_spectrum_of_code_that_has_changed_is_computed_anew(tmp_path: Path) -> None:
    weights = tmp_path / "w.pt"
    torch.save(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).state_dict(), weights)
    data = torch.randn(60, 6), torch.randint(3, (60,))
    options = {"n_lanczos": 8, "n_probes": 2, "progress": False}

    def spectrum(activation: type[nn.Module], **state: object) -> xr.Dataset:
        net = nn.Sequential(nn.Linear(6, 5), activation(), nn.Linear(5, 3))
        source = pn.open_files(net, [weights], data)
        source.attrs["model"] = "mymodels:make"  # a name says nothing of the code behind it
        return pn.hessian(source, **options, **state)

    spectrum(nn.Tanh, state=tmp_path / "state")
    again = spectrum(nn.ReLU, state=tmp_path / "state")
    np.testing.assert_array_equal(again.node, spectrum(nn.ReLU).node)


def test_a_batch_that_is_not_finite_is_named() -> None:
    inputs, targets = torch.randn(30, 4), torch.randint(2, (30,))
    inputs[17] = torch.nan
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    batches = list(zip(inputs.split(10), targets.split(10), strict=True))
    op = pn.HessianOperator(model, nn.functional.cross_entropy, batches)
    with pytest.raises(CurvatureError, match="batch 1"):
        pn.spectral_density(op, 5, 2, progress=False)


@pytest.mark.slow
def test_pyhessian_agrees_on_lenet5() -> None:
    """Its power iteration and Hutchinson trace; its density needs a function that torch no longer has."""
    from pyhessian import hessian as PyHessian

    data = load_data("digits", (3, 32, 32))
    torch.manual_seed(0)
    model = build_model("lenet5")
    fit(model, data.train, epochs=2, batch_size=64)
    inputs, targets = data.train.subset(256).take(slice(None))
    ours = pn.spectral_density(
        pn.HessianOperator(model, nn.functional.cross_entropy, [(inputs, targets)]), 30, 4, progress=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PyHessian(model.eval(), nn.functional.cross_entropy, data=(inputs, targets), cuda=False)
        (top,), _ = theirs.eigenvalues(maxIter=200, tol=1e-5, top_n=1)
        traces = np.array(theirs.trace(maxIter=60, tol=0.0))
    # power iteration stops at a relative change of 1e-5 a step; the gap to the next eigenvalue multiplies that
    assert float(ours.lambda_max) == pytest.approx(top, rel=1e-2)
    error = np.hypot(float(ours.trace_se), traces.std(ddof=1) / np.sqrt(len(traces)))
    assert abs(float(ours.trace) - traces.mean()) < 4 * error


@pytest.mark.slow
def test_per_layer_gives_a_row_for_each_block(tiny_run: Run) -> None:
    ds = pn.hessian(tiny_run, checkpoints=["plain"], per_layer=True, **{**SMALL, "n_hvp": 2000}, dtype="float64")
    source = as_source(tiny_run)
    model = source.model(tiny_run.plain).double()
    dense = pn.HessianOperator(model, source.loss, source.data.train.subset(128, 0).batches(512)).to_dense()
    start = 0
    for row, (layer, own) in enumerate(parameter_layers(model)):
        size = sum(parameter.numel() for _, parameter in own)
        block = torch.linalg.eigvalsh(dense[start : start + size, start : start + size])
        at = ds.isel(checkpoint=row)
        assert (at.checkpoint.item(), at.layer.item()) == (f"plain:{layer}", layer)
        assert float(at.lambda_max) == pytest.approx(float(block[-1]), rel=1e-8)
        start += size


@pytest.mark.slow
def test_each_layer_has_a_kernel_of_its_own_and_a_grid_that_resolves_it(tiny_run: Run) -> None:
    options = {"per_layer": True, "n": 64, "n_lanczos": 12, "n_probes": 2, "progress": False}
    ds = pn.hessian(tiny_run, checkpoints=["plain", "start"], **options)
    alone = [pn.hessian(tiny_run, checkpoints=[name], **options) for name in ("plain", "start")]
    widths = np.maximum(*(one.kernel_width.values for one in alone))
    np.testing.assert_array_equal(ds.kernel_width, np.tile(widths, 2))
    assert len(set(widths)) > 1
    grid = ds.eigenvalue.values
    assert (np.diff(grid) > 0).all()
    assert len(grid) < 1024 * len(widths)
    for row in range(ds.sizes["checkpoint"]):
        at = ds.isel(checkpoint=row)
        near = (grid >= float(at.lambda_min)) & (grid <= float(at.lambda_max))
        assert np.diff(grid[near]).max() < float(at.kernel_width)
        assert np.trapezoid(at.density, grid) == pytest.approx(1.0, abs=1e-3)


def test_the_default_number_of_steps_fits_a_tiny_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    torch.save(model.state_dict(), tmp_path / "w.pt")
    own = pn.open_files(model, [tmp_path / "w.pt"], [(torch.randn(9, 4), torch.arange(9) % 2)])
    assert pn.hessian(own, progress=False).sizes["checkpoint"] == 1


@pytest.mark.slow
def test_checkpoints_with_budgets_split_differently_stand_side_by_side(tiny_run: Run) -> None:
    ds = pn.hessian(tiny_run, checkpoints=["start", "plain"], n=128, n_hvp=150, progress=False)
    alone = pn.hessian(tiny_run, checkpoints=["plain"], n=128, n_hvp=150, progress=False)
    assert float(ds.trace[1]) == pytest.approx(float(alone.trace[0]), rel=1e-12)
    np.testing.assert_allclose(ds.weight.sum("quadrature"), 1.0, rtol=1e-12)
    assert np.isnan(ds.weight.values).any()  # they do differ in length


class Dropping(nn.Module):
    """A network whose dropout draws in eval mode, too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.b(3 * F.dropout(torch.tanh(self.a(inputs)), 0.5, training=True))
        return out


@pytest.mark.parametrize("data_error", ["none", "examples"])
def test_intervals_of_the_trace_include_the_scatter_of_draws(data_error: str) -> None:
    data = (torch.randn(64, 6, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 3)
    options: dict[str, Any] = {"loss": F.cross_entropy, "draws": 4, "n_hvp": 400, "n": None, "progress": False}
    ds = pn.hessian(Dropping(), data=data, data_error=data_error, **options).squeeze()
    op = pn.HessianOperator(Dropping(), F.cross_entropy, [data], draws=4)
    scatter = float(op.trace_of_draws().std()) / 2
    half = float(ds.trace_high - ds.trace_low) / 2
    of_examples = float(ds.trace_data_se) if data_error == "examples" else 0.0
    assert half > 0.99 * np.hypot(stats.t.ppf(0.975, 3) * scatter, 1.9 * of_examples)
    assert half < 1.1 * np.hypot(stats.t.ppf(0.975, 3) * scatter, 2.1 * of_examples)
    assert float(ds.trace_se) == pytest.approx(np.hypot(scatter, of_examples), rel=0.05)
