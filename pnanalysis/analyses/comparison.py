"""Are these two minima different, and which is better? Every diagnostic of two or more checkpoints in one dataset."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import nn

from pnanalysis import schema
from pnanalysis.activations.functions import BOUNDED_BY_ONE
from pnanalysis.activations.statistics import Measures, common_range
from pnanalysis.analyses.compared_blocks import BlockRequest
from pnanalysis.analyses.compared_learning_coefficients import LearningCoefficientRequest
from pnanalysis.analyses.compared_monitors import monitored_differences
from pnanalysis.analyses.compared_sharpness import SharpnessRequest
from pnanalysis.analyses.compared_spaces import EigenpairRequest
from pnanalysis.analyses.functional import compare_functions
from pnanalysis.analyses.hessian import SpectrumOptions, data_error_of, has_all, network_spectra
from pnanalysis.analyses.matrix_names import matrix_attrs
from pnanalysis.analyses.requests import read_request, settings_of
from pnanalysis.analyses.saturation import activation_ranges, examples_of, network_saturation
from pnanalysis.analyses.significant_differences import ROUND_OFF, with_p_values
from pnanalysis.analyses.spectrum_cache import SpectrumCache, matrix_digest, saved_spectrum
from pnanalysis.analyses.work_folder import within
from pnanalysis.arrays import Array
from pnanalysis.checks import at_least, check_seed, one_of
from pnanalysis.errors import ModelError
from pnanalysis.evaluation.diagnosis import clear_errors
from pnanalysis.evaluation.disagreement import evaluate
from pnanalysis.evaluation.losses import loss_on
from pnanalysis.evaluation.scores import Scores, paired
from pnanalysis.geometry.distances import distance_between, parameter_distances
from pnanalysis.inputs.data import SPLITS, DataLike, n_examples
from pnanalysis.inputs.examples import Examples
from pnanalysis.inputs.models import Loss, ModelLike
from pnanalysis.inputs.selection import Given, Selection, select
from pnanalysis.inputs.sources import resolve_device
from pnanalysis.kinds import ERROR_ENDS
from pnanalysis.significance import share_interval
from pnanalysis.spectra.density import spectral_density
from pnanalysis.spectra.differences import compare_spectra
from pnanalysis.terminal.progress import progress_bar

#: Options of :func:`pnanalysis.hessian` where none are given: a modest budget.
HESSIAN = {"n": 1024, "n_hvp": 200}
_PERCENTILE = 98.0
_N_SATURATION = 1000  # examples that activations are measured on
#: Names of activations that cannot exceed one in size, whose percentiles measure saturation.


def compare(
    *given: Given,
    model: ModelLike | None = None,
    data: DataLike | None = None,
    loss: str | Loss | None = None,
    checkpoints: Sequence[str] | None = None,
    n: int | None = None,
    split: str = "test",
    hessian: bool | Mapping[str, Any] = True,
    eigenpairs: bool | Mapping[str, Any] = False,
    sharpness: bool | Mapping[str, Any] = False,
    blocks: bool | Mapping[str, Any] = False,
    learning_coefficient: bool | Mapping[str, Any] = False,
    cka: bool = True,
    saturation: bool = True,
    batch_size: int = 256,
    device: str | None = "cpu",
    seed: int = 0,
    progress: bool = True,
    state: str | os.PathLike[str] | None = None,
) -> xr.Dataset:
    """Every diagnostic of two or more minima with its error, and each difference with the error of the difference.

    Parameters
    ----------
    *given, model, data, loss
        See :func:`pnanalysis.hessian`: ``compare({"sgd": a, "sam": b}, data=loader, loss=cross_entropy)`` for networks
        in memory. Give a run and its restart control to compare the champion with the best of as many restarts.
    checkpoints : sequence of str, optional
        See :meth:`pnanalysis.io.runs.Run.select`. By default plain and champion of a single run, the champion of each
        of several, and all other networks. The first is the reference. Where a champion is the plain model and that is
        compared already, the best of the later iterations takes its place (``challenger``), and an attribute ``note``
        says so.
    n : int or None
        Examples of each split, drawn by ``seed``; all if ``None``.
    split : {"test", "validation", "train"}
        Where the functions are compared; the last split there is if this one is missing.
    hessian : bool or mapping
        Hessian spectra of the training loss; a mapping holds options of :func:`pnanalysis.hessian` that replace
        :data:`HESSIAN`. Spectra saved with a run are used if they are of the same weights, examples and settings, with
        at least as many products.
    eigenpairs : bool or mapping
        Leading eigenvalues of the Hessian, and overlaps of the spaces of their vectors; a mapping holds options of
        :func:`pnanalysis.eigenpairs` that replace :data:`EIGENPAIRS`.
    sharpness : bool or mapping
        Largest and mean rise of the training loss nearby, in one neighbourhood by default, and relative flatness; a
        mapping holds options of :func:`pnanalysis.sharpness` that replace :data:`SHARPNESS`, such as
        ``{"radii": {"ball": [0.05, 0.1], "adaptive": [0.25, 0.5]}}``.
    blocks : bool or mapping
        Traces and Frobenius norms of the Hessian's diagonal blocks; a mapping holds options of
        :func:`pnanalysis.blocks` that replace :data:`BLOCKS`. Those for spectra of blocks, rounding and the diagonal
        are refused: their numbers have no paired errors.
    learning_coefficient : bool or mapping
        Local learning coefficients of the training loss; a mapping holds options of
        :func:`pnanalysis.learning_coefficient` that replace :data:`LEARNING_COEFFICIENT`.
    cka, saturation : bool
        Whether to compare layers and activations.
    batch_size : int
    device : str or None
    seed : int
    progress : bool
    state : path, optional
        Folder for unfinished spectra, eigenpairs, sharpness, blocks and chains, a subfolder for each, from which an
        interrupted call with the same arguments resumes.

    Returns
    -------
    xarray.Dataset
        Kind ``comparison``; dims ``checkpoint``, ``other`` (the same checkpoints again), ``split``, ``layer`` and
        ``activation``. ``NAME_difference`` is that of ``checkpoint`` minus ``other``.

        - ``loss``, ``error`` (fraction of mistakes; squared error for real-valued targets), their differences, and
          ``only_wrong``: how many examples one gets wrong and the other right (McNemar's counts);
        - ``rank`` by error: one more than the number of checkpoints with a significantly lower error (see Notes);
        - ``norm``, ``distance``, ``relative_distance``, ``cosine``, ``layer_distance``, ``layer_cosine``,
          ``distance_from_start``: in parameters, NaN between architectures;
        - what :func:`pnanalysis.functional_distance` gives;
        - numbers of the Hessian spectrum, and ``wasserstein1`` between spectra with the value expected from noise;
        - ``worst_rise``, ``mean_rise``, ``relative_flatness``: see :func:`pnanalysis.sharpness`; their differences are
          paired. Of several neighbourhoods or radii, rises have a dim ``rise`` in front, with labels such as
          ``ball 0.05``, and a coordinate ``mean_radius`` for those of mean rises;
        - ``eigenvalue`` (checkpoint, pair) and its differences rank by rank, paired by groups of examples, and
          ``gradient_top``; ``overlap`` of the spaces of eigenvectors, with chance and ceiling (see
          :func:`pnanalysis.eigenpairs`), and ``overlap_p`` of being by chance;
        - ``block_trace`` and ``block_norm`` (checkpoint, block) and their differences, group of examples by group and
          sign vector by sign vector; ``network_off_diagonal_share`` and ``trace_concentration`` of the whole matrix;
        - ``learning_coefficient``, NaN where chains have not converged, and its differences, paired by examples;
        - ``last_lambda_max`` and ``last_threshold_ratio`` of runs that were trained with a
          :class:`pnanalysis.CurvatureMonitor` (``pntrain --curvature``): sharpness, and that of the preconditioned
          Hessian over its stability threshold, as last measured on the way to the checkpoint; and their differences;
        - ``saturation``: 98th percentile of the absolute activations, on 1,000 examples of ``split``; a coordinate
          ``bounded`` tells in which layers these cannot exceed one.

    Raises
    ------
    PnError
        If there are fewer than two checkpoints, data sets differ, or the numbers of outputs do.

    Notes
    -----
    All checkpoints see the same examples, and the standard errors of differences are those of paired samples: the
    examples are taken as a random sample, the networks as given. They say nothing about training again with another
    seed. A difference is significant if its p-value, ``NAME_difference_p``, is at most 0.05. These are adjusted for
    all numbers, splits and pairs together, so that a comparison of equal networks makes any false claim in at most
    5 % (see :func:`pnanalysis.analyses.significant_differences.with_p_values`). Ranks may tie: all checkpoints that
    no other beats significantly have rank 1. Intervals of errors, ``error_low`` to ``error_high``, are Wilson's.

    Errors of the spectra's numbers cover the probes and, unless ``data_error="none"`` is among their options, the
    choice of examples.

    The champion was selected by its validation error, which is therefore biased low; the test error is not.

    References
    ----------
    Q. McNemar, "Note on the sampling error of the difference between correlated proportions", Psychometrika 12
    (1947). Y. Min, "Persistent Neurons", arXiv:2007.01419.

    Examples
    --------
    >>> ds = compare(open_run("runs/lenet5"), open_run("runs/lenet5-restart"))  # doctest: +SKIP
    >>> ds.error_difference.sel(split="test").isel(other=0)  # doctest: +SKIP
    """
    wanted = ComparisonRequest.of(
        n=n, split=split, hessian=hessian, eigenpairs=eigenpairs, sharpness=sharpness, blocks=blocks,
        learning_coefficient=learning_coefficient, cka=cka, saturation=saturation, batch_size=batch_size, seed=seed,
    )  # fmt: skip
    selection = select(given, checkpoints, model=model, data=data, loss=loss, champions=True, at_least=2)
    torch_device = resolve_device(device)
    ds = compare_selected(selection, wanted, torch_device, progress, None if state is None else Path(state))
    return schema.finish(
        with_p_values(ds), "comparison",
        **selection[0].source.dataset_attrs(), note=selection.note, n=n,
        batch_size=batch_size, seed=seed, device=str(torch_device), dtype="float32",
    )  # fmt: skip


@dataclass(frozen=True)
class ComparisonRequest:
    """What is to be compared: see :func:`compare`. Parts that are ``None`` are left out."""

    n: int | None
    split: str
    batch_size: int
    seed: int
    cka: bool
    saturation: bool
    spectra: _SpectrumRequest | None
    eigenpairs: EigenpairRequest | None
    sharpness: SharpnessRequest | None
    blocks: BlockRequest | None
    learning_coefficient: LearningCoefficientRequest | None

    @classmethod
    def of(
        cls, *, n: int | None = None, split: str = "test", hessian: bool | Mapping[str, Any] = True,
        eigenpairs: bool | Mapping[str, Any] = False, sharpness: bool | Mapping[str, Any] = False,
        blocks: bool | Mapping[str, Any] = False, learning_coefficient: bool | Mapping[str, Any] = False,
        cka: bool = True, saturation: bool = True, batch_size: int = 256, seed: int = 0,
    ) -> ComparisonRequest:  # fmt: skip
        """From the arguments of :func:`compare`, checked before any work begins.

        Raises
        ------
        PnError
        """
        at_least(1, n=n, batch_size=batch_size)
        check_seed(seed=seed)
        one_of(SPLITS, split=split)
        return cls(
            n, split, batch_size, seed, cka, saturation,
            _SpectrumRequest.of(_options(hessian), seed) if hessian else None,
            EigenpairRequest.of(_options(eigenpairs), seed) if eigenpairs else None,
            SharpnessRequest.of(_options(sharpness), seed) if sharpness else None,
            BlockRequest.of(_options(blocks), seed) if blocks else None,
            LearningCoefficientRequest.of(_options(learning_coefficient), seed) if learning_coefficient else None,
        )  # fmt: skip

    @property
    def matrices(self) -> dict[str, Any]:
        """Attributes that say which matrices spectra, eigenpairs and blocks are of."""
        parts = {"hessian": self.spectra, "eigenpairs": self.eigenpairs, "blocks": self.blocks}
        found: dict[str, Any] = {}
        for name, request in parts.items():
            found |= {} if request is None else matrix_attrs(name, request.options)
        return {name: value for name, value in found.items() if value is not None}


def _options(requested: bool | Mapping[str, Any]) -> Mapping[str, Any]:
    return requested if isinstance(requested, Mapping) else {}


def compare_selected(
    selection: Selection, wanted: ComparisonRequest, device: torch.device, progress: bool, state: Path | None = None
) -> xr.Dataset:
    """The variables of :func:`compare` without p-values, for checkpoints that are chosen already.

    Parameters
    ----------
    selection : Selection
        The first is the reference.
    wanted : ComparisonRequest
    device : torch.device
    progress : bool
    state : Path, optional
        A folder for unfinished work.

    Returns
    -------
    xarray.Dataset
        With ``function_split`` among its attributes, the split where functions are compared.
    """
    n, batch_size, seed = wanted.n, wanted.batch_size, wanted.seed
    examples = Examples(selection, device)
    split = examples.nearest(wanted.split)
    networks = selection.networks(device, torch.float32)
    loss = selection[0].source.loss
    distances = parameter_distances(list(networks.values()))
    own_layers: list[str] = distances.pop("layer")
    distances["distance_from_start"] = ("checkpoint", _from_start(selection, networks))
    parts, function, classes = [], xr.Dataset(), None
    for name in examples.splits:
        total, batches = examples.batches(name, n, batch_size, seed)
        with progress_bar(f"{name} examples", total, progress) as advance:
            if name == split:
                function, scores = compare_functions(
                    networks, batches, loss, cka=wanted.cka, device=device, advance=advance
                )
            else:
                scores = evaluate(networks, batches, loss_on(loss, device, torch.float32), advance)
        parts.append(_split_scores(scores))
        classes = scores.classes
    layers = list(dict.fromkeys([*own_layers, *function.coords.get("layer", xr.DataArray([])).values.tolist()]))
    function = function.reindex(layer=layers) if "layer" in function.dims else function
    found = [xr.concat(parts, dim="split"), function]
    spectra = xr.Dataset()
    if wanted.spectra is not None:
        for network in networks.values():
            network.cpu()  # room for the spectra: each network comes back for its own
        spectra = _spectra(selection, networks, wanted.spectra, device, progress, within(state, "hessian"))
        found.append(spectra)
    rises = xr.Dataset()
    for name in ("eigenpairs", "sharpness", "blocks", "learning_coefficient"):
        request = getattr(wanted, name)
        if request is not None:
            found.append(request.differences(selection, networks, device, progress, within(state, name)))
            rises = found[-1] if name == "sharpness" else rises
    found.append(monitored_differences(selection))
    if wanted.saturation:
        found.append(_saturation(selection, networks, split, device, seed, progress))
    ds = xr.merge([xr.Dataset(distances, {"layer": own_layers}).reindex(layer=layers), *found], compat="no_conflicts")
    ds = ds.assign_coords(
        checkpoint=selection.labels, other=selection.labels, split=list(examples.splits),
        description=("checkpoint", [item.description for item in selection]),
    )  # fmt: skip
    order = ("rise", "checkpoint", "other", "split", "layer", "activation", "block", "pair")
    ds = ds.transpose(*order, missing_dims="ignore")
    return ds.assign_attrs(
        spectra.attrs | rises.attrs | ({} if classes is None else {"classes": classes}) | {"function_split": split}
        | wanted.matrices
    )  # fmt: skip


@dataclass(frozen=True)
class _SpectrumRequest:
    """The spectra to compare: examples, and options of :func:`pnanalysis.hessian`."""

    split: str
    n: int | None
    batch_size: int
    options: SpectrumOptions

    @classmethod
    def of(cls, requested: Mapping[str, Any], seed: int) -> _SpectrumRequest:
        """From keyword arguments that replace :data:`HESSIAN`, checked before any work begins.

        Raises
        ------
        PnError
        """
        defaults = dict(HESSIAN)
        if {"n_lanczos", "n_probes"} & set(requested):
            del defaults["n_hvp"]
        own = {entry.name for entry in fields(SpectrumOptions)} - {"per_layer", "lanczos_options"}
        known = own | set(signature(spectral_density).parameters) - {"operator", "progress", "title", "state"}
        split, n, batch_size, options = read_request(requested, defaults, seed, known, "spectra")
        return cls(split, n, batch_size, SpectrumOptions.from_keywords(**options))


def _split_scores(scores: Scores) -> xr.Dataset:
    """Means and differences of one split."""
    variables: dict[str, Any] = {}
    losses, errors = scores.losses, scores.errors
    n = errors.shape[1]
    for name, values in (("loss", losses), ("error", errors)):
        for end, numbers in paired(values).items():
            dims = ("checkpoint",) if numbers.ndim == 1 else ("checkpoint", "other")
            variables[f"{name}{end}"] = (dims, numbers)
    if scores.classes is not None:
        low, high = share_interval(variables["error"][1], variables["error_se"][1], n)
        variables |= {"error_low": ("checkpoint", low), "error_high": ("checkpoint", high)}
        only = [[float((a > b).sum()) for b in scores.example_errors] for a in scores.example_errors]
        variables["only_wrong"] = (("checkpoint", "other"), only)
    return xr.Dataset(variables | {"n_examples": n, "n_loss_examples": losses.shape[1]})


def _from_start(selection: Selection, networks: Mapping[str, nn.Module]) -> Array:
    """Distance of each network from the point its training started from; NaN where that is not known."""
    starts = {  # shared by many
        item.start.identity: item.source.model(item.start).state_dict() for item in selection if item.start is not None
    }
    return np.array(
        [
            np.nan if item.start is None else distance_between(networks[item.label], starts[item.start.identity])
            for item in selection
        ]
    )


def _spectra(
    selection: Selection, networks: Mapping[str, nn.Module], requested: _SpectrumRequest, device: torch.device,
    progress: bool, state: Path | None,
) -> xr.Dataset:  # fmt: skip
    """Numbers of every spectrum, and how they differ between all pairs."""
    options = requested.options
    found: dict[tuple[str, object], xr.Dataset] = {}
    with SpectrumCache.held(state, settings_of(requested, selection)) as cache:
        for item, network, loss, batches, part in selection.measurable(
            requested.split, requested.n, requested.batch_size, options.seed, device, networks=networks
        ):
            settings = options.matrix_settings(requested.batch_size)
            digest = matrix_digest(item.source, settings, part, network)
            saved = saved_spectrum(item.source, digest, options.n_products, options.data_error)
            found[item.key] = saved if saved is not None else network_spectra(
                network, loss, batches, options, label=item.label, device=device, progress=progress,
                cache=None if cache is None else cache.of(network, batches),
            )[""]  # fmt: skip
    ds = spectrum_differences([found[item.key] for item in selection])
    n_used = n_examples(part, batches)
    return ds.assign_attrs(
        n_hessian=n_used,
        data_error=data_error_of(found.values()),
        all_examples=int(has_all(item.source, requested.split, requested.n, n_used)),
        round_off=max(float(one.attrs.get("round_off", ROUND_OFF)) for one in found.values()),
    )


def spectrum_differences(spectra: Sequence[xr.Dataset]) -> xr.Dataset:
    """Numbers of spectra along ``checkpoint``, and the differences and distances of all pairs along ``other``."""
    k = len(spectra)
    names = [f"{name}{end}" for name in schema.COMPARED_SPECTRUM for end in ERROR_ENDS]
    variables: dict[str, Any] = {
        name: ("checkpoint", np.array([float(one.get(name, np.nan)) for one in spectra]))
        for name in names
        if any(name in one for one in spectra)
    }
    pairs: dict[str, Array] = {}
    unknown = np.where(np.eye(k, dtype=bool), 0.0, np.nan)
    covers = "probes and examples"
    for i in range(k):
        for j in range(i):
            found = compare_spectra(spectra[j], spectra[i])
            covers = min(covers, found.attrs["wasserstein1_covers"])  # "probes" where one pair has no more
            for name, value in _both_ways(found, names).items():
                pairs.setdefault(name, unknown.copy())[[i, j], [j, i]] = value
    ds = xr.Dataset(variables | {name: (("checkpoint", "other"), values) for name, values in pairs.items()})
    return ds.assign_attrs(wasserstein1_covers=covers)


def _both_ways(found: xr.Dataset, names: Sequence[str]) -> dict[str, tuple[float, float]]:
    """A difference of spectra as B minus A and as A minus B."""
    both = {}
    for name in names:
        if name not in found:
            continue
        end = next(end for end in sorted(ERROR_ENDS, key=len, reverse=True) if name.endswith(end))
        stem = name.removesuffix(end)
        back = {"_low": "_high", "_high": "_low"}.get(end, end)
        sign = 1.0 if end.endswith("_se") else -1.0
        both[f"{stem}_difference{end}"] = (float(found[name]), sign * float(found[f"{stem}{back}"]))
    distances = ("wasserstein1", "wasserstein1_noise", "wasserstein1_se")
    return both | {name: (float(found[name]), float(found[name])) for name in distances}


def _saturation(
    selection: Selection, networks: Mapping[str, nn.Module], split: str, device: torch.device, seed: int, progress: bool
) -> xr.Dataset:
    """A percentile of the absolute activations of every activation layer; empty if no network has any."""
    parts = {
        source.label: examples_of(selection, source, split, _N_SATURATION, seed, device) for source in selection.sources
    }
    measures = Measures(percentiles=(_PERCENTILE,))
    rows: list[xr.DataArray] = []
    bounded: dict[str, bool] = {}
    with progress_bar("saturation", len(selection), progress) as advance:
        for item in selection:
            network, part = networks[item.label].to(device), parts[item.source.label]
            row = xr.DataArray(np.zeros(0), dims="activation", coords={"activation": np.zeros(0, dtype=str)})
            with (
                clear_errors(item.label, network, part.stream(2)),
                suppress(ModelError),
            ):  # of networks without activations
                bin_range = common_range(activation_ranges(network, next(part.stream(8))[0]))  # histograms are not used
                found = network_saturation(network, part.stream(500), measures, bin_range)
                values, names = found.abs_percentile.squeeze("quantile").values, found.layer.values
                row = xr.DataArray(values, dims="activation", coords={"activation": names})
                for name, function in zip(found.layer.values, found.activation.values, strict=True):
                    bounded[str(name)] = bounded.get(str(name), True) and str(function) in BOUNDED_BY_ONE
            rows.append(row)
            advance()
    if not bounded:
        return xr.Dataset()
    ds = xr.Dataset(
        {"saturation": xr.concat([row.reindex(activation=list(bounded)) for row in rows], dim="checkpoint")}
    )
    return ds.assign_coords(bounded=("activation", list(bounded.values())))
