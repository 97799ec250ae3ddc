"""Weights of any origin into a network: what torch translates, names, checkpoints of training, and what is refused."""

from __future__ import annotations

from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import weight_norm as hooked_weight_norm

import pnanalysis as pn
from pnanalysis.errors import ModelError
from pnanalysis.geometry.distances import state_distance
from pnanalysis.inputs.loading import WeightNames, load_weights
from pnanalysis.io.weights import read_state_dicts

X, Y = torch.randn(12, 4), torch.randint(3, (12,))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(6), nn.LazyBatchNorm1d(), nn.Tanh(), nn.Linear(6, 3))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
        self.out.weight = self.into.weight

    def forward(self, inputs: Tensor) -> Tensor:
        return self.out(torch.tanh(self.into(inputs)))


class Doubled(nn.Linear):
    """A layer whose first version stored half of its weight."""

    _version = 2

    def __init__(self) -> None:
        super().__init__(4, 3)

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, metadata: Any, *rest: Any) -> None:
        if metadata.get("version") != 2:
            state[f"{prefix}weight"] = 2 * state[f"{prefix}weight"]
        super()._load_from_state_dict(state, prefix, metadata, *rest)


class Masked(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 3)
        self.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))


class Inside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = mlp()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)


def prefixed(prefix: str, network: nn.Module) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in network.state_dict().items()}


def hooked() -> nn.Module:
    return nn.Sequential(hooked_weight_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 3))


def parametrised() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 3))


def of_first_version(network: nn.Module) -> dict[str, Tensor]:
    return {"weight": network.state_dict()["weight"] / 2, "bias": network.state_dict()["bias"]}


def half_tied(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in network.state_dict().items() if name != "into.weight"}


def of_training(network: nn.Module) -> dict[str, Any]:
    optimizer = torch.optim.Adam(network.parameters())
    sum(p.sum() for p in network.parameters()).backward()
    optimizer.step()
    return {
        "state_dict": prefixed("model._orig_mod.", network) | {"loss.weight": torch.ones(3)},
        "optimizer": optimizer.state_dict(),
        "args": Namespace(lr=0.1),
        "score": np.float64(0.5),
        "folder": Path("here"),
        "epoch": 3,
    }


#: Name: the trained network, the network as it is built, and what was saved of the trained one.
FITTING: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], Callable[[nn.Module], Any]]] = {
    "as it is": (mlp, mlp, nn.Module.state_dict),
    "DDP": (mlp, mlp, lambda net: prefixed("module.", net)),
    "compiled DDP": (mlp, mlp, lambda net: prefixed("_orig_mod.module.", net)),
    "part of a larger module": (mlp, mlp, lambda net: prefixed("network.backbone.", net)),
    "bare weights of a wrapped network": (mlp, Inside, nn.Module.state_dict),
    "averaged model": (mlp, mlp, lambda net: torch.optim.swa_utils.AveragedModel(net).state_dict()),
    "checkpoint of training": (mlp, mlp, of_training),
    "generator": (
        mlp, mlp, lambda net: {"generator": net.state_dict(), "critic": nn.Linear(3, 1).state_dict(), "epoch": 1},
    ),
    "one state dict under two names": (
        mlp, mlp, lambda net: dict.fromkeys(("model", "best"), net.state_dict()) | {"epoch": 1},
    ),
    "float64": (mlp, mlp, lambda net: {name: tensor.double() for name, tensor in net.state_dict().items()}),
    "tied, the second name": (Tied, Tied, half_tied),
    "before num_batches_tracked": (
        normed, normed, lambda net: {k: t for k, t in net.state_dict().items() if "num_batches" not in k},
    ),
    "hook-form weight_norm": (hooked, parametrised, nn.Module.state_dict),
    "translated values": (Doubled, Doubled, of_first_version),
    "version of the module": (Doubled, Doubled, nn.Module.state_dict),
    "version of the module, in a checkpoint": (Doubled, Doubled, lambda net: {"net": net.state_dict(), "epoch": 1}),
    "lazy": (lazy, lazy, nn.Module.state_dict),
    "lazy DDP": (lazy, lazy, lambda net: prefixed("module.", net)),
    "a mask of infinities": (Masked, Masked, nn.Module.state_dict),
}  # fmt: skip


