"""Products are right, or refused, where torch's two modes of differentiation do not agree."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import cross_entropy

from pnanalysis.curvature import passes
from pnanalysis.curvature.operators import EmpiricalFisherOperator, GGNOperator, HessianOperator
from pnanalysis.curvature.product_check import random_direction
from pnanalysis.errors import CurvatureError
from tests.curvature.conftest import NETWORKS, TanhOnce, dense_hessian, images, relative

BATCHES = images((6, 4))


class Gated(nn.Module):
    """Scales its features by a gate that the gradient is not to see."""

    def __init__(self, gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.gate = nn.Linear(36, 4), nn.Linear(4, 3), gate

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x.flatten(1)).tanh()
        return self.last(hidden * self.gate(hidden))


def _under_no_grad(hidden: Tensor) -> Tensor:
    with torch.no_grad():
        return hidden.mean(1, keepdim=True).sigmoid()


GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "no_grad": _under_no_grad,
    "data": lambda hidden: hidden.data.mean(1, keepdim=True).sigmoid(),
    "detach": lambda hidden: hidden.detach().mean(1, keepdim=True).sigmoid(),
}


def focal(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy, with weights that count as constants."""
    each = cross_entropy(outputs, targets, reduction="none")
    with torch.no_grad():
        weight = (1 - torch.exp(-each)) ** 2
    return (weight * each).mean()


@pytest.mark.parametrize("expected_products", [1000, 10])
@pytest.mark.parametrize("gate", GATES)
def test_what_is_hidden_from_the_gradient_is_hidden_from_the_hessian(gate: str, expected_products: int) -> None:
    torch.manual_seed(0)
    model = Gated(GATES[gate]).double()
    op = HessianOperator(model, cross_entropy, BATCHES, expected_products=expected_products)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert relative(op.to_dense(), dense_hessian(model, BATCHES)) < 1e-10
    assert op.product_check.reverse


def test_constant_weights_of_a_loss_are_warned_about_once() -> None:
    model = NETWORKS["tanh"]()
    op = HessianOperator(model, focal, BATCHES)
    with pytest.warns(UserWarning, match="hidden from the gradient .*reverse mode") as seen:
        dense = op.to_dense()
    assert len(seen) == 1
    assert relative(dense, dense_hessian(model, BATCHES, focal)) < 1e-10
    assert op.method == "reverse mode"
    assert op.product_check.difference > 1e-3


@pytest.mark.parametrize("operator", [HessianOperator, GGNOperator])
def test_padding_has_no_gradient_and_no_curvature(operator: type[HessianOperator | GGNOperator]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4, padding_idx=2), nn.Flatten(), nn.Tanh(), nn.Linear(12, 3)).double()
    batches = [(torch.randint(7, (9, 3)), torch.randint(3, (9,)))]
    op = operator(model, cross_entropy, batches)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        dense = op.to_dense()
    assert not dense[8:12].any()  # the row of the padding
    if operator is HessianOperator:
        assert relative(dense, dense_hessian(model, batches)) < 1e-10


class Rewritten(nn.Module):
    """A function whose second derivative torch lacks, or has wrong, between two layers."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Linear(36, 4), nn.Linear(4, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x.flatten(1))))


def test_hardsigmoid_has_a_second_derivative() -> None:
    torch.manual_seed(0)
    model = Rewritten(F.hardsigmoid).double()
    written_out = Rewritten(lambda x: F.hardtanh(x + 3, 0.0, 6.0) / 6).double()
    written_out.load_state_dict(model.state_dict())
    op = HessianOperator(model, cross_entropy, BATCHES)
    assert relative(op.to_dense(), dense_hessian(written_out, BATCHES)) < 1e-10


@pytest.mark.parametrize("mode", ["mean", "sum", "max"])
def test_bags_of_embeddings_have_a_second_derivative(mode: str) -> None:
    class Bag(nn.Module):
        def __init__(self, written_out: bool) -> None:
            super().__init__()
            self.bag, self.last, self.written_out = nn.EmbeddingBag(7, 4, mode=mode), nn.Linear(4, 3), written_out

        def forward(self, tokens: Tensor) -> Tensor:
            if not self.written_out:
                return self.last(self.bag(tokens).tanh())
            rows = self.bag.weight[tokens]
            reduced = rows.amax(1) if mode == "max" else rows.mean(1) if mode == "mean" else rows.sum(1)
            return self.last(reduced.tanh())

    torch.manual_seed(0)
    model, written_out = Bag(False).double(), Bag(True).double()
    written_out.load_state_dict(model.state_dict())
    batches = [(torch.randint(7, (9, 3)), torch.randint(3, (9,)))]
    op = HessianOperator(model, cross_entropy, batches)
    assert relative(op.to_dense(), dense_hessian(written_out, batches)) < 1e-10


class Normalised(nn.Module):
    """A layer with normalised weight, in torch's own forms or written out."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.last = form, nn.Linear(4, 3)
        layer = nn.Linear(36, 4)
        if form == "hook":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                layer = nn.utils.weight_norm(layer)
        elif form == "parametrised":
            layer = nn.utils.parametrizations.weight_norm(layer)
        else:
            layer.length = nn.Parameter(layer.weight.detach().norm(dim=1, keepdim=True))
        self.first = layer

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        if self.form == "written out":
            weight = self.first.length * self.first.weight / self.first.weight.norm(dim=1, keepdim=True)
            return self.last(F.linear(x, weight, self.first.bias).tanh())
        return self.last(self.first(x).tanh())


