"""Running statistics of batch normalisation at points of parameter space that no training has visited."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pnanalysis.errors import ModelError
from pnanalysis.evaluation.forward import forward
from pnanalysis.inputs.batches import batch_size
from pnanalysis.io.weights import State
from pnanalysis.torch_internals import BatchNormBase, tree_map


class RunningStatistics:
    """The modules of a network that keep running statistics, by name; false if there are none.

    Parameters
    ----------
    model : Module
        In eval mode.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.norms = {name: module for name, module in model.named_modules() if _has_statistics(module)}

    def __bool__(self) -> bool:
        return bool(self.norms)

    @contextmanager
    def of_batches(self, on: bool = True) -> Iterator[None]:
        """Normalise by each batch's own statistics inside the body, as in training."""
        for module in self.norms.values():
            module.train(on)
        try:
            yield
        finally:
            for module in self.norms.values():
                module.eval()

    def make_valid(self, points: State) -> None:
        """Keep running variances of linear combinations from being negative, in place."""
        for name in self.norms:
            points[f"{name}.running_var"].clamp_(min=0.0)

    def reestimate(self, state: State, batches: Iterable[Any], cast: Callable[[Any], Any]) -> None:
        """Set the state's running statistics to the averages over the batches, weighted by their sizes, in place.

        Raises
        ------
        ModelError
            If there is but a single example.
        """
        momenta = {name: module.momentum for name, module in self.norms.items()}
        try:
            with self.of_batches():
                n_seen = 0
                for inputs in _of_two_or_more(batches):
                    n = batch_size(inputs)
                    n_seen += n
                    for module in self.norms.values():
                        module.momentum = n / n_seen  # makes torch's moving average the exact mean over all batches
                    forward(self.model, cast(inputs), state)
            if not n_seen:
                raise ModelError(
                    "the statistics of batch normalisation cannot be estimated from a single example; "
                    "give more (n), or bn='interpolate'"
                )
        finally:
            for name, module in self.norms.items():
                module.momentum = momenta[name]


def _of_two_or_more(batches: Iterable[Any]) -> Iterator[Any]:
    """Inputs of batches; a single example, which has no variance, joins the next batch (the last is left out)."""
    held: Any = None
    for inputs, _ in batches:
        joined = inputs if held is None else tree_map(lambda a, b: torch.cat([a, b]), held, inputs)
        held = joined if batch_size(joined) < 2 else None
        if held is None:
            yield joined


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, BatchNormBase) and module.running_mean is not None
