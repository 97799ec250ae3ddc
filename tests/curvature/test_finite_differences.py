"""Products by differences of gradients: against exact ones, and what they say of their own error."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3

import pnanalysis as pn
from pnanalysis.curvature.operators import GGNOperator, HessianOperator
from pnanalysis.errors import CurvatureError
from pnanalysis.spectra.differences import compare_spectra
from pnanalysis.spectra.lanczos import Lanczos
from pnanalysis.spectra.linear_operator import DiagonalOperator
from pnanalysis.spectra.random_vectors import random_unit_vectors
from tests.cases import cases
from tests.curvature.conftest import NETWORKS, TanhOnce, dense_hessian, images, relative


def by_differences(model: nn.Module, **options: object) -> HessianOperator:
    return HessianOperator(model, cross_entropy, images(), method="finite_difference", **options)


class OnceDifferentiable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return TanhOnce.apply(x)


@pytest.mark.parametrize("name", cases({name: name for name in NETWORKS}, ("linear", "maxpool", "avgpool-gelu")))
def test_in_double_precision_they_are_the_hessian(name: str) -> None:
    """Kinks of ReLU included: no jump lies within the short steps of double precision."""
    model = NETWORKS[name]()
    op = by_differences(model)
    assert op.differences.round_off < 1e-7
    assert relative(op.to_dense(), dense_hessian(model, images())) < 1e-7
    assert op.method == "finite differences"


def test_the_stated_error_is_no_less_than_what_others_have_found() -> None:
    op = by_differences(NETWORKS["tanh"]())
    own = op.round_off
    assert own < 1e-6
    op.differences.unexplained = 0.03
    assert op.round_off == 0.03
    op.differences.unexplained = own / 2
    assert op.round_off == own


def spectral_error(op: HessianOperator, exact: Tensor) -> float:
    """Of all products, relative to the norm of the matrix."""
    return float(torch.linalg.matrix_norm(op.to_dense().double() - exact, 2) / torch.linalg.matrix_norm(exact, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["tanh", pytest.param("conv", marks=pytest.mark.slow), "layernorm", "relu"])
def test_the_stated_error_is_the_one_that_is_made(name: str, dtype: torch.dtype) -> None:
    model = NETWORKS[name]()
    op = by_differences(model, dtype=dtype)
    assert spectral_error(op, dense_hessian(model, images())) < 2 * op.round_off
    assert op.round_off < (1e-2 if dtype == torch.float32 else 1e-6)


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 6))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_errors_are_those_of_all_data_and_of_every_product(
    activation: type[nn.Module], dtype: torch.dtype, seed: int
) -> None:
    """Of batches that differ in scale from the first, and of unit vectors, which cross kinks that others do not."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), activation(), nn.Linear(8, 3))
    inputs, targets = torch.randn(400, 6), torch.randint(3, (400,))
    scales = (0.1, 10.0) if seed % 2 else (1.0, 1.0)
    data = [
        (scale * inputs[half], targets[half]) for scale, half in zip(scales, (slice(200), slice(200, 400)), strict=True)
    ]
    exact = HessianOperator(model, cross_entropy, data, dtype=torch.float64).to_dense()
    options = {"dtype": dtype, "method": "finite_difference"}
    if (activation, dtype) == (nn.ReLU, torch.float32):
        # jumps within the steps of single precision are part of the error, or too many
        with suppress(CurvatureError):
            op = HessianOperator(model, cross_entropy, data, **options)
            assert spectral_error(op, exact) < 2 * op.round_off
    else:
        op = HessianOperator(model, cross_entropy, data, **options)
        assert spectral_error(op, exact) < 2 * op.round_off < (0.1 if dtype == torch.float32 else 1e-5)


def test_passes_in_bfloat16_state_a_large_error() -> None:
    model = NETWORKS["tanh"]()
    op = by_differences(model, dtype=torch.float32, amp="bf16")
    assert 1e-3 < op.round_off < 0.3
    assert spectral_error(op, dense_hessian(model, images())) < 2 * op.round_off


