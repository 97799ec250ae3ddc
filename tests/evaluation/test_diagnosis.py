"""Whom an error is blamed on: the data, the network, its loss, or what torch cannot do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pnanalysis as pn
from pnanalysis.errors import DataError, ModelError
from pnanalysis.evaluation.diagnosis import clear_errors

X = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
Y = torch.randint(3, (20,), generator=torch.Generator().manual_seed(1))


class Fussy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if bool((x > 90).any()):
            raise RuntimeError("more than ninety")
        return self.layer(x)


def test_the_batch_that_a_network_cannot_take_is_named_with_the_line_that_refuses_it() -> None:
    late = X.clone()
    late[17, 2] = 99
    batches = [(late[i : i + 5], Y[i : i + 5]) for i in range(0, 20, 5)]
    with pytest.raises(
        DataError, match=r"cannot take batch 3: .*more than ninety, at test_diagnosis.py, line \d+"
    ) as e:
        pn.landscape([Fussy(), Fussy()], data=batches, n_points=2, progress=False)
    assert "\n" not in str(e.value)


def test_an_error_in_the_forward_pass_names_its_line() -> None:
    with pytest.raises(DataError, match=r"cannot take these data: .*more than ninety, at test_diagnosis.py, line \d+"):
        pn.compare([Fussy(), Fussy()], data=(X + 99, Y), hessian=False, progress=False)


def test_an_error_in_the_loss_names_its_line() -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.logits, targets)

    with pytest.raises(DataError, match=r"the loss cannot take these data: .*'logits'.* at test_diagnosis.py, line"):
        pn.sharpness(
            Fussy(),
            data=(X, Y),
            loss=loss,
            n_steps=2,
            measures=("worst", "average"),
            second_order=False,
            progress=False,
        )


@pytest.mark.parametrize(
    ("message", "operation"),
    [
        ("derivative for aten::hardsigmoid_backward is not implemented", "hardsigmoid_backward"),
        ("the derivative of '_scaled_dot_product_flash' is not implemented.", "_scaled_dot_product_flash"),
        ("Trying to use forward AD with _cudnn_rnn that does not support it", "_cudnn_rnn"),
        ("Batching rule not implemented for aten::unique_dim. We could not ...", "unique_dim"),
    ],
)
def test_an_operation_that_torch_cannot_differentiate_is_named(message: str, operation: str) -> None:
    with pytest.raises(ModelError, match=f"torch has no derivative of {operation} .* leave its layer out"):  # noqa: SIM117
        with clear_errors("here", Fussy(), [(X, Y)], F.cross_entropy):
            raise NotImplementedError(message)


def test_what_nothing_reproduces_is_not_blamed_on_the_data() -> None:
    with pytest.raises(ModelError, match=r"cannot be computed with here .*they take all the data"):  # noqa: SIM117
        with clear_errors("here", Fussy(), [(X, Y)], F.cross_entropy):
            raise RuntimeError("no kernel")
