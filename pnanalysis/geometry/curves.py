"""Curves of low loss between two minima: Bezier curves and polygonal chains, whose bends are trained."""

from __future__ import annotations

from collections.abc import Iterator
from math import comb
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pnanalysis.checks import one_of
from pnanalysis.errors import ModelError
from pnanalysis.geometry.loss_surface import LossSurface, Matrix
from pnanalysis.inputs.batches import batch_size as n_examples
from pnanalysis.inputs.data import LoaderSplit, Split
from pnanalysis.io.weights import State
from pnanalysis.terminal.progress import progress_bar

CURVES = ("bezier", "chain")


def curve_weights(kind: str, position: Matrix, n_bends: int) -> Matrix:
    """Weights of the ends and bends at positions along a curve, (K, n_bends + 2); each row sums to one.

    Parameters
    ----------
    kind : {"bezier", "chain"}
        Bernstein polynomials of degree ``n_bends + 1``, or hat functions (a polygon, whose segments take equal parts
        of the interval).
    position : array, shape (K,)
        0 at the first end, 1 at the second.
    n_bends : int

    Raises
    ------
    ModelError
        If the kind is unknown or there is no bend.
    """
    one_of(CURVES, curve=kind)
    if n_bends < 1:
        raise ModelError(f"a curve needs at least one bend, not {n_bends}")
    t, degree = np.asarray(position, dtype=np.float64)[:, None], n_bends + 1
    i = np.arange(degree + 1)
    if kind == "bezier":
        binomial = np.array([comb(degree, k) for k in i], dtype=np.float64)
        return binomial * t**i * (1 - t) ** (degree - i)
    segment = np.clip(np.floor(t * degree), 0, degree - 1)  # beyond the ends the outer segments are extended
    along = t * degree - segment
    return (i == segment) * (1 - along) + (i == segment + 1) * along


def train_curve(
    surface: LossSurface,
    ends: tuple[State, State],
    split: Split | LoaderSplit,
    *,
    kind: str = "bezier",
    n_bends: int = 1,
    n_steps: int = 1000,
    lr: float = 3e-3,
    batch_size: int = 128,
    seed: int = 0,
    progress: bool = True,
) -> list[State]:
    r"""Bend the line between two states so that the loss along it is low.

    Minimises :math:`\mathbb{E}_{t \sim U(0, 1)} L(\phi(t))` over the bends of the curve :math:`\phi` with Adam, at one
    random position on one minibatch per step. The learning rate decays to zero along a cosine; the bends start at
    equal distances on the line.

    Parameters
    ----------
    surface : LossSurface
    ends : pair of states
        As :meth:`LossSurface.anchor` returns them; they are not modified.
    split : Split or LoaderSplit
        Training examples.
    kind : {"bezier", "chain"}
    n_bends, n_steps, batch_size : int
    lr : float
        Initial learning rate.
    seed : int
        For positions and minibatches.
    progress : bool

    Returns
    -------
    list of states
        First end, bends, second end: the anchors of :func:`curve_weights`. Only parameters are trained: the buffers
        of a bend stay on the line.

    Raises
    ------
    ModelError
        If the loss becomes infinite or NaN.

    References
    ----------
    T. Garipov et al., "Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs", NeurIPS 2018,
    arXiv:1802.10026. F. Draxler et al., "Essentially No Barriers in Neural Network Energy Landscape", ICML 2018,
    arXiv:1803.00885.
    """
    generator = torch.Generator().manual_seed(seed)
    on_line = [(k + 1) / (n_bends + 1) for k in range(n_bends)]
    weights = np.array([[1.0, 0.0], *([1 - t, t] for t in on_line), [0.0, 1.0]])
    stacked = surface.combine(ends, weights)
    anchors = [{name: tensor[k] for name, tensor in stacked.items()} for k in range(n_bends + 2)]
    bends = {name: stacked[name][1:-1].clone() for name in surface.parameter_names}
    for k, anchor in enumerate(anchors[1:-1]):
        anchor.update({name: bend[k] for name, bend in bends.items()})  # views, so that the optimizer moves the anchors
    optimizer = torch.optim.Adam(list(bends.values()), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    batches = _minibatches(split, batch_size, generator)
    with progress_bar(f"bending a {kind}", n_steps, progress) as advance:
        for step in range(n_steps):
            w = curve_weights(kind, torch.rand(1, generator=generator).double().numpy(), n_bends)
            point = {name: tensor[0] for name, tensor in surface.combine(anchors, w).items()}
            batch = next(batches)
            if surface.norms and n_examples(batch) < 2:
                raise ModelError(
                    "a curve through networks with batch normalisation is trained on batches of two or more examples; "
                    "these have one"
                )
            loss, gradient = surface.value_and_gradient(point, [batch], batch_statistics=True)
            if not np.isfinite(loss):
                raise ModelError(f"the loss along the curve is {loss} at step {step + 1}; lower the learning rate {lr}")
            # The point is linear in the bends: the gradient with respect to each is the point's times its weight.
            bend_weights = torch.as_tensor(w[0, 1:-1], dtype=surface.dtype, device=surface.device)
            for name, bend in bends.items():
                bend.grad = torch.tensordot(bend_weights[:, None].to(bend.dtype), gradient[name][None], 1)
            optimizer.step()
            schedule.step()
            advance(text=f"loss {loss:.4g}")
    return anchors


def _minibatches(split: Split | LoaderSplit, batch_size: int, generator: torch.Generator) -> Iterator[tuple[Any, Any]]:
    """Minibatches without end, reshuffled in each epoch; of a loader, its own batches in a new order.

    Batches of a single example, of which batch normalisation has no statistics, are left out where there are others.
    """
    if isinstance(split, LoaderSplit):
        batches = split.batches(batch_size)
        single = all(n_examples(batch) == 1 for batch in batches)
        while True:
            yield from (batch for batch in batches.shuffled(generator) if single or n_examples(batch) > 1)
    while True:
        order: Tensor = torch.randperm(len(split), generator=generator).to(split.inputs.device)
        for index in order.split(batch_size):
            if len(index) > 1 or len(order) == 1:
                yield split.take(index)