class HalfInside(nn.Module):
    """Rounds its weights to bfloat16 itself, so that short steps change nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = (nn.Parameter(torch.randn(shape) / 6) for shape in ((36, 8), (8, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1).bfloat16() @ self.inner.bfloat16()).to(x.dtype).tanh() @ self.outer


def test_half_precision_within_a_network_is_no_flat_loss() -> None:
    torch.manual_seed(0)
    model = HalfInside()
    op = by_differences(model, dtype=torch.float32)
    assert op.differences.step > 1e-3
    assert 1e-3 < op.round_off < 0.3
    full = nn.Sequential(nn.Flatten(), nn.Linear(36, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False)).double()
    for layer, weight in zip((full[1], full[3]), (model.inner, model.outer), strict=True):
        layer.weight.data = weight.detach().T.double().contiguous()
    assert abs(float(op.to_dense().trace()) / float(dense_hessian(full, images()).trace()) - 1) < 0.3


@pytest.mark.parametrize("size", [0.0, 1e-7, 1e-3])
def test_steps_do_not_shrink_with_small_parameters(size: float) -> None:
    model = NETWORKS["tanh"]()
    nn.init.constant_(model[3].bias, size)
    assert by_differences(model, params="3.bias", dtype=torch.float32).round_off < 1e-3


def test_networks_without_a_second_derivative() -> None:
    layers = [nn.Flatten(), nn.Linear(36, 4), nn.Tanh(), nn.Linear(4, 3)]
    twice = nn.Sequential(*layers).double()
    once = nn.Sequential(*layers[:2], OnceDifferentiable(), layers[3]).double()
    with pytest.raises(CurvatureError, match="method='finite_difference'"):
        HessianOperator(once, cross_entropy, images()).to_dense()
    op = by_differences(once)
    assert relative(op.to_dense(), dense_hessian(twice, images())) < 1e-7
    assert op.differences.unexplained != op.differences.unexplained  # there is nothing to compare with
    assert 0 < op.differences.difference < 1e-4


class Attention(nn.Module):
    """One layer of causal attention over a sequence, by the kernel that torch fuses."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(mixed.transpose(1, 2).flatten(-2).mean(1))


class Kernels(TorchDispatchMode):
    """Names of all operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        self.names.add(str(function))
        return function(*arguments, **(keywords or {}))


def test_fused_attention() -> None:
    """Passes take the fused kernel, which is differentiable once; exact products take the other one."""
    torch.manual_seed(0)
    model = Attention().double()
    batches = [(torch.randn(6, 5, 8).double(), torch.arange(6) % 3)]
    exact = HessianOperator(model, cross_entropy, batches, expected_products=1)
    V = random_unit_vectors(exact, range(4), 0)
    with Kernels() as kernels:
        expected = exact.matmat(V)
    assert not any("flash" in name for name in kernels.names)
    for dtype, most in ((torch.float64, 1e-6), (torch.float32, 1e-2)):
        op = HessianOperator(model, cross_entropy, batches, method="finite_difference", dtype=dtype)
        with Kernels() as kernels:
            found = op.matmat(V.to(dtype)).double()
        assert any("scaled_dot_product_flash_attention" in name for name in kernels.names)
        norm = float(expected.norm(dim=0).max())  # at most that of the matrix
        assert float((found - expected).norm(dim=0).max()) / norm < 2 * op.round_off
        assert op.round_off < most


@pytest.mark.slow
def test_a_mobilenet() -> None:
    """Convolutions by channel, squeeze and excitation, and activations with kinks in their slopes."""
    setting = partial(InvertedResidualConfig, width_mult=1.0, dilation=1)
    blocks = [setting(8, 3, 8, 8, True, "RE", 2), setting(8, 5, 16, 8, True, "HS", 1)]
    torch.manual_seed(0)
    model = MobileNetV3(blocks, last_channel=16, num_classes=3, dropout=0.0).double()
    batches = [(torch.randn(6, 3, 16, 16).double(), torch.arange(6) % 3)]
    with torch.no_grad():
        for _ in range(30):  # statistics of these images
            model(batches[0][0])
    exact = HessianOperator(model, cross_entropy, batches, expected_products=1)
    V = random_unit_vectors(exact, range(4), 0)
    expected = exact.matmat(V)
    norm = float(Lanczos(exact, V[:, :1], 10).extend(10).alpha.abs().max())  # at most that of the matrix
    for dtype, most in ((torch.float64, 1e-6), (torch.float32, 3e-2)):
        op = HessianOperator(model, cross_entropy, batches, method="finite_difference", dtype=dtype)
        off = float((op.matmat(V.to(dtype)).double() - expected).norm(dim=0).max()) / norm
        assert off < 2 * op.round_off
        assert op.round_off < most


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
        """Its slope changes at random with every digit of the parameters."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(36, 3))

        def forward(self, x: Tensor) -> Tensor:
            z = x.flatten(1) @ self.weight
            return z * (1 + (1e9 * z.detach()).sin())

    with pytest.raises(CurvatureError, match=r"wrong by \d+% of the norm of the matrix; compute in float64"):
        HessianOperator(Coarse(), cross_entropy, images(), dtype=torch.float32, method="finite_difference")


