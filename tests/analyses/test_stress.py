"""Numbers under stress, and code of the user's that misbehaves: the right result, or one sentence."""

from __future__ import annotations

import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

import pnanalysis as pn
from pnanalysis.errors import DataError, PnError
from tests.cli.conftest import run as run

X = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(24) % 3


def network(scale: float = 1.0) -> nn.Sequential:
    generator = torch.Generator().manual_seed(1)
    made = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(scale * 0.5 * torch.randn(parameter.shape, generator=generator))
    return made


class Raising(nn.Module):
    """A network that raises an error."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.layer, self.error = nn.Linear(4, 3), error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


class OwnError(Exception):
    """An error of a type that nobody knows."""


class Examples(Dataset[Any]):
    """24 examples that may claim to be more, or raise an error at the fourth."""

    def __init__(self, size: int = 24, error: BaseException | None = None) -> None:
        self.size, self.error = size, error

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        if self.error is not None and i == 3:
            raise self.error
        return X[i], Y[i]


def hessian(model: nn.Module, data: Any = (X, Y), loss: Any = None, **options: Any) -> xr.Dataset:
    return pn.hessian(model, data=data, loss=loss, n_hvp=20, progress=False, **options)


def sharpness(model: nn.Module, data: Any = (X, Y), loss: Any = None) -> xr.Dataset:
    return pn.sharpness(
        model,
        data=data,
        loss=loss,
        n_steps=2,
        measures=("worst", "average"),
        second_order=False,
        n_starts=1,
        progress=False,
    )


def landscape(model: nn.Module, data: Any = (X, Y), loss: Any = None) -> xr.Dataset:
    return pn.landscape([model, deepcopy(model)], data=data, loss=loss, n_points=2, splits=["train"], progress=False)


def compare(model: nn.Module, data: Any = (X, Y), loss: Any = None) -> xr.Dataset:
    return pn.compare([model, network()], data=data, loss=loss, split="train", hessian=False, progress=False)


def saturation(model: nn.Module, data: Any = (X, Y), loss: Any = None) -> xr.Dataset:
    return pn.saturation(model, data=data, split="train", progress=False)


WITH_LOSS = (hessian, sharpness, landscape, compare)


def exiting(outputs: Tensor, targets: Tensor) -> NoReturn:
    sys.exit(0)


def of_own_type(outputs: Tensor, targets: Tensor) -> NoReturn:
    raise OwnError("mine")


def a_text(outputs: Tensor, targets: Tensor) -> str:
    return "0.5"


def a_count(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.argmax(1) != targets).sum()


def infinite(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets) * torch.inf


def huge(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets) * 1e30


@pytest.mark.parametrize("analysis", [*WITH_LOSS, saturation])
@pytest.mark.parametrize(
    "error", [SystemExit(0), OwnError("mine"), OSError(5, "disk"), ZeroDivisionError("zero"), StopIteration()], ids=repr
)
def test_whatever_a_network_raises_is_one_sentence_that_names_the_line(
    analysis: Callable[..., xr.Dataset], error: BaseException
) -> None:
    with pytest.raises(PnError, match=rf"{type(error).__name__}.*, at test_stress.py, line \d+"):
        analysis(Raising(error))


@pytest.mark.parametrize("analysis", WITH_LOSS)
@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (exiting, "ends the program"),
        (of_own_type, "OwnError: mine"),
        (a_text, "returns a str"),
        (a_count, "tensor of torch.int64"),
        (infinite, "loss .*not finite"),
    ],
)
def test_a_loss_that_is_none_is_one_sentence(
    analysis: Callable[..., xr.Dataset], loss: Callable[..., Any], message: str
) -> None:
    if loss is infinite and analysis is compare:
        pytest.skip("a score of infinity is a score")
    with pytest.raises(PnError, match=message):
        analysis(network(), loss=loss)


@pytest.mark.parametrize("operator", ["hessian", "ggn", "fisher"])
def test_no_curvature_is_given_where_the_loss_is_infinite(operator: str) -> None:
    with pytest.raises(PnError, match="not finite"):
        hessian(network(), loss=infinite, operator=operator)


@pytest.mark.parametrize(
    "data",
    [
        Examples(30), Examples(2**62), Examples(-5), Examples(0), Examples(24, SystemExit(0)), Examples(24, OwnError()),
        (X[:0], Y[:0]), [],
    ],
    ids=["too long", "huge", "negative", "none", "exits", "raises", "empty", "no batches"],
)  # fmt: skip
def test_data_that_are_not_what_they_claim_are_one_sentence(data: Any) -> None:
    for analysis in (sharpness, saturation):
        with pytest.raises(DataError):
            analysis(network(), data)


@pytest.mark.filterwarnings("ignore:no error for the choice")  # squares of single examples overflow
def test_a_factor_of_the_loss_is_that_of_its_curvature_even_where_squares_overflow() -> None:
    plain, scaled = hessian(network()), hessian(network(), loss=huge)
    for name in ("trace", "lambda_max", "lambda_min"):
        # products in float32: round-off of order 1e-6 of the largest eigenvalue
        assert abs(scaled[name].item() / 1e30 - plain[name].item()) < 1e-4 * plain["lambda_max"].item()


@pytest.mark.filterwarnings("ignore:no error for the choice")
@pytest.mark.parametrize(
    ("model", "data"),
    [
        (network(), (X[:1], Y[:1])),
        (network(), (X, 0 * Y)),
        (network(), (X[:1].expand(24, -1), Y)),
        (network(), (0 * X, Y)),
        (network(0.0), (X, Y)),
        (nn.Sequential(network(), nn.Linear(3, 3)).requires_grad_(False).append(nn.Linear(3, 3)), (X, Y)),
    ],
    ids=["one image", "one class", "one image many times", "no input", "zero weights", "few parameters"],
)
def test_extreme_sizes_and_constants_give_finite_spectra_that_agree_with_the_exact_one(
    model: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    free = {name: p.detach().double() for name, p in model.named_parameters() if p.requires_grad}
    shapes, twin = {name: p.shape for name, p in free.items()}, model.double()

    def loss_at(theta: Tensor) -> Tensor:
        parts = theta.split([shape.numel() for shape in shapes.values()])
        state = {name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}
        return F.cross_entropy(torch.func.functional_call(twin, state, (data[0].double(),)), data[1])

    exact = torch.autograd.functional.hessian(loss_at, torch.cat([p.flatten() for p in free.values()]))
    ds = pn.hessian(twin, data=data, n_hvp=60, dtype="float64", batch_size=10**9, n=10**9, progress=False)
    values = torch.linalg.eigvalsh(exact)
    # as many products as there are parameters: exact to round-off
    assert len(values) <= 60
    np.testing.assert_allclose(ds["trace"].item(), float(values.sum()), atol=1e-9)
    np.testing.assert_allclose(ds["lambda_max"].item(), float(values.max()), atol=1e-9)


def test_an_error_of_a_later_pass_that_does_not_come_again_is_one_sentence() -> None:
    passes = iter(range(10**6))

    def once(outputs: Tensor, targets: Tensor) -> Tensor:
        if next(passes) == 12:
            raise OwnError("mine")
        return F.cross_entropy(outputs, targets)

    with pytest.raises(PnError, match=r"OwnError: mine, at test_stress.py, line \d+"):
        sharpness(network(), loss=once)


def test_a_rise_that_overflows_is_an_error_and_not_nan() -> None:
    def nearly_all(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets) * 2e38

    with pytest.raises(PnError, match="choose a smaller radius"):
        pn.sharpness(
            network(),
            data=(X, Y),
            loss=nearly_all,
            radii={"ball": 50.0},
            n_steps=2,
            measures=("worst", "average"),
            second_order=False,
            progress=False,
        )


def test_a_network_that_exits_ends_a_command_with_an_error(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "exiting.py").write_text(
        "import sys\nfrom torch import nn\nclass Net(nn.Linear):\n    def __init__(self): super().__init__(64, 10)\n"
        "    def forward(self, x): sys.exit(0)\n"
    )
    monkeypatch.chdir(tmp_path)
    done = run("pntrain", "tanh7", "--model", "exiting:Net", "--data", "digits", "--epochs", 1, "--out", "run")
    assert done.status == 2
    assert "ends the program" in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "run").exists()
