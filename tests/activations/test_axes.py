"""Axes of examples and units are where the data are: whatever moves them, each number still says what it belongs to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from pnanalysis.activations.axis_tracker import Known
from pnanalysis.activations.hooks import watch_activations

N, T, U = 6, 4, 12
POWERS = (4, 4, 8)  # of two: wherever a dim is split, no axis is cut across
Step = Callable[[Tensor], Tensor]


class Labelled(nn.Module):
    """A layer, in place of whose outputs each number says its example and unit, and a ReLU after some steps."""

    def __init__(self, *steps: Step, n_units: int = U) -> None:
        super().__init__()
        self.fc = nn.Linear(3, n_units)
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        h.copy_(1000 * torch.arange(len(x))[:, None, None] + torch.arange(1, h.shape[-1] + 1))
        for step in self.steps:
            h = step(h)
        return F.relu(h)


def observed(model: nn.Module, *inputs: Tensor) -> tuple[Tensor, Known]:
    """The values and what is known of them, at the only activation."""
    seen: list[tuple[Tensor, Known]] = []
    with torch.no_grad(), watch_activations(model, lambda name, activation, *rest: seen.append(rest)):
        model(*inputs)
    (found,) = seen
    return found


def check(values: Tensor, known: Known) -> None:
    """Where axes are said to be known, every row is one example, and every column one unit."""
    values = values.reshape(values.shape[0], values.shape[1], -1).long()
    examples, units = values // 1000, values % 1000
    if known.examples:
        assert (examples == examples[:, :1, :1]).all()
        assert len(examples[:, 0, 0].unique()) == len(examples)
    if known.units:
        assert (units == units[:1, :, :1]).all()
        assert len(units[0, :, 0].unique()) == units.shape[1]


def a_step(ndim: int, shape: tuple[int, ...], draw: st.DrawFn) -> Step:
    """One of the ways of rearranging a tensor that lose nothing."""
    dim = st.integers(0, ndim - 1)
    kind = draw(st.sampled_from(
        ["transpose", "permute", "flatten", "unflatten", "unsqueeze", "squeeze", "movedim", "mT", "roundtrip", "stack"]
    ))  # fmt: skip
    i, j = draw(dim), draw(dim)
    low, high = min(i, j), max(i, j)
    order = draw(st.permutations(range(ndim)))
    divisor = draw(st.sampled_from([d for d in range(1, shape[i] + 1) if shape[i] % d == 0]))
    sizes = [*shape[:i], divisor, shape[i] // divisor, *shape[i + 1 :]]
    return {
        "transpose": lambda x: x.transpose(i, j),
        "permute": lambda x: torch.permute(x, order),
        "flatten": lambda x: x.flatten(low, high),
        "unflatten": lambda x: x.reshape(sizes),
        "unsqueeze": lambda x: x[(slice(None),) * i + (None,)],
        "squeeze": lambda x: x.squeeze(),
        "movedim": lambda x: torch.movedim(x, i, j),
        "mT": lambda x: x.mT.contiguous() if x.ndim > 1 else x,
        "roundtrip": lambda x: x.clone().unsqueeze(-1).swapaxes(-1, 0).squeeze(0),
        "stack": lambda x: torch.stack([x, x], dim=i),
    }[kind]


@st.composite
def chains(draw: st.DrawFn, shape: tuple[int, ...] = POWERS) -> list[Step]:
    steps: list[Step] = []
    x = torch.zeros(shape)
    for _ in range(draw(st.integers(1, 6))):
        step = a_step(x.ndim, tuple(x.shape), draw)
        after = step(x)
        if 0 < after.ndim <= 7 and after.numel() <= 5000:
            steps.append(step)
            x = after
    return steps


@settings(max_examples=150, deadline=None)
@given(chains())
def test_chains_of_transposes_and_reshapes_keep_both_axes(steps: list[Step]) -> None:
    n, t, u = POWERS
    values, known = observed(Labelled(*steps, n_units=u), torch.randn(n, t, 3))
    assert known == (True, True)
    assert values.shape[:2] == (n, u)
    check(values, known)


@settings(max_examples=100, deadline=None)
@given(chains((N, T, U)))
def test_chains_that_cut_across_axes_are_followed_or_said_to_be_unknown(steps: list[Step]) -> None:
    check(*observed(Labelled(*steps), torch.randn(N, T, 3)))


LOSSY: dict[str, tuple[Step, Known]] = {
    "some units": (lambda h: h[..., 2:7], Known()),
    "every other unit": (lambda h: h[..., ::2], Known()),
    "some units by number": (lambda h: h[..., [5, 0, 3]], Known()),
    "index_select": (lambda h: h.index_select(2, torch.tensor([5, 0])), Known()),
    "some positions": (lambda h: h[:, torch.tensor([2, 0])], Known()),
    "a position": (lambda h: h[:, -1], Known()),
    "a position of each example": (lambda h: h[torch.arange(N), torch.arange(N) % T], Known()),
    "positions of a mask": (lambda h: h[torch.arange(N * T).reshape(N, T) % 3 == 0], Known(True, False)),
    "one unit": (lambda h: h[..., 0], Known(False, True)),
    "examples of an index": (lambda h: h[torch.tensor([3, 3, 1])], Known(True, False)),
    "half by chunk": (lambda h: h.chunk(2, dim=-1)[1], Known()),
    "heads": (lambda h: h.view(N, T, 3, 4).transpose(1, 2)[:, 1], Known()),
    "mean over positions": (lambda h: h.mean(1), Known()),
    "largest over positions": (lambda h: h.max(dim=1).values, Known()),
    "mean over units": (lambda h: h.mean(-1, keepdim=True), Known(False, True)),
    "mean over heads": (lambda h: h.view(N, T, 3, 4).mean(2), Known(False, True)),
    "windows of positions": (lambda h: h.unfold(1, 3, 1), Known()),
    "windows of units": (lambda h: h.unfold(2, 3, 1), Known(False, True)),
    "pooled positions": (lambda h: F.max_pool1d(h.mT, 2).mT, Known()),
    "pooled units": (lambda h: F.max_pool1d(h, 2), Known(False, True)),
    "padded": (lambda h: F.pad(h, (0, 0, 1, 1), mode="reflect"), Known()),
    "repeated": (lambda h: h.repeat(1, 2, 1), Known()),
    "repeated examples": (lambda h: h.repeat_interleave(2, dim=0), Known()),
    "broadcast": (lambda h: h[:, :, None] + torch.zeros(5, 1), Known()),
    "an unknown operation": (lambda h: torch.sort(h, dim=1, descending=True).values, Known()),
    "filtered positions": (lambda h: torch.fft.irfft(torch.fft.rfft(h, dim=1), n=T, dim=1).round(), Known()),
    "filtered units": (lambda h: torch.fft.irfft(torch.fft.rfft(h)), Known(False, True)),
    "complex pairs": (
        lambda h: torch.view_as_real(torch.view_as_complex(h.view(N, T, U // 2, 2).contiguous())).flatten(2),
        Known(False, True),
    ),
    "isin": (lambda h: h * torch.isin(h, torch.tensor([-1.0]), invert=True), Known()),
    "sorted units": (lambda h: torch.sort(h, dim=2, descending=True).values, Known(False, True)),
    "cat of positions": (lambda h: torch.cat([h, h], dim=1), Known()),
    "cat of other examples": (lambda h: torch.cat([h, h], dim=0), Known(True, False)),
    "cat of halves of the examples": (lambda h: torch.cat([h[:2], h[2:]]), Known()),
    "filled in": (lambda h: torch.zeros(T, N, U).index_copy(0, torch.arange(T), h.transpose(0, 1)), Known()),
    "outer sum": (lambda h: h[:, :, :, None] + 0 * h[:, :, None, :], Known(False, True)),
    "two orders": (lambda h: h[:, :, :4] + 0 * h[:, :, :4].mT, Known(False, True)),
    "a function of its own": (lambda h: torch.renorm(h, 2, 0, 1e9), Known(False, False)),
}  # fmt: skip


@pytest.mark.parametrize("kind", LOSSY)
def test_what_is_left_of_the_axes_is_right(kind: str) -> None:
    step, expected = LOSSY[kind]
    values, known = observed(Labelled(step), torch.randn(N, T, 3))
    assert known == expected
    if "repeated" not in kind:
        check(values, known)


def assigned(h: Tensor) -> Tensor:
    steps = torch.zeros(T, N, U)
    for t in range(T):
        steps[t] = h[:, t]
    return steps


def assigned_where_sizes_coincide(h: Tensor) -> Tensor:
    steps = torch.zeros(N, N, U)  # as many steps as examples
    for t in range(N):
        steps[:, t] = h[:, t % T]
    return steps


@pytest.mark.parametrize("step", [assigned, assigned_where_sizes_coincide])
def test_steps_that_are_written_into_a_tensor(step: Step) -> None:
    values, known = observed(Labelled(step), torch.randn(N, T, 3))
    assert known == (True, True)
    check(values, known)


# --- layers: units are the axis that the layer's weights add -------------------------------------------------------


class Layer(nn.Module):
    """A function of an input and two parameters, and a ReLU."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(torch.randn(shape) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.function(x, *self.weights))


