"""Eigenpairs as data: closed forms, dense matrices, other packages, runs, files, and what is refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from scipy import sparse
from torch import Tensor, nn
from torch.nn import functional as F

import pnanalysis as pn
from pnanalysis.curvature.operators import EmpiricalFisherOperator, GGNOperator, HessianOperator
from pnanalysis.errors import CurvatureError, ModelError, PnError
from pnanalysis.io.runs import Run
from pnanalysis.io.unfinished import Unfinished
from pnanalysis.spectra import restarted
from pnanalysis.spectra.half_samples import half_samples
from tests.curvature.conftest import NETWORKS, images, squared_error

QUIET: dict[str, Any] = {"progress": False}
KINDS = {"hessian": HessianOperator, "ggn": GGNOperator, "fisher": EmpiricalFisherOperator}


def dense(op: Any) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and eigenvectors, the largest first."""
    value, vector = np.linalg.eigh(op.to_dense().numpy())
    return value[::-1], vector[:, ::-1]


class Bowl(nn.Module):
    """A network whose loss over its data is a quadratic bowl with given axes."""

    def __init__(self, theta: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(theta)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.theta


def bowl(values: Tensor, theta: Tensor) -> tuple[nn.Module, Any]:
    """Loss ``sum_i values_i theta_i^2 / 2``: its gradient and eigenpairs are known."""
    x = torch.diag((values * len(values) / 2).sqrt())
    return Bowl(theta), [(x, torch.zeros(len(values), dtype=theta.dtype))]


@pytest.mark.parametrize(
    ("network", "kind"),
    [
        *((name, "hessian") for name in ("linear", "tanh", "conv", "layernorm")),
        ("conv", "ggn"),
        ("tanh", "fisher"),
        *(pytest.param(name, "hessian", marks=pytest.mark.slow) for name in ("maxpool", "batchnorm")),
        pytest.param("tanh", "ggn", marks=pytest.mark.slow),
    ],
)
def test_pairs_are_those_of_the_dense_matrix(network: str, kind: str) -> None:
    loss: Callable[..., Any] = squared_error if network == "linear" else F.cross_entropy
    model, batches = NETWORKS[network](), images((20, 12))
    ds = pn.eigenpairs(
        model, data=batches, loss=loss, operator=kind, dtype="float64", k=5, tolerance=1e-8, n=None, data_error="none",
        classes=False, **QUIET,
    ).squeeze("checkpoint")  # fmt: skip
    op = KINDS[kind](model, loss, batches)
    value, vector = dense(op)
    np.testing.assert_allclose(ds.value, value[:5], atol=1e-7 * value[0])
    product = op.matmat(torch.from_numpy(ds.vector.values.T.copy())).numpy()
    np.testing.assert_allclose(np.linalg.norm(product - ds.vector.values.T * ds.value.values, axis=0), ds.residual,
                               atol=1e-9 * value[0])  # fmt: skip
    for i in range(5):
        alone = np.abs(np.delete(value, i) - value[i]).min() > 1e-3 * value[0]
        if alone:
            assert abs(vector[:, i] @ ds.vector.values[i]) > 1 - 1e-6


@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
def test_a_quadratic_bowl_with_known_axes(which: str) -> None:
    values = torch.tensor([5.0, 0.1, 2.0, 0.5, 3.0], dtype=torch.float64)
    theta = torch.tensor([0.1, 4.0, 1.0, -2.0, 0.3], dtype=torch.float64)
    model, data = bowl(values, theta)
    ds = pn.eigenpairs(model, data=data, loss="mse", dtype="float64", k=2, which=which, n=None, **QUIET)
    ds = ds.squeeze("checkpoint")
    expected = [1, 3] if which == "smallest" else [0, 4]
    np.testing.assert_allclose(ds.value, values[expected], rtol=1e-10)
    np.testing.assert_allclose(np.abs(ds.vector), np.eye(5)[expected], atol=1e-7)
    np.testing.assert_allclose(ds.participation, 1, atol=1e-6)
    if which == "largest":  # the gradient is values * theta: Gur-Ari et al. on a quadratic
        slopes = (values * theta).square()
        np.testing.assert_allclose(ds.gradient_part, slopes[expected] / slopes.sum(), atol=1e-7)
        assert float(ds.gradient_top) == pytest.approx(float(slopes[expected].sum() / slopes.sum()), abs=1e-7)
        assert float(ds.gradient_norm) == pytest.approx(float(slopes.sum().sqrt()))
        assert float(ds.top_chance) == 2 / 5
    else:
        assert "gradient_top" not in ds


def test_gradient_descent_on_a_bowl_leaves_the_top_space() -> None:
    """After many steps only flat directions are left; at the start the gradient is where the curvature is."""
    values = torch.cat([torch.full((3,), 1.0), torch.full((20,), 1e-3)]).double()
    theta = torch.ones(23, dtype=torch.float64)
    parts = []
    for steps in (0, 40):
        model, data = bowl(values, theta * (1 - 0.5 * values) ** steps)
        ds = pn.eigenpairs(model, data=data, loss="mse", dtype="float64", k=3, n=None, data_error="none", **QUIET)
        parts.append(float(ds.gradient_top[0]))
    assert parts[0] > 0.9999
    assert parts[1] < 1e-4


def test_a_linear_network_with_squared_loss() -> None:
    """The Hessian is the second moment of the inputs for each output, so that every eigenvalue is there C times."""
    torch.manual_seed(0)
    x, y = torch.randn(60, 6).double() * torch.tensor([4.0, 3, 2, 1, 0.5, 0.1]), torch.randn(60, 3).double()
    model = nn.Linear(6, 3, bias=False).double()
    ds = pn.eigenpairs(model, data=[(x, y)], loss="mse", dtype="float64", k=6, n=None, **QUIET).squeeze("checkpoint")
    moment = np.linalg.eigvalsh((2 * x.T @ x / (60 * 3)).numpy())[::-1]
    np.testing.assert_allclose(ds.value, np.repeat(moment[:2], 3), rtol=1e-6)
    assert ds.cluster.values.tolist() == [0, 0, 0, 1, 1, 1]
    assert (ds.space_sin_theta < 1e-3).all()
    assert (ds.sin_theta > 0.5).any()
    forms = (x @ torch.linalg.eigh(x.T @ x)[1][:, -1]).square() * 2 / 3  # of the largest, for every example
    assert float(ds.value_data_se[0]) == pytest.approx(float(forms.std() / 60**0.5), rel=1e-6)


def test_the_error_for_the_examples_is_the_scatter_over_samples() -> None:
    """Of the largest eigenvalue of a second moment, over 300 samples."""
    generator = np.random.default_rng(0)
    scale, values, errors = np.array([3.0, 1.0, 0.5, 0.2]), [], []
    model = nn.Linear(4, 1, bias=False).double()
    for _ in range(300):
        x = generator.standard_normal((200, 4)) * scale
        values.append(np.linalg.eigvalsh(2 * x.T @ x / 200)[-1])
    for i in range(5):
        x = torch.from_numpy(generator.standard_normal((200, 4)) * scale)
        op = HessianOperator(model, F.mse_loss, [(x, torch.zeros(200, 1).double())])
        errors.append(float(pn.eigenpairs(op, k=1, data_error="examples", seed=i, **QUIET).value_data_se[0]))
    # a standard deviation of 300 is known to 4 %, and that of each error is about 15 %
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.2)


