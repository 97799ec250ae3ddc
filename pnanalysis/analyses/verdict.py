"""A comparison in rows and in words: what is listed, and what may be said of it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import xarray as xr

from pnanalysis.estimates import Estimate

_SAME = 1e-6  # nats of Jensen-Shannon divergence, or rms difference over rms error: round-off of single precision


@dataclass(frozen=True)
class Diagnostic:
    """One row of a comparison.

    Attributes
    ----------
    title : str
    values : list of Estimate
        A number a checkpoint; empty for what only two together have.
    beside : list of Estimate
        What each checkpoint after the first has beside the first: the difference, or what the two have together.
    percent : bool
        Printed in per cent.
    whole : bool
        A count, printed without decimals.
    """

    title: str
    values: list[Estimate]
    beside: list[Estimate]
    percent: bool = False
    whole: bool = False

    def cells(self) -> list[str | Estimate | None]:
        """Of a table: title, values, what stands beside the first."""
        nothing: list[Estimate | None] = [None] * (len(self.beside) + 1)
        values = [replace(value, percent=self.percent, whole=self.whole) for value in self.values] or nothing
        beside = [
            replace(value, percent=self.percent, signed=bool(self.values), whole=self.whole) for value in self.beside
        ]
        return [self.title, *values, *beside]


def diagnostics(ds: xr.Dataset) -> list[Diagnostic]:
    """The rows of a dataset of kind ``comparison``; what was not measured is left out."""
    return [row for row in _rows(ds) if any(math.isfinite(m.value) for m in (*row.values, *row.beside))]


def _rows(ds: xr.Dataset) -> Iterator[Diagnostic]:
    classes = "classes" in ds.attrs
    for split in map(str, ds.split.values):
        at = ds.sel(split=split)
        yield _single(at, "loss", f"{split} loss")
        if classes or not np.allclose(at.loss, at.error, rtol=_SAME, atol=0):  # a squared loss is the squared error
            yield _single(at, "error", f"{split} {'error' if classes else 'squared error'}", percent=classes)
    yield _single(ds, "distance_from_start", "distance from start")
    yield _single(ds, "norm", "norm of the parameters")
    yield _pair(ds, "distance", "distance in parameters")
    yield _pair(ds, "relative_distance", "relative distance")
    yield _pair(ds, "cosine", "cosine of the parameters")
    yield _pair(ds, "disagreement", "disagreement", percent=True)
    yield _pair(ds, "expected_disagreement", "  of independent networks", percent=True)
    yield _pair(ds, "js_divergence", "Jensen-Shannon divergence")
    yield _pair(ds, "rms_difference", "rms difference of outputs")
    if "cka" in ds:
        for layer in map(str, told_layers(ds).layer.values):
            yield _pair(ds.sel(layer=layer), "cka", f"CKA of {layer}")
    yield _single(ds, "lambda_max", "Hessian lambda_max")
    yield _single(ds, "trace", "Hessian trace")
    yield _single(ds, "n_outliers", "Hessian outliers", whole=True)
    yield _single(ds, "effective_rank", "Hessian effective rank")
    yield _single(ds, "negative_mass", "negative eigenvalues", percent=True)
    yield _pair(ds, "wasserstein1", "W1 distance of spectra")
    yield _pair(ds, "wasserstein1_noise", "  of equal spectra (noise)")
    if "saturation" in ds and "bounded" in ds.coords and bool(ds.bounded.any()):
        mean = ds.saturation.isel(activation=ds.bounded.values.astype(bool)).mean("activation")
        yield _single(ds.drop_vars("saturation").assign(saturation=mean), "saturation", "saturation, layers' mean")


def told_layers(ds: xr.Dataset) -> xr.Dataset:
    """Without the network's output, which stands last, where a layer gives just that."""
    if ds.sizes["layer"] < 2 or "output" not in str(ds.layer.values[-1]):
        return ds
    *layers, output = (ds.cka.isel(layer=i).values for i in range(ds.sizes["layer"]))
    same = any(np.allclose(layer, output, rtol=0, atol=_SAME, equal_nan=True) for layer in layers)
    return ds.isel(layer=slice(-1)) if same else ds


