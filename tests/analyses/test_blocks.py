"""Blocks as data: against dense matrices, over data sets drawn anew, of rounded weights, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from safetensors.torch import save_file, save_model
from torch import Tensor, nn
from torch.nn import functional as F

import pnanalysis as pn
from pnanalysis.analyses.blocks import stack
from pnanalysis.analyses.compared_blocks import block_differences
from pnanalysis.curvature.example_groups import N_GROUPS, in_groups
from pnanalysis.curvature.operators import EmpiricalFisherOperator, GGNOperator, HessianOperator
from pnanalysis.errors import CurvatureError, PnError
from tests.curvature.conftest import NETWORKS, dense_hessian, images, relative, squared_error
from tests.curvature.test_blocks import Attention

QUIET: dict[str, Any] = {"progress": False, "n": None}
KINDS = {"hessian": HessianOperator, "ggn": GGNOperator, "fisher": EmpiricalFisherOperator}


def owners(model: nn.Module) -> np.ndarray:
    """The number of the layer of each parameter."""
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name, _ in model.named_parameters()))
    return np.concatenate(
        [np.full(p.numel(), layers.index(name.rpartition(".")[0])) for name, p in model.named_parameters()]
    )


def energies(H: np.ndarray, owner: np.ndarray) -> np.ndarray:
    member = (owner == np.arange(owner.max() + 1)[:, None]).astype(float)
    return member @ H**2 @ member.T


@pytest.mark.parametrize(
    ("network", "kind"),
    [
        ("linear", "hessian"),
        ("conv", "hessian"),
        ("conv", "ggn"),
        ("tanh", "fisher"),
        ("layernorm", "hessian"),
        *(pytest.param(name, "hessian", marks=pytest.mark.slow) for name in ("tanh", "maxpool", "batchnorm")),
    ],
)
def test_small_networks_are_exact(network: str, kind: str) -> None:
    loss: Callable[..., Any] = squared_error if network == "linear" else F.cross_entropy
    model, batches = NETWORKS[network](), images((20, 12))
    ds = pn.blocks(model, data=batches, loss=loss, operator=kind, dtype="float64", diagonal=True, **QUIET).squeeze()
    H = KINDS[kind](model, loss, batches).to_dense().numpy()
    if kind == "hessian":
        assert relative(torch.from_numpy(H), dense_hessian(model, batches, loss)) < 1e-9
    owner = owners(model)
    energy = energies(H, owner)
    np.testing.assert_allclose(np.atleast_1d(ds.trace), np.bincount(owner, np.diag(H)), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(np.atleast_2d(ds.energy), energy, rtol=1e-9, atol=1e-16)
    np.testing.assert_allclose(np.atleast_1d(ds.frobenius_norm), np.diag(energy) ** 0.5, rtol=1e-9)
    np.testing.assert_allclose(ds.diagonal.sel(statistic="value"), np.diag(H), atol=1e-12)
    np.testing.assert_allclose(ds.network_trace, np.trace(H))
    assert (ds.trace_probe_se == 0).all()
    assert ds.attrs["estimator"] == "exact"
    assert int(ds.n_hvp) == len(H)


def bigger() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def small() -> nn.Module:
    """With a third of those parameters, for what is computed exactly several times."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def drawn(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 20, dtype=torch.float64, generator=generator)
    return x, (x[:, :3] + 0.5 * torch.randn(n, 3, dtype=torch.float64, generator=generator)).argmax(1)


def test_sampled_numbers_are_within_their_errors_of_the_matrix() -> None:
    model, data = bigger(), drawn(96, 0)
    ds = pn.blocks(model, data=data, dtype="float64", n_hvp=80, diagonal=True, **QUIET).squeeze("checkpoint")
    H = HessianOperator(model, F.cross_entropy, [data]).to_dense().numpy()
    owner = owners(model)
    energy = energies(H, owner)
    for value, truth in (("trace", np.bincount(owner, np.diag(H))), ("energy", energy),
                         ("frobenius_norm", np.diag(energy) ** 0.5),
                         ("off_diagonal_energy", energy.sum(1) - np.diag(energy))):  # fmt: skip
        z = (ds[value] - truth) / ds[f"{value}_probe_se"]
        assert np.abs(z).max() < 4, value
    z = (ds.diagonal.sel(statistic="value") - np.diag(H)) / ds.diagonal.sel(statistic="probe_se")
    assert 0.8 < float((z**2).mean()) ** 0.5 < 1.3
    np.testing.assert_allclose(float(ds.trace.sum()), float(ds.network_trace))
    assert ds.attrs["n_known"] + ds.attrs["n_probes"] == int(ds.n_hvp) == 80


