"""Whether a champion is another minimum, and whether a better one: the rules, and the answers in sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import xarray as xr

from pnanalysis.analyses.matrix_names import matrix_name
from pnanalysis.analyses.null_distribution import restarts_needed
from pnanalysis.analyses.significant_differences import ROUND_OFF
from pnanalysis.estimates import Estimate
from pnanalysis.significance import LEVEL, p_value

_Z95 = 1.959963984540054
#: Distance after alignment, relative to the norm of the weights, below which they coincide in single precision.
_COINCIDE = 1e-5
#: Part of the lowest barrier to a restart below which a barrier is a ripple.
_RIPPLE = 0.1
#: What to do without restarts.
ADVICE = (
    "There are no restarts to compare with, so that nothing says what another start alone would have done: train them "
    "with pntrain ... --control (into RUN-restart, where they are found), or name runs with --restarts."
)


class Answer(NamedTuple):
    """A question's answer in a word or two, and in a sentence."""

    word: str
    sentence: str


def champion_verdict(ds: xr.Dataset) -> list[str]:
    """The answers to both questions, and where the champion lies among restarts, in sentences.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``champion``.
    """
    sentences = [str(ds.attrs["note"])] if "note" in ds.attrs else []
    sentences += [minimum_answer(ds).sentence, *_stationary(ds), better_answer(ds).sentence, *_ranks(ds)]
    return [*sentences, _among_restarts(ds)]


def number_of(ds: xr.Dataset, name: str, at: int) -> Estimate:
    """A diagnostic of one network, as displayed; NaN where it was not measured."""
    if name not in ds.diagnostic.values:
        return Estimate(math.nan)
    row = ds.sel(diagnostic=name)
    se, low, high, data_se = (
        float(row[f"value_{part}"].isel(checkpoint=at)) for part in ("se", "low", "high", "data_se")
    )
    value, style = float(row.value.isel(checkpoint=at)), {"percent": bool(row.percent), "whole": bool(row.whole)}
    return Estimate(value, se, low, high, data_se=data_se, **style)


def minimum_answer(ds: xr.Dataset) -> Answer:
    """Whether the champion is another minimum than the plain model.

    Notes
    -----
    1. The same weights are *identical*.
    2. Networks that compute the same function on all examples, up to round-off, are *the same by symmetry* if their
       weights coincide after alignment, else *the same function*.
    3. Otherwise the lower of the barriers on the straight line decides, as it is or after alignment. If it is beyond
       its error of zero (a two-sided test at 5 %) and no ripple, the champion is *another minimum*; *(not aligned)*
       where the network could not be aligned, so that an order of hidden units may be all that lies between. A ripple
       is lower than a tenth of the lowest barrier to a restart, or, without restarts, than 1.96 standard errors of the
       loss itself: what the choice of examples changes it by.
    4. If not, it is in *the same basin*, unless the upper end of its 95 % interval is above the lowest barrier between
       the plain model and a restart, which is beyond its own error: then the examples *cannot tell*.
    """
    distance, aligned = (number_of(ds, name, 1) for name in ("distance", "aligned_distance"))
    if distance.value == 0:
        return Answer("identical", f"Another minimum? No: {_name(ds)} and the plain model have the same weights.")
    before = f"distance of the weights {distance.value:.3g}"
    if _same_function(ds):
        function = (
            f"both compute the same function on all {ds.attrs['n_examples']} {ds.attrs['function_split']} examples"
        )
        if aligned.value <= _COINCIDE * number_of(ds, "norm", 0).value:
            return Answer(
                "same by symmetry",
                f"Another minimum? No: the same one with its hidden units relabelled ({before}, {aligned.value:.2g} "
                f"after alignment); {function}.",
            )
        return Answer(
            "same function",
            f"Another minimum? Not as a function: {function}, so that only directions without any effect, or a "
            f"symmetry that alignment has not undone, lie between them ({before}).",
        )
    name, lowest = _lower_barrier(ds, 1)
    upper = lowest.value + _Z95 * np.nan_to_num(lowest.se)
    others = [_lower_barrier(ds, i)[1] for i in range(2, ds.sizes["checkpoint"])]
    least = min(others, key=lambda one: one.value, default=None)
    text = _barriers(ds)
    if _is_beyond(ds, lowest):
        ripple = _ripple(ds, lowest, least)
        if ripple:
            return Answer(
                "same basin", f"Another minimum? No, the same basin: {text}; the lower one is {ripple}.{_scales(ds)}"
            )
        unaligned = "not_aligned" in ds.attrs
        word = "another minimum (not aligned)" if unaligned else "another minimum"
        doubt = f", unless hidden units are only in another order ({ds.attrs['not_aligned']})" if unaligned else ""
        return Answer(word, f"Another minimum? Yes{doubt}: {text}.{_scales(ds)}")
    if least is not None and _is_beyond(ds, least) and upper >= least.value:
        return Answer(
            "cannot tell",
            f"Another minimum? These examples cannot tell: {text}, which may be zero or up to {upper:.2g}, as much as "
            f"between restarts; take more (--n-line).{_scales(ds)}",
        )
    return Answer(
        "same basin",
        f"Another minimum? No, the same basin: {text}; the lower one ({name}) is within its error of zero, at most "
        f"{upper:.2g}.{_scales(ds)}",
    )