def _single(ds: xr.Dataset, name: str, title: str, percent: bool = False, whole: bool = False) -> Diagnostic:
    """A number of each checkpoint, and its differences from the first."""
    if name not in ds:
        return Diagnostic(title, [], [])
    values = [measured(ds.isel(checkpoint=i, other=0), name) for i in range(ds.sizes["checkpoint"])]
    if f"{name}_difference" in ds:
        return Diagnostic(title, values, _pair(ds, f"{name}_difference", title).beside, percent, whole)
    return Diagnostic(title, values, [Estimate(value.value - values[0].value) for value in values[1:]], percent, whole)


def _pair(ds: xr.Dataset, name: str, title: str, percent: bool = False) -> Diagnostic:
    """What each checkpoint and the first have together."""
    if name not in ds:
        return Diagnostic(title, [], [])
    beside = [measured(ds.isel(checkpoint=i, other=0), name) for i in range(1, ds.sizes["checkpoint"])]
    return Diagnostic(title, [], beside, percent)


def measured(ds: xr.Dataset, name: str) -> Estimate:
    """A scalar variable with what there is of its error."""
    value, se, low, high = (float(ds[f"{name}{end}"]) if f"{name}{end}" in ds else math.nan for end in _ENDS)
    return Estimate(value, se, low, high)


_ENDS = ("", "_se", "_low", "_high")


def verdict(ds: xr.Dataset) -> list[str]:
    """A comparison in sentences that claim no more than its errors allow.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``comparison``.

    Returns
    -------
    list of str
        Each checkpoint beside the first, then, of more than two, their order by error; ties are named.
    """
    said: list[str] = []
    for i in range(1, ds.sizes["checkpoint"]):
        said += _beside_the_first(ds, i)
    if ds.sizes["checkpoint"] > 2 and bool(ds.error.notnull().all()):
        said.append(_order(ds))
    return said


def short_names(ds: xr.Dataset) -> list[str]:
    """The checkpoints' names, without their epochs where the rest tells them apart."""
    names = [str(name) for name in ds.checkpoint.values]
    short = [re.sub(r"(iter\d+)/epoch\d+$", r"\1", name) for name in names]
    return short if len(set(short)) == len(short) else names


def _name(ds: xr.Dataset, i: int) -> str:
    label, what = short_names(ds)[i], str(ds.description.values[i])
    short = what.removesuffix(", the champion") if label.endswith("champion") else what
    return label if short in ("", label) or label.endswith("plain") else f"{label} ({short})"


def _judge(ds: xr.Dataset) -> str:
    """The split that errors are judged on: test, else validation, else train."""
    return next(split for split in ("test", "validation", "train") if split in ds.split.values)


def _beside_the_first(ds: xr.Dataset, i: int) -> Iterator[str]:
    pair = ds.isel(checkpoint=i, other=0)
    subject = f"{_name(ds, i)} against {_name(ds, 0)}"
    if float(pair.distance) == 0:
        yield f"{subject}: the same parameters."
        return
    yield f"{subject}: {_errors(ds, i)}."
    yield _parameters(pair)
    yield _functions(ds, i)
    if "cka" in pair and bool(pair.cka.notnull().any()):
        yield _layers(pair)
    if "trace" in ds:
        yield _curvature(pair, float(ds.attrs["sigmas"]), int(ds.attrs["n_hessian"]))


def _errors(ds: xr.Dataset, i: int) -> str:
    split, sigmas = _judge(ds), float(ds.attrs["sigmas"])
    at = ds.isel(checkpoint=i, other=0).sel(split=split)
    where = f"on this {split} set"
    error = measured(at, "error_difference")
    if math.isnan(error.value):  # targets that are neither classes nor real numbers
        loss = measured(at, "loss_difference")
        text = f"{split} loss {loss.text(signed=True)} ({loss.direction(sigmas, where)})"
    elif "only_wrong" in ds:
        back = int(ds.only_wrong.isel(checkpoint=0, other=i).sel(split=split))
        text = f"{split} error {error.in_points(sigmas, where)}, {back} examples right only in the former and "
        text += f"{int(at.only_wrong)} only in the latter"
    else:
        text = f"{split} squared error {error.text(signed=True)} ({error.direction(sigmas, where)})"
    if split == "validation":
        text += " (champions are picked by this error, which flatters them)"
    loss = measured(ds.isel(checkpoint=i, other=0).sel(split="train"), "loss_difference")
    return f"{text}; training loss {loss.text(signed=True)} ({loss.direction(sigmas, 'on these examples')})"


