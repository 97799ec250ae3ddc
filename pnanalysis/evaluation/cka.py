"""Linear centred kernel alignment (CKA) of networks layer by layer, streamed over batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pnanalysis.activations.axis_tracker import AxisTracker, FollowAxes
from pnanalysis.activations.eager import eager
from pnanalysis.arrays import Array
from pnanalysis.estimates import ratio
from pnanalysis.evaluation.forward import prediction
from pnanalysis.inputs.models import parameter_layers

#: The name of a network's output among its layers.
OUTPUT = "output"
_FEWEST = 4  # examples per batch; the unbiased estimate divides by n - 3
_ROUND_OFF = 1e-12  # equal kernels have CKA 1 in every batch, so their standard error is this or less


def linear_kernel(features: Tensor) -> Tensor:
    """Inner products of a batch's features ``(n, ...)`` about their mean, ``(n, n)`` in float64.

    U-centring removes the mean in any case; removing it first avoids cancellation.
    """
    rows = features.detach().reshape(len(features), -1)
    rows = rows if rows.dtype == torch.float64 else rows.float()
    rows = rows - rows.mean(0)
    return (rows @ rows.T).double()


def u_centred(gram: Tensor) -> Tensor:
    r"""U-centre a kernel matrix: zero diagonal, and rows and columns that sum to zero without bias.

    The unbiased estimate of HSIC by Song et al. is the inner product of two such matrices over n (n - 3).

    Parameters
    ----------
    gram : Tensor, shape (n, n)
        Symmetric, n at least 4.

    References
    ----------
    L. Song et al., "Feature Selection via Dependence Maximization", JMLR 13 (2012), eq. 5. G. Szekely, M. Rizzo,
    "Partial Distance Correlation with Methods for Dissimilarities", arXiv:1310.2926, definition 2.
    """
    n = len(gram)
    gram = gram - torch.diag(gram.diagonal())
    sums = gram.sum(0)
    centred = gram - (sums[:, None] + sums[None, :]) / (n - 2) + sums.sum() / ((n - 1) * (n - 2))
    return centred - torch.diag(centred.diagonal())


def unbiased_hsic(kernels: Tensor) -> Tensor:
    """HSIC without bias between all pairs of U-centred kernels of the same examples: ``(k, n, n)`` to ``(k, k)``."""
    rows, n = kernels.flatten(1), kernels.shape[-1]
    return rows @ rows.T / (n * (n - 3))


class CentredKernelAlignment:
    """CKA between the layers of the same name in several networks, and between their outputs.

    Inside ``with``, hooks watch each network's layers: run all networks on one batch, then call :meth:`collect`.
    A layer that is used more than once in a pass counts with all its outputs side by side. Examples may lie along
    any dim of an output (:class:`pnanalysis.activations.axis_tracker.AxisTracker`); a layer counts as missing where
    they cannot be told from other axes.

    Notes
    -----
    Only the HSIC of each layer and pair is kept per batch; CKA is the ratio of their means over batches, weighted
    by the number of examples. Batches of fewer than four are left out. The standard error is a jackknife
    over batches.

    References
    ----------
    S. Kornblith et al., "Similarity of Neural Network Representations Revisited", arXiv:1905.00414. T. Nguyen,
    M. Raghu, S. Kornblith, "Do Wide and Deep Networks Learn the Same Things?", arXiv:2010.15327, eq. 2 to 4.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        self.networks = networks
        self._watched = [_watched(network) for network in networks]
        names = dict.fromkeys(name for own in self._watched for name in own)
        self._output = next(name for name in (OUTPUT, f"network {OUTPUT}", f"{OUTPUT} of all") if name not in names)
        self.layers = [*names, self._output]
        self._grams: list[dict[str, Tensor]] = [{} for _ in networks]
        self._hsic: list[Tensor] = []
        self._weights: list[int] = []
        self._stack = ExitStack()

    def __enter__(self) -> CentredKernelAlignment:
        self._stack.enter_context(eager())
        for network, watched, grams in zip(self.networks, self._watched, self._grams, strict=True):
            mode = FollowAxes(AxisTracker(network))
            self._stack.callback(network.register_forward_pre_hook(_start(mode), prepend=True, with_kwargs=True).remove)
            for name, module in [*watched.items(), (self._output, network)]:
                self._stack.callback(module.register_forward_hook(_keep(grams, name, mode)).remove)
            self._stack.callback(network.register_forward_hook(_stop(mode), always_call=True).remove)
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    def collect(self, n: int) -> None:
        """Add the outputs of all networks since the last call: one batch of ``n`` examples."""
        if n >= _FEWEST:
            self._hsic.append(torch.stack([self._batch(layer, n) for layer in self.layers], dim=-1).cpu())
            self._weights.append(n)
        for grams in self._grams:
            grams.clear()

    def _batch(self, layer: str, n: int) -> Tensor:
        """HSIC of one layer between all pairs ``(k, k)``; NaN where a network has no such layer."""
        grams = [own.get(layer) for own in self._grams]
        there = [i for i, gram in enumerate(grams) if gram is not None and len(gram) == n]
        hsic = torch.full((len(grams), len(grams)), torch.nan, dtype=torch.float64)
        if there:
            kernels = torch.stack([u_centred(gram) for i in there if (gram := grams[i]) is not None])
            hsic[np.ix_(there, there)] = unbiased_hsic(kernels).cpu()
        return hsic

    def result(self) -> tuple[Array, Array]:
        """CKA and its standard error, ``(k, k, layers)`` each; NaN where a layer is missing or constant."""
        k = len(self.networks)
        if not self._hsic:
            empty = np.full((k, k, len(self.layers)), np.nan)
            return empty, empty.copy()
        weights = np.array(self._weights, dtype=float)
        weighted = torch.stack(self._hsic).numpy() * weights[:, None, None, None]
        total = weighted.sum(0)
        cka = _cka_of(total)
        if len(weights) == 1:
            return cka, np.full(cka.shape, np.nan)
        left_out = np.stack([_cka_of(total - one) for one in weighted])
        spread = np.square(left_out - left_out.mean(0)).sum(0)
        se = np.sqrt((len(weights) - 1) / len(weights) * spread)
        return cka, np.where(se < _ROUND_OFF, 0.0, se)


