"""Blocks of one matrix as a dataset: traces, norms and energies, the diagonal, spectra, and effects of rounding."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from torch import nn

from pnanalysis.analyses.quantised_blocks import columns, rounding_effects
from pnanalysis.arrays import Array
from pnanalysis.checks import at_least, check_seed, one_of, positive, resolve_dtype
from pnanalysis.curvature.base import METHODS, CurvatureOperator
from pnanalysis.curvature.batch_weights import Weight
from pnanalysis.curvature.example_groups import GroupedCurvature, alone, in_groups
from pnanalysis.curvature.named_blocks import Blocks
from pnanalysis.curvature.quantisation import FEWEST_BITS, MOST_BITS, Quantisation, Scheme, quantisation, rounding
from pnanalysis.errors import CurvatureError, Indivisible
from pnanalysis.inputs.copies import unwrapped
from pnanalysis.spectra.block_moments import BlockMoments, exact_moments, moments_of, trace_of
from pnanalysis.spectra.block_products import FEWEST_PROBES, BlockForms, Partition, Plan, block_forms
from pnanalysis.spectra.block_spectra import DiagonalBlock, spectrum_distances
from pnanalysis.spectra.density import spectral_density
from pnanalysis.spectra.finished import saved_or_computed
from pnanalysis.spectra.linear_operator import LinearOperator
from pnanalysis.spectra.two_errors import Moment

DATA_ERRORS = ("examples", "none")
#: Quantities whose error can be a target.
TARGETS = ("trace",)


@dataclass(frozen=True)
class BlockOptions:
    """Which blocks of which matrix, and what is to be known of them: see :func:`pnanalysis.blocks`."""

    blocks: Blocks = "layers"
    n_hvp: int = 200
    until: Mapping[str, float] | None = None
    operator: str = "hessian"
    params: Any = None
    bn_mode: str = "eval"
    dtype: str = "float32"
    amp: str = "no"
    weight: Weight = None
    draws: int | None = None
    method: str = "exact"
    diagonal: bool = False
    spectra: bool = False
    n_spectrum: int = 60
    bits: tuple[int, ...] = ()
    data_error: str = "examples"
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(2 * FEWEST_PROBES, n_hvp=self.n_hvp)
        at_least(4, n_spectrum=self.n_spectrum)
        at_least(1, draws=self.draws)
        at_least(FEWEST_BITS, bits=min(self.bits, default=None))
        one_of(("hessian", "ggn", "fisher"), operator=self.operator)
        one_of(METHODS, method=self.method)
        one_of(DATA_ERRORS, data_error=self.data_error)
        check_seed(seed=self.seed)
        resolve_dtype(self.dtype)
        if max(self.bits, default=FEWEST_BITS) > MOST_BITS:
            raise CurvatureError(f"bits is {max(self.bits)}; weights are rounded to {FEWEST_BITS} to {MOST_BITS} bits")
        if len(set(self.bits)) < len(self.bits):
            raise CurvatureError(f"bits is {self.bits}; name each number once")
        if self.until is not None:
            if not isinstance(self.until, Mapping) or set(self.until) != set(TARGETS):
                raise CurvatureError(f"until is {self.until!r}; give the error of the trace, {{'trace': 0.02}}")
            positive(until=self.until["trace"])


def matrix_blocks(
    operator: LinearOperator, names: Mapping[str, Any], options: BlockOptions, *,
    quantised: Sequence[Quantisation] = (), state: Path | None = None,
    advance: Callable[[float], None] = lambda steps: None,
) -> xr.Dataset:  # fmt: skip
    """Blocks of one operator.

    Parameters
    ----------
    operator : LinearOperator
    names : mapping
        Of a :class:`~pnanalysis.curvature.base.CurvatureOperator`, the :attr:`names` of what belongs to each block; of
        other operators the size of each block, in the order in which they follow each other.
    options : BlockOptions
    quantised : sequence of Quantisation
        What is tried on the weights: see :func:`quantisations`.
    state : Path, optional
        A folder for unfinished work.
    advance : callable, optional
        Called with the products of each step.

    Raises
    ------
    CurvatureError
    """
    grouped: LinearOperator = operator
    notes: dict[str, Any] = {}
    if isinstance(operator, CurvatureOperator):
        grouped = _grouped(operator, options, notes)
        partition, cells, owner, rounded = _cells(grouped.op, names, quantised)
    else:
        if sum(names.values()) != operator.shape[0]:
            raise CurvatureError(f"the blocks have {sum(names.values())} entries, and the matrix {operator.shape[0]}")
        partition = Partition(tuple(names), tuple(range(len(names))), tuple(names.values()))
        cells, owner, rounded = partition, np.arange(len(names)), np.zeros((0, len(names)), dtype=bool)
    found, of_rounded = _moments(grouped, partition, cells, owner, rounded, options, state, advance)
    ds = _dataset(found, options)
    if found.diagonal is not None:
        sums = found.diagonal
        ds["diagonal"] = ("statistic", "parameter"), np.stack([sums.value, sums.probe_se, sums.data_se])
        ds = ds.assign_coords(statistic=["value", "probe_se", "data_se"])
    if isinstance(operator, CurvatureOperator) and isinstance(grouped, GroupedCurvature):
        if quantised:
            rows = []
            for one, trace, covered in zip(quantised, of_rounded, rounded, strict=True):
                size = np.bincount(owner, cells.sizes * covered, len(partition.names)).astype(np.int64)
                rows.append(rounding_effects(grouped, partition, trace, size, one, options.seed))
            ds = ds.merge(xr.concat(rows, "bits").assign_coords(bits=[one.bits for one in quantised]))
            ds = ds.assign_coords(place=np.arange(1, len(partition.names) + 1))
        if options.spectra:
            spectra = _spectra(operator, partition, options, state, notes, advance)
            notes |= spectra.attrs
            ds = ds.merge(spectra.drop_attrs())
        notes |= {"hvp_method": grouped.op.method}
        ds = ds.assign_coords(tensors=json.dumps(grouped.op.tensors))
    return ds.assign_coords(block=list(partition.names), other=list(partition.names)).assign_attrs(notes)


def _grouped(operator: CurvatureOperator, options: BlockOptions, notes: dict[str, Any]) -> GroupedCurvature:
    """The operator with its examples in groups, and whether errors include their choice."""
    if options.data_error == "none":
        notes["data_error"] = "none"
        return alone(operator, options.n_hvp)
    grouped = in_groups(operator, options.n_hvp, seed=options.seed)
    notes["data_error"] = "none" if grouped.reason else "examples"
    if grouped.reason:
        notes["data_error_note"] = grouped.reason
        warnings.warn(f"no error for the choice of examples: {grouped.reason}", stacklevel=2)
    return grouped


def quantisations(network: nn.Module, bits: Sequence[int], given: Scheme | None = None) -> list[Quantisation]:
    """What is tried on the weights of a network: rounding to so many bits, and a scheme of one's own.

    Raises
    ------
    CurvatureError
        If the scheme gives no finite numbers of the same shape.
    """
    parameters = dict(unwrapped(network).named_parameters())
    own = [] if given is None else [quantisation(parameters, given)]
    return [rounding(parameters, width) for width in bits] + own


def _cells(
    op: CurvatureOperator, names: Mapping[str, list[str]], quantised: Sequence[Quantisation]
) -> tuple[Partition, Partition, NDArray[np.int64], NDArray[np.bool_]]:  # fmt: skip
    """The blocks; these divided by what is quantised alike; the block of each part; ``(scheme, part)``, what is."""
    labels = list(names)
    block_of = {name: i for i, label in enumerate(labels) for name in names[label]}
    missing = [name for name in op.names if name not in block_of]
    if missing:
        raise CurvatureError(f"{missing[0]!r} is in no block")
    owners, keys = [block_of[name] for name, _, _ in op.tensors], []
    for (name, _, _), owner in zip(op.tensors, owners, strict=True):
        keys.append((owner, tuple(op.parameter_of(name) in one.covered for one in quantised)))
    lengths = tuple(length for _, _, length in op.tensors)
    distinct = sorted(set(keys))
    cells = Partition(tuple(f"{labels[i]} {part}" for i, part in distinct), tuple(map(distinct.index, keys)), lengths)
    return (
        Partition(tuple(labels), tuple(owners), lengths), cells,
        np.array([i for i, _ in distinct]),
        np.array([part for _, part in distinct], dtype=bool).reshape(len(distinct), len(quantised)).T,
    )  # fmt: skip


def _moments(
    operator: LinearOperator, partition: Partition, cells: Partition, owner: NDArray[np.int64],
    rounded: NDArray[np.bool_], options: BlockOptions, state: Path | None, advance: Callable[[float], None],
) -> tuple[BlockMoments, list[Moment]]:  # fmt: skip
    """Numbers of all blocks, and for each scheme traces over what it quantises, of the data's part of the matrix."""
    every, *counted = (_members(owner, part, len(partition.names)) for part in (np.ones(len(owner)), *rounded))
    if operator.shape[0] <= options.n_hvp:
        found = exact_moments(operator, partition, options.diagonal, advance)
        if not counted:
            return found, []
        of_cells = exact_moments(operator, cells).trace
        of_data = replace(of_cells, value=of_cells.share @ of_cells.form)
        return found, [of_data.merged(some) for some in counted]

    def is_reached(forms: BlockForms) -> bool:
        trace = trace_of(forms.merged(partition, every))  # of what is reported, not of parts
        return bool(trace.probe_se.max() <= (options.until or {})["trace"] * abs(trace.value.sum()))

    plan = Plan(
        options.n_hvp, options.seed, options.diagonal, state=state, is_reached=is_reached if options.until else None
    )
    forms = block_forms(operator, cells, plan, advance)
    traces = [trace_of(forms.without_rest().merged(partition, some)) for some in counted]
    return moments_of(forms.merged(partition, every)), traces