def test_errors_of_examples_by_signs_are_those_of_the_exact_matrix() -> None:
    model, data = bigger(), drawn(320, 1)
    sampled, exact = (
        pn.blocks(model, data=data, dtype="float64", n_hvp=n_hvp, diagonal=True, **QUIET).squeeze("checkpoint")
        for n_hvp in (120, 10_000)
    )
    for name in ("trace", "frobenius_norm", "off_diagonal_energy", "energy"):
        ratio = (sampled[f"{name}_data_se"] / exact[f"{name}_data_se"]).values
        assert (ratio > 0.6).all(), name
        assert ratio.ravel()[0] < 2, name  # of blocks that are small beside what couples them to others, it is larger
    each = sampled.diagonal.sel(statistic="data_se") / exact.diagonal.sel(statistic="data_se")
    assert 0.8 < float(each.median()) < 3


def test_groups_leave_the_matrix_as_it_is() -> None:
    model, batches = bigger(), [drawn(50, 0), drawn(30, 1)]
    op = HessianOperator(model, F.cross_entropy, batches)
    grouped = in_groups(op, 3)
    V = torch.randn(op.shape[0], 3, dtype=torch.float64)
    parts = list(grouped.matmat_by_group(V))
    assert [group for group, _ in parts] == list(range(N_GROUPS))
    torch.testing.assert_close(sum(part for _, part in parts), op.matmat(V))
    np.testing.assert_allclose(grouped.shares, 1 / N_GROUPS)
    with pytest.warns(UserWarning, match="do not fit"):
        grouped.op._halve_passes()  # as where memory does not suffice
    grouped.op._read(grouped.op.batches.source)
    grouped.op._keep_nothing()
    again = list(grouped.matmat_by_group(V))
    for (_, one), (_, other) in zip(parts, again, strict=True):
        torch.testing.assert_close(one, other)


def test_weights_of_examples_and_a_penalty_count() -> None:
    model = bigger()
    x, y = drawn(64, 0)
    y[::3] = -100  # ignored
    op = HessianOperator(model, F.cross_entropy, [(x, y)], weight_decay=0.3)
    ds = pn.blocks(op, n_hvp=10_000, diagonal=True, progress=False)
    H = op.to_dense().numpy()
    np.testing.assert_allclose(ds.diagonal.sel(statistic="value"), np.diag(H), atol=1e-12)
    np.testing.assert_allclose(ds.energy, energies(H, owners(model)), rtol=1e-9)
    sampled = pn.blocks(op, n_hvp=100, progress=False)
    assert (np.abs(sampled.trace - ds.trace) < 4 * sampled.trace_probe_se).all()


@pytest.mark.parametrize(
    "options", [{"bn_mode": "train"}, {"method": "finite_difference"}], ids=["statistics of batches", "differences"]
)
def test_examples_that_cannot_be_grouped_leave_the_error_out(options: dict[str, Any]) -> None:
    model, batches = NETWORKS["batchnorm"](), images((20, 12))
    with pytest.warns(UserWarning, match="no error for the choice of examples"):
        ds = pn.blocks(model, data=batches, dtype="float64", n_hvp=40, **options, **QUIET)
    assert ds.trace_data_se.isnull().all()
    assert ds.attrs["data_error"] == "none"
    np.testing.assert_allclose(ds.trace_se, ds.trace_probe_se)
    H = dense_hessian(model, batches, bn_train=options.get("bn_mode") == "train").numpy()
    assert (np.abs(ds.network_trace - np.trace(H)) < 4 * ds.network_trace_se).all()


def test_many_batches_that_cannot_be_mixed_are_groups() -> None:
    model, batches = NETWORKS["batchnorm"](), images((4,) * 10)
    ds = pn.blocks(model, data=batches, dtype="float64", bn_mode="train", **QUIET).squeeze("checkpoint")
    H = dense_hessian(model, batches, bn_train=True).numpy()
    np.testing.assert_allclose(ds.energy, energies(H, owners(model)), rtol=1e-7)
    assert (ds.trace_data_se > 0).all()


def test_queries_keys_and_values_have_blocks_of_their_own() -> None:
    torch.manual_seed(0)
    model = Attention(transposed=True).double()
    x, y = torch.randn(24, 3, 4, dtype=torch.float64), torch.arange(24) % 3
    ds = pn.blocks(model, data=(x, y), blocks="qkv", dtype="float64", **QUIET).squeeze("checkpoint")
    assert ds.block.values.tolist() == ["c_attn[q]", "c_attn[k]", "c_attn[v]", "c_proj"]
    for label in ("c_attn[q]", "c_attn[v]"):
        alone = HessianOperator(model, F.cross_entropy, [(x, y)], params=label).to_dense()
        np.testing.assert_allclose(ds.trace.sel(block=label), alone.trace())
        np.testing.assert_allclose(ds.frobenius_norm.sel(block=label), alone.norm())


