"""A comparison as sentences that claim no more than its errors allow."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import xarray as xr

from pnanalysis.analyses.champion_verdict import champion_verdict
from pnanalysis.analyses.diagnostics import estimate_of, short_names
from pnanalysis.analyses.matrix_names import matrix_name
from pnanalysis.analyses.significant_differences import ROUND_OFF, with_p_values
from pnanalysis.estimates import Estimate

#: Blocks that a sentence names.
_MOST_BLOCKS = 4


def verdict(ds: xr.Dataset) -> list[str]:
    """A comparison in sentences that claim no more than its errors allow.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``comparison`` or ``champion``.

    Returns
    -------
    list of str
        Of a champion, the answers to both questions, and where it lies among restarts. Of a comparison, what stands
        for a champion, where that is not itself; each checkpoint compared with the first; then, for more than two,
        their ranking by error with its ties.
    """
    if ds.attrs.get("kind") == "champion":
        return champion_verdict(ds)
    ds = with_p_values(ds)
    sentences = [ds.attrs["note"]] if "note" in ds.attrs else []
    sentences += [sentence for i in range(1, ds.sizes["checkpoint"]) for sentence in _compared_with_first(ds, i)]
    if ds.sizes["checkpoint"] > 2 and bool(ds.error.notnull().all()):
        sentences.append(_ranking(ds))
    return sentences


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
        yield _curvature(pair)
    if "eigenvalue_difference" in ds:
        yield _eigenpairs(pair)
    for name, what in (("block_trace", "Traces"), ("block_norm", "Frobenius norms")):
        if f"{name}_difference" in ds:
            yield _blocks(pair, f"{name}_difference", what)


def _errors(ds: xr.Dataset, i: int) -> str:
    split = _split_for_errors(ds)
    at = ds.isel(checkpoint=i, other=0).sel(split=split)
    where = f"on this {split} set"
    error = estimate_of(at, "error_difference")
    if math.isnan(error.value):  # the targets are neither classes nor real numbers
        loss = estimate_of(at, "loss_difference")
        text = f"{split} loss {loss.text(signed=True)} ({loss.direction(where)})"
    elif "only_wrong" in ds:
        only_first_wrong = int(ds.only_wrong.isel(checkpoint=0, other=i).sel(split=split))
        text = (
            f"{split} error {error.in_points(where)}, {_examples(only_first_wrong)} correct only in the former "
            f"and {int(at.only_wrong)} only in the latter"
        )
    else:
        text = f"{split} squared error {error.text(signed=True)} ({error.direction(where)})"
    if split == "validation":
        text += " (champions are selected by this error, which biases it in their favour)"
    loss = estimate_of(ds.isel(checkpoint=i, other=0).sel(split="train"), "loss_difference")
    return f"{text}; training loss {loss.text(signed=True)} ({loss.direction('on these examples')})"


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
        if float(pair.js_divergence) < ROUND_OFF:
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
    if float(pair.rms_difference) <= ROUND_OFF * np.fmax(rms_error, 1.0):
        return f"They compute the same function on all {n} {split} examples."
    reference = "" if math.isnan(rms_error) else f"; the latter's rms error is {rms_error:.3g}"
    return f"The rms difference of their outputs is {estimate_of(pair, 'rms_difference').text()}{reference}."


def _layers(pair: xr.Dataset) -> str:
    known = pair.isel(layer=pair.cka.notnull().values)
    least, most = (known.isel(layer=int(position(known.cka.values))) for position in (np.argmin, np.argmax))
    if float(most.cka - least.cka) < ROUND_OFF:
        return f"CKA is {estimate_of(least, 'cka').text()} in {', '.join(map(str, known.layer.values))}."
    return (
        f"Their layers are most similar in {most.layer.item()} (CKA {estimate_of(most, 'cka').text()}) and least "
        f"similar in {least.layer.item()} ({estimate_of(least, 'cka').text()})."
    )


def _curvature(pair: xr.Dataset) -> str:
    """How the Hessians differ: for the data set where the choice of examples is among the errors."""
    covers_examples = pair.attrs.get("data_error", "none") != "none"
    where = "for the data set" if covers_examples else "on these examples"
    top, trace = (estimate_of(pair, f"{name}_difference") for name in ("lambda_max", "trace"))
    distance, noise = estimate_of(pair, "wasserstein1"), float(pair.wasserstein1_noise)
    significance = "significantly larger" if distance.is_significant else "not significantly larger"
    covered = str(pair.attrs.get("wasserstein1_covers", "probes")).replace("and", "and the choice of")
    every = "all " if pair.attrs.get("all_examples") else ""
    matrices = matrix_name(pair.attrs, "hessian", plural=True)
    return (
        f"{matrices} on {every}{int(pair.attrs['n_hessian'])} training examples: largest eigenvalue "
        f"{_signed(top, where)}, trace {_signed(trace, where)}; the W1 distance of the spectra, {distance.value:.2g}, "
        f"is {significance} than expected from the noise of the {covered} alone ({noise:.2g})."
    )


def _eigenpairs(pair: xr.Dataset) -> str:
    """How many leading eigenvalues differ, and whether the spaces of their vectors have more in common than chance."""
    known = pair.isel(pair=pair.eigenvalue_difference.notnull().values)
    k = known.sizes["pair"]
    every = [estimate_of(known.isel(pair=i), "eigenvalue_difference") for i in range(k)]
    n = sum(one.is_significant for one in every)
    text = f"Of the {k} leading eigenvalues, {n or 'none'} {'differs' if n == 1 else 'differ'} significantly"
    overlap = estimate_of(pair, "overlap")
    if math.isnan(overlap.value):
        return f"{text}."
    chance = float(pair.overlap_chance)
    beyond = "not significantly different from" if not overlap.is_significant else (
        "significantly more than" if overlap.value > chance else "significantly less than"
    )  # fmt: skip
    return f"{text}; the spaces of their vectors overlap by {overlap.value:.2g}, {beyond} chance ({chance:.2g})."


def _blocks(pair: xr.Dataset, name: str, what: str) -> str:
    """In which blocks a number differs, the largest differences first."""
    known = pair.isel(block=pair[name].notnull().values)
    order = np.argsort(-np.abs(known[name].values), kind="stable")
    each = [estimate_of(known.isel(block=int(i)), name) for i in order]
    found = [(str(known.block.values[i]), one) for i, one in zip(order, each, strict=True) if one.is_significant]
    matrix = matrix_name(pair.attrs, "blocks")
    if not found:
        return f"{what} of the {matrix}'s {len(each)} blocks: no significant difference in any."
    named = ", ".join(f"{name} ({one.text(signed=True)})" for name, one in found[:_MOST_BLOCKS])
    more = f" and {len(found) - _MOST_BLOCKS} others" if len(found) > _MOST_BLOCKS else ""
    return f"{what} of the {matrix}'s blocks differ significantly in {len(found)} of {len(each)}: {named}{more}."


def _signed(difference: Estimate, where: str) -> str:
    """A difference with its error, its direction, and what that holds for."""
    direction = difference.direction(where)
    claim = f"{direction} {where}" if difference.is_significant else direction
    return f"{difference.text(signed=True)} ({claim})"


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
