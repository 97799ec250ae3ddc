"""Runs and models as they come: equal names, shared and frozen parameters, losses of one's own."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pnanalysis as pn
from pnanalysis.analyses.hessian import SpectrumOptions
from pnanalysis.analyses.spectrum_cache import matrix_digest, saved_spectrum
from pnanalysis.errors import RunError, TrainingError
from pnanalysis.geometry.loss_surface import LossSurface
from pnanalysis.inputs.models import parameter_layers
from pnanalysis.inputs.sources import Source, as_source
from pnanalysis.io import netcdf
from pnanalysis.io.runs import ANALYSIS, Run
from trainers import PersistentPenalty, fit
from trainers.loop.batched_fit import SingleFit, fit_together


@pytest.fixture
def namesakes(tiny_run: Run, tmp_path: Path) -> list[Run]:
    """The same run under the same name in two folders."""
    for folder in ("a", "b"):
        shutil.copytree(tiny_run.path, tmp_path / folder / "run")
    return [pn.open_run(tmp_path / folder / "run") for folder in ("a", "b")]


class Tied(nn.Module):
    """Two layers that share their weight, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.frozen = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.frozen(self.second(self.first(x).tanh()).tanh())


def test_runs_of_one_name_are_kept_apart(namesakes: list[Run]) -> None:
    quiet = {"n": 50, "progress": False}
    assert (
        pn.sharpness(
            *namesakes,
            checkpoints=["plain"],
            n_steps=2,
            measures=("worst", "average"),
            second_order=False,
            n_starts=1,
            **quiet,
        ).sizes["checkpoint"]
        == 2
    )
    assert pn.saturation(*namesakes, checkpoints=["ends"], **quiet).run.values.tolist() == ["run#1", "run#2"]
    ds = pn.trajectory(*namesakes, progress=False)
    alone = pn.trajectory(namesakes[0], progress=False)
    half = alone.sizes["checkpoint"]
    np.testing.assert_allclose(ds.path_length[half:], alone.path_length, atol=1e-5)
    assert ds.sizes["end"] == 2 * alone.sizes["end"]


def test_a_saved_spectrum_of_another_loss_or_model_is_not_taken(namesakes: list[Run]) -> None:
    run, spent = namesakes[0], {"n_lanczos": 5, "n_probes": 2}
    netcdf.save(pn.hessian(run, n=50, **spent, progress=False), run.path / ANALYSIS / "hessian.nc")
    settings = SpectrumOptions().matrix_settings(64)

    def found(source: Source) -> bool:
        network = source.model(run.plain)
        digest = matrix_digest(source, settings, source.split("train", 50, 0, "cpu"), network)
        return saved_spectrum(source, digest, n_products=10) is not None

    assert found(as_source(run))
    assert not found(as_source(run, loss=lambda outputs, targets: 5 * F.cross_entropy(outputs, targets)))
    assert not found(as_source(run, model=as_source(run).make_model()))  # code that no name stands for


def test_a_users_own_model_keeps_its_weights(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    for i in range(2):
        torch.save(nn.Sequential(nn.Linear(3, 2)).state_dict(), tmp_path / f"{i}.pt")
    before = model[0].weight.clone()
    data = (torch.randn(20, 3), torch.randint(2, (20,)))
    pn.compare(pn.open_files(model, [tmp_path / "0.pt", tmp_path / "1.pt"], data), hessian=False, progress=False)
    assert torch.equal(model[0].weight, before)
    assert model.training


def test_shared_parameters_count_once_and_frozen_ones_stay() -> None:
    torch.manual_seed(0)
    model, other = Tied(), Tied()
    names = [name for _, own in parameter_layers(model) for name, _ in own]
    assert names == ["first.weight", "first.bias", "second.bias"]
    penalty = PersistentPenalty(model, lam=1.0)
    penalty.add(model)
    assert penalty().item() == pytest.approx(2.0)  # one for each of two layers
    surface = LossSurface(model, F.cross_entropy, torch.device("cpu"), torch.float64)
    assert surface.parameter_names == names
    assert other is not model


def test_networks_with_shared_weights_train_together() -> None:
    data = (torch.randn(40, 4), torch.randint(3, (40,)))
    alone, together = [], []
    for models in (alone, together):
        torch.manual_seed(1)
        models += [Tied(), Tied()]
    for seed, model in enumerate(alone):
        fit(model, data, epochs=2, batch_size=10, seed=seed)
    fit_together([SingleFit(model, seed) for seed, model in enumerate(together)], data, epochs=2, batch_size=10)
    for one, two in zip(alone, together, strict=True):
        torch.testing.assert_close(one.first.weight, two.first.weight, rtol=1e-4, atol=1e-6)


def test_a_run_whose_disk_is_full_stops_alone() -> None:
    def full(*_: object) -> None:
        raise RunError("the disk is full")

    data = (torch.randn(40, 4), torch.randint(3, (40,)))
    members_ = [SingleFit(nn.Linear(4, 3), on_epoch=full), SingleFit(nn.Linear(4, 3))]
    found = fit_together(members_, data, epochs=2, batch_size=10)
    assert isinstance(found[0], RunError)
    assert len(found[1]) == 2


def test_binary_targets_are_judged_by_the_side_they_are_on() -> None:
    x = torch.linspace(-1, 1, 40)[:, None]
    y = (x > 0).float()
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(50.0)
        model.bias.zero_()
    record = fit(model, (x, y), epochs=1, batch_size=40, lr=1e-6, loss="binary_cross_entropy")[0]
    assert record.train_error == 0


def test_a_layer_called_output_has_its_own_row(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.output = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.output(x).tanh()

    for i in range(2):
        torch.save(Net().state_dict(), tmp_path / f"{i}.pt")
    data = (torch.randn(40, 3), torch.randint(2, (40,)))
    source = pn.open_files(Net, [tmp_path / "0.pt", tmp_path / "1.pt"], data)
    ds = pn.functional_distance(source, split="train", progress=False)
    assert ds.layer.values.tolist() == ["output", "network output"]


def test_a_value_twice_in_a_sweep_is_refused() -> None:
    from trainers import Config
    from trainers.runs.sweep import parse_sweep

    with pytest.raises(TrainingError, match="twice"):
        parse_sweep(["lam=0.1,0.10"], Config())


def test_a_line_between_runs_on_different_data_is_refused(tiny_config, tiny_run: Run, tmp_path: Path) -> None:
    from dataclasses import replace

    from pnanalysis.errors import DataError
    from trainers import train

    config = replace(tiny_config, iterations=1, epochs=1, split_seed=5)
    other = train(config, tmp_path / "other", device="cpu", progress=False)
    with pytest.raises(DataError, match="--split-seed"):
        pn.landscape(tiny_run, other, n=50, progress=False)


@pytest.mark.parametrize(
    ("inputs", "targets"), [(torch.randn(20, 5), torch.zeros(20).long()), (torch.randn(20, 3), torch.full((20,), 9))]
)
def test_data_that_do_not_fit_are_one_sentence(inputs, targets, tmp_path: Path) -> None:
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "w.pt")
    source = pn.open_files(lambda: nn.Linear(3, 2), [tmp_path / "w.pt"], (inputs, targets))
    with pytest.raises(pn.PnError, match="cannot take these data"):
        pn.hessian(source, n_hvp=8, progress=False)