def test_rounding_a_block_is_measured() -> None:
    model, data = small(), drawn(96, 0)
    ds = pn.blocks(model, data=data, bits=[3, 10], dtype="float64", n_hvp=10_000, **QUIET).squeeze("checkpoint")
    H = HessianOperator(model, F.cross_entropy, [data]).to_dense().numpy()
    owner = owners(model)
    weights = np.concatenate([np.full(p.numel(), p.ndim > 1) for p in model.parameters()])
    start = float(F.cross_entropy(model(data[0]), data[1]).detach())
    for bits in (3, 10):
        at = ds.sel(bits=bits)
        change = np.zeros(len(H))
        for i, layer in enumerate((0, 2, 4)):
            step = model[layer].weight.detach().abs().max() / (2 ** (bits - 1) - 1)
            new = copy.deepcopy(model)
            new[layer].weight.data = (model[layer].weight.detach() / step).round() * step
            own = (new[layer].weight - model[layer].weight).detach().flatten().numpy()
            where = (owner == i) & weights
            change[where] = own
            mean = np.diag(H)[where].sum() / where.sum()
            np.testing.assert_allclose(at.squared_change[i], own @ own)
            np.testing.assert_allclose(at.sensitivity[i], mean * (own @ own), rtol=1e-9)
            np.testing.assert_allclose(at.quadratic[i], own @ H[np.ix_(where, where)] @ own / 2, rtol=1e-9)
            increase = float(F.cross_entropy(new(data[0]), data[1]).detach()) - start
            np.testing.assert_allclose(at.loss_increase[i], increase, atol=1e-12)
        np.testing.assert_allclose(at.quadratic_all, change @ H @ change / 2, rtol=1e-9)
    fine = ds.sel(bits=10)
    np.testing.assert_allclose(fine.linear + fine.quadratic, fine.loss_increase, rtol=0.05)
    assert sorted(fine["rank"].values) == [1, 2, 3]
    assert fine.sensitivity[int(np.argmin(fine["rank"].values))] == fine.sensitivity.max()
    np.testing.assert_allclose(fine.rank_probability.sum("place"), 1)
    np.testing.assert_allclose(fine.rank_probability.sum("block"), 1)


def by_rows(name: str, weights: Tensor) -> Tensor:
    """Eight numbers for each row, from its least to its largest; biases to a hundredth, but for the last."""
    if weights.ndim < 2:
        return weights if name.startswith("4") else (100 * weights).round() / 100
    low, high = weights.min(1, keepdim=True)[0], weights.max(1, keepdim=True)[0]
    return low + ((weights - low) / (high - low) * 7).round() / 7 * (high - low)


def test_any_quantisation_is_ranked(tmp_path: Path) -> None:
    """A function, a file and a network: all against the dense matrix, biases included where they change."""
    model, data = small(), drawn(96, 0)
    state = {name: by_rows(name, tensor) for name, tensor in model.state_dict().items()}
    network = copy.deepcopy(model)
    network.load_state_dict(state)
    save_file(state, tmp_path / "low.safetensors")
    options: dict[str, Any] = {"data": data, "dtype": "float64", "n_hvp": 10_000} | QUIET
    ds = pn.blocks(model, quantised=by_rows, bits=3, **options).squeeze("checkpoint")
    assert ds.bits.values.tolist() == [3, 0]
    assert ds.attrs["quantised"] == "by_rows"
    H = HessianOperator(model, F.cross_entropy, [data]).to_dense().numpy()
    pieces = [(state[name] - p.detach()).flatten().numpy() for name, p in model.named_parameters()]
    change, covered = np.concatenate(pieces), np.concatenate([np.full(len(piece), piece.any()) for piece in pieces])
    assert 0 < covered.sum() < len(H)
    assert np.abs(change[np.concatenate([np.full(p.numel(), p.ndim < 2) for p in model.parameters()])]).max() > 0
    owner, at = owners(model), ds.sel(bits=0)
    for i in range(3):
        own = np.where(owner == i, change, 0)
        mean = np.diag(H)[(owner == i) & covered].mean()
        np.testing.assert_allclose(at.sensitivity[i], mean * (own @ own), rtol=1e-9)
        np.testing.assert_allclose(at.quadratic[i], own @ H @ own / 2, rtol=1e-9)
    np.testing.assert_allclose(at.quadratic_all, change @ H @ change / 2, rtol=1e-9)
    start, end = (float(F.cross_entropy(net(data[0]), data[1]).detach()) for net in (model, network))
    np.testing.assert_allclose(at.loss_increase_all, end - start, atol=1e-12)
    again = pn.blocks({"network": model}, quantised={"network": tmp_path / "low.safetensors"}, **options)
    np.testing.assert_allclose(again.sensitivity[0, 0], at.sensitivity, rtol=1e-12)
    op = HessianOperator(model, F.cross_entropy, [data])
    np.testing.assert_allclose(pn.blocks(op, quantised=network, n_hvp=10_000, **QUIET).sensitivity[0], at.sensitivity)


