"""Spectral densities of the loss Hessian (or GGN, or Fisher) at checkpoints of runs and of users' own models."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from pnanalysis import schema
from pnanalysis.analyses.spectrum_cache import _claim, _digest, _finished, _Key, _own_folder, _row
from pnanalysis.checks import at_least, positive, resolve_dtype
from pnanalysis.curvature.base import CurvatureOperator
from pnanalysis.curvature.peers import make_operator
from pnanalysis.errors import CurvatureError, RunError
from pnanalysis.evaluation.diagnosis import clear_errors
from pnanalysis.inputs.data import Split
from pnanalysis.inputs.sources import Source, as_sources, resolve_device
from pnanalysis.io.runs import Run
from pnanalysis.spectra.density import default_grid, smooth, spectral_density
from pnanalysis.spectra.linear_operator import LinearOperator

#: Lanczos steps a probe where none are asked for.
N_LANCZOS = 90


def hessian(
    *runs: Run | Source,
    checkpoints: Sequence[str] | None = None,
    operator: str = "hessian",
    engine: str = "native",
    n_lanczos: int | None = None,
    n_probes: int = 10,
    n_hvp: int | None = None,
    deflate: bool = True,
    kernel_width: float | None = None,
    split: str = "train",
    n: int | None = 2048,
    batch_size: int = 512,
    params: str | Sequence[str] | None = None,
    per_layer: bool = False,
    bn_mode: str = "eval",
    dtype: str = "float32",
    amp: str = "no",
    device: str | None = "cpu",
    seed: int = 0,
    progress: bool = True,
    state: str | os.PathLike[str] | None = None,
    **lanczos_options: Any,
) -> xr.Dataset:
    """The spectral density at each checkpoint, on one common grid; checkpoints are smoothed alike, layers apart.

    Parameters
    ----------
    *runs : Run or Source
        Runs, or a user's own model and weights (:func:`pnanalysis.open_files`).
    checkpoints : sequence of str, optional
        See :meth:`pnanalysis.io.runs.Run.select`; ``("plain", "champion")`` for runs and all of a user's own files.
    operator : {"hessian", "ggn", "fisher"}
        Hessian of the mean loss, generalised Gauss-Newton, or empirical Fisher.
    engine : {"native", "pyhessian", "curvlinops"}
        Who computes the products; Lanczos is the same.
    n_lanczos : int, optional
        Lanczos steps a probe; 90 by default, or P where that is smaller. With ``per_layer``, a layer of fewer
        parameters takes as many as it has.
    n_probes, n_hvp, deflate, kernel_width
        See :func:`pnanalysis.spectral_density`.
    split : {"train", "validation", "test"}
    n : int or None
        Examples, drawn by ``seed`` (fewer if there are fewer); the same ones at every checkpoint.
    batch_size : int
        Examples a product takes at a time; no influence on the result beyond round-off.
    params : str or sequence of str, optional
        Layer names or patterns to restrict the operator to.
    per_layer : bool
        The diagonal block of each layer in place of the whole matrix. The rows of ``checkpoint`` are then called
        ``CHECKPOINT:LAYER``, and a coordinate ``layer`` names the layer.
    bn_mode : {"eval", "train"}
        Batch normalisation with running or with batch statistics.
    dtype : {"float32", "float64"}
    amp : {"no", "tf32", "bf16"}
        See :class:`pnanalysis.HessianOperator`.
    device : str or None
    seed : int
        Of probes and examples.
    state : path, optional
        Folder for unfinished work: an interrupted call given the same folder and arguments goes on. It holds a file
        for each finished spectrum and a subfolder for the one under way, and may be removed once the call returns.
    **lanczos_options
        Passed to :func:`pnanalysis.spectral_density`.

    Returns
    -------
    xarray.Dataset
        Kind ``hessian``: everything :func:`pnanalysis.spectral_density` gives, with dim ``checkpoint`` in front;
        NaN pads what one checkpoint has fewer of.

    Raises
    ------
    PnError
        If a checkpoint, the data or the operator are not what they should be.

    References
    ----------
    B. Ghorbani, S. Krishnan, Y. Xiao, "An Investigation into Neural Net Optimization via Hessian Eigenvalue Density",
    arXiv:1901.10159. Y. Min, "Persistent Neurons", arXiv:2007.01419, fig. 12.
    """
    torch_dtype = resolve_dtype(dtype)
    at_least(1, n=n, batch_size=batch_size, n_lanczos=n_lanczos, n_probes=n_probes)
    at_least(4, n_hvp=n_hvp)
    at_least(0, seed=seed)
    positive(kernel_width=kernel_width)
    sources = as_sources(runs)
    if not sources:
        raise RunError("name a run, or your own model and weights")
    torch_device = resolve_device(device)
    selected = [source.select(checkpoints) for source in sources]
    for source, chosen in zip(sources, selected, strict=True):
        source.check(chosen)
    settings = {
        "operator": operator, "engine": engine, "n_lanczos": n_lanczos, "n_probes": n_probes, "n_hvp": n_hvp,
        "deflate": deflate, "kernel_width": kernel_width, "split": split, "n": n, "batch_size": batch_size,
        "params": params, "bn_mode": bn_mode, "dtype": dtype, "amp": amp, "seed": seed, **lanczos_options,
    }  # fmt: skip
    if state is not None:
        named = [{k: v for k, v in source.attrs.items() if not str(v).startswith("own ")} for source in sources]
        _claim(Path(state), settings | {"of": named, "checkpoints": [list(chosen) for chosen in selected]})
    spectra: dict[_Key, xr.Dataset] = {}
    rows: list[tuple[str, _Key]] = []
    for which, (source, chosen) in enumerate(zip(sources, selected, strict=True)):
        part = source.split(split, n, seed, torch_device)
        batches = part.batches(batch_size)
        for name, checkpoint in chosen.items():
            label = name if len(sources) == 1 else f"{source.label}/{name}"
            done = [key for key in spectra if key[:2] == (which, checkpoint)]  # the champion may be the plain model
            if done:
                rows += [(_row(label, key[2]), key) for key in done]
                continue
            model = source.model(checkpoint, torch_device)
            asked = settings | source.dataset_attrs() | ({"weights": _digest(checkpoint.path)} if state else {})
            with clear_errors(label, model, batches, source.loss):
                whole = make_operator(
                    engine, operator, model, source.loss, batches,
                    params=params, bn_mode=bn_mode, dtype=torch_dtype, device=torch_device, amp=amp,
                    expected_products=n_hvp or (n_lanczos or N_LANCZOS) * n_probes,
                )  # fmt: skip
                size = getattr(whole, "n_examples", len(part) if isinstance(part, Split) else n)
                for layer, op in _blocks(whole, per_layer):
                    key = (which, checkpoint, layer)
                    n_steps = n_lanczos if n_lanczos and not per_layer else min(n_lanczos or N_LANCZOS, op.shape[0])
                    folder = _own_folder(state, key)
                    compute = partial(
                        spectral_density, op, n_steps, n_probes, n_hvp=n_hvp, deflate=deflate,
                        kernel_width=kernel_width, seed=seed, progress=progress, state=folder,
                        title=_row(label, layer), **lanczos_options,
                    )  # fmt: skip
                    spectra[key] = _finished(folder, asked, op, compute)
                    rows.append((_row(label, layer), key))
    alike = {layer: [ds for key, ds in spectra.items() if key[2] == layer] for _, _, layer in spectra}
    grid = _common_grid([default_grid(*own) for own in alike.values()])
    widths = {layer: max(float(ds.kernel_width) for ds in own) for layer, own in alike.items()}
    smoothed = {key: smooth(ds, grid, widths[key[2]]) for key, ds in spectra.items()}
    stacked = _stacked([smoothed[key] for _, key in rows])
    stacked = stacked.assign_coords(
        checkpoint=[label for label, _ in rows],
        iteration=("checkpoint", [checkpoint.iteration for _, (_, checkpoint, _) in rows]),
        epoch=("checkpoint", [checkpoint.epoch for _, (_, checkpoint, _) in rows]),
    )
    if per_layer:
        stacked = stacked.assign_coords(layer=("checkpoint", [layer for _, (_, _, layer) in rows]))
    return schema.finish(
        stacked, "hessian", **sources[0].dataset_attrs(), operator=operator, engine=engine, split=split, n=size,
        batch_size=batch_size, bn_mode=bn_mode, params=params, seed=seed, device=str(torch_device), dtype=dtype,
        amp=amp,
    )  # fmt: skip


def _common_grid(grids: Sequence[np.ndarray]) -> np.ndarray:
    """One ascending grid that is as fine at each point as the finest of the grids that reach there."""
    finest_first, points = sorted(grids, key=np.ptp), []
    for i, grid in enumerate(finest_first):
        covered = [(grid >= finer[0]) & (grid <= finer[-1]) for finer in finest_first[:i]]
        points.append(grid[~np.any(covered, axis=0)] if covered else grid)
    return np.sort(np.concatenate(points))


def _stacked(spectra: Sequence[xr.Dataset]) -> xr.Dataset:
    """All along ``checkpoint``; those with fewer nodes or probes than others are filled up with NaN."""
    longest: dict[Any, int] = {}
    for ds in spectra:
        longest |= {dim: max(size, longest.get(dim, 0)) for dim, size in ds.sizes.items()}
    padded = [ds.pad({dim: (0, longest[dim] - size) for dim, size in ds.sizes.items()}) for ds in spectra]
    return xr.concat(padded, dim="checkpoint", join="outer", combine_attrs="drop_conflicts")


def _blocks(whole: LinearOperator, per_layer: bool) -> Iterator[tuple[str, LinearOperator]]:
    """The operator itself, under no name, or its diagonal blocks by layer."""
    if not per_layer:
        yield "", whole
    elif isinstance(whole, CurvatureOperator):
        yield from whole.per_layer()
    else:
        raise CurvatureError("only the native engine does one layer at a time")
