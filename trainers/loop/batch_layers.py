"""Layers that see a batch as a whole, where each of several processes has a part of it.

Batch normalisation takes mean and variance over the examples of all processes, forwards and backwards. Dropout draws
the masks of the whole batch in every process, from numbers that all draw alike, and each uses its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from pnanalysis.torch_internals import BatchNormBase

if TYPE_CHECKING:
    from trainers.loop.processes import SeveralProcesses

_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@contextmanager
def over_whole_batches(model: nn.Module, processes: SeveralProcesses) -> Iterator[None]:
    """Within the body, batch normalisation and dropout of ``model`` in train mode see the whole batch.

    Parameters
    ----------
    model : torch.nn.Module
        Its layers get another ``forward`` for a time; what they are and what they hold stays.
    processes : SeveralProcesses
        Its ``part`` says what the process has of the current batch.
    """
    replaced: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, BatchNormBase) and not isinstance(module, nn.SyncBatchNorm):
            call: Callable[..., Tensor] = partial(_normalised, module, module.forward, processes)
        elif isinstance(module, _DROPOUT):
            call = partial(_dropped, module, module.forward, processes)
        else:
            continue
        # a compiler cannot see through what processes say to each other
        module.forward = torch.compiler.disable(call)  # type: ignore[method-assign]
        replaced.append(module)
    try:
        yield
    finally:
        for module in replaced:
            del module.forward  # the class's own is found again


class CommonNoise:
    """Random numbers that all processes draw alike, beside torch's global generator, from which each draws its own.

    Parameters
    ----------
    device : torch.device
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.state = self._now()

    def seed(self, seed: int) -> None:
        """Begin again."""
        own = self._now()
        torch.manual_seed(seed)
        self.state = self._now()
        self._set(own)

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """Within the body, torch's global generator draws them."""
        own = self._now()
        self._set(self.state)
        try:
            yield
        finally:
            self.state = self._now()
            self._set(own)

    def _now(self) -> Tensor:
        return torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else torch.get_rng_state()

    def _set(self, state: Tensor) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state, self.device)
        else:
            torch.set_rng_state(state)


def _dropped(
    module: nn.Module, forward: Callable[[Tensor], Tensor], processes: SeveralProcesses, inputs: Tensor
) -> Tensor:
    """Dropout of these rows as part of the whole batch."""
    part = processes.part
    if not module.training or part is None:
        return forward(inputs)
    own = part.rows.stop - part.rows.start
    if not inputs.ndim or not len(inputs) or len(inputs) % own:  # its first dim is not that of the examples
        return forward(inputs)
    each = len(inputs) // own  # rows of an example, where a network has flattened positions into them
    rows = slice(part.rows.start * each, part.rows.stop * each)
    whole = inputs.new_zeros(part.size * each, *inputs.shape[1:])
    whole[rows] = inputs
    with processes.noise.drawn():
        return forward(whole)[rows]


def _normalised(
    module: Any, forward: Callable[[Tensor], Tensor], processes: SeveralProcesses, inputs: Tensor
) -> Tensor:
    """Batch normalisation of these rows with the statistics of the whole batch."""
    part = processes.part
    if not module.training or part is None or part.is_whole:
        return forward(inputs)
    module._check_input_dim(inputs)
    outputs, mean, variance, count = _Normalisation.apply(inputs, module.weight, module.bias, module.eps, processes)
    if module.track_running_stats and module.running_mean is not None:
        module.num_batches_tracked.add_(1)
        # without a momentum the running statistics are means over all batches so far
        factor = module.momentum if module.momentum is not None else 1.0 / float(module.num_batches_tracked)
        module.running_mean.lerp_(mean.to(module.running_mean), factor)
        module.running_var.lerp_((variance * count / (count - 1)).to(module.running_var), factor)
    return outputs


class _Normalisation(torch.autograd.Function):
    r""":math:`y = w (x - \mu) / \sqrt{\sigma^2 + \epsilon} + b`, with the mean and variance over all processes.

    With :math:`\hat x` the normalised inputs, N the number of values of a channel and g the gradient with respect to y,
    that with respect to x is :math:`w (g - \sum g / N - \hat x \sum g \hat x / N) / \sqrt{\sigma^2 + \epsilon}`, where
    the sums are over all processes (Ioffe and Szegedy, arXiv:1502.03167). Those with respect to w and b are the
    process's own: they are added up with all other gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, processes: SeveralProcesses
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with torch.autocast(inputs.device.type, enabled=False):
            exact = torch.promote_types(inputs.dtype, torch.float32)
            dims = [0, *range(2, inputs.ndim)]
            variance, mean = torch.var_mean(inputs.to(exact), dims, correction=0)
            own = torch.stack([mean, variance, torch.full_like(mean, inputs.numel() // inputs.shape[1])]).double()
            means, variances, counts = torch.stack(processes.gather(own)).unbind(1)  # (processes, channels) each
            count = counts.sum(0)
            mean = (counts * means).sum(0) / count
            variance = (counts * (variances + (means - mean).square())).sum(0) / count
            mean, variance = mean.to(exact), variance.to(exact)
            outputs = batch_norm(inputs, mean, variance, weight, bias, training=False, eps=eps)
        ctx.save_for_backward(inputs, weight, mean, (variance + eps).rsqrt(), count)
        ctx.processes, ctx.dims, ctx.dtype = processes, dims, exact
        ctx.mark_non_differentiable(mean, variance, count)
        return outputs, mean, variance, count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, mean, scale, count = ctx.saved_tensors
        shape = [1, -1, *[1] * (inputs.ndim - 2)]
        g = gradients[0].to(ctx.dtype)
        normalised = (inputs.to(ctx.dtype) - mean.view(shape)) * scale.view(shape)
        own = torch.stack([g.sum(ctx.dims), (g * normalised).sum(ctx.dims)])
        sums = own.clone()
        ctx.processes.add_up(sums)
        mean_g, mean_gx = (sums / count).to(ctx.dtype).view(2, *shape)
        factor = scale if weight is None else scale * weight
        to_inputs = (g - mean_g - normalised * mean_gx) * factor.view(shape)
        to_weight, to_bias = (None, None) if weight is None else (own[1].to(weight.dtype), own[0].to(weight.dtype))
        return to_inputs.to(inputs.dtype), to_weight, to_bias, None, None