def test_sensitivities_to_any_quantisation_are_within_their_errors_and_resumed(tmp_path: Path) -> None:
    model, data = small(), drawn(48, 0)
    options: dict[str, Any] = {"data": data, "dtype": "float64", **QUIET}
    exact = pn.blocks(model, quantised=by_rows, n_hvp=10_000, **options)
    few, again, other = (
        pn.blocks(model, quantised=scheme, n_hvp=24, state=tmp_path / "work", **options)
        for scheme in (by_rows, by_rows, lambda name, weights: 0.9 * weights)
    )
    assert (few.sensitivity_probe_se > 0).all()
    assert (np.abs(few.sensitivity - exact.sensitivity) < 4 * few.sensitivity_probe_se).all()
    np.testing.assert_array_equal(again.sensitivity, few.sensitivity)
    assert (other.squared_change != few.squared_change).any()


class HeadsFirst(nn.Module):
    """Attention whose queries, keys and values of one head lie together, as in some of timm's layers."""

    def __init__(self, normalised: bool = False, heads_first: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.num_heads, self.heads_first = 2, heads_first
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 3)
        self.norm = nn.LayerNorm(4) if normalised else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.qkv(x)
        if self.heads_first:
            q, k, v = mixed.unflatten(-1, (2, 3, 4)).permute(3, 0, 2, 1, 4)
        else:
            q, k, v = mixed.unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(self.norm(q), self.norm(k), v).transpose(1, 2).flatten(-2)
        out: Tensor = self.proj(attended).mean(1)
        return out


@pytest.mark.parametrize("blocks", ["qkv", "heads", ["qkv[q]", "qkv[k]"], {"first": "qkv[v.0/2]"}])
def test_fused_layers_with_their_heads_first_are_refused(blocks: Any) -> None:
    data = (torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 3)
    options: dict[str, Any] = {"data": data, "loss": F.cross_entropy, "blocks": blocks, "n_hvp": 20, **QUIET}
    with pytest.raises(CurvatureError, match="'qkv' does not hold queries, keys and values one after the other"):
        pn.blocks(HeadsFirst(), **options)
    with pytest.raises(CurvatureError, match="'qkv' does not hold queries, keys and values one after the other"):
        pn.blocks(HessianOperator(HeadsFirst(), F.cross_entropy, [data]), blocks=blocks, n_hvp=20, **QUIET)
    for normalised in (False, True):  # which attention does not mind
        assert pn.blocks(HeadsFirst(normalised, heads_first=False), **options).trace.notnull().all()
    marked = HeadsFirst()
    marked.head_first = True  # type: ignore[assignment]
    if blocks == "heads":
        assert "qkv" in pn.blocks(marked, **options).block  # stays whole
    else:
        with pytest.raises(CurvatureError, match="queries, keys and values one after the other|no .* known by name"):
            pn.blocks(marked, **options)


class TiedWords(nn.Module):
    """A language model whose output layer is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.inner, self.head = nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 7, bias=False)
        self.head.weight = self.words.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(torch.tanh(self.inner(self.words(inputs).mean(1))))
        return out


def test_quantised_weights_may_have_any_name_of_a_tied_weight(tmp_path: Path) -> None:
    network, low = TiedWords(), TiedWords()
    low.load_state_dict({name: torch.round(tensor * 4) / 4 for name, tensor in network.state_dict().items()})
    generator = torch.Generator().manual_seed(0)
    data = (torch.randint(7, (40, 3), generator=generator), torch.randint(7, (40,), generator=generator))
    save_model(low, str(tmp_path / "low.safetensors"))  # which keeps one name of each tensor
    states = [low, tmp_path / "low.safetensors"]
    for name in ("words.weight", "head.weight"):
        states.append({name: low.head.weight.detach(), "inner.weight": low.inner.weight.detach(),
                       "inner.bias": low.inner.bias.detach()})  # fmt: skip
    options: dict[str, Any] = {"data": data, "loss": F.cross_entropy, "n_hvp": 100, **QUIET}
    found = [pn.blocks(network, quantised=state, **options).squeeze("checkpoint") for state in states]
    with torch.no_grad():
        rise = F.cross_entropy(low(data[0]), data[1]) - F.cross_entropy(network(data[0]), data[1])
    for ds in found:
        np.testing.assert_allclose(ds.loss_increase_all, float(rise), rtol=1e-4)
        np.testing.assert_allclose(ds.loss_increase, found[0].loss_increase, rtol=1e-5)
    both = {**states[2], "head.weight": low.head.weight.detach() + 1}
    with pytest.raises(PnError, match="'words.weight' and 'head.weight' differ, and are one in the network"):
        pn.blocks(network, quantised=both, **options)


def test_quantised_weights_that_do_not_fit_are_refused() -> None:
    model, data = small(), drawn(32, 0)
    state = model.state_dict()
    for given, says in (
        ({"weight": state["0.weight"]}, "have 'weight', which the network does not have"),
        ({"0.weight": state["0.weight"][:2]}, "'0.weight' has the shape .* of shape"),
        ({"0.weight": state["0.weight"].to(torch.int8)}, "quantised to torch.int8; give the numbers"),
        (lambda name, weights: None, "a NoneType when quantised"),
        (lambda name, weights: weights / 0, "not finite when quantised"),
        (3, "quantised is a int"),
        ({"other": state}, "quantised has 'other'"),
    ):
        with pytest.raises(PnError, match=says):
            pn.blocks({"network": model}, data=data, quantised=given, **QUIET)
    with pytest.raises(CurvatureError, match="neither spectra nor quantisation"):
        pn.blocks(np.eye(3), blocks={"a": 3}, quantised=by_rows, progress=False)


class Sum(nn.Module):
    """Logits that are the sum of those of three layers: two of equal standing, and one that hardly counts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(20, 3, bias=False)
        self.b, self.c = copy.deepcopy(self.a), copy.deepcopy(self.a)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x.roll(7, 1)) + self.c(x / 10)