def _parameters(pair: xr.Dataset) -> str:
    if math.isnan(float(pair.distance)):
        return "They are of different architectures, so that they have no distance in parameters."
    return (
        f"They lie {float(pair.distance):.3g} apart in parameters, {100 * float(pair.relative_distance):.0f} % of the "
        f"norm of the latter, cosine {float(pair.cosine):z.2f}."
    )


def _functions(ds: xr.Dataset, i: int) -> str:
    pair = ds.isel(checkpoint=i, other=0)
    split = str(ds.attrs["function_split"])
    n = int(ds.n_examples.sel(split=split))
    if "rms_difference" in pair:
        error = float(np.sqrt(ds.error.sel(split=split).isel(checkpoint=0)))
        if float(pair.rms_difference) <= _SAME * np.fmax(error, 1.0):
            return f"They are the same function on all {n} {split} examples."
        beside = "" if math.isnan(error) else f", where the latter's are {error:.3g} off the targets"
        return f"Their outputs differ by {measured(pair, 'rms_difference').text()} (rms){beside}."
    share = measured(pair, "disagreement")
    if share.value == 0:
        what = "are the same function" if float(pair.js_divergence) < _SAME else "predict the same classes"
        return (
            f"They {what} on all {n} {split} examples (at 95 % confidence they disagree on fewer than "
            f"{min(300 / n, 100):.2g} %)."
        )
    expected = measured(pair, "expected_disagreement").value if "expected_disagreement" in pair else math.nan
    beside = f"where networks of these accuracies with independent mistakes would on {100 * expected:.1f} %"
    known = "" if math.isnan(expected) else f", {beside}"
    return f"They disagree on {share.text(percent=True)} of the {split} examples{known}."


def _layers(pair: xr.Dataset) -> str:
    known = pair.isel(layer=pair.cka.notnull().values)
    least, most = (known.isel(layer=int(at(known.cka.values))) for at in (np.argmin, np.argmax))
    if float(most.cka - least.cka) < _SAME:
        return f"CKA is {measured(least, 'cka').text()} in {', '.join(map(str, known.layer.values))}."
    return (
        f"Their layers are most alike in {most.layer.item()} (CKA {measured(most, 'cka').text()}), least in "
        f"{least.layer.item()} ({measured(least, 'cka').text()})."
    )


def _curvature(pair: xr.Dataset, sigmas: float, n: int) -> str:
    where = "beyond the noise of these probes"
    top, trace = (measured(pair, f"{name}_difference") for name in ("lambda_max", "trace"))
    distance, noise = float(pair.wasserstein1), float(pair.wasserstein1_noise)
    spectra = "beyond" if distance > noise + sigmas * float(pair.wasserstein1_se) else "not beyond"
    return (
        f"Hessians on {n} training examples: largest eigenvalue {top.text(signed=True)} ({top.direction(sigmas, where)}), "
        f"trace {trace.text(signed=True)} ({trace.direction(sigmas, where)}); the spectra's W1 distance, {distance:.2g}, is "
        f"{spectra} what probes alone make of equal ones ({noise:.2g})."
    )


def _order(ds: xr.Dataset) -> str:
    """Checkpoints by rank; those that the errors do not tell apart share one."""
    split = _judge(ds)
    at = ds.sel(split=split)
    places: dict[int, list[str]] = {}
    for i in np.lexsort((at.error.values, at["rank"].values)):
        places.setdefault(int(at["rank"][i]), []).append(short_names(ds)[i])
    if len(places) == 1:
        return f"By {split} error none is told from the best: {', '.join(next(iter(places.values())))} all rank first."
    ranked = "; ".join(f"{place}. {', '.join(names)}" for place, names in places.items())
    return f"By {split} error, ties where none is told to be better: {ranked}."