X, K = (N, T, 3), 5
LAYERS: dict[str, tuple[nn.Module, tuple[int, ...], Callable[[Tensor], Tensor] | None]] = {
    # what the outputs are as (examples, units, positions); None where units cannot be known
    "linear": (Layer(lambda x, w, b: F.linear(x, w, b), (K, 3), (K,)), X, lambda y: y.permute(0, 2, 1)),
    "linear of tokens": (Layer(lambda x, w: F.linear(x.mT, w), (K, T)), X, lambda y: y.permute(0, 2, 1)),
    "matmul": (Layer(lambda x, w: x @ w, (3, K)), X, lambda y: y.permute(0, 2, 1)),
    "matmul from the left": (Layer(lambda x, w: w @ x.mT, (K, 3)), X, lambda y: y),
    "transposed weights": (Layer(lambda x, w: torch.matmul(x, w.t()), (K, 3)), X, lambda y: y.permute(0, 2, 1)),
    "addmm and view": (
        Layer(lambda x, w, b: torch.addmm(b, x.view(-1, 3), w).view(*x.shape[:-1], K), (3, K), (K,)), X,
        lambda y: y.permute(0, 2, 1),
    ),
    "bmm of expanded weights": (
        Layer(lambda x, w: torch.bmm(x, w.expand(len(x), -1, -1)), (1, 3, K)), X, lambda y: y.permute(0, 2, 1)
    ),
    "baddbmm": (
        Layer(lambda x, w, b: torch.baddbmm(b, x, w.repeat(len(x), 1, 1)), (1, 3, K), (1, 1, K)), X,
        lambda y: y.permute(0, 2, 1),
    ),
    "einsum": (Layer(lambda x, w: torch.einsum("btc,oc->bot", x, w), (K, 3)), X, lambda y: y),
    "einsum with dots": (
        Layer(lambda x, w: torch.einsum("...c,co->...o", x, w), (3, K)), X, lambda y: y.permute(0, 2, 1)
    ),
    "einsum of heads": (
        Layer(lambda x, w: torch.einsum("btc,hcd->bhtd", x, w), (2, 3, K)), X,
        lambda y: y.permute(0, 1, 3, 2).reshape(len(y), 2 * K, -1),
    ),
    "an ensemble": (
        Layer(lambda x, w: torch.einsum("btc,ecd->ebtd", x, w), (2, 3, K)), X,
        lambda y: y.permute(1, 0, 3, 2).reshape(N, 2 * K, -1),
    ),
    "time series": (Layer(lambda x, w: x.unsqueeze(-1) @ w, (1, K)), (N, T), lambda y: y.permute(0, 2, 1)),
    "normalised weights": (
        Layer(lambda x, w: x @ (w / w.norm(dim=0)) * 2.0, (3, K)), X, lambda y: y.permute(0, 2, 1)
    ),
    "residual": (Layer(lambda x, w: x + x @ w, (3, 3)), X, lambda y: y.permute(0, 2, 1)),
    "convolution of channels last": (
        nn.Sequential(nn.Conv2d(3, K, 3), nn.Flatten(2), nn.ReLU()), (N, 3, 6, 6), lambda y: y
    ),
    "flattened channels": (
        nn.Sequential(nn.Conv2d(3, K, 3), nn.Flatten(), nn.ReLU()), (N, 3, 6, 6), lambda y: y.view(len(y), K, -1)
    ),
    "shuffled channels": (
        Layer(lambda x, w: F.conv2d(x, w).unflatten(1, (2, 3)).transpose(1, 2).flatten(1, 2), (6, 3, 1, 1)),
        (N, 3, 4, 4), lambda y: y.flatten(2),
    ),
    "batch norm of inputs": (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), (N, 3, 4, 4), lambda y: y.flatten(2)),
    "dense block": (
        Layer(lambda x, w: torch.cat([F.conv1d(x, w), F.conv1d(x, -w)], 1), (K, 3, 1)), (N, 3, 7), lambda y: y
    ),
    "sequence first": (Layer(lambda x, w: x.transpose(0, 1) @ w, (3, K)), X, lambda y: y.permute(1, 2, 0)),
    "windows": (
        Layer(lambda x, w: x.reshape(N * 2, T // 2, 3) @ w, (3, K)), X,
        lambda y: y.view(N, T, K).permute(0, 2, 1),
    ),
    "features of the input": (Layer(lambda x: x), (N, 3), lambda y: y),
    "values of attention": (
        Layer(lambda x, w: F.scaled_dot_product_attention(x, x, x @ w), (3, K)), X, lambda y: y.permute(0, 2, 1)
    ),
    "mixed positions": (
        Layer(lambda x, w: torch.softmax(x @ x.mT, -1) @ (x @ w), (3, K)), X, lambda y: y.permute(0, 2, 1)
    ),
    "scaled by position": (
        Layer(lambda x, w, s: torch.einsum("btc,tc->btc", x @ w, s.abs()), (3, K), (T, K)), X,
        lambda y: y.permute(0, 2, 1),
    ),
    "weights of each position": (Layer(lambda x, w: torch.einsum("btc,tcd->btd", x, w), (T, 3, K)), X, None),
    "weights of each head": (
        Layer(lambda x, v, w: torch.einsum("bthc,hcd->bthd", (x @ v).unflatten(-1, (2, 3)), w), (3, 6), (2, 3, K)), X,
        lambda y: y.permute(0, 2, 3, 1).flatten(1, 2),
    ),
    "images as they are": (Layer(lambda x: x), (N, 3, 4, 4), None),
    "scores of attention": (Layer(lambda x, w: (x @ w) @ (x @ w).mT, (3, K)), X, None),
    "weights that mix positions": (Layer(lambda x, v, w: v @ (x @ w), (T, T), (3, K)), X, None),
    "weights from the inputs": (Layer(lambda x, w: torch.bmm(x, (x @ w).mT @ x), (3, 3)), X, None),
    "outer product": (Layer(lambda x, w: x[..., None] * w, (K,)), (N, 3), None),
}  # fmt: skip


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("n", [N, 1])
def test_units_are_the_axis_that_weights_add(kind: str, n: int) -> None:
    model, shape, arranged = LAYERS[kind]
    if n == 1 and kind in ("an ensemble", "windows", "weights from the inputs"):
        return  # written for N
    x = torch.randn(n, *shape[1:])
    values, known = observed(model, x)
    assert known == (arranged is not None, True)
    if arranged is not None:
        torch.testing.assert_close(values.flatten(2) if values.ndim > 2 else values, arranged(model(x)))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(kind: type[nn.RNNBase], batch_first: bool) -> None:
    layer = kind(3, K, 2, batch_first=batch_first)

    class Outputs(nn.Module):
        def __init__(self, state: bool) -> None:
            super().__init__()
            self.layer, self.state = layer, state

        def forward(self, x: Tensor) -> Tensor:
            outputs, states = self.layer(x if batch_first else x.transpose(0, 1))
            states = states[0] if isinstance(states, tuple) else states
            return F.relu(states if self.state else outputs)

    for state in (False, True):
        values, known = observed(Outputs(state), torch.randn(N, T, 3))
        assert known == (True, True)
        assert values.shape == (N, K, 2 if state else T)


def test_embeddings_and_gates() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.gate = nn.Embedding(9, 2 * K), nn.Linear(2 * K, K)

        def forward(self, tokens: Tensor) -> Tensor:
            h = self.table(tokens)
            return F.relu(F.glu(h, -1) * self.gate(h))

    model, tokens = Gated(), torch.randint(9, (N, T))
    values, known = observed(model, tokens)
    assert known == (True, True)
    torch.testing.assert_close(values, model(tokens).permute(0, 2, 1))
