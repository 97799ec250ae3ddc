"""Each analysis of an entry of the zoo against the truth, and what no analysis may change."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import rich.console  # noqa: F401  its first import draws from Python's random numbers
import torch
from torch import Tensor, nn

import pnanalysis as pn
from pnanalysis.curvature.base import CurvatureOperator
from tests.zoo.entry import Batch, Entry, leaves
from tests.zoo.truth import Truth, activation_means, distance, double_network, loss_of, outputs_of

#: Fewest products for which operators are traced, and a number for which they are not.
BUDGETS = (1000, 10)
#: Relative error of what is computed in float32: losses of a few examples, sums of some thousand terms.
SINGLE = 2e-5
#: Largest number of parameters of which a dense matrix is made.
DENSE = 200


def product(kind: type[CurvatureOperator], truth: Callable[[Truth, Tensor], Tensor], budget: int, entry: Entry) -> None:
    """A product of an operator in float64, and forms of single examples (or groups of them) that add up to it."""
    network, batches = entry.network(), entry.batches()
    with unchanged(batches, network):
        operator = kind(network, entry.loss, batches, dtype=torch.float64, expected_products=budget, **entry.options)
        v = torch.randn(operator.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        found = operator.matvec(v)
        pairs = torch.stack([v, v.flip(0)], dim=1), torch.stack([v, v], dim=1)
        forms = operator.forms(*pairs) @ torch.from_numpy(operator.group_weights)
    expected = truth(Truth(entry), v)
    size = float(expected.norm())
    assert float((found - expected).norm()) <= entry.tolerance * size + 1e-12
    assert float((forms - pairs[0].T @ expected).abs().max()) <= entry.tolerance * size * float(v.norm()) + 1e-12


def spectrum(entry: Entry) -> None:
    """Trace and largest eigenvalue of the Hessian, over the smallest parameters where there are many."""
    network, batches = entry.network(), entry.batches()
    names = few_parameters(double_network(entry))
    with unchanged(batches, network):
        ds = pn.hessian(
            network, data=batches, loss=entry.loss, params=names, n_hvp=60, dtype="float64", progress=False,
            **entry.options,
        ).squeeze("checkpoint")  # fmt: skip
    values = torch.linalg.eigvalsh(Truth(entry, names).dense_hessian())
    size = max(float(values.abs().max()), 1e-12)
    slack = max(entry.tolerance, 1e-6) * size  # of what is exact: an error of zero
    assert abs(float(ds.trace) - float(values.sum())) <= 5 * float(ds.trace_se) + slack * len(values)
    assert float(ds.lambda_max_low) - slack <= float(values[-1]) <= float(ds.lambda_max_high) + slack


def comparison(entry: Entry) -> None:
    """Losses and distance of two networks."""
    networks, batches = two(entry), entry.batches()
    with unchanged(batches, *networks.values()):
        ds = pn.compare(
            networks, data=batches, loss=entry.loss, hessian=False, cka=False, saturation=False, progress=False
        )
    split = {"split": ds.split.values[-1]}
    close(ds.loss.sel(checkpoint="a", **split), loss_of(entry, 0))
    close(ds.loss.sel(checkpoint="b", **split), loss_of(entry, 1))
    close(ds.distance.sel(checkpoint="a", other="b"), distance(entry, 0, 1))


def landscape(entry: Entry) -> None:
    """Losses at the ends of the line between two networks."""
    networks, batches = two(entry), entry.batches()
    with unchanged(batches, *networks.values()):
        ds = pn.landscape(
            networks, data=batches, loss=entry.loss, n_points=3, bn="interpolate", dtype="float64", progress=False
        )
    ends = ds.loss.isel(split=0, path=0, position=[0, -1])
    close(ends.isel(position=0), loss_of(entry, 0))
    close(ends.isel(position=1), loss_of(entry, 1))


def sharpness(entry: Entry) -> None:
    """The loss that rises are measured from."""
    network, batches = entry.network(), entry.batches()
    with unchanged(batches, network):
        ds = pn.sharpness(
            network,
            data=batches,
            loss=entry.loss,
            measures=("worst", "average"),
            n_steps=2,
            n_starts=1,
            n_directions=2,
            second_order=False,
            radii={"ball": 0.05, "adaptive": 0.5, "box": 1e-3},
            dtype="float64",
            progress=False,
        )
    close(ds.loss.squeeze(), loss_of(entry))
    assert (ds.rise >= 0).all()
    assert np.isfinite(ds.average).all()


def saturation(entry: Entry) -> None:
    """The mean output of every activation module."""
    network, batches = entry.network(), entry.batches()
    with unchanged(batches, network):
        ds = pn.saturation(network, data=batches, progress=False).squeeze("checkpoint")
    means = activation_means(entry)
    assert means, "a network without activation modules; leave saturation out"
    for name, mean in means.items():
        (layer,) = (layer for layer in ds.layer.values if f"{layer}.".startswith(f"{name}.") and "#" not in layer)
        close(ds["mean"].sel(layer=layer), mean)


def trajectory(entry: Entry) -> None:
    """Distances from the start."""
    networks = [entry.network(seed) for seed in range(3)]
    with unchanged([], *networks):
        ds = pn.trajectory(networks, projections=("plane",), progress=False)
    for i in range(3):
        close(ds.distance_from_start[i], distance(entry, 0, i))


def functional(entry: Entry) -> None:
    """Fraction of examples put into other classes, or root-mean-square difference of outputs."""
    networks, batches = two(entry), entry.batches()
    with unchanged(batches, *networks.values()):
        ds = pn.functional_distance(networks, data=batches, loss=entry.loss, cka=False, progress=False)
    first, second = (outputs_of(entry, seed) for seed in (0, 1))
    if "rms_difference" in ds:
        close(ds.rms_difference[0, 1], float((first - second).square().mean().sqrt()))
    else:
        differ = (entry.classes(first) != entry.classes(second)).double()
        close(ds.disagreement[0, 1], float(differ.mean()))


#: By column of the table: what has to hold, each part for itself.
CHECKS: dict[str, tuple[Callable[[Entry], None], ...]] = {
    "Hessian": tuple(partial(product, pn.HessianOperator, Truth.hessian, budget) for budget in BUDGETS),
    "Gauss-Newton": tuple(partial(product, pn.GGNOperator, Truth.gauss_newton, budget) for budget in BUDGETS),
    "Fisher": tuple(partial(product, pn.EmpiricalFisherOperator, Truth.fisher, budget) for budget in BUDGETS),
    "spectrum": (spectrum,),
    "compare": (comparison,),
    "landscape": (landscape,),
    "sharpness": (sharpness,),
    "saturation": (saturation,),
    "trajectory": (trajectory,),
    "functional distance": (functional,),
}


def two(entry: Entry) -> dict[str, nn.Module]:
    return {"a": entry.network(0), "b": entry.network(1)}


def few_parameters(network: nn.Module) -> list[str]:
    """Names of the smallest trainable parameters, as many as a dense matrix can be made of."""
    named = [(name, p.numel()) for name, p in network.named_parameters() if p.requires_grad]
    chosen, total = set(), 0
    for name, size in sorted(named, key=lambda item: item[1]):
        total += size
        if total > DENSE and chosen:
            break
        chosen.add(name)
    return [name for name, _ in named if name in chosen]


def close(found: Any, expected: float) -> None:
    """The same number, up to float32."""
    assert float(found) == pytest.approx(expected, rel=SINGLE, abs=SINGLE)


@contextmanager
def unchanged(batches: list[Batch], *networks: nn.Module) -> Iterator[None]:
    """Nothing of the user's is another one after the body: tensors, modes, hooks, data, states of random numbers."""
    before = _state(batches, networks)
    try:
        yield
    finally:  # also after a refusal
        after = _state(batches, networks)
        changed = [name for name in before.keys() | after.keys() if not _same(before.get(name), after.get(name))]
        assert not changed, f"changed by the analysis: {sorted(changed)}"


