"""Transformers: which groups are found, that relabelling preserves the function, and that it is undone."""

from __future__ import annotations

from collections import Counter
from itertools import permutations, product

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pnanalysis.alignment.interior import Interior
from pnanalysis.alignment.permutation_symmetries import find_groups, find_symmetries
from pnanalysis.alignment.relabelling import Change, Relabelling
from pnanalysis.alignment.similarities import Similarities
from pnanalysis.alignment.weight_matching import _freedom, _improved, align, check_preserved
from pnanalysis.errors import ModelError
from pnanalysis.geometry.distances import state_distance
from tests.alignment.architectures import ARCHITECTURES, FusedBlock, made


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Tied weights once, as in states that are analysed."""
    return {name: t.detach().clone() for name, t in (*model.named_parameters(), *model.named_buffers())}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_groups_preserve_the_function_and_are_recovered(name: str) -> None:
    model, inputs = made(name)
    state = state_of(model)
    groups, unknown = find_symmetries(model, inputs)
    assert unknown == ()
    counts = Counter((group.kind, group.size, group.signs) for group in groups)
    assert counts == {(kind, size, signs): n for kind, size, signs, n in ARCHITECTURES[name].groups}
    whole = Relabelling.random(groups, seed=1)
    for kind in {group.kind for group in groups}:  # each kind alone: an error in one could hide behind another
        alone = Relabelling.identity(groups).with_changes(
            {k: whole.changes[k] for k, group in enumerate(groups) if group.kind == kind}
        )
        moved = alone.apply(state)
        assert any(not torch.equal(moved[n], state[n]) for n in state)
        assert check_preserved(model, state, moved, inputs) < 1e-13
    shuffled = whole.apply(state)
    assert check_preserved(model, state, shuffled, inputs) < 1e-13
    back = align(model, state, shuffled, inputs, rotations=False, n_restarts=2).apply(shuffled)
    assert all(torch.equal(back[n], state[n]) for n in state)  # moves and flips of signs round nothing
    turned = Relabelling.random(groups, seed=2, rotations=True).apply(state)
    assert check_preserved(model, state, turned, inputs) < 1e-13
    back = align(model, state, turned, inputs, n_restarts=2).apply(turned)
    assert all(torch.allclose(back[n], state[n], rtol=0, atol=1e-13) for n in state)


@pytest.mark.parametrize("seed", range(2, 10))
def test_rotations_of_layers_in_a_row_are_recovered_from_networks_close_to_each_other(seed: int) -> None:
    """No rotation is taken for known that few weights leave arbitrary (here the outputs' four for twelve units)."""
    model, inputs = made("learned tokens")
    state = state_of(model)
    groups = find_groups(model, inputs)
    generator = torch.Generator().manual_seed(seed)
    near = {n: t + 1e-3 * torch.randn(t.shape, generator=generator, dtype=t.dtype) for n, t in state.items()}
    turned = Relabelling.random(groups, seed, rotations=True).apply(near)
    back = align(model, state, turned, inputs, n_restarts=1).apply(turned)
    assert state_distance(back, state, list(state)) <= state_distance(near, state, list(state))


def test_no_larger_relabelling_would_do() -> None:
    """Signs of GELU units, of single channels of a LayerNorm's stream, and mixed channels of two heads."""
    model, inputs = made("fused")
    groups, state = find_groups(model, inputs), state_of(model)
    for kind in ("units", "stream"):
        (k,) = (k for k, group in enumerate(groups) if group.kind == kind)
        flip = np.ones(groups[k].size)
        flip[0] = -1
        wrong = Relabelling.identity(groups).with_changes({k: Change(np.arange(groups[k].size), flip)})
        with pytest.raises(ModelError, match="changed what the network computes"):
            check_preserved(model, state, wrong.apply(state), inputs)
    heads = next(group for group in groups if group.kind == "heads")
    values = [groups[number] for number in heads.inner[0] + heads.inner[1] if groups[number].kind == "value"]
    one, other = (next(axis for axis in group.axes if axis.tensor.endswith("qkv.weight")) for group in values)
    mixed = dict(state)
    weight = state[one.tensor].clone()
    rows = [int(one.index[0, 0]), int(other.index[0, 0])]
    weight[rows] = weight[rows[::-1]]
    mixed[one.tensor] = weight
    with pytest.raises(ModelError, match="changed what the network computes"):
        check_preserved(model, state, mixed, inputs)


def test_heads_hold_the_groups_of_their_channels() -> None:
    model, inputs = made("rotary")
    groups = find_groups(model, inputs)
    outer = next(k for k, group in enumerate(groups) if group.kind == "heads" and group.inner)
    assert groups[outer].size == 2  # keys and values
    for inside in groups[outer].inner:
        assert sorted((groups[number].kind, groups[number].size) for number in inside) == [("heads", 3), ("value", 4)]
        assert all(number > outer for number in inside)
    q = next(axis for axis in groups[outer].axes if axis.tensor == "q.weight")
    assert q.index.shape == (2, 12)  # three heads of four channels
    assert sorted(q.index.reshape(-1)) == list(range(24))


class TwoHeads(nn.Module):
    """Two heads of two channels on fixed inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(3, 12, bias=False), nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(len(x), -1, 3, 2, 2).permute(2, 0, 3, 1, 4)
        return self.out(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_heads_are_matched_as_by_trying_all_orders() -> None:
    model, inputs = TwoHeads().eval(), torch.randn(2, 4, 3)
    groups = find_groups(model, inputs)
    orders = [[np.array(order) for order in permutations(range(group.size))] for group in groups]
    trials = [
        Relabelling(groups, [Change(order, np.ones(len(order))) for order in chosen]) for chosen in product(*orders)
    ]
    assert len(trials) == 2**5
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        a, b = ({n: torch.randn(t.shape, generator=generator) for n, t in state_of(model).items()} for _ in range(2))
        best = max(sum(float((a[n] * moved[n]).sum()) for n in a) for moved in (t.apply(b) for t in trials))
        found = align(model, a, b, inputs, signs=False, rotations=False).apply(b)
        assert sum(float((a[n] * found[n]).sum()) for n in a) == pytest.approx(best, rel=1e-5)


def test_the_inside_of_heads_is_matched_as_by_trying_all_orders_and_signs() -> None:
    model, inputs = TwoHeads().eval(), torch.randn(2, 4, 3)
    groups = find_groups(model, inputs)
    (outer,) = (k for k, group in enumerate(groups) if group.inner)
    axes = groups[outer].axes
    interior = Interior(groups, [group.signs for group in groups], outer, axes)
    assert not interior.coupled
    generator = np.random.default_rng(0)
    products = [generator.normal(size=(axis.index.shape[1],) * 2) for axis in axes]
    flips = [np.array(signs) for signs in product((-1.0, 1.0), repeat=2)]
    every = [Change(np.array(order), signs) for order in permutations(range(2)) for signs in flips]
    best = max(interior.total(products, 1.0, changes) for changes in product(every, every))
    assert interior.match(products).value == pytest.approx(best, rel=1e-12)
    assert interior.value(products) == pytest.approx(best, rel=1e-12)
    turning = Interior(groups, ["rotations" if group.linear else "none" for group in groups], outer, axes)
    rotated = turning.match(products)
    assert turning.value(products) == pytest.approx(rotated.value, rel=1e-12)
    assert rotated.value >= best  # orders and signs are rotations, too


@pytest.mark.parametrize("rotations", [False, True])
@pytest.mark.parametrize("name", ["fused", "rotary", "partly rotary", "sloped"])
def test_no_step_loses(name: str, rotations: bool) -> None:
    model, inputs = made(name)
    a = state_of(model)
    generator = torch.Generator().manual_seed(1)
    b = {n: torch.randn(t.shape, generator=generator).to(t.dtype) if t.is_floating_point() else t for n, t in a.items()}
    groups = find_groups(model, inputs)
    freedoms = [_freedom(group, signs=True, rotations=rotations) for group in groups]
    matching = Similarities(groups, {n for n, _ in model.named_parameters()}, a, b, freedoms)
    current, before = Relabelling.identity(groups), -np.inf
    for k in matching.visited * 3:
        current = _improved(matching, current, k) or current
        after = sum(float((a[n] * moved).sum()) for n, moved in current.apply(b).items())
        assert after >= before - 1e-9 * abs(before)
        before = after
    check_preserved(model, b, current.apply(b), inputs)


class Transformed(nn.Module):
    """A block, and a transform over the stream's channels, which cannot be followed through it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.out = nn.Linear(6, 12), FusedBlock(), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.fft.fft(self.block(self.embed(x))).real.mean(1))


def test_what_cannot_be_followed_stays_and_is_named() -> None:
    model, inputs = Transformed().eval(), torch.randn(2, 5, 6)
    groups, unknown = find_symmetries(model, inputs)
    assert unknown == ("_fft_r2c",)
    assert {group.kind for group in groups} == {"heads", "query-key", "value", "units"}  # not the stream
    state = state_of(model)
    found = align(model, state, Relabelling.random(groups, 2).apply(state), inputs, n_restarts=1)
    assert found.not_followed == unknown
    assert {entry["kind"]: entry["groups"] for entry in found.summary()} == {
        "heads": 1, "query-key": 3, "value": 3, "units": 1,
    }  # fmt: skip
