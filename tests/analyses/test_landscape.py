"""Landscapes: lines, planes and curves against closed forms and hand-made loops."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pnanalysis.alignment.permutation_symmetries import find_groups
from pnanalysis.alignment.weight_matching import Relabelling
from pnanalysis.analyses.comparison import compare
from pnanalysis.analyses.functional import functional_distance
from pnanalysis.analyses.landscape import landscape
from pnanalysis.analyses.trajectory import trajectory
from pnanalysis.errors import PnError
from pnanalysis.evaluation.losses import example_losses
from pnanalysis.inputs.data import as_splits
from pnanalysis.inputs.networks import open_files
from pnanalysis.inputs.sources import Source, as_source
from pnanalysis.io import netcdf
from pnanalysis.io.runs import Run
from tests.alignment.architectures import made
from trainers import Config, train

EPS32 = 2.0**-23


def saved(model: nn.Module, folder: Path, *states: dict[str, Tensor] | int) -> list[Path]:
    """Files of states; an integer stands for a fresh initialisation with that seed."""
    files = []
    for i, state in enumerate(states):
        if isinstance(state, int):
            torch.manual_seed(state)
            for module in model.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
            state = model.state_dict()
        torch.save({name: tensor.clone() for name, tensor in state.items()}, folder / f"w{i}.pt")
        files.append(folder / f"w{i}.pt")
    return files


def linear_source(folder: Path, n_files: int) -> tuple[Source, Tensor, Tensor, list[np.ndarray]]:
    """A linear model with mean squared error: its loss is a quadratic of the parameters."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 4, generator=generator, dtype=torch.float64)
    targets = torch.randn(60, 2, generator=generator, dtype=torch.float64)
    model = nn.Linear(4, 2).double()
    files = saved(model, folder, *range(n_files))
    points = [np.concatenate([t.numpy().ravel() for t in torch.load(f).values()]) for f in files]
    return open_files(model, files, (inputs, targets), "mse"), inputs, targets, points


def squared_errors(theta: np.ndarray, inputs: Tensor, targets: Tensor) -> np.ndarray:
    weight, bias = theta[:8].reshape(2, 4), theta[8:]
    return ((inputs.numpy() @ weight.T + bias - targets.numpy()) ** 2).mean(1)


def test_a_quadratic_on_a_line_is_exact_with_paired_errors(tmp_path: Path) -> None:
    source, inputs, targets, (a, b) = linear_source(tmp_path, 2)
    ds = landscape(source, n_points=5, extrapolate=0.5, dtype="float64", progress=False)
    np.testing.assert_allclose(ds.position, [-0.5, -0.25, 0, 0.25, 0.5, 0.75, 1, 1.25, 1.5])
    losses = np.stack([squared_errors(a + t * (b - a), inputs, targets) for t in ds.position.values])
    one = ds.sel(path="line", split="train")
    np.testing.assert_allclose(one.loss, losses.mean(1), rtol=1e-13)
    np.testing.assert_allclose(one.loss_se, losses.std(1, ddof=1) / np.sqrt(60), rtol=1e-12)
    t = ds.position.values[:, None]
    excess = losses - (1 - t) * losses[2] - t * losses[6]
    np.testing.assert_allclose(one.excess, excess.mean(1), atol=1e-13)
    np.testing.assert_allclose(one.excess_se, excess.std(1, ddof=1) / np.sqrt(60), atol=1e-13)
    assert float(one.barrier) == 0  # a convex function lies below its chord
    assert float(one.barrier_position) in (0, 1)
    assert float(one.barrier_se) == 0
    np.testing.assert_allclose([ds.distance[0], ds.length[0]], np.linalg.norm(b - a), rtol=1e-12)
    assert "error" not in ds


