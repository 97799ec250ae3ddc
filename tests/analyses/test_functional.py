"""Distances between functions: kernels against the defining sum, streams against whole batches, numpy by hand."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import pnanalysis as pn
from pnanalysis.analyses.functional import functional_distance
from pnanalysis.errors import DataError, ModelError, RunError
from pnanalysis.evaluation.cka import OUTPUT, CentredKernelAlignment, linear_kernel, u_centred, unbiased_hsic
from pnanalysis.evaluation.disagreement import expected_disagreement, js_divergence
from pnanalysis.evaluation.losses import example_losses, log_probabilities
from pnanalysis.inputs.models import LOSSES
from pnanalysis.inputs.networks import open_files
from pnanalysis.inputs.sources import Source, as_source
from pnanalysis.io.runs import Run

CROSS_ENTROPY = LOSSES["cross_entropy"]


def features(n: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_hsic(k: np.ndarray, m: np.ndarray) -> float:
    """The U-statistic itself: over all quadruples of different examples (Song et al. 2012, eq. 4)."""
    total, count = 0.0, 0
    for i, j, q, r in permutations(range(len(k)), 4):
        total += k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q])
        count += 1
    return total / count


def hsic(k: torch.Tensor, m: torch.Tensor) -> float:
    return float(unbiased_hsic(torch.stack([k, m]))[0, 1])


def direct_cka(batches: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Ratio of the means over batches, weighted by their sizes, by the closed form of Song et al."""

    def hsic(k: np.ndarray, m: np.ndarray) -> float:
        n = len(k)
        k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
        ones = np.ones(n)
        middle = (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
        return float((np.trace(k @ m) + middle - 2 / (n - 2) * (ones @ k @ m @ ones)) / (n * (n - 3)))

    grams = [(x @ x.T, y @ y.T, len(x)) for x, y in batches]
    across = sum(n * hsic(k, m) for k, m, n in grams)
    return across / np.sqrt(sum(n * hsic(k, k) for k, _, n in grams) * sum(n * hsic(m, m) for _, m, n in grams))


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


def test_unbiased_hsic_is_the_u_statistic() -> None:
    x, y = features(7, 3, 0), features(7, 4, 1) + features(7, 3, 0)[:, :1]
    k, m = (u_centred(z @ z.T) for z in (x, y))
    assert hsic(k, m) == pytest.approx(naive_hsic((x @ x.T).numpy(), (y @ y.T).numpy()), rel=1e-10)
    centred = u_centred(linear_kernel(x.float()))
    assert hsic(centred, m) == pytest.approx(hsic(k, m), rel=1e-5)  # features in float32
    np.testing.assert_allclose(k.sum(0), 0, atol=1e-12)


def test_unbiased_hsic_of_independent_features_averages_to_zero() -> None:
    values = [
        hsic(*(u_centred(z @ z.T) for z in (features(8, 3, 2 * s), features(8, 3, 2 * s + 1)))) for s in range(400)
    ]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(len(values))
    assert np.std(values) > 0


def streamed(x: torch.Tensor, y: torch.Tensor, sizes: list[int]) -> tuple[float, float]:
    """CKA of two linear layers' outputs, given as tables of features."""
    a, b = nn.Identity(), nn.Identity()
    alignment = CentredKernelAlignment([a, b])
    with alignment:
        for p, q in zip(x.split(sizes), y.split(sizes), strict=True):
            a(p.float()), b(q.float())
            alignment.collect(len(p))
    cka, se = alignment.result()
    assert alignment.layers == [OUTPUT]
    return float(cka[0, 1, 0]), float(se[0, 1, 0])


def test_streamed_cka_is_the_average_over_batches() -> None:
    x = features(97, 6, 0)
    y = torch.cat([x[:, :3] * 2 + 1, features(97, 4, 1)], dim=1)
    sizes = [30, 30, 30, 7]
    cka, se = streamed(x, y, sizes)
    parts = [(p.numpy(), q.numpy()) for p, q in zip(x.split(sizes), y.split(sizes), strict=True)]
    assert cka == pytest.approx(direct_cka(parts), rel=1e-5)
    left_out = np.array([direct_cka(parts[:i] + parts[i + 1 :]) for i in range(4)])
    assert se == pytest.approx(np.sqrt(3 / 4 * ((left_out - left_out.mean()) ** 2).sum()), rel=1e-4)
    assert streamed(x[:94], y[:94], [30, 30, 30, 4])[0] != cka
    assert (
        streamed(x[:93], y[:93], [30, 30, 30, 3])[0] == streamed(x[:90], y[:90], [30, 30, 30])[0]
    )  # three are too few


def test_cka_does_not_see_rotation_scale_or_shift() -> None:
    x, y = features(80, 6, 0), features(80, 5, 1) + features(80, 6, 0)[:, :5]
    q, _ = torch.linalg.qr(features(6, 6, 2))
    reference, _ = streamed(x, y, [40, 40])
    assert 0.1 < reference < 0.9
    assert streamed(3 * x @ q + 5, y, [40, 40])[0] == pytest.approx(reference, rel=2e-5)
    assert streamed(x, 0.1 * x @ q - 2, [40, 40])[0] == pytest.approx(1, rel=1e-5)
    stretched = x * torch.tensor([9.0, 1, 1, 1, 1, 1])
    assert streamed(x, stretched, [40, 40])[0] < 0.9  # only isotropic scaling


def test_the_jackknife_error_is_the_spread_over_data() -> None:
    """Over independent data sets CKA spreads by what each says of its own error."""
    values, errors = [], []
    mix = features(6, 6, 1000)
    for s in range(60):
        x = features(160, 6, s)
        value, se = streamed(x, x @ mix + features(160, 6, 5000 + s), [20] * 8)
        values.append(value)
        errors.append(se)
    # the spread of 60 values is itself known to 1 / sqrt(118) = 9 %; three of these, and a tenth for the jackknife
    assert np.std(values, ddof=1) == pytest.approx(np.sqrt(np.mean(np.square(errors))), rel=0.37)


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


def test_independent_networks_disagree_as_the_yardstick_says() -> None:
    rng = np.random.default_rng(0)
    n, classes, accuracy = 40_000, 5, np.array([0.7, 0.4])
    truth = rng.integers(classes, size=n)
    said = [np.where(rng.random(n) < a, truth, (truth + rng.integers(1, classes, size=n)) % classes) for a in accuracy]
    expected = expected_disagreement(accuracy, classes)[0, 1]
    se = np.sqrt(expected * (1 - expected) / n)
    assert abs((said[0] != said[1]).mean() - expected) < 4 * se


def test_divergence_is_bounded_and_knows_zero() -> None:
    sure = torch.log(torch.tensor([[1.0, 0.0], [0.5, 0.5]], dtype=torch.float64))
    other = torch.log(torch.tensor([[0.0, 1.0], [0.5, 0.5]], dtype=torch.float64))
    np.testing.assert_allclose(js_divergence(sure, other), [np.log(2), 0.0])


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