def _members(owner: NDArray[np.int64], counted: NDArray[Any], n_blocks: int) -> Array:
    """Which parts each block is the sum of, ``(block, part)``."""
    member = np.zeros((n_blocks, len(owner)))
    member[owner, np.arange(len(owner))] = counted
    return member


def _dataset(found: BlockMoments, options: BlockOptions) -> xr.Dataset:
    ds = xr.Dataset({"n_parameters": ("block", found.partition.sizes), "n_hvp": found.n_hvp})
    norm = found.own_energy.root()
    for name, dims, moment in (
        ("trace", ("block",), found.trace), ("frobenius_norm", ("block",), norm),
        ("off_diagonal_energy", ("block",), found.coupling),
        ("off_diagonal_share", ("block",), found.coupling_share), ("energy", ("block", "other"), found.energy),
        ("network_trace", (), found.network_trace), ("network_off_diagonal_share", (), found.network_share),
        ("trace_concentration", (), found.concentration),
    ):  # fmt: skip
        for key, values in columns(name, moment).items():
            ds[key] = dims, values
    ds["group_share"] = "group", found.trace.share
    for name, moment in (("trace", found.trace), ("frobenius_norm", norm)):
        deviation = moment.deviation
        ds[f"{name}_form"] = ("group", "block"), moment.form
        ds[f"{name}_deviation"] = ("probe", "block"), np.zeros((1, len(ds.trace))) if deviation is None else deviation
    attrs: dict[str, Any] = {
        "n_probes": found.n_probes,
        "n_known": found.n_known,
        "estimator": "exact" if found.exact else "signs",
    }
    if options.until:
        whole = options.until["trace"] * abs(float(found.network_trace.value))
        attrs |= {"until": options.until, "until_reached": bool(found.trace.probe_se.max() <= whole)}
    return ds.assign_attrs(attrs)


