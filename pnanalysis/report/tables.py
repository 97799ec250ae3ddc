"""What the numbers say: a table of plain, champion and best restart, and sentences that claim no more than it holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from pnanalysis.analyses.history import error_kind
from pnanalysis.analyses.verdict import measured
from pnanalysis.estimates import Estimate, proportion
from pnanalysis.io.runs import Checkpoint, Run
from pnanalysis.report.datasets import dataset, own_rows

_End = tuple[Run, Checkpoint]


@dataclass(frozen=True)
class Row:
    """One end point in the table."""

    study: str
    name: str
    iteration: int
    loss: Estimate
    validation: Estimate
    test: Estimate
    lambda_max: Estimate
    trace: Estimate

    def cells(self) -> dict[str, str]:
        """Column title to printed value."""
        return {
            "network": f"{self.study}: {self.name}",
            "iteration": str(self.iteration),
            "training loss": self.loss.text(),
            "validation error": self.validation.text(),
            "test error": self.test.text(),
            "lambda_max": self.lambda_max.text(),
            "trace": self.trace.text(),
        }


def studies(runs: Sequence[Run]) -> list[tuple[Run, Run | None]]:
    """Each run with its restart control: the restart run of the same model, data and recipe, where one is given."""
    controls = [run for run in runs if run.manifest.get("strategy") == "restart"]
    others = [run for run in runs if run not in controls]
    paired = [(run, next((c for c in controls if _same_study(run, c)), None)) for run in others]
    lonely = [(c, None) for c in controls if all(c is not control for _, control in paired)]
    return paired + lonely


def rows(runs: Sequence[Run]) -> list[Row]:
    """Plain, champion and best restart of every study."""
    table = []
    for run, control in studies(runs):
        strategy = run.manifest.get("strategy", "")
        table.append(_row(run, "plain", 0))
        if strategy == "restart":
            table.append(_row(run, "best restart", run.champion.iteration))
        elif len(run.ends) > 1:
            table.append(_row(run, f"champion ({strategy})", run.champion.iteration))
        if control is not None:
            table.append(_row(control, f"best of {len(control.ends)} restarts", control.champion.iteration))
    return table


def summary_table(runs: Sequence[Run]) -> list[dict[str, str]]:
    """The table as printed, a mapping from column title to text for each end point."""
    return [row.cells() for row in rows(runs)]


def sentences(runs: Sequence[Run]) -> list[str]:
    """The table in words; a difference within two standard errors is called not significant."""
    said = []
    for run, control in studies(runs):
        plain = _row(run, "plain", 0)
        best = run.champion.iteration
        if not math.isnan(plain.test.value):
            if best == 0:
                said.append(f"{run.path.name}: the plain model has the lowest validation error of all iterations.")
            else:
                ends = (run, run.plain), (run, run.champion)
                said.append(
                    f"{run.path.name}: the champion, iteration {best}, against the plain model: "
                    f"test error {_difference(*ends)}."
                )
            if control is not None:
                ends = (run, run.champion), (control, control.champion)
                said.append(
                    f"{run.path.name}: the best of {len(control.ends)} restarts, which cost as much, against the "
                    f"champion: test error {_difference(*ends)}."
                )
        spectra = _spectra(run)
        of_plain, of_champion = (_at_end(spectra, end) for end in (run.plain, run.champion))
        if of_plain is not None and of_champion is not None and best:
            said.append(_spectrum_sentence(run, of_plain, of_champion))
    return said


def _row(run: Run, name: str, iteration: int) -> Row:
    last = run.history.isel(epoch=-1).sel(iteration=iteration)
    sizes = {split: int(run.history.attrs.get(f"n_{split}", 0)) for split in ("validation", "test")}
    at = _at_end(_spectra(run), run.ends[iteration])
    return Row(
        study=run.path.name,
        name=name,
        iteration=iteration,
        loss=Estimate(float(last.train_loss)),
        validation=_error(run, float(last.validation_error), sizes["validation"]),
        test=_error(run, float(last.test_error), sizes["test"]),
        lambda_max=Estimate(math.nan if at is None else float(at.lambda_max)),
        trace=Estimate(math.nan) if at is None else Estimate(float(at.trace), float(at.trace_se)),
    )


def _error(run: Run, value: float, n: int) -> Estimate:
    """A share of n examples, in per cent, or a squared error."""
    shares = error_kind(run.history) == "share"
    return proportion(value, n) if shares else Estimate(value)


def _difference(first: _End, other: _End) -> str:
    """Test error of the other minus that of the first: by pairs of predictions where these have been compared."""
    for run in dict.fromkeys((first[0], other[0])):
        ds = dataset(run, "comparison")
        if ds is None or "test" not in ds.split.values:
            continue
        i, j = (_place(ds, run, *end) for end in (first, other))
        if i is not None and j is not None:
            at = measured(ds.sel(split="test").isel(checkpoint=j, other=i), "error_difference")
            n = int(ds.n_examples.sel(split="test"))
            some = "" if n == first[0].history.attrs.get("n_test") else f", on {n} test examples"
            sigmas = float(ds.attrs["sigmas"])
            if error_kind(first[0].history) == "share":
                return at.in_points(sigmas) + some
            return f"{at.text(signed=True)} ({at.direction(sigmas)}){some}"
    one, two = (_row(run, "", checkpoint.iteration).test for run, checkpoint in (first, other))
    if error_kind(first[0].history) != "share":
        return f"{two.minus(one).text(signed=True)} (squared error)"
    names = " ".join(dict.fromkeys(run.path.name for run in (first[0], other[0])))
    return f"{two.minus(one).in_points()}, by unpaired errors; pnanalysis compare {names} gives the paired one"


def _place(ds: xr.Dataset, holder: Run, run: Run, end: Checkpoint) -> int | None:
    """Where a comparison that is saved with the run ``holder`` has an end point."""
    folder = ds.attrs.get("run", holder.path.name) if run is holder else run.path.name
    own = [end.name, f"iter{end.iteration:02d}", *(name for name in ("plain", "champion") if getattr(run, name) == end)]
    names = {f"{folder}/{name}" for name in own} | set(own if run is holder else ())
    return next((i for i, label in enumerate(ds.checkpoint.values) if str(label) in names), None)


def _spectra(run: Run) -> xr.Dataset | None:
    """The run's own whole spectra."""
    ds = dataset(run, "hessian")
    return None if ds is None or "layer" in ds.coords else own_rows(run, ds)


def _at_end(spectrum: xr.Dataset | None, end: Checkpoint) -> xr.Dataset | None:
    """The spectrum at an end point, where there is one."""
    if spectrum is None:
        return None
    chosen = np.flatnonzero((spectrum.iteration.values == end.iteration) & (spectrum.epoch.values == end.epoch))
    return spectrum.isel(checkpoint=int(chosen[0])) if len(chosen) else None


def _spectrum_sentence(run: Run, plain: xr.Dataset, champion: xr.Dataset) -> str:
    traces = " and ".join(f"{float(at.trace):.3g} ± {float(at.trace_se):.2g}" for at in (plain, champion))
    return (
        f"{run.path.name}: largest Hessian eigenvalue of plain and champion {float(plain.lambda_max):.3g} and "
        f"{float(champion.lambda_max):.3g}, trace {traces}."
    )


def _same_study(run: Run, control: Run) -> bool:
    same = ("recipe", "model", "data")
    return all(run.manifest.get(key) == control.manifest.get(key) for key in same)
