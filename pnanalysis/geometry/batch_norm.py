"""Running statistics of batch normalisation at points of parameter space that no training has visited."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pnanalysis.errors import ModelError
from pnanalysis.evaluation.forward import forward
from pnanalysis.inputs.batches import leading_size
from pnanalysis.io.weights import State
from pnanalysis.torch_internals import BatchNormBase, tree_map


def norms_with_statistics(model: nn.Module) -> dict[str, BatchNormBase]:
    """The batch-normalisation modules of a network that keep running statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BatchNormBase) and module.running_mean is not None
    }


@contextmanager
def normalise_by_batch(norms: Mapping[str, BatchNormBase]) -> Iterator[None]:
    """Within the body, these modules normalise by the statistics of each batch, and update their running ones."""
    try:
        for norm in norms.values():
            norm.train()
        yield
    finally:
        for norm in norms.values():
            norm.eval()


def reestimate(model: nn.Module, norms: Mapping[str, BatchNormBase], state: State, inputs: Iterable[Any]) -> None:
    """Replace the running statistics in ``state``, in place, by averages over calls, weighted by sizes of batches.

    Parameters
    ----------
    model : Module
        The architecture.
    norms : mapping of str to Module
        Its :func:`norms_with_statistics`.
    state : mapping of tensors
    inputs : iterable
        The inputs of each batch, with the device and precision of the state.

    Raises
    ------
    ModelError
        If there is only a single example.
    """
    n_seen = dict.fromkeys(norms.values(), 0)  # a module may be called several times in a pass, or in some of them only
    n, n_batches = 0, 0

    def set_momentum(norm: nn.Module, _: Any) -> None:
        # The update is (1 - momentum) * running + momentum * batch: a momentum of n / n_seen makes the running value
        # the weighted mean of all calls so far. The first is 1 and erases what the state held.
        assert isinstance(norm, BatchNormBase)
        n_seen[norm] += n
        norm.momentum = n / n_seen[norm]

    with ExitStack() as stack:
        for norm in n_seen:
            stack.callback(setattr, norm, "momentum", norm.momentum)
            stack.enter_context(norm.register_forward_pre_hook(set_momentum))
        stack.enter_context(normalise_by_batch(norms))
        for batch in batches_of_two_or_more(inputs):
            n, n_batches = leading_size(batch), n_batches + 1
            forward(model, batch, state)
    if not n_batches:
        raise ModelError(
            "the statistics of batch normalisation cannot be estimated from a single example; "
            "use more examples (n), or bn='interpolate'"
        )


def batches_of_two_or_more(inputs: Iterable[Any]) -> Iterator[Any]:
    """Inputs of batches, where a batch of one example, which has no variance, is joined with the next batch.

    A single example at the end is left out.

    Raises
    ------
    ModelError
        If they are of different shapes, so that they cannot be joined.
    """
    held: Any = None
    for batch in inputs:
        joined = batch if held is None else _joined(held, batch)
        held = joined if leading_size(joined) < 2 else None
        if held is None:
            yield joined


def _joined(first: Any, second: Any) -> Any:
    def join(a: Any, b: Any) -> Any:
        return torch.cat([a, b]) if isinstance(a, Tensor) and a.ndim else a

    try:
        return tree_map(join, first, second)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            "batch normalisation has no statistics of a single example, and these batches of one are of different "
            "shapes; give batches of two or more, or bn='interpolate'"
        ) from error