def test_an_operator_has_layers_and_a_matrix_has_none() -> None:
    op = GGNOperator(NETWORKS["conv"](), F.cross_entropy, images((9, 7)))
    ds = pn.eigenpairs(op, k=3, **QUIET)
    assert ds.layer.values.tolist() == ["0", "2", "4"]
    np.testing.assert_allclose(ds.layer_part.sum("layer"), 1, atol=1e-12)
    np.testing.assert_allclose(ds.layer_share.sum(), 1)
    sizes = [n for _, _, n in json.loads(ds.tensors.item())]
    assert sum(sizes) == op.shape[0] == ds.sizes["parameter"]
    own = np.split(ds.vector.values.astype(float) ** 2, np.cumsum(sizes)[:-1], axis=1)
    np.testing.assert_allclose(ds.layer_part[:, 0], own[0].sum(1) + own[1].sum(1), atol=1e-6)
    for matrix in (np.diag([3.0, 1, 0]), torch.diag(torch.tensor([3.0, 1, 0])), sparse.diags_array([3.0, 1, 0])):
        bare = pn.eigenpairs(matrix, k=2, **QUIET)
        np.testing.assert_allclose(bare.value, [3, 1], atol=1e-6)
        assert "layer_part" not in bare
        assert bare.attrs["data_error"] == "none"


def test_one_parameter_rank_one_and_zero() -> None:
    assert pn.eigenpairs(np.array([[4.0]]), **QUIET).value.values.tolist() == [4.0]
    v = np.arange(1.0, 9)
    found = pn.eigenpairs(np.outer(v, v), k=3, **QUIET)
    np.testing.assert_allclose(found.value, [v @ v, 0, 0], atol=1e-10)
    zero = pn.eigenpairs(np.zeros((6, 6)), k=10, **QUIET)
    assert zero.sizes["pair"] == 6
    assert (zero.value == 0).all()
    constant = pn.eigenpairs(  # a loss that depends on no parameter
        nn.Linear(2, 1), data=[(torch.randn(9, 2), torch.zeros(9, 1))], loss=lambda o, t: (0 * o).mean(), k=2,
        weight="examples", **QUIET,
    )  # fmt: skip
    assert (constant.value == 0).all()
    assert np.isnan(constant.gradient_top).all()


def test_the_largest_agrees_with_pyhessian() -> None:
    pyhessian = pytest.importorskip("pyhessian")
    model, (x, y) = NETWORKS["conv"](), images((40,))[0]
    theirs, _ = pyhessian.hessian(model, F.cross_entropy, data=(x, y), cuda=False).eigenvalues(
        maxIter=2000, tol=1e-12, top_n=2
    )
    ds = pn.eigenpairs(model, data=[(x, y)], loss=F.cross_entropy, dtype="float64", which="magnitude", k=2, **QUIET)
    np.testing.assert_allclose(ds.value[0], theirs, rtol=1e-4)


