"""Analyses of networks, state dicts and files as a notebook holds them, and how often each checkpoint is read."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import pnanalysis as pn
from pnanalysis.errors import ModelError, PnError, RunError
from pnanalysis.inputs.selection import as_sources
from pnanalysis.io.runs import Run
from tests.cases import cases
from trainers import Config, train

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
Y = (X.sum(1) > 0).long() + (X[:, 0] > 0.5).long()
DATA = (X, Y)
HESSIAN = {"n_lanczos": 8, "n_probes": 2}


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


@pytest.fixture
def nets() -> dict[str, nn.Module]:
    return {name: network(seed) for seed, name in enumerate(("a", "b", "c"))}


@pytest.fixture
def files(nets: dict[str, nn.Module], tmp_path: Path) -> list[Path]:
    for name, net in nets.items():
        torch.save(net.state_dict(), tmp_path / f"{name}.pt")
    return [tmp_path / f"{name}.pt" for name in nets]


#: Each analysis with options that keep it short.
ANALYSES: dict[str, Callable[..., xr.Dataset]] = {
    "hessian": lambda *given, **k: pn.hessian(*given, **HESSIAN, **k),
    "eigenpairs": lambda *given, **k: pn.eigenpairs(*given, k=2, **k),
    "blocks": lambda *given, **k: pn.blocks(*given, n_hvp=16, **k),
    "saturation": lambda *given, loss=None, **k: pn.saturation(*given, **k),
    "trajectory": lambda *given, loss=None, data=None, **k: pn.trajectory(*given, **k),
    "plane": lambda *given, **k: pn.landscape(*given, view="plane", n_points=3, **k),
    "sharpness": lambda *given, **k: pn.sharpness(
        *given, n_steps=3, measures=("worst", "average"), second_order=False, n_starts=1, n_directions=2, **k
    ),
    "functional_distance": pn.functional_distance,
    "compare": lambda *given, **k: pn.compare(*given, hessian=HESSIAN, **k),
}


#: Those that take longest run here with `make test-slow`.
NAMES = cases({name: name for name in ANALYSES}, ("blocks", "eigenpairs"))


@pytest.mark.parametrize("name", NAMES)
def test_networks_states_and_files_give_the_same(name: str, nets: dict[str, nn.Module], files: list[Path]) -> None:
    analyse, options = ANALYSES[name], {"data": DATA, "loss": F.cross_entropy, "progress": False}
    of_files = analyse(files, model=network(9), **options)
    states = {key: net.state_dict() for key, net in nets.items()}
    mixed = {"a": nets["a"], "b": states["b"], "c": files[2]}
    for given in (nets, states, mixed):
        xr.testing.assert_equal(analyse(given, model=network(9), **options), of_files)


@pytest.mark.parametrize("name", NAMES)
def test_networks_without_names_are_numbered(name: str, nets: dict[str, nn.Module]) -> None:
    ds = ANALYSES[name](list(nets.values()), data=DATA, loss=F.cross_entropy, progress=False)
    labels = ds["point" if name == "plane" else "checkpoint"].values.tolist()
    assert sorted(labels) == ["network 1", "network 2", "network 3"]


def test_a_single_network_is_enough(nets: dict[str, nn.Module]) -> None:
    options = {"data": DATA, "progress": False}
    ds = pn.hessian(nets["a"], loss=F.cross_entropy, n_hvp=60, **options)  # 51 parameters: all of them
    assert ds.checkpoint.values.tolist() == ["network"]
    op = pn.HessianOperator(deepcopy(nets["a"]).double(), F.cross_entropy, [(X.double(), Y)])
    exact = torch.linalg.eigvalsh(op.to_dense())
    assert float(ds.lambda_max[0]) == pytest.approx(float(exact[-1]), rel=1e-4)  # float32 products
    assert pn.saturation(nets["b"], **options).layer.values.tolist() == ["1"]
    line = pn.landscape([nets["b"], nets["c"]], n_points=3, **options)
    assert line.sizes["position"] == 3


def test_loaders_and_losses_of_ones_own(nets: dict[str, nn.Module]) -> None:
    loader = DataLoader(TensorDataset(X, Y), batch_size=16)
    ds = pn.compare({"sgd": nets["a"], "sam": nets["b"]}, data=loader, loss=F.cross_entropy, progress=False)
    assert ds.checkpoint.values.tolist() == ["sgd", "sam"]
    assert ds.attrs["loss"] == "cross_entropy"
    with torch.no_grad():
        expected = [float(F.cross_entropy(net(X), Y)) for net in (nets["a"], nets["b"])]
    np.testing.assert_allclose(ds.loss.sel(split="train"), expected, rtol=1e-6)
    twice = pn.sharpness(
        nets["a"],
        data=loader,
        loss=lambda o, t: 2 * F.cross_entropy(o, t),
        n_steps=2,
        measures=("worst", "average"),
        second_order=False,
        progress=False,
    )
    assert float(twice.loss[0]) == pytest.approx(2 * expected[0], rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_users_networks_stay_as_they_are(name: str, nets: dict[str, nn.Module]) -> None:
    nets["b"].train()
    nets["c"].eval()
    before = deepcopy(nets)
    ANALYSES[name](nets, data=DATA, loss=F.cross_entropy, progress=False)
    for key, net in nets.items():
        for (_, own), (_, then) in zip(net.state_dict().items(), before[key].state_dict().items(), strict=True):
            assert torch.equal(own, then)
        assert [m.training for m in net.modules()] == [m.training for m in before[key].modules()]
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
        assert all(p.grad is None for p in net.parameters())


def test_architectures_may_differ_where_functions_are_compared(nets: dict[str, nn.Module]) -> None:
    torch.manual_seed(1)
    wide = nn.Sequential(nn.Linear(4, 20), nn.ReLU(), nn.Linear(20, 3))
    ds = pn.compare({"narrow": nets["a"], "wide": wide}, data=DATA, hessian=HESSIAN, progress=False)
    assert np.isnan(float(ds.distance[0, 1]))
    assert float(ds.disagreement[0, 1]) > 0


def test_runs_files_and_networks_stand_in_the_same_place(tiny_run: Run, tmp_path: Path) -> None:
    ds = pn.sharpness(
        {"mine": tiny_run},
        checkpoints=["plain"],
        n=50,
        n_steps=2,
        measures=("worst", "average"),
        second_order=False,
        n_starts=1,
        progress=False,
    )
    assert ds.checkpoint.values.tolist() == ["plain"]
    by_path = pn.sharpness(
        str(tiny_run.path),
        checkpoints=["plain"],
        n=50,
        n_steps=2,
        measures=("worst", "average"),
        second_order=False,
        n_starts=1,
        progress=False,
    )
    xr.testing.assert_equal(ds, by_path)
    labels = [source.label for source in as_sources([{"mine": tiny_run}, [tiny_run.path, network(0)]])]
    assert labels == ["mine", "tiny", "networks"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([{"a": torch.zeros(3)}], "give model="),
        ([{"a": torch.zeros(3), "epoch": 3}], "a state dict holds tensors only, but 'epoch' is a int"),
        ([{"net": 3}], "net: a int is no run, network, state dict or weights file"),
        ([[network(0)], {"network": network(1)}], "two networks are called 'network'"),
        ([Path(__file__)], "is a file; weights need the network they belong to"),
        (["runs/nowhere"], "no such run directory"),
    ],
)
def test_what_is_none_of_these_is_one_sentence(given: list[Any], message: str) -> None:
    with pytest.raises(PnError, match=message):
        pn.hessian(*given, data=DATA, progress=False)


def test_networks_need_data(nets: dict[str, nn.Module]) -> None:
    with pytest.raises(PnError, match="data=... in Python"):
        pn.hessian(nets, progress=False)
    with pytest.raises(ModelError, match="lacks '0.weight'"):
        pn.trajectory([{"w": torch.zeros(2)}] * 3, model=nets["a"], progress=False)


def test_networks_of_other_functions_with_the_same_weights_are_no_line(nets: dict[str, nn.Module]) -> None:
    relu = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    with pytest.raises(ModelError, match="relu computes something else than a"):
        pn.landscape({"a": nets["a"], "relu": relu}, data=DATA, n_points=3, progress=False)


def test_one_network_under_two_names_keeps_both(nets: dict[str, nn.Module]) -> None:
    twice = {"x": nets["a"], "y": nets["a"]}
    assert pn.saturation(twice, data=DATA, progress=False).checkpoint.values.tolist() == ["x", "y"]
    state = nets["a"].state_dict()
    with pytest.raises(PnError, match="x and y are the same checkpoint"):
        pn.landscape({"x": state, "y": state}, model=network(0), data=DATA, progress=False)


def test_networks_beside_a_run_take_its_data_and_loss(tiny_run: Run) -> None:
    net = as_sources([tiny_run])[0].model(tiny_run.plain)
    ds = pn.compare(tiny_run, {"copy": net}, checkpoints=["plain"], hessian=False, progress=False)
    assert ds.checkpoint.values.tolist() == ["tiny/plain", "networks/copy"]
    assert float(ds.distance[0, 1]) == 0
    np.testing.assert_array_equal(ds.loss[0], ds.loss[1])


@pytest.mark.parametrize("name", ANALYSES)
def test_weights_that_are_not_finite_are_named(name: str, nets: dict[str, nn.Module]) -> None:
    with torch.no_grad():
        nets["b"][2].weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match="network 'b': .*not finite"):
        ANALYSES[name](nets, data=DATA, loss=F.cross_entropy, progress=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("name", ["saturation", "functional_distance", "compare"])
def test_networks_in_other_precisions_are_taken(name: str, dtype: torch.dtype, nets: dict[str, nn.Module]) -> None:
    cast = {key: deepcopy(net).to(dtype) for key, net in nets.items()}
    back = {key: deepcopy(net).float() for key, net in cast.items()}
    options = {"data": DATA, "loss": F.cross_entropy, "progress": False}
    found, expected = ANALYSES[name](cast, **options), ANALYSES[name](back, **options)
    if name == "saturation" and dtype == torch.float64:  # computed in double precision
        xr.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    else:
        xr.testing.assert_equal(found, expected)


class Keeping(nn.Module):
    """Keeps what it has computed, which ``copy.deepcopy`` refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = self.inner(x)
        return self.last


