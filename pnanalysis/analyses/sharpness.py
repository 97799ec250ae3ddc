"""Sharpness: how far the loss rises within a small neighbourhood of a minimum."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from pnanalysis import schema
from pnanalysis.checks import at_least, check_seed, positive, resolve_dtype
from pnanalysis.errors import ModelError
from pnanalysis.estimates import mean_and_se
from pnanalysis.evaluation.diagnosis import clear_errors
from pnanalysis.geometry.loss_surface import LossSurface, check_same_function
from pnanalysis.inputs.copies import as_real
from pnanalysis.inputs.data import DataLike
from pnanalysis.inputs.models import Loss, ModelLike, device_of
from pnanalysis.inputs.selection import Given, select
from pnanalysis.inputs.sources import resolve_device
from pnanalysis.io.weights import State
from pnanalysis.terminal.progress import Advance, progress_bar

#: Neighbourhood to its radius where none is given.
RADII = {"ball": 0.05, "adaptive": 0.5, "box": 1e-3}
_SMALLEST_STEP = 2.0**-8  # fraction of the way to the border; shorter steps change the loss by round-off only


def sharpness(
    *given: Given,
    model: ModelLike | None = None,
    data: DataLike | None = None,
    loss: str | Loss | None = None,
    checkpoints: Sequence[str] | None = None,
    radii: Mapping[str, float] | None = None,
    n_steps: int = 20,
    n_starts: int = 2,
    split: str = "train",
    n: int | None = 2048,
    batch_size: int = 512,
    dtype: str = "float32",
    device: str | None = "cpu",
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    r"""The largest rise of the loss in neighbourhoods of each checkpoint.

    Parameters
    ----------
    *given, model, data, loss
        See :func:`pnanalysis.hessian`.
    checkpoints : sequence of str, optional
        See :meth:`pnanalysis.io.runs.Run.select`; by default plain and champion of runs, and all other networks.
    radii : mapping, optional
        Neighbourhood to radius; by default all three. ``ball``: :math:`\lVert\varepsilon\rVert_2 \le \rho`, of SAM [1]_
        (0.05). ``adaptive``: :math:`\lVert\varepsilon / |\theta|\,\rVert_2 \le \rho`, of ASAM [2]_ (0.5), which does
        not change when weights are rescaled without changing the function. ``box``:
        :math:`|\varepsilon_i| \le \rho\,(|\theta_i| + 1)`, of Keskar et al. [3]_ (0.001).
    n_steps : int
        Gradients over all examples that each ascent may take.
    n_starts : int
        Ascents, of which the highest counts: one from the checkpoint, the others from random points of the border.
    split, n, batch_size, dtype, device
        As for :func:`pnanalysis.landscape`.
    seed : int
        Of examples and starts.
    progress : bool

    Returns
    -------
    xarray.Dataset
        Kind ``sharpness``, dims ``checkpoint`` and ``neighbourhood``. ``rise`` is the largest rise of the mean loss
        that was found, a lower bound on the largest there is; ``one_step`` the rise at the point where the linearised
        loss is largest, which SAM trains against; ``relative`` is ``100 * rise / (1 + loss)``, Keskar's measure.

    Raises
    ------
    ModelError
        If a neighbourhood is unknown, or its radius is not positive.

    Notes
    -----
    The ascent moves towards the point of the neighbourhood where the linearised loss is largest
    (Frank and Wolfe); all the way if that raises the loss, else half as far, and so on. On a quadratic in a ball
    this is power iteration on the Hessian. Standard errors are paired, over examples, at the points found.

    References
    ----------
    .. [1] P. Foret et al., "Sharpness-Aware Minimization", ICLR 2021, arXiv:2010.01412.
    .. [2] J. Kwon et al., "ASAM: Adaptive Sharpness-Aware Minimization", ICML 2021, arXiv:2102.11600.
    .. [3] N. Keskar et al., "On Large-Batch Training for Deep Learning", ICLR 2017, arXiv:1609.04836, eq. 4 with the
       full space; they ascend by L-BFGS-B.
    """
    radii = dict(RADII if radii is None else radii)
    _check(radii)
    at_least(2, n_steps=n_steps)
    at_least(1, n_starts=n_starts, n=n, batch_size=batch_size)
    check_seed(seed=seed)
    torch_dtype = resolve_dtype(dtype)
    selection, torch_device = select(given, checkpoints, model=model, data=data, loss=loss), resolve_device(device)
    found = {}
    total = len(selection.distinct()) * len(radii) * n_starts * n_steps
    with progress_bar("sharpness", total, progress) as advance:
        for source in selection.sources:
            batches = selection.split(source, split, n, seed, torch_device).batches(batch_size)
            for item in selection.distinct(source):
                network = selection.network(item, torch_device, torch_dtype)
                found[item.key] = network_sharpness(
                    network, source.loss, batches, radii, n_steps=n_steps, n_starts=n_starts, dtype=torch_dtype,
                    seed=seed, label=item.label, advance=advance,
                )  # fmt: skip
    ds = xr.concat([found[item.key] for item in selection], dim="checkpoint").assign_coords(
        checkpoint=selection.labels,
        iteration=("checkpoint", [item.checkpoint.iteration for item in selection]),
        epoch=("checkpoint", [item.checkpoint.epoch for item in selection]),
        neighbourhood=list(radii),
    )
    ds["radius"] = ("neighbourhood", list(radii.values()))
    return schema.finish(
        ds, "sharpness", **selection.sources[0].dataset_attrs(), radii=radii, n_steps=n_steps, n_starts=n_starts,
        split=split, n=n, batch_size=batch_size, seed=seed, device=str(torch_device), dtype=dtype,
    )  # fmt: skip


def network_sharpness(
    network: nn.Module,
    loss: Loss,
    batches: Iterable[Any],
    radii: Mapping[str, float],
    *,
    n_steps: int = 20,
    n_starts: int = 2,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    label: str = "network",
    advance: Advance | None = None,
) -> xr.Dataset:
    """Sharpness of one network over batches in memory, in all neighbourhoods (dim ``neighbourhood``).

    Parameters
    ----------
    network : Module
        Stays as it is.
    loss : callable
        ``loss(outputs, targets)``, averaged over the batch.
    batches : re-iterable of (inputs, targets)
        On the network's device.
    radii : mapping of str to float
        Neighbourhood to radius.
    n_steps, n_starts, dtype, seed
        See :func:`sharpness`.
    label : str
        What the network is called in messages.
    advance : callable, optional
        Called for every gradient.
    """
    surface = LossSurface(network, loss, device_of(network, label), dtype)
    state = surface.anchor(network.state_dict(), label)
    check_same_function(surface, state, network, batches, (label, label))
    with clear_errors(label, surface.model, batches, surface.loss):
        return _measure(surface, state, batches, radii, n_steps, n_starts, seed, advance or (lambda *_, **__: None))


def _measure(
    surface: LossSurface, state: State, batches: Iterable[Any], radii: Mapping[str, float], n_steps: int, n_starts: int,
    seed: int, advance: Advance,
) -> xr.Dataset:  # fmt: skip
    """All neighbourhoods of one state, side by side."""
    theta = {name: as_real(state[name]) for name in surface.parameter_names}
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for kind, radius in radii.items():
        ascents = []
        for start in range(n_starts):
            direction = None
            if start:
                direction = {k: torch.randn(t.shape, generator=generator).to(t) for k, t in theta.items()}
            ascents.append(_ascend(surface, state, theta, batches, (kind, radius), direction, n_steps, advance))
        _, best, _ = max(ascents, key=lambda ascent: ascent[0])
        at, *moved = surface.values([state, _moved(state, best), _moved(state, ascents[0][2])], np.eye(3), batches)
        loss, loss_se = mean_and_se(at.loss)
        (rise, rise_se), (one, one_se) = (mean_and_se(there.loss - at.loss) for there in moved)
        if not isfinite(rise):
            raise ModelError(
                f"the loss is not finite everywhere in the {kind} of radius {radius:.4g}; choose a smaller radius, or "
                'compute in float64 (dtype="float64")'
            )
        rows.append((rise, rise_se, one, one_se, 100 * rise / (1 + loss)))
    names = ("rise", "rise_se", "one_step", "one_step_se", "relative")
    table = {name: ("neighbourhood", list(column)) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
    return xr.Dataset({"loss": loss, "loss_se": loss_se, **table})


def _ascend(
    surface: LossSurface, state: State, theta: State, batches: Iterable[Any], neighbourhood: tuple[str, float],
    direction: State | None, n_steps: int, advance: Advance,
) -> tuple[float, State, State]:  # fmt: skip
    """Highest loss found, where, and where the first step from the centre led."""
    kind, radius = neighbourhood
    point = theta if direction is None else _farthest(kind, radius, theta, direction)
    value, gradient = _value_and_gradient(surface, state, point, batches)
    first, fraction = _farthest(kind, radius, theta, gradient), 1.0
    for step in range(n_steps - 1):
        target = _farthest(kind, radius, theta, gradient)
        candidate = {name: torch.lerp(point[name], target[name], fraction) for name in theta}
        there, slope = _value_and_gradient(surface, state, candidate, batches)
        advance(text=f"{kind}: loss {value:.5g}")
        if there > value:
            point, value, gradient, fraction = candidate, there, slope, min(1.0, 2 * fraction)
        elif fraction <= _SMALLEST_STEP:
            advance(n_steps - step - 2)
            break
        else:
            fraction /= 2
    advance()
    return value, point, first


def _value_and_gradient(
    surface: LossSurface, state: State, point: State, batches: Iterable[Any]
) -> tuple[float, State]:
    value, gradient = surface.value_and_gradient(_moved(state, point), batches)
    return value, {name: as_real(part) for name, part in gradient.items()}


def _moved(state: State, point: State) -> State:
    """The state with the parameters of a point, complex ones put together again."""
    complex_ones = {name for name in point if state[name].is_complex()}
    return state | {name: torch.view_as_complex(t) if name in complex_ones else t for name, t in point.items()}


def _farthest(kind: str, radius: float, theta: State, gradient: State) -> State:
    """The point of the neighbourhood of ``theta`` that lies farthest along the gradient (``theta`` where it is 0)."""
    if kind == "box":
        return {name: t + radius * (t.abs() + 1) * gradient[name].sign() for name, t in theta.items()}
    scales = {name: t.abs() if kind == "adaptive" else torch.ones_like(t) for name, t in theta.items()}
    norm = _norm({name: scale * gradient[name] for name, scale in scales.items()})
    size = radius / norm if norm > 0 else 0.0
    return {name: t + size * scales[name] ** 2 * gradient[name] for name, t in theta.items()}


def _norm(parts: Mapping[str, Tensor]) -> float:
    return float(torch.stack([part.double().square().sum() for part in parts.values()]).sum().sqrt())


def _check(radii: Mapping[str, float]) -> None:
    for kind, radius in radii.items():
        if kind not in RADII:
            raise ModelError(f"unknown neighbourhood {kind!r}; there are {', '.join(RADII)}")
        positive(**{f"the radius of the {kind}": radius})
    if not radii:
        raise ModelError(f"no neighbourhood is named; there are {', '.join(RADII)}")
