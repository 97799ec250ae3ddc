"""S8: Hessian spectra of plain model and champion, and where the champion lies among plain restarts."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import xarray as xr

from pnanalysis.analyses.diagnostics import estimate_of
from pnanalysis.estimates import Estimate, OutlierCount
from pnanalysis.reproduce.accuracy import CLAIM, Arms
from pnanalysis.reproduce.cells import Result
from pnanalysis.reproduce.markdown import Links, blocks, failures, table, with_interval
from pnanalysis.reproduce.settings import PERSISTENT, RESTART
from pnanalysis.reproduce.statistics import Claim, paired, rank, verdict

#: Restarts that a rank needs.
FEWEST = 10
_QUANTITIES = {
    "lambda_max": "λ₁",
    "class_ratio": "λ₁ / λ_C",
    "class_trace": "top C of the trace",
    "trace": "trace",
}


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
            " ".join(filter(None, (note, _unequal(arms)))),
            figure,
            table(CLAIM, [claim.row for claim in claims(arms)]),
            _ranks(arms),
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


def value(result: Result, name: str, iteration: int) -> float:
    """A number of a network's spectrum."""
    ds = result.dataset("hessian")
    return float(_at(ds, iteration)[name]) if name in ds else math.nan


def _by_seed(results: Mapping[int, Result], name: str, plain: bool) -> dict[int, float]:
    return {
        seed: value(result, name, 0 if plain else result.champion)
        for seed, result in results.items()
        if result.has("hessian")
    }


def _logs(values: Mapping[int, float]) -> dict[int, float]:
    return {seed: math.log10(number) for seed, number in values.items() if number > 0}


def _later(results: Mapping[int, Result], name: str) -> dict[int, float]:
    """The mean over the iterations after the plain one, by seed."""
    found = {}
    for seed, result in results.items():
        ds = result.dataset("hessian") if result.has("hessian") else xr.Dataset()
        if name in ds and ds.sizes["checkpoint"] > 1:
            found[seed] = float(ds[name].where(ds.iteration > 0).mean())
    return found


def claims(arms: Arms) -> list[Claim]:
    """The paper's two claims: fewer outliers, and a largest eigenvalue that is closer to the rest."""
    persistent, restart = arms.finished(PERSISTENT), arms.finished(RESTART)
    found = []
    for claim, name in (
        ("fewer outliers", "n_outliers"),
        ("log10 λ₁ is lower", "lambda_max"),
        ("log10 λ₁ / λ_C is lower", "class_ratio"),
    ):
        champion = _by_seed(persistent, name, False)
        for text, first, second in (
            ("champion − plain", champion, _by_seed(persistent, name, True)),
            ("champion − best restart", champion, _by_seed(restart, name, False)),
            ("mean persistent iteration − mean restart", _later(persistent, name), _later(restart, name)),
        ):
            pair = (first, second) if name == "n_outliers" else (_logs(first), _logs(second))
            difference, n = paired(*pair), len(pair[0].keys() & pair[1].keys())
            here, judged = with_interval(difference, signed=True), verdict(difference, -1)
            said = "yes" if text.endswith("plain") else "–"
            found.append(Claim(f"{text}: {claim}", said, here, str(n), judged, main=not text.endswith("best restart")))
    return found


def _ranks(arms: Arms) -> str:
    """How many plain restarts of the same seed have a smaller number than the champion."""
    persistent, restart = arms.finished(PERSISTENT), arms.finished(RESTART)
    rows = []
    for seed in sorted(persistent.keys() & restart.keys()):
        champion, control = persistent[seed], restart[seed]
        if not (champion.has("hessian") and control.has("hessian")):
            continue
        row = [f"seed {seed}", f"iteration {champion.champion}"]
        for name in _QUANTITIES:
            ds = control.dataset("hessian")
            others = ds[name].values if name in ds else np.array([])
            below, n = rank(value(champion, name, champion.champion), others)
            row.append(f"{below} of {n}" if n >= FEWEST else f"{below} of {n} (too few)")
        rows.append(row)
    if not rows:
        return ""
    text = "Plain restarts whose number is smaller than the champion's:"
    return f"{text}\n\n" + table(["", "champion", *_QUANTITIES.values()], rows)


def densities(arms: Arms) -> list[tuple[str, xr.Dataset]]:
    """The spectra of one seed of each arm, for the figure."""
    return [
        (arm, found[min(found)].dataset("hessian"))
        for arm in (PERSISTENT, RESTART)
        if (found := {seed: r for seed, r in arms.finished(arm).items() if r.has("hessian")})
    ]