def _ripple(ds: xr.Dataset, barrier: Estimate, least: Estimate | None) -> str:
    """Why a barrier beyond its error is still none; empty if it is one."""
    if least is not None and _is_beyond(ds, least):
        return "less than a tenth of the lowest to a restart, a ripple" if barrier.value < _RIPPLE * least.value else ""
    if least is None and barrier.value <= _Z95 * float(ds.loss_se.isel(checkpoint=1, path=0, position=0)):
        return "less than what the choice of examples changes the loss by, a ripple"
    return ""


def better_answer(ds: xr.Dataset) -> Answer:
    """Whether the champion is better than the plain model, and than the best of as many restarts.

    Notes
    -----
    Its test error, which took no part in the selection, is compared with both on the same examples. It is *better* if
    it is significantly lower than both (Holm, 5 %); *better than plain only* if not than the best of the restarts;
    *better than plain, no restarts* where there are none; *worse* if it is significantly higher than that of the plain
    model; otherwise *not shown*.
    """
    differences = {str(name): _difference(ds, i) for i, name in enumerate(ds.reference.values)}
    plain, best = differences["plain"], differences.get("best restart")
    lower = {name: one.is_significant and one.value < 0 for name, one in differences.items()}
    split, judged = ds.attrs["function_split"], ds.attrs["judged_by"]
    if plain.is_significant and plain.value > 0:
        word, text = "worse", "No, worse"
    elif not lower["plain"]:
        word, text = "not shown", "Not shown"
    elif best is None:
        word, text = "better than plain, no restarts", "Than the plain model, yes"
    elif lower["best restart"]:
        word, text = "better", "Yes"
    else:
        word, text = "better than plain only", "Than the plain model, yes; than the best restart, not shown"
    own, other = (number_of(ds, f"{split}_{judged}", i) for i in (1, 0))
    parts = [f"Better? {text}: {split} {judged} {own.text()} against {other.text()} of the plain model, "
             f"{_difference_text(ds, 0, plain)}"]  # fmt: skip
    if best is not None:
        parts.append(_against_best(ds, best))
    if split != "test":
        parts.append(f"there is no test set, and the {split} {judged} may be what the champion was picked by")
    return Answer(word, "; ".join(parts) + ".")


def _against_best(ds: xr.Dataset, best: Estimate) -> str:
    n, k = ds.sizes["checkpoint"] - 2, ds.attrs.get("n_iterations")
    compared = n if k is None else min(n, int(k))
    picked = f", as {_name(ds)} was of {_counted(int(k), 'iteration')}" if k is not None else ""
    text = f"against {ds.attrs['best_restart']}, picked as the best of {_counted(compared, 'restart')}{picked}, "
    text += _difference_text(ds, 1, best)
    if k is not None and n < int(k):
        text += f" (of fewer, which favours {_name(ds)})"
    return text