def _state(batches: list[Batch], networks: tuple[nn.Module, ...]) -> dict[str, Any]:
    state: dict[str, Any] = {
        "torch's random numbers": torch.random.get_rng_state(),
        "numpy's random numbers": str(np.random.get_state()),  # noqa: NPY002
        "python's random numbers": random.getstate(),
        "default type": torch.get_default_dtype(),
        "autograd": (torch.ones((), requires_grad=True) * 2).requires_grad,
        "fast path of encoders": torch.backends.mha.get_fastpath_enabled(),
    }
    for i, network in enumerate(networks):
        for name, tensor in (*network.named_parameters(), *network.named_buffers()):
            state[f"network {i}, {name}"] = tensor.detach().clone()
            state[f"network {i}, {name}: gradient"] = (tensor.requires_grad, tensor.grad is None)
        for name, module in network.named_modules():
            hooks = [len(value) for key, value in vars(module).items() if key.endswith("_hooks")]
            state[f"network {i}, {name}: mode and hooks"] = (module.training, hooks, sorted(vars(module)))
    for i, tensor in enumerate(leaves(batches)):
        state[f"tensor {i} of the data"] = tensor.clone()
    return state


def _same(one: Any, other: Any) -> bool:
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return not isinstance(one, Tensor) and not isinstance(other, Tensor) and bool(one == other)
    if one.is_floating_point() or one.is_complex():
        return torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))
    return torch.equal(one, other)
