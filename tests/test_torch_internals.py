"""Canaries: each private name of torch does what the project relies on. One that fails says what torch has changed."""

from __future__ import annotations

import ast
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from torch.func import grad, jvp

from pnanalysis import torch_internals as internals

aten = torch.ops.aten


def traced_targets(function: Callable[..., Tensor], *arguments: Tensor) -> list[object]:
    graph = internals.make_fx(function, tracing_mode="fake")(*arguments).graph
    return [node.target for node in graph.nodes if node.op == "call_function"]


def hessian_product_targets() -> list[object]:
    """Operations in the trace of a product with the Hessian of a softmax regression."""

    def product(inputs: Tensor, targets: Tensor, weight: Tensor, v: Tensor) -> Tensor:
        gradient = grad(lambda w: nn.functional.cross_entropy(nn.functional.linear(inputs, w), targets))
        return jvp(gradient, (weight,), (v,))[1]

    part_of_a_vector = torch.ones(12)[:6].view(2, 3)  # as all tangents here are: with storage beyond their own entries
    return traced_targets(product, torch.ones(4, 3), torch.tensor([0, 1, 1, 0]), torch.ones(2, 3), part_of_a_vector)


def test_fake_tensors_have_shapes_but_no_values() -> None:
    with internals.FakeTensorMode() as mode:
        product = mode.from_tensor(torch.ones(3, 4)) @ mode.from_tensor(torch.ones(4, 2))
        assert product.shape == (3, 2), "operations on fake tensors no longer infer shapes"
        with pytest.raises(RuntimeError):  # so that code which branches on values is found out
            float(product.sum())


def test_the_tracer_sees_through_a_derivative_of_a_gradient() -> None:
    def product(x: Tensor, v: Tensor) -> Tensor:
        return jvp(grad(lambda y: y.sin().sum()), (x,), (v,))[1]

    x, v = torch.arange(3.0), torch.ones(3)
    traced = internals.make_fx(product, tracing_mode="fake")(x, v)
    assert isinstance(traced, fx.GraphModule), "make_fx no longer returns a GraphModule"
    torch.testing.assert_close(traced(x, v), -x.sin(), msg="make_fx no longer traces torch.func's transforms")
    (sine, *_) = (node for node in traced.graph.nodes if node.target == aten.sin.default)
    assert sine.meta["val"].shape == (3,), "nodes no longer carry a tensor without values in meta['val']"


def test_the_tracer_does_not_bake_values_in() -> None:
    traced = internals.make_fx(lambda x: x * x.sum(), tracing_mode="fake")(torch.ones(2))
    torch.testing.assert_close(traced(torch.full((2,), 3.0)), torch.full((2,), 18.0))


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.BatchNorm3d(2), nn.SyncBatchNorm(2), nn.LazyBatchNorm2d()]
)
def test_every_batch_normalisation_has_the_common_base(layer: nn.Module) -> None:
    assert isinstance(layer, internals.BatchNormBase), f"{type(layer).__name__} left torch's common base class"


def test_batch_normalisation_without_tracking_uses_the_statistics_of_the_batch() -> None:
    layer = nn.BatchNorm1d(2).train()
    layer.track_running_stats = False
    before = layer.running_mean.clone()
    outputs = layer(torch.randn(64, 2) + 5)
    assert outputs.mean().abs() < 1e-5, "BatchNorm with track_running_stats=False no longer uses batch statistics"
    assert torch.equal(layer.running_mean, before), "BatchNorm with track_running_stats=False changed its statistics"


def test_the_base_of_normalisations_with_statistics_includes_instance_normalisation() -> None:
    for layer in (nn.BatchNorm2d(2), nn.InstanceNorm1d(2), nn.InstanceNorm2d(2)):
        assert isinstance(layer, internals.NormBase), f"{type(layer).__name__} left torch's common base class"
    for layer in (nn.LayerNorm(2), nn.GroupNorm(1, 2)):
        assert not isinstance(layer, internals.NormBase), f"{type(layer).__name__} joined the base class"


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_every_convolution_has_the_common_base(kind: type[nn.Module]) -> None:
    layer = kind(1, 1, 1)
    assert isinstance(layer, internals.ConvolutionBase), f"{kind.__name__} left torch's common base class"
    assert not isinstance(layer, internals.TransposedConvolutionBase), f"{kind.__name__} counts as transposed"