@pytest.mark.parametrize("name", NAMES)
def test_results_that_a_network_keeps_do_not_hinder_copying(name: str) -> None:
    keeping = Keeping()
    keeping(X)
    others = {"b": Keeping(), "c": Keeping()}
    for seed, other in enumerate(others.values(), start=1):
        other.inner.load_state_dict(network(seed).state_dict())
    ANALYSES[name]({"a": keeping, **others}, data=DATA, loss=F.cross_entropy, progress=False)
    assert keeping.last.grad_fn is not None


def test_what_cannot_be_copied_or_built_is_one_sentence() -> None:
    locked = network(0)
    locked.lock = threading.Lock()
    with pytest.raises(ModelError, match="this Sequential cannot be copied"):
        pn.hessian(locked, data=DATA, progress=False)
    with pytest.raises(ModelError, match="model 'Linear' cannot be built"):
        pn.sharpness({"a": network(0).state_dict()}, model=nn.Linear, data=DATA, progress=False)
    with pytest.raises(ModelError, match="has no trainable parameters"):
        pn.sharpness(nn.Flatten(), data=DATA, progress=False)
    with pytest.raises(ModelError, match="none of these networks has trainable parameters"):
        pn.compare(nn.Flatten(), nn.Flatten(), data=DATA, progress=False)


