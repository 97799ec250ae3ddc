"""Running statistics of batch normalisation, against those by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pnanalysis as pn
from pnanalysis.errors import ModelError
from pnanalysis.geometry.batch_norm import (
    batches_of_two_or_more,
    normalise_by_batch,
    norms_with_statistics,
    reestimate,
)


def network() -> nn.Sequential:
    return (
        nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False)).double().eval()
    )


def test_only_norms_with_running_statistics_count() -> None:
    model = network()
    assert list(norms_with_statistics(model)) == ["0"]
    with normalise_by_batch(norms_with_statistics(model)):
        assert [module.training for module in model] == [True, False, False]
    assert not any(module.training for module in model)


def test_statistics_are_averages_over_batches_weighted_by_their_sizes() -> None:
    model = network()
    norms = norms_with_statistics(model)
    state = {name: tensor.clone() + 5 for name, tensor in model.state_dict().items()}
    inputs = torch.randn(10, 3, dtype=torch.float64)
    batches = inputs.split([4, 6])
    reestimate(model, norms, state, batches)
    torch.testing.assert_close(state["0.running_mean"], inputs.mean(0), rtol=1e-12, atol=1e-14)
    expected = sum(len(batch) * batch.var(0) for batch in batches) / 10
    torch.testing.assert_close(state["0.running_var"], expected, rtol=1e-12, atol=1e-14)
    assert norms["0"].momentum == 0.1
    assert not norms["0"].training
    assert (model[0].running_mean == 0).all()  # the model's own are left alone


class Twice(nn.Module):
    """One norm for two inputs, and one that only large batches reach."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.seldom = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        pair = self.shared(x) + self.shared(2 * x + 1)
        return self.seldom(pair + x) if len(x) > 4 else pair


def test_statistics_are_averages_over_all_calls_of_a_module() -> None:
    model = Twice().double().eval()
    state = {name: tensor.clone() + 5 for name, tensor in model.state_dict().items()}
    batches = torch.randn(15, 3, dtype=torch.float64).split([4, 6, 5])
    reestimate(model, norms_with_statistics(model), state, batches)
    mean = sum(len(batch) * (batch.mean(0) + (2 * batch + 1).mean(0)) / 2 for batch in batches) / 15
    torch.testing.assert_close(state["shared.running_mean"], mean, rtol=1e-12, atol=1e-14)
    norm = nn.BatchNorm1d(3).double()
    seldom = []
    for batch in batches[1:]:
        norm.weight.data, norm.bias.data = state["shared.weight"], state["shared.bias"]
        seldom.append(len(batch) * (norm(batch) + norm(2 * batch + 1) + batch).mean(0) / 11)
    torch.testing.assert_close(state["seldom.running_mean"], sum(seldom), rtol=1e-12, atol=1e-13)


def test_a_single_example_has_no_statistics() -> None:
    model = network()
    with pytest.raises(ModelError, match="a single example"):
        reestimate(model, norms_with_statistics(model), dict(model.state_dict()), [torch.randn(1, 3).double()])


def test_single_examples_join_the_next_batch() -> None:
    sizes = [len(batch) for batch in batches_of_two_or_more(torch.randn(12, 3).split([1, 1, 4, 1, 4, 1]))]
    assert sizes == [2, 4, 5]


@pytest.mark.parametrize("view", ["line", "curve"])
@pytest.mark.parametrize("sizes", [[1], [1, 1, 1]], ids=["one example", "batches of one of different lengths"])
def test_batches_without_statistics_are_refused_in_one_sentence(view: str, sizes: list[int]) -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), nn.AdaptiveAvgPool1d(1), nn.Flatten())

    batches = [(torch.randn(n, 2, 4 + i), torch.zeros(n).long()) for i, n in enumerate(sizes)]
    with pytest.raises(ModelError, match="single example|two or more") as raised:
        pn.landscape([network(), network()], data=batches, view=view, n_points=2, n_steps=2, progress=False)
    assert "\n" not in str(raised.value)