def test_ranks_of_equal_blocks_are_uncertain_and_those_of_unlike_ones_are_not() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(128, 20, dtype=torch.float64), torch.arange(128) % 3
    ds = pn.blocks(Sum(), data=(x, y), bits=4, dtype="float64", n_hvp=16, **QUIET)
    ds = ds.squeeze(("checkpoint", "bits"))
    assert ds.rank_low.sel(block="c") == ds.rank_high.sel(block="c") == 3
    assert ds.rank_low.sel(block="a") == 1
    assert ds.rank_high.sel(block="a") == 2
    assert 0.02 < float(ds.rank_probability.sel(block="a", place=1)) < 0.98


def test_blocks_of_which_nothing_is_rounded_take_no_rank() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 3)).double()
    x, y = torch.randn(64, 5, dtype=torch.float64), torch.arange(64) % 3
    ds = pn.blocks(model, data=(x, y), bits=3, dtype="float64", **QUIET).squeeze(("checkpoint", "bits"))
    assert sorted(ds["rank"].values[[0, 2]]) == [1, 2]
    assert ds.rank_high.max() == 2  # of two that are rounded, none is the third
    assert np.isnan(ds["rank"][1])
    np.testing.assert_allclose(ds.rank_probability.sel(place=[1, 2]).sum("block"), 1)
    assert np.isnan(ds.rank_probability[1]).all()


def test_effects_of_rounding_are_those_on_the_data_without_weight_decay() -> None:
    model, data = bigger(), drawn(96, 0)
    plain, decayed, sampled = (
        pn.blocks(HessianOperator(model, F.cross_entropy, [data], weight_decay=decay), bits=8, n_hvp=n_hvp, **QUIET)
        for decay, n_hvp in ((0.0, 10_000), (0.5, 10_000), (0.5, 60))
    )
    for name in ("linear", "quadratic", "loss_increase", "sensitivity", "sensitivity_se", "rank"):
        np.testing.assert_allclose(decayed[name], plain[name], rtol=1e-9, atol=1e-15)
    assert (np.abs(sampled.sensitivity - plain.sensitivity) < 4 * sampled.sensitivity_probe_se).all()
    assert (sampled.sensitivity_probe_se < plain.sensitivity).all()  # far below the 100-fold that decay would add