@pytest.mark.parametrize("form", ["hook", "parametrised"])
def test_second_derivatives_of_normalised_weights_are_right(form: str) -> None:
    # those of torch._weight_norm are not, by either mode of differentiation
    torch.manual_seed(0)
    model, plain = Normalised(form).double(), Normalised("written out").double()
    (bias, g, v) = (p.detach() for p in model.first.parameters())
    plain.first.bias.data, plain.first.length.data, plain.first.weight.data = bias, g, v
    plain.last.load_state_dict(model.last.state_dict())
    op = HessianOperator(model, cross_entropy, BATCHES, params=["first"])
    whole = dense_hessian(plain, BATCHES)
    offsets, start = {}, 0
    for name, parameter in plain.named_parameters():
        offsets[name] = range(start, start + parameter.numel())
        start += parameter.numel()
    index = torch.tensor([i for name in ("bias", "length", "weight") for i in offsets[f"first.{name}"]])
    assert relative(op.to_dense(), whole[index][:, index]) < 1e-10


class WronglyDifferentiated(torch.autograd.Function):
    """A square whose second derivative is twice what it should be."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return slope * (4 * x - 2 * x.detach())


def test_derivatives_that_are_wrong_in_every_mode_are_refused() -> None:
    torch.manual_seed(0)
    model = Rewritten(WronglyDifferentiated.apply).double()
    with pytest.raises(CurvatureError, match="derivatives .* are wrong: .* differ from finite differences .* most at"):
        HessianOperator(model, cross_entropy, BATCHES).to_dense()


@pytest.mark.parametrize("depth", [2, 3])
def test_products_that_are_zero_are_not_taken_for_wrong(depth: int) -> None:
    """Linear networks of zeros that learn zero: their loss is of order four or six."""
    model = nn.Sequential(*[nn.Linear(3, 3, bias=False) for _ in range(depth)])
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    op = HessianOperator(model, nn.functional.mse_loss, [(x, torch.zeros(20, 3))])
    assert not op.to_dense().any()


class ZeroSlope(torch.autograd.Function):
    """A square whose derivative has, wrongly, none of its own."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.square()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return slope * 2 * ctx.saved_tensors[0].detach()


def test_products_that_are_wrongly_zero_are_refused() -> None:
    model = nn.Linear(3, 1, bias=False).double()
    x = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    op = HessianOperator(model, lambda outputs, targets: ZeroSlope.apply(outputs).mean(), [(x, x)])
    with pytest.raises(CurvatureError, match="derivatives of this network and loss are wrong"):
        op.to_dense()


