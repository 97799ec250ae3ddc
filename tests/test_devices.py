"""Nothing that runs on a device mixes it with the CPU: main paths on tensors of devices that hold no values.

Tensors of ``meta`` can be differentiated, and fake ones of CUDA exist where there is no GPU; an operation on one of
these and a tensor of the CPU is an error with both, as it is on a GPU, and so is reading a value back.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_map

from pnanalysis.curvature.network_loss import LossArguments
from pnanalysis.curvature.operators import EmpiricalFisherOperator, GGNOperator, HessianOperator
from pnanalysis.spectra import lanczos
from pnanalysis.spectra.inner_products import combinations, coordinates, norms, orthogonalised, recombine
from pnanalysis.spectra.linear_operator import DiagonalOperator
from pnanalysis.spectra.memory import Storage
from pnanalysis.spectra.random_vectors import random_unit_vectors
from tests.curvature.conftest import NETWORKS, images

CUDA = torch.device("cuda")


def on_meta(item: object) -> object:
    if not isinstance(item, Tensor):
        return item
    return torch.empty_strided(item.shape, item.stride(), dtype=item.dtype, device="meta")


def products_on_meta(kind, model: nn.Module) -> list[Tensor]:
    """Both kinds of products and the forms of single examples."""
    op = kind(model, cross_entropy, images((6,)), expected_products=1)
    at = LossArguments(*tree_map(on_meta, tuple(op._few)))
    v = [torch.empty_like(parameter) for parameter in at.theta.values()]
    with op._passes():
        return [*op._product(at, v), *op._direct(at)(v), op._row_forms(at, v, v)]


@pytest.mark.parametrize("kind", [HessianOperator, GGNOperator, EmpiricalFisherOperator])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_products_stay_on_their_device(kind, name: str) -> None:
    assert {found.device.type for found in products_on_meta(kind, NETWORKS[name]())} == {"meta"}


@pytest.mark.parametrize("kind", [HessianOperator, GGNOperator, EmpiricalFisherOperator])
def test_recomputed_products_stay_on_their_device(kind) -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Flatten(), nn.Linear(36, 36), nn.Softmax(-1)) for _ in range(2)))
    op = kind(model.double(), cross_entropy, images((6,)), checkpoint_activations=True)
    at = LossArguments(*tree_map(on_meta, tuple(op._few)))
    v = [torch.empty_like(parameter) for parameter in at.theta.values()]
    assert {found.device.type for found in op._recomputed_product(at, v)} == {"meta"}


def test_a_network_that_mixes_devices_is_found_out() -> None:
    class Mixing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flatten(1)) + torch.arange(3.0).double()

    with pytest.raises(RuntimeError, match="device"):
        products_on_meta(HessianOperator, Mixing(36, 3).double())


@pytest.mark.parametrize("mode", ["memory", "half", "none"])
@pytest.mark.parametrize("n_deflated", [0, 4])
def test_lanczos_stays_on_its_device_and_waits_for_nothing(
    mode: str, n_deflated: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanczos, "_exponent_of", lambda *_: 0)  # reads the first product back, once
    with FakeTensorMode():
        op = DiagonalOperator(torch.ones(1000, device=CUDA))
        start = random_unit_vectors(op, [0, 1], 0)
        storage = Storage(torch.float32, CUDA, mode)
        deflated = storage.columns(1000, n_deflated) if n_deflated else None
        columns = storage.columns(1000, 2 * storage.kept(8))
        run = lanczos.Lanczos(op, start, 8, deflated, storage=columns, reorthogonalise=mode != "none")
        for _ in range(6):
            run._advance()
        assert start.device == run.alpha.device == run.following.device
        assert run.alpha.device.type == "cuda"


def test_arithmetic_of_bases_stays_on_its_device() -> None:
    with FakeTensorMode():
        V, basis = torch.ones(1000, 2, device=CUDA), torch.ones(1000, 5, device=CUDA, dtype=torch.float16)
        rest, (found,) = orthogonalised(V, [basis])
        recombine(basis, torch.ones(5, 2, device=CUDA, dtype=torch.float16))
        for tensor in (
            rest,
            found,
            combinations(basis, torch.ones(5, 2, device=CUDA)),
            norms(V),
            coordinates(basis, V),
        ):
            assert tensor.device.type == "cuda"
