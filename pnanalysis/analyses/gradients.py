"""The persistent gradient split into a constant push and a fluctuation, next to the gradient of the loss."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pnanalysis import schema
from pnanalysis.checks import at_least, check_seed
from pnanalysis.curvature.operators import HessianOperator
from pnanalysis.errors import RunError
from pnanalysis.evaluation.diagnosis import clear_errors
from pnanalysis.inputs.copies import as_real
from pnanalysis.inputs.data import Split
from pnanalysis.inputs.models import parameter_layers
from pnanalysis.inputs.sources import Source, as_source, resolve_device
from pnanalysis.io.runs import Run
from pnanalysis.terminal.progress import progress_bar

_Layers = dict[str, list[str]]


def gradient_split(
    run: Run | Source | str | os.PathLike[str],
    *,
    iterations: Sequence[int] | None = None,
    window: int = 1,
    split: str = "train",
    n: int | None = 2048,
    batch_size: int = 512,
    device: str | None = "cpu",
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    r"""Split the persistent gradient of each repelled layer at the saved epochs of a run.

    In iteration :math:`n` layer :math:`l` is pushed by :math:`\lambda s_n^l(\theta)` in addition to the gradient of the
    loss, where :math:`s_n^l(\theta) = \sum_{k<n} \mathrm{sign}\langle\Theta_k^l, \theta^l\rangle\, \Theta_k^l /
    \lVert\Theta_k^l\rVert^2`. Over a window of epochs, :math:`C_n^l` is the mean of :math:`s_n^l` and
    :math:`d_n^l = s_n^l - C_n^l` what fluctuates.

    Parameters
    ----------
    run : Run, Source or path
        Persistent or partial, with the absolute penalty.
    iterations : sequence of int, optional
        Which; all but the plain one by default.
    window : int
        First epoch of the window that defines :math:`C_n^l`; it reaches to the end.
    split, n, batch_size, device, seed
        Where the gradient of the loss is taken, as for :func:`pnanalysis.hessian`.
    progress : bool

    Returns
    -------
    xarray.Dataset
        Kind ``gradients``, dims ``iteration``, ``layer``, ``epoch`` and ``end`` (the earlier end points), NaN where
        there is nothing. ``inner_product`` is :math:`\langle\Theta_k^l, \theta^l\rangle / \lVert\Theta_k^l\rVert^2`;
        ``constant_norm`` and ``fluctuation_norm`` are :math:`\lambda\lVert C_n^l\rVert` and
        :math:`\lambda\lVert d_n^l\rVert`, to be compared with ``loss_gradient_norm``; ``last_flip`` is the first saved
        epoch from which a sign stays as it is at the end. :math:`d_n^l` averages to zero over the window as a whole
        by definition; that its constant part is one is tested by its halves: ``half_difference`` is the norm of the
        difference of their means (times :math:`\lambda`), ``half_difference_se`` the size that independent
        fluctuations of the size seen would give it.

    Raises
    ------
    RunError
        If the run is not persistent, has another penalty, or an iteration or the window holds no epochs.

    References
    ----------
    Y. Min, "Persistent Neurons", arXiv:2007.01419, eq. 6 to 8.
    """
    at_least(1, n=n, batch_size=batch_size)
    at_least(0, window=window)
    check_seed(seed=seed)
    source = as_source(run)
    config = _check(source)
    assert source.run is not None
    ends = source.run.ends
    chosen = list(range(1, len(ends))) if iterations is None else list(iterations)
    wrong = [i for i in chosen if i not in range(1, len(ends))]
    if wrong or not chosen:
        raise RunError(f"{source.run.path}: has no repelled iteration {wrong or ''}; there are 1 to {len(ends) - 1}")
    torch_device = resolve_device(device)
    part = source.split(split, n, seed, torch_device)
    size = len(part) if isinstance(part, Split) else n
    batches = part.batches(batch_size)
    layers = {
        name: [full for full, _ in own] for name, own in parameter_layers(source.model(ends[0], torch_device))
    }  # fmt: skip
    origin = _by_layer(source.model(source.run.start).state_dict(), layers) if config.get("origin") == "start" else {}
    earlier = [_by_layer(source.model(end).state_dict(), layers, origin) for end in ends]
    paths = {i: [point for point in source.run.trajectory(i) if point.epoch > 0] for i in chosen}
    parts = []
    with progress_bar("gradients", sum(len(path) for path in paths.values()), progress) as advance:
        for i, path in paths.items():
            repelled = source.run.manifest["layers"][i]
            inner, slopes = [], []
            for point in path:
                model = source.model(point, torch_device)
                here = _by_layer(model.state_dict(), layers, origin)
                inner.append([[_projection(end[layer], here[layer]) for end in earlier[:i]] for layer in repelled])
                with clear_errors(f"{source.label}/{point.name}", model, batches, source.loss):
                    operator = HessianOperator(model, source.loss, batches, expected_products=1)
                    slope = dict(zip(operator.names, operator.gradient().split(_sizes(operator)), strict=True))
                slopes.append([_norm([slope[name] for name in layers[layer]]) for layer in repelled])
                advance(1)
            epochs = np.array([point.epoch for point in path])
            grams = [_gram([end[layer] for end in earlier[:i]]) for layer in repelled]
            parts.append(_split(i, epochs, repelled, np.array(inner), np.array(slopes), grams, config["lam"], window))
    ds = xr.concat(parts, dim="iteration", join="outer").assign_coords(iteration=chosen)
    ds = ds.reindex(layer=[layer for layer in layers if layer in ds.layer.values])
    return schema.finish(
        ds, "gradients", **source.dataset_attrs(), lam=config["lam"], window=window, split=split, n=size, seed=seed,
        device=str(torch_device), dtype="float32",
    )  # fmt: skip


def _check(source: Source) -> dict[str, Any]:
    if source.run is None or source.run.manifest["strategy"] not in ("persistent", "partial"):
        raise RunError("the gradient can be split for persistent and partial runs only; give the directory of one")
    config: dict[str, Any] = source.run.manifest["config"]
    if config.get("penalty", "absolute") != "absolute":
        raise RunError(f"{source.run.path}: only the absolute penalty is split, this run has {config['penalty']}")
    return config


def _split(
    iteration: int,
    epochs: np.ndarray,
    layers: list[str],
    inner: np.ndarray,
    slopes: np.ndarray,
    grams: list[np.ndarray],
    lam: float,
    window: int,
) -> xr.Dataset:
    """One iteration: ``inner`` (epoch, layer, end), ``slopes`` (epoch, layer), a Gram matrix of ends per layer."""
    signs = np.sign(inner)
    used = epochs >= window
    if not used.any():
        raise RunError(f"the window begins at epoch {window}, iteration {iteration} ends at {epochs[-1]}")
    constant, fluctuation, halves, expected = [], [], [], []
    for at, gram in enumerate(grams):
        mean = signs[used, at].mean(axis=0)
        away = signs[:, at] - mean
        constant.append(_length(mean, gram))
        fluctuation.append([_length(row, gram) for row in away])
        first, second = np.array_split(away[used], 2)
        variance = sum(_length(row, gram) ** 2 for row in away[used]) / max(used.sum() - 1, 1)
        enough = len(second) > 0
        halves.append(_length(first.mean(axis=0) - second.mean(axis=0), gram) if enough else np.nan)
        expected.append(np.sqrt(variance * (1 / len(first) + 1 / len(second))) if enough else np.nan)
    return xr.Dataset(
        {
            "inner_product": (("layer", "epoch", "end"), inner.swapaxes(0, 1)),
            "sign": (("layer", "epoch", "end"), signs.swapaxes(0, 1)),
            "last_flip": (("layer", "end"), _last_flip(epochs, signs)),
            "constant_norm": ("layer", lam * np.array(constant)),
            "fluctuation_norm": (("layer", "epoch"), lam * np.array(fluctuation)),
            "loss_gradient_norm": (("layer", "epoch"), slopes.T),
            "half_difference": ("layer", lam * np.array(halves)),
            "half_difference_se": ("layer", lam * np.array(expected)),
        },
        coords={"layer": layers, "epoch": epochs, "end": np.arange(iteration)},
    )


def _last_flip(epochs: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """``(layer, end)``: the first epoch from which on the sign is what it is in the end."""
    settled = np.logical_and.accumulate((signs == signs[-1])[::-1], axis=0)[::-1]
    return epochs[settled.argmax(axis=0)].astype(float)


def _length(combination: np.ndarray, gram: np.ndarray) -> float:
    """Norm of a combination of vectors, from their Gram matrix."""
    return float(np.sqrt(max(combination @ gram @ combination, 0.0)))


def _gram(ends: list[Tensor]) -> np.ndarray:
    """Inner products of the scaled end points, ``(n, n)``."""
    rows = torch.stack([end / end.square().sum().clamp_min(torch.finfo(end.dtype).tiny) for end in ends])
    return (rows @ rows.T).numpy()


def _projection(end: Tensor, here: Tensor) -> float:
    squared = float(end @ end)
    return float(end @ here) / squared if squared > 0 else 0.0


def _by_layer(state: Any, layers: _Layers, origin: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Each layer's parameters as one float64 vector on the CPU, measured from the origin."""
    vectors = {
        layer: torch.cat([as_real(state[name].detach()).double().cpu().reshape(-1) for name in names])
        for layer, names in layers.items()
    }
    return {layer: vector - origin[layer] for layer, vector in vectors.items()} if origin else vectors


def _sizes(operator: HessianOperator) -> list[int]:
    return [operator.model.get_parameter(name).numel() for name in operator.names]


def _norm(parts: list[Tensor]) -> float:
    return float(torch.cat(parts).double().norm())
