"""Activations that are computed again instead of being kept: the same products, in less memory."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import pnanalysis as pn
from pnanalysis.curvature.base import CurvatureOperator
from pnanalysis.curvature.operators import EmpiricalFisherOperator, GGNOperator, HessianOperator
from pnanalysis.curvature.recomputed import blocks_of
from pnanalysis.errors import CurvatureError
from tests.curvature.conftest import dense_hessian, images, relative

BATCHES = images((5, 3))


class Block(nn.Module):
    """Writes into its argument, takes another by keyword, and returns a nest."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x: Tensor, *, scale: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        x = x.mul_(scale)
        found = x + self.norm(self.inner(x)).tanh()
        return {"hidden": found, "mask": mask, "n": 3, "largest": found.argmax(1)}


class Blocks(nn.Module):
    """Three blocks, of which the first and the last are the same."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(36, 4), nn.Linear(4, 3)
        block = Block()
        self.blocks = nn.ModuleList([block, Block(), block])
        self.scale = nn.Parameter(torch.tensor(0.9))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1))
        for block in self.blocks:
            x = block(1.0 * x, scale=self.scale)["hidden"]
        return self.last(x)


class SelfCheckpointed(nn.Module):
    """Passes a part of itself, which stands in no container, to torch's checkpointing."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.first, self.last = nn.Linear(36, 4), nn.Linear(4, 3)
        self.middle = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1))
        x = self.middle(x) if self.reentrant is None else checkpoint(self.middle, x, use_reentrant=self.reentrant)
        return self.last(x)


def network(make: Any, *arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = make(*arguments).double()
    return model


KINDS: list[type[CurvatureOperator]] = [HessianOperator, GGNOperator, EmpiricalFisherOperator]


@pytest.mark.parametrize("make", [Blocks, lambda: SelfCheckpointed(True), lambda: SelfCheckpointed(False)])
@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_products_are_those_of_the_dense_matrix(kind: type[CurvatureOperator], make: Any) -> None:
    model = network(make)
    op = kind(model, cross_entropy, BATCHES, checkpoint_activations=True, weight_decay=0.1)
    V = torch.randn(op.shape[0], 3, dtype=torch.float64)
    found = op.matmat(V)
    assert op.method == "recomputed activations"
    assert op.product_check.difference < 1e-10
    kept = kind(model, cross_entropy, BATCHES, weight_decay=0.1, expected_products=3)
    assert relative(found, kept.matmat(V)) < 1e-10
    assert relative(op.gradient(), kept.gradient()) < 1e-10
    if kind is HessianOperator:
        vars(model)["reentrant"] = None  # this form cannot be differentiated twice by itself
        assert relative(found, dense_hessian(model, BATCHES) @ V + 0.1 * V) < 1e-10


class Stack(nn.Module):
    """Blocks with connections that skip them."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.first, self.last, self.blocks = nn.Linear(36, 4), nn.Linear(4, 3), nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1))
        for block in self.blocks:
            found = block(x)
            x = found[0] * found[1] + x if isinstance(found, tuple) else found + x
        return self.last(x)


class Masking(nn.Module):
    """Returns numbers that depend on no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(x).tanh(), torch.linspace(0.5, 1, 4, dtype=x.dtype)


class Cut(Masking):
    """Passes no gradient."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x)[0].detach()


class Writing(Masking):
    """Leaves another argument than it was given."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x.sin_().mul_(1.5))[0]


class Sharing(Stack):
    """The same block in two containers."""

    def __init__(self) -> None:
        super().__init__(Writing(), Masking())
        self.again = nn.ModuleList([self.blocks[0]])

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.last(self.again[0](self.first(x.flatten(1))))


UNUSUAL = {
    "constant outputs": lambda: Stack(Masking(), Masking()),
    "no gradient": lambda: Stack(Masking(), Cut()),
    "written arguments": lambda: Stack(Writing(), Writing()),
    "activations in place": lambda: Stack(*(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)) for _ in range(2))),
    "two containers": Sharing,
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_products_of_unusual_blocks(name: str) -> None:
    model = network(UNUSUAL[name])
    op = HessianOperator(model, cross_entropy, BATCHES, checkpoint_activations=True)
    V = torch.randn(op.shape[0], 2, dtype=torch.float64)
    found = op.matmat(V)
    assert op.method == "recomputed activations"
    assert relative(found, dense_hessian(model, BATCHES) @ V) < 1e-10


def test_blocks_are_found_in_containers() -> None:
    transformer = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 1, 8), 2)
    assert blocks_of(nn.ModuleDict({"body": transformer, "head": nn.Linear(4, 3)})) == ["body"]
    assert blocks_of(transformer) == ["layers.0", "layers.1"]
    stage = nn.Sequential(Block(), Block())
    assert blocks_of(nn.Sequential(nn.Linear(4, 4), stage, nn.ReLU())) == ["1.0", "1.1"]
    assert blocks_of(nn.Sequential(nn.Linear(4, 4), nn.Tanh())) == []
    assert blocks_of(network(SelfCheckpointed, True)) == []
    assert len(blocks_of(Sharing())) == 2
    own = network(SelfCheckpointed, True)
    assert blocks_of(own, [own.middle]) == blocks_of(own, [own.middle.forward]) == ["middle"]


