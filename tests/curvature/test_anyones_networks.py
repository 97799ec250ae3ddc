"""Networks that keep things, write into things, draw, return nests, or hold complex numbers."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from pnanalysis.curvature.operators import EmpiricalFisherOperator, GGNOperator, HessianOperator
from pnanalysis.errors import CurvatureError
from tests.curvature.conftest import NETWORKS, dense_hessian, images, relative

BATCHES = images((6, 4))
BUDGETS = pytest.mark.parametrize("expected_products", [1000, 10])


class Keeping(nn.Module):
    """Keeps a mask for the batch size at hand, its features, and what it has seen, on itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(36, 4), nn.Linear(4, 3)
        self.mask: Tensor | None = None
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None or len(self.mask) != len(x):
            self.mask = torch.linspace(0.5, 1, len(x), dtype=x.dtype)[:, None]
        self.features = self.first(x.flatten(1)).tanh()
        self.seen.append(self.features)
        return self.last(self.features * self.mask)


@BUDGETS
@pytest.mark.parametrize("trained", [False, True])
def test_what_a_network_keeps_does_not_reach_the_next_pass(trained: bool, expected_products: int) -> None:
    torch.manual_seed(0)
    model = Keeping().double()
    if trained:
        cross_entropy(model(BATCHES[0][0]), BATCHES[0][1]).backward()
    seen = list(model.seen)
    op = HessianOperator(model, cross_entropy, BATCHES, expected_products=expected_products)
    fresh = Keeping().double()
    fresh.load_state_dict(model.state_dict())
    assert relative(op.to_dense(), dense_hessian(fresh, BATCHES)) < 1e-10
    assert len(model.seen) == len(seen)
    assert not op.model.seen[len(seen) :]


class InPlace(nn.Module):
    """Normalises its input in place, counts its passes in a buffer, and clips its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(36, 3)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        x -= 0.5
        x /= 2.0
        self.passes += 1
        return self.last(x.flatten(1).tanh())


@BUDGETS
def test_a_network_that_writes_into_its_input_gets_copies(expected_products: int) -> None:
    torch.manual_seed(0)
    model = InPlace().double()
    data = [(x.clone(), y.clone()) for x, y in BATCHES]
    op = HessianOperator(model, cross_entropy, data, expected_products=expected_products)
    first, second = op.to_dense(), op.to_dense()
    clean = nn.Sequential(nn.Flatten(), nn.Tanh(), nn.Linear(36, 3)).double()
    clean[2].load_state_dict(model.last.state_dict())
    expected = dense_hessian(clean, [((x - 0.5) / 2, y) for x, y in BATCHES])
    assert relative(first, expected) < 1e-10
    assert torch.equal(first, second)
    assert all(torch.equal(x, known) for (x, _), (known, _) in zip(data, BATCHES, strict=True))
    assert float(model.passes) == 0


class Rotating(nn.Module):
    """Rotates pairs of features by complex phases."""

    def __init__(self, buffer: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(36, 4), nn.Linear(4, 3)
        phases = torch.polar(torch.ones(2), torch.arange(2.0) + 0.7)
        if buffer:
            self.register_buffer("phases", phases)
        else:
            self.phases = phases

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(self.first(x.flatten(1)).reshape(-1, 2, 2)) * self.phases
        return self.last(torch.view_as_real(pairs).flatten(1).tanh())


@pytest.mark.parametrize("buffer", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_complex_phases_keep_their_imaginary_parts(buffer: bool) -> None:
    torch.manual_seed(0)
    model = Rotating(buffer)
    exact = copy.deepcopy(model)
    exact.phases = exact.phases.to(torch.complex128)
    for layer in (exact.first, exact.last):
        layer.double()
    expected = dense_hessian_of(exact)
    assert relative(HessianOperator(model, cross_entropy, BATCHES, dtype=torch.float64).to_dense(), expected) < 1e-6
    assert relative(HessianOperator(model, cross_entropy, BATCHES).to_dense().double(), expected) < 1e-3


def dense_hessian_of(model: nn.Module) -> Tensor:
    """As :func:`dense_hessian`, which would cast the buffers of the network."""
    leaves = list(model.parameters())
    total = sum(len(y) for _, y in BATCHES)
    loss = sum(cross_entropy(model(x), y) * len(y) / total for x, y in BATCHES)
    slope = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, leaves, create_graph=True)])
    rows = [torch.autograd.grad(entry, leaves, retain_graph=True, materialize_grads=True) for entry in slope]
    return torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])


class Spectral(nn.Module):
    """Multiplies a Fourier transform by complex weights, or by pairs of real ones."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.last = nn.Parameter(weight), nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.weight.is_complex() else torch.view_as_complex(self.weight)
        return self.last(torch.fft.irfft(torch.fft.rfft(x.flatten(1)) * weight, n=36).tanh())


