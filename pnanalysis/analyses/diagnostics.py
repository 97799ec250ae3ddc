"""A comparison as rows of a table: every diagnostic of each checkpoint, and its difference from the first."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import xarray as xr

from pnanalysis.analyses.matrix_names import matrix_name
from pnanalysis.analyses.significant_differences import ROUND_OFF, with_p_values
from pnanalysis.estimates import Estimate, OutlierCount

#: Ends of the names of a number's variables.
_PARTS = ("", "_se", "_low", "_high", "_data_se", "_p")


@dataclass(frozen=True)
class Diagnostic:
    """One row of a comparison.

    Attributes
    ----------
    key : str
        Identifies the row: the variable's name, followed by a colon and the split or layer for one of several.
    title : str
        As displayed.
    values : list of Estimate
        One number per checkpoint; empty for a quantity that only a pair of checkpoints has.
    against_first : list of Estimate
        For each checkpoint after the first: the difference from the first, or the quantity of the pair.
    percent : bool
        Printed in per cent.
    whole : bool
        A count, printed without decimals.
    """

    key: str
    title: str
    values: list[Estimate]
    against_first: list[Estimate]
    percent: bool = False
    whole: bool = False

    @property
    def variable(self) -> str:
        """Name of the variable in the dataset."""
        return self.key.partition(":")[0]

    def cells(self) -> list[str | Estimate | None]:
        """The row of a table: title, values, then the columns that relate to the first checkpoint."""
        empty: list[Estimate | None] = [None] * (len(self.against_first) + 1)
        values = [replace(value, percent=self.percent, whole=self.whole) for value in self.values] or empty
        is_difference = bool(self.values)
        related = [
            replace(value, percent=self.percent, signed=is_difference, whole=self.whole) for value in self.against_first
        ]
        return [self.title, *values, *related]


def diagnostics(ds: xr.Dataset) -> list[Diagnostic]:
    """The rows of a dataset of kind ``comparison``; quantities that were not measured are left out.

    Which differences are significant is what :func:`pnanalysis.analyses.significant_differences.with_p_values` finds.
    """
    rows = _rows(with_p_values(ds))
    return [row for row in rows if any(math.isfinite(estimate.value) for estimate in (*row.values, *row.against_first))]


def is_of_these_examples(ds: xr.Dataset, name: str) -> bool:
    """Whether the error of a number leaves out the choice of examples, which that of others includes.

    Forms of single examples say nothing about the negative part of a spectrum, for example.
    """
    return "trace_data_se" in ds and f"{name}_data_se" not in ds


def _rows(ds: xr.Dataset) -> Iterator[Diagnostic]:
    has_classes = "classes" in ds.attrs
    for split in map(str, ds.split.values):
        at = ds.sel(split=split)
        yield _row_of_each(at, f"loss:{split}", f"{split} loss")
        # the squared loss is itself the squared error: one row is enough
        if has_classes or not np.allclose(at.loss, at.error, rtol=ROUND_OFF, atol=0):
            error = "error" if has_classes else "squared error"
            yield _row_of_each(at, f"error:{split}", f"{split} {error}", percent=has_classes)
    yield _row_of_each(ds, "distance_from_start", "distance from start")
    yield _row_of_each(ds, "norm", "norm of the parameters")
    yield _row_of_pairs(ds, "distance", "distance in parameters")
    yield _row_of_pairs(ds, "relative_distance", "relative distance")
    yield _row_of_pairs(ds, "cosine", "cosine of the parameters")
    yield _row_of_pairs(ds, "disagreement", "disagreement", percent=True)
    yield _row_of_pairs(ds, "expected_disagreement", "  if mistakes were independent", percent=True)
    yield _row_of_pairs(ds, "js_divergence", "Jensen-Shannon divergence")
    yield _row_of_pairs(ds, "rms_difference", "rms difference of outputs")
    if "cka" in ds:
        for layer in map(str, layers_without_output(ds).layer.values):
            yield _row_of_pairs(ds.sel(layer=layer), f"cka:{layer}", f"CKA of {layer}")
    matrix = matrix_name(ds.attrs, "hessian")
    yield _row_of_each(ds, "lambda_max", f"{matrix} lambda_max")
    yield _row_of_each(ds, "trace", f"{matrix} trace")
    yield _row_of_outliers(ds)
    classes = ds.attrs.get("classes", "C")
    yield _row_of_each(ds, "class_ratio", f"  lambda_1 / lambda_{classes}")
    yield _row_of_each(ds, "class_trace", f"  top {classes} in the trace", percent=True)
    yield _row_of_each(ds, "effective_rank", f"{matrix} effective rank")
    for name, title in (("negative_curvature", "negative curvature"), ("negative_mass", "negative eigenvalues")):
        yield _row_of_each(ds, name, title + " (these examples)" * is_of_these_examples(ds, name), percent=True)
    yield _row_of_pairs(ds, "wasserstein1", "W1 distance of spectra")
    yield _row_of_pairs(ds, "wasserstein1_noise", "  expected from noise alone")
    kind = ds.attrs.get("sharpness_neighbourhood", "")
    for name, title in (("worst_rise", "largest rise"), ("mean_rise", "mean rise")):
        if "rise" in ds.dims:
            for i in range(ds.sizes["rise"]):
                at = ds.isel(rise=i)
                where = str((at.rise if name == "worst_rise" else at.mean_radius).item())
                yield _row_of_each(at, f"{name}:{where}", f"{title} ({where})")
            continue
        radius = ds.attrs.get("sharpness_radius" if name == "worst_rise" else "sharpness_average_radius", math.nan)
        yield _row_of_each(ds, name, f"{title} ({kind} {float(radius):.3g})")
    yield _row_of_each(ds, "relative_flatness", "relative flatness")
    yield _row_of_each(ds, "last_lambda_max", "lambda_max, last in training")
    yield _row_of_each(ds, "last_threshold_ratio", "  preconditioned, over threshold")
    yield _row_of_each(ds, "learning_coefficient", "local learning coefficient")
    if "eigenvalue" in ds:
        matrix = matrix_name(ds.attrs, "eigenpairs")
        for pair in ds.pair.values.tolist():
            yield _row_of_each(ds.sel(pair=pair), f"eigenvalue:{pair}", f"{matrix} eigenvalue {pair}")
    yield _row_of_each(ds, "gradient_top", "gradient in top eigenvectors", percent=True)
    yield _row_of_pairs(ds, "overlap", "overlap of top eigenvectors (*: not by chance)")
    yield _row_of_pairs(ds, "overlap_halves", "  over different examples")
    yield _row_of_ceilings(ds)
    yield _row_of_pairs(ds, "overlap_chance", "  expected by chance")
    matrix = matrix_name(ds.attrs, "blocks")
    if "block_trace" in ds:
        for block in map(str, ds.block.values):
            yield _row_of_each(ds.sel(block=block), f"block_trace:{block}", f"{matrix} trace of {block}")
    if "block_norm" in ds:
        for block in map(str, ds.block.values):
            yield _row_of_each(ds.sel(block=block), f"block_norm:{block}", f"Frobenius norm of {block}")
    yield _row_of_each(ds, "network_off_diagonal_share", "curvature between blocks", percent=True)
    yield _row_of_each(ds, "trace_concentration", "concentration of the trace")
    if "saturation" in ds and "bounded" in ds.coords and bool(ds.bounded.any()):
        mean = ds.saturation.isel(activation=ds.bounded.values.astype(bool)).mean("activation")
        averaged = ds.drop_vars("saturation").assign(saturation=mean)
        yield _row_of_each(averaged, "saturation", "saturation (mean of layers)")


def layers_without_output(ds: xr.Dataset) -> xr.Dataset:
    """The dataset without the network's output, its last layer, if another layer has the same CKA values.

    A last linear layer is the output; listing both would repeat its row.
    """
    if ds.sizes["layer"] < 2 or "output" not in str(ds.layer.values[-1]):
        return ds
    *layers, output = (ds.cka.isel(layer=i).values for i in range(ds.sizes["layer"]))
    is_repeated = any(np.allclose(layer, output, rtol=0, atol=ROUND_OFF, equal_nan=True) for layer in layers)
    return ds.isel(layer=slice(-1)) if is_repeated else ds


def _row_of_each(ds: xr.Dataset, key: str, title: str, percent: bool = False, whole: bool = False) -> Diagnostic:
    """A number of each checkpoint, and its differences from the first."""
    name = key.partition(":")[0]
    if name not in ds:
        return Diagnostic(key, title, [], [])
    own = _only(ds, name)
    values = [estimate_of(own.isel(checkpoint=i), name) for i in range(ds.sizes["checkpoint"])]
    if f"{name}_difference" in ds:  # with an error of its own: examples and probes are shared
        differences = _against_first(ds, f"{name}_difference")
    else:
        differences = [Estimate(value.value - values[0].value) for value in values[1:]]
    return Diagnostic(key, title, values, differences, percent, whole)


def _row_of_outliers(ds: xr.Dataset) -> Diagnostic:
    """Outliers with the p-value of the gap; counts have no errors, so their differences are not shown."""
    row = _row_of_each(ds, "n_outliers", f"{matrix_name(ds.attrs, 'hessian')} outliers", whole=True)
    if not row.values or "outlier_p" not in ds:
        return row
    gaps = ds.outlier_p.values
    values: list[Estimate] = [
        OutlierCount(value.value, gap_p=float(p)) for value, p in zip(row.values, gaps, strict=True)
    ]
    return replace(row, values=values, against_first=[Estimate(math.nan)] * (len(values) - 1))


def _row_of_pairs(ds: xr.Dataset, key: str, title: str, percent: bool = False) -> Diagnostic:
    """A quantity that each checkpoint after the first has together with the first."""
    name = key.partition(":")[0]
    return Diagnostic(key, title, [], _against_first(ds, name) if name in ds else [], percent)


def _row_of_ceilings(ds: xr.Dataset) -> Diagnostic:
    """What the spaces of a network have in common with themselves over different examples: the lower of two."""
    key, title, name = "overlap_ceiling", "  of a network with itself", "overlap_halves"
    if name not in ds:
        return Diagnostic(key, title, [], [])
    own = [float(ds[name].isel(checkpoint=i, other=i)) for i in range(ds.sizes["checkpoint"])]
    return Diagnostic(key, title, [], [Estimate(min(own[0], one)) for one in own[1:]])


def _against_first(ds: xr.Dataset, name: str) -> list[Estimate]:
    own = _only(ds, name)
    return [estimate_of(own.isel(checkpoint=i, other=0), name) for i in range(1, ds.sizes["checkpoint"])]


def _only(ds: xr.Dataset, name: str) -> xr.Dataset:
    """What :func:`estimate_of` reads: selecting from all of a comparison takes milliseconds a number."""
    return ds[[f"{name}{end}" for end in _PARTS if f"{name}{end}" in ds]]


def estimate_of(ds: xr.Dataset, name: str) -> Estimate:
    """A scalar variable with its standard errors, interval and p-value, as far as the dataset has them."""
    value, se, low, high, data_se, p = (
        float(ds[f"{name}{end}"]) if f"{name}{end}" in ds else math.nan for end in _PARTS
    )
    return Estimate(value, se, low, high, data_se=data_se, p=p)


def short_names(ds: xr.Dataset) -> list[str]:
    """The checkpoints' names, without their epochs if they are still distinct."""
    names = [str(name) for name in ds.checkpoint.values]
    short = [re.sub(r"(iter\d+)/epoch\d+$", r"\1", name) for name in names]
    return short if len(set(short)) == len(short) else names