@pytest.mark.parametrize("blocks", ["heads", pytest.param("qkv", marks=pytest.mark.slow)])
def test_attention_whose_keys_have_a_width_of_their_own(blocks: str) -> None:
    """Its weights are three parameters, its bias is one."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, kdim=3, vdim=5, batch_first=True)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            keys, values = x[..., :3], torch.cat([x, x[..., :1]], -1)
            return self.head(self.attention(x, keys, values, need_weights=False)[0].mean(1))

    torch.manual_seed(0)
    model = Attention().double()
    data = torch.randn(20, 5, 4, dtype=torch.float64), torch.arange(20) % 3
    op = HessianOperator(model, F.cross_entropy, [data])
    diagonal, at, expected = op.to_dense().diagonal(), 0, {}
    for name, parameter in model.named_parameters():
        rows = diagonal[at : at + parameter.numel()].view(parameter.shape)
        at += parameter.numel()
        if name.startswith("attention.") and "out_proj" not in name:
            own = dict(zip("qkv", rows.chunk(3), strict=True)) if "bias" in name else {name[len("attention.")]: rows}
            for part, values in own.items():
                for head, some in enumerate(values.chunk(2)):
                    key = part if blocks == "qkv" else head
                    expected[key] = expected.get(key, 0.0) + float(some.sum())
        elif name == "attention.out_proj.weight" and blocks == "heads":
            for head, some in enumerate(rows.chunk(2, 1)):
                expected[head] = expected.get(head, 0.0) + float(some.sum())
    ds = pn.blocks(op, blocks=blocks, n_hvp=10_000, **QUIET)
    for key, value in expected.items():
        name = f"attention.in_proj[{key}]" if blocks == "qkv" else f"attention[{key}/2]"
        assert float(ds.trace.sel(block=name)) == pytest.approx(value, rel=1e-9), list(ds.block.values)


def test_spectra_that_differ_are_further_apart_than_chance() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(400, 20, dtype=torch.float64), torch.arange(400) % 3
    ds = pn.blocks(Sum(), data=(x, y), spectra=True, n_spectrum=30, dtype="float64", n_hvp=16, **QUIET)
    js = ds.js_divergence.squeeze().to_pandas()
    assert js.loc["a", "c"] > 5 * max(js.loc["a", "a"], js.loc["c", "c"])
    assert js.loc["a", "b"] < 3 * max(js.loc["a", "a"], js.loc["b", "b"])
    w1 = ds.wasserstein1.squeeze().to_pandas()
    assert w1.loc["a", "c"] > 5 * max(w1.loc["a", "a"], w1.loc["c", "c"])
    weight = ds.spectrum_weight.sum("quadrature")
    np.testing.assert_allclose(weight, 1)
    mean = (ds.spectrum_node * ds.spectrum_weight).sum("quadrature").mean("half") * ds.n_parameters
    assert (np.abs(mean - ds.trace) < 4 * ds.trace_se + 0.1 * ds.trace).all()


def test_networks_of_different_layers_side_by_side(tmp_path: Path) -> None:
    torch.manual_seed(0)
    other = nn.Sequential(nn.Linear(20, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    ds = pn.blocks({"one": bigger(), "other": other}, data=drawn(64, 0), bits=4, diagonal=True, dtype="float64",
                   n_hvp=40, **QUIET)  # fmt: skip
    assert ds.block.values.tolist() == ["0", "2", "4"]
    assert np.isnan(ds.trace.sel(checkpoint="other", block="4"))
    path = pn.save(ds, tmp_path / "blocks.nc")
    again = pn.load(path)
    assert again.diagonal.shape == (2, 3, 20 * 12 + 12 + 12 * 8 + 8 + 8 * 3 + 3)
    np.testing.assert_array_equal(again.diagonal.values, ds.diagonal.values)
    assert "diagonal" not in xr.open_dataset(path, engine="h5netcdf")


def test_the_state_of_interrupted_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"data": drawn(64, 0), "n_hvp": 60, "dtype": "float64", **QUIET}
    whole = pn.blocks(small(), **options)

    from pnanalysis.spectra import block_products

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(block_products.BlockState, "save_if_due", stop)
        with pytest.raises(KeyboardInterrupt):
            pn.blocks(small(), state=tmp_path / "state", **options)
    assert list((tmp_path / "state").glob("*/forms.nc"))
    again = pn.blocks(small(), state=tmp_path / "state", **options)
    xr.testing.assert_equal(again.drop_attrs(), whole.drop_attrs())
    with pytest.raises(CurvatureError, match="n_hvp"):
        pn.blocks(small(), state=tmp_path / "state", **options | {"n_hvp": 80})


def test_a_target_error_ends_early() -> None:
    ds = pn.blocks(bigger(), data=drawn(96, 0), n_hvp=200, until={"trace": 0.2}, dtype="float64", **QUIET).squeeze()
    assert int(ds.n_hvp) < 200
    assert ds.attrs["until_reached"] == 1
    assert float(ds.trace_probe_se.max()) <= 0.2 * abs(float(ds.network_trace))


class Twice(nn.Module):
    """Every output is moved by a weight and a bias alike, so that what signs see of the two is the same."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(30, 10)), nn.Parameter(torch.zeros(300))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.weight.flatten() + self.bias)


def test_a_target_is_for_what_is_reported_where_weights_are_rounded() -> None:
    """Forms are kept of weights and of biases then: errors of their traces are half of that of both together."""
    torch.manual_seed(0)
    data = 1 + torch.rand(4, 300, dtype=torch.float64), torch.zeros(4, 300, dtype=torch.float64)
    op = HessianOperator(Twice(), F.mse_loss, [data])
    options: dict[str, Any] = {"n_hvp": 100, "data_error": "none", "until": {"trace": 0.013}, **QUIET}
    plain, rounded = (pn.blocks(op, bits=bits, **options) for bits in (None, 8))
    assert int(plain.n_hvp) == int(rounded.n_hvp) < 100
    assert rounded.attrs["until_reached"] == 1
    np.testing.assert_allclose(rounded.trace_probe_se, plain.trace_probe_se, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"n_hvp": 3}, "n_hvp"),
        ({"bits": 1}, "bits"),
        ({"bits": [4, 4]}, "once"),
        ({"bits": 40}, "2 to 16 bits"),
        ({"until": {"lambda_max": 0.1}}, "trace"),
        ({"blocks": "rows"}, "choose one of"),
        ({"data_error": "groups"}, "data_error"),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(PnError, match=says):
        pn.blocks(bigger(), data=drawn(32, 0), **options, **QUIET)


