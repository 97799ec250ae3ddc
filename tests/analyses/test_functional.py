"""Distances between functions: kernels against the defining sum, streams against whole batches, numpy by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import pnanalysis as pn
from pnanalysis.analyses.functional import functional_distance
from pnanalysis.errors import DataError, ModelError, RunError
from pnanalysis.evaluation.cka import OUTPUT
from pnanalysis.evaluation.disagreement import js_divergence
from pnanalysis.evaluation.losses import example_losses, log_probabilities
from pnanalysis.inputs.models import LOSSES
from pnanalysis.inputs.networks import open_files
from pnanalysis.inputs.sources import Source, as_source
from pnanalysis.io.runs import Run

CROSS_ENTROPY = LOSSES["cross_entropy"]


def features(n: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def net(seed: int, hidden: int = 12, outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(5, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
    )


def permuted(model: nn.Sequential, seed: int = 0) -> nn.Sequential:
    """The same function with its hidden units in another order."""
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    other = net(99)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other[0].weight.copy_(model[0].weight[order])
        other[0].bias.copy_(model[0].bias[order])
        other[2].weight.copy_(model[2].weight[:, order])
    return other


def saved(folder: Path, **models: nn.Module) -> list[Path]:
    for name, model in models.items():
        torch.save(model.state_dict(), folder / f"{name}.pt")
    return [folder / f"{name}.pt" for name in models]


def labelled(n: int = 203, outputs: int = 3) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    x = features(2 * n, 5, 7).float()
    y = torch.randint(outputs, (2 * n,), generator=torch.Generator().manual_seed(8))
    return {"train": (x[:n], y[:n]), "test": (x[n:], y[n:])}


@pytest.fixture
def three(tmp_path: Path) -> Source:
    """A network, its permuted self, and another."""
    model = net(0)
    files = saved(tmp_path, a=model, permuted=permuted(model), other=net(1))
    return open_files(lambda: net(5), files, labelled())


def test_a_permuted_network_is_far_in_parameters_and_the_same_function(three: Source) -> None:
    ds = functional_distance(three, progress=False)
    pair = ds.sel(checkpoint="permuted", other="a")
    assert float(pair.disagreement) == 0
    assert float(pair.js_divergence) < 1e-10  # float32 outputs: squares of 1e-7
    np.testing.assert_allclose(pair.cka, 1, atol=1e-5)
    assert ds.layer.values.tolist() == ["0", "2", "4", OUTPUT]
    stranger = ds.sel(checkpoint="other", other="a")
    assert float(stranger.disagreement) > 0.1
    assert (stranger.cka < 0.99).all()
    assert (stranger.cka_se > 0).all()
    whole = pn.compare(three, hessian=False, progress=False)
    assert float(whole.distance.sel(checkpoint="permuted", other="a")) > 1
    np.testing.assert_allclose(whole.disagreement, ds.disagreement)
    assert any("the same function on all 203 test examples" in line for line in pn.verdict(whole))


def test_disagreement_and_divergence_by_hand(three: Source) -> None:
    ds = functional_distance(three, checkpoints=["a", "other"], progress=False)
    x, y = three.data.test.take(slice(None))
    with torch.no_grad():
        p, q = (torch.softmax(three.model(c)(x).double(), 1).numpy() for c in three.select(["a", "other"]).values())
    differ = (p.argmax(1) != q.argmax(1)).astype(float)
    pair = ds.isel(checkpoint=1, other=0)
    assert float(pair.disagreement) == pytest.approx(differ.mean())
    d = differ.mean()
    assert float(pair.disagreement_se) == pytest.approx(np.sqrt(d * (1 - d) / (len(y) - 1)))  # binomial
    m = (p + q) / 2
    js = ((p * np.log(p / m)).sum(1) + (q * np.log(q / m)).sum(1)) / 2
    assert float(pair.js_divergence) == pytest.approx(js.mean(), rel=1e-5)
    assert float(pair.js_divergence_se) == pytest.approx(js.std(ddof=1) / np.sqrt(len(js)), rel=1e-5)
    a, b = ((table.argmax(1) == y.numpy()).mean() for table in (p, q))
    expected = 1 - a * b - (1 - a) * (1 - b) / 2
    assert float(pair.expected_disagreement) == pytest.approx(expected)
    np.testing.assert_allclose(np.diagonal(ds.disagreement), 0)


def test_batches_do_not_matter_to_predictions(three: Source) -> None:
    big, small = (functional_distance(three, batch_size=b, progress=False) for b in (256, 8))
    for name in ("disagreement", "js_divergence"):
        np.testing.assert_allclose(big[name], small[name], rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(big.cka, small.cka, atol=0.2)


def test_regression_compares_outputs(tmp_path: Path) -> None:
    x = features(60, 5, 0).float()
    files = saved(tmp_path, a=net(0, outputs=2), b=net(1, outputs=2))
    source = open_files(lambda: net(3, outputs=2), files, (x, torch.zeros(60, 2)), "mse")
    ds = functional_distance(source, progress=False)
    with torch.no_grad():
        a, b = (source.model(c)(x).double().numpy() for c in source.checkpoints)
    square = ((a - b) ** 2).mean(1)
    pair = ds.isel(checkpoint=1, other=0)
    rms = np.sqrt(square.mean())
    assert float(pair.rms_difference) == pytest.approx(rms, rel=1e-6)
    assert float(pair.rms_difference_se) == pytest.approx(square.std(ddof=1) / np.sqrt(60) / (2 * rms), rel=1e-6)
    assert "disagreement" not in ds


def test_binary_outputs_are_choices_between_two_classes() -> None:
    z = torch.tensor([[-1.0], [2.0]])
    said = log_probabilities(z, torch.tensor([[0.0], [1.0]]), LOSSES["binary_cross_entropy"])
    np.testing.assert_allclose(said.exp()[:, 1], torch.sigmoid(z.double()), rtol=1e-6)
    assert said.argmax(1).tolist() == [[0], [1]]
    assert log_probabilities(z, z, LOSSES["mse"]) is None


@pytest.mark.parametrize("shape", [(4,), (4, 2, 3)], ids=["classes", "positions"])
def test_losses_of_examples_average_to_the_loss(shape: tuple[int, ...]) -> None:
    outputs = features(20, int(np.prod(shape)), 0).reshape(20, *shape)
    targets = torch.randint(4, (20, *shape[1:]), generator=torch.Generator().manual_seed(1))

    def branching(o: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return CROSS_ENTROPY(o, t) if float(o.sum()) > -1e9 else o.sum()

    for loss in (CROSS_ENTROPY, nn.CrossEntropyLoss(), branching):
        each, weight = example_losses(loss, outputs, targets)
        assert each.shape == (20,)
        assert (weight == 1).all()
        assert float(each.mean()) == pytest.approx(float(CROSS_ENTROPY(outputs, targets)), rel=1e-10)
        assert float(each[3]) == pytest.approx(float(CROSS_ENTROPY(outputs[3:4], targets[3:4])), rel=1e-10)


def test_a_shuffled_loader_shows_all_networks_the_same_examples(three: Source) -> None:
    data = torch.utils.data.TensorDataset(*labelled()["test"])
    loader = torch.utils.data.DataLoader(data, batch_size=32, shuffle=True)
    files = [c.path for c in three.checkpoints]
    a = open_files(lambda: net(5), files[:1], {"train": loader}, label="a")
    b = open_files(lambda: net(5), files[1:2], {"train": loader}, label="b")
    ds = functional_distance(a, b, progress=False)
    assert ds.checkpoint.values.tolist() == ["a/a", "b/permuted"]
    assert float(ds.disagreement[0, 1]) == 0


def test_bad_input_is_one_clear_sentence(three: Source, tiny_run: Run, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="at least two checkpoints, there is only a"):
        functional_distance(three, checkpoints=["a"], progress=False)
    with pytest.raises(RunError, match="none is given"):
        functional_distance(progress=False)
    wide = open_files(lambda: net(3, outputs=4), saved(tmp_path, wide=net(3, outputs=4)), labelled())
    with pytest.raises(ModelError, match="model#1/a has 3 outputs, model#2/wide has 4"):
        functional_distance(three, wide, progress=False)
    with pytest.raises(DataError, match="different data sets"):
        functional_distance(three, as_source(tiny_run), progress=False)


def test_positions_that_the_loss_ignores_do_not_count() -> None:
    torch.manual_seed(0)
    x, counted = torch.randn(30, 4, 6), torch.rand(30, 6) < 0.6
    counted[:5] = False
    targets = torch.randint(3, (30, 6)).masked_fill(~counted, 9)
    networks = [nn.Conv1d(4, 3, 1) for _ in range(2)]
    loss = nn.CrossEntropyLoss(ignore_index=9)
    ds = functional_distance(networks, data=(x, targets), loss=loss, cka=False, progress=False)
    with torch.no_grad():
        logs = [log_probabilities(network(x), targets, loss) for network in networks]
    assert logs[0] is not None
    assert logs[1] is not None
    differ = (logs[0].argmax(1) != logs[1].argmax(1))[counted].double()
    assert float(ds.disagreement[0, 1]) == pytest.approx(float(differ.mean()), rel=1e-9)
    divergence = js_divergence(*logs)[counted]
    assert float(ds.js_divergence[0, 1]) == pytest.approx(float(divergence.mean()), rel=1e-5)
    # examples of which nothing counts are no evidence
    alone = functional_distance(networks, data=(x[5:], targets[5:]), loss=loss, cka=False, progress=False)
    for name in ("disagreement", "disagreement_se", "disagreement_low", "js_divergence", "js_divergence_se"):
        np.testing.assert_allclose(ds[name], alone[name], rtol=1e-9)