def trained(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    network = make()
    network(X)
    return network.eval()


@pytest.mark.parametrize("kind", FITTING)
def test_weights_come_into_the_network_whatever_their_names(kind: str, tmp_path: Path) -> None:
    make, build, saved = FITTING[kind]
    networks = [trained(make, seed) for seed in range(3)]
    files = [tmp_path / f"{i}.pt" for i in range(3)]
    for network, file in zip(networks, files, strict=True):
        torch.save(saved(network), file)
    source = pn.open_files(build, files, data=(X, Y))
    for network, checkpoint in zip(networks, source.checkpoints, strict=True):
        torch.testing.assert_close(source.model(checkpoint)(X), network(X))
    names = [name for name, _ in networks[0].named_parameters()]
    states = [network.state_dict() for network in networks]
    distances = [state_distance(state, states[0], names) for state in states]
    for given in (source, [torch.load(file, weights_only=False) for file in files]):
        options = {} if given is source else {"model": build}
        ds = pn.trajectory(given, projections=["pca"], progress=False, **options)
        np.testing.assert_allclose(ds.distance_from_start, distances, rtol=1e-6)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_sharded_weights_are_read_from_their_index_or_folder(tmp_path: Path, suffix: str) -> None:
    networks, folders = [trained(mlp, seed) for seed in range(3)], [tmp_path / f"step-{i}.0" for i in range(3)]
    for network, folder in zip(networks, folders, strict=True):
        folder.mkdir()
        state, files = network.state_dict(), [f"1.{suffix}", f"2.{suffix}"]
        for file, half in zip(files, (list(state)[:2], list(state)[2:]), strict=True):
            part = {name: state[name] for name in half}
            save_file(part, folder / file) if suffix == "safetensors" else torch.save(part, folder / file)
        where = ", ".join(f'"{name}": "{files[i > 1]}"' for i, name in enumerate(state))
        stem = "model" if suffix == "safetensors" else "pytorch_model"
        (folder / f"{stem}.{suffix}.index.json").write_text(f'{{"weight_map": {{{where}}}}}')
    source = pn.open_files(mlp, folders, data=(X, Y))
    assert list(source.select(None)) == ["step-0.0", "step-1.0", "step-2.0"]
    assert [*pn.open_files(mlp, [c.path for c in source.checkpoints]).select(None)][1] == f"step-1.0/{stem}"
    torch.testing.assert_close(source.model(source.checkpoints[1])(X), networks[1](X))
    distance = state_distance(networks[2].state_dict(), networks[0].state_dict(), list(networks[0].state_dict()))
    assert float(pn.trajectory(source, progress=False).distance_from_start[2]) == pytest.approx(distance, rel=1e-6)
    (folders[0] / files[1]).unlink()
    with pytest.raises(ModelError, match="is missing, though"):
        source.model(source.checkpoints[0])
    (folders[1] / f"{stem}.{suffix}.index.json").write_text('{"weight_map": {"0.weight": "../elsewhere"}}')
    with pytest.raises(ModelError, match="not in its own folder"):
        source.model(source.checkpoints[1])
    with pytest.raises(ModelError, match="a folder of weights; weights need the network"):
        pn.trajectory(folders[2])


REFUSED: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any], str]] = {
    "weights and their average": (
        mlp, lambda net: {"model": net.state_dict(), "ema": prefixed("", net)}, "under 'model' and under 'ema' that",
    ),
    "two parts that fit": (
        mlp, lambda net: prefixed("model.", net) | prefixed("teacher.", net), "under 'model' and under 'teacher' that",
    ),
    "a part of a network that is no network": (mlp, lambda net: prefixed("3.", net) | {"4.a": X}, "lacks '0.weight'"),
    "int8": (
        mlp, lambda net: {name: (9 * t).to(torch.int8) for name, t in net.state_dict().items()}, "is int8: quantised",
    ),
    "complex": (mlp, lambda net: {k: t.to(torch.cfloat) for k, t in net.state_dict().items()}, "imaginary parts"),
    "a pickled network": (mlp, lambda net: net, "a pickled object, which could run code"),
    "a pickled network in a dict": (mlp, lambda net: {"model": net, "epoch": 1}, "'model' is a pickled object"),
    "other things beside tensors": (mlp, lambda net: net.state_dict() | {"epoch": 3}, "'epoch' is a int; leave it out"),
    "tied weights that differ": (
        Tied, lambda net: net.state_dict() | {"into.weight": torch.eye(4)}, "different values for 'into.weight' and",
    ),
    "nothing": (mlp, lambda net: {"epoch": 3}, "holds no state dict"),
    "the meta device": (
        lambda: nn.Linear(4, 3, device="meta"), lambda net: nn.Linear(4, 3).state_dict(), "on the meta device",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_fit_or_could_run_code_is_one_sentence(kind: str, tmp_path: Path) -> None:
    make, saved, message = REFUSED[kind]
    torch.save(saved(make()), tmp_path / "w.pt")
    source = pn.open_files(make, [tmp_path / "w.pt"], data=(X, Y))
    with pytest.raises(ModelError, match=message):
        source.model(source.checkpoints[0])


def test_quantised_state_dicts_are_refused(tmp_path: Path) -> None:
    torch.save({"0.scale": torch.ones(1), "0._packed_params.dtype": torch.qint8}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="as quantised networks do; give the weights before quantisation"):
        read_state_dicts(tmp_path / "w.pt")


def test_checkpoints_in_memory_are_told_from_networks_by_name() -> None:
    net = mlp()
    checkpoint = {"state_dict": prefixed("model.", net), "epoch": 1}
    ds = pn.compare(checkpoint, net, model=mlp, data=(X, Y), hessian=False, progress=False)
    assert float(ds.distance[0, 1]) == 0
    named = pn.compare({"a": net.state_dict(), "b": mlp().state_dict()}, model=mlp, data=(X, Y), hessian=False)
    assert list(named.checkpoint.values) == ["a", "b"]


def test_networks_without_values_are_refused_in_memory() -> None:
    for analysis in (pn.hessian, pn.sharpness):
        with pytest.raises(ModelError, match=r"'0.weight' has no shape yet; run the network on one batch"):
            analysis(lazy(), data=(X, Y), progress=False)
    with pytest.raises(ModelError, match="has no shape yet"):
        pn.trajectory([lazy(), lazy(), lazy()], progress=False)


def test_names_are_found_once_for_files_of_one_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    names, loads = WeightNames(mlp()), []
    load = nn.Module.load_state_dict
    monkeypatch.setattr(nn.Module, "load_state_dict", lambda *a, **k: loads.append(1) or load(*a, **k))
    states = [{"": prefixed("module.", mlp())} for _ in range(5)]
    found = [names.find(state, "w") for state in states]
    n_loads = len(loads)
    assert found[0]["0.weight"] == ("", "module.0.weight")
    assert all(where == found[0] for where in found)
    names.find(states[0], "w")
    assert len(loads) == n_loads <= 2
    assert names.find({"": prefixed("", mlp())}, "w")["0.weight"] == ("", "0.weight")


def test_values_that_loading_computes_are_not_taken_from_the_file() -> None:
    assert WeightNames(Doubled()).find({"": of_first_version(Doubled())}, "w") is None
    in_place = Doubled()
    in_place.register_load_state_dict_pre_hook(lambda module, state, *_: state["bias"].add_(1))
    assert WeightNames(in_place).find({"": OrderedDict(prefixed("", in_place))}, "w") is None


class Stateful(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)
        self.scale = {"by": 1.0}

    def get_extra_state(self) -> Any:
        return self.scale

    def set_extra_state(self, state: Any) -> None:
        self.scale = state


def test_extra_state_is_loaded_where_there_is_some_and_never_shared() -> None:
    net, other = Stateful(), Stateful()
    net.scale["by"] = 2.0
    load_weights(other, net.state_dict())
    assert other.scale == {"by": 2.0}
    assert other.scale is not net.scale
    load_weights(other, {name: tensor for name, tensor in net.state_dict().items() if isinstance(tensor, Tensor)})
    assert other.scale == {"by": 2.0}