@pytest.mark.parametrize("kind", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
def test_transposed_convolutions_have_both_bases_and_their_input_channels_first(kind: type[nn.Module]) -> None:
    layer = kind(2, 3, 1)
    assert isinstance(layer, internals.ConvolutionBase), f"{kind.__name__} left the base class of convolutions"
    assert isinstance(layer, internals.TransposedConvolutionBase), f"{kind.__name__} left its base class"
    assert layer.weight.shape[:2] == (2, 3), f"the weight of {kind.__name__} has another layout"


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "circular"])
def test_a_convolution_takes_another_weight_and_bias(padding_mode: str) -> None:
    layer = nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2, padding_mode=padding_mode)
    inputs = torch.randn(3, 2, 7, 7)
    found = internals.convolve(layer, inputs, 2 * layer.weight, 2 * layer.bias)
    torch.testing.assert_close(found, 2 * layer(inputs), msg="the layer's own convolution takes other arguments")


Pair = namedtuple("Pair", ["first", "second"])


def test_a_nest_is_taken_apart_and_put_together_again() -> None:
    nest = Pair({"a": torch.ones(1), "b": [torch.zeros(2), 3]}, (torch.ones(3),))
    leaves, spec = internals.tree_flatten(nest)
    assert isinstance(spec, internals.TreeSpec)
    assert [leaf.numel() if isinstance(leaf, Tensor) else leaf for leaf in leaves] == [1, 2, 3, 3]
    again = internals.tree_unflatten(leaves, spec)
    assert type(again) is Pair, "named tuples no longer survive flattening"
    assert again.first["a"] is nest.first["a"]


def test_the_structure_of_a_nest_can_be_a_key() -> None:
    first, second, other = ((internals.tree_flatten(nest)[1]) for nest in ((1, [2]), (3, [4]), (1, [2, 3])))
    assert first == second != other
    assert hash(first) == hash(second), "TreeSpec is no longer hashable by value"


def test_leaves_of_a_nest_come_in_order() -> None:
    assert internals.tree_leaves({"a": (1, 2), "b": [3]}) == [1, 2, 3]


def test_a_function_is_mapped_over_one_nest_or_several() -> None:
    assert internals.tree_map(lambda a: -a, {"a": (1, 2)}) == {"a": (-1, -2)}
    assert internals.tree_map(lambda a, b: a + b, (1, [2]), (10, [20])) == (11, [22])


def test_a_function_is_mapped_over_leaves_of_one_type() -> None:
    found = internals.tree_map_only(Tensor, lambda part: part + 1, (torch.zeros(1), 5))
    assert float(found[0]) == 1
    assert found[1] == 5


def test_a_vanishing_tangent_appears_as_zeros_without_memory() -> None:
    assert internals.ZEROS_WITHOUT_MEMORY in hessian_product_targets(), "tangents that vanish are traced otherwise"
    zeros = internals.ZEROS_WITHOUT_MEMORY([2, 3], dtype=torch.float64)
    assert zeros.shape == (2, 3), "_efficientzerotensor takes other arguments than aten.zeros"
    assert zeros.dtype == torch.float64
    assert torch.equal(zeros + torch.ones(2, 3), aten.zeros.default([2, 3], dtype=torch.float64) + torch.ones(2, 3))


def test_zeros_for_a_tangent_have_the_shape_of_their_second_argument() -> None:
    assert internals.ZEROS_FOR_TANGENT in hessian_product_targets(), "copies of tangents are traced otherwise"
    like, other = torch.ones(2), torch.ones(3, 4).T
    zeros = internals.ZEROS_FOR_TANGENT(like, other)
    assert zeros.shape == other.shape, "_new_zeros_with_same_feature_meta has another shape"
    assert not zeros.any(), "_new_zeros_with_same_feature_meta no longer gives zeros"


def test_a_conversion_appears_in_a_trace_by_its_private_name() -> None:
    targets = traced_targets(lambda x: x.to(torch.float64), torch.ones(2))
    assert targets == [internals.CONVERSION], "Tensor.to is traced to another operation than _to_copy"


def test_operations_in_place_are_recognised() -> None:
    for target in (aten.add_.Tensor, aten.copy_.default):
        assert internals.writes_into_argument(target), f"{target} no longer counts as in place"
    for target in (aten.add.Tensor, aten.view.default, max):
        assert not internals.writes_into_argument(target), f"{target} counts as in place"


