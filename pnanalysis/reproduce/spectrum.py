"""S8: Hessian spectra of plain model and champion, and where the champion lies among plain restarts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import xarray as xr

from pnanalysis.analyses.diagnostics import estimate_of
from pnanalysis.estimates import Estimate, OutlierCount
from pnanalysis.reproduce.accuracy import CLAIM, Arms, by_cell
from pnanalysis.reproduce.cells import Result
from pnanalysis.reproduce.markdown import UNKNOWN as DASH
from pnanalysis.reproduce.markdown import Links, blocks, failures, p_text, table
from pnanalysis.reproduce.settings import PERSISTENT, RESTART
from pnanalysis.reproduce.statistics import Claim, claim, differences, pooled_rank_p, rank

#: The largest eigenvalue over the edge of the bulk, where there is a gap between them.
_EDGE = "edge_ratio"
#: Numbers that only a spectrum with a gap has, and what is said of them where none has.
_NEED_A_GAP, _UNDEFINED = ("n_outliers", _EDGE), "undefined: no spectrum has a gap"
#: Restarts that a rank needs.
FEWEST = 10
_QUANTITIES = {
    "lambda_max": "λ₁",
    "class_ratio": "λ₁ / λ_C",
    "class_trace": "top C of the trace",
    "trace": "trace",
}
#: Of these the champion's rank among restarts is given.
_RANKED = {**_QUANTITIES, "n_outliers": "outliers", _EDGE: "λ₁ / bulk edge"}


def section(arms: Arms, links: Links, figure: str = "") -> str:
    """What the page says about the spectra of one experiment."""
    results = [result for result in arms.all if result.is_finished and result.has("hessian")]
    if not results:
        return blocks([arms.progress, "Not yet known at this scale: no cell is done.", failures(arms.all, links)])
    columns = ["cell", "network", *_QUANTITIES.values(), "outliers above a gap"]
    rows = [row for result in results for row in _rows(result, links)]
    note = (
        "Errors are standard errors or 95 % intervals, for the choice of probes and for that of examples. λ₁ is the "
        "largest eigenvalue, C the number of classes. A gap is one that is wider than the spacings below it explain."
    )
    return blocks(
        [
            arms.progress,
            table(columns, rows),
            " ".join(filter(None, (note, _gaps(arms), _unequal(arms)))),
            figure,
            table(CLAIM, [claim.row for claim in claims(arms)]),
            _ranks(arms, links),
            by_cell(arms, links) if arms.experiment == "S8" else "",
            failures(arms.all, links),
        ]
    )


def _unequal(arms: Arms) -> str:
    """A sentence where the arms are not of equal cost; empty where they are."""
    setting = arms.plan.setting(arms.experiment)
    n, k = (setting.training(arms.variant, arm).get("iterations") for arm in (RESTART, PERSISTENT))
    if n == k:
        return ""
    return f"There are {n} restarts for {k} iterations, which ranks need: the best restart has cost more."


def _rows(result: Result, links: Links) -> list[list[str]]:
    ds = result.dataset("hessian")
    persistent = result.cell.arm == PERSISTENT
    named = {"plain": 0, "champion" if persistent else "best restart": result.champion}
    return [
        [links.cell(result.cell), f"{name} (iteration {iteration})", *_numbers(ds, iteration)]
        for name, iteration in named.items()
    ]


def _numbers(ds: xr.Dataset, iteration: int) -> list[str]:
    at = _at(ds, iteration)
    texts = [_estimate(at, name).text(percent=name == "class_trace") for name in _QUANTITIES]
    n = OutlierCount(float(at.n_outliers), gap_p=float(at.outlier_p)).text(whole=True)
    return [*texts, n]


def _at(ds: xr.Dataset, iteration: int) -> xr.Dataset:
    return ds.isel(checkpoint=int(np.flatnonzero(ds.iteration.values == iteration)[0]))


def _estimate(at: xr.Dataset, name: str) -> Estimate:
    return estimate_of(at, name) if name in at else Estimate(math.nan)


def values(result: Result, name: str) -> xr.DataArray:
    """A number of all networks of a cell, NaN where it is unknown.

    Without a gap there is no number of outliers, which is not a number of zero, and no edge of a bulk.
    """
    ds = result.dataset("hessian")
    unknown = xr.full_like(ds.n_outliers, np.nan, dtype=float)
    if name == "n_outliers":
        return ds.n_outliers.where(ds.n_outliers > 0)
    if name == _EDGE:
        if "bulk_edge_high" not in ds:
            return unknown
        return (ds.lambda_max / ds.bulk_edge_high).where((ds.n_outliers > 0) & (ds.bulk_edge_high > 0))
    return ds[name].astype(float) if name in ds else unknown


def value(result: Result, name: str, iteration: int) -> float:
    """A number of one network."""
    found = values(result, name)
    return float(found.values[np.flatnonzero(found.iteration.values == iteration)[0]])


def _by_seed(results: Mapping[int, Result], name: str, plain: bool) -> dict[int, float]:
    found = {
        seed: value(result, name, 0 if plain else result.champion)
        for seed, result in results.items()
        if result.has("hessian")
    }
    return {seed: number for seed, number in found.items() if math.isfinite(number)}


def _logs(values: Mapping[int, float]) -> dict[int, float]:
    return {seed: math.log10(number) for seed, number in values.items() if number > 0}


def _later(results: Mapping[int, Result], name: str) -> dict[int, float]:
    """The mean over the later iterations with a known number, by seed: of its logarithm, or of a count itself."""
    found = {}
    for seed, result in results.items():
        if result.has("hessian"):
            each = values(result, name)
            known = each.values[(each.iteration.values > 0) & np.isfinite(each.values)]
            if name != "n_outliers":
                known = np.log10(known[known > 0])
            if len(known):
                found[seed] = float(known.mean())
    return found


def _n_gaps(arms: Arms, *chosen: str) -> tuple[int, int]:
    """In how many networks of these arms there is a number of outliers at all, and of how many."""
    results = [result for arm in chosen or (PERSISTENT, RESTART) for result in arms.finished(arm).values()]
    counts = [values(result, "n_outliers").values for result in results if result.has("hessian")]
    return sum(int(np.isfinite(each).sum()) for each in counts), sum(map(len, counts))


def _gaps(arms: Arms) -> str:
    """In how many networks there is a gap."""
    parts = []
    for arm in (PERSISTENT, RESTART):
        n, networks = _n_gaps(arms, arm)
        if networks:
            parts.append(f"{n} of {networks} networks of the {arm} arm")
    return (
        f"There is a gap in {' and '.join(parts)}; without one, the number of outliers and the edge of the bulk are "
        "unknown, and claims about them are made of the others."
    )


def claims(arms: Arms) -> list[Claim]:
    """The paper's two claims: fewer outliers, and a largest eigenvalue that is closer to the rest."""
    persistent, restart = arms.finished(PERSISTENT), arms.finished(RESTART)
    said, found = "yes" if arms.experiment == "S8" else DASH, []  # S8 is the paper's, other spectra are an addition
    n_gaps, networks = _n_gaps(arms)
    for has, name, of_paper in (
        ("fewer outliers than", "n_outliers", said),
        ("a smaller λ₁ / bulk edge (log10) than", _EDGE, said),
        ("a smaller λ₁ (log10) than", "lambda_max", DASH),
        ("a smaller λ₁ / λ_C (log10) than", "class_ratio", DASH),
    ):
        champion = _by_seed(persistent, name, False)
        others = [_by_seed(persistent, name, True), _by_seed(restart, name, False)]
        if name != "n_outliers":
            champion, *others = map(_logs, (champion, *others))
        for text, first, second, paper, main in (
            (f"the champion has {has} the plain model", champion, others[0], of_paper, True),
            (f"the champion has {has} the best restart", champion, others[1], DASH, False),
            (f"persistent iterations have on average {has} restarts", _later(persistent, name), _later(restart, name),
             DASH, True),
        ):  # fmt: skip
            each = claim(text, differences(first, second), sign=-1, paper=paper, main=main)
            found.append(replace(each, here=_UNDEFINED) if name in _NEED_A_GAP and networks and not n_gaps else each)
    return found