def _watched(network: nn.Module) -> dict[str, nn.Module]:
    """The layers that own parameters, except the network itself, whose output is watched in any case."""
    modules = dict(network.named_modules())
    return {name: modules[name] for name, _ in parameter_layers(network) if name in modules}


def _start(mode: FollowAxes) -> Callable[..., None]:
    """A hook that begins to follow a pass of a network."""

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        mode.tracker.start((args, kwargs))
        mode.__enter__()

    return hook


def _stop(mode: FollowAxes) -> Callable[..., None]:
    """A hook that ends it, also after an error."""

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        mode.__exit__(None, None, None)

    return hook


def _keep(grams: dict[str, Tensor], name: str, mode: FollowAxes) -> Callable[..., None]:
    """A hook that adds the kernel of a layer's output (not yet centred) to its sum over this batch."""

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        found = prediction(output)
        if found is None or found.ndim < 1 or not found.is_floating_point():
            return
        with mode.pause():
            rows = mode.tracker.by_example(found)
            if rows is None:
                return
            gram = linear_kernel(rows)
        known = grams.get(name)
        if known is None or known.shape == gram.shape:
            grams[name] = gram if known is None else known + gram

    return hook


def _cka_of(hsic: Array) -> Array:
    """``(k, k, layers)`` of HSIC to CKA."""
    own = np.sqrt(np.maximum(np.einsum("iil->il", hsic), 0.0))
    return ratio(hsic, own[:, None] * own[None, :])
