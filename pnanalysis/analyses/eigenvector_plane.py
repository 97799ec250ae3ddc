"""Two eigenvectors of the Hessian as directions of a plane through a network's parameters."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from pnanalysis.analyses.eigenpairs import network_eigenpairs
from pnanalysis.analyses.network_eigenpairs import EigenpairOptions
from pnanalysis.analyses.work_folder import weights_digest
from pnanalysis.errors import ModelError
from pnanalysis.inputs.copies import as_real
from pnanalysis.inputs.models import Loss
from pnanalysis.io.beside import check_unit
from pnanalysis.io.weights import State
from pnanalysis.terminal.progress import progress_bar


class EigenvectorPlane(NamedTuple):
    """A plane along two eigenvectors.

    Attributes
    ----------
    directions : list of two states
        Of unit length; zero for buffers.
    values : list of float
        The eigenvalues.
    axes : list of str
        Labels.
    span : tuple of four floats
        How far the plane reaches by default.
    """

    directions: list[State]
    values: list[float]
    axes: list[str]
    span: tuple[float, float, float, float]


def eigenvector_plane(
    network: nn.Module,
    state: Mapping[str, Tensor],
    loss: Loss,
    batches: Iterable[Any],
    pairs: Sequence[int],
    eigenpairs: xr.Dataset | None = None,
    *,
    dtype: str = "float32",
    seed: int = 0,
    label: str = "network",
    progress: bool = True,
) -> EigenvectorPlane:
    """The directions of a plane through a network along two eigenvectors, given or computed.

    Parameters
    ----------
    network : Module
    state : mapping of tensors
        Its state, in whose form the directions are.
    loss : callable
    batches : re-iterable of (inputs, targets)
    pairs : two ints
        Numbers of the pairs, from 1 on.
    eigenpairs : xarray.Dataset, optional
        Kind ``eigenpairs``, with vectors.
    dtype, seed, label, progress
        See :func:`pnanalysis.landscape`.

    Raises
    ------
    ModelError
        If the dataset has no vectors, is of other weights, or has fewer pairs.
    """
    if eigenpairs is None:
        options = EigenpairOptions(k=max(pairs), dtype=dtype, seed=seed, data_error="none", classes=False)
        with progress_bar(f"{label}: eigenvectors", None, progress) as advance:
            found = network_eigenpairs(
                network, loss, batches, options, label=label, device=next(network.parameters()).device, advance=advance
            )
        one = found.with_vector
    else:
        one = _of_network(eigenpairs, network, label)
    missing = [i for i in pairs if i not in one.pair.values or not np.isfinite(float(one.value.sel(pair=i)))]
    if missing:
        raise ModelError(f"{label}: there is no eigenpair {missing[0]}; there are {int(one.value.notnull().sum())}")
    chosen = one.sel(pair=list(pairs))
    vectors = check_unit(chosen.vector.values[:, : int(one.n_parameters)], f"the eigenpairs of {label}")
    values = [float(value) for value in chosen.value]
    axes = [f"along eigenvector {i}, eigenvalue {value:.3g}" for i, value in zip(pairs, values, strict=True)]
    tensors = json.loads(str(one.tensors.item()))
    directions = [_as_state(vector, tensors, state) for vector in vectors]
    norm = float(torch.stack([as_real(state[name]).double().square().sum() for name, _, _ in tensors]).sum().sqrt())
    curvature = float(np.sqrt(abs(values[0] * values[1])))
    half = min(np.sqrt(2 / curvature) if curvature else np.inf, norm / 2 or 1.0)
    return EigenvectorPlane(directions, values, axes, (-half, half, -half, half))


def _of_network(ds: xr.Dataset, network: nn.Module, label: str) -> xr.Dataset:
    """The pairs of this network out of a dataset of several."""
    if ds.attrs.get("kind") != "eigenpairs" or "tensors" not in ds.coords:
        raise ModelError("eigenpairs is no dataset of pnanalysis.eigenpairs of a network; make one, or leave it out")
    if "vector" not in ds:
        raise ModelError("these eigenpairs have no vectors; compute them with vectors=True (--vectors)")
    if "checkpoint" not in ds.dims:
        raise ModelError("these eigenpairs are of an operator, not of a network; compute them of the network")
    own = np.flatnonzero(ds["weights_digest"].values == weights_digest(network))
    if not len(own):
        raise ModelError(
            f"these eigenpairs are of {', '.join(map(str, ds.checkpoint.values))}, and none has the weights of {label}"
        )
    return ds.isel(checkpoint=int(own[0]))


def _as_state(vector: np.ndarray, tensors: Sequence[tuple[str, str, int]], like: Mapping[str, Tensor]) -> State:
    """A vector in the form of a state; zeros for what it does not cover."""
    state = {name: torch.zeros_like(tensor) for name, tensor in like.items()}
    begin = 0
    for name, _, n in tensors:
        if name not in state:
            raise ModelError(
                f"{name!r} is a part of a parameter, or of another network; a plane needs whole parameters"
            )
        into = as_real(state[name])  # a view
        into.copy_(torch.from_numpy(np.ascontiguousarray(vector[begin : begin + n])).view(into.shape))
        begin += n
    return state
