"""A comparison as rows of a table and as sentences that claim no more than its errors allow."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import xarray as xr

from pnanalysis.estimates import Estimate

#: Round-off of single precision, in nats of Jensen-Shannon divergence, or rms difference over rms error.
_ROUND_OFF = 1e-6


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
    """The rows of a dataset of kind ``comparison``; quantities that were not measured are left out."""
    return [
        row for row in _rows(ds) if any(math.isfinite(estimate.value) for estimate in (*row.values, *row.against_first))
    ]


def _rows(ds: xr.Dataset) -> Iterator[Diagnostic]:
    has_classes = "classes" in ds.attrs
    for split in map(str, ds.split.values):
        at = ds.sel(split=split)
        yield _row_of_each(at, f"loss:{split}", f"{split} loss")
        # the squared loss is itself the squared error: one row is enough
        if has_classes or not np.allclose(at.loss, at.error, rtol=_ROUND_OFF, atol=0):
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
    yield _row_of_each(ds, "lambda_max", "Hessian lambda_max")
    yield _row_of_each(ds, "trace", "Hessian trace")
    yield _row_of_each(ds, "n_outliers", "Hessian outliers", whole=True)
    yield _row_of_each(ds, "effective_rank", "Hessian effective rank")
    yield _row_of_each(ds, "negative_mass", "negative eigenvalues", percent=True)
    yield _row_of_pairs(ds, "wasserstein1", "W1 distance of spectra")
    yield _row_of_pairs(ds, "wasserstein1_noise", "  expected from noise alone")
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
    is_repeated = any(np.allclose(layer, output, rtol=0, atol=_ROUND_OFF, equal_nan=True) for layer in layers)
    return ds.isel(layer=slice(-1)) if is_repeated else ds


def _row_of_each(ds: xr.Dataset, key: str, title: str, percent: bool = False, whole: bool = False) -> Diagnostic:
    """A number of each checkpoint, and its differences from the first."""
    name = key.partition(":")[0]
    if name not in ds:
        return Diagnostic(key, title, [], [])
    values = [estimate_of(ds.isel(checkpoint=i, other=0), name) for i in range(ds.sizes["checkpoint"])]
    if f"{name}_difference" in ds:  # with an error of its own: examples and probes are shared
        differences = _against_first(ds, f"{name}_difference")
    else:
        differences = [Estimate(value.value - values[0].value) for value in values[1:]]
    return Diagnostic(key, title, values, differences, percent, whole)


def _row_of_pairs(ds: xr.Dataset, key: str, title: str, percent: bool = False) -> Diagnostic:
    """A quantity that each checkpoint after the first has together with the first."""
    name = key.partition(":")[0]
    return Diagnostic(key, title, [], _against_first(ds, name) if name in ds else [], percent)


def _against_first(ds: xr.Dataset, name: str) -> list[Estimate]:
    return [estimate_of(ds.isel(checkpoint=i, other=0), name) for i in range(1, ds.sizes["checkpoint"])]


def estimate_of(ds: xr.Dataset, name: str) -> Estimate:
    """A scalar variable with its standard error and interval, as far as the dataset has them."""
    value, se, low, high = (
        float(ds[f"{name}{end}"]) if f"{name}{end}" in ds else math.nan for end in ("", "_se", "_low", "_high")
    )
    return Estimate(value, se, low, high)


def verdict(ds: xr.Dataset) -> list[str]:
    """A comparison in sentences that claim no more than its errors allow.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``comparison``.

    Returns
    -------
    list of str
        What stands for a champion, where that is not itself; each checkpoint compared with the first; then, for more
        than two, their ranking by error with its ties.
    """
    sentences = [ds.attrs["note"]] if "note" in ds.attrs else []
    sentences += [sentence for i in range(1, ds.sizes["checkpoint"]) for sentence in _compared_with_first(ds, i)]
    if ds.sizes["checkpoint"] > 2 and bool(ds.error.notnull().all()):
        sentences.append(_ranking(ds))
    return sentences


def short_names(ds: xr.Dataset) -> list[str]:
    """The checkpoints' names, without their epochs if they are still distinct."""
    names = [str(name) for name in ds.checkpoint.values]
    short = [re.sub(r"(iter\d+)/epoch\d+$", r"\1", name) for name in names]
    return short if len(set(short)) == len(short) else names


def _described(ds: xr.Dataset, i: int) -> str:
    """A checkpoint's name, with its description if that adds anything."""
    name, description = short_names(ds)[i], str(ds.description.values[i])
    added = description.removesuffix(", the champion") if name.endswith("champion") else description
    return name if added in ("", name) or name.endswith("plain") else f"{name} ({added})"


def _split_for_errors(ds: xr.Dataset) -> str:
    """The split whose errors are compared: test if available, else validation, else train."""
    return next(split for split in ("test", "validation", "train") if split in ds.split.values)


def _compared_with_first(ds: xr.Dataset, i: int) -> Iterator[str]:
    pair = ds.isel(checkpoint=i, other=0)
    subject = f"{_described(ds, i)} compared with {_described(ds, 0)}"
    if float(pair.distance) == 0:
        yield f"{subject}: identical parameters."
        return
    yield f"{subject}: {_errors(ds, i)}."
    yield _parameters(pair)
    yield _functions(ds, i)
    if "cka" in pair and bool(pair.cka.notnull().any()):
        yield _layers(pair)
    if "trace" in ds:
        yield _curvature(pair, float(ds.attrs["sigmas"]), int(ds.attrs["n_hessian"]))


