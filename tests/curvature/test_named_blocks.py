"""Blocks of a network by name: layers, tensors, queries, heads, experts, and selections of one's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pnanalysis.curvature.named_blocks import DIVISIONS, blocks_of
from pnanalysis.curvature.parameters import select_blocks, select_parameters
from pnanalysis.curvature.quantisation import rounded, rounding
from pnanalysis.errors import CurvatureError


class Attention(nn.Module):
    """Queries, keys and values apart, two heads of the latter for four of the former."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads = 4, 2
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)
        self.o_proj = nn.Linear(8, 8)


class Mixture(nn.Module):
    """Experts as modules, and as one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(4, 2)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4)) for _ in range(2))


class Stacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(4, 3), nn.Module()
        self.experts.down_proj = nn.Parameter(torch.randn(3, 4, 5))


class Network(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.head = inner, nn.Linear(8, 3)


def sizes(model: nn.Module, found: dict[str, list[str]]) -> dict[str, int]:
    """Parameters in each block."""

    def size(name: str) -> int:
        (one,) = select_blocks(model, name)
        whole = model.get_parameter(one if isinstance(one, str) else one.parameter)
        return (whole if isinstance(one, str) else one.of(whole)).numel()

    return {label: sum(map(size, names)) for label, names in found.items()}


MODELS = {
    "apart": lambda: Network(Attention()),
    "fused": lambda: Network(nn.MultiheadAttention(8, 4)),
    "mixture": lambda: Network(Mixture()),
    "stacked": lambda: Network(Stacked()),
}


#: Divisions for which a network has nothing.
NONE = {("apart", "qkv"), ("apart", "experts"), ("fused", "experts")}
NONE |= {(model, division) for model in ("mixture", "stacked") for division in ("qkv", "heads")}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("division", DIVISIONS)
def test_every_parameter_is_in_one_block(model: str, division: str) -> None:
    network = MODELS[model]()
    if (model, division) in NONE:
        with pytest.raises(CurvatureError, match="known by name"):
            blocks_of(network, division)
        return
    found = blocks_of(network, division)
    assert sum(sizes(network, found).values()) == sum(p.numel() for p in network.parameters())
    every = [name for names in found.values() for name in names]
    assert len(select_parameters(network, every)) == len(set(every)) == len(every)


def test_queries_keys_and_values_of_torch() -> None:
    network = MODELS["fused"]()
    found = blocks_of(network, "qkv")
    assert list(found) == ["inner.in_proj[q]", "inner.in_proj[k]", "inner.in_proj[v]", "inner.out_proj", "head"]
    assert sizes(network, found)["inner.in_proj[k]"] == 8 * 8 + 8


def test_a_head_has_its_rows_and_the_columns_of_the_output_layer() -> None:
    network = MODELS["fused"]()
    found = blocks_of(network, "heads")
    assert sizes(network, found) == {
        **{f"inner[{i}/4]": 3 * (2 * 8 + 2) + 8 * 2 for i in range(4)}, "inner.out_proj": 8, "head": 27,
    }  # fmt: skip
    assert "inner.out_proj.weight[in.2:4]" in found["inner[1/4]"]


def test_keys_that_heads_share_are_blocks_of_their_own() -> None:
    found = sizes(MODELS["apart"](), blocks_of(MODELS["apart"](), "heads"))
    assert found["inner[3/4]"] == 2 * 8 + 2 + 8 * 2
    assert found["inner[kv.1/2]"] == 2 * (2 * 8 + 2)


def test_experts() -> None:
    assert {"inner.experts.0", "inner.experts.1", "inner.router"} < set(blocks_of(MODELS["mixture"](), "experts"))
    stacked = MODELS["stacked"]()
    assert sizes(stacked, blocks_of(stacked, "experts"))["inner.experts[2/3]"] == 20


def test_own_blocks() -> None:
    network = MODELS["fused"]()
    found = blocks_of(network, {"first": "inner.in_proj_weight[0:8]", "rest": ["inner.in_proj_weight[8:24]", "head"]})
    assert sizes(network, found) == {"first": 64, "rest": 128 + 27}
    assert list(blocks_of(network, ["head", "inner.*"])) == ["head", "inner.*"]
    assert list(blocks_of(network, "layers", params="head")) == ["head"]


@pytest.mark.parametrize(
    ("blocks", "says"),
    [
        ("rows", "choose one of"),
        (["head", "head.weight"], "may not overlap"),
        ([], "no blocks"),
        (["tail"], "matches no parameter"),
    ],
)
def test_what_is_no_division_is_refused(blocks: object, says: str) -> None:
    with pytest.raises(CurvatureError, match=says):
        blocks_of(MODELS["fused"](), blocks)


def test_named_blocks_leave_no_choice_of_parameters() -> None:
    with pytest.raises(CurvatureError, match="leave params out"):
        blocks_of(MODELS["fused"](), ["head"], params="head")


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_rounding_is_to_the_nearest_of_evenly_spaced_numbers(bits: int) -> None:
    weights = torch.randn(7, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    levels = torch.arange(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1)) * weights.abs().max() / (2 ** (bits - 1) - 1)
    nearest = levels[(weights[..., None] - levels).abs().argmin(-1)]
    torch.testing.assert_close(rounded(weights, bits), nearest)
    torch.testing.assert_close(rounding({"w": weights}, bits).change["w"], nearest - weights)


def test_what_is_not_rounded() -> None:
    zeros: Tensor = torch.zeros(2, 3)
    assert torch.equal(rounded(zeros, 4), zeros)
    assert not rounding({"b": torch.randn(5)}, 2).change["b"].any()
