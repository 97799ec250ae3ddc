"""Losses and mistakes example by example: against the loss of all data at once, and errors of ratios by hand."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pnanalysis as pn
from pnanalysis.errors import DataError, ModelError, PnError
from pnanalysis.evaluation.losses import (
    check_mean,
    check_targets,
    example_errors,
    example_losses,
    linearised,
    squared_errors,
)
from pnanalysis.inputs.networks import open_files
from pnanalysis.inputs.sources import Source

VOID = 255


class Pixels(nn.Sequential):
    """A segmentation network: (N, 3, 6, 6) to (N, 4, 6, 6)."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 5, 3, padding=1), nn.Tanh(), nn.Conv2d(5, 4, 1))


def saved(folder: Path, make, n: int = 2) -> list[Path]:
    for seed in range(n):
        torch.manual_seed(seed)
        torch.save(make().state_dict(), folder / f"w{seed}.pt")
    return [folder / f"w{seed}.pt" for seed in range(n)]


def masks(n: int = 40, void: bool = True) -> tuple[Tensor, Tensor]:
    """Images, and a class for each pixel; each image has another share of pixels without, one has no class at all."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(n, 3, 6, 6, generator=generator)
    targets = torch.randint(4, (n, 6, 6), generator=generator)
    if void:
        targets[torch.rand(n, 6, 6, generator=generator) < torch.linspace(0, 0.9, n)[:, None, None]] = VOID
        targets[7] = VOID
    return inputs, targets


def segmentation(folder: Path, loss, void: bool = True) -> Source:
    return open_files(Pixels, saved(folder, Pixels), masks(void=void), loss)


def whole(source: Source, loss) -> list[float]:
    """The loss over all the data as one batch, of each network."""
    inputs, targets = source.data.train.take(slice(None))
    with torch.no_grad():
        return [float(loss(source.model(c)(inputs), targets)) for c in source.checkpoints]


CLASS_WEIGHTS = torch.tensor([0.5, 1.0, 4.0, 2.0])
WEIGHTED = {
    "ignored": nn.CrossEntropyLoss(ignore_index=VOID),
    "class weights": nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, ignore_index=VOID),
    "smoothed": nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, ignore_index=VOID, label_smoothing=0.2),
    "partial": partial(F.cross_entropy, ignore_index=VOID),
}


@pytest.mark.parametrize("loss", WEIGHTED.values(), ids=WEIGHTED.keys())
def test_weighted_means_are_those_of_all_data_at_once(tmp_path: Path, loss) -> None:
    source = segmentation(tmp_path, loss)
    expected = whole(source, loss)
    ds = pn.compare(source, split="train", hessian=False, saturation=False, batch_size=8, progress=False)
    np.testing.assert_allclose(ds.loss.sel(split="train"), expected, rtol=1e-5)
    line = pn.landscape(source, n_points=2, batch_size=7, progress=False)
    np.testing.assert_allclose(line.loss.values.ravel(), expected, rtol=1e-5)
    np.testing.assert_allclose(line.loss_se.values.ravel(), ds.loss_se.sel(split="train"), rtol=1e-4)
    there = pn.sharpness(
        source,
        radii={"ball": 0.1},
        n_steps=3,
        measures=("worst", "average"),
        second_order=False,
        batch_size=7,
        progress=False,
    )
    np.testing.assert_allclose(there.loss, expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["class weights", "partial"])
def test_what_a_loss_holds_follows_the_precision(tmp_path: Path, name: str) -> None:
    loss = WEIGHTED[name] if name == "class weights" else partial(F.cross_entropy, weight=CLASS_WEIGHTS)
    source = segmentation(tmp_path, loss, void=name == "class weights")
    expected = whole(source, loss)
    line = pn.landscape(source, n_points=2, dtype="float64", progress=False)
    np.testing.assert_allclose(line.loss.values.ravel(), expected, rtol=1e-5)
    spectra = [pn.hessian(source, n_hvp=12, dtype=dtype, progress=False) for dtype in ("float32", "float64")]
    np.testing.assert_allclose(*(ds.trace for ds in spectra), rtol=1e-3)


def test_mistakes_are_counted_where_there_is_a_class(tmp_path: Path) -> None:
    source = segmentation(tmp_path, nn.CrossEntropyLoss(ignore_index=VOID))
    ds = pn.compare(source, split="train", hessian=False, saturation=False, batch_size=8, progress=False)
    inputs, targets = masks()
    valid = targets != VOID
    with torch.no_grad():
        wrong = [(source.model(c)(inputs).argmax(1) != targets)[valid].double().mean() for c in source.checkpoints]
    np.testing.assert_allclose(ds.error.sel(split="train"), wrong, rtol=1e-12)
    line = pn.landscape(source, n_points=2, progress=False)
    np.testing.assert_allclose(line.error.values.ravel(), wrong, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
@pytest.mark.parametrize("loss", [F.cross_entropy, *WEIGHTED.values()])
def test_classes_are_the_same_in_every_type_of_integer(loss, dtype: torch.dtype) -> None:
    """Four images of one pixel: as indices, as many uint8 classes as there are weights would be a mask."""
    torch.manual_seed(0)
    outputs, targets = torch.randn(4, 4, 1), torch.tensor([[1], [3], [0], [3]])
    if loss is not F.cross_entropy:
        targets[1] = VOID
    for one, other in zip(
        example_losses(loss, outputs, targets), example_losses(loss, outputs, targets.to(dtype)), strict=True
    ):
        assert torch.equal(one, other)
    network = nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (4, 1)))
    inputs, vector = torch.randn(4, 3), torch.randn(16)
    for make in (pn.HessianOperator, pn.GGNOperator, pn.EmpiricalFisherOperator):
        found = [make(network, loss, [(inputs, given)]).matvec(vector) for given in (targets, targets.to(dtype))]
        torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7)


def test_the_error_of_a_weighted_mean_is_its_spread_over_data() -> None:
    """Over independent samples the ratio spreads by what the linearised numbers say."""
    rng = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(400):
        weight = rng.integers(0, 30, size=60).astype(float)
        value = rng.normal(1 + weight / 30, 1 / np.sqrt(1 + weight))
        standing = linearised(value, weight)
        assert standing.mean() == pytest.approx((value * weight).sum() / weight.sum(), rel=1e-12)
        means.append(standing.mean())
        errors.append(standing.std(ddof=1) / np.sqrt(60))
    # the spread of 400 values is known to 1 / sqrt(798) = 3.5 %; three of these, and 3 % for the linearisation (1 / 60)
    assert np.std(means, ddof=1) == pytest.approx(np.mean(errors), rel=0.14)


def test_differences_of_weighted_means_are_paired(tmp_path: Path) -> None:
    loss = nn.CrossEntropyLoss(ignore_index=VOID)
    source = segmentation(tmp_path, loss)
    ds = pn.compare(source, split="train", hessian=False, saturation=False, progress=False).sel(split="train")
    inputs, targets = masks()
    valid = (targets != VOID).double()
    w = valid.sum((1, 2)).numpy()
    n = (w > 0).sum()
    with torch.no_grad():
        each = [
            (F.cross_entropy(source.model(c)(inputs), targets, ignore_index=VOID, reduction="none") * valid).sum((1, 2))
            for c in source.checkpoints
        ]
    a, b = (values.numpy() / np.maximum(w, 1) for values in each)
    difference = ((b - a) * w).sum() / w.sum()
    residual = w / w.mean() * ((b - a) - difference)
    assert float(ds.loss_difference[1, 0]) == pytest.approx(difference, rel=1e-4)
    assert float(ds.loss_difference_se[1, 0]) == pytest.approx(
        np.sqrt((residual**2).sum() / len(w) ** 2 * n / (n - 1)), rel=1e-4
    )


def test_examples_that_do_not_count_are_no_evidence() -> None:
    rng = np.random.default_rng(0)
    values, weights = rng.standard_normal(9), np.array([1.0, 3.0, 0.5, 1.0, 0, 0, 0, 0, 0])
    found = linearised(values, weights)
    alone = linearised(values[:4], weights[:4])
    assert found.mean() == pytest.approx(alone.mean())
    assert found.std(ddof=1) / 3 == pytest.approx(alone.std(ddof=1) / 2)
    assert alone.mean() == pytest.approx(np.average(values, weights=weights))


def test_smoothing_of_a_class_without_weight_gives_no_losses_of_examples() -> None:
    outputs, targets = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, -100])
    loss = nn.CrossEntropyLoss(weight=torch.tensor([0.0, 1.0, 2.0]), label_smoothing=0.2)
    with pytest.raises(ModelError, match="class 0 has no weight .* label smoothing"):
        example_losses(loss, outputs, targets)
    with pytest.raises(PnError, match="class 0 has no weight"):
        pn.EmpiricalFisherOperator(nn.Linear(4, 3), loss, [(torch.randn(6, 4), targets)])
    counted = targets > 0
    each, weight = example_losses(loss, outputs[counted], targets[counted])
    assert float((each * weight).sum() / weight.sum()) == pytest.approx(float(loss(outputs[counted], targets[counted])))


def soft(n: int = 30) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(n, 5, generator=generator), torch.rand(n, 3, generator=generator).softmax(1)


def test_real_targets_of_ones_own_loss_are_numbers_whatever_the_batch_holds() -> None:
    outputs, targets = torch.randn(8, 3), torch.eye(3)[torch.arange(8) % 3]
    targets[5] = 1.0  # two labels and more: no probabilities
    for part in (slice(None), slice(0, 4)):
        assert example_errors(lambda o, t: (o - t).square().mean(), outputs[part], targets[part]) is None


def test_a_loss_near_zero_may_still_be_a_mean() -> None:
    each = torch.tensor([100.0, -100.0, 1e-6, 0.0])
    check_mean(lambda o, t: o.mean(), each.mean() + 1e-5, each, torch.ones(4))
    with pytest.raises(ModelError, match="is not the mean"):
        check_mean(lambda o, t: o.mean(), each.mean() + 1.0, each, torch.ones(4))


@pytest.mark.parametrize(
    "loss",
    ["cross_entropy", nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]))],
    ids=["by name", "class weights"],
)
def test_class_probabilities_are_classes(tmp_path: Path, loss) -> None:
    inputs, targets = soft()
    source = open_files(lambda: nn.Linear(5, 3), saved(tmp_path, lambda: nn.Linear(5, 3)), (inputs, targets), loss)
    ds = pn.compare(source, split="train", hessian=False, batch_size=8, progress=False).sel(split="train")
    with torch.no_grad():
        wrong = [
            float((source.model(c)(inputs).argmax(1) != targets.argmax(1)).double().mean()) for c in source.checkpoints
        ]
    np.testing.assert_allclose(ds.error, wrong, rtol=1e-12)
    np.testing.assert_allclose(ds.loss, whole(source, source.loss), rtol=1e-5)
    assert "disagreement" in ds
    assert ds.attrs["classes"] == 3
    line = pn.landscape(source, n_points=2, progress=False)
    np.testing.assert_allclose(line.error.values.ravel(), wrong, rtol=1e-12)


def test_real_targets_stay_a_regression() -> None:
    outputs, targets = torch.randn(6, 3), torch.randn(6, 3)
    for loss in (F.mse_loss, nn.MSELoss(), lambda o, t: (o - t).abs().mean()):
        assert example_errors(loss, outputs, targets) is None
    counts = torch.randint(9, (6, 3))
    assert example_errors(F.mse_loss, outputs, counts) is None
    np.testing.assert_allclose(
        squared_errors(F.mse_loss, outputs, counts), (outputs - counts).square().mean(1), rtol=1e-6
    )
    assert squared_errors(F.cross_entropy, outputs, counts) is None
    single = torch.randn(6, 1)
    assert example_errors(lambda o, t: o.mean(), single, torch.randint(2, (6,))) is None
    one_hot = F.one_hot(torch.arange(6) % 3, 3).float()
    assert example_errors(F.mse_loss, outputs, one_hot) is None
    shares, counts = example_errors(F.binary_cross_entropy_with_logits, outputs, (targets > 0).float())
    assert (counts == 1).all()
    np.testing.assert_allclose(shares, ((outputs > 0) != (targets > 0)).double().mean(1))


def test_classes_along_the_last_dim_are_compared_but_not_judged(tmp_path: Path) -> None:
    """A language model's logits (batch, length, vocabulary), under a loss that shifts its targets."""

    def next_token(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())

    def make() -> nn.Module:
        return nn.Sequential(nn.Embedding(11, 4), nn.Tanh(), nn.Linear(4, 11))

    tokens = torch.randint(11, (20, 6), generator=torch.Generator().manual_seed(0))
    source = open_files(make, saved(tmp_path, make), (tokens, tokens), next_token)
    ds = pn.compare(source, split="train", hessian=False, batch_size=8, progress=False)
    np.testing.assert_allclose(ds.loss.values.ravel(), whole(source, next_token), rtol=1e-5)
    with torch.no_grad():
        a, b = (source.model(c)(tokens).argmax(-1) for c in source.checkpoints)
    assert float(ds.disagreement[1, 0]) == pytest.approx(float((a != b).double().mean()))
    assert ds.error.isnull().all()
    assert pn.verdict(ds)[0].startswith("w1 compared with w0: train loss")
    assert "error" not in pn.landscape(source, n_points=2, progress=False)