def test_a_run_with_updates_overlaps_and_classes(tiny_run: Run, tmp_path: Path) -> None:
    ds = pn.eigenpairs(tiny_run, checkpoints=["plain", "iter01", "start"], k=2, n=200, **QUIET)
    assert ds.checkpoint.values.tolist() == ["plain", "iter01", "start"]
    assert np.isnan(ds.update_top.sel(checkpoint="start"))  # nothing comes before it
    before, after = (tiny_run.select([f"iter00/epoch{i:03d}"]).popitem()[1].load() for i in (3, 4))
    names = [name for name, _, _ in json.loads(str(ds.tensors[0].item()))]
    update = torch.cat([(after[name] - before[name]).reshape(-1) for name in names]).double().numpy()
    cosines = (ds.vector[0].values @ update) ** 2 / (update @ update)
    np.testing.assert_allclose(ds.update_part[0], cosines, rtol=1e-3, atol=1e-8)
    assert float(ds.update_norm[0]) == pytest.approx(np.linalg.norm(update), rel=1e-5)
    np.testing.assert_allclose(np.diag(ds.overlap), 1, atol=1e-5)
    v, w = (ds.vector.sel(checkpoint=name).values.astype(float) for name in ("plain", "iter01"))
    expected = np.square(v @ w.T).sum() / 2
    assert float(ds.overlap.sel(checkpoint="plain", other="iter01")) == pytest.approx(expected, abs=1e-4)
    np.testing.assert_array_equal(ds.overlap, ds.overlap.T)
    assert "overlap_data_se" not in ds
    assert float(ds.overlap_chance[0, 1]) == 2 / int(ds.n_parameters[0])
    assert ((np.diag(ds.overlap_halves) > 0.2) & (np.diag(ds.overlap_halves) <= 1)).all()
    np.testing.assert_allclose(ds.level_part.sum("level"), 1, atol=1e-9)
    assert (ds.cross_part >= ds.class_part - 1e-6).all()
    assert ds.class_value.shape == (3, 10)
    assert ds.cross_value.shape == (3, 90)
    assert (ds.value_low < ds.value).all()
    assert (ds.value < ds.value_high).all()
    again = pn.load(pn.save(ds, tmp_path / "eigenpairs.nc"))
    xr.testing.assert_identical(again.load().drop_attrs(deep=False), ds.drop_attrs(deep=False))
    pn.validate(again)


def test_the_last_update_of_networks_in_memory_and_of_files_is_from_weights_that_are_given(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 3, generator=generator), torch.randint(2, (40,), generator=generator)
    torch.manual_seed(0)
    before, after = nn.Linear(3, 2), nn.Linear(3, 2)
    torch.save(before.state_dict(), tmp_path / "before.pt")
    options: dict[str, Any] = {"data": (x, y), "loss": "cross_entropy", "k": 2, "data_error": "none", **QUIET}
    names = dict(after.named_parameters())
    update = torch.cat([(names[n] - p).detach().flatten() for n, p in before.named_parameters()]).double().numpy()
    for given in (before, before.state_dict(), tmp_path / "before.pt"):
        ds = pn.eigenpairs(after, previous=given, **options).isel(checkpoint=0)
        expected = (ds.vector.values @ update) ** 2 / (update @ update)
        np.testing.assert_allclose(ds.update_part, expected, rtol=1e-4)
    both = pn.eigenpairs({"a": after, "b": before}, previous={"a": before}, **options)
    np.testing.assert_allclose(both.update_part.sel(checkpoint="a"), ds.update_part, rtol=1e-4)
    assert both.update_part.sel(checkpoint="b").isnull().all()
    with pytest.raises(PnError, match="mapping by their names"):
        pn.eigenpairs({"a": after, "b": before}, previous=before, **options)
    with pytest.raises(PnError, match="previous has 'c'; the networks are 'a', 'b'"):
        pn.eigenpairs({"a": after, "b": before}, previous={"c": before}, **options)
    with pytest.raises(PnError, match="previous is a int"):
        pn.eigenpairs(after, previous=3, **options)
    with pytest.raises(PnError, match="of another shape"):
        pn.eigenpairs(after, previous=nn.Linear(4, 2), **options)


def test_the_gauss_newton_curvature_of_its_own_pairs_is_the_eigenvalue() -> None:
    ds = pn.eigenpairs(
        NETWORKS["tanh"](), data=images((30,)), loss=F.cross_entropy, operator="ggn", dtype="float64", k=2, **QUIET
    )
    np.testing.assert_allclose(ds.ggn_value, ds.value, rtol=1e-6)
    regression = pn.eigenpairs(
        NETWORKS["tanh"](), data=images((30,)), loss=squared_error, dtype="float64", k=2, **QUIET
    )
    assert "level_part" not in regression
    assert "cross_entropy" in regression.attrs["class_note"]


def test_halves_of_the_examples() -> None:
    batches = images((24, 16))
    options: dict[str, Any] = {"loss": F.cross_entropy, "dtype": "float64", "k": 2, "n": None} | QUIET
    ds = pn.eigenpairs(NETWORKS["tanh"](), data=batches, **options).squeeze("checkpoint")
    op = HessianOperator(NETWORKS["tanh"](), F.cross_entropy, batches, expected_products=1)
    for part in (0, 1):
        np.testing.assert_allclose(ds.value_half[part], dense(op.subset([part], 2))[0][:2], rtol=1e-4)
    without = pn.eigenpairs(NETWORKS["tanh"](), data=batches, data_error="examples", **options)
    assert "value_half" not in without
    assert without.attrs["data_error"] == "examples"