def test_a_tanh_networks_line_is_as_computed_by_hand(tiny_run: Run) -> None:
    ds = landscape(tiny_run, checkpoints=["plain", "iter02"], n_points=3, splits=["validation"], progress=False)
    source = as_source(tiny_run)
    inputs, targets = source.data.validation.take(slice(None))
    ends = [{n: t.double().numpy() for n, t in c.load().items()} for c in (tiny_run.plain, tiny_run.ends[2])]

    def by_hand(share: float) -> tuple[np.ndarray, np.ndarray]:
        theta = {name: (1 - share) * ends[0][name] + share * ends[1][name] for name in ends[0]}
        x = inputs.double().numpy().reshape(len(inputs), -1)
        for i in range(1, 8):
            x = x @ theta[f"fc{i}.weight"].T + theta[f"fc{i}.bias"]
            x = np.tanh(x) if i < 7 else x
        log_p = x - np.log(np.exp(x).sum(1, keepdims=True))
        return -log_p[np.arange(len(x)), targets], log_p.argmax(1) != targets.numpy()

    rows = [by_hand(position) for position in (0.0, 0.5, 1.0)]
    one = ds.sel(path="line", split="validation")
    # seven float32 layers: some tens of roundings per value
    np.testing.assert_allclose(one.loss, [loss.mean() for loss, _ in rows], rtol=100 * EPS32)
    np.testing.assert_allclose(one.error, [wrong.mean() for _, wrong in rows], atol=1.01 / len(targets))
    height = rows[1][0] - (rows[0][0] + rows[2][0]) / 2
    assert float(one.barrier) == pytest.approx(max(height.mean(), 0.0), abs=1e-4)
    assert float(one.excess_se[1]) == pytest.approx(height.std(ddof=1) / np.sqrt(len(height)), rel=1e-3)
    assert float(one.excess[1]) == pytest.approx(height.mean(), abs=1e-4)