def _errors(ds: xr.Dataset, i: int) -> str:
    split, sigmas = _split_for_errors(ds), float(ds.attrs["sigmas"])
    at = ds.isel(checkpoint=i, other=0).sel(split=split)
    where = f"on this {split} set"
    error = estimate_of(at, "error_difference")
    if math.isnan(error.value):  # the targets are neither classes nor real numbers
        loss = estimate_of(at, "loss_difference")
        text = f"{split} loss {loss.text(signed=True)} ({loss.direction(sigmas, where)})"
    elif "only_wrong" in ds:
        only_first_wrong = int(ds.only_wrong.isel(checkpoint=0, other=i).sel(split=split))
        text = (
            f"{split} error {error.in_points(sigmas, where)}, {_examples(only_first_wrong)} correct only in the former "
            f"and {int(at.only_wrong)} only in the latter"
        )
    else:
        text = f"{split} squared error {error.text(signed=True)} ({error.direction(sigmas, where)})"
    if split == "validation":
        text += " (champions are selected by this error, which biases it in their favour)"
    loss = estimate_of(ds.isel(checkpoint=i, other=0).sel(split="train"), "loss_difference")
    return f"{text}; training loss {loss.text(signed=True)} ({loss.direction(sigmas, 'on these examples')})"


def _examples(n: int) -> str:
    return "1 example" if n == 1 else f"{n} examples"


def _parameters(pair: xr.Dataset) -> str:
    if math.isnan(float(pair.distance)):
        return "Their architectures differ, so no distance between their parameters is defined."
    return (
        f"Their distance in parameter space is {float(pair.distance):.3g}, "
        f"{100 * float(pair.relative_distance):.0f} % of the norm of the latter; "
        f"the cosine is {float(pair.cosine):z.2f}."
    )


def _functions(ds: xr.Dataset, i: int) -> str:
    pair = ds.isel(checkpoint=i, other=0)
    split = str(ds.attrs["function_split"])
    n = int(ds.n_examples.sel(split=split))
    if "rms_difference" in pair:
        return _real_outputs(pair, split, n, float(np.sqrt(ds.error.sel(split=split).isel(checkpoint=0))))
    disagreement = estimate_of(pair, "disagreement")
    if disagreement.value == 0:
        # rule of three: 0 of n events bounds the rate below 3/n at 95 % confidence
        bound = f"at 95 % confidence they disagree on fewer than {min(300 / n, 100):.2g} % of all examples"
        if float(pair.js_divergence) < _ROUND_OFF:
            return f"They compute the same function on all {n} {split} examples ({bound})."
        return f"They predict the same classes on all {n} {split} examples ({bound})."
    expected = estimate_of(pair, "expected_disagreement").value if "expected_disagreement" in pair else math.nan
    if math.isnan(expected):
        reference = ""
    else:
        reference = f"; networks of these accuracies with independent mistakes would on {100 * expected:.1f} %"
    return f"They disagree on {disagreement.text(percent=True)} of the {split} examples{reference}."


def _real_outputs(pair: xr.Dataset, split: str, n: int, rms_error: float) -> str:
    """How much real-valued outputs differ, next to the error that the first checkpoint makes."""
    if float(pair.rms_difference) <= _ROUND_OFF * np.fmax(rms_error, 1.0):
        return f"They compute the same function on all {n} {split} examples."
    reference = "" if math.isnan(rms_error) else f"; the latter's rms error is {rms_error:.3g}"
    return f"The rms difference of their outputs is {estimate_of(pair, 'rms_difference').text()}{reference}."


def _layers(pair: xr.Dataset) -> str:
    known = pair.isel(layer=pair.cka.notnull().values)
    least, most = (known.isel(layer=int(position(known.cka.values))) for position in (np.argmin, np.argmax))
    if float(most.cka - least.cka) < _ROUND_OFF:
        return f"CKA is {estimate_of(least, 'cka').text()} in {', '.join(map(str, known.layer.values))}."
    return (
        f"Their layers are most similar in {most.layer.item()} (CKA {estimate_of(most, 'cka').text()}) and least "
        f"similar in {least.layer.item()} ({estimate_of(least, 'cka').text()})."
    )


def _curvature(pair: xr.Dataset, sigmas: float, n: int) -> str:
    where = "given the noise of these probes"
    top, trace = (estimate_of(pair, f"{name}_difference") for name in ("lambda_max", "trace"))
    distance, noise = float(pair.wasserstein1), float(pair.wasserstein1_noise)
    is_beyond_noise = distance > noise + sigmas * float(pair.wasserstein1_se)
    significance = "significantly larger" if is_beyond_noise else "not significantly larger"
    return (
        f"Hessians on {n} training examples: largest eigenvalue {top.text(signed=True)} "
        f"({top.direction(sigmas, where)}), trace {trace.text(signed=True)} ({trace.direction(sigmas, where)}); the W1 "
        f"distance of the spectra, {distance:.2g}, is {significance} than expected from the noise of the probes alone "
        f"({noise:.2g})."
    )


def _ranking(ds: xr.Dataset) -> str:
    """Checkpoints by rank; those without significant differences share one."""
    split = _split_for_errors(ds)
    at = ds.sel(split=split)
    ranks: dict[int, list[str]] = {}
    for i in np.lexsort((at.error.values, at["rank"].values)):
        ranks.setdefault(int(at["rank"][i]), []).append(short_names(ds)[i])
    if len(ranks) == 1:
        return (
            f"By {split} error none differs significantly from the best: {', '.join(next(iter(ranks.values())))} all "
            "rank first."
        )
    ranked = "; ".join(f"{rank}. {', '.join(names)}" for rank, names in ranks.items())
    return f"By {split} error, counting only significant differences: {ranked}."