def test_networks_of_different_sizes_side_by_side(tmp_path: Path) -> None:
    nets = {
        "small": nn.Linear(3, 2),
        "large": nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
        "tiny": Bias(),
    }
    data = [(torch.randn(30, 3), torch.randint(0, 2, (30,)))]
    ds = pn.eigenpairs(nets, data=data, loss=F.cross_entropy, k=6, data_error="none", max_hvp=29, **QUIET)
    assert ds.value.sel(checkpoint="tiny").notnull().sum() == 2
    assert np.isnan(ds.overlap.sel(checkpoint="small", other="large"))
    again = pn.load(pn.save(ds, tmp_path / "several.nc"))
    np.testing.assert_array_equal(again.vector, ds.vector)


class Bias(nn.Module):
    """Two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor([0.1, -0.2]))

    def forward(self, x: Tensor) -> Tensor:
        return self.bias.expand(len(x), 2)


def test_what_has_not_converged_is_marked() -> None:
    values = np.random.default_rng(0).standard_normal(300)
    with pytest.warns(UserWarning, match="not converged"):
        ds = pn.eigenpairs(np.diag(values), k=8, max_hvp=28, **QUIET)
    assert (ds.converged == 0).any()
    assert ds.attrs["complete"] == 0


def test_the_limit_of_products_is_kept_or_refused() -> None:
    values = np.random.default_rng(0).standard_normal(300)
    with pytest.raises(CurvatureError, match="max_hvp is 1; 4 pairs of 300 parameters take 9 at least"):
        pn.eigenpairs(np.diag(values), k=4, max_hvp=1, **QUIET)
    for limit in (9, 10, 25, 60, 200):
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            ds = pn.eigenpairs(np.diag(values), k=4, max_hvp=limit, **QUIET)
        assert int(ds.n_hvp) <= limit
        assert len(warned) == (limit < 60)
        assert bool(ds.converged.all()) == (limit >= 60)
        away = np.abs(values[:, None] - ds.value.values).min(0)
        assert (away <= ds.value_bound.values).all()


@pytest.mark.parametrize(
    ("network", "kind"), [pytest.param("tanh", "ggn", marks=pytest.mark.slow), ("linear", "hessian")]
)
def test_small_eigenvalues_in_single_precision_have_their_error_for_the_examples(network: str, kind: str) -> None:
    """Forms of examples add up to them to the round-off of the largest eigenvalue, not to that of themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ds = pn.eigenpairs(
            NETWORKS[network](), data=images((40,)), loss=F.cross_entropy, k=2, which="smallest", operator=kind, n=None,
            data_error="examples", classes=False, **QUIET,
        ).squeeze("checkpoint")  # fmt: skip
    assert ds.attrs["data_error"] == "examples"
    assert (np.abs(ds.value) <= ds.value_bound).all()  # these matrices have the eigenvalue zero
    assert (ds.value_data_se <= ds.value_bound).all()


