"""On a CUDA device: products, bases, precisions, training and NCCL, against the CPU in float64."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import pnanalysis as pn
from pnanalysis.curvature.distributed import DistributedOperator, ShardedOperator
from pnanalysis.curvature.operators import EmpiricalFisherOperator
from pnanalysis.spectra.lanczos import Lanczos
from pnanalysis.spectra.linear_operator import DiagonalOperator, round_off
from pnanalysis.spectra.memory import Storage
from pnanalysis.spectra.random_vectors import random_unit_vectors
from tests.curvature.conftest import NETWORKS, images, relative
from trainers import PersistentPenalty
from trainers.loop.fit import fit

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = torch.device("cuda")
KINDS = [pn.HessianOperator, pn.GGNOperator, EmpiricalFisherOperator]


class Recurrent(nn.Module):
    """An LSTM over the rows of an image, whose cuDNN kernels can be differentiated once."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm, self.out = nn.LSTM(6, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x[:, 0])[0][:, -1])


def products(
    model: nn.Module, device: torch.device, kind: Any = pn.HessianOperator, **options: Any
) -> tuple[Any, Tensor]:
    """An operator, and its products with the same three vectors."""
    dtype = next(model.parameters()).dtype
    batches = [(x.to(device, dtype), y.to(device)) for x, y in images((12, 5))]
    op = kind(deepcopy(model).to(device), cross_entropy, batches, **options)
    return op, op.matmat(random_unit_vectors(op, range(3), 0)).double().cpu()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["tanh", "conv", "batchnorm", "layernorm"])
def test_products_are_those_of_the_cpu(kind: Any, name: str) -> None:
    (_, there), (_, here) = (products(NETWORKS[name](), device, kind) for device in (DEVICE, torch.device("cpu")))
    assert relative(there, here) < 1e-10


def test_products_of_an_lstm_are_those_of_the_cpu() -> None:
    (_, there), (_, here) = (products(Recurrent().double(), device) for device in (DEVICE, torch.device("cpu")))
    assert relative(there, here) < 1e-10


@pytest.mark.parametrize("amp", ["no", "tf32", "bf16"])
def test_products_are_off_by_no_more_than_their_precision_says(amp: str) -> None:
    model = NETWORKS["conv"]()
    exact = pn.HessianOperator(model, cross_entropy, images((12, 5)))
    op, there = products(deepcopy(model).float(), DEVICE, amp=amp)
    vectors = random_unit_vectors(exact, range(3), 0)
    norm = torch.linalg.matrix_norm(exact.to_dense(), 2)
    assert float((there - exact.matmat(vectors)).norm(dim=0).max() / norm) < 10 * round_off(op)


@pytest.mark.parametrize("mode", ["memory", "half", "none"])
def test_every_way_to_keep_a_basis_gives_the_spectrum(mode: str) -> None:
    values = torch.linspace(-1, 3, 5000) ** 3
    here, there = (
        pn.spectral_density(DiagonalOperator(values.to(device)), n_hvp=60, basis=mode, progress=False)
        for device in (torch.device("cpu"), DEVICE)
    )
    off = float(there.attrs.get("basis_round_off", 1e-6)) + 1e-5
    assert float(there.lambda_max) == pytest.approx(float(here.lambda_max), rel=off)
    assert abs(float(there.trace) - float(values.double().sum())) < 5 * float(there.trace_se)


@pytest.mark.parametrize("matrix", ["diagonal", "network"])
@pytest.mark.parametrize("mode", ["memory", "half", "none"])
def test_no_step_of_lanczos_waits_for_the_device(mode: str, matrix: str) -> None:
    op = DiagonalOperator(torch.linspace(-1, 3, 5000, device=DEVICE))
    if matrix == "network":
        op, _ = products(NETWORKS["conv"]().float(), DEVICE)
    start = random_unit_vectors(op, [0, 1], 0)
    storage = Storage(op.dtype, DEVICE, mode)
    columns = storage.columns(op.shape[0], 2 * storage.kept(20))
    run = Lanczos(op, start, 20, storage=columns, reorthogonalise=mode != "none").extend(4)  # reads products back
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(16):
            run._advance()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert run.step == 20


def test_training_gives_the_weights_of_the_cpu() -> None:
    torch.manual_seed(0)
    data = torch.randn(64, 1, 6, 6).double(), torch.randint(3, (64,))
    start, found = NETWORKS["conv"](), []
    for device in (torch.device("cpu"), DEVICE):
        model = deepcopy(start).to(device)
        penalty = PersistentPenalty(model, lam=0.1)
        penalty.add(deepcopy(start).to(device))
        fit(model, tuple(part.to(device) for part in data), epochs=3, batch_size=16, penalty=penalty)
        found.append(torch.cat([parameter.detach().cpu().flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-8)


def test_products_go_through_nccl(tmp_path: Path) -> None:
    here, expected = products(NETWORKS["conv"](), torch.device("cpu"))
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        op, _ = products(NETWORKS["conv"](), DEVICE)
        for kind in (DistributedOperator, ShardedOperator):
            shared = kind(op)
            found = shared.matmat(random_unit_vectors(shared, range(3), 0)).cpu()
            assert relative(found, expected) < 1e-10
        ds = pn.spectral_density(DistributedOperator(op), n_hvp=20, progress=False)
        assert float(ds.trace) == pytest.approx(
            float(pn.spectral_density(here, n_hvp=20, progress=False).trace), rel=1e-8
        )
    finally:
        dist.destroy_process_group()
