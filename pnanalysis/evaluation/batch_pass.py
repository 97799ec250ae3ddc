"""One network on one batch: what it returns, its loss, and the loss and mistakes of each example."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pnanalysis.errors import ModelError
from pnanalysis.evaluation.forward import forward, loss_of_model, prediction
from pnanalysis.evaluation.losses import InspectedLoss, check_mean, check_targets, example_errors, example_losses
from pnanalysis.inputs.batches import can_cut, leading_size, rows, tensors
from pnanalysis.torch_internals import tree_map_only


@dataclass(frozen=True)
class BatchPass:
    """A pass of a network over a batch, and the loss of what it returned.

    Attributes
    ----------
    model : Module
    loss : InspectedLoss
    inputs, targets : nests of tensors
    state : mapping of tensors or None
        Replaces the network's own parameters and buffers.
    outputs : any
        What the network returns; ``None`` where only a loss of the form ``loss(model, batch)`` can call it with these
        inputs.
    """

    model: nn.Module
    loss: InspectedLoss
    inputs: Any
    targets: Any
    state: Mapping[str, Tensor] | None
    outputs: Any

    @classmethod
    def of(
        cls, model: nn.Module, loss: InspectedLoss, inputs: Any, targets: Any,
        state: Mapping[str, Tensor] | None = None, predict: bool = True,
    ) -> BatchPass:  # fmt: skip
        """Run the network; not where the loss will do so, unless predictions are of interest beside it."""
        outputs = None
        if predict or not loss.takes_model:
            try:
                outputs = forward(model, inputs, state)
            except Exception:
                if not loss.takes_model:
                    raise
        return cls(model, loss, inputs, targets, state, outputs)

    @property
    def n(self) -> int:
        """Number of examples: rows of the first tensor among targets, then inputs, that has any."""
        return leading_size(self.targets, self.inputs)

    @property
    def prediction(self) -> Tensor | None:
        """See :func:`pnanalysis.evaluation.forward.prediction`."""
        return prediction(self.outputs)

    def value(self) -> Tensor:
        """The loss of the batch, of shape ().

        Raises
        ------
        DataError
            See :func:`pnanalysis.evaluation.losses.check_targets`.
        """
        if self.loss.takes_model:
            return loss_of_model(self.loss, self.model, self.inputs, self.targets, self.state)
        if self.loss.torch_loss is not None:
            check_targets(self.loss, self.outputs, self.targets)
            return self.loss(self.outputs, self.targets)
        # a loss of one's own may work in place on what it is given
        return self.loss(*tree_map_only(Tensor, torch.clone, (self.outputs, self.targets)))

    def examples(self) -> tuple[Tensor, Tensor]:
        """The loss of each example and its weight in the mean, (N,) each: see :func:`example_losses`.

        Where it cannot be taken from the outputs for all examples, the network runs on each example alone.

        Raises
        ------
        ModelError
            If examples have no loss of their own.
        DataError
            See :func:`pnanalysis.evaluation.losses.check_targets`.
        """
        if not self.loss.takes_model:
            try:
                return example_losses(self.loss, self.outputs, self.targets)
            except ModelError:
                if self.loss.torch_loss is not None:
                    raise
        each = torch.stack([self._example(i).value().detach().reshape(()) for i in range(self.n)])
        return each, torch.ones_like(each)

    def _example(self, i: int) -> BatchPass:
        """The pass over a single example."""
        if not can_cut((self.inputs, self.targets)):
            sizes = {len(tensor) for tensor in tensors((self.inputs, self.targets)) if tensor.ndim}
            raise ModelError(
                f"the loss cannot be computed one example at a time: tensors of the batch have {min(sizes)} to "
                f"{max(sizes)} rows; give all one row an example"
            )
        inputs, targets = rows((self.inputs, self.targets), slice(i, i + 1))
        return BatchPass.of(self.model, self.loss, inputs, targets, self.state, predict=False)

    def checked_examples(self) -> tuple[Tensor, Tensor]:
        """The same as :meth:`examples`, where the loss of the batch is their mean.

        Raises
        ------
        ModelError
            If it is not: see :func:`pnanalysis.evaluation.losses.check_mean`.
        """
        each, weight = self.examples()
        check_mean(self.loss, self.value().detach(), each, weight)
        return each, weight

    def errors(self) -> tuple[Tensor, Tensor] | None:
        """See :func:`pnanalysis.evaluation.losses.example_errors`."""
        return example_errors(self.loss, self.prediction, self.targets)
