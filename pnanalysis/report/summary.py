"""What the numbers say: a table of plain, champion and best restart, and sentences that claim no more than it holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from pnanalysis.measured import Measured, share
from pnanalysis.runs import Run


@dataclass(frozen=True)
class Row:
    """One end point in the table."""

    study: str
    name: str
    iteration: int
    loss: Measured
    validation: Measured
    test: Measured
    lambda_max: Measured
    trace: Measured

    def cells(self) -> dict[str, str]:
        """Column title to printed value."""
        return {
            "network": f"{self.study}: {self.name}",
            "iteration": str(self.iteration),
            "training loss": self.loss.text(),
            "validation error": self.validation.text(percent=True),
            "test error": self.test.text(percent=True),
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
    """The table in words; a difference within two standard errors is called none that could be told."""
    said = []
    for run, control in studies(runs):
        plain = _row(run, "plain", 0)
        best = run.champion.iteration
        if not math.isnan(plain.test.value):
            if best == 0:
                said.append(f"{run.path.name}: the plain model has the lowest validation error of all iterations.")
            else:
                champion = _row(run, "champion", best)
                said.append(
                    f"{run.path.name}: the champion, iteration {best} of {len(run.ends)}, against the plain model: "
                    f"test error {champion.test.minus(plain.test).as_points()}."
                )
            if control is not None:
                restart = _row(control, "restart", control.champion.iteration)
                own = _row(run, "champion", best)
                said.append(
                    f"{run.path.name}: the best of {len(control.ends)} restarts, which cost as much, against the "
                    f"champion: test error {restart.test.minus(own.test).as_points()}."
                )
        spectrum = _spectra(run)
        if spectrum is not None and best:
            said.append(_spectrum_sentence(run, spectrum))
    return said


def _row(run: Run, name: str, iteration: int) -> Row:
    last = run.history.isel(epoch=-1).sel(iteration=iteration)
    sizes = {split: int(run.history.attrs.get(f"n_{split}", 0)) for split in ("validation", "test")}
    spectrum = _spectra(run)
    at = None
    if spectrum is not None:
        chosen = np.flatnonzero(spectrum.iteration.values == iteration)
        at = spectrum.isel(checkpoint=int(chosen[0])) if len(chosen) else None
    return Row(
        study=run.path.name,
        name=name,
        iteration=iteration,
        loss=Measured(float(last.train_loss)),
        validation=share(float(last.validation_error), sizes["validation"]),
        test=share(float(last.test_error), sizes["test"]),
        lambda_max=Measured(math.nan if at is None else float(at.lambda_max)),
        trace=Measured(math.nan) if at is None else Measured(float(at.trace), float(at.trace_se)),
    )


def _spectra(run: Run) -> xr.Dataset | None:
    results = run.results
    if "hessian" not in results.children:
        return None
    return results["hessian"].to_dataset()


def _spectrum_sentence(run: Run, spectrum: xr.Dataset) -> str:
    plain = spectrum.isel(checkpoint=int(np.flatnonzero(spectrum.iteration.values == 0)[0]))
    champion = spectrum.isel(checkpoint=int(np.flatnonzero(spectrum.iteration.values == run.champion.iteration)[0]))
    traces = " and ".join(f"{float(at.trace):.3g} ± {float(at.trace_se):.2g}" for at in (plain, champion))
    return (
        f"{run.path.name}: largest Hessian eigenvalue of plain and champion {float(plain.lambda_max):.3g} and "
        f"{float(champion.lambda_max):.3g}, trace {traces}, eigenvalues beyond the bulk {float(plain.n_outliers):.0f} "
        f"and {float(champion.n_outliers):.0f}."
    )


def _same_study(run: Run, control: Run) -> bool:
    same = ("recipe", "model", "data")
    return all(run.manifest.get(key) == control.manifest.get(key) for key in same)