class Renamed(nn.Module):
    """As many parameters as a linear layer, under another name or in another shape."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.matrix = nn.Linear(columns, rows, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, : self.matrix.in_features] @ self.matrix.weight.T


def test_spaces_of_other_parameters_have_no_overlap() -> None:
    torch.manual_seed(0)
    nets = {"a": Renamed(2, 6), "b": Renamed(2, 6), "other": Renamed(3, 4)}
    data = [(torch.randn(30, 6), torch.randint(0, 2, (30,)))]
    with pytest.warns(UserWarning, match="different parameters have no overlap") as warned:
        ds = pn.eigenpairs(nets, data=data, loss=F.cross_entropy, k=2, data_error="none", **QUIET)
    (said,) = (str(one.message) for one in warned if "overlap" in str(one.message))
    assert "a and other (matrix.weight of shape (2, 6) and matrix.weight of shape (3, 4))" in said
    assert np.isnan(ds.overlap.sel(checkpoint="a", other="other"))
    assert 0 < float(ds.overlap.sel(checkpoint="a", other="b")) < 1


class Breaks:
    """A matrix that is interrupted at one of its products."""

    def __init__(self, values: np.ndarray, after: float = np.inf) -> None:
        self.matrix, self.left = torch.from_numpy(np.diag(values)), after
        self.shape, self.dtype, self.device = self.matrix.shape, self.matrix.dtype, self.matrix.device

    def matvec(self, v: Tensor) -> Tensor:
        return self.matmat(v[:, None])[:, 0]

    def matmat(self, V: Tensor) -> Tensor:
        self.left -= V.shape[1]
        if self.left < 0:
            raise KeyboardInterrupt
        return self.matrix @ V


@pytest.mark.parametrize("kill", [False, True])
def test_interrupted_pairs_go_on_where_they_were(kill: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.concatenate([np.random.default_rng(0).standard_normal(150), [4.0, 4.0, 4.0]])
    options: dict[str, Any] = {"k": 4, "tolerance": 1e-8} | QUIET
    whole = pn.eigenpairs(Breaks(values), **options)
    if kill:  # nothing is written at the end, but now and then
        monkeypatch.setattr(Unfinished, "is_due", True)
        monkeypatch.setattr(restarted._Restarted, "saved_on_interrupt", lambda *_: nullcontext())
    state, spent, resumed = tmp_path / "work", 0, None
    while resumed is None:
        operator = Breaks(values, 23)  # one for the comparison of operators, four to verify, and some to get on by
        with suppress(KeyboardInterrupt):
            resumed = pn.eigenpairs(operator, state=state, **options)
        spent += 1
        assert spent < 40
    assert spent > 2
    xr.testing.assert_equal(resumed, whole)
    with pytest.raises(CurvatureError, match="holds unfinished work with other settings, data or code"):
        pn.eigenpairs(Breaks(values + 1), state=state, **options)
    with pytest.raises(CurvatureError, match="other settings"):
        pn.eigenpairs(Breaks(values), state=state, **options | {"k": 5})


def test_interrupted_pairs_of_a_network_go_on_where_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, data = NETWORKS["tanh"](), images((40,))
    options: dict[str, Any] = {"data": data, "loss": F.cross_entropy, "dtype": "float64", "k": 2, "n": None} | QUIET
    whole, matmat = pn.eigenpairs(net, **options), HessianOperator.matmat
    left = [0]

    def interrupted(self: HessianOperator, V: Tensor) -> Tensor:
        left[0] -= V.shape[1]
        if left[0] < 0:
            raise KeyboardInterrupt
        return matmat(self, V)

    monkeypatch.setattr(HessianOperator, "matmat", interrupted)
    for products in (12, 25, 40):
        left[0] = products
        with pytest.raises(KeyboardInterrupt):
            pn.eigenpairs(net, state=tmp_path / "work", **options)
    assert list(tmp_path.glob("work/*/pairs.safetensors"))
    left[0] = 10**6
    xr.testing.assert_equal(pn.eigenpairs(net, state=tmp_path / "work", **options), whole)


def test_finished_networks_are_not_verified_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    nets = {name: NETWORKS["tanh"]() for name in "ab"}
    nn.init.normal_(next(nets["b"].parameters()))
    x, y = images((40,))[0]
    options: dict[str, Any] = {"loss": F.cross_entropy, "dtype": "float64", "k": 2, "n": None} | QUIET
    state = tmp_path / "work"
    pn.eigenpairs(nets, data=(x, y), state=state, **options)
    whole, spent, matmat = pn.eigenpairs(nets, data=(x, y), **options), [0], HessianOperator.matmat

    def counted(self: HessianOperator, V: Tensor) -> Tensor:
        spent[0] += V.shape[1]
        return matmat(self, V)

    monkeypatch.setattr(HessianOperator, "matmat", counted)
    again = pn.eigenpairs(nets, data=(x, y), state=state, **options)
    assert spent[0] == 2  # one for each network, which tells that it is the same
    xr.testing.assert_identical(again.drop_attrs(deep=False), whole.drop_attrs(deep=False))
    for name, value in whole.attrs.items():
        assert name in ("created", "command") or again.attrs[name] == value, name
    for path in state.glob("*/found.nc"):
        path.write_bytes(path.read_bytes()[:100])
    xr.testing.assert_equal(pn.eigenpairs(nets, data=(x, y), state=state, **options), whole)


def test_finished_pairs_of_another_gradient_are_computed_again(tmp_path: Path) -> None:
    """Of a linear network the Hessian of squared errors is the same whatever the targets."""
    net, x = nn.Linear(4, 2).double(), torch.randn(30, 4, dtype=torch.float64)
    one, other = (
        HessianOperator(net, F.mse_loss, [(x, torch.full((30, 2), value, dtype=torch.float64))]) for value in (0.0, 1.0)
    )
    pn.eigenpairs(one, k=2, state=tmp_path / "work", **QUIET)
    again = pn.eigenpairs(other, k=2, state=tmp_path / "work", **QUIET)
    xr.testing.assert_equal(again, pn.eigenpairs(other, k=2, **QUIET))


def test_finished_pairs_of_slightly_other_weights_are_searched_anew(tmp_path: Path) -> None:
    """One product cannot tell, and the loss does."""
    net, data = NETWORKS["tanh"]().double(), images((40,))
    operator = HessianOperator(net, F.cross_entropy, data)
    pn.eigenpairs(operator, k=2, state=tmp_path / "work", **QUIET)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(5e-4)
    moved = HessianOperator(net, F.cross_entropy, data)
    again = pn.eigenpairs(moved, k=2, state=tmp_path / "work", **QUIET)
    xr.testing.assert_equal(again, pn.eigenpairs(moved, k=2, **QUIET))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k is 0"),
        ({"which": "top"}, "unknown which 'top'"),
        ({"operator": "kfac"}, "unknown operator"),
        ({"data_error": "parts"}, "unknown data_error"),
        ({"tolerance": 0}, "tolerance is 0"),
        ({"loss": F.cross_entropy}, "leave model, data and loss out"),
    ],
)
def test_wrong_arguments_are_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PnError, match=message):
        pn.eigenpairs(np.eye(3), **options, **QUIET)


def test_a_plane_along_eigenvectors_has_their_curvature() -> None:
    torch.manual_seed(0)
    net, data = NETWORKS["tanh"](), images((40,))
    options: dict[str, Any] = {"data": data, "loss": F.cross_entropy, "dtype": "float64"} | QUIET
    pairs = pn.eigenpairs(net, k=3, n=None, data_error="none", classes=False, **options)
    gradient = HessianOperator(net, F.cross_entropy, data).gradient().numpy()
    for given in (pairs, None):
        ds = pn.landscape(net, view="eigenvectors", eigenpairs=given, pairs=(1, 3), n_points=3, n=None,
                          span=(-1e-3, 1e-3, -1e-3, 1e-3), **options)  # fmt: skip
        loss = ds.loss.squeeze("split").values
        for along, i in ((loss[1], 0), (loss[:, 1], 2)):
            assert (along[0] - 2 * along[1] + along[2]) / 1e-6 == pytest.approx(float(pairs.value[0, i]), rel=1e-3)
            slope = abs(gradient @ pairs.vector.values[0, i])
            assert abs(along[2] - along[0]) / 2e-3 == pytest.approx(slope, rel=1e-3, abs=1e-7)
    default = pn.landscape(net, view="eigenvectors", eigenpairs=pairs, n_points=3, **options)
    norm = float(torch.cat([p.detach().flatten() for p in net.parameters()]).norm())
    half = min((2 / float(pairs.value[0, 0] * pairs.value[0, 1]) ** 0.5) ** 0.5, norm / 2)
    assert float(default.x[-1]) == pytest.approx(half)


def test_planes_refuse_eigenpairs_that_do_not_fit() -> None:
    net, data = nn.Linear(3, 2), [(torch.randn(20, 3), torch.randint(0, 2, (20,)))]
    options: dict[str, Any] = {"data": data, "loss": F.cross_entropy} | QUIET

    def plane(ds: Any, **more: Any) -> xr.Dataset:
        return pn.landscape(net, view="eigenvectors", eigenpairs=ds, n_points=3, **options, **more)

    own = pn.eigenpairs(net, k=2, **options)
    with pytest.raises(ModelError, match="none has the weights of"):
        plane(pn.eigenpairs(nn.Linear(3, 2), k=2, **options))
    with pytest.raises(ModelError, match="have no vectors"):
        plane(own.drop_vars("vector"))
    with pytest.raises(ModelError, match="no eigenpair 7; there are 2"):
        plane(own, pairs=(1, 7))
    with pytest.raises(ModelError, match="two different eigenpairs"):
        plane(own, pairs=(2, 2))
    with pytest.raises(ModelError, match=r"is no dataset of pnanalysis\.eigenpairs"):
        plane(xr.Dataset())
    with pytest.raises(PnError, match="not of unit length"):
        plane(own.assign(vector=own.vector * np.nan))
    with pytest.raises(ModelError, match="a part of a parameter"):
        plane(pn.eigenpairs(net, k=2, params="weight[0:1]", **options))


def test_compare_has_overlaps_on_request() -> None:
    torch.manual_seed(0)
    nets = {"a": nn.Linear(4, 3), "b": nn.Linear(4, 3)}
    data = {name: (torch.randn(60, 4), torch.randint(0, 3, (60,))) for name in ("train", "test")}
    options: dict[str, Any] = {"loss": F.cross_entropy, "hessian": False, "cka": False, "saturation": False} | QUIET
    ds = pn.compare(nets, data=data, eigenpairs={"k": 2, "n": None}, **options)
    alone = pn.eigenpairs(nets, data=data, loss=F.cross_entropy, k=2, n=None, **QUIET)
    np.testing.assert_allclose(ds.overlap, alone.overlap, atol=1e-5)
    assert "overlap" not in pn.compare(nets, data=data, **options)
    with pytest.raises(PnError, match="no option 'kay'"):
        pn.compare(nets, data=data, eigenpairs={"kay": 3}, **options)


def test_differences_of_eigenvalues_are_paired_by_examples() -> None:
    torch.manual_seed(0)
    nets = {"a": nn.Linear(4, 3), "b": nn.Linear(4, 3), "near": nn.Linear(4, 3)}
    for name, tensor in nets["a"].state_dict().items():
        nets["near"].state_dict()[name].copy_(1.02 * tensor)
    data = torch.randn(200, 4), torch.randint(0, 3, (200,))
    options: dict[str, Any] = {"loss": F.cross_entropy} | QUIET
    asked = {"k": 3, "n": None, "data_error": "examples"}
    ds = pn.compare(nets, data=data, eigenpairs=asked, hessian=False, cka=False, saturation=False, **options)
    own = pn.eigenpairs(nets, data=data, **asked, **options)
    np.testing.assert_allclose(ds.eigenvalue, own.value, rtol=1e-4)
    np.testing.assert_allclose((own.value_form * own.group_weight).sum("group"), own.value, rtol=1e-4)
    for name, i in (("b", 1), ("near", 2)):
        pair = ds.isel(checkpoint=i, other=0)
        np.testing.assert_allclose(pair.eigenvalue_difference, own.value[i] - own.value[0], atol=1e-5)
        weight = own.group_weight[0].values
        change = (own.value_form[i] - own.value_form[0]).values
        centred = change - (change @ weight / weight.sum())[:, None]
        n = len(weight)
        expected = np.sqrt(n / (n - 1) * np.square(centred) @ weight**2)
        np.testing.assert_allclose(pair.eigenvalue_difference_data_se, expected, rtol=1e-2, err_msg=name)
    assert (pair.eigenvalue_difference_data_se < 0.1 * np.hypot(own.value_data_se[0], own.value_data_se[2])).all()
    assert float(pair.overlap) > 0.99
    assert float(pair.overlap_p) < 1e-6
    assert np.isnan(float(ds.overlap_p.isel(checkpoint=0, other=0)))
    assert any("leading eigenvalues" in sentence and "than chance" in sentence for sentence in pn.verdict(ds))
    itself = ds.isel(checkpoint=1, other=1)
    np.testing.assert_array_equal(itself.eigenvalue_difference, 0.0)
    np.testing.assert_array_equal(itself.eigenvalue_difference_p, 1.0)
    np.testing.assert_array_equal(itself.eigenvalue_difference_high, 0.0)


def test_matrices_that_do_not_depend_on_the_weights_have_equal_pairs() -> None:
    """Of least squares: the Hessian is that of the data alone, and all differences are round-off."""
    torch.manual_seed(0)
    nets, data = {"a": nn.Linear(5, 1), "b": nn.Linear(5, 1)}, (torch.randn(80, 5), torch.randn(80, 1))
    ds = pn.compare(nets, data=data, loss="mse", eigenpairs={"k": 2, "n": None}, hessian=False, cka=False,
                    saturation=False, **QUIET)  # fmt: skip
    x = torch.cat([data[0], torch.ones(80, 1)], dim=1).double()
    exact = torch.linalg.eigvalsh(2 * x.T @ x / 80).numpy()[:-3:-1]
    np.testing.assert_allclose(ds.eigenvalue, [exact, exact], rtol=1e-4)
    np.testing.assert_array_equal(ds.eigenvalue_difference_p, 1.0)
    assert float(ds.overlap[0, 1]) == pytest.approx(1.0, abs=1e-4)


def test_a_loss_with_the_network_in_it_has_no_classes_but_pairs() -> None:
    def residual(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    ds = pn.eigenpairs(nn.Linear(3, 1), data=[(torch.randn(20, 3), torch.randn(20, 1))], loss=residual, k=2,
                       weight="examples", **QUIET)  # fmt: skip
    assert "class_part" not in ds
    assert (ds.value > 0).all()


def test_an_operator_that_is_not_symmetric_is_refused() -> None:
    with pytest.raises(CurvatureError, match="not symmetric"):
        pn.eigenpairs(np.triu(np.random.default_rng(0).standard_normal((50, 50))), **QUIET)


def test_errors_by_half_samples_are_the_scatter_over_samples() -> None:
    """Of least squares without a bias, whose eigenvectors are those of the second moment of the inputs."""
    generator = np.random.default_rng(0)
    scale, offset = np.array([2.0, 1.2, 0.7, 0.4]), np.array([0.4, 0.8, 0.5, 0.3])
    model = nn.Linear(4, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.3, -0.2, 0.5, 0.1]]))
    update = np.array([1.0, -1.0, 0.5, 2.0])
    before = {"weight": model.weight.detach() - torch.from_numpy(update)[None]}

    def sample() -> np.ndarray:
        return generator.standard_normal((240, 4)) * scale + offset

    rows = []
    for _ in range(600):
        x = sample()
        v = np.linalg.eigh(x.T @ x)[1][:, -1]
        gradient = x.T @ x @ model.weight.detach().numpy()[0]  # the targets are zero
        rows.append([(v**4).sum(), (v @ update) ** 2 / (update @ update), (v @ gradient) ** 2 / (gradient @ gradient)])
    names, errors = ("participation_data_se", "update_top_data_se", "gradient_top_se"), []
    for seed in range(8):
        data = torch.from_numpy(sample()), torch.zeros(240, 1).double()
        ds = pn.eigenpairs(model, data=data, loss="mse", k=1, n=None, dtype="float64", previous=before, seed=seed,
                           data_error="groups", **QUIET)  # fmt: skip
        errors.append([ds[name].item() for name in names])
    assert ds.attrs["data_error"] == "groups"
    assert ds.value_half.shape == (1, 14, 1)
    # 8 variances of 7 degrees of freedom each have a mean that is known to 19 %, and that of 600 samples to 6 %: the
    # errors to half of it
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(errors), axis=0)), np.std(rows, axis=0), rtol=0.3)


@pytest.mark.parametrize("data_error", ["halves", "groups"])
def test_differences_of_the_gradients_parts_are_paired_by_examples(data_error: str) -> None:
    """Of two fits of the same examples, whose Hessian is the same and whose gradients differ little."""
    torch.manual_seed(0)
    x = torch.randn(240, 4).double() * torch.tensor([2.0, 1.2, 0.7, 0.4])
    data = x, torch.zeros(240, 1).double()
    nets = {name: nn.Linear(4, 1, bias=False).double() for name in "ab"}
    for net, weight in zip(nets.values(), ([0.3, -0.2, 0.5, 0.1], [0.3, -0.25, 0.5, 0.3]), strict=True):
        net.load_state_dict({"weight": torch.tensor([weight])})
    ds = pn.compare(
        nets, data=data, loss="mse", hessian=False, saturation=False, cka=False, progress=False,
        eigenpairs={"k": 1, "n": None, "dtype": "float64", "tolerance": 1e-8, "data_error": data_error},
    )  # fmt: skip
    assert ("overlap_data_se" in ds) == (data_error == "groups")
    parts = []
    for net in nets.values():
        op = HessianOperator(net, F.mse_loss, [data], expected_products=1)
        if data_error == "groups":
            taken = [part for pair in half_samples() for part in pair]
        else:  # all but one of eight groups
            taken = [[i for i in range(8) if i != one] for one in range(8)]
        some = [op.subset(part, 8) for part in taken]
        spaces = [dense(one if data_error == "groups" else op)[1][:, 0] for one in some]
        gradients = [one.gradient().numpy() for one in some]
        parts.append([(v @ g) ** 2 / (g @ g) for v, g in zip(spaces, gradients, strict=True)])
    difference = np.subtract(*parts)
    halves = difference[::2] - difference[1::2]
    expected = np.sqrt(np.mean(halves**2) / 4) if data_error == "groups" else np.sqrt(7 * difference.var())
    found = float(ds.gradient_top_difference_se[1, 0])
    assert found == pytest.approx(expected, rel=1e-3)
    assert found < 0.5 * np.hypot(*ds.gradient_top_se)


@pytest.mark.slow
def test_errors_of_all_numbers_of_a_classifier_are_their_scatter_over_samples() -> None:
    torch.manual_seed(0)
    population, n = 20_000, 240
    y = torch.randint(3, (population,))
    x = (1.5 * torch.randn(3, 5)[y] + torch.randn(population, 5) * torch.tensor([2.0, 1.2, 0.8, 0.5, 0.3])).double()
    nets = {name: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double() for name in "ab"}
    nets["b"].load_state_dict({name: 1.3 * tensor for name, tensor in nets["a"].state_dict().items()})
    before = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in nets["a"].state_dict().items()}
    options: dict[str, Any] = {"loss": F.cross_entropy, "k": 2, "dtype": "float64", "n": None, "tolerance": 1e-6}
    rows: list[xr.Dataset] = []
    errors: list[xr.Dataset] = []
    for i in range(46):
        at = torch.randperm(population)[:n]
        data_error, found = ("groups", errors) if i < 6 else ("none", rows)
        ds = pn.eigenpairs(nets, data=(x[at], y[at]), previous={"a": before}, data_error=data_error, **options, **QUIET)
        found.append(ds.sel(checkpoint="a", other="b"))
    for name in ("participation", "layer_part", "gradient_top", "update_top", "level_part", "class_part", "overlap"):
        scatter = np.std([ds[name] for ds in rows], axis=0)
        se = name + ("_se" if name == "gradient_top" else "_data_se")
        ratio = np.sqrt(np.mean([ds[se] ** 2 for ds in errors], axis=0)) / scatter
        # both are known to a tenth; halves move numbers that are not linear further, so that errors are too large
        assert ((ratio > 0.6) & (ratio < 2.2)).all(), (name, ratio)


def test_overlaps_have_errors_where_half_samples_are_known() -> None:
    torch.manual_seed(0)
    nets = {name: nn.Linear(4, 3).double() for name in "ab"}
    data = torch.randn(120, 4).double(), torch.randint(3, (120,))
    options: dict[str, Any] = {"data": data, "loss": F.cross_entropy, "k": 2, "n": None, "dtype": "float64"} | QUIET
    ds = pn.eigenpairs(nets, data_error="groups", **options)
    np.testing.assert_array_equal(np.diag(ds.overlap_data_se), 0.0)
    tops = []
    for net in nets.values():
        op = HessianOperator(net, F.cross_entropy, [data], expected_products=1)
        tops.append([dense(op.subset(part, 8))[1][:, :2] for pair in half_samples() for part in pair])
    common = np.array([np.square(v.T @ w).sum() / 2 for v, w in zip(*tops, strict=True)])
    expected = np.sqrt(np.mean(np.square(common[::2] - common[1::2])) / 4)
    np.testing.assert_allclose(ds.overlap_data_se[0, 1], expected, rtol=0.02)
    pn.validate(ds)


@pytest.mark.parametrize("data_error", ["none", "examples", "groups"])
def test_examples_that_count_for_nothing_are_in_no_group(data_error: str) -> None:
    torch.manual_seed(0)
    inputs, targets = torch.randn(40, 4), torch.randint(3, (40,))
    targets[:22] = -100
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    options: dict[str, Any] = {"loss": F.cross_entropy, "k": 2, "data_error": data_error, "n": None, "progress": False}
    every, counted = (
        pn.eigenpairs(network, data=data, **options) for data in ((inputs, targets), (inputs[22:], targets[22:]))
    )
    for name in ("value", *(["value_data_se", "gradient_top_se"] if data_error == "groups" else [])):
        np.testing.assert_allclose(every[name], counted[name], rtol=1e-4)
