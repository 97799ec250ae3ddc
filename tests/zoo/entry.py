"""A network with its loss and data as one line of a table, and what is right about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batch = tuple[Any, Any]
#: How far products in float64 may be from the truth, relative to its norm: round-off of some thousand operations.
ROUND_OFF = 1e-8
#: The same where the truth is a difference of gradients.
DIFFERENCES = 1e-6
#: The same where a network itself computes a part in float32, whatever the precision of its weights.
SINGLE_INSIDE = 1e-5


def first_dim_after_examples(outputs: Tensor) -> Tensor:
    """The class of each example or position."""
    return outputs.argmax(1)


@dataclass(frozen=True)
class Entry:
    """A small network, its loss and data.

    Attributes
    ----------
    family : str
        Row of the table in the documentation.
    name : str
    make : callable
        Makes the network; called after a seed is set.
    data : callable
        Makes the batches, pairs (inputs, targets), from a generator; called after a seed is set.
    loss : callable
    weights : sequence of float, optional
        The factor of each batch's loss in the loss over all data; by default what its examples weigh.
    example_weights : callable, optional
        ``(targets) -> (n,)``, what each example of a batch weighs in the batch's mean; all the same by default.
    cuts_outputs : bool
        Whether single examples are parts of the outputs only, as with graphs, which the network takes together.
    classes : callable
        Outputs to the class of each example or position; of the first dim after the examples' by default.
    options : mapping
        Further arguments of operators and analyses.
    refused : mapping of str to str or None
        Check to the words of the refusal, ``None`` for no refusal; ``"*"`` for all checks that are not named.
    not_for : sequence of str
        Checks that mean nothing here: a network without activation functions has no saturation.
    tolerance : float
        Relative, of products in float64.
    differences : bool
        The true Hessian is a difference of gradients, since torch's own second derivative is wrong or missing.
    twin : callable, optional
        Makes the network that the truth is computed with, where torch cannot with the other one.
    packages : sequence of str
        What has to be installed.
    slow : bool
        Left to ``make test-zoo`` although it needs torch only.
    """

    family: str
    name: str
    make: Callable[[], nn.Module]
    data: Callable[[], Sequence[Batch]]
    loss: Callable[[Any, Any], Tensor] = F.cross_entropy
    weights: Sequence[float] | None = None
    example_weights: Callable[[Any], Tensor] | None = None
    cuts_outputs: bool = False
    classes: Callable[[Tensor], Tensor] = first_dim_after_examples
    options: Mapping[str, Any] = field(default_factory=dict)
    refused: Mapping[str, str | None] = field(default_factory=dict)
    not_for: Sequence[str] = ()
    tolerance: float = ROUND_OFF
    differences: bool = False
    twin: Callable[[], nn.Module] | None = None
    packages: Sequence[str] = ()
    slow: bool = False

    def network(self, seed: int = 0) -> nn.Module:
        """The network in float32 and eval mode, with weights and statistics away from special values such as zero."""
        return self._network(self.make, seed)

    def twin_network(self, seed: int = 0) -> nn.Module:
        """The network that the truth is computed with, in the same state."""
        return self._network(self.twin or self.make, seed)

    @staticmethod
    def _network(make: Callable[[], nn.Module], seed: int) -> nn.Module:
        with seeded(seed):
            network = make()
            for parameter in network.parameters():
                if parameter.is_floating_point() or parameter.is_complex():
                    parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
            for name, buffer in network.named_buffers():
                if name.endswith("running_mean"):
                    buffer.normal_(std=0.3)
                elif name.endswith("running_var"):
                    buffer.uniform_(0.5, 1.5)
        return network.eval()

    def batches(self) -> list[Batch]:
        """The batches, always the same."""
        with seeded(1):
            return list(self.data())

    def batch_weights(self) -> list[float]:
        """The weight of each batch in the loss over all data."""
        if self.weights is not None:
            return list(self.weights)
        of_examples = self.example_weights or (lambda targets: torch.ones(len(next(leaves(targets)))))
        sizes = [float(of_examples(targets).double().sum()) for _, targets in self.batches()]
        return [size / sum(sizes) for size in sizes]

    def words(self, check: str) -> str | None:
        """The words that a check is refused with; ``None`` if it is computed."""
        return self.refused.get(check, self.refused.get("*"))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws of a seed within, and the state from before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def leaves(nest: Any) -> Iterator[Tensor]:
    """The tensors of a nest of mappings, sequences and outputs of transformers."""
    if isinstance(nest, Tensor):
        yield nest
    elif isinstance(nest, Mapping):
        for value in nest.values():
            yield from leaves(value)
    elif isinstance(nest, tuple | list):
        for value in nest:
            yield from leaves(value)


def mapped(nest: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same nest with each of its tensors replaced."""
    if isinstance(nest, Tensor):
        return function(nest)
    if isinstance(nest, Mapping):
        if type(nest) is dict:
            return {key: mapped(value, function) for key, value in nest.items()}
        replaced = copy(nest)
        for key, value in nest.items():
            replaced[key] = mapped(value, function)
        return replaced
    if isinstance(nest, tuple | list):
        return type(nest)(mapped(value, function) for value in nest)
    return nest


def images(*sizes: int, channels: int = 1, width: int = 6, classes: int = 3) -> Callable[[], list[Batch]]:
    """Batches of images with classes."""
    return lambda: [(torch.randn(n, channels, width, width), torch.randint(classes, (n,))) for n in sizes]


def vectors(*sizes: int, features: int = 4, classes: int = 3) -> Callable[[], list[Batch]]:
    """Batches of vectors with classes."""
    return lambda: [(torch.randn(n, features), torch.randint(classes, (n,))) for n in sizes]


def numbers(*sizes: int, features: int = 4, outputs: int = 2) -> Callable[[], list[Batch]]:
    """Batches of vectors with vectors to predict."""
    return lambda: [(torch.randn(n, features), torch.randn(n, outputs)) for n in sizes]


def sequences(*sizes: int, length: int = 5, features: int = 3, classes: int = 3) -> Callable[[], list[Batch]]:
    """Batches of sequences of vectors with classes."""
    return lambda: [(torch.randn(n, length, features), torch.randint(classes, (n,))) for n in sizes]


def tokens(*sizes: int, length: int = 5, vocabulary: int = 11, classes: int = 3) -> Callable[[], list[Batch]]:
    """Batches of sequences of tokens with classes; token 0 occurs, as padding does."""
    return lambda: [(torch.randint(vocabulary, (n, length)), torch.randint(classes, (n,))) for n in sizes]