def test_views_are_recognised() -> None:
    for target in (aten.view.default, aten.t.default, aten.select.int, aten.detach.default, aten.split.Tensor):
        assert internals.returns_view(target), f"{target} no longer counts as a view"
    for target in (aten.add.Tensor, aten.clone.default, max):
        assert not internals.returns_view(target), f"{target} counts as a view"
    assert internals.returns_view(internals.UNSAFE_VIEW)
    product = torch.ones(2, 2)
    assert internals.UNSAFE_VIEW(product, [4]).data_ptr() == product.data_ptr(), "it copies now"


def test_a_view_knows_its_base() -> None:
    with torch.no_grad():
        base = torch.empty(2, 3, 4, device="meta")
        assert all(
            internals.is_view_of(view, base) for view in (base, base.mT, base[0], *base.chunk(2), base.view(6, 4))
        )
        assert not internals.is_view_of(base.mT.reshape(-1), base)
        assert not internals.is_view_of(base + 1, base)


def test_tensors_within_vmap_are_recognised() -> None:
    found: list[bool] = []
    torch.vmap(lambda x: found.append(internals.is_vmapped(x)) or x)(torch.ones(2))
    assert found == [True]
    assert not internals.is_vmapped(torch.ones(2))


def test_the_compiler_is_a_module_that_compiling_loads() -> None:
    torch.compile(lambda x: x, backend="eager")(torch.ones(1))
    assert internals.compiler_is_loaded()


REPOSITORY = Path(__file__).parents[1]
PRIVATE_MODULES = ("torch._", "torch.fx.experimental", "torch.utils._", "torch.nn.modules.batchnorm")


def _private_uses(path: Path) -> list[str]:
    """Imports of private modules or names of torch, and private ATen operators, in one file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            private = node.module.startswith(PRIVATE_MODULES) or any(alias.name.startswith("_") for alias in node.names)
            found += [node.module] if private else []
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            expression = ast.unparse(node.value)
            found += [ast.unparse(node)] if expression in ("_aten", "nn", "conv") or "torch." in expression else []
    return found


def test_no_other_module_uses_private_names_of_torch():
    files = [path for package in ("pnanalysis", "trainers") for path in (REPOSITORY / package).rglob("*.py")]
    assert len(files) > 100
    uses = {path.name: _private_uses(path) for path in files if path.name != "torch_internals.py"}
    assert {name: found for name, found in uses.items() if found} == {}


def test_state_dicts_record_the_versions_of_modules() -> None:
    state = nn.Sequential(nn.BatchNorm1d(2)).state_dict()
    versions = internals.versions_in(state)
    assert versions["0"]["version"] == 2, "state dicts no longer record versions where they did"
    other = OrderedDict(state)
    assert internals.versions_in(other) is None
    internals.record_versions(other, versions)
    assert internals.versions_in(other) == versions


def test_writing_in_place_is_counted() -> None:
    tensor = torch.zeros(2)
    before = internals.times_written(tensor)
    tensor[0].add_(1)
    assert internals.times_written(tensor) == before + 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_can_be_left_out(reentrant: bool) -> None:
    calls = []

    def function(x: Tensor) -> Tensor:
        calls.append(1)
        return x.tanh()

    x = torch.ones(3, requires_grad=True)
    with internals.without_checkpointing():
        y = torch.utils.checkpoint.checkpoint(function, x, use_reentrant=reentrant)
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    torch.autograd.grad(slope.sum(), x)
    assert len(calls) == 1, "torch.utils.checkpoint no longer goes through these functions"
    torch.utils.checkpoint.checkpoint(function, x, use_reentrant=False).sum().backward()
    assert len(calls) == 3


def test_functions_of_single_elements_are_told_from_others() -> None:
    aten = torch.ops.aten
    elementwise = (aten.add.Tensor, aten.gelu.default, aten.mul_.Tensor, aten.hardswish.default, aten.where.self)
    assert all(internals.is_elementwise(operation) for operation in elementwise)
    others = (aten.mm.default, aten.cumsum.default, aten.sum.dim_IntList, aten.sort.default, aten.flip.default, len)
    assert not any(internals.is_elementwise(operation) for operation in others)


def test_parts_of_tensors_are_traced_in_several_threads() -> None:
    for n in (2, 3, 4):
        graph = internals.in_own_thread(internals.make_fx(torch.tanh, tracing_mode="fake"), torch.ones(8, 3)[1:n]).graph
        assert [node.target for node in graph.nodes if node.op == "call_function"] == [aten.tanh.default]