@pytest.mark.parametrize("operator", [HessianOperator, GGNOperator, EmpiricalFisherOperator])
@BUDGETS
def test_a_complex_parameter_is_its_real_and_imaginary_part(operator: Any, expected_products: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(19, dtype=torch.complex128)
    model, pairs = Spectral(weight), Spectral(torch.view_as_real(weight).clone())
    for net in (model, pairs):
        torch.manual_seed(1)
        net.last = nn.Linear(36, 3).double()
    ops = [operator(net, cross_entropy, BATCHES, weight_decay=0.1, expected_products=expected_products)
           for net in (model, pairs)]  # fmt: skip
    assert ops[0].shape == ops[1].shape == (38 + 111, 38 + 111)
    assert relative(ops[0].to_dense(), ops[1].to_dense()) < 1e-10
    assert relative(ops[0].gradient(), ops[1].gradient()) < 1e-10


class TwoHeads(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.body, self.mean, self.scale = nn.Linear(36, 4), nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Any:
        hidden = self.body(x.flatten(1)).tanh()
        mean, scale = self.mean(hidden), self.scale(hidden)
        if self.form == "mapping":
            return {"mean": mean, "scale": scale, "name": "two heads", "step": torch.tensor(3)}
        return torch.cat([mean, scale], 1) if self.form == "tensor" else (mean, [scale])


def gaussian(outputs: Any, targets: Tensor) -> Tensor:
    if isinstance(outputs, dict):
        mean, scale = outputs["mean"], outputs["scale"]
    elif isinstance(outputs, Tensor):
        mean, scale = outputs[:, :1], outputs[:, 1:]
    else:
        mean, scale = outputs[0], outputs[1][0]
    return ((scale[:, 0] + (mean[:, 0] - targets) ** 2 * torch.exp(-scale[:, 0])) / 2).mean()


@pytest.mark.parametrize(
    ("expected_products", "form", "operator"),
    [
        (1000, "tuple", GGNOperator), (1000, "tuple", EmpiricalFisherOperator), (1000, "mapping", HessianOperator),
        (10, "tuple", HessianOperator), (10, "mapping", GGNOperator),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (1000, "tuple", HessianOperator), (1000, "mapping", GGNOperator), (10, "tuple", GGNOperator),
                (10, "tuple", EmpiricalFisherOperator), (10, "mapping", HessianOperator),
            )
        ),
    ],
)  # fmt: skip
def test_outputs_may_be_nests(operator: Any, form: str, expected_products: int) -> None:
    torch.manual_seed(0)
    model, plain = TwoHeads(form).double(), TwoHeads("tensor").double()
    plain.load_state_dict(model.state_dict())
    batches = [(x, y.double()) for x, y in BATCHES]
    found = operator(model, gaussian, batches, expected_products=expected_products).to_dense()
    assert relative(found, operator(plain, gaussian, batches).to_dense()) < 1e-10


def test_a_loss_from_inside_the_network_has_no_gauss_newton_matrix() -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = NETWORKS["tanh"]()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            logits = self.net(x)
            return {"loss": logits.square().mean(), "logits": logits}

    with pytest.raises(CurvatureError, match="returns the loss itself"):
        GGNOperator(Inside(), lambda outputs, targets: outputs["loss"], BATCHES)
    HessianOperator(Inside(), lambda outputs, targets: outputs["loss"], BATCHES)


