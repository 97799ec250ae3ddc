"""Losses: class and example weights, ignored and soft targets, sequences, sums, and what gradients do not pass."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo.entry import Batch, Entry, numbers, vectors
from tests.zoo.families.plain import perceptron

CLASS_WEIGHTS = torch.tensor([1.0, 5.0, 0.2])


def some_ignored() -> list[Batch]:
    batches = vectors(5, 4)()
    batches[0][1][:2] = -100
    return batches


def soft() -> list[Batch]:
    return [(torch.randn(n, 4), torch.rand(n, 3).softmax(1)) for n in (5, 3)]


def labelled_sequences() -> list[Batch]:
    """Sequences of unequal lengths: the positions after their ends do not count."""
    batches = sequence_classes()
    for _, classes in batches:
        for i, row in enumerate(classes):
            row[2 + i :] = -100
    return batches


def sequence_classes() -> list[Batch]:
    return [(torch.randn(n, 4, 6), torch.randint(3, (n, 6))) for n in (5, 3)]


def weighted_examples() -> list[Batch]:
    return [(torch.randn(n, 4), (torch.randint(3, (n,)), torch.rand(n))) for n in (5, 3)]


def by_example_weight(outputs: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
    classes, weights = targets
    return (F.cross_entropy(outputs, classes, reduction="none") * weights).mean()


def focal(outputs: Tensor, targets: Tensor) -> Tensor:
    each = F.cross_entropy(outputs, targets, reduction="none")
    with torch.no_grad():
        weights = (1 - torch.exp(-each)) ** 2
    return (weights * each).mean()


def masked_mean(outputs: Tensor, targets: Tensor) -> Tensor:
    """A mean over the positions that count, as in language models written by hand."""
    each = F.cross_entropy(outputs, targets.clamp_min(0), reduction="none")
    counts = targets >= 0
    return (each * counts).sum() / counts.sum()


def summed(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="sum")


class Gate(nn.Module):
    """A gate that gradients do not pass."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.act, self.last = nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.first(x))
        if self.how == "no_grad":
            with torch.no_grad():
                gate = torch.exp(-(hidden.mean(1, keepdim=True) ** 2))
        else:
            gate = torch.exp(-((hidden.data if self.how == "data" else hidden.detach()).mean(1, keepdim=True) ** 2))
        return self.last(hidden * gate)


class Siamese(nn.Module):
    """Two views, of which each predicts the other's projection as a constant (SimSiam)."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.act, self.predict = nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        z, w = self.act(self.encode(one)), self.encode(other)
        p, q = self.predict(z), self.predict(w)
        return -(F.cosine_similarity(p, w.detach()) + F.cosine_similarity(q, z.detach())) / 2


def views() -> list[Batch]:
    return [((torch.randn(n, 4), torch.randn(n, 4)), torch.zeros(n)) for n in (5, 3)]


class Quantised(nn.Module):
    """A codebook with straight-through gradients and a commitment term (VQ-VAE)."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.act, self.decode = nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 4)
        self.codes = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.act(self.encode(x))
        code = self.codes[(z[:, None] - self.codes).square().sum(2).argmin(1)]
        commit = (code - z.detach()).square().mean(1) + 0.25 * (z - code.detach()).square().mean(1)
        return self.decode(z + (code - z).detach()), commit


def reconstruction(outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
    return ((outputs[0] - targets) ** 2).mean() + outputs[1].mean()


def themselves() -> list[Batch]:
    drawn = [torch.randn(n, 4) for n in (5, 3)]
    return [(x, x.clone()) for x in drawn]


class _Sine(torch.autograd.Function):
    """A function with a gradient of its own, the way extensions add operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return slope * x.cos()


class _StraightThrough(torch.autograd.Function):
    """Rounds forwards, and is the identity backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return slope


class Custom(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function, self.first, self.act, self.last = function, nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(2 * self.function.apply(self.first(x))))


LOSSES, STOPPED, FUNCTIONS = "losses", "stopped gradients", "custom autograd functions"
one_d = lambda: nn.Sequential(nn.Conv1d(4, 5, 1), nn.Tanh(), nn.Conv1d(5, 3, 1))  # noqa: E731

#: Losses of batches that are not means over the examples' own losses.
EACH = dict.fromkeys(("compare", "landscape", "sharpness", "functional distance"), "not the mean over its examples")

ENTRIES = [
    Entry(
        LOSSES,
        "class weights",
        perceptron,
        vectors(5, 3),
        nn.CrossEntropyLoss(weight=CLASS_WEIGHTS),
        example_weights=lambda t: CLASS_WEIGHTS[t],
    ),
    Entry(
        LOSSES,
        "ignored targets",
        perceptron,
        some_ignored,
        F.cross_entropy,
        example_weights=lambda t: (t >= 0).double(),
    ),
    Entry(LOSSES, "label smoothing", perceptron, vectors(5, 3), partial(F.cross_entropy, label_smoothing=0.1)),
    Entry(LOSSES, "class probabilities", perceptron, soft),
    Entry(
        LOSSES,
        "two classes",
        lambda: perceptron(4, 2),
        lambda: [(x, (t > 0).float()) for x, t in numbers(5, 3)()],
        F.binary_cross_entropy_with_logits,
        classes=lambda outputs: outputs > 0,
    ),
    Entry(LOSSES, "Huber", lambda: perceptron(4, 2), numbers(5, 3), nn.HuberLoss(delta=0.7)),
    Entry(LOSSES, "sequences of classes", one_d, sequence_classes),
    Entry(
        LOSSES,
        "sequences, ignored positions",
        one_d,
        labelled_sequences,
        example_weights=lambda t: (t >= 0).sum(1).double(),
    ),
    Entry(
        LOSSES,
        "your own mean over positions",
        one_d,
        labelled_sequences,
        masked_mean,
        (20 / 29, 9 / 29),
        refused={**EACH, "Fisher": EACH["compare"]},
    ),
    Entry(LOSSES, "your own weights of examples", perceptron, weighted_examples, by_example_weight),
    Entry(LOSSES, "focal loss", perceptron, vectors(5, 3), focal),
    Entry(LOSSES, "sum", perceptron, vectors(5, 3), nn.CrossEntropyLoss(reduction="sum"), (1, 1), refused=EACH),
    Entry(LOSSES, "your own sum", perceptron, vectors(5, 3), summed, (1, 1), refused=EACH),
    Entry(STOPPED, "gate under no_grad", lambda: Gate("no_grad"), vectors(5, 3)),
    Entry(STOPPED, "gate from .data", lambda: Gate("data"), vectors(5, 3)),
    Entry(STOPPED, "gate from .detach()", lambda: Gate("detach"), vectors(5, 3)),
    Entry(STOPPED, "SimSiam", Siamese, views, lambda o, t: o.mean(), slow=True),
    Entry(STOPPED, "VQ-VAE", Quantised, themselves, reconstruction),
    Entry(FUNCTIONS, "own gradient", lambda: Custom(_Sine), vectors(5, 3)),
    Entry(FUNCTIONS, "straight-through", lambda: Custom(_StraightThrough), vectors(5, 3)),
]