def test_a_network_without_blocks_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3)).double()
    with pytest.raises(CurvatureError, match="finds no blocks .*take smaller batches"):
        HessianOperator(model, cross_entropy, BATCHES, checkpoint_activations=True)
    with pytest.raises(CurvatureError, match="drop draws"):
        HessianOperator(network(Blocks), cross_entropy, BATCHES, checkpoint_activations=True, draws=2)


class Telling(nn.Module):
    """Keeps what it computed for others."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.inner(x)
        return self.kept.tanh()


class Listening(nn.Module):
    """Takes a result that a block has kept on itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(36, 4), nn.Linear(4, 3)
        self.blocks = nn.ModuleList([Telling(), Telling()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1))
        for block in self.blocks:
            x = block(x)
        return self.last(x + self.blocks[0].kept)


def test_blocks_that_tell_others_what_they_computed_are_refused() -> None:
    with pytest.raises(CurvatureError, match=r"'blocks\.0' twice, which this network does not allow"):
        HessianOperator(network(Listening), cross_entropy, BATCHES, checkpoint_activations=True)


def test_layers_that_fill_a_cache_are_refused_with_its_switch() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 7, "n_positions": 5, "n_embd": 4, "n_layer": 2, "n_head": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, eos_token_id=None, bos_token_id=None)).eval()
    tokens = torch.arange(10).reshape(2, 5) % 7

    def loss(outputs: Any, targets: Tensor) -> Tensor:
        return cross_entropy(outputs.logits.flatten(0, 1), targets.flatten())

    data = [({"input_ids": tokens}, tokens)]
    with pytest.raises(CurvatureError, match=r"set model\.config\.use_cache = False"):
        HessianOperator(model, loss, data, checkpoint_activations=True)
    model.config.use_cache = False
    assert HessianOperator(model, loss, data, checkpoint_activations=True).method == "recomputed activations"


class Gated(nn.Module):
    """A gate that the gradient does not see, and forward mode does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(x).tanh()
        with torch.no_grad():
            gate = hidden.mean(1, keepdim=True).sigmoid()
        return hidden * gate


def test_where_only_reverse_mode_is_right_activations_are_kept() -> None:
    torch.manual_seed(0)
    stack = nn.Sequential(nn.Flatten(), nn.Linear(36, 4), Gated(), Gated(), nn.Linear(4, 3))
    model = stack.double()
    op = HessianOperator(model, cross_entropy, BATCHES, checkpoint_activations=True)
    v = torch.randn(op.shape[0], dtype=torch.float64)
    with pytest.warns(UserWarning, match="reverse mode alone, which keeps all activations"):
        found = op.matvec(v)
    assert relative(found, dense_hessian(model, BATCHES) @ v) < 1e-10


def test_differences_of_recomputed_gradients() -> None:
    model = network(Blocks)
    op = HessianOperator(model, cross_entropy, BATCHES, checkpoint_activations=True, method="finite_difference")
    v = torch.randn(op.shape[0], dtype=torch.float64)
    assert relative(op.matvec(v), dense_hessian(model, BATCHES) @ v) < 1e-5


def test_the_spectrum_of_recomputed_products_has_the_error_of_the_examples() -> None:
    x, y = images((60,))[0]
    options: dict[str, Any] = {"n_hvp": 12, "dtype": "float64", "progress": False}
    model = network(Blocks)
    ds = pn.hessian(model, data=(x, y), loss=cross_entropy, checkpoint_activations=True, **options)
    plain = pn.hessian(model, data=(x, y), loss=cross_entropy, **options)
    assert ds.attrs["hvp_method"] == "recomputed activations"
    assert ds.trace.item() == pytest.approx(plain.trace.item(), rel=1e-8)
    assert ds.trace_se.item() == pytest.approx(plain.trace_se.item(), rel=1e-6)


PEAK = """
import json, sys, torch
from torch import nn
import pnanalysis as pn

def resident(name):
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(name))

width, depth, n = 32, 12, 2048
def block():
    # derivatives of softmax and tanh are computed from their own results
    inner = [nn.Linear(width, 4 * width), nn.GELU(), nn.Softmax(-1), nn.Tanh(), nn.Linear(4 * width, width)]
    return nn.Sequential(*inner)

net = nn.Sequential(nn.Linear(width, width), *(block() for _ in range(depth)), nn.Linear(width, 10))
data = [(torch.randn(n, width), torch.randint(10, (n,)))]
op = pn.HessianOperator(
    net, nn.functional.cross_entropy, data, checkpoint_activations=sys.argv[1] == "yes", expected_products=2
)
op.product_check
before = resident("VmRSS")
op.matvec(torch.ones(op.shape[0]))
print(json.dumps((resident("VmHWM") - before) / (4 * width * n)))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_falls_to_that_of_one_block() -> None:
    peaks = {}
    for option in ("yes", "no"):
        # small arrays are given back to the system at once, so that the peak is that of what is in use
        run = ["env", "MALLOC_MMAP_THRESHOLD_=65536", "OMP_NUM_THREADS=1", sys.executable, "-W", "ignore"]
        done = subprocess.run([*run, "-c", PEAK, option], capture_output=True, text=True, check=True)
        peaks[option] = json.loads(done.stdout.splitlines()[-1])
    # in activations as wide as the network: a block has about 17, and of all blocks input and derivative stay
    assert peaks["yes"] < peaks["no"] / 2.5
    assert peaks["yes"] < 130