def _difference(ds: xr.Dataset, i: int) -> Estimate:
    at = ds.isel(reference=i)
    return Estimate(float(at.error_difference), float(at.error_difference_se), p=float(at.error_difference_p))


def _difference_text(ds: xr.Dataset, i: int, one: Estimate) -> str:
    where = f"on these {ds.attrs['n_examples']} examples"
    if "only_wrong" not in ds:
        return f"{one.text(signed=True)} ({one.direction(where)})"
    at = ds.isel(reference=i)
    p = f", p {one.p:.2g}" if math.isfinite(one.p) else ""
    counts = f"{int(at.only_right)} right in it alone, {int(at.only_wrong)} in the other alone"
    return f"{one.text(signed=True, percent=True).removesuffix(' %')} points ({one.direction(where)}{p}; {counts})"


def _ranks(ds: xr.Dataset) -> Iterator[str]:
    """Where the test error lies among those of restarts, and what the selection of the champion does to that."""
    name = f"{ds.attrs['function_split']}_{ds.attrs['judged_by']}"
    n = ds.sizes["checkpoint"] - 2
    if n < 1 or name not in ds.diagnostic.values:
        return
    values = ds.value.sel(diagnostic=name).values
    as_good = int((values[2:] <= values[1]).sum())
    title = str(ds.title.sel(diagnostic=name).item())
    text = (
        f"{as_good} of {_counted(n, 'restart')} {'has' if as_good == 1 else 'have'} a {title} as low: p "
        f"{(1 + as_good) / (n + 1):.2g} by rank, where {1 / (n + 1):.2g} is the smallest that {n} can give"
    )
    if "selection_p" in ds:
        k = int(ds.attrs["n_iterations"])
        text += (
            f"; counting that it is the best of {k}, p {float(ds.selection_p):.2g}, at least "
            f"{float(ds.selection_least_p):.2g} ({LEVEL} can be reached from {restarts_needed(k)} restarts on)"
        )
    yield text + "."


def _stationary(ds: xr.Dataset) -> Iterator[str]:
    """Whether it is a minimum at all: gradient, and smallest curvature."""
    own, plain = (number_of(ds, "gradient_norm", i) for i in (1, 0))
    if "gradient_noise" not in ds or math.isnan(own.value):
        return
    noise = float(ds.gradient_noise.isel(checkpoint=1))
    text = f"A minimum at all? The gradient of the training loss has norm {own.value:.3g} "
    text += f"({plain.value:.3g} in the plain model"
    if math.isfinite(noise):
        text += f"; the choice of examples alone gives {noise:.2g})"
        text += ": not a stationary point" if own.value > 2 * noise else ": zero, as far as these examples tell"
    else:
        text += ")"
    low, top = (number_of(ds, name, 1) for name in ("lambda_min", "lambda_max"))
    if math.isfinite(low.value) and top.value > 0:
        matrix = matrix_name(ds.attrs, "hessian")
        text += f"; the smallest {matrix} eigenvalue is {low.value:.3g}, the largest {top.value:.3g}"
    yield text + "."


def _among_restarts(ds: xr.Dataset) -> str:
    """Which diagnostics lie outside what restarts reach, and which inside."""
    n = ds.sizes["checkpoint"] - 2
    if n == 0:
        return ADVICE
    tested = ds.isel(diagnostic=np.isfinite(ds.null_p.values))
    if not tested.sizes["diagnostic"]:
        return "A single restart does not tell how far restarts scatter; train more (pntrain ... --iterations)."
    outside, inside = [], []
    for i in range(tested.sizes["diagnostic"]):
        at = tested.isel(diagnostic=i)
        title = str(at.title.item())
        if float(at.null_p) <= LEVEL:
            side = "above" if float(at.null_score) > 0 else "below"
            outside.append(f"{title} {number_of(ds, str(at.diagnostic.item()), 1).text()}, {side} {interval(at)}")
        else:
            inside.append(title)
    head = f"Among {_counted(n, 'restart')} ({tested.sizes['diagnostic']} diagnostics, Holm)"
    first = f"{head}, {_name(ds)} lies outside in {'; '.join(outside) or 'none'}."
    return f"{first} Inside: {'; '.join(inside)}." if inside else first


