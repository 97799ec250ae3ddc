"""Loaders that give other batches on every pass."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset, WeightedRandomSampler

from pnanalysis.errors import DataError
from pnanalysis.inputs.batches import as_pair
from pnanalysis.inputs.repeatable import SameBatches

X, Y = torch.randn(60, 3), torch.arange(60)
DATA = TensorDataset(X, Y)


class OfTheirOwn:
    """Batches from a generator that only this loader knows; each in the same memory, if so wished."""

    def __init__(self, reuse: bool = False) -> None:
        self.generator, self.memory = np.random.default_rng(0), torch.empty(20, 3) if reuse else None

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for index in torch.from_numpy(self.generator.permutation(60)).split(20):
            inputs = X[index]
            yield inputs if self.memory is None else self.memory.copy_(inputs), Y[index]


def _noisy(rows: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Augmentation by all of the global generators."""
    noise = torch.randn(3) + random.random() + np.random.rand()  # noqa: NPY002
    return torch.stack([x + noise for x, _ in rows]), torch.stack([y for _, y in rows])


LOADERS: dict[str, Callable[[], Iterable[object]]] = {
    "shuffle": lambda: DataLoader(DATA, 20, shuffle=True),
    "own generator": lambda: DataLoader(DATA, 20, shuffle=True, generator=torch.Generator()),
    "weights": lambda: DataLoader(DATA, 20, sampler=WeightedRandomSampler(torch.rand(60), 60)),
    "batch sampler": lambda: DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 20, False)),
    "augmentation": lambda: DataLoader(DATA, 20, collate_fn=_noisy),
    "workers": lambda: DataLoader(DATA, 20, shuffle=True, num_workers=1),
}


def _numbers(batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    return torch.cat([torch.column_stack([x, y]) for x, y in batches])


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("name", LOADERS)
def test_every_pass_sees_the_same_and_leaves_the_generators_alone(name: str, kept: bool) -> None:
    loader = LOADERS[name]()
    own = getattr(loader, "generator", None)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    batches = SameBatches(loader, prepare=as_pair, max_bytes=None if kept else 100)
    assert (batches.kept is not None) == kept
    first = _numbers(batches)
    assert len(batches) == 3
    assert torch.equal(first, _numbers(batches))
    next(iter(batches))
    assert torch.equal(first, _numbers(SameBatches(loader, prepare=as_pair)))  # and so does the next analysis
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    assert before[2] == random.getstate()
    assert own is None or torch.equal(own.get_state(), torch.Generator().get_state())


def test_a_random_order_is_that_of_the_seed() -> None:
    one, two = (_numbers(SameBatches(LOADERS["shuffle"](), seed=seed)) for seed in (1, 2))
    assert not torch.equal(one, two)
    assert torch.equal(one[one[:, 3].argsort()], two[two[:, 3].argsort()])


@pytest.mark.parametrize("reuse", [False, True])
def test_batches_are_kept_as_they_were_read(reuse: bool) -> None:
    batches = SameBatches(OfTheirOwn(reuse))
    found = _numbers(batches)
    assert torch.equal(found, _numbers(batches))
    assert torch.equal(found[found[:, 3].argsort()][:, :3], X)


def test_batches_that_change_and_do_not_fit_are_refused() -> None:
    batches = SameBatches(OfTheirOwn(), max_bytes=100, name="train")
    with pytest.raises(DataError, match=r"train: batch 0 is another one each time .*shuffle=False"):
        list(batches)


def test_a_loader_that_ends_early_on_a_later_pass_is_refused() -> None:
    class Once:
        def __init__(self) -> None:
            self.batches = iter([(X, Y), (X, Y)])

        def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            return self.batches

    assert len(list(SameBatches(Once()))) == 2
    with pytest.raises(DataError, match="batch 0"):
        list(SameBatches(Once(), max_bytes=100))


def test_batches_in_a_list_are_not_copied() -> None:
    batches = [(X, Y), (X, Y)]
    kept = SameBatches(batches, prepare=as_pair, max_bytes=0)
    assert all(found[0] is X and found[1] is Y for found in kept)
    assert len(SameBatches(batches, n=60)) == 1