def _summed(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="sum")


def _hidden_weights(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, ignore_index=VOID)


@pytest.mark.parametrize("loss", [_summed, nn.CrossEntropyLoss(reduction="sum")], ids=["own", "torch's"])
def test_a_sum_over_examples_is_refused_by_all_alike(tmp_path: Path, loss) -> None:
    source = segmentation(tmp_path, loss, void=False)
    for analysis in (pn.compare, pn.landscape, pn.functional_distance):
        with pytest.raises(PnError, match="not the mean over its examples"):
            analysis(source, progress=False)


def test_weights_that_nobody_can_see_are_refused_and_the_way_out_is_told(tmp_path: Path) -> None:
    source = segmentation(tmp_path, _hidden_weights)
    for analysis in (pn.compare, pn.landscape):
        with pytest.raises(PnError, match=r"torch\.nn\.CrossEntropyLoss are understood") as raised:
            analysis(source, progress=False)
        assert "\n" not in str(raised.value)


def test_losses_that_look_at_values_or_sizes_are_taken_one_by_one() -> None:
    outputs, targets = torch.randn(9, 4, dtype=torch.float64), torch.randint(4, (9,))

    def looking(o: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(o, t) if float(o.abs().max()) < 1e9 else o.sum()

    each, weight = example_losses(looking, outputs, targets)
    np.testing.assert_allclose(each, F.cross_entropy(outputs, targets, reduction="none"), rtol=1e-12)
    assert (weight == 1).all()


NUMBERS = "give --loss mse for numbers or binary_cross_entropy for two classes"
BROADCAST = r"outputs of shape \(N, 1\) and targets of shape \(N,\) would be broadcast .* give both one shape"
MEANINGLESS = {
    "numbers as classes": ("cross_entropy", torch.linspace(0, 1, 40)[:, None], NUMBERS),
    "one class": ("cross_entropy", torch.zeros(40).long(), NUMBERS),
    "numbers broadcast": ("mse", torch.linspace(0, 1, 40), BROADCAST),
    "classes as numbers": ("mse", torch.zeros(40).long(), BROADCAST),
    "sides broadcast": ("binary_cross_entropy", torch.zeros(40), BROADCAST),
}


@pytest.mark.parametrize(("loss", "targets", "says"), MEANINGLESS.values(), ids=MEANINGLESS.keys())
@pytest.mark.filterwarnings("error::UserWarning")
def test_what_torch_computes_but_nobody_means_is_refused_in_silence(
    tmp_path: Path, loss: str, targets: Tensor, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    files = saved(tmp_path, lambda: nn.Linear(3, 1))
    source = open_files(lambda: nn.Linear(3, 1), files, (torch.randn(40, 3), targets), loss)
    for analysis in (
        lambda: pn.hessian(source, progress=False),
        lambda: pn.compare(source, split="train", hessian=False, saturation=False, progress=False),
        lambda: pn.landscape(source, n_points=3, progress=False),
        lambda: pn.sharpness(source, n_steps=2, measures=("worst", "average"), second_order=False, progress=False),
    ):
        with pytest.raises(DataError, match=says) as raised:
            analysis()
        assert "\n" not in str(raised.value)
    assert not caplog.records


def test_a_trace_is_not_tried_on_targets_that_the_loss_cannot_take(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = saved(tmp_path, lambda: nn.Linear(3, 4))
    source = open_files(lambda: nn.Linear(3, 4), files, (torch.randn(40, 3), torch.zeros(40)))
    with pytest.raises(DataError, match=r"the loss cannot take these data: .* targets of shape \(2,\), float32"):
        pn.hessian(source, n_hvp=100, progress=False)
    assert not caplog.records


def test_targets_that_fit_and_losses_of_ones_own_pass() -> None:
    outputs = torch.randn(5, 3)
    check_targets(F.cross_entropy, outputs, torch.tensor([0, 1, 2, -100, 0]))
    check_targets(F.cross_entropy, outputs, outputs.softmax(1))
    check_targets(F.mse_loss, outputs, outputs)
    check_targets(F.binary_cross_entropy_with_logits, outputs[:, 0], torch.ones(5))
    check_targets(lambda o, t: (o[:, 0] - t).square().mean(), outputs[:, :1], torch.zeros(5))
    with pytest.raises(DataError, match="the target 3 is not a class"):
        check_targets(F.cross_entropy, outputs, torch.tensor([0, 1, 2, 3, 0]))


def test_as_many_positions_as_classes_are_told_apart_by_torchs_losses_alone() -> None:
    torch.manual_seed(0)
    outputs, targets = torch.randn(40, 5, 5), torch.randint(5, (40, 5))

    def of_the_last_dim(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())

    assert example_errors(of_the_last_dim, outputs, targets) is None
    wrong, _ = example_errors(F.cross_entropy, outputs, targets) or (None, None)
    assert wrong is not None
    torch.testing.assert_close(wrong, (outputs.argmax(1) != targets).double().mean(1))