def interval(at: xr.Dataset) -> str:
    """The interval of prediction of one diagnostic, as text."""
    low, high = (
        Estimate(float(at[f"null_{end}"])).text(percent=bool(at.percent)).removesuffix(" %") for end in ("low", "high")
    )
    return f"{low} to {high}{' %' if bool(at.percent) else ''}"


def _name(ds: xr.Dataset) -> str:
    return f"the {ds.attrs['role']}" if "iteration" in ds.attrs else str(ds.attrs["role"])


def _counted(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _same_function(ds: xr.Dataset) -> bool:
    """Whether the champion computes what the plain model does, up to round-off."""
    if "js_divergence" in ds:
        return bool(ds.js_divergence.isel(checkpoint=1) < ROUND_OFF) and number_of(ds, "disagreement", 1).value == 0
    difference = number_of(ds, "rms_difference", 1).value
    size = number_of(ds, f"{ds.attrs['function_split']}_{ds.attrs['judged_by']}", 0).value
    return difference <= ROUND_OFF * max(1.0, math.sqrt(abs(np.nan_to_num(size))))


def _lower_barrier(ds: xr.Dataset, at: int) -> tuple[str, Estimate]:
    """The lower of the barriers from the plain model to a network, and on which line it is."""
    found = {"as it is": number_of(ds, "barrier", at), "aligned": number_of(ds, "aligned_barrier", at)}
    known = {name: one for name, one in found.items() if math.isfinite(one.value)}
    if not known:
        return "as it is", found["as it is"]
    name = min(known, key=lambda one: known[one].value)
    return name, known[name]


def _is_beyond(ds: xr.Dataset, barrier: Estimate) -> bool:
    """Whether a barrier is beyond its error of zero; one that is not a number has overflowed."""
    floor = ROUND_OFF * max(1.0, float(np.nan_to_num(ds.loss.isel(position=0)).max()))
    if math.isnan(barrier.value):
        return True
    return float(p_value(barrier.value, np.nan_to_num(barrier.se), floor=floor)) <= LEVEL


def _barriers(ds: xr.Dataset) -> str:
    line, aligned = (number_of(ds, name, 1) for name in ("barrier", "aligned_barrier"))
    text = f"the barrier of the training loss on the straight line from the plain model is {line.text()}"
    if math.isfinite(aligned.value):
        text += f", and {aligned.text()} with hidden units aligned"
    return text


def _scales(ds: xr.Dataset) -> str:
    """The same numbers of restarts, and how much the outputs differ."""
    others = [_lower_barrier(ds, i)[1].value for i in range(2, ds.sizes["checkpoint"])]
    text = ""
    if others:
        which = "to the restart" if len(others) == 1 else f"to {len(others)} restarts"
        span = f"{min(others):.3g}" if len(others) == 1 else f"{min(others):.3g} to {max(others):.3g}"
        text += f" The lower barrier {which} is {span}."
    name = "disagreement" if "disagreement" in ds.diagnostic.values else "rms_difference"
    own = number_of(ds, name, 1)
    if math.isnan(own.value):
        return text
    verb = "Predictions differ on" if name == "disagreement" else "Outputs differ by (rms)"
    text += (
        f" {verb} {own.text()} of the {ds.attrs['function_split']} examples" if own.percent else f" {verb} {own.text()}"
    )
    values = ds.value.sel(diagnostic=name).values[2:]
    if len(values):
        ends = [
            Estimate(float(one)).text(percent=own.percent).removesuffix(" %") for one in (values.min(), values.max())
        ]
        text += f", of restarts {' to '.join(dict.fromkeys(ends))}{' %' if own.percent else ''}"
    return text + "."
