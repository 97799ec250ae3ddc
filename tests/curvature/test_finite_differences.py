"""Products by differences of gradients: against exact ones, and what they say of their own error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

import pnanalysis as pn
from pnanalysis.curvature.operators import GGNOperator, HessianOperator
from pnanalysis.errors import CurvatureError
from tests.curvature.conftest import NETWORKS, dense_hessian, images, relative


def by_differences(model: nn.Module, **options: object) -> HessianOperator:
    return HessianOperator(model, cross_entropy, images(), method="finite_difference", **options)


class _Tanh(torch.autograd.Function):
    """As fused kernels do, it differentiates once only."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: object, slope: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return slope * (1 - y**2)


class OnceDifferentiable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _Tanh.apply(x)


@pytest.mark.parametrize("name", NETWORKS)
def test_in_double_precision_they_are_the_hessian(name: str) -> None:
    """Kinks of ReLU included: no jump lies within the short steps of double precision."""
    model = NETWORKS[name]()
    op = by_differences(model)
    assert op.differences.round_off < 1e-7
    assert relative(op.to_dense(), dense_hessian(model, images())) < 1e-7
    assert op.method == "finite differences"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["tanh", "conv", "layernorm", "relu"])
def test_the_stated_error_is_the_one_that_is_made(name: str, dtype: torch.dtype) -> None:
    """In the spectral norm, the largest over all vectors, of which the operator tried two."""
    model = NETWORKS[name]()
    exact, op = dense_hessian(model, images()), by_differences(model, dtype=dtype)
    error = torch.linalg.matrix_norm(op.to_dense().double() - exact, 2) / torch.linalg.matrix_norm(exact, 2)
    assert error < 4 * op.round_off
    assert op.round_off < (1e-2 if dtype == torch.float32 else 1e-7)


def test_passes_in_bfloat16_state_a_large_error() -> None:
    model = NETWORKS["tanh"]()
    exact, op = dense_hessian(model, images()), by_differences(model, dtype=torch.float32, amp="bf16")
    assert 1e-3 < op.round_off < 0.5
    error = torch.linalg.matrix_norm(op.to_dense().double() - exact, 2) / torch.linalg.matrix_norm(exact, 2)
    assert error < 4 * op.round_off


def test_networks_without_a_second_derivative() -> None:
    layers = [nn.Flatten(), nn.Linear(36, 4), nn.Tanh(), nn.Linear(4, 3)]
    twice = nn.Sequential(*layers).double()
    once = nn.Sequential(*layers[:2], OnceDifferentiable(), layers[3]).double()
    with pytest.raises(CurvatureError, match="method='finite_difference'"):
        HessianOperator(once, cross_entropy, images()).to_dense()
    op = by_differences(once)
    assert relative(op.to_dense(), dense_hessian(twice, images())) < 1e-7
    assert op.differences.from_exact != op.differences.from_exact  # there is nothing to compare with
    assert 0 < op.differences.difference < 1e-6


def test_products_are_linear_in_the_length_of_the_vector() -> None:
    op = by_differences(NETWORKS["tanh"]())
    v = torch.randn(op.shape[0], dtype=torch.float64)
    for length in (1e-12, 1e12):
        torch.testing.assert_close(op.matvec(length * v), length * op.matvec(v), rtol=1e-6, atol=0)
    assert not op.matvec(torch.zeros_like(v)).any()


def test_a_loss_that_is_linear_in_the_parameters_has_no_curvature() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3)).double()
    op = HessianOperator(model, lambda outputs, _: outputs.mean(), images(), method="finite_difference")
    assert float(op.to_dense().abs().max()) < 1e-9


def test_gradients_that_are_mere_round_off_are_refused() -> None:
    class Coarse(nn.Module):
        """Slopes jump wherever a number that grows by 1e6 times the parameters has a new last digit."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(36, 3))

        def forward(self, x: Tensor) -> Tensor:
            z = x.flatten(1) @ self.weight
            return z * (1 + (1e9 * z.detach()).sin())

    op = HessianOperator(Coarse(), cross_entropy, images(), dtype=torch.float32, method="finite_difference")
    with pytest.raises(CurvatureError, match="finite differences of this gradient are wrong by"):
        op.to_dense()


def test_only_the_hessian_is_made_of_differences_of_gradients() -> None:
    with pytest.raises(CurvatureError, match="products of the Hessian only"):
        GGNOperator(NETWORKS["tanh"](), cross_entropy, images(), method="finite_difference")
    with pytest.raises(CurvatureError, match="method is 'differences'"):
        HessianOperator(NETWORKS["tanh"](), cross_entropy, images(), method="differences")


def test_spectra_of_a_network_without_second_derivatives() -> None:
    """They are those of the same network with them, and their intervals hold its largest eigenvalue."""
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)]
    data = torch.randn(200, 6), torch.randint(3, (200,))
    options = {"data": data, "loss": cross_entropy, "n_hvp": 40, "progress": False}
    exact = pn.hessian(nn.Sequential(*layers), dtype="float64", **options)
    net = nn.Sequential(layers[0], OnceDifferentiable(), layers[2])
    ds = pn.hessian(net, method="finite_difference", **options)
    assert ds.hvp_method == "finite differences"
    assert 1e-6 < ds.hvp_difference < 0.1
    assert ds.lambda_max_low.item() <= exact.lambda_max.item() <= ds.lambda_max_high.item()
    for name in ("trace", "trace_probe_se", "frobenius_norm", "lambda_max"):
        assert ds[name].item() == pytest.approx(exact[name].item(), rel=0.01), name
    # of 32 parts of the data in place of 200 examples: the scatter of a scatter over 32 is 13 %
    assert ds.trace_data_se.item() == pytest.approx(exact.trace_data_se.item(), rel=0.5)
