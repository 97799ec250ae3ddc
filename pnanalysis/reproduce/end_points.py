"""The end points of a run against each other: errors, distances, disagreement, and their predictions averaged."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor, nn

from pnanalysis import schema
from pnanalysis.errors import DataError
from pnanalysis.evaluation.forward import forward
from pnanalysis.geometry.distances import distance_between, parameter_distances
from pnanalysis.inputs.data import Split
from pnanalysis.inputs.sources import Source

_BATCH = 500
_SPLITS = ("validation", "test")

Array = NDArray[np.float64]


def end_points(source: Source, device: torch.device) -> xr.Dataset:
    """Compare the end points of all iterations of a run of a classifier.

    Parameters
    ----------
    source : Source
        A run with its data.
    device : torch.device

    Returns
    -------
    xarray.Dataset
        Kind ``end_points``. ``error`` and ``nll`` (iteration, split) of each network; ``ensemble_error`` and
        ``ensemble_nll`` of the average of the probabilities of iterations 0 to i; ``distance``,
        ``relative_distance``, ``cosine`` and ``disagreement`` (iteration, other) of each pair, the last one on the test
        set, and ``distance_from_start`` (iteration).

    Raises
    ------
    DataError
        If there is no validation or test set, or the errors differ from those in the run's history.
    """
    run = source.run
    assert run is not None
    networks = [source.model(end, device) for end in run.ends]
    starts = [run.trajectory(end.iteration)[0].load() for end in run.ends]
    moved = [distance_between(network.cpu(), start) for network, start in zip(networks, starts, strict=True)]
    pairs = parameter_distances(networks)
    variables: dict[str, Any] = {
        name: (("iteration", "other"), pairs[name][1]) for name in ("distance", "relative_distance", "cosine")
    }
    variables |= {"distance_from_start": ("iteration", np.array(moved)), "norm": ("iteration", pairs["norm"][1])}
    scores = {split: _scores([network.to(device) for network in networks], source, split, device) for split in _SPLITS}
    for name in ("error", "nll", "ensemble_error", "ensemble_nll"):
        variables[name] = (("iteration", "split"), np.stack([scores[split][name] for split in _SPLITS], axis=1))
    variables["disagreement"] = (("iteration", "other"), scores["test"]["disagreement"])
    indices = np.arange(len(networks))
    ds = xr.Dataset(variables, {"iteration": indices, "other": indices, "split": list(_SPLITS)})
    _check_errors(ds, source)
    return schema.finish(ds, "end_points", **source.dataset_attrs(), n_test=scores["test"]["n"], dtype="float32")


@torch.no_grad()
def _scores(networks: list[nn.Module], source: Source, split: str, device: torch.device) -> dict[str, Any]:
    part = source.split(split, None, 0, device)
    if not isinstance(part, Split) or getattr(source.data, split) is None:
        raise DataError(f"{source.data.name}: has no {split} set; these measures need one")
    probabilities, targets = [], []
    for inputs, target in part.batches(_BATCH):
        outputs = [torch.as_tensor(forward(network, inputs)).double().softmax(1) for network in networks]
        probabilities.append(torch.stack(outputs).cpu())
        targets.append(target.cpu())
    return classifier_scores(torch.cat(probabilities, dim=1), torch.cat(targets))


def classifier_scores(probabilities: Tensor, targets: Tensor) -> dict[str, Any]:
    """Errors of networks and of the averages of the first 1, 2, ... of them, and how often two disagree.

    Parameters
    ----------
    probabilities : Tensor, shape (k, n, classes)
        Of each network for each example, in float64.
    targets : Tensor, shape (n,)

    Returns
    -------
    dict
        ``error``, ``nll``, ``ensemble_error`` and ``ensemble_nll``, shape (k,), ``disagreement`` (k, k) and ``n``.
    """
    k, n, _ = probabilities.shape
    sizes = torch.arange(1, k + 1, dtype=probabilities.dtype)[:, None, None]
    averages = probabilities.cumsum(0) / sizes
    predicted = probabilities.argmax(2)
    disagreement = (predicted[:, None] != predicted[None]).double().mean(2)
    found: dict[str, Any] = {"disagreement": disagreement.numpy(), "n": n}
    for prefix, each in (("", probabilities), ("ensemble_", averages)):
        chosen = each.gather(2, targets.expand(k, n)[..., None])[..., 0]
        found[f"{prefix}error"] = (each.argmax(2) != targets).double().mean(1).numpy()
        found[f"{prefix}nll"] = -chosen.clamp_min(torch.finfo(chosen.dtype).tiny).log().mean(1).numpy()
    return found


def _check_errors(ds: xr.Dataset, source: Source) -> None:
    """Errors are computed a second time here: they must be those that training has recorded, up to near ties."""
    assert source.run is not None
    last = source.run.history.isel(epoch=-1, iteration=slice(ds.sizes["iteration"]))
    for split in _SPLITS:
        recorded, found = last[f"{split}_error"].values, ds.error.sel(split=split).values
        if np.abs(recorded - found).max() > 2e-3:
            i = int(np.abs(recorded - found).argmax())
            raise DataError(
                f"{source.label}: iteration {i} has a {split} error of {found[i]:.4f}, and its history says "
                f"{recorded[i]:.4f}; the weights or the data are not those of the training"
            )