def residual(model: nn.Module, batch: Any) -> Tensor:
    """Of the equation u' + u = t."""
    x, t = batch
    x = x.detach().clone().requires_grad_()
    u = model(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return ((slope + u - t) ** 2).mean()


@BUDGETS
def test_a_loss_may_take_the_network(expected_products: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    x = torch.rand(12, 1).double()
    batches = [(x[:8], x[:8].cos()), (x[8:], x[8:].cos())]
    op = HessianOperator(model, residual, batches, expected_products=expected_products)
    leaves = list(model.parameters())
    slope = torch.autograd.grad(residual(model, (x, x.cos())), leaves, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in slope])
    rows = [torch.autograd.grad(entry, leaves, retain_graph=True, materialize_grads=True) for entry in flat]
    dense = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])
    assert relative(op.to_dense(), dense) < 1e-10
    assert op.loss() == pytest.approx(float(residual(model, (x, x.cos()))))
    for other in (GGNOperator, EmpiricalFisherOperator):
        with pytest.raises(CurvatureError, match="use the Hessian"):
            other(model, residual, batches)


class Sampling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = NETWORKS["tanh"]()

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.net(x), 0.5)


def test_a_network_that_draws_is_refused_or_averaged() -> None:
    model = Sampling()
    before = torch.get_rng_state()
    with pytest.raises(CurvatureError, match="draws at random in eval mode"):
        HessianOperator(model, cross_entropy, BATCHES)
    op = HessianOperator(model, cross_entropy, BATCHES, draws=3)
    dense = op.to_dense()
    assert torch.equal(dense, op.to_dense())
    singles = [op.trace_of_draws(200)[draw] for draw in range(3)]
    assert float(sum(singles)) / 3 == pytest.approx(float(dense.trace()), rel=0.2)
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(CurvatureError, match="draws is 0"):
        HessianOperator(model, cross_entropy, BATCHES, draws=0)


def test_normalisations_with_hooks_are_not_folded_and_wrong_branches_are_undone() -> None:
    class Branching(nn.Module):
        """On symbols it takes the branch with a mask."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.last = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(32, 3)

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            z = self.conv(x)
            normed = self.norm(z) if mask is not None else self.norm(z.tanh())
            return self.last(normed.flatten(1))

    torch.manual_seed(0)
    hooked = NETWORKS["batchnorm"]()
    hooked[0].register_forward_hook(lambda module, inputs, output: output.tanh())
    for model in (hooked, Branching().double().eval()):
        op = HessianOperator(model, cross_entropy, BATCHES)
        assert relative(op.to_dense(), dense_hessian(model, BATCHES)) < 1e-10


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda net: torch.compile(net, backend="eager")])
def test_wrappers_are_taken_off(wrap: Any) -> None:
    model = NETWORKS["tanh"]()
    wrapped = wrap(model)
    wrapped(BATCHES[0][0])
    op = HessianOperator(wrapped, cross_entropy, BATCHES)
    assert op.names == [name for name, _ in model.named_parameters()]
    assert relative(op.to_dense(), dense_hessian(model, BATCHES)) < 1e-10
    theirs = [name for name, _ in wrapped.named_parameters()][:1]
    assert HessianOperator(wrapped, cross_entropy, BATCHES, params=theirs).names == op.names[:1]


@pytest.mark.parametrize(
    ("expected_products", "reentrant"),
    [(1000, True), (10, False), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1000, False), (10, True)))],
)
def test_checkpointed_activations_change_nothing(reentrant: bool, expected_products: int) -> None:
    class Checkpointed(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.net[:2](x)
            return checkpoint(lambda z: self.net[2:](z), hidden, use_reentrant=reentrant)

    net = NETWORKS["tanh"]()
    op = HessianOperator(Checkpointed(net), cross_entropy, BATCHES, expected_products=expected_products)
    assert relative(op.to_dense(), dense_hessian(net, BATCHES)) < 1e-10


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients_are_made_dense(kind: Any) -> None:
    class Words(nn.Module):
        def __init__(self, sparse: bool) -> None:
            super().__init__()
            self.words, self.last = kind(7, 4, sparse=sparse), nn.Linear(4, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            found = self.words(tokens)
            return self.last((found.mean(1) if found.ndim == 3 else found).tanh())

    torch.manual_seed(0)
    sparse, dense = Words(True).double(), Words(False).double()
    dense.load_state_dict(sparse.state_dict())
    batches = [(torch.randint(7, (9, 3)), torch.randint(3, (9,)))]
    ops = [HessianOperator(net, cross_entropy, batches) for net in (sparse, dense)]
    assert relative(ops[0].to_dense(), ops[1].to_dense()) < 1e-12


def test_many_shapes_are_not_traced_one_by_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 3), nn.Tanh(), nn.Linear(3, 9)).double()
    batches = [(torch.randint(9, (2, n)), torch.randint(9, (2, n))) for n in range(3, 12)]

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs.movedim(-1, 1), targets)

    op = HessianOperator(model, loss, batches, expected_products=31, weight="batches")
    direct = HessianOperator(model, loss, batches, expected_products=1, weight="batches")
    v = torch.randn(op.shape[0]).double()
    torch.testing.assert_close(op.matvec(v), direct.matvec(v))
    assert 1 <= op._traces.n_programs < len(batches)


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Of the loss of each example, (n, P)."""
    leaves = list(model.parameters())
    losses = cross_entropy(model(x), y, reduction="none")
    rows = [torch.autograd.grad(loss, leaves, retain_graph=True) for loss in losses]
    return torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])