@pytest.mark.parametrize("options", [{"per_layer": True}, {"state": "x"}, {"device": "cpu"}, {"typo": 1}])
def test_comparisons_take_no_other_options_for_spectra(options: dict[str, Any], nets: dict[str, nn.Module]) -> None:
    with pytest.raises(PnError, match=f"no option '{next(iter(options))}'"):
        pn.compare(nets, data=DATA, hessian=options, progress=False)


def test_a_finished_spectrum_of_other_data_is_not_taken(nets: dict[str, nn.Module], tmp_path: Path) -> None:
    options = {"n": None, "state": tmp_path / "state", "progress": False, **HESSIAN}
    pn.hessian(nets["a"], data=DATA, **options)
    other = Y.clone()
    other[0] = (other[0] + 1) % 3
    with pytest.raises(PnError, match="holds unfinished work with data"):
        pn.hessian(nets["a"], data=(X, other), **options)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often weights are read, networks built, data loaded and losses inspected."""
    found: Counter[str] = Counter()

    def count(module: str, name: str, what: str) -> None:
        target = __import__(module, fromlist=["_"])
        original = getattr(target, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            found[what] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(target, name, counted)

    count("pnanalysis.io.runs", "read_state_dicts", "reads")
    count("pnanalysis.inputs.models", "build_model", "builds")
    count("pnanalysis.inputs.sources", "load_data", "loads")
    count("pnanalysis.evaluation.losses", "recognise", "inspections")
    return found


def test_two_runs_are_compared_with_each_file_read_once(
    tiny_run: Run, tiny_config: Config, tmp_path: Path, counts: Counter[str]
) -> None:
    control = train(replace(tiny_config, strategy="restart", iterations=2), tmp_path / "control", progress=False)
    counts.clear()
    pn.compare(tiny_run, control, hessian={"n": 50, **HESSIAN}, n=50, progress=False)
    # two end points and where they started from, and two champions to see whether they are one; a network for each run;
    # one data set
    assert counts["reads"] == 6
    assert counts["builds"] == 2
    assert counts["loads"] == 1
    # one per split and operator, those over halves of the examples included, whatever the number of batches
    assert counts["inspections"] <= 18


@pytest.mark.parametrize("name", ["hessian", "saturation", "plane", "sharpness", "functional_distance", "compare"])
def test_a_users_files_are_each_read_once(name: str, files: list[Path], counts: Counter[str]) -> None:
    ANALYSES[name](files, model="tests.analyses.test_in_memory:make", data=DATA, loss="cross_entropy", progress=False)
    assert counts["reads"] == 3
    assert counts["builds"] == 1


def make() -> nn.Module:
    return network(5)


@pytest.mark.parametrize("analysis", [pn.hessian, pn.landscape, pn.sharpness])
def test_options_without_anything_to_analyse_ask_for_it(analysis, nets: dict[str, nn.Module]) -> None:
    with pytest.raises(RunError, match="name a run, or give networks"):
        analysis(model=nets["a"], data=DATA)


def test_an_iterator_of_runs_takes_options_like_a_list(tiny_run: Run) -> None:
    settings = {"loss": "cross_entropy", "n": 32, "n_steps": 2, "n_directions": 2, "progress": False}
    xr.testing.assert_equal(pn.sharpness(iter([tiny_run]), **settings), pn.sharpness([tiny_run], **settings))


def test_networks_are_aligned_in_either_precision(nets: dict[str, nn.Module]) -> None:
    ds = pn.landscape([nets["a"], nets["b"]], data=DATA, align=True, dtype="float64", n_points=3, progress=False)
    assert ds.path.values.tolist() == ["line", "aligned"]
