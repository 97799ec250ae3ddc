"""Spectral densities of the loss Hessian (or GGN, or Fisher) at checkpoints of runs, of files, or of networks."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import nn

from pnanalysis import schema
from pnanalysis.analyses.spectrum_cache import SpectrumCache, matrix_digest
from pnanalysis.checks import at_least, check_seed, one_of, positive, resolve_dtype
from pnanalysis.curvature.base import METHODS, CurvatureOperator
from pnanalysis.curvature.batch_weights import Weight
from pnanalysis.curvature.distributed import (
    DistributedOperator,
    OwnExamples,
    first_process_first,
    is_first_process,
    shared_operator,
)
from pnanalysis.curvature.peers import make_operator
from pnanalysis.errors import CurvatureError
from pnanalysis.evaluation.diagnosis import clear_errors
from pnanalysis.inputs.data import Batch, DataLike, Split, n_examples
from pnanalysis.inputs.models import Loss, ModelLike
from pnanalysis.inputs.selection import Given, SelectedCheckpoint, Selection, select
from pnanalysis.inputs.sources import Source, resolve_device
from pnanalysis.io.collection import padded
from pnanalysis.spectra.data_error import DATA_ERRORS
from pnanalysis.spectra.density import FEWEST, N_HVP, N_LANCZOS, N_PROBES, default_grid, smooth, spectral_density
from pnanalysis.spectra.linear_operator import LinearOperator
from pnanalysis.spectra.stopping import checked_targets


@dataclass(frozen=True)
class SpectrumOptions:
    """Which matrix of a network, and how its spectrum is sampled: see :func:`hessian`."""

    operator: str = "hessian"
    engine: str = "native"
    n_lanczos: int | None = None
    n_probes: int | None = None
    n_hvp: int | None = None
    until: Mapping[str, float] | None = None
    deflate: bool = True
    kernel_width: float | None = None
    params: str | Sequence[str] | None = None
    per_layer: bool = False
    bn_mode: str = "eval"
    dtype: str = "float32"
    amp: str = "no"
    seed: int = 0
    weight: Weight = None
    draws: int | None = None
    method: str = "exact"
    lanczos_options: Mapping[str, Any] = field(default_factory=dict)
    data_error: str = "examples"
    distributed: bool = False
    shard_basis: bool = False
    checkpoint_activations: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        resolve_dtype(self.dtype)
        one_of(DATA_ERRORS, data_error=self.data_error)
        one_of(METHODS, method=self.method)
        at_least(1, n_lanczos=self.n_lanczos, n_probes=self.n_probes, draws=self.draws)
        at_least(FEWEST, n_hvp=self.n_hvp)
        checked_targets(self.until)
        check_seed(seed=self.seed)
        positive(kernel_width=self.kernel_width)
        if self.distributed and (self.engine != "native" or self.draws is not None):
            raise CurvatureError("several processes take the native engine and no draws")

    @classmethod
    def from_keywords(cls, **options: Any) -> SpectrumOptions:
        """Keyword arguments of :func:`hessian`; those not known here go to :func:`pnanalysis.spectral_density`."""
        own = {entry.name for entry in fields(cls)}
        known = {name: value for name, value in options.items() if name in own}
        return cls(**known, lanczos_options={name: value for name, value in options.items() if name not in own})

    @property
    def n_products(self) -> int:
        """The most products with the matrix."""
        if self.n_hvp is None and self.n_lanczos is None and self.n_probes is None:
            return N_HVP
        return self.n_hvp or (self.n_lanczos or N_LANCZOS) * (self.n_probes or N_PROBES)

    def steps(self, n_parameters: int) -> int | None:
        """Lanczos steps per probe for a matrix of this size, where they are given."""
        return min(self.n_lanczos, n_parameters) if self.n_lanczos and self.per_layer else self.n_lanczos

    def matrix_settings(self, batch_size: int) -> dict[str, Any]:
        """Those that say which matrix it is, rather than what is spent on it.

        The size of batches is one of them where the matrix is made of whole batches.
        """
        names = ("operator", "params", "bn_mode", "dtype", "amp", "draws")
        method = {} if self.method == "exact" else {"method": self.method}
        of_batches = self.bn_mode == "train" or self.draws is not None or self.weight not in (None, "examples")
        batches = {"batch_size": batch_size} if of_batches else {}
        return {name: getattr(self, name) for name in names} | {"weight": self.weight_name} | method | batches

    @property
    def weight_name(self) -> str:
        """What batches weigh by, in words; empty by default."""
        return self.weight if isinstance(self.weight, str) else getattr(self.weight, "__qualname__", "")


class Row(NamedTuple):
    """A spectrum, and what it is called in the dataset."""

    label: str
    layer: str
    item: SelectedCheckpoint
    spectrum: xr.Dataset
    digest: str


def hessian(
    *given: Given,
    model: ModelLike | None = None,
    data: DataLike | None = None,
    loss: str | Loss | None = None,
    checkpoints: Sequence[str] | None = None,
    operator: str = "hessian",
    engine: str = "native",
    n_lanczos: int | None = None,
    n_probes: int | None = None,
    n_hvp: int | None = None,
    until: Mapping[str, float] | None = None,
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
    weight: Weight = None,
    draws: int | None = None,
    method: str = "exact",
    checkpoint_activations: bool = False,
    compile: bool = False,
    data_error: str = "examples",
    device: str | None = "cpu",
    seed: int = 0,
    progress: bool = True,
    state: str | os.PathLike[str] | None = None,
    distributed: bool = False,
    shard_basis: bool = False,
    **lanczos_options: Any,
) -> xr.Dataset:
    """The spectral density at each checkpoint, on one common grid and with one kernel width per layer.

    Parameters
    ----------
    *given : Run, Source, path, Module, state dict, or mapping or sequence of these
        Runs; networks in memory; weights with their ``model``. Names in a mapping become labels.
    model : str, Module or callable, optional
        The architecture of weights given without one; for a run, in place of what its manifest names.
    data, loss : optional
        Data (a loader, tensors, a mapping of splits, a name) and loss; cross-entropy by default. Runs know theirs.
    checkpoints : sequence of str, optional
        See :meth:`pnanalysis.io.runs.Run.select`; by default plain and champion of runs, and all other networks.
    operator : {"hessian", "ggn", "fisher"}
        Hessian of the mean loss, generalised Gauss-Newton, or empirical Fisher.
    engine : {"native", "pyhessian", "curvlinops"}
        The library that computes the products; Lanczos is ours in any case.
    n_hvp : int, optional
        The most products to spend on each matrix, 900 by default.
    n_lanczos, n_probes : int, optional
        Lanczos steps per probe and number of probes, in place of ``n_hvp``; see :func:`pnanalysis.spectral_density`.
        With ``per_layer``, at most as many steps as the layer has parameters.
    until : mapping of str to float, optional
        Relative errors at which to stop, such as ``{"trace": 0.02}``.
    deflate, kernel_width
        See :func:`pnanalysis.spectral_density`.
    split : {"train", "validation", "test"}
    n : int or None
        Examples, drawn by ``seed`` (fewer if there are fewer); the same ones at every checkpoint.
    batch_size : int
        Examples per pass of a product; no influence on the result beyond round-off.
    params : str or sequence of str, optional
        Layer names or patterns to restrict the operator to.
    per_layer : bool
        The diagonal block of each layer instead of the whole matrix. The rows of ``checkpoint`` are then called
        ``CHECKPOINT:LAYER``, and a coordinate ``layer`` names the layer.
    bn_mode : {"eval", "train"}
        Batch normalisation with running or with batch statistics.
    dtype : {"float32", "float64"}
    amp : {"no", "tf32", "bf16"}
        See :class:`pnanalysis.HessianOperator`.
    weight : None, "examples", "batches" or callable, optional
        What a batch weighs in the mean, where the loss is one of your own that leaves it open: see
        :class:`pnanalysis.HessianOperator`.
    draws : int, optional
        For networks that draw random numbers in eval mode, which are refused by default: the mean over this many
        draws. The error of the trace then includes their scatter; those of other numbers do not.
    method : {"exact", "finite_difference"}
        Differences of gradients in place of exact products, for networks that torch cannot differentiate twice: see
        :mod:`pnanalysis.curvature.finite_differences`. Their largest error, relative to the norm, is the dataset's
        attribute ``round_off``, which intervals include.
    checkpoint_activations : bool
        Compute the activations of the network's blocks again instead of keeping them: less memory, more time.
    compile : bool
        Compile the products by ``torch.compile``.
    data_error : {"examples", "groups", "none"}
        Whether errors include that of the choice of examples: for the trace, the Frobenius norm and the extreme
        eigenvalues (``"examples"``, for which a tenth more time is typical), or for all numbers, the density and the
        distance of spectra (``"groups"``, eight times the products). See :func:`pnanalysis.spectral_density`.
    device : str or None
    seed : int
        Of probes and examples.
    state : path, optional
        Folder for unfinished work, from which an interrupted call with the same arguments resumes. It holds a file
        for each finished spectrum and a subfolder for the one in progress, and can be removed once the call returns.
    distributed : bool
        Divide the examples among the processes of the default ``torch.distributed`` group, all of which make this call;
        the first one decides and writes the unfinished work. See :mod:`pnanalysis.curvature.distributed`.
    shard_basis : bool
        Divide the entries of every vector of the basis among these processes, too: each keeps its part in memory, and
        writes its part of the unfinished work. Without ``distributed``, it has no effect.
    **lanczos_options
        Passed to :func:`pnanalysis.spectral_density`.

    Returns
    -------
    xarray.Dataset
        Kind ``hessian``: everything :func:`pnanalysis.spectral_density` gives, with dim ``checkpoint`` in front, padded
        with NaN; and a coordinate ``matrix_digest`` (checkpoint), equal for the same weights, data and settings. The
        attributes ``hvp_method`` and ``hvp_difference`` say how products were computed, and how far at most they were
        from a second way of computing them, relative to their size. ``data_error`` says which error for the choice of
        examples is included, and ``all_examples`` (0 or 1) whether these are all that the split has: the error is then
        one of other data of the same kind.

    Raises
    ------
    PnError
        If a checkpoint, the data or a setting is invalid.

    References
    ----------
    B. Ghorbani, S. Krishnan, Y. Xiao, "An Investigation into Neural Net Optimization via Hessian Eigenvalue Density",
    arXiv:1901.10159. Y. Min, "Persistent Neurons", arXiv:2007.01419, fig. 12.

    Examples
    --------
    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
    >>> data = torch.randn(20, 4), torch.randint(2, (20,))
    >>> ds = hessian(net, data=data, loss=torch.nn.functional.cross_entropy, n_hvp=12, progress=False)
    >>> ds.checkpoint.item()
    'network'
    """
    at_least(1, n=n, batch_size=batch_size)
    options = SpectrumOptions(
        operator, engine, n_lanczos, n_probes, n_hvp, until, deflate, kernel_width, params, per_layer, bn_mode, dtype,
        amp, seed, weight, draws, method, lanczos_options, data_error, distributed, shard_basis,
        checkpoint_activations, compile,
    )  # fmt: skip
    torch_device = resolve_device(device)
    selection = select(given, checkpoints, model=model, data=data, loss=loss)
    selection.check_weights()
    settings = {**asdict(options), "weight": options.weight_name, "split": split, "n": n, "batch_size": batch_size}
    # the unfinished work of several processes is that of one, too, and that of compiled products that of others
    settings |= dict.fromkeys(("distributed", "shard_basis", "checkpoint_activations", "compile"))
    with first_process_first() if distributed else nullcontext():
        writes = not distributed or is_first_process()
        cache = None if state is None else SpectrumCache.claim(state, settings | names_of(selection), writes)
    found: dict[tuple[str, object], dict[str, tuple[xr.Dataset, str]]] = {}
    try:
        for item, network, own_loss, batches, part in selection.measurable(split, n, batch_size, seed, torch_device):
            digest = matrix_digest(item.source, options.matrix_settings(batch_size), part, network)
            spectra = network_spectra(
                network, own_loss, batches, options, label=item.label, device=torch_device, progress=progress,
                cache=None if cache is None else cache.of(network, batches),
            )  # fmt: skip
            found[item.key] = {layer: (ds, digest) for layer, ds in spectra.items()}
    finally:
        if cache is not None:
            cache.release()
    rows = [
        Row(f"{item.label}:{layer}" if layer else item.label, layer, item, ds, digest)
        for item in selection
        for layer, (ds, digest) in found[item.key].items()
    ]
    n_used = n_examples(part, batches)
    return schema.finish(
        stack_spectra(rows, per_layer), "hessian", **selection.sources[0].dataset_attrs(), operator=operator,
        engine=engine, split=split, n=n_used, batch_size=batch_size, bn_mode=bn_mode, params=params,
        seed=seed, device=str(torch_device), dtype=dtype, amp=amp, weight=options.weight_name or None, draws=draws,
        all_examples=has_all(item.source, split, n, n_used), data_error=data_error_of(row.spectrum for row in rows),
        **products_of(row.spectrum for row in rows),
    )  # fmt: skip


def network_spectra(
    network: nn.Module,
    loss: Loss,
    batches: Iterable[Batch],
    options: SpectrumOptions,
    *,
    label: str = "network",
    device: torch.device | str = "cpu",
    progress: bool = True,
    cache: SpectrumCache | None = None,
) -> dict[str, xr.Dataset]:
    """Spectra of one network over batches in memory.

    Parameters
    ----------
    network : Module
    loss : callable
        ``loss(outputs, targets)``, averaged over the batch.
    batches : re-iterable of (inputs, targets)
    options : SpectrumOptions
    label : str
        What the network is called in messages and progress.
    device : torch.device or str
    progress : bool
    cache : SpectrumCache, optional
        Keeps what is finished, and what is in progress.

    Returns
    -------
    dict of str to xarray.Dataset
        Kind ``spectral_density`` by layer, or under ``""`` for the whole network.
    """
    spectra = {}
    with clear_errors(label, network, batches, loss):
        own = batches
        if options.distributed:  # statistics and weights of whole batches are not those of their parts
            own = OwnExamples(batches, whole=options.bn_mode == "train" or options.weight == "batches")
        whole = make_operator(
            options.engine, options.operator, network, loss, own,
            params=options.params, bn_mode=options.bn_mode, dtype=resolve_dtype(options.dtype), device=device,
            amp=options.amp, expected_products=options.n_products, weight=options.weight, draws=options.draws,
            method=options.method, checkpoint_activations=options.checkpoint_activations, compile=options.compile,
            **({"is_part": True} if options.distributed else {}),
        )  # fmt: skip
        if options.distributed and isinstance(whole, CurvatureOperator):
            whole = shared_operator(whole, options.shard_basis)
        for layer, op in _blocks(whole, options.per_layer):
            compute = partial(
                _spectrum, op, options.steps(op.shape[0]), options.n_probes, n_hvp=options.n_hvp, until=options.until,
                deflate=options.deflate, kernel_width=options.kernel_width, seed=options.seed, progress=progress,
                data_error=options.data_error, title=f"{label}:{layer}" if layer else label, **options.lanczos_options,
            )  # fmt: skip
            spectra[layer] = compute() if cache is None else cache.finished(layer, op, compute)
    return spectra


def _spectrum(op: LinearOperator, *arguments: Any, **options: Any) -> xr.Dataset:
    """The spectral density, with how its products were computed."""
    n_classes = getattr(op, "n_classes", None)
    # fewer examples than classes do not have that many eigenvalues
    if n_classes is not None and n_classes <= getattr(op, "n_examples", n_classes):
        options.setdefault("n_classes", n_classes)
    ds = spectral_density(op, *arguments, **options)
    if isinstance(op, DistributedOperator):
        ds = ds.assign_attrs(n_processes=op.n_processes)
        op = op.operator
    if not isinstance(op, CurvatureOperator):
        return ds
    if op.by_differences:
        op.differences.check()
    if op.draws is not None and op.draws > 1:
        ds = _with_scatter(ds, float(op.trace_of_draws().std()) / op.draws**0.5, op.draws)
    return ds.assign_attrs(hvp_method=op.method, hvp_difference=op.product_check.difference)


def _with_scatter(ds: xr.Dataset, se: float, draws: int) -> xr.Dataset:
    """With the error of the trace for the draws of a network, in standard errors and both intervals."""
    from scipy.stats import t as student_t  # here, so that command lines start without SciPy

    half = float(student_t.ppf(0.975, draws - 1)) * se
    wider = {name: (ds[name] ** 2 + se**2) ** 0.5 for name in {"trace_se", "trace_probe_se"} & set(ds)}
    for name in {"trace_low", "trace_high", "trace_bound_low", "trace_bound_high"} & set(ds):
        side = ((ds[name] - ds.trace) ** 2 + half**2) ** 0.5
        wider[name] = ds.trace + (side if name.endswith("high") else -side)
    return ds.assign({name: array.assign_attrs(ds[name].attrs) for name, array in wider.items()})


def has_all(source: Source, split: str, n: int | None, n_used: int) -> bool:
    """Whether ``n_used`` examples, when ``n`` were asked for, are all of a split."""
    whole = source.data.get(split)
    return n is None or n_used < n or (isinstance(whole, Split) and len(whole) == n_used)


def data_error_of(spectra: Iterable[xr.Dataset]) -> str:
    """The error for the choice of examples that all of these spectra include."""
    return min((str(ds.attrs.get("data_error", "none")) for ds in spectra), key=DATA_ERRORS.index)


def products_of(spectra: Iterable[xr.Dataset]) -> dict[str, Any]:
    """How the products of all these spectra were computed, how many, and how far they were from exact, at most."""
    attrs = [ds.attrs for ds in spectra]
    largest = {
        name: float(np.fmax.reduce([one[name] for one in attrs if name in one]))
        for name in ("hvp_difference", "asymmetry", "round_off", "basis_round_off")
        if any(name in one for one in attrs)
    }
    methods = ", ".join(dict.fromkeys(one["hvp_method"] for one in attrs if "hvp_method" in one))
    found: dict[str, Any] = {"n_hvp": max(one["n_hvp"] for one in attrs), **largest}
    if any("until" in one for one in attrs):
        found["until_reached"] = all(one.get("until_reached") for one in attrs)
    return found | ({"hvp_method": methods} if methods else {})


def stack_spectra(rows: Sequence[Row], per_layer: bool = False) -> xr.Dataset:
    """Spectra along ``checkpoint``, on one grid; spectra of the same layer are smoothed with the same kernel width."""
    alike: dict[str, list[xr.Dataset]] = {}
    for row in rows:
        alike.setdefault(row.layer, []).append(row.spectrum)
    grid = _common_grid([default_grid(*spectra) for spectra in alike.values()])
    widths = {layer: max(float(ds.kernel_width) for ds in spectra) for layer, spectra in alike.items()}
    smoothed = padded([smooth(row.spectrum, grid, widths[row.layer]) for row in rows])
    stacked = xr.concat(smoothed, dim="checkpoint", join="outer", combine_attrs="drop_conflicts")
    stacked = stacked.assign_coords(
        checkpoint=[row.label for row in rows],
        iteration=("checkpoint", [row.item.checkpoint.iteration for row in rows]),
        epoch=("checkpoint", [row.item.checkpoint.epoch for row in rows]),
        matrix_digest=("checkpoint", [row.digest for row in rows]),
    )
    return stacked.assign_coords(layer=("checkpoint", [row.layer for row in rows])) if per_layer else stacked


def names_of(selection: Selection) -> dict[str, Any]:
    """What the analysis is of, by names that are the same in another process."""
    sources = [{k: v for k, v in source.attrs.items() if not str(v).startswith("own ")} for source in selection.sources]
    data = [[source.data.fingerprint, source.data.split_hash] for source in selection.sources]
    return {"of": sources, "data": data, "checkpoints": selection.labels}


def _common_grid(grids: Sequence[np.ndarray]) -> np.ndarray:
    """One ascending grid, at each point as fine as the finest of the grids that reach it."""
    finest_first, points = sorted(grids, key=np.ptp), []
    for i, grid in enumerate(finest_first):
        covered = [(grid >= finer[0]) & (grid <= finer[-1]) for finer in finest_first[:i]]
        points.append(grid[~np.any(covered, axis=0)] if covered else grid)
    return np.sort(np.concatenate(points))


def _blocks(whole: LinearOperator, per_layer: bool) -> Iterator[tuple[str, LinearOperator]]:
    """The operator itself, under no name, or its diagonal blocks by layer."""
    if not per_layer:
        yield "", whole
    elif isinstance(whole, CurvatureOperator | DistributedOperator):
        yield from whole.per_layer()
    else:
        raise CurvatureError("only the native engine computes one layer at a time; leave engine out, or per_layer")
