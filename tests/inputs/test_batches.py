"""Batches: their forms, their number of examples, and how a network is called with them."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable

import pytest
import torch
from torch import nn

from pnanalysis.errors import CurvatureError, DataError
from pnanalysis.inputs.batches import as_arguments, as_pair, batch_size, can_cut, cut, fingerprint, first_examples

X, Y = torch.randn(6, 4), torch.arange(6)


class OnlyX(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class WithLabels(nn.Module):
    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        return x


class Anything(nn.Module):
    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        return inputs["x"]


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_the_labels_of_a_mapping_are_its_targets(kind: type) -> None:
    inputs, targets = as_pair(kind(x=X, labels=Y, y=None))
    assert targets is Y
    assert isinstance(inputs, dict)
    assert as_pair({"x": X, "y": X, "target": Y})[1] is Y


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (OnlyX, ["x"]),
        (lambda: nn.DataParallel(OnlyX()), ["x"]),
        (lambda: torch.compile(OnlyX()), ["x"]),
        (WithLabels, ["x", "labels"]),
        (Anything, ["x", "labels"]),
        (lambda: None, ["x", "labels"]),
    ],
)
def test_labels_are_passed_to_networks_that_take_them(model: Callable[[], nn.Module | None], names: list[str]) -> None:
    assert list(as_arguments({"x": X, "labels": Y}, model())[1]) == names


def test_graphs_are_counted_by_their_targets_and_not_cut() -> None:
    nodes, edges, graph = torch.randn(7, 3), torch.randint(7, (2, 12)), torch.tensor([0, 0, 0, 1, 1, 2, 2])
    batch = (nodes, edges, graph), torch.randn(3)
    assert batch_size(batch) == 3
    assert not can_cut(batch)
    assert first_examples(batch, 2) is batch
    with pytest.raises(DataError, match="7, 2, 7, 3 rows cannot be cut"):
        cut(batch, slice(0, 2))


def test_tensors_without_dims_belong_to_all_examples() -> None:
    batch = X, (torch.tensor(60.0), Y)
    assert batch_size(batch) == 6
    inputs, (scale, targets) = cut(batch, slice(1, 3))
    assert (len(inputs), scale.item(), len(targets)) == (2, 60.0, 2)
    with pytest.raises(CurvatureError, match="no tensor with a dim"):
        batch_size((torch.tensor(1.0), None))


def test_contents_differ_where_any_number_does() -> None:
    sparse = X.to_sparse()
    assert fingerprint(sparse) == fingerprint(sparse.clone()) != fingerprint((2 * X).to_sparse())
    assert fingerprint(X.to(torch.bfloat16)) != fingerprint(X.to(torch.float16))
    assert fingerprint(X.T) == fingerprint(X.T.contiguous())
