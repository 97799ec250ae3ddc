"""Saturation: percentiles against numpy on stored activations, whatever way a network calls its activations."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from pnanalysis.activations.hooks import watch_activations
from pnanalysis.activations.quantile_sketch import RELATIVE_ERROR
from pnanalysis.analyses.saturation import PERCENTILES, saturation
from pnanalysis.cli import app
from pnanalysis.cli.saturation import _table as saturation_table
from pnanalysis.errors import DataError, ModelError, PnError
from pnanalysis.inputs.data import load_data
from pnanalysis.inputs.models import build_model
from pnanalysis.inputs.networks import open_files
from pnanalysis.inputs.sources import as_source
from pnanalysis.io import netcdf
from pnanalysis.io.runs import Run
from pnanalysis.plots.layer_activations import saturated_layers


def stored_activations(run: Run, iteration: int, epoch: int, layer: str) -> np.ndarray:
    """All activations of one layer over the validation images, by a forward hook."""
    source = as_source(run)
    model = source.model(run.select([f"iter{iteration:02d}/epoch{epoch:03d}"]).popitem()[1])
    kept: list[torch.Tensor] = []
    model.get_submodule(layer).register_forward_hook(lambda module, args, output: kept.append(output))
    with torch.no_grad():
        model(source.data.validation.take(slice(None))[0])
    return kept[0].numpy().astype(np.float64).ravel()


def test_percentiles_and_histograms_equal_numpys(tiny_run: Run) -> None:
    ds = saturation(tiny_run, progress=False)
    assert ds.percentile.dims == ("iteration", "epoch", "layer", "quantile")
    assert ds.sizes["epoch"] == 5
    for iteration, epoch, layer in ((0, 4, "tanh1"), (2, 1, "tanh6"), (1, 3, "tanh3")):
        values = stored_activations(tiny_run, iteration, epoch, layer)
        at = ds.sel(iteration=iteration, epoch=epoch, layer=layer)
        # forward passes in batches of another size differ by float32 round-off
        np.testing.assert_allclose(at.percentile, np.percentile(values, PERCENTILES), atol=2e-6)
        np.testing.assert_allclose(at.abs_percentile, np.percentile(np.abs(values), PERCENTILES), atol=2e-6)
        np.testing.assert_allclose(at["mean"], values.mean(), atol=2e-6)
        np.testing.assert_allclose(at["std"], values.std(), atol=2e-6)
        np.testing.assert_allclose(at.saturated_share, (np.abs(values) >= 0.95).mean(), atol=2e-3)
        expected, _ = np.histogram(values, bins=np.linspace(-1, 1, 101), density=True)
        assert np.abs(at.histogram.values - expected).sum() * 0.02 < 1e-3  # a value on an edge may change bins


def trained_lenet(path: Path) -> tuple[nn.Module, torch.Tensor]:
    """LeNet-5 after some steps on digits that are enlarged to 20x20, saved at ``path``, and its images."""
    images, labels = load_data("digits").train.take(slice(200))
    images = F.interpolate(images, 20)
    torch.manual_seed(0)
    model = build_model("lenet5", {"input_shape": (1, 20, 20)})
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(20):
        optimiser.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimiser.step()
    torch.save(model.state_dict(), path)
    return model, images


def test_percentiles_of_the_sketch_lie_within_its_bound_on_every_layer(tiny_run: Run, tmp_path: Path) -> None:
    lenet, images = trained_lenet(tmp_path / "lenet.pt")
    tanh7 = as_source(tiny_run)
    cases = [
        (lenet, images, open_files(lenet, [tmp_path / "lenet.pt"], (images, torch.zeros(len(images))))),
        (tanh7.model(tiny_run.plain), tanh7.data.validation.take(slice(None))[0], tanh7),
    ]
    for model, inputs, source in cases:
        kept: dict[str, np.ndarray] = {}
        keep = lambda name, _, output, known, kept=kept: kept.update({name: output.numpy().copy()})  # noqa: E731
        with torch.no_grad(), watch_activations(model, keep):
            model(inputs)
        names = ["lenet"] if source.run is None else ["plain"]
        ds = saturation(source, checkpoints=names, n=None, exact_limit=0, batch_size=len(inputs), progress=False)
        assert ds.relative_error == RELATIVE_ERROR
        assert ds.layer.values.tolist() == list(kept)
        for name, values in kept.items():
            at = ds.sel(layer=name).squeeze()
            for found, ordered in (
                (at.percentile, np.sort(values, axis=None)), (at.abs_percentile, np.sort(np.abs(values), axis=None)),
            ):  # fmt: skip
                ranks = np.floor(np.array(PERCENTILES) / 100 * (len(ordered) - 1)).astype(int)
                np.testing.assert_allclose(found, ordered[ranks], rtol=RELATIVE_ERROR, atol=1e-38)


def test_every_unit_agrees_with_numpy(tiny_run: Run, tmp_path: Path) -> None:
    lenet, images = trained_lenet(tmp_path / "lenet.pt")
    source = open_files(lenet, [tmp_path / "lenet.pt"], (images, torch.zeros(len(images))))
    ds = saturation(source, n=None, per_unit=True, progress=False).isel(checkpoint=0)
    with torch.no_grad():
        values = lenet.relu1(lenet.conv1(images)).double().numpy()  # (N, channel, y, x)
    near = (np.abs(values) <= 0.05).mean((2, 3))
    conv = ds.sel(layer="relu1")
    assert ds.sizes["unit"] == 120
    assert conv.n_units == 6
    assert conv.unit_saturated_share.isel(unit=slice(6, None)).isnull().all()
    np.testing.assert_allclose(conv.unit_saturated_share[:6], near.mean(0), atol=1e-5)  # batches round differently
    np.testing.assert_allclose(conv.unit_saturated_share_se[:6], near.std(0, ddof=1) / np.sqrt(len(images)), rtol=1e-3)
    np.testing.assert_allclose(conv.saturated_share, near.mean(), atol=1e-5)
    np.testing.assert_allclose(conv.saturated_share_se, near.mean(1).std(ddof=1) / np.sqrt(len(images)), rtol=1e-3)
    assert ds.saturation_measure.isnull().all()  # a ReLU has one asymptote

    ds = saturation(tiny_run, checkpoints=["plain"], n=None, per_unit=True, progress=False).squeeze()
    assert ds.unit_saturation_measure.dims == ("layer", "unit")
    values = np.abs(stored_activations(tiny_run, 0, 4, "tanh2").reshape(-1, 16))
    at = ds.sel(layer="tanh2")
    np.testing.assert_allclose(at.unit_saturation_measure, values.mean(0), atol=1e-6)
    error = values.std(0, ddof=1) / np.sqrt(len(values))
    np.testing.assert_allclose(at.unit_saturation_measure_se, error, rtol=1e-4)
    np.testing.assert_allclose(at.saturation_measure, values.mean(), atol=1e-6)
    assert saturation(tiny_run, checkpoints=["plain"], per_unit=True, progress=False).unit_dead.dims == (
        "iteration", "epoch", "layer", "unit",
    )  # fmt: skip


def test_dead_units_are_those_that_no_image_moves(tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), nn.GELU(),
        nn.Linear(3, 3), nn.LeakyReLU(),
    )  # fmt: skip
    with torch.no_grad():
        for layer, bias in ((1, [-99, 0, -99, 0, -99]), (3, [9, 0, -9, 0]), (5, [1, -9, 1]), (7, [-9, 9, 9])):
            model[layer].weight.mul_(0.1 if layer > 1 else 1.0)
            model[layer].bias.copy_(torch.tensor(bias))
    torch.save(model.state_dict(), tmp_path / "dead.pt")
    ds = saturation(open_files(model, [tmp_path / "dead.pt"], "digits"), per_unit=True, progress=False)
    ds = ds.isel(checkpoint=0)
    assert ds.activation.values.tolist() == ["relu", "tanh", "gelu", "leaky_relu"]
    assert ds.dead_units.values.tolist() == [3, 2, 1, 1]
    assert ds.unit_dead.sel(layer="2").values.tolist() == [1, 0, 1, 0, 1]
    assert ds.unit_dead.sel(layer="4").values[:4].tolist() == [1, 0, 1, 0]


def test_bins_hold_what_unbounded_activations_show_at_any_checkpoint(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU())
    files = []
    for scale in (1.0, 20.0):
        with torch.no_grad():
            model[1].weight.mul_(scale)
        files.append(tmp_path / f"{scale}.pt")
        torch.save(model.state_dict(), files[-1])
    ds = saturation(open_files(model, files, "digits"), n=60, progress=False)
    total = (ds.histogram * float(ds.bin[1] - ds.bin[0])).sum("bin")
    np.testing.assert_allclose(total, 1.0, rtol=1e-12)  # 64 images tell the range
    ds = saturation(open_files(model, files, "digits"), n=60, bin_range=(0.0, 0.5), progress=False)
    assert (ds.histogram * 0.005).sum("bin")[1] < 0.9


def test_networks_with_and_without_asymptotes_share_a_range_in_any_order() -> None:
    torch.manual_seed(0)
    networks = {
        name: nn.Sequential(nn.Linear(4, 6), f(), nn.Linear(6, 2)) for name, f in (("t", nn.Tanh), ("r", nn.ReLU))
    }
    data = (3 * torch.randn(60, 4), torch.zeros(60))
    found = [saturation({n: networks[n] for n in names}, data=data, progress=False) for names in ("tr", "rt")]
    for ds in found:
        np.testing.assert_array_equal(ds.bin, found[0].bin)
        np.testing.assert_allclose(ds.histogram.sum("bin") * float(ds.bin[1] - ds.bin[0]), 1, rtol=1e-6)


def test_the_split_is_the_one_that_was_used() -> None:
    network, data = nn.Sequential(nn.Linear(4, 6), nn.Tanh()), (torch.randn(20, 4), torch.zeros(20))
    ds = saturation(network, data=data, split="test", progress=False)
    assert ds.attrs["split"] == "train"
    assert (
        saturation(network, data={"train": data, "test": data}, split="test", progress=False).attrs["split"] == "test"
    )


def test_a_loader_is_read_a_batch_at_a_time(tmp_path: Path) -> None:
    """A second batch is only made once the first has been let go."""
    alive: list[weakref.ref] = []

    class Loader:
        def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for seed in range(4):
                assert sum(ref() is not None for ref in alive) <= 1
                batch = torch.randn(30, 3, generator=torch.Generator().manual_seed(seed))
                alive.append(weakref.ref(batch))
                yield batch, torch.zeros(30)
                del batch

    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh())
    torch.save(model.state_dict(), tmp_path / "w.pt")
    ds = saturation(open_files(model, [tmp_path / "w.pt"], {"train": Loader()}), n=70, progress=False)
    assert ds.n == 90  # whole batches
    inputs = torch.cat([torch.randn(30, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(3)])
    expected = np.percentile(model(inputs).detach().numpy(), PERCENTILES)
    np.testing.assert_allclose(ds.percentile.squeeze(), expected, atol=1e-6)


def test_the_command_shows_saturation_and_dead_units(tiny_run: Run, tmp_path: Path) -> None:
    command = ["saturation", str(tiny_run.path), "-c", "plain", "--per-unit", "--saturation-bins", "5", "-o",
               str(tmp_path / "s.nc")]  # fmt: skip
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "saturation measure" in result.output
    assert "dead units" in result.output
    ds = netcdf.load(tmp_path / "s.nc")
    assert ds.saturation_bins == 5
    assert ds.unit_dead.dims == ("iteration", "epoch", "layer", "unit")


def test_measures_that_make_no_sense_are_refused(tiny_run: Run) -> None:
    with pytest.raises(PnError, match="between 0 and 100"):
        saturation(tiny_run, percentiles=(50, 101), progress=False)
    with pytest.raises(PnError, match="at least 1"):
        saturation(tiny_run, saturation_bins=0, progress=False)


def test_histograms_integrate_to_one(tiny_run: Run) -> None:
    ds = saturation(tiny_run, checkpoints=["ends"], progress=False)
    width = float(ds.bin[1] - ds.bin[0])
    # every tanh value lies between its asymptotes
    np.testing.assert_allclose((ds.histogram * width).sum("bin").sel(epoch=4), 1.0, rtol=1e-12)


def test_an_iteration_without_a_checkpoint_is_nan(tiny_run: Run) -> None:
    ds = saturation(tiny_run, checkpoints=["plain", "iter01/epoch002"], progress=False)
    assert ds.percentile.sel(iteration=0, epoch=2).isnull().all()
    assert ds.percentile.sel(iteration=1, epoch=2).notnull().all()


def test_weights_of_ones_own_are_laid_along_checkpoint(tiny_run: Run) -> None:
    files = [end.path for end in tiny_run.ends]
    model = as_source(tiny_run).make_model()
    ds = saturation(open_files(model, files, "digits"), progress=False)
    assert ds.percentile.dims == ("checkpoint", "layer", "quantile")
    run = saturation(tiny_run, checkpoints=["ends"], progress=False).sel(epoch=4)
    np.testing.assert_array_equal(ds.percentile.values, run.percentile.values)


def test_runs_are_laid_side_by_side(tiny_run: Run, own_run: Run) -> None:
    ds = saturation(tiny_run, own_run, checkpoints=["ends"], progress=False)
    assert ds.run.values.tolist() == ["tiny", "own"]
    assert ds.percentile.dims[0] == "run"


def test_a_network_without_activations_says_so(tiny_run: Run) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    model.input_shape = (1, 8, 8)
    torch.save(model.state_dict(), tiny_run.path.parent / "linear.pt")
    with pytest.raises(ModelError, match="no activation functions"):
        saturation(open_files(model, [tiny_run.path.parent / "linear.pt"], "digits"), progress=False)


class Unfollowed(nn.Module):
    """Activations after operations that lose the axis of units, and that of examples as well."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.last = nn.Linear(3, 5), nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.fc(x))
        mixed = torch.sigmoid(h.sort(dim=1).values)
        lost = F.relu(torch.renorm(mixed, 2, 0, 10.0))
        return F.relu6(self.last(lost.view(len(x), -1)))


