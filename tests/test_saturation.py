"""Saturation: percentiles against numpy on stored activations, whatever way a network calls its activations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from pnanalysis.activations import watch_activations
from pnanalysis.errors import ModelError
from pnanalysis.quantiles import RELATIVE_ERROR, QuantileSketch
from pnanalysis.runs import Run
from pnanalysis.saturation import PERCENTILES, saturation
from pnanalysis.sources import as_source, open_files


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


class Functional(nn.Module):
    """Calls its activations as functions, as methods, and one module twice."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.gate = nn.Sigmoid()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.fc(x))
        x = self.block(torch.tanh(x)).tanh()
        return self.gate(self.gate(F.gelu(x)))


def test_functional_method_and_repeated_calls_are_all_seen() -> None:
    seen: list[tuple[str, str]] = []
    model = Functional()
    with watch_activations(model, lambda layer, activation, output: seen.append((layer, activation.name))):
        model(torch.randn(3, 4))
    expected = [
        ("relu", "relu"), ("tanh", "tanh"), ("block.1", "relu"), ("tanh#2", "tanh"), ("gelu", "gelu"),
        ("gate", "sigmoid"), ("gate#2", "sigmoid"),
    ]  # fmt: skip
    assert seen == expected
    seen.clear()
    model(torch.randn(3, 4))
    assert not seen  # hooks are gone


@pytest.mark.parametrize(
    "module",
    [nn.Tanh(), nn.Sigmoid(), nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.LeakyReLU(), nn.PReLU(), nn.ELU(),
     nn.SELU(), nn.CELU(), nn.GELU(), nn.SiLU(), nn.Mish(), nn.Hardtanh(), nn.Hardsigmoid(), nn.Hardswish(),
     nn.Softplus(), nn.Softsign(), nn.LogSigmoid()],
    ids=lambda module: type(module).__name__,
)  # fmt: skip
def test_every_activation_module_is_seen_once_within_its_asymptotes(module: nn.Module) -> None:
    seen = []
    model = nn.Sequential(nn.Linear(3, 50), module)
    with watch_activations(model, lambda *call: seen.append(call)), torch.no_grad():
        output = model(10 * torch.randn(40, 3))
    ((layer, activation, values),) = seen
    assert layer == "1"
    assert torch.equal(values, output)
    if activation.name not in ("silu", "mish", "gelu", "hardswish"):  # these dip below their asymptote
        assert values.min() >= activation.low
        assert values.max() <= activation.high


def test_a_network_without_activations_says_so(tiny_run: Run) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    model.input_shape = (1, 8, 8)
    torch.save(model.state_dict(), tiny_run.path.parent / "linear.pt")
    with pytest.raises(ModelError, match="no activation functions"):
        saturation(open_files(model, [tiny_run.path.parent / "linear.pt"], "digits"), progress=False)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000), scale=st.sampled_from([1e-3, 1.0, 1e4]), parts=st.integers(1, 5), relu=st.booleans()
)
def test_the_sketch_stays_within_its_bound_of_an_order_statistic(
    seed: int, scale: float, parts: int, relu: bool
) -> None:
    values = scale * torch.randn(2001, generator=torch.Generator().manual_seed(seed))
    values = values.relu() if relu else values
    sketch = QuantileSketch(exact_limit=100)
    for part in values.chunk(parts):
        sketch.add(part)
    assert not sketch.exact
    levels = np.array([0.0, 0.02, 0.25, 0.5, 0.75, 0.98, 1.0])
    for absolute in (False, True):
        ordered = np.sort(np.abs(values.numpy()) if absolute else values.numpy()).astype(np.float64)
        reference = ordered[np.round(levels * 2000).astype(int)]  # 2001 values: the levels fall on order statistics
        np.testing.assert_allclose(sketch.quantiles(levels, absolute), reference, rtol=RELATIVE_ERROR, atol=1e-38)


def test_the_sketchs_histogram_counts_all_but_values_near_an_edge() -> None:
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    sketch, exact = QuantileSketch(0), QuantileSketch()
    sketch.add(values)
    exact.add(values)
    edges = np.linspace(-4, 4, 21)
    difference = np.abs(sketch.histogram(edges) - exact.histogram(edges)) * np.diff(edges)
    # values within half a bucket (2^-10 relative) of an edge, of density at most 0.4, may be counted next door
    assert difference.max() < 2 * 4 * 2.0**-9 * 0.4
