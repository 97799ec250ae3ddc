"""Are these two minima different, and which is better? Every diagnostic of two or more checkpoints in one dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import nn

from pnanalysis import schema
from pnanalysis.activations.hooks import ACTIVATIONS
from pnanalysis.analyses.hessian import hessian as spectra_of
from pnanalysis.analyses.saturation import saturation as saturation_of
from pnanalysis.analyses.spectrum_cache import _saved_spectrum
from pnanalysis.checks import at_least, one_of
from pnanalysis.errors import ModelError
from pnanalysis.estimates import significance_threshold
from pnanalysis.evaluation.cka import CentredKernelAlignment
from pnanalysis.evaluation.disagreement import FunctionPairs, cka_variables, evaluate
from pnanalysis.evaluation.forward import loss_on
from pnanalysis.evaluation.scores import Scores, paired
from pnanalysis.geometry.distances import distance_between, parameter_distances
from pnanalysis.inputs.data import SPLITS
from pnanalysis.inputs.selection import Examples, Member, members
from pnanalysis.inputs.sources import Source, resolve_device
from pnanalysis.io.runs import Run
from pnanalysis.spectra.summary import compare_spectra
from pnanalysis.terminal.progress import progress_bar

#: Options of :func:`pnanalysis.hessian` where none are given: a modest budget.
HESSIAN = {"n": 1024, "n_lanczos": 40, "n_probes": 5}
_PERCENTILE = 98.0
#: Names of activations that cannot exceed one in size, whose percentiles measure saturation.
_BOUNDED = {activation.name for activation in ACTIVATIONS.values() if activation.low >= -1 and activation.high <= 1}

Array = NDArray[np.float64]


def compare(
    *runs: Run | Source,
    checkpoints: Sequence[str] | None = None,
    n: int | None = None,
    split: str = "test",
    hessian: bool | Mapping[str, Any] = True,
    cka: bool = True,
    saturation: bool = True,
    batch_size: int = 256,
    device: str | None = "cpu",
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Everything that tells minima apart, with its error, and each difference with the error of the difference.

    Parameters
    ----------
    *runs : Run or Source
        Runs, or a user's own models and weights (:func:`pnanalysis.open_files`). Give a run and its restart control
        to hold the champion against the best of as many restarts.
    checkpoints : sequence of str, optional
        See :meth:`pnanalysis.io.runs.Run.select`. By default plain and champion of a single run, the champion of each
        of several, and all of a user's own files. The first is the reference.
    n : int or None
        Examples of each split, drawn by ``seed``; all if ``None``.
    split : {"test", "validation", "train"}
        Where the functions are compared; the last there is where there is no such split.
    hessian : bool or mapping
        Hessian spectra of the training loss; a mapping holds options of :func:`pnanalysis.hessian` beside
        :data:`HESSIAN`. Spectra saved with a run are used if they are of these checkpoints, the same examples and at
        least the same budget.
    cka, saturation : bool
        Whether to compare layers and activations.
    batch_size : int
    device : str or None
    seed : int
    progress : bool

    Returns
    -------
    xarray.Dataset
        Kind ``comparison``; dims ``checkpoint``, ``other`` (the same checkpoints again), ``split``, ``layer`` and
        ``activation``. ``NAME_difference`` is that of ``checkpoint`` minus ``other``.

        - ``loss``, ``error`` (share of mistakes; squared error for real-valued targets), their differences, and
          ``only_wrong``: how many examples one gets wrong and the other right (McNemar's counts);
        - ``rank`` by error: one more than the number of checkpoints with told lower error (see Notes);
        - ``norm``, ``distance``, ``relative_distance``, ``cosine``, ``layer_distance``, ``layer_cosine``,
          ``distance_from_start``: in parameters, NaN between architectures;
        - what :func:`pnanalysis.functional_distance` gives;
        - numbers of the Hessian spectrum and ``wasserstein1`` between spectra, beside its noise;
        - ``saturation``: 98th percentile of the absolute activations, on 1,000 examples of ``split``; a coordinate
          ``bounded`` says of which layers these cannot exceed one.

    Raises
    ------
    PnError
        If there are fewer than two checkpoints, data sets differ, or the numbers of outputs do.

    Notes
    -----
    All checkpoints see the same examples, and the standard errors of differences are those of paired samples: they
    take the examples for a random sample, the networks as they are. They say nothing of how another training with
    another seed would end. Differences are told beyond ``sigmas`` standard errors (an attribute): two for two
    checkpoints; for more, as many as keep the chance of any false claim among all pairs what it is for one
    (Bonferroni). Ranks may tie: checkpoints that nothing beats all have rank 1.

    Errors of the spectra's numbers come from the probes, on the examples that were drawn: not from the drawing.

    The champion was picked by its validation error, which is therefore too low; the test error is not.

    References
    ----------
    Q. McNemar, "Note on the sampling error of the difference between correlated proportions", Psychometrika 12
    (1947). Y. Min, "Persistent Neurons", arXiv:2007.01419.

    Examples
    --------
    >>> ds = compare(open_run("runs/lenet5"), open_run("runs/lenet5-restart"))  # doctest: +SKIP
    >>> ds.error_difference.sel(split="test").isel(other=0)  # doctest: +SKIP
    """
    at_least(1, n=n, batch_size=batch_size)
    at_least(0, seed=seed)
    one_of(SPLITS, split=split)
    chosen = members(runs, checkpoints)
    torch_device = resolve_device(device)
    examples = Examples(chosen, torch_device)
    split = examples.nearest(split)
    networks = [member.network(torch_device) for member in chosen]
    loss = loss_on(chosen[0].source.loss, torch_device, torch.float32)
    sigmas = significance_threshold(len(chosen) * (len(chosen) - 1) // 2)
    parameters = parameter_distances(networks)
    alignment = CentredKernelAlignment(networks) if cka else None
    own: list[str] = parameters.pop("layer")
    layers = list(dict.fromkeys(own + (alignment.layers if alignment else [])))
    parameters["distance_from_start"] = ("checkpoint", _from_start(chosen, networks))
    parts, function, sizes = [], xr.Dataset(), {}
    for name in examples.splits:
        pairs = FunctionPairs(loss, len(chosen)) if name == split else None
        total, batches = examples.batches(name, n, batch_size, seed)
        with progress_bar(f"{name} examples", total, progress) as advance:
            scores = evaluate(loss, chosen, networks, batches, advance, pairs, alignment if pairs else None)
        parts.append(_scored(scores, sigmas))
        sizes[name] = scores.n
        if pairs is not None:
            function = xr.Dataset(pairs.variables(1 - scores.errors.mean(1), scores.classes))
    found = [xr.concat(parts, dim="split").assign(n_examples=("split", list(sizes.values()))), function]
    if alignment is not None:
        found.append(xr.Dataset(cka_variables(alignment), {"layer": alignment.layers}).reindex(layer=layers))
    del networks, alignment  # room for the spectra
    spectra = xr.Dataset()
    if hessian:
        options = {"seed": seed, **HESSIAN, **(hessian if isinstance(hessian, Mapping) else {})}
        spectra = _spectra(chosen, device, progress, options)
        found.append(spectra)
    if saturation:
        found.append(_saturation(chosen, split, device, seed, progress))
    labels = [member.label for member in chosen]
    ds = xr.merge([xr.Dataset(parameters, {"layer": own}).reindex(layer=layers), *found], compat="no_conflicts")
    ds = ds.assign_coords(
        checkpoint=labels, other=labels, split=list(sizes),
        description=("checkpoint", [member.description for member in chosen]),
    )  # fmt: skip
    return schema.finish(
        ds.transpose("checkpoint", "other", "split", "layer", "activation", missing_dims="ignore"), "comparison",
        **chosen[0].source.dataset_attrs(), function_split=split, sigmas=sigmas, classes=scores.classes, n=n,
        n_hessian=spectra.attrs.get("n"), batch_size=batch_size, seed=seed, device=str(torch_device), dtype="float32",
    )  # fmt: skip


def _scored(scores: Scores, sigmas: float) -> xr.Dataset:
    """Means and differences of one split."""
    variables: dict[str, Any] = {}
    for name, values in (("loss", scores.losses), ("error", scores.errors)):
        for end, numbers in paired(values).items():
            dims = ("checkpoint",) if numbers.ndim == 1 else ("checkpoint", "other")
            variables[f"{name}{end}"] = (dims, numbers)
    difference, se = variables["error_difference"][1], variables["error_difference_se"][1]
    variables["rank"] = ("checkpoint", 1 + (difference > sigmas * se).sum(1))
    if scores.classes is not None:
        only = [[float((a > b).sum()) for b in scores.shares] for a in scores.shares]
        variables["only_wrong"] = (("checkpoint", "other"), only)
    return xr.Dataset(variables)


def _from_start(chosen: Sequence[Member], networks: Sequence[nn.Module]) -> Array:
    starts = [member.start for member in chosen]
    return np.array(
        [
            np.nan if start is None else distance_between(network, start.load())
            for network, start in zip(networks, starts, strict=True)
        ]
    )


def _spectra(chosen: Sequence[Member], device: str | None, progress: bool, options: dict[str, Any]) -> xr.Dataset:
    """Numbers of every spectrum, and how they differ between all pairs."""
    spectra: list[xr.Dataset] = []
    for member in chosen:
        found = _saved_spectrum(member, options)
        if found is None:
            found = spectra_of(
                member.source, checkpoints=[member.checkpoint.name], device=device, progress=progress, **options
            ).isel(checkpoint=0)
        spectra.append(found)
    k = len(chosen)
    ends = ("", "_se", "_low", "_high")
    names = [f"{name}{end}" for name in schema.COMPARED_SPECTRUM for end in ends if f"{name}{end}" in spectra[0]]
    variables: dict[str, Any] = {
        name: ("checkpoint", np.array([float(one[name]) for one in spectra])) for name in names
    }
    pairs: dict[str, Array] = {}
    for i in range(k):
        for j in range(i):
            for name, value in _both_ways(compare_spectra(spectra[j], spectra[i]), names).items():
                pairs.setdefault(name, np.zeros((k, k)))[[i, j], [j, i]] = value
    variables |= {name: (("checkpoint", "other"), values) for name, values in pairs.items()}
    return xr.Dataset(variables, attrs={"n": spectra[0].attrs.get("n")})


def _both_ways(found: xr.Dataset, names: Sequence[str]) -> dict[str, tuple[float, float]]:
    """A difference of spectra as B minus A and as A minus B."""
    both = {}
    for name in names:
        stem, end = next((name.removesuffix(e), e) for e in ("_se", "_low", "_high", "") if name.endswith(e))
        back = {"_se": "_se", "_low": "_high", "_high": "_low", "": ""}[end]
        sign = 1.0 if end == "_se" else -1.0
        both[f"{stem}_difference{end}"] = (float(found[name]), sign * float(found[f"{stem}{back}"]))
    distances = ("wasserstein1", "wasserstein1_noise", "wasserstein1_se")
    return both | {name: (float(found[name]), float(found[name])) for name in distances}


def _saturation(chosen: Sequence[Member], split: str, device: str | None, seed: int, progress: bool) -> xr.Dataset:
    """A percentile of the absolute activations of every activation layer; empty if no network has any."""
    rows: list[xr.DataArray] = []
    bounded: dict[str, bool] = {}
    for member in chosen:
        try:
            found = saturation_of(
                member.source, checkpoints=[member.checkpoint.name], split=split, percentiles=[_PERCENTILE],
                device=device, seed=seed, progress=progress,
            )  # fmt: skip
        except ModelError:  # no activation functions that are known
            rows.append(xr.DataArray(np.zeros(0), dims="activation", coords={"activation": np.zeros(0, dtype=str)}))
            continue
        row = found.abs_percentile.squeeze(drop=True)
        for name, function in zip(found.layer.values, found.activation.values, strict=True):
            bounded[str(name)] = bounded.get(str(name), True) and str(function) in _BOUNDED
        rows.append(
            xr.DataArray(np.atleast_1d(row.values), dims="activation", coords={"activation": found.layer.values})
        )
    names = list(bounded)
    if not names:
        return xr.Dataset()
    ds = xr.Dataset({"saturation": xr.concat([row.reindex(activation=names) for row in rows], dim="checkpoint")})
    return ds.assign_coords(bounded=("activation", list(bounded.values())))