def test_matrices_take_sizes() -> None:
    H = np.diag(np.arange(1.0, 7.0))
    H[0, 5] = H[5, 0] = 0.5
    ds = pn.blocks(H, blocks={"a": 4, "b": 2}, progress=False)
    np.testing.assert_allclose(ds.trace, [10, 11])
    np.testing.assert_allclose(ds.off_diagonal_energy, 0.25)
    with pytest.raises(CurvatureError, match="and the matrix 6"):
        pn.blocks(H, blocks={"a": 4}, progress=False)
    with pytest.raises(CurvatureError, match="sizes of its blocks"):
        pn.blocks(H, progress=False)


def test_differences_of_traces_are_paired_by_examples() -> None:
    a, data = small(), drawn(160, 0)
    b = copy.deepcopy(a)
    b[0].weight.data *= 1.02
    nets = {"a": a, "b": b}
    options: dict[str, Any] = {"hessian": False, "cka": False, "saturation": False, "progress": False}
    ds = pn.compare(nets, data=data, blocks={"n": None, "n_hvp": 10_000, "dtype": "float64"}, **options)
    own = pn.blocks(nets, data=data, n_hvp=10_000, dtype="float64", **QUIET)
    np.testing.assert_allclose(ds.block_trace, own.trace, rtol=1e-5)  # of networks in float32
    pair = ds.isel(checkpoint=1, other=0)
    np.testing.assert_allclose(pair.block_trace_difference, own.trace[1] - own.trace[0], rtol=1e-4)
    unpaired = np.hypot(own.trace_data_se[0], own.trace_data_se[1])
    assert (pair.block_trace_difference_se < 0.3 * unpaired).all()  # what examples do to both networks cancels
    assert (ds.block_trace_difference_p.isel(checkpoint=0, other=0) == 1).all()
    np.testing.assert_allclose(ds.block_norm, own.frobenius_norm, rtol=1e-5)
    np.testing.assert_allclose(
        pair.block_norm_difference, own.frobenius_norm[1] - own.frobenius_norm[0], rtol=1e-3, atol=1e-6
    )
    unpaired = np.hypot(own.frobenius_norm_data_se[0], own.frobenius_norm_data_se[1])
    assert (pair.block_norm_difference_se < 0.3 * unpaired).all()
    np.testing.assert_allclose(ds.trace_concentration, own.trace_concentration, rtol=1e-5)
    assert any("Traces of the Hessian's" in sentence for sentence in pn.verdict(ds))
    assert any("Frobenius norms of the Hessian's" in sentence for sentence in pn.verdict(ds))
    with pytest.raises(PnError, match="takes no option 'spectra'"):
        pn.compare(nets, data=data, blocks={"spectra": True}, **options)
    larger = bigger()  # all of whose norms 40 products tell
    same = pn.compare({"a": larger, "copy": copy.deepcopy(larger)}, data=data, blocks={"n_hvp": 40}, **options)
    assert (same.block_trace_difference_p == 1).all()
    assert (same.block_norm_difference_p == 1).all()
    np.testing.assert_array_equal(same.block_norm_difference, 0.0)


@pytest.mark.slow
def test_what_signs_do_to_both_networks_cancels_in_differences_of_traces() -> None:
    """Over seeds, the differences scatter as their errors say, far less than independent signs would make them."""
    rng = np.random.default_rng(0)
    one, step = (half + half.T for half in rng.standard_normal((2, 80, 80)))
    other = one + step / 20
    sizes = {"a": 50, "b": 30}
    exact = pn.blocks(other - one, blocks=sizes, progress=False).trace.values
    norms = [[np.linalg.norm(H[at, at]) for at in (slice(50), slice(50, 80))] for H in (one, other)]
    found, stated, apart, of_norms = [], [], [], []
    for seed in range(40):
        rows = [pn.blocks(H, blocks=sizes, n_hvp=30, seed=seed, progress=False) for H in (one, other)]
        ds = block_differences(stack(rows, ["one", "other"])).isel(checkpoint=1, other=0)
        found.append(ds.block_trace_difference.values)
        stated.append(ds.block_trace_difference_se.values)
        apart.append(np.hypot(*(row.trace_se.values for row in rows)))
        own = np.hypot(*(row.frobenius_norm_se.values for row in rows))
        of_norms.append([ds.block_norm_difference.values, ds.block_norm_difference_se.values, own])
    z = (np.array(found) - exact) / np.array(stated)
    assert 0.8 < np.sqrt((z**2).mean()) < 1.25  # of 80 numbers, which is known to 9 %, of 14 degrees of freedom each
    assert np.mean(np.abs(z) < 2.14) > 0.9
    assert np.mean(stated) < 0.3 * np.mean(apart)
    value, se, own = np.moveaxis(np.array(of_norms), 1, 0)
    z = (value - np.subtract(norms[1], norms[0])) / se
    assert 0.6 < np.sqrt((z**2).mean()) < 1.25  # errors of pairs may be too large, by up to the root of two
    assert np.mean(np.abs(z) < 2.14) > 0.9
    assert se.mean() < 0.4 * own.mean()


