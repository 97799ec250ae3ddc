"""The summary: a table of plain model, champion and best restart, and sentences that claim no more than it supports."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import xarray as xr

from pnanalysis.analyses.diagnostics import estimate_of
from pnanalysis.analyses.matrix_names import matrix_name
from pnanalysis.analyses.significant_differences import with_p_values
from pnanalysis.analyses.verdict import verdict
from pnanalysis.estimates import Estimate, proportion
from pnanalysis.io.runs import Checkpoint, Run
from pnanalysis.report.datasets import Given, GivenDatasets, RunDatasets, Study, own_rows, studies
from pnanalysis.schema import error_kind


class _End(NamedTuple):
    """The end point of an iteration and the run that it belongs to."""

    datasets: RunDatasets
    checkpoint: Checkpoint


@dataclass(frozen=True)
class Row:
    """One end point in the table, or a network that belongs to no run: these have neither study nor iteration."""

    study: str
    name: str
    iteration: int | None
    loss: Estimate
    validation: Estimate
    test: Estimate
    lambda_max: Estimate
    trace: Estimate
    matrix: str = "Hessian"

    def cells(self) -> dict[str, str]:
        """Column title to printed value."""
        return {
            "network": f"{self.study}: {self.name}" if self.study else self.name,
            "iteration": "–" if self.iteration is None else str(self.iteration),
            "training loss": self.loss.text(),
            "validation error": self.validation.text(),
            "test error": self.test.text(),
            "lambda_max": self._of_matrix(self.lambda_max),
            "trace": self._of_matrix(self.trace),
        }

    def _of_matrix(self, estimate: Estimate) -> str:
        """The number, and which matrix it is of where that is not the Hessian."""
        is_plain = self.matrix == "Hessian" or math.isnan(estimate.value)
        return estimate.text() + ("" if is_plain else f" ({self.matrix})")


def summary_table(given: Sequence[Given]) -> list[dict[str, str]]:
    """The table as printed, a mapping from column title to text for each end point."""
    return cells(studies(given))


def cells(found: Sequence[Study]) -> list[dict[str, str]]:
    """The table as printed, without the columns that are for runs if there is no run."""
    table = [row for study in found for row in rows(study)]
    for_runs = {"iteration"} if all(row.iteration is None for row in table) else set()
    return [{title: text for title, text in row.cells().items() if title not in for_runs} for row in table]


def summary_sentences(given: Sequence[Given]) -> list[str]:
    """The table in words, as the report has them."""
    return [sentence for study in studies(given) for sentence in sentences(study)]


def rows(study: Study) -> list[Row]:
    """Plain model, champion and best restart of a study; the challenger where the champion is the plain model.

    Of datasets that belong to no run, every checkpoint.
    """
    main, control = study
    if isinstance(main, GivenDatasets):
        return network_rows(main)
    run, strategy = main.run, main.run.manifest.get("strategy", "")
    if strategy == "restart":
        table = [_row(main, "plain", run.plain), _row(main, "best restart", run.champion)]
    elif run.contenders[1] == "challenger":
        table = [
            _row(main, "plain, the champion", run.plain),
            _row(main, f"{run.challengers.removeprefix('the ')} ({strategy})", run.challenger),
        ]
    else:
        table = [_row(main, "plain", run.plain)]
        if len(run.ends) > 1:
            table.append(_row(main, f"champion ({strategy})", run.champion))
    if control is not None:
        table.append(_row(control, f"best of {len(control.run.ends)} restarts", control.run.champion))
    return table


def sentences(study: Study) -> Iterator[str]:
    """The table in words; what may be chance is called not significant."""
    main, control = study
    if isinstance(main, GivenDatasets):
        yield from network_sentences(main)
        return
    name, run = main.name, main.run
    plain, (best, role) = _End(main, run.plain), _best(main, run.contenders[1])
    is_other = best.checkpoint != plain.checkpoint
    if not math.isnan(_test_error(plain).value):
        if run.champion == run.plain:
            more = f"; {run.challengers} is compared with it" if is_other else ""
            yield f"{name}: the plain model has the lowest validation error of all iterations{more}."
        if is_other:
            yield (
                f"{name}: the test error of {role} (iteration {best.checkpoint.iteration}) differs from that of the "
                f"plain model by {_difference(plain, best)}."
            )
        if control is not None:
            best_restart = _End(control, control.run.champion)
            rival, rival_role = _best(main, run.champion_beside([control.run]))
            yield (
                f"{name}: the test error of the best of {len(control.run.ends)} restarts, which cost as much, differs "
                f"from that of {rival_role} by {_difference(rival, best_restart)}."
            )
    spectra = [_spectrum_at(end) for end in (plain, best)]
    if is_other and spectra[0] is not None and spectra[1] is not None:
        text = _spectrum_sentence(("the plain model", role), (spectra[0], spectra[1]))
        yield f"{name}: {text[0].lower()}{text[1:]}"


def network_rows(datasets: GivenDatasets) -> list[Row]:
    """The checkpoints of comparisons and spectra, with as much as these tell.

    The first of each are put together; those of further datasets have the dataset's name.
    """
    compared, curved = _of_kind(datasets, "comparison"), _of_kind(datasets, "hessian")
    (_, first), (_, spectra) = (next(iter(found.items()), ("", None)) for found in (compared, curved))
    rows = _rows_of(first, spectra)
    for found in (compared, curved):
        for key, ds in list(found.items())[1:]:
            own = _rows_of(ds, None) if found is compared else _rows_of(None, ds)
            rows += [replace(row, name=f"{row.name} ({key})") for row in own]
    return rows


def network_sentences(datasets: GivenDatasets) -> Iterator[str]:
    """What comparisons find; without one, the spectra of each network beside that of the first."""
    judged = [*_of_kind(datasets, "champion").values(), *_of_kind(datasets, "comparison").values()]
    for ds in judged:
        yield from verdict(ds)
    for spectra in () if judged else _of_kind(datasets, "hessian").values():
        (first, at_first), *others = _by_checkpoint(spectra).items()
        for name, at in others:
            yield _spectrum_sentence((first, name), (at_first, at))


def _of_kind(datasets: GivenDatasets, kind: str) -> dict[str, xr.Dataset]:
    """Those of a kind, without spectra of layers."""
    found = {key: ds for key, ds in datasets.readable().items() if ds.attrs.get("kind") == kind}
    return {key: ds for key, ds in found.items() if kind != "hessian" or "layer" not in ds.coords}


def _rows_of(comparison: xr.Dataset | None, spectra: xr.Dataset | None) -> list[Row]:
    compared, curved = ({} if ds is None else _by_checkpoint(ds) for ds in (comparison, spectra))
    nothing = xr.Dataset()
    rows = []
    for name in dict.fromkeys((*curved, *compared)):
        functions, curvature = compared.get(name, nothing), curved.get(name, compared.get(name, nothing))
        rows.append(
            Row(
                study="",
                name=name,
                iteration=None,
                loss=_at_split(functions, "loss", "train"),
                validation=_error_at(functions, "validation"),
                test=_error_at(functions, "test"),
                lambda_max=_number(curvature, "lambda_max"),
                trace=_number(curvature, "trace"),
                matrix=_matrix(curvature),
            )
        )
    return rows


def _by_checkpoint(ds: xr.Dataset) -> dict[str, xr.Dataset]:
    return {str(name): ds.isel(checkpoint=i) for i, name in enumerate(ds.checkpoint.values)}


def _matrix(at: xr.Dataset) -> str:
    """The matrix of a spectrum, or of the spectra of a comparison."""
    return matrix_name(at.attrs, "" if at.attrs.get("kind") == "hessian" else "hessian")


def _number(at: xr.Dataset, name: str) -> Estimate:
    return estimate_of(at, name) if name in at else Estimate(math.nan)


def _at_split(at: xr.Dataset, name: str, split: str) -> Estimate:
    if name not in at or split not in at.split.values:
        return Estimate(math.nan)
    return estimate_of(at.sel(split=split), name)


def _error_at(at: xr.Dataset, split: str) -> Estimate:
    """An error rate in per cent, or a squared error."""
    return replace(_at_split(at, "error", split), percent="classes" in at.attrs)


def _best(datasets: RunDatasets, name: str) -> tuple[_End, str]:
    """Champion or challenger of a run, and what sentences call it."""
    run = datasets.run
    if name == "challenger":
        return _End(datasets, run.challenger), run.challengers
    return _End(datasets, run.champion), "the champion"


def _row(datasets: RunDatasets, name: str, end: Checkpoint) -> Row:
    run = datasets.run
    last = run.history.isel(epoch=-1).sel(iteration=end.iteration)
    at = _spectrum_at(_End(datasets, end))
    return Row(
        study=datasets.name,
        name=name,
        iteration=end.iteration,
        loss=Estimate(float(last.train_loss)),
        validation=_error(run, float(last.validation_error), "validation"),
        test=_error(run, float(last.test_error), "test"),
        lambda_max=Estimate(math.nan) if at is None else estimate_of(at, "lambda_max"),
        trace=Estimate(math.nan) if at is None else estimate_of(at, "trace"),
        matrix="Hessian" if at is None else _matrix(at),
    )


def _test_error(end: _End) -> Estimate:
    run = end.datasets.run
    return _error(run, float(run.history.test_error.sel(iteration=end.checkpoint.iteration)[-1]), "test")


def _error(run: Run, value: float, split: str) -> Estimate:
    """An error rate with its binomial error, or a squared error, which has none."""
    n = int(run.history.attrs.get(f"n_{split}", 0))
    return proportion(value, n) if _is_error_rate(run) else Estimate(value)


def _is_error_rate(run: Run) -> bool:
    return error_kind(run.history) == "share"


def _difference(first: _End, other: _End) -> str:
    """Test error of the other minus that of the first, from paired predictions where these have been compared."""
    run = first.datasets.run
    paired = _paired_difference(first, other)
    if paired is not None:
        difference, n = paired
        subset = "" if n == run.history.attrs.get("n_test") else f", on {n} test examples"
        if _is_error_rate(run):
            return difference.in_points() + subset
        return f"{difference.text(signed=True)} ({difference.direction()}){subset}"
    unpaired = _test_error(other).minus(_test_error(first))
    if not _is_error_rate(run):
        return f"{unpaired.text(signed=True)} (squared error)"
    names = " ".join(dict.fromkeys(end.datasets.name for end in (first, other)))
    return f"{unpaired.in_points()}, with unpaired errors; pnanalysis compare {names} computes paired ones"


class _Paired(NamedTuple):
    difference: Estimate
    n: int


def _paired_difference(first: _End, other: _End) -> _Paired | None:
    """The difference of the test errors from a saved comparison that has both end points."""
    for holder in dict.fromkeys((first.datasets, other.datasets)):
        ds = holder.get("comparison")
        if ds is None or "test" not in ds.split.values:
            continue
        i, j = (_position_in(ds, holder, end) for end in (first, other))
        if i is not None and j is not None:
            at = with_p_values(ds).sel(split="test")
            difference = estimate_of(at.isel(checkpoint=j, other=i), "error_difference")
            return _Paired(difference, int(at.n_examples))
    return None


def _position_in(ds: xr.Dataset, holder: RunDatasets, end: _End) -> int | None:
    """Position of an end point along ``checkpoint`` of a comparison that is saved with the run ``holder``."""
    run, checkpoint = end.datasets.run, end.checkpoint
    is_holder = end.datasets is holder
    # the folder may have been renamed since: the dataset knows the name that its own run had
    folder = ds.attrs.get("run", holder.name) if is_holder else end.datasets.name
    roles = [role for role in {"champion", *run.contenders} if getattr(run, role) == checkpoint]
    own = [checkpoint.name, f"iter{checkpoint.iteration:02d}", *roles]
    # names without a folder belong to the holder: a comparison of one run has them
    names = {f"{folder}/{name}" for name in own} | set(own if is_holder else ())
    return next((i for i, label in enumerate(ds.checkpoint.values) if str(label) in names), None)


def _spectrum_at(end: _End) -> xr.Dataset | None:
    """The spectrum of the whole network at an end point, if it has been computed."""
    ds = end.datasets.get("hessian")
    if ds is None or "layer" in ds.coords:
        return None
    spectra = own_rows(end.datasets.run, ds)
    is_end = (spectra.iteration.values == end.checkpoint.iteration) & (spectra.epoch.values == end.checkpoint.epoch)
    return spectra.isel(checkpoint=int(np.argmax(is_end))) if is_end.any() else None


def _spectrum_sentence(names: tuple[str, str], spectra: tuple[xr.Dataset, xr.Dataset]) -> str:
    first, other = map(_matrix, spectra)
    if first != other:
        return f"The spectra of {' and '.join(names)} are of different matrices, {first} and {other}"
    top, trace = (" and ".join(estimate_of(at, number).text() for at in spectra) for number in ("lambda_max", "trace"))
    return (
        f"The largest {first} eigenvalues of {' and '.join(names)} are {top}, the traces {trace}. "
        f"{_outliers_in_words(spectra)}."
    )


def _outliers_in_words(spectra: Sequence[xr.Dataset]) -> str:
    """How far the largest eigenvalues of two spectra stand out."""
    counts = " and ".join(
        f"{int(at.n_outliers)} (p {float(at.outlier_p):.1g})" if at.n_outliers > 0 else "none, for want of a gap,"
        for at in spectra
    )
    text = f"Outliers are {counts.rstrip(',')}"
    if "n_classes" not in spectra[0].attrs or any(math.isnan(float(at.class_ratio)) for at in spectra):
        return text
    classes = int(spectra[0].attrs["n_classes"])
    ratios = " and ".join(f"{float(at.class_ratio):.3g}" for at in spectra)
    text += f"; lambda_1 / lambda_{classes}, of as many eigenvalues as there are classes, is {ratios}"
    if any(math.isnan(float(at.class_trace)) for at in spectra):
        return text
    parts = " and ".join(f"{100 * float(at.class_trace):.0f} %" for at in spectra)
    return f"{text}, and they make up {parts} of the trace"