def _ranks(arms: Arms, links: Links) -> str:
    """How many plain restarts of the same seed have a smaller number than the champion, and all seeds together."""
    persistent, restart = arms.finished(PERSISTENT), arms.finished(RESTART)
    rows: list[list[str]] = []
    low: dict[str, list[tuple[int, int]]] = {name: [] for name in _RANKED}
    high: dict[str, list[tuple[int, int]]] = {name: [] for name in _RANKED}
    for seed in sorted(persistent.keys() & restart.keys()):
        champion, control = persistent[seed], restart[seed]
        if not (champion.has("hessian") and control.has("hessian")):
            continue
        row = [f"{links.cell(champion.cell)}, {links.cell(control.cell)}", f"iteration {champion.champion}"]
        for name in _RANKED:
            each = values(control, name)
            others = each.values[each.iteration.values > 0]  # iteration 0 is the champion's own plain model
            here = value(champion, name, champion.champion)
            below, n = rank(here, others)
            equal = int((others == here).sum())
            if math.isnan(here) or not n:
                row.append(DASH)
                continue
            low[name].append((below + equal, n))
            high[name].append((n - below, n))
            row.append(f"{below} of {n}{f', {equal} equal' * bool(equal)}{' (too few)' * (n < FEWEST)}")
        rows.append(row)
    if not rows:
        return ""
    rows.append(["all seeds: p of ranks so low", "", *(p_text(pooled_rank_p(low[name])) for name in _RANKED)])
    rows.append(["all seeds: p of ranks so high", "", *(p_text(pooled_rank_p(high[name])) for name in _RANKED)])
    text = (
        "Plain restarts whose number is smaller than the champion's (the plain model itself, from which the chain "
        "starts, is not among them). The last rows give the exact one-sided probability that the sum of these ranks "
        "is so extreme if the champion is one more restart; ties count against it. A single seed with n restarts "
        f"cannot be more extreme than 1 in n + 1, and fewer than {FEWEST} are marked as too few. The champion is the "
        "best of its chain by validation error, whereas restarts are not selected: a number that goes along with "
        "the validation error differs for that reason, too."
    )
    return f"{text}\n\n" + table(["cells", "champion", *_RANKED.values()], rows)


def densities(arms: Arms) -> list[tuple[str, xr.Dataset]]:
    """The spectra of the lowest seed of each arm, for the figure."""
    return [
        (f"{arm}, seed {min(found)}", found[min(found)].dataset("hessian"))
        for arm in (PERSISTENT, RESTART)
        if (found := {seed: r for seed, r in arms.finished(arm).items() if r.has("hessian")})
    ]
