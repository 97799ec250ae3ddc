"""Comparisons of what does not differ claim a difference in at most 6 % of cases, and of what does, that it does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from scipy import stats
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import pnanalysis as pn
from pnanalysis.alignment.permutation_symmetries import find_groups
from pnanalysis.alignment.relabelling import Relabelling
from pnanalysis.analyses.diagnostics import diagnostics
from pnanalysis.analyses.significant_differences import METHOD, with_p_values
from pnanalysis.analyses.verdict import verdict
from pnanalysis.evaluation.scores import paired

PAIR = ("checkpoint", "other")
SIZES = {"train": 1000, "validation": 200, "test": 300}
N_PROBES = 6
DRAWS = 200


def drawn(rng: np.random.Generator, k: int = 2, data_error: bool = False) -> xr.Dataset:
    """A comparison of ``k`` equal networks: every number is drawn from its null distribution, independently."""
    variables: dict[str, Any] = {}
    splits = []
    for n in SIZES.values():
        hard = rng.exponential(size=n)
        losses = hard + 0.3 * rng.normal(size=(k, n))
        wrong = (hard > 2.5) ^ (rng.random((k, n)) < 0.03)
        one = {f"loss{end}": values for end, values in paired(losses).items()}
        one |= {f"error{end}": values for end, values in paired(wrong.astype(float)).items()}
        one["only_wrong"] = (wrong[:, None] & ~wrong[None]).sum(2).astype(float)
        splits.append({name: (("checkpoint", "other")[: v.ndim], v) for name, v in one.items()})
    ds = xr.concat([xr.Dataset(one) for one in splits], dim="split")
    for name, value in {"trace": 10.0, "effective_rank": 30.0, "negative_mass": 0.2, "negative_curvature": 0.1}.items():
        means, errors = sampled(rng, k)
        variables |= differing(name, value * (1 + 0.01 * means), 0.01 * value * errors)
    lambda_max = 5 + (0.3 * rng.normal(size=k) if data_error else 1e-7 * rng.random(k))
    data_se = 0.3 * np.sqrt(2) if data_error else np.nan
    bound = 1e-6 + 1.96 * np.nan_to_num(data_se)
    difference, shift = np.subtract.outer(lambda_max, lambda_max), rng.normal(size=k) / np.sqrt(2)
    variables |= {
        "lambda_max": ("checkpoint", lambda_max),
        "lambda_max_difference": (PAIR, difference),
        "lambda_max_difference_low": (PAIR, difference - bound),
        "lambda_max_difference_high": (PAIR, difference + bound),
        "lambda_max_difference_data_se": (PAIR, np.full((k, k), data_se)),
        # the worst case: all parts of the distance grow and shrink together
        "wasserstein1": (PAIR, np.abs(np.subtract.outer(shift, shift)) * 0.01),
        "wasserstein1_noise": (PAIR, np.full((k, k), 0.01 * np.sqrt(2 / np.pi))),
        "wasserstein1_se": (PAIR, np.full((k, k), 0.01)),
    }
    names = [f"net{i}" for i in range(k)]
    coords = {"checkpoint": names, "other": names, "split": list(SIZES)}
    ds = ds.assign(variables).assign_coords(coords).assign(n_examples=("split", list(SIZES.values())))
    return ds.assign_attrs(classes=10)


def sampled(rng: np.random.Generator, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Means of a few standard normal probes, and their standard errors."""
    probes = rng.normal(size=(k, N_PROBES))
    return probes.mean(1), probes.std(1, ddof=1) / np.sqrt(N_PROBES)


def differing(name: str, value: np.ndarray, se: np.ndarray) -> dict[str, Any]:
    """A number of each checkpoint and its differences, with Student intervals that add in squares."""
    difference, error = np.subtract.outer(value, value), np.hypot.outer(se, se)
    half = stats.t.ppf(0.975, N_PROBES - 1) * error
    ends = {"": difference, "_se": error, "_low": difference - half, "_high": difference + half}
    return {name: ("checkpoint", value)} | {f"{name}_difference{end}": (PAIR, v) for end, v in ends.items()}


def claims(ds: xr.Dataset) -> list[str]:
    """What a comparison calls a significant difference, in its table and in its sentences."""
    rows = [row.key for row in diagnostics(ds) if any(value.is_significant for value in row.against_first)]
    said = " ".join(verdict(ds)) if "distance" in ds else ""
    return rows + [word for word in ("lower", "higher", "is significantly larger") if word in said]