def test_what_cannot_be_followed_is_left_out_with_a_warning() -> None:
    model, x = Unfollowed(), torch.randn(40, 3)
    with pytest.warns(UserWarning, match=r"units cannot be told .* in sigmoid, relu, .*; examples .* in relu, relu6"):
        ds = saturation(model, data=(x, x), split="train", per_unit=True, progress=False).squeeze()
    assert ds.n_units.values.tolist()[::3] == [5, 4]
    assert ds.n_units.isnull().values.tolist() == ds.dead_units.isnull().values.tolist() == [False, True, True, False]
    assert ds.unit_dead.isnull().all("unit").values.tolist() == [False, True, True, False]
    assert ds.mean_se.isnull().values.tolist() == [False, False, True, True]
    assert ds["mean"].notnull().all()
    assert ds.n == 40
    h = torch.sigmoid(torch.tanh(model.fc(x)))
    np.testing.assert_allclose(ds["mean"][1], h.mean().item(), rtol=1e-5)
    np.testing.assert_allclose(ds["mean_se"][1], h.mean(1).std().item() / np.sqrt(40), rtol=1e-4)


class SequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.fc = nn.GRU(3, 5), nn.Linear(5, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, _ = self.rnn(x.transpose(0, 1))
        return torch.tanh(self.fc(h)).mean(0)


def test_standard_errors_are_over_examples_wherever_they_lie() -> None:
    model, x = SequenceFirst(), torch.randn(50, 7, 3)
    batches = [(x[:30], x[:30]), (x[30:], x[30:])]
    ds = saturation(model, data=batches, per_unit=True, progress=False).squeeze()
    with torch.no_grad():
        values = torch.tanh(model.fc(model.rnn(x.transpose(0, 1))[0])).transpose(0, 1).double().numpy()  # (N, T, U)
    np.testing.assert_allclose(ds.mean_se, values.mean((1, 2)).std(ddof=1) / np.sqrt(50), rtol=1e-5)
    np.testing.assert_allclose(ds.unit_saturation_measure, np.abs(values).mean((0, 1)), rtol=1e-5)
    assert ds.n_units == 6


def test_double_precision_stays_where_it_matters() -> None:
    # Sums of squares leave 1e6 eps of round-off, about 1e-3 of the variance: fixed draws, as others may show it.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU()).double()
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
        model[0].bias.fill_(1000.0)
    x = torch.randn(200, 2, dtype=torch.float64)
    ds = saturation(model, data=(x, x), split="train", progress=False).squeeze()
    values = model(x).detach().numpy()
    assert ds.dtype == "float64"
    assert values.std() < 2e-3
    np.testing.assert_allclose(ds["std"], values.std(), rtol=1e-3)
    single = saturation(copy.deepcopy(model).float(), data=(x, x), split="train", progress=False)  # float64 data
    assert single.attrs["dtype"] == "float32"


class Forces(nn.Module):
    """A network that takes a gradient of its own output."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(self.energy(x).sum(), x)[0]


def test_a_network_may_take_gradients_and_return_anything() -> None:
    model, x = Forces(), torch.randn(30, 2)
    ds = saturation(model, data=[(x[:20], x[:20]), (x[20:], x[20:])], progress=False).squeeze()
    values = model.energy[:2](x).detach().double().numpy()
    np.testing.assert_allclose(ds["mean"], values.mean(), rtol=1e-5)
    assert ds.n == 30

    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.act = nn.Linear(2, 5), nn.Sigmoid()

        def forward(self, x: torch.Tensor) -> dict[str, object]:
            return {"first": self.act(self.fc(x)), "cache": [self.act(2 * self.fc(x))], "none": None}

    ds = saturation(Several(), data=(x, x), split="train", progress=False)
    assert ds.layer.values.tolist() == ["act", "act#2"]


def test_the_analysis_changes_nothing_of_the_users() -> None:
    model = nn.Sequential(nn.Linear(2, 5), nn.Dropout(), nn.BatchNorm1d(5), nn.ReLU(inplace=True)).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(30, 2)
    before, rng = x.clone(), torch.get_rng_state()
    saturation(model, data=(x, x), split="train", progress=False)
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(x, before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_data_that_are_not_numbers_or_not_there_are_refused() -> None:
    model, x = nn.Sequential(nn.Linear(2, 5), nn.Tanh()), torch.randn(30, 2)
    x[3, 1] = torch.nan
    with pytest.raises(DataError, match="not finite"):
        saturation(model, data=[(x, x)], progress=False)
    with pytest.raises(DataError, match="no examples"):
        saturation(model, data=(x[:0], x[:0]), progress=False)


def test_a_table_and_a_figure_show_unknown_units(tmp_path: Path) -> None:
    x = torch.randn(40, 3)
    model = nn.Sequential(nn.Linear(3, 5), Sorted())
    with pytest.warns(UserWarning, match="dead units are left out"):
        ds = saturation(model, data=(x, x), split="train", progress=False)
    rows = saturation_table(ds).rows
    assert rows[0][-2:] == [None, None]
    assert saturated_layers(ds).axes[1].texts[0].get_text() == "unknown"


class Sorted(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x.sort(dim=1).values)