@pytest.fixture(scope="module")
def two_minima(tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two trainings from different starts."""
    config = replace(tiny_config, strategy="restart", iterations=2, epochs=20, checkpoint_every=20, lr=3e-3)
    return train(config, tmp_path_factory.mktemp("two") / "restarts", device="cpu", progress=False)


def test_the_barrier_to_ones_relabelled_self_vanishes_with_alignment(two_minima: Run, tmp_path: Path) -> None:
    source = as_source(two_minima)
    model, state = source.make_model().eval(), two_minima.plain.load()
    groups = find_groups(model, torch.zeros(2, 1, 8, 8))
    files = saved(model, tmp_path, state, Relabelling.random(groups, 4).apply(state))
    ds = landscape(open_files(model, files, source.data), align=True, n_points=7, progress=False)
    assert ds.path.values.tolist() == ["line", "aligned"]
    assert (ds.barrier.sel(path="line") > 0.5).all()
    assert (ds.error_barrier.sel(path="line") > 0.2).all()
    # the two ends are one point: what is left is the round-off of (1 - t) a + t a
    assert (ds.barrier.sel(path="aligned") < 1e-5).all()
    assert float(ds.distance.sel(path="aligned")) == 0
    assert ds.attrs["n_relabelled"] > 80


def test_networks_with_norms_are_aligned_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 10, 3), nn.BatchNorm2d(10), nn.ReLU(),
        nn.Flatten(), nn.Linear(10 * 16, 10),
    )  # fmt: skip
    inputs = torch.randn(120, 1, 8, 8)
    data = as_splits((inputs, inputs.mean((1, 2, 3)).gt(0).long()))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data.train.inputs), data.train.targets).backward()
        optimizer.step()
    state = {name: tensor.detach().clone() for name, tensor in model.eval().state_dict().items()}
    other = Relabelling.random(find_groups(model, data.train.inputs[:2]), 1).apply(state)
    source = open_files(model, saved(model, tmp_path, state, other), data)
    for bn in ("reestimate", "interpolate"):
        ds = landscape(source, align=True, n_points=5, bn=bn, progress=False)
        assert float(ds.barrier.sel(path="line")[0]) > 0.02
        assert float(ds.barrier.sel(path="aligned")[0]) < 1e-5


def test_transformers_are_aligned_and_the_dataset_says_what_was_moved() -> None:
    model, inputs = made("rotary")
    data = as_splits((inputs.repeat(20, 1), inputs.repeat(20, 1)[:, 0]))
    other = copy.deepcopy(model)
    other.load_state_dict(Relabelling.random(find_groups(model, inputs), 1, rotations=True).apply(model.state_dict()))

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs[:, -1], targets)

    ds = landscape([model, other], data=data, loss=loss, align=True, n_points=5, progress=False)
    assert float(ds.barrier.sel(path="line")[0]) > 0.1
    assert float(ds.barrier.sel(path="aligned")[0]) < 1e-4  # weights rotated in single precision
    groups = json.loads(ds.attrs["relabelled"])
    assert {(entry["kind"], entry["size"], entry["groups"]) for entry in groups} == {
        ("stream", 12, 1), ("units", 10, 1), ("heads", 2, 1), ("heads", 3, 2), ("value", 4, 2),
    }  # fmt: skip
    assert sum(entry["moved"] for entry in groups) == ds.attrs["n_relabelled"]
    assert "not_followed" not in ds.attrs
    kept = landscape([model, other], data=data, loss=loss, align=True, rotations=False, n_points=5, progress=False)
    assert {entry["signs"] for entry in json.loads(kept.attrs["relabelled"])} <= {"each", "none"}
    assert float(kept.distance.sel(path="aligned")) > float(ds.distance.sel(path="aligned"))


def test_statistics_are_estimated_anew_as_by_a_loop(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    files = saved(model, tmp_path, 0, 1)
    inputs, targets = 3 + torch.randn(50, 5), torch.randint(3, (50,))
    source = open_files(model, files, (inputs, targets))
    ds = landscape(source, n_points=3, batch_size=20, dtype="float64", progress=False)
    a, b = (torch.load(file) for file in files)
    middle = {name: (a[name].double() + b[name].double()) / 2 for name in a}
    hidden = inputs.double() @ middle["0.weight"].T + middle["0.bias"]
    parts = hidden.split(20)
    mean = sum(len(part) * part.mean(0) for part in parts) / 50
    var = sum(len(part) * part.var(0) for part in parts) / 50
    hidden = (hidden - mean) / (var + model[1].eps).sqrt() * middle["1.weight"] + middle["1.bias"]
    outputs = hidden.relu() @ middle["3.weight"].T + middle["3.bias"]
    expected = nn.functional.cross_entropy(outputs, targets)
    assert float(ds.loss[0, 0, 1]) == pytest.approx(float(expected), rel=1e-12)
    plain = landscape(source, n_points=3, bn="interpolate", dtype="float64", progress=False)
    raw = inputs.double() @ middle["0.weight"].T + middle["0.bias"]
    raw = raw / (1 + model[1].eps) ** 0.5 * middle["1.weight"] + middle["1.bias"]  # fresh statistics: 0 and 1
    expected = nn.functional.cross_entropy(raw.relu() @ middle["3.weight"].T + middle["3.bias"], targets)
    assert float(plain.loss[0, 0, 1]) == pytest.approx(float(expected), rel=1e-12)


def normalised(folder: Path, batches: list) -> Source:
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    return open_files(model, saved(model, folder, 0, 1), batches)


def test_a_batch_of_one_joins_the_next_where_statistics_are_estimated(tmp_path: Path) -> None:
    inputs, targets = 3 + torch.randn(40, 5), torch.randint(3, (40,))

    def loss_at_the_middle(*sizes: int) -> float:
        batches = list(zip(inputs.split(list(sizes)), targets.split(list(sizes)), strict=True))
        ds = landscape(normalised(tmp_path, batches), n_points=3, dtype="float64", progress=False)
        return float(ds.loss[0, 0, 1])

    # statistics are those of batches: what joins is one batch, and each example counts once in the loss
    assert loss_at_the_middle(1, 19, 20) == pytest.approx(loss_at_the_middle(20, 20), rel=1e-12)
    assert loss_at_the_middle(1, 1, 18, 1, 19) == pytest.approx(loss_at_the_middle(2, 18, 20), rel=1e-12)


def test_batches_of_one_image_are_all_seen(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    data = (2 + torch.randn(12, 1, 6, 6), torch.randint(3, (12,)))
    source = open_files(model, saved(model, tmp_path, 0, 1), data)
    one, two = (landscape(source, n_points=3, batch_size=b, dtype="float64", progress=False) for b in (1, 2))
    np.testing.assert_allclose(one.loss, two.loss, rtol=1e-12)


@pytest.mark.parametrize("bends", [False, True])
def test_a_single_example_has_no_statistics(tmp_path: Path, bends: bool) -> None:
    batches = [(torch.randn(1, 5), torch.zeros(1).long())]
    view = "curve" if bends else "line"
    with pytest.raises(PnError, match="single example|batches of two or more") as raised:
        landscape(normalised(tmp_path, batches), view=view, n_points=3, n_steps=2, progress=False)
    assert "\n" not in str(raised.value)


def test_a_curve_is_trained_past_a_batch_of_one(tmp_path: Path) -> None:
    sizes = [1, 9, 10]
    batches = list(zip(torch.randn(20, 5).split(sizes), torch.randint(3, (20,)).split(sizes), strict=True))
    ds = landscape(normalised(tmp_path, batches), view="curve", n_points=3, n_steps=8, progress=False)
    assert np.isfinite(ds.loss).all()


def test_different_losses_are_not_laid_on_one_line(tmp_path: Path) -> None:
    model = nn.Linear(4, 3)
    data = (torch.randn(20, 4), torch.rand(20, 3).softmax(1))
    first, second = saved(model, tmp_path, 0, 1)
    a = open_files(model, [first], data, "cross_entropy", label="a")
    b = open_files(model, [second], data, "mse", label="b")
    for analysis in (landscape, compare, functional_distance):
        with pytest.raises(PnError, match=r"loss cross_entropy, b\S* has mse: .*--loss"):
            analysis(a, b, progress=False)
    same = open_files(model, [second], data, "cross_entropy", label="b")
    assert landscape(a, same, n_points=2, progress=False).sizes["position"] == 2


def test_a_quadratic_on_a_plane_is_exact(tmp_path: Path) -> None:
    source, inputs, targets, (s, a, b) = linear_source(tmp_path, 3)
    names = ["w0", "w1", "w2"]
    ds = landscape(source, checkpoints=names, view="plane", n_points=4, dtype="float64", progress=False)
    e1 = (a - s) / np.linalg.norm(a - s)
    e2 = (b - s) - ((b - s) @ e1) * e1
    e2 /= np.linalg.norm(e2)
    expected = [[squared_errors(s + x * e1 + y * e2, inputs, targets).mean() for x in ds.x.values] for y in ds.y.values]
    np.testing.assert_allclose(ds.loss.sel(split="train"), expected, rtol=1e-12)
    np.testing.assert_allclose(ds.point_position, [[0, 0], [(a - s) @ e1, 0], [(b - s) @ e1, (b - s) @ e2]], atol=1e-12)
    low, high = ds.point_position.values.min(0), ds.point_position.values.max(0)
    half = 0.75 * (high - low)
    half = np.maximum(half, half.max() / 2)
    np.testing.assert_allclose([ds.x[0], ds.y[0]], (low + high) / 2 - half)
    np.testing.assert_allclose([ds.x[-1], ds.y[-1]], (low + high) / 2 + half)


def test_the_plane_is_that_of_trajectories(tiny_run: Run) -> None:
    paths = trajectory(tiny_run, progress=False)
    ds = landscape(tiny_run, view="plane", n_points=2, n=50, progress=False)
    assert ds.attrs["plane_points"] == paths.attrs["plane_points"]
    at = paths.plane.sel(checkpoint=json.loads(ds.attrs["plane_points"])).isel(component=slice(2))
    np.testing.assert_allclose(ds.point_position, at, atol=1e-8 * float(ds.x[-1]))
    assert ds.point.values.tolist()[:2] == ["start", "plain"]
    corner = float(ds.point_position[1, 0])
    near = landscape(tiny_run, view="plane", n_points=2, n=None, span=(0, corner, 0, 1), progress=False)
    line = landscape(tiny_run, checkpoints=["start", "plain"], n_points=2, n=None, splits=["train"], progress=False)
    np.testing.assert_allclose(near.loss[0, 0], line.loss[0, 0], rtol=100 * EPS32)


@pytest.mark.parametrize("kind", ["bezier", "chain"])
def test_curves_begin_and_end_exactly_and_pass_below_the_barrier(two_minima: Run, kind: str) -> None:
    ds = landscape(
        two_minima, checkpoints=["iter00", "iter01"], view="curve", curve=kind, n_points=9, n_steps=300, lr=1e-2,
        progress=False,
    )  # fmt: skip
    line, curve = ds.sel(path="line"), ds.sel(path="curve")
    np.testing.assert_array_equal(curve.loss.isel(position=[0, -1]), line.loss.isel(position=[0, -1]))
    assert (line.barrier > 0.3).all()
    assert (curve.barrier < 0.3 * line.barrier).all()
    assert float(curve.length) > float(line.length) == pytest.approx(float(line.distance), rel=1e-9)


def test_two_runs_are_joined_champion_to_champion(tiny_run: Run, two_minima: Run) -> None:
    ds = landscape(tiny_run, two_minima, n_points=3, n=100, progress=False)
    assert ds.attrs["checkpoints"] == '["tiny/champion", "restarts/champion"]'
    named = landscape(
        tiny_run, two_minima, checkpoints=["tiny/champion", "restarts/champion"], n_points=3, n=100, progress=False
    )
    np.testing.assert_array_equal(ds.loss, named.loss)
    assert ds.split.values.tolist() == ["train", "test"]
    assert json.loads(ds.attrs["n"]) == {"train": 100, "test": 100}
    plane = landscape(tiny_run, two_minima, view="plane", n_points=2, n=50, progress=False)
    paths = trajectory(tiny_run, two_minima, progress=False)
    assert plane.attrs["plane_points"] == paths.attrs["plane_points"]


def test_a_loader_and_a_loss_of_ones_own_give_the_same(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    files = saved(model, tmp_path, 0, 1)
    inputs, targets = torch.randn(40, 4), torch.randint(3, (40,))

    def own(outputs: Tensor, targets: Tensor) -> Tensor:
        return -outputs.log_softmax(1).gather(1, targets[:, None]).mean()

    built_in = landscape(open_files(model, files, (inputs, targets)), n_points=4, progress=False)
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=16)
    ours = landscape(open_files(model, files, loader, own), n_points=4, align=True, progress=False)
    np.testing.assert_allclose(ours.loss.sel(path="line"), built_in.loss.sel(path="line"), rtol=20 * EPS32)
    np.testing.assert_allclose(ours.loss_se.sel(path="line"), built_in.loss_se.sel(path="line"), rtol=1e-4)
    loaded = netcdf.load(netcdf.save(ours, tmp_path / "barrier.nc"))
    assert loaded.identical(ours)
    bent = landscape(open_files(model, files, loader, own), n_points=4, view="curve", n_steps=20, progress=False)
    assert bent.path.values.tolist() == ["line", "curve"]


def test_losses_by_example_average_to_the_loss() -> None:
    outputs, targets = torch.randn(7, 3, 4), torch.randn(7, 3, 4)
    parts, _ = example_losses(nn.functional.mse_loss, outputs, targets)
    assert float(parts.mean()) == pytest.approx(float(nn.functional.mse_loss(outputs, targets)), rel=10 * EPS32)


def _other_architecture(run: Run, folder: Path) -> list[object]:
    return [run, open_files(nn.Linear(2, 2), saved(nn.Linear(2, 2), folder, 0), "digits")]


def _collinear(run: Run, folder: Path) -> list[object]:
    states = [{"weight": torch.full((2, 2), float(i)), "bias": torch.full((2,), float(i))} for i in range(3)]
    data = (torch.randn(9, 2), torch.randn(9, 2))
    return [open_files(nn.Linear(2, 2), saved(nn.Linear(2, 2), folder, *states), data, "mse")]


def _summed(run: Run, folder: Path) -> list[object]:
    data = (torch.randn(9, 2), torch.randn(9, 2))
    files = saved(nn.Linear(2, 2), folder, 0, 1)
    return [open_files(nn.Linear(2, 2), files, data, lambda o, t: (o - t).square().sum())]


def _norms(run: Run, folder: Path) -> list[object]:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    return [open_files(model, saved(model, folder, 0, 1), (torch.randn(9, 2), torch.randn(9, 2)), "mse")]


def _own(run: Run, folder: Path) -> list[object]:
    return [run]


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (_other_architecture, {}, "architecture"),
        (_collinear, {"view": "plane"}, "one line"),
        (_summed, {}, "not the mean over its examples"),
        (_norms, {"view": "curve", "bn": "interpolate"}, "re-estimated"),
        (_own, {"checkpoints": ["plain", "iter00"]}, "the same checkpoint"),
        (_own, {"checkpoints": ["ends"]}, "needs 2 checkpoints, there are 3"),
        (_own, {"checkpoints": ["plain"], "view": "plane"}, "needs 3 checkpoints"),
        (_own, {"view": "sphere"}, "line, curve, plane, random"),
        (_own, {"view": "plane", "align": True}, "only lines and curves"),
        (_own, {"bn": "magic"}, "reestimate, interpolate"),
        (_own, {"view": "curve", "curve": "spiral"}, "bezier, chain"),
        (_own, {"n_points": 1}, "at least 2"),
        (_own, {"view": "random", "span": (1, 0, 0, 1)}, "minimum below its maximum"),
        (_own, {"view": "curve", "n_bends": 0, "checkpoints": ["start", "plain"]}, "n_bends is 0"),
        (_own, {"splits": ["exam"], "checkpoints": ["start", "plain"]}, "no split 'exam'"),
        (_own, {"extrapolate": -1.0}, "extrapolate"),
    ],
)
def test_bad_input_is_one_clear_sentence(
    tiny_run: Run, tmp_path: Path, make: Callable[[Run, Path], list[object]], options: dict, message: str
) -> None:
    given = make(tiny_run, tmp_path)
    with pytest.raises(PnError, match=message) as raised:
        landscape(*given, n=50, progress=False, **options)
    assert "\n" not in str(raised.value)


def test_nothing_to_look_at_is_refused(tiny_run: Run, two_minima: Run) -> None:
    with pytest.raises(PnError, match="name a run"):
        landscape()
    with pytest.raises(PnError, match="write RUN/NAME"):
        landscape(tiny_run, two_minima, checkpoints=["plain", "champion"], progress=False)