class Offset(nn.Module):
    """A bias far from zero, whose rounding in single precision is coarser than a step."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.inner, self.outer, self.offset = nn.Linear(36, 8), nn.Linear(8, 3), offset
        self.inner.bias.data += offset

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(TanhOnce.apply(self.inner(x.flatten(1)) - self.offset))


@pytest.mark.parametrize("offset", [0.0, pytest.param(1e3, marks=pytest.mark.slow), 1e4])
def test_rounded_places_are_part_of_the_error(offset: float) -> None:
    """Where there is nothing to compare with; the rounding is the same on both sides."""
    torch.manual_seed(0)
    model = Offset(offset)
    exact = HessianOperator(model, cross_entropy, images(), dtype=torch.float64, method="finite_difference").to_dense()
    with suppress(CurvatureError):
        op = by_differences(model, dtype=torch.float32)
        assert spectral_error(op, exact) < 2 * op.round_off
        assert op.round_off < 1e-2 or offset


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
    change = compare_spectra(ds.isel(checkpoint=0), exact.isel(checkpoint=0))
    assert float(change.wasserstein1) < float(change.wasserstein1_noise)
    for name in ("trace", "trace_probe_se", "frobenius_norm", "lambda_max"):
        assert ds[name].item() == pytest.approx(exact[name].item(), rel=0.01), name
    # sums over many eigenvalues that are smaller than the error
    for name in ("negative_curvature", "negative_mass", "effective_rank", "effective_dimension"):
        assert np.isnan(ds[name].item()), name
    # of 32 parts of the data in place of 200 examples: the scatter of a scatter over 32 is 13 %
    assert ds.trace_data_se.item() == pytest.approx(exact.trace_data_se.item(), rel=0.5)
    every = {**options, "n_hvp": 200, "data_error": "none"}  # of probes there is no error then
    ds, exact = pn.hessian(net, method="finite_difference", **every), pn.hessian(nn.Sequential(*layers), **every)
    for name in ("trace", "frobenius_norm", "lambda_max", "lambda_min"):
        assert ds[f"{name}_low"].item() < exact[name].item() < ds[f"{name}_high"].item(), name


def test_an_interrupted_process_passes_its_errors_on(tmp_path: Path) -> None:
    """In the state of its iteration: what goes on states no smaller error than the products that it has taken over."""
    path, model = tmp_path / "state.safetensors", NETWORKS["tanh"]()
    op = by_differences(model)
    lanczos = Lanczos(op, random_unit_vectors(op, [0], 0), 6).extend(3)
    op.differences.earlier = 0.25  # as if a product had crossed a kink
    lanczos.save(path)
    again = by_differences(model)
    assert again.round_off < 1e-6
    assert Lanczos(again, random_unit_vectors(again, [0], 0), 6).restore(path).step == 3
    assert again.round_off == 0.25


def test_noise_of_products_is_no_curvature() -> None:
    """Of many parameters without any: intervals hold the norm, and zero."""
    eigenvalues = torch.zeros(100_000, dtype=torch.float64)
    eigenvalues[:6] = torch.tensor([1, 0.7, 0.5, 0.4, 0.3, 0.2])

    class Noisy(DiagonalOperator):
        round_off, by_differences, drawn = 5e-4, True, 0

        def matmat(self, V: Tensor) -> Tensor:
            Noisy.drawn += 1
            noise = torch.randn(V.shape, dtype=V.dtype, generator=torch.Generator().manual_seed(Noisy.drawn))
            return super().matmat(V) + self.round_off / 2 * noise / len(noise) ** 0.5

    ds = pn.spectral_density(Noisy(eigenvalues), n_hvp=60, progress=False)
    assert float(ds.lambda_min_low) <= 0 <= float(ds.lambda_min_high)
    assert float(ds.frobenius_norm_low) <= float(eigenvalues.norm()) <= float(ds.frobenius_norm_high)
    assert abs(float(ds.trace) - 3.1) < 3 * float(ds.trace_se)
    with pytest.raises(CurvatureError, match="do not give the effective rank"):
        pn.spectral_density(Noisy(eigenvalues), until={"effective_rank": 0.1}, progress=False)


def test_several_processes_need_a_group() -> None:
    with pytest.raises(CurvatureError, match="init_process_group"):
        pn.hessian(
            NETWORKS["tanh"](), data=images()[0], loss=cross_entropy, method="finite_difference", distributed=True
        )


def test_products_of_other_options() -> None:
    """Draws, micro-batches, parts of parameters and single layers: as the exact ones."""
    model = NETWORKS["conv"]()
    for options in ({"micro_batch": 2}, {"draws": 2}, {"params": "0.weight"}, {"weight_decay": 0.1}):
        exact = HessianOperator(model, cross_entropy, images(), expected_products=1, **options).to_dense()
        assert relative(by_differences(model, **options).to_dense(), exact) < 1e-6, options
    draws = by_differences(model, draws=2)
    assert torch.equal(draws.trace_of_draws(), draws.trace_of_draws())
    layers = dict(by_differences(model).per_layer())
    assert {op.method for op in layers.values()} == {"finite differences"}


def test_memory_that_does_not_suffice_while_the_step_is_chosen() -> None:
    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.n_passes = NETWORKS["tanh"](), 0

        def forward(self, x: Tensor) -> Tensor:
            Large.n_passes = getattr(Large, "n_passes", 0) + 1
            if Large.n_passes > 20 and len(x) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return self.net(x)

    with pytest.warns(UserWarning, match="going on with 3"):
        op = HessianOperator(Large(), cross_entropy, images(), method="finite_difference")
    assert op.round_off < 1e-6
    assert relative(op.to_dense(), dense_hessian(NETWORKS["tanh"](), images())) < 1e-6