@pytest.mark.parametrize(
    ("k", "data_error"), [*(pytest.param(2, error, marks=pytest.mark.slow) for error in (False, True)), (4, True)]
)
def test_null_comparisons_make_any_false_claim_in_at_most_5_percent(k: int, data_error: bool) -> None:
    rng = np.random.default_rng(k)
    found = [with_p_values(drawn(rng, k, data_error)) for _ in range(DRAWS)]
    names = [name for name in found[0] if str(name).endswith("_p")]
    assert len(names) == 8
    false = np.mean([any(bool((ds[name] <= 0.05).any()) for name in names) for ds in found])
    assert false <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / DRAWS)
    uncorrected = np.mean([bool((np.abs(ds.loss_difference) > 1.96 * ds.loss_difference_se).any()) for ds in found])
    assert uncorrected > 0.1  # of three rows


def test_real_differences_are_found_among_many() -> None:
    ds = drawn(np.random.default_rng(0))
    sign = np.array([[0, -1], [1, 0]])
    ds["loss_difference"] = ds.loss_difference + 6 * ds.loss_difference_se * sign
    ds["only_wrong"] = ds.only_wrong + 40 * (sign > 0)
    ds["error_difference"] = (ds.only_wrong - ds.only_wrong.values.swapaxes(1, 2)) / ds.n_examples
    ds["lambda_max_difference_low"] = ds.lambda_max_difference_low + 1e-3 * sign
    ds["lambda_max_difference_high"] = ds.lambda_max_difference_high + 1e-3 * sign
    ds = with_p_values(ds)
    assert ds.attrs["significance"] == METHOD == "Holm, 5 %"
    assert (ds.loss_difference_p.isel(checkpoint=1, other=0) <= 0.05).all()
    assert float(ds.lambda_max_difference_p[1, 0]) == 0
    assert float(ds.trace_difference_p[1, 0]) > 0.05
    assert ds["rank"].transpose("checkpoint", "split").values.tolist() == [[1, 1, 1], [2, 2, 2]]


def test_few_mistakes_are_judged_by_the_exact_test() -> None:
    """Six mistakes against none: 2.45 standard errors, yet as uneven once in 32 times."""
    ds = drawn(np.random.default_rng(0))
    wrong = np.zeros((2, 300))
    wrong[1, :6] = 1
    found = {f"error{end}": values for end, values in paired(wrong).items()}
    one = ds.isel(split=[2])[["loss", "loss_difference", "loss_difference_se", "n_examples"]]
    one = one.assign({n: ((*PAIR[: v.ndim], "split"), v[..., None]) for n, v in found.items()})
    one["only_wrong"] = ((*PAIR, "split"), np.array([[[0.0], [0.0]], [[6.0], [0.0]]]))
    one["loss_difference"] = 0 * one.loss_difference
    both = with_p_values(one)
    assert float(both.error_difference_p[1, 0, 0]) == pytest.approx(2 * 2 / 64)  # two rows
    assert float(found["error_difference"][1, 0] / found["error_difference_se"][1, 0]) > 2.4


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 5))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 5)
    )  # fmt: skip


def small() -> nn.Module:
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5))


def trained(make: Any, seed: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A network that has learnt its examples well: small losses, the hardest to tell apart from round-off."""
    torch.manual_seed(seed)
    network, x = make(), torch.randn(240, 1, 8, 8)
    y = (x[:, 0, :2, :2].flatten(1) @ torch.randn(4, 5)).argmax(1)
    optimiser = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        cross_entropy(network(x), y).backward()
        optimiser.step()
    return network.eval(), (x, y)


@pytest.mark.parametrize(("make", "n_hvp"), [(mlp, 40), (convolutions, 40), (small, 200)])  # the last is exact
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_a_network_does_not_differ_from_itself_with_units_permuted(make: Any, n_hvp: int, seed: int) -> None:
    network, (x, y) = trained(make, seed)
    groups = find_groups(network, x[:2])
    permuted = make().eval()
    permuted.load_state_dict(Relabelling.random(groups, seed).apply(network.state_dict()))
    ds = pn.compare({"own": network, "permuted": permuted}, data=(x, y), loss=cross_entropy,
                    hessian={"n_hvp": n_hvp, "n": None}, progress=False)  # fmt: skip
    assert float(ds.distance[0, 1]) > 1
    assert claims(ds) == []
    assert any("compute the same function" in line for line in verdict(ds))


def test_ignored_examples_are_no_evidence() -> None:
    """Four labelled examples of a hundred: the numbers and p-values are those of the four alone."""
    torch.manual_seed(0)
    x, y = torch.randn(100, 4), torch.randint(2, (100,))
    y[4:] = -100
    networks = {"a": torch.nn.Linear(4, 2), "b": torch.nn.Linear(4, 2)}
    options = {"loss": cross_entropy, "hessian": False, "saturation": False, "cka": False, "progress": False}
    masked, alone = (pn.compare(networks, data=data, **options) for data in ((x, y), (x[:4], y[:4])))
    for name in alone.data_vars:
        if alone[name].dtype.kind in "fi":
            np.testing.assert_allclose(masked[name], alone[name], rtol=1e-6, atol=1e-12, err_msg=str(name))
    assert masked.n_examples.values.tolist() == [4]
