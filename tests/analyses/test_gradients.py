"""The persistent gradient against the penalty itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import pnanalysis as pn
from pnanalysis.errors import RunError
from pnanalysis.inputs.models import parameter_layers
from pnanalysis.inputs.sources import as_source
from pnanalysis.io.runs import Run
from trainers import Config, PersistentPenalty, train

QUIET = {"device": "cpu", "progress": False}


@pytest.fixture(scope="module")
def flipping(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """All layers repelled so strongly that signs flip."""
    config = Config(
        recipe="flip", model="tanh7", model_options={"input_shape": [1, 8, 8], "width": 12}, data="digits",
        strategy="persistent", layers="all", iterations=3, epochs=8, checkpoint_every=1, lam=0.5, lr=0.01,
        batch_size=64,
    )  # fmt: skip
    return train(config, tmp_path_factory.mktemp("runs") / "flip", **QUIET)


def test_push_and_fluctuation_add_up_to_the_penalty_gradient(flipping: Run) -> None:
    ds = pn.gradient_split(flipping, n=200, progress=False)
    source = as_source(flipping)
    model = source.model(flipping.ends[0])
    penalty = PersistentPenalty(model, lam=0.5)
    for end in flipping.ends[:2]:
        penalty.add(end.load())
    pushes: dict[str, list[torch.Tensor]] = {}
    for point in flipping.trajectory(2)[1:]:
        here = source.model(point)
        products = penalty.inner_products(here)
        for layer, names in penalty.layers.items():
            values = ds.inner_product.sel(iteration=2, layer=layer, epoch=point.epoch).values
            np.testing.assert_allclose(values, products[layer].detach().numpy(), rtol=2e-4, atol=1e-5)  # float32
            own = [here.get_parameter(name) for name in names]
            slope = torch.autograd.grad(penalty(here), own)
            pushes.setdefault(layer, []).append(torch.cat([s.flatten() for s in slope]).double())
    for layer, rows in pushes.items():
        path = torch.stack(rows)
        at = ds.sel(iteration=2, layer=layer)
        assert float(at.constant_norm) == pytest.approx(float(path.mean(0).norm()), rel=1e-4)
        moving = (path - path.mean(0)).norm(dim=1).numpy()
        np.testing.assert_allclose(at.fluctuation_norm, moving, rtol=1e-3, atol=1e-5)
        flips = np.flatnonzero((np.diff(at.sign.values, axis=0) != 0).any(axis=1))
        assert float(at.last_flip.max()) == (flips[-1] + 2 if len(flips) else 1)  # epochs are counted from 1
    assert float(ds.fluctuation_norm.max()) > 0  # some sign did flip


def test_the_loss_gradient_is_that_of_the_loss(flipping: Run) -> None:
    ds = pn.gradient_split(flipping, iterations=[1], n=None, progress=False)
    source = as_source(flipping)
    model = source.model(flipping.ends[1])
    inputs, targets = source.data.train.take(slice(None))
    loss = source.loss(model(inputs), targets)
    for layer, own in parameter_layers(model):
        slope = torch.autograd.grad(loss, [parameter for _, parameter in own], retain_graph=True)
        expected = float(torch.cat([s.flatten() for s in slope]).norm())
        assert float(ds.loss_gradient_norm.sel(iteration=1, layer=layer)[-1]) == pytest.approx(expected, rel=1e-4)


def test_only_repelled_layers_have_a_push(tiny_run: Run) -> None:
    ds = pn.gradient_split(tiny_run, n=100, progress=False)
    assert ds.layer.values.tolist() == tiny_run.manifest["layers"][1]
    pn.plots.plot(ds)


def test_bad_input_is_told(tiny_run: Run, tmp_path: Path, tiny_config: Config) -> None:
    with pytest.raises(RunError, match="there are 1 to 2"):
        pn.gradient_split(tiny_run, iterations=[7], progress=False)
    with pytest.raises(RunError, match="window begins at epoch 99"):
        pn.gradient_split(tiny_run, window=99, n=50, progress=False)


@pytest.mark.parametrize("form", ["squared", "cosine"])
def test_runs_with_other_penalties_train_and_say_why_they_cannot_be_split(form: str, tmp_path: Path) -> None:
    config = Config(
        recipe="form", model="tanh7", model_options={"input_shape": [1, 8, 8], "width": 8}, data="digits",
        strategy="persistent", layers="all", iterations=2, epochs=1, penalty=form, origin="start",
    )  # fmt: skip
    run = train(config, tmp_path / form, **QUIET)
    assert float(run.history.penalty[1, -1]) > 0
    with pytest.raises(RunError, match=form):
        pn.gradient_split(run, progress=False)
