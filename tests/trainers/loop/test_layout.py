"""Images with their channels last: the same training to round-off, and only where the network can do with it."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from pnanalysis.inputs.data import Split
from trainers.loop import fit as fitting
from trainers.loop.fit import fit
from trainers.loop.layout import image_layout


def images(n: int = 40, dtype: torch.dtype = torch.float64) -> Split:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(n, 3, 8, 8, generator=generator, dtype=dtype)
    return Split(inputs, torch.randint(4, (n,), generator=generator))


def small() -> nn.Module:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
    ]
    return nn.Sequential(*layers, nn.Linear(54, 4)).double()


class Viewed(nn.Module):
    """Takes the output of a convolution for one that lies in memory as usual."""

    def __init__(self, strict: bool) -> None:
        super().__init__()
        self.conv, self.head, self.strict = nn.Conv2d(3, 4, 3).double(), nn.Linear(144, 4).double(), strict

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = x.view(len(x), -1) if self.strict else x.as_strided((len(x), 144), (144, 1))
        return self.head(x)


def is_channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last)


def test_a_training_is_the_same_to_round_off(monkeypatch: pytest.MonkeyPatch) -> None:
    data, seen, found = images(), [], []
    for layout in (image_layout, lambda model, inputs: lambda batch: batch):
        network = small()
        network[0].register_forward_pre_hook(lambda module, args: seen.append(is_channels_last(args[0])))
        monkeypatch.setattr(fitting, "image_layout", layout)
        records = fit(
            network, data, epochs=2, optimizer="sgd", validation=data, batch_size=16, augment=("crop", "flip")
        )
        found.append((network, records))
    half = len(seen) // 2
    # of the two passes on trial, one; then all, and none at all otherwise
    assert seen[:2] == [False, True]
    assert all(seen[2 : half + 1])
    assert not any(seen[half + 1 :])
    (network, records), (other, usual) = found
    for mine, its in zip(network.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-9, atol=1e-11)
    assert [one.validation_error for one in records] == [one.validation_error for one in usual]


@pytest.mark.parametrize("strict", [True, False])
def test_networks_that_need_the_usual_order_get_it(strict: bool) -> None:
    torch.manual_seed(0)
    network, data = Viewed(strict), images()
    inputs = data.inputs
    assert image_layout(network, inputs)(inputs) is inputs
    assert len(fit(network, data, epochs=1)) == 1


@pytest.mark.parametrize(
    ("network", "inputs"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), torch.randn(8, 3, 8, 8)),
        (nn.Conv1d(3, 4, 3), torch.randn(8, 3, 8)),
        (nn.Conv2d(3, 4, 3), torch.full((8, 3, 8, 8), torch.nan)),
    ],
    ids=["no convolution", "sequences", "NaN"],
)
def test_other_inputs_stay_as_they_are(network: nn.Module, inputs: Tensor) -> None:
    assert image_layout(network, inputs)(inputs) is inputs


def test_trying_leaves_the_network_and_random_numbers_alone() -> None:
    network = small()
    network[1].eval()
    before, numbers = deepcopy(network.state_dict()), torch.get_rng_state()
    laid_out = image_layout(network, images().inputs)
    assert is_channels_last(laid_out(images().inputs))
    assert network.training
    assert not network[1].training
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert torch.equal(numbers, torch.get_rng_state())