def test_differences_of_networks_that_took_different_numbers_of_signs() -> None:
    rng = np.random.default_rng(1)
    half = rng.standard_normal((80, 80))
    rows = [pn.blocks(half + half.T, blocks={"a": 80}, n_hvp=n, progress=False) for n in (30, 60, 1000)]
    ds = block_differences(stack(rows, ["few", "more", "all"]))
    se = ds.block_trace_difference_se.isel(block=0).values
    own = ds.block_trace_se.isel(block=0).values
    assert own[2] == 0
    np.testing.assert_allclose(se[:2, 2], own[:2])  # the matrix itself has no error
    assert 0 < se[0, 1] < np.hypot(*own[:2])


def test_examples_that_count_for_nothing_change_nothing_but_the_groups() -> None:
    torch.manual_seed(0)
    inputs, targets = torch.randn(400, 4).double(), torch.randint(3, (400,))
    targets[torch.rand(400) > 0.06] = -100
    counted = targets >= 0
    assert N_GROUPS <= counted.sum() < 2 * N_GROUPS  # most random groups of all examples would have none of them
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    for options in ({"n_hvp": 200, "bits": 4}, {"n_hvp": 20}):
        few, all_of_them = (
            pn.blocks(network, data=data, loss=F.cross_entropy, dtype="float64", **options, **QUIET)
            for data in ((inputs[counted], targets[counted]), (inputs, targets))
        )
        for name in ("trace", "trace_se", "frobenius_norm", "frobenius_norm_se"):
            np.testing.assert_allclose(all_of_them[name], few[name], rtol=1e-9)
        assert (all_of_them.trace_data_se > 0).all()


def test_batches_that_count_for_nothing_join_the_next_group() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)).double()
    batches = [(torch.randn(6, 4).double(), torch.randint(3, (6,))) for _ in range(12)]
    for i in (0, 5, 11):
        batches[i] = batches[i][0], torch.full((6,), -100)
    grouped = in_groups(HessianOperator(network, F.cross_entropy, batches, bn_mode="train"), 10)
    assert grouped.ends.tolist() == [12, 18, 24, 30, 42, 48, 54, 60, 72]
    assert grouped.shares.tolist() == pytest.approx([1 / 9] * 9)
    few = in_groups(HessianOperator(network, F.cross_entropy, batches[:9], bn_mode="train"), 10)
    assert len(few.ends) == 1
    assert "fewer than 8 batches" in few.reason


def test_a_single_parameter_is_a_block() -> None:
    assert pn.blocks(np.array([[3.0]]), blocks={"all": 1}, progress=False).trace.item() == pytest.approx(3)
    inputs, targets = torch.randn(30, 1), torch.randn(30, 1)
    ds = pn.blocks(nn.Linear(1, 1, bias=False), data=(inputs, targets), loss="mse", **QUIET)
    assert ds.trace.item() == pytest.approx(float(2 * inputs.square().mean()), rel=1e-5)


def test_a_block_without_curvature_has_the_norm_zero() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        network[0].bias -= 100
    ds = pn.blocks(network, data=(torch.randn(30, 3), torch.randint(2, (30,))), **QUIET).squeeze()
    assert (ds.frobenius_norm[0], ds.frobenius_norm_se[0]) == (0, 0)
    assert ds.frobenius_norm[1] > 0


class NothingAndComplex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.nothing = nn.Linear(3, 2), nn.Parameter(torch.zeros(0, 3))
        self.waves = nn.Parameter(torch.randn(2, 3, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.nothing.sum() + (x.to(torch.complex64) @ self.waves.T).abs()


def test_complex_weights_are_rounded_and_empty_ones_are_not() -> None:
    torch.manual_seed(0)
    network, data = NothingAndComplex(), (torch.randn(30, 3), torch.randint(2, (30,)))
    ds = pn.blocks(network, data=data, bits=3, **QUIET).squeeze()
    waves, weights = torch.view_as_real(network.waves.detach()), network.linear.weight.detach()
    errors = [part - (part / step).round() * step for part in (waves, weights) for step in [part.abs().max() / 3]]
    found = sorted(ds.squared_change.values.tolist())
    assert found == pytest.approx(sorted(float(error.square().sum()) for error in errors), rel=1e-5)