class SineByReverseMode(torch.autograd.Function):
    """Has no forward mode, as most functions of users."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return slope * ctx.saved_tensors[0].cos()


@pytest.mark.parametrize("operator", [HessianOperator, GGNOperator, EmpiricalFisherOperator])
def test_where_only_reverse_mode_works_it_is_compared_with_differences(operator: Any) -> None:
    torch.manual_seed(0)
    model = Rewritten(SineByReverseMode.apply).double()
    op = operator(model, cross_entropy, BATCHES)
    model.function = torch.sin
    assert relative(op.to_dense(), operator(model, cross_entropy, BATCHES).to_dense()) < 1e-12
    assert op.product_check.difference < 1e-6


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
def test_missing_derivatives_are_found_whatever_the_size_of_parameters(offset: float) -> None:
    class Offset(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(36, 8), nn.Linear(8, 3)
            self.inner.bias.data += offset

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(TanhOnce.apply(self.inner(x.flatten(1)) - offset))

    torch.manual_seed(0)
    op = HessianOperator(Offset().double(), cross_entropy, BATCHES)
    with pytest.raises(CurvatureError, match=r"torch's derivatives .* are wrong.*method='finite_difference'"):
        op.to_dense()


def test_a_norm_at_zero_is_refused() -> None:
    class Bump(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.centre = nn.Parameter(torch.zeros(3).double())

        def forward(self, x: Tensor) -> Tensor:
            return torch.exp(-(torch.linalg.vector_norm(x - self.centre, dim=1) ** 2))

    inputs = torch.randn(4, 3).double()
    inputs[0] = 0.0
    batches = [(inputs, torch.zeros(4).double())]
    for expected_products in (1000, 10):
        op = HessianOperator(
            Bump(), lambda outputs, targets: outputs.mean(), batches, expected_products=expected_products
        )
        with pytest.raises(CurvatureError, match="rewrite them"):
            op.to_dense()


def test_kinks_at_the_very_point_are_not_taken_for_wrong_derivatives() -> None:
    model = NETWORKS["relu"]()
    nn.init.zeros_(model[1].bias)
    inputs = torch.cat([torch.zeros(3, 1, 6, 6).double(), BATCHES[0][0]])
    batches = [(inputs, torch.arange(9) % 3)]
    assert relative(HessianOperator(model, cross_entropy, batches).to_dense(), dense_hessian(model, batches)) < 1e-10


def test_functions_without_any_second_derivative_are_one_sentence() -> None:
    def alignment(outputs: Tensor, targets: Tensor) -> Tensor:
        """Connectionist temporal classification, of which torch has first derivatives only."""
        n = len(outputs)
        scores = F.log_softmax(outputs[None].expand(4, n, 3), dim=2)
        return F.ctc_loss(scores, targets[:, None] % 2 + 1, torch.full((n,), 4), torch.ones(n, dtype=torch.long))

    op = HessianOperator(NETWORKS["tanh"](), alignment, BATCHES, weight="examples")
    with pytest.raises(CurvatureError, match="HessianOperator cannot be computed for this .*ctc_loss"):
        op.to_dense()


def test_a_traced_program_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = NETWORKS["tanh"]()
    op = HessianOperator(model, cross_entropy, BATCHES)
    at = op.linearisation.at

    def scaled(fixed: Any, like: Any) -> Any:
        product, n_bytes = at(fixed, like)
        return (lambda v: [1.01 * part for part in product(v)]), n_bytes

    monkeypatch.setattr(op.linearisation, "at", scaled)
    with pytest.warns(UserWarning, match="traced product .* differs from the untraced one"):
        dense = op.to_dense()
    assert relative(dense, dense_hessian(model, BATCHES)) < 1e-10
    assert op.method == "reverse mode"


@pytest.mark.parametrize(
    "operator",
    [HessianOperator, *(pytest.param(kind, marks=pytest.mark.slow) for kind in (GGNOperator, EmpiricalFisherOperator))],
)
def test_ordinary_networks_pass_without_a_word(operator: Any) -> None:
    for name in ("conv", "batchnorm", "layernorm"):
        op = operator(NETWORKS[name](), cross_entropy, BATCHES, dtype=torch.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            op.matvec(torch.ones(op.shape[0]))
        assert op.method == "traced"
        assert op.product_check.difference < 1e-10


def test_directions_are_of_length_one_and_leave_the_random_state(monkeypatch: pytest.MonkeyPatch) -> None:
    state = torch.get_rng_state()
    theta = {"weight": torch.zeros(30, 4).double(), "bias": torch.zeros(4)}
    monkeypatch.delattr(torch, "randn")  # numbers of the CPU would have to be copied to other devices
    v = random_direction(theta, seed=3)
    assert all(map(torch.equal, v, random_direction(theta, seed=3)))
    assert not torch.equal(v[0], random_direction(theta, seed=4)[0])
    assert [(part.shape, part.dtype) for part in v] == [(t.shape, t.dtype) for t in theta.values()]
    assert sum(float(part.double().square().sum()) for part in v) == pytest.approx(1, rel=1e-6)
    assert torch.equal(torch.get_rng_state(), state)


def test_settings_of_the_process_are_restored() -> None:
    before = torch.backends.mha.get_fastpath_enabled()
    with passes.plain_passes(torch.device("cpu"), "no"):
        assert not torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled() == before