def _spectra(
    op: CurvatureOperator, partition: Partition, options: BlockOptions, state: Path | None, notes: dict[str, Any],
    advance: Callable[[float], None],
) -> xr.Dataset:  # fmt: skip
    """Spectra of all blocks over two halves of the examples, and how far they differ.

    The operator is that of the batches as given, which are larger than those of groups of examples. Both halves, and
    all blocks, share one traced program, and all blocks the passes over each batch.
    """
    halves = []
    for half in (0, 1):
        try:
            part = op.subset([half], 2, seed=options.seed, expected_products=options.n_spectrum * len(partition.names))
        except Indivisible as error:
            notes["spectra_note"] = str(error)
            warnings.warn(f"no spectra of blocks: {error}", stacklevel=2)
            return xr.Dataset()
        spectra = []
        for block in range(len(partition.names)):
            own = DiagonalBlock(part, [span for owner, span in partition.spans if owner == block])

            def compute(state: Path | None = None, own: DiagonalBlock = own, seed: int = half) -> xr.Dataset:
                return spectral_density(
                    own, n_hvp=options.n_spectrum, seed=2 * options.seed + seed, data_error="none", progress=False,
                    state=state,
                )  # fmt: skip

            file = None if state is None else state / f"spectrum-{half}-{block}.nc"
            ds = compute() if file is None else saved_or_computed(file, own, compute)
            spectra.append(ds)
            advance(ds.attrs["n_hvp"] / 2)
        halves.append(spectra)
    return spectrum_distances(halves)


__all__ = ["DATA_ERRORS", "BlockOptions", "matrix_blocks", "quantisations"]
