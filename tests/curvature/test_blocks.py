"""Parts of parameters: which entries they are, and their blocks of the matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pnanalysis import GGNOperator, HessianOperator
from pnanalysis.curvature.parameters import select_parameters
from pnanalysis.errors import CurvatureError
from tests.cases import cases

WIDTH, HEADS = 4, 2


class Conv1D(nn.Module):
    """A linear layer with its weight transposed, named as the one of transformers."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(n_in, n_out) / 2), nn.Parameter(torch.randn(n_out) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Attention(nn.Module):
    """One layer of attention over a sequence, its queries, keys and values computed together, and its classes."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.c_attn: nn.Module = Conv1D(WIDTH, 3 * WIDTH) if transposed else nn.Linear(WIDTH, 3 * WIDTH)
        self.c_proj: nn.Module = Conv1D(WIDTH, 3) if transposed else nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        return self.c_proj(mixed).mean(1)


@pytest.fixture(params=[False, True], ids=["Linear", "Conv1D"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return Attention(request.param).double()


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(5, 3, WIDTH, dtype=torch.float64, generator=generator), torch.arange(5) % 3)]


def entries(model: nn.Module, layer: str, rows: range, inner: bool = False) -> Tensor:
    """Places in the vector of all parameters of the outputs (or inputs) of a layer."""
    marks = []
    for name, parameter in model.named_parameters():
        mark = torch.zeros(parameter.shape, dtype=torch.bool)
        if name.startswith(layer) and not (inner and parameter.ndim == 1):
            transposed = parameter.ndim == 2 and type(model.get_submodule(layer)).__name__ == "Conv1D"
            mark.transpose(0, -1 if transposed != inner else 0)[list(rows)] = True
        marks.append(mark.flatten())
    return torch.cat(marks).nonzero().flatten()


CASES = {
    "c_attn[q]": ("c_attn", range(4), False),
    "c_attn[v]": ("c_attn", range(8, 12), False),
    "c_attn[k.1/2]": ("c_attn", range(6, 8), False),
    "c_attn[2/6]": ("c_attn", range(4, 6), False),
    "c_attn[3:5]": ("c_attn", range(3, 5), False),
    "c_proj[in.1/2]": ("c_proj", range(2, 4), True),
}


_WHOLE: dict[tuple[type[nn.Module], type[HessianOperator]], Tensor] = {}


def whole_matrix(model: nn.Module, kind: type[HessianOperator]) -> Tensor:
    """The dense matrix of all parameters, computed once for each of the two models and kinds."""
    key = type(model.get_submodule("c_attn")), kind
    if key not in _WHOLE:
        _WHOLE[key] = kind(model, F.cross_entropy, data()).to_dense()
    return _WHOLE[key]


@pytest.mark.parametrize("kind", [HessianOperator, GGNOperator])
@pytest.mark.parametrize("expected_products", [1, 1000], ids=["untraced", "traced"])
@pytest.mark.parametrize("selection", cases({name: name for name in CASES}, ("c_attn[v]", "c_attn[2/6]")))
def test_it_is_the_block_of_the_whole_matrix(
    model: nn.Module, kind: type[HessianOperator], selection: str, expected_products: int
) -> None:
    whole = whole_matrix(model, kind)
    part = kind(model, F.cross_entropy, data(), params=selection, expected_products=expected_products)
    layer, rows, inner = CASES[selection]
    at = entries(model, layer, rows, inner)
    assert part.shape[0] == len(at)
    assert torch.allclose(part.to_dense(), whole[at][:, at], rtol=1e-9, atol=1e-12)
    assert float(whole[at][:, at].norm()) > 0


def test_gradient_forms_subsets_and_layers_of_parts(model: nn.Module) -> None:
    op = HessianOperator(model, F.cross_entropy, data(), params=["c_attn[q]", "c_proj", "c_attn[v]"])
    whole = HessianOperator(model, F.cross_entropy, data())
    at = torch.cat([entries(model, "c_attn", range(4)), entries(model, "c_attn", range(8, 12))])
    at = torch.cat([at, entries(model, "c_proj", range(3))]).sort().values
    assert op.shape[0] == len(at)
    assert float(op.gradient().norm()) == pytest.approx(float(whole.gradient()[at].norm()), rel=1e-12)
    v = torch.randn(op.shape[0], 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    form = float((v.T @ op.matmat(v)).item())
    assert float(op.forms(v, v) @ torch.from_numpy(op.group_weights)) == pytest.approx(form, rel=1e-9)
    assert op.subset([0], 2).names == op.names
    blocks = dict(op.per_layer())
    assert list(blocks) == ["c_attn", "c_proj"]
    assert blocks["c_attn"].names == [name for name in op.names if name.startswith("c_attn")]


def test_a_penalty_sees_the_whole_network(model: nn.Module) -> None:
    def penalty(network: nn.Module) -> Tensor:
        return sum((p.square().sum() ** 2 for p in network.parameters()), torch.zeros((), dtype=torch.float64))

    whole = HessianOperator(model, F.cross_entropy, data(), penalty=penalty).to_dense()
    part = HessianOperator(model, F.cross_entropy, data(), params="c_attn[q]", penalty=penalty).to_dense()
    at = entries(model, "c_attn", range(4))
    assert torch.allclose(part, whole[at][:, at], rtol=1e-9, atol=1e-12)


def test_parts_of_experts_and_of_torchs_own_attention() -> None:
    network = nn.Module()
    network.attention = nn.MultiheadAttention(WIDTH, HEADS)
    network.experts = nn.Parameter(torch.randn(3, 2, 2))
    assert select_parameters(network, "experts[1/3]") == ["experts[1:2]"]
    names = ["attention.in_proj_weight[4:8]", "attention.in_proj_bias[4:8]"]
    assert select_parameters(network, "attention.in_proj*[k]") == names
    assert select_parameters(network, names) == names


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ("c_proj[q]", "not known to hold queries"),
        ("c_attn[in.q]", "not known to hold queries"),
        ("c_attn[1/5]", "does not divide"),
        ("c_attn[3/3]", "does not divide"),
        ("c_attn[4:13]", "no range"),
        ("c_attn[5:5]", "no range"),
        ("nothing[q]", "matches no parameter"),
        ("c_attn[x]", "matches no parameter"),
        (["c_attn[q]", "c_attn[0:1]"], "overlap"),
        (["c_attn[q]", "c_attn[in.0/2]"], "overlap"),
        (["c_attn[q]", "c_attn"], "chosen too"),
    ],
    ids=str,
)
def test_parts_that_there_are_not_are_refused(model: nn.Module, selection: str | list[str], message: str) -> None:
    with pytest.raises(CurvatureError, match=message):
        select_parameters(model, selection)


@pytest.mark.parametrize("n_keys", [1, 2])
def test_keys_that_queries_share_are_not_taken_for_a_third(n_keys: int) -> None:
    """Four queries and two times one key fill six heads, which is divisible by three; with two it is eight heads."""
    network = nn.Module()
    network.qkv = nn.Linear(WIDTH, (4 + 2 * n_keys) * 3)
    with pytest.raises(CurvatureError, match="not known to hold queries"):
        select_parameters(network, "qkv[k]")
    network.qkv = nn.Linear(6, 18)  # where the sizes would fit
    network.num_heads, network.num_key_value_heads = 4, n_keys
    with pytest.raises(CurvatureError, match="not known to hold queries"):
        select_parameters(network, "qkv[k]")
    network.num_key_value_heads = 4
    assert select_parameters(network, "qkv[k]") == ["qkv.weight[6:12]", "qkv.bias[6:12]"]