def test_class_weights_and_ignored_targets_in_the_empirical_fisher() -> None:
    model = NETWORKS["tanh"]()
    x, y = BATCHES[0]
    weight = torch.tensor([1.0, 5.0, 0.2]).double()
    y = y.clone()
    y[1] = -100
    op = EmpiricalFisherOperator(model, nn.CrossEntropyLoss(weight=weight), [(x[:2], y[:2]), (x[2:], y[2:])])
    counted = [i for i in range(len(y)) if y[i] != -100]
    rows = gradients(model, x, y)[counted]
    w = weight[y[counted]] / weight[y[counted]].sum()
    assert relative(op.to_dense(), rows.T @ (w[:, None] * rows)) < 1e-10
    assert relative(op.gradient(), w @ rows) < 1e-10


def test_targets_of_the_fisher_may_be_tuples() -> None:
    def weighted(outputs: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
        return (cross_entropy(outputs, targets[0], reduction="none") * targets[1]).mean()

    model, (x, y) = NETWORKS["tanh"](), BATCHES[0]
    u = torch.linspace(0.5, 1, len(y)).double()
    op = EmpiricalFisherOperator(model, weighted, [(x, (y, u))])
    rows = u[:, None] * gradients(model, x, y)
    assert relative(op.to_dense(), rows.T @ rows / len(y)) < 1e-10


def test_lazy_parameters_are_refused() -> None:
    with pytest.raises(CurvatureError, match="has no shape yet"):
        HessianOperator(nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), cross_entropy, BATCHES)


class Scaled(nn.Embedding):
    """As embeddings of some translators are: with a forward of their own around that of torch."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Functional(nn.Embedding):
    """By the function, which counts the padding from the end."""

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(input, self.weight, padding_idx=-5)


class MeanOfWords(nn.Module):
    """A mean over words, of which padding is one; with ``tied``, the padding's vector scores a class, too."""

    def __init__(self, embedding: type[nn.Embedding], tied: bool) -> None:
        super().__init__()
        self.embedding = embedding(5, 4, padding_idx=0)
        nn.init.normal_(self.embedding.weight)
        self.hidden, self.last = nn.Linear(4, 4), nn.Linear(4, 5)
        if tied:
            self.last.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.last(self.hidden(self.embedding(words).mean(1)).tanh())


@BUDGETS
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("embedding", [nn.Embedding, Scaled, Functional])
def test_padding_that_only_later_batches_have_has_no_curvature(
    embedding: type[nn.Embedding], tied: bool, expected_products: int
) -> None:
    torch.manual_seed(0)
    model, words, targets = MeanOfWords(embedding, tied).double(), torch.randint(1, 5, (24, 6)), torch.randint(5, (24,))
    words[8:, 2:] = 0
    batches = list(zip(words.split(8), targets.split(8), strict=True))
    op = HessianOperator(model, cross_entropy, batches, expected_products=expected_products)
    assert op.product_check.note == ""
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(cross_entropy(model(words), targets), parameters, create_graph=True)
    rows = [torch.autograd.grad(g, parameters, retain_graph=True) for part in gradient for g in part.flatten()
            if g.requires_grad]  # fmt: skip
    exact = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    assert relative(op.to_dense(), exact) < 1e-12
    with pytest.warns(UserWarning, match="is used elsewhere") if tied else nullcontext():
        differences = HessianOperator(model, cross_entropy, batches, method="finite_difference")
    v = torch.ones(len(exact), dtype=torch.float64)
    assert (relative(differences.matvec(v), exact @ v) < 1e-5) != tied
