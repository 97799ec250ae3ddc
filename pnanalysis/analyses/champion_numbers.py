"""The numbers that a champion is judged by: its own, beside those of the plain model and of every restart."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import xarray as xr

from pnanalysis.analyses.diagnostics import Diagnostic, diagnostics, estimate_of, layers_without_output
from pnanalysis.analyses.matrix_names import matrix_name
from pnanalysis.analyses.significant_differences import with_p_values
from pnanalysis.estimates import Estimate
from pnanalysis.kinds import ERROR_ENDS

#: Numbers of single networks in the order of tables, after the errors; those that are scales.
_OWN = (
    "lambda_max", "trace", "n_outliers", "eigenvalue", "gradient_top", "block_trace", "network_off_diagonal_share",
    "trace_concentration", "last_lambda_max", "last_threshold_ratio", "worst_rise", "mean_rise", "relative_flatness",
    "learning_coefficient", "saturation", "norm", "distance_from_start",
)  # fmt: skip
_SCALES = {
    "loss", "lambda_max", "trace", "last_lambda_max", "last_threshold_ratio", "eigenvalue", "block_trace", "worst_rise",
    "mean_rise", "relative_flatness", "gradient_norm",
}  # fmt: skip
_UNITS = {"loss": "nat", "lambda_max": "loss", "trace": "loss", "worst_rise": "nat", "mean_rise": "nat",
          "relative_flatness": "nat", "eigenvalue": "loss", "block_trace": "loss",
          "last_lambda_max": "loss", "lambda_min": "loss", "gradient_norm": "loss", "barrier": "nat",
          "aligned_barrier": "nat"}  # fmt: skip


#: Those that have a split, a rank or a block in front of their names.
_OF_PLACES = ("loss", "eigenvalue", "block_trace", "worst_rise", "mean_rise")


@dataclass(frozen=True)
class Number:
    """A number of every network.

    Attributes
    ----------
    name, title : str
        In the dataset, and as displayed.
    values : list of Estimate
        Of the plain model, the champion and the restarts. Where the number is that of a pair, with the plain model, the
        plain model's own is NaN.
    difference : Estimate
        Champion minus plain, tested where it has an error.
    of_pair, percent, whole, is_log : bool
        Is one of a pair; is printed in per cent, or as a count; is a scale.
    resolution : float
        Smallest difference that two values can have; 0 if any.
    """

    name: str
    title: str
    values: list[Estimate]
    difference: Estimate = field(default_factory=lambda: Estimate(math.nan))
    of_pair: bool = False
    percent: bool = False
    whole: bool = False
    is_log: bool = False
    resolution: float = 0.0

    @property
    def units(self) -> str:
        stem = next((one for one in _OF_PLACES if self.name.endswith(f"_{one}")), self.name)
        return _UNITS.get(stem, "1")

    def array(self, part: str) -> list[float]:
        """``value``, ``se``, ``low`` or ``high`` of every network."""
        return [float(getattr(one, part)) for one in self.values]


def numbers_of(compared: xr.Dataset, lines: xr.Dataset, gradient: xr.Dataset | None) -> list[Number]:
    """All numbers that are known.

    Parameters
    ----------
    compared : xarray.Dataset
        What :func:`pnanalysis.analyses.comparison.compare_selected` gives of all networks, the plain model first.
    lines : xarray.Dataset
        Kind ``barrier``, dims ``checkpoint`` (all after the plain model) and ``path``.
    gradient : xarray.Dataset or None
        ``gradient_norm`` of every network.
    """
    every = [*_of_pairs(compared, lines), *_of_each(compared, gradient)]
    return [one for one in every if any(math.isfinite(value.value) for value in one.values)]


def _of_pairs(compared: xr.Dataset, lines: xr.Dataset) -> Iterator[Number]:
    """How far each network is from the plain model."""
    yield _paired("distance", "distance of weights", _from_plain(compared, "distance"))
    for path, prefix, words in (("line", "", ""), ("aligned", "aligned_", ", aligned")):
        if path not in lines.path.values:
            continue
        at = lines.sel(path=path)
        each = [at.isel(checkpoint=i) for i in range(at.sizes["checkpoint"])]
        if path == "aligned":
            yield _paired(
                "aligned_distance", "distance of weights, aligned", [Estimate(float(it.distance)) for it in each]
            )
        yield _paired(
            f"{prefix}barrier", f"barrier of the training loss{words}", [estimate_of(it, "barrier") for it in each]
        )
    n = float(compared.n_examples.sel(split=compared.attrs["function_split"]))
    if "disagreement" in compared:
        values = _from_plain(compared, "disagreement")
        yield _paired("disagreement", "disagreement", values, percent=True, resolution=1 / n)
    elif "rms_difference" in compared:
        yield _paired("rms_difference", "rms difference of outputs", _from_plain(compared, "rms_difference"))
    if "overlap" in compared:
        yield _paired("overlap", "overlap of top eigenvectors", _from_plain(compared, "overlap"))
    if "cka" in compared:
        known = layers_without_output(compared.isel(layer=compared.cka.notnull().any(("checkpoint", "other")).values))
        mean = known.cka.mean("layer")
        # an upper bound: as if the errors of all layers went the same way
        averaged = xr.Dataset({"cka": mean, "cka_se": known.cka_se.mean("layer")})
        yield _paired("cka", "CKA, mean of layers", _from_plain(averaged, "cka"))


def _paired(name: str, title: str, values: list[Estimate], percent: bool = False, resolution: float = 0.0) -> Number:
    return Number(
        name, title, [Estimate(math.nan), *values], of_pair=True, percent=percent, resolution=resolution
    )  # fmt: skip


def _from_plain(ds: xr.Dataset, name: str) -> list[Estimate]:
    own = ds[[f"{name}{end}" for end in ("", "_se", "_low", "_high") if f"{name}{end}" in ds]]
    return [estimate_of(own.isel(checkpoint=i, other=0), name) for i in range(1, ds.sizes["checkpoint"])]


def _of_each(compared: xr.Dataset, gradient: xr.Dataset | None) -> Iterator[Number]:
    """Numbers of each network by itself."""
    split = str(compared.attrs["function_split"])
    rows = {row.key: row for row in diagnostics(compared)}
    pair = with_p_values(compared.isel(checkpoint=[0, 1], other=[0, 1]))
    tested = {row.key: row for row in diagnostics(pair)}
    errors = [f"error:{split}", f"loss:{split}", *(["loss:train"] if split != "train" else [])]
    n = float(compared.n_examples.sel(split=split))
    # the first of the eigenvalues is that of the spectrum
    repeated = {"eigenvalue:1"} if "lambda_max" in rows else set()
    own = [key for name in _OWN for key in rows if key.partition(":")[0] == name and key not in repeated]
    for key in (*errors, *own):
        if key in rows and rows[key].values:
            yield _own(rows[key], tested.get(key), n)
        if key == "trace" and "lambda_min" in compared:
            smallest = compared[[f"lambda_min{end}" for end in ERROR_ENDS if f"lambda_min{end}" in compared]]
            values = [
                estimate_of(smallest.isel(checkpoint=i), "lambda_min") for i in range(smallest.sizes["checkpoint"])
            ]
            yield Number("lambda_min", f"{matrix_name(compared.attrs, 'hessian')} lambda_min", values)
    if gradient is not None:
        values = [Estimate(float(value)) for value in gradient.gradient_norm]
        yield Number("gradient_norm", "norm of the gradient", values, is_log=True)


def _own(row: Diagnostic, tested: Diagnostic | None, n: float) -> Number:
    variable, _, split = row.key.partition(":")
    name = f"{split}_{variable}" if split else variable
    resolution = 1 / n if row.percent and variable == "error" else float(row.whole)
    difference = tested.against_first[0] if tested is not None and tested.against_first else Estimate(math.nan)
    values = [Estimate(v.value, v.se, v.low, v.high, data_se=v.data_se) for v in row.values]
    return Number(
        name, row.title.strip(), values, difference, percent=row.percent, whole=row.whole,
        is_log=variable in _SCALES, resolution=resolution,
    )  # fmt: skip


def as_variables(numbers: list[Number]) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """Values and errors along ``diagnostic`` and ``checkpoint``; the champion's difference along ``diagnostic``."""
    both, one = ("diagnostic", "checkpoint"), ("diagnostic",)
    parts = {"value": "value", "value_se": "se", "value_low": "low", "value_high": "high", "value_data_se": "data_se"}
    variables: dict[str, tuple[tuple[str, ...], np.ndarray]] = {
        name: (both, np.array([number.array(part) for number in numbers])) for name, part in parts.items()
    }
    parts = {"difference": "value", "difference_se": "se", "difference_low": "low", "difference_high": "high",
             "difference_data_se": "data_se", "difference_p": "p"}  # fmt: skip
    for name, part in parts.items():
        variables[name] = (one, np.array([float(getattr(number.difference, part)) for number in numbers]))
    return variables
