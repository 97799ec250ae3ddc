"""Spectral densities of the loss Hessian (or GGN, or Fisher) at checkpoints of runs and of users' own models."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import xarray as xr

from pnanalysis import schema
from pnanalysis.curvature.density import default_grid, smooth, spectral_density
from pnanalysis.curvature.engines import make_operator
from pnanalysis.data import Split
from pnanalysis.runs import Checkpoint, Run
from pnanalysis.sources import Source, as_source, resolve_device


def hessian(
    *runs: Run | Source,
    checkpoints: Sequence[str] | None = None,
    operator: str = "hessian",
    engine: str = "native",
    n_lanczos: int = 90,
    n_probes: int = 10,
    n_hvp: int | None = None,
    deflate: bool = True,
    kernel_width: float | None = None,
    split: str = "train",
    n: int | None = 2048,
    batch_size: int = 512,
    params: str | Sequence[str] | None = None,
    bn_mode: str = "eval",
    dtype: str = "float32",
    amp: str = "no",
    device: str | None = "cpu",
    seed: int = 0,
    progress: bool = True,
    state: str | os.PathLike[str] | None = None,
    **lanczos_options: Any,
) -> xr.Dataset:
    """The spectral density at each checkpoint, on one common grid.

    Parameters
    ----------
    *runs : Run or Source
        Runs, or a user's own model and weights (:func:`pnanalysis.open_files`).
    checkpoints : sequence of str, optional
        See :meth:`pnanalysis.runs.Run.select`; ``("plain", "champion")`` for runs and all of a user's own files.
    operator : {"hessian", "ggn", "fisher"}
        Hessian of the mean loss, generalised Gauss-Newton, or empirical Fisher.
    engine : {"native", "pyhessian", "curvlinops"}
        Who computes the products; Lanczos is the same.
    n_lanczos, n_probes, n_hvp, deflate, kernel_width
        See :func:`pnanalysis.spectral_density`.
    split : {"train", "validation", "test"}
    n : int or None
        Examples, drawn by ``seed`` (fewer if there are fewer); the same ones at every checkpoint.
    batch_size : int
        Examples a product takes at a time; no influence on the result beyond round-off.
    params : str or sequence of str, optional
        Layer names or patterns to restrict the operator to.
    bn_mode : {"eval", "train"}
        Batch normalisation with running or with batch statistics.
    dtype : {"float32", "float64"}
    amp : {"no", "bf16"}
        See :class:`pnanalysis.HessianOperator`.
    device : str or None
    seed : int
        Of probes and examples.
    state : path, optional
        Folder for unfinished work, a subfolder a checkpoint: an interrupted call given the same folder goes on.
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
    sources = [as_source(run) for run in runs]
    torch_device = resolve_device(device)
    torch_dtype = {"float32": torch.float32, "float64": torch.float64}[dtype]
    spectra: dict[tuple[int, Checkpoint], xr.Dataset] = {}
    rows: list[tuple[str, int, Checkpoint]] = []
    for which, source in enumerate(sources):
        part = source.data.get(split)
        size = min(n, len(part)) if n is not None and isinstance(part, Split) else n
        batches = part.subset(size, seed).to(torch_device).batches(batch_size)
        for name, checkpoint in source.select(checkpoints).items():
            rows.append((name if len(sources) == 1 else f"{source.label}/{name}", which, checkpoint))
            if (which, checkpoint) in spectra:  # the champion may be the plain model
                continue
            op = make_operator(
                engine, operator, source.model(checkpoint, torch_device), source.loss, batches,
                params=params, bn_mode=bn_mode, dtype=torch_dtype, device=torch_device, amp=amp,
                expected_products=n_hvp or n_lanczos * n_probes,
            )  # fmt: skip
            spectra[which, checkpoint] = spectral_density(
                op, n_lanczos, n_probes, n_hvp=n_hvp, deflate=deflate, kernel_width=kernel_width, seed=seed,
                progress=progress, state=_own_folder(state, which, checkpoint), **lanczos_options,
            )  # fmt: skip
    grid = default_grid(*spectra.values())
    width = max(float(ds.kernel_width) for ds in spectra.values())
    smoothed = {key: smooth(ds, grid, width) for key, ds in spectra.items()}
    stacked = xr.concat(
        [smoothed[which, checkpoint] for _, which, checkpoint in rows],
        dim="checkpoint", join="outer", combine_attrs="drop_conflicts",
    )  # fmt: skip
    stacked = stacked.assign_coords(
        checkpoint=[label for label, _, _ in rows],
        iteration=("checkpoint", [checkpoint.iteration for *_, checkpoint in rows]),
        epoch=("checkpoint", [checkpoint.epoch for *_, checkpoint in rows]),
    )
    return schema.finish(
        stacked, "hessian", **sources[0].dataset_attrs(), operator=operator, engine=engine, split=split, n=size,
        batch_size=batch_size, bn_mode=bn_mode, params=params, seed=seed, device=str(torch_device), dtype=dtype,
    )  # fmt: skip


def _own_folder(state: str | os.PathLike[str] | None, which: int, checkpoint: Checkpoint) -> Path | None:
    """Where the unfinished work on one checkpoint is kept."""
    return None if state is None else Path(state) / f"{which}-{checkpoint.name.replace('/', '-')}"
