"""Which diagnostics go with generalisation over the runs of a sweep: rank correlations with errors."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from pnanalysis import schema
from pnanalysis.analyses.rank_correlation import conditional_information, granulated, tau_with_errors
from pnanalysis.analyses.run_diagnostics import GAP, MEANING, SIZES, file_beside, has_saved, run_diagnostics
from pnanalysis.analyses.work_folder import remove_unfinished
from pnanalysis.arrays import Array
from pnanalysis.checks import at_least, check_seed, one_of
from pnanalysis.errors import RunError
from pnanalysis.inputs.data import DataLike
from pnanalysis.inputs.networks import is_path
from pnanalysis.inputs.selection import distinct_labels, flattened
from pnanalysis.io.collection import differing_settings
from pnanalysis.io.datasets import save
from pnanalysis.io.runs import ANALYSIS, MANIFEST, Run, open_run
from pnanalysis.significance import holm
from pnanalysis.terminal.progress import progress_bar

#: With fewer runs there is nothing to tell chance from.
FEWEST_RUNS = 4
#: What makes datasets that are not called like the function.
_MADE_BY = {"barrier": "pn.landscape", "curvature_monitor": "pntrain --curvature"}
#: Settings that only draw other random numbers: runs that differ in nothing else are repetitions.
_REPETITIONS = ("seed",)


@dataclass(frozen=True)
class RunTable:
    """Numbers of several runs.

    Attributes
    ----------
    runs : list of str
    value, se : mapping of str to ndarray, shape (n,)
        By diagnostic; NaN where a run lacks it.
    kind : mapping of str to str
        What each diagnostic is from.
    settings : mapping of str to list
        Those in which runs differ.
    main : frozenset of str or None
        Diagnostics that count where none are chosen; ``None`` for all.
    """

    runs: list[str]
    value: Mapping[str, Array]
    se: Mapping[str, Array]
    kind: Mapping[str, str]
    settings: Mapping[str, list[Any]]
    main: frozenset[str] | None = None


def correlate(
    *given: Any,
    target: str = "test_error",
    diagnostics: Sequence[str] | None = None,
    checkpoint: str = "champion",
    axes: Sequence[str] | None = None,
    compute: Sequence[str] = (),
    data: DataLike | None = None,
    n_bootstrap: int = 2000,
    device: str | None = "cpu",
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    r"""Rank correlations of every diagnostic with generalisation, over the runs of a sweep.

    Parameters
    ----------
    *given : path, Run, or sequence or mapping of these; or a pandas.DataFrame
        A folder of runs, as ``pntrain --sweep`` writes it, or at least four runs. Of networks in memory, a table: a
        row for each, with a column for each diagnostic, ``NAME_se`` for its standard error and, where ``axes`` names
        them, for each setting.
    target : str
        ``test_error``, ``validation_error``, ``train_error``, ``train_loss``, ``generalization_gap`` (test less
        training error), or any diagnostic.
    diagnostics : sequence of str, optional
        Those that count, by name or the beginning of it (``rise ball``), or by the kind of their dataset (``hessian``).
        By default all that at least four of the runs have stored, but of rises that in the middle of several radii, and
        of errors that on the training set.
    checkpoint : str
        Which one of each run: see :meth:`pnanalysis.io.runs.Run.select`.
    axes : sequence of str, optional
        Settings for the coefficients by settings; by default all in which the runs differ but ``seed``. Of a table,
        the columns that are settings; its column ``seed``, if it has one, numbers repetitions.
    compute : sequence of str
        Analyses (``hessian``, ``eigenpairs``, ``blocks``, ``sharpness``, ``saturation``, ``learning_coefficient``) to
        run first, with their defaults (``eigenpairs`` without vectors), where they are not stored of the
        ``checkpoint``; they are saved with the runs, beside what is there of other checkpoints. Nothing is computed by
        default. An interrupted call leaves its unfinished work beside them, in a folder ``NAME.correlate.unfinished``
        that the same call continues from.
    data : optional
        For these, where a run does not know its own.
    n_bootstrap : int
        Resamples of the runs.
    device : str or None
    seed : int
        Of the resamples.
    progress : bool

    Returns
    -------
    xarray.Dataset
        Kind ``correlation``, dims ``diagnostic``, ``run`` and ``axis``.

        - ``tau``: Kendall's tau-b with the target, its standard error and 95 % interval over runs, and its two-sided
          p-values: ``tau_p_single``, and ``tau_p`` after Holm's step-down for all diagnostics;
        - ``tau_noise_se`` and ``tau_shift``: the scatter of tau, and its mean change, if the diagnostics and the target
          are drawn again with their own standard errors. Tau is too near zero by about the latter;
        - ``psi``: tau among runs that differ in one setting only, averaged over their groups and over settings [1]_,
          with an interval; ``psi_axis`` that of each setting;
        - ``information``: what the order of two runs by the diagnostic tells about that by the target, beyond what two
          settings tell, from 0 to 1 [1]_;
        - ``value`` (diagnostic, run) and ``target`` (run), with their errors.

    Raises
    ------
    RunError
        If there are fewer than four runs with the target, it is the same in all, or none of the diagnostics is there.

    Warns
    -----
    UserWarning
        If a run's saved analysis cannot be read, or is of other checkpoints.

    Notes
    -----
    Runs are taken as a random sample of such runs. Correlations over a grid hold for this grid: a setting that changes
    the diagnostic and the target makes a correlation without either causing the other, which ``psi`` and
    ``information`` look behind.

    The interval is that of a normal distribution on the scale of the inverse hyperbolic tangent. Its variance is a sum
    of those of taus of resampled runs, and of taus of the same runs with numbers drawn again with their errors. It is
    on the safe side, for resampled runs hold their errors already.

    References
    ----------
    .. [1] Y. Jiang, B. Neyshabur, H. Mobahi, D. Krishnan, S. Bengio, "Fantastic Generalization Measures and Where to
       Find Them", ICLR 2020, arXiv:1912.02178.

    Examples
    --------
    >>> import pandas as pd
    >>> table = pd.DataFrame({"sharpness": [1.0, 3.0, 2.0, 5.0, 4.0], "test_error": [0.1, 0.2, 0.15, 0.4, 0.5]})
    >>> round(correlate(table).tau.item(), 2)
    0.8
    """
    at_least(20, n_bootstrap=n_bootstrap)
    check_seed(seed=seed)
    for name in compute:
        one_of(_analyses(), compute=name)
    if len(given) == 1 and isinstance(given[0], pd.DataFrame):
        table = _from_frame(given[0], axes or ())
    else:
        runs = _opened(given)
        _compute_missing(runs, compute, checkpoint, data, device, seed, progress)
        table = _from_runs(runs, checkpoint)
    goal, goal_se = _target(table, target)
    chosen = _chosen(table, target, diagnostics)
    own_axes = _axes(table, axes)
    rows = []
    with progress_bar("correlations", len(chosen), progress) as advance:
        for name in chosen:
            rows.append(_row(table, name, (goal, goal_se), own_axes, n_bootstrap, seed))
            advance(text=name)
    ds = xr.concat(rows, "diagnostic").assign(
        target=("run", goal), target_se=("run", goal_se),
        value=(("diagnostic", "run"), np.stack([table.value[name] for name in chosen])),
        value_se=(("diagnostic", "run"), np.stack([table.se[name] for name in chosen])),
    )  # fmt: skip
    ds["tau_p"] = ("diagnostic", holm(ds.tau_p_single.values))
    ds["target"].attrs["long_name"] = target.replace("_", " ")
    coords: dict[str, Any] = {f"{name}_setting": ("run", _column(values)) for name, values in table.settings.items()}
    ds = ds.assign_coords(
        diagnostic=chosen, run=table.runs, axis=own_axes, source=("diagnostic", [table.kind[name] for name in chosen]),
        **coords,
    )  # fmt: skip
    return schema.finish(
        ds, "correlation", target_name=target, checkpoint=checkpoint, n_runs=int(np.isfinite(goal).sum()),
        n_bootstrap=n_bootstrap, seed=seed,
    )  # fmt: skip


def _row(
    table: RunTable, name: str, target: tuple[Array, Array], axes: Sequence[str], n_bootstrap: int, seed: int
) -> xr.Dataset:
    """All coefficients of one diagnostic, over the runs that have it."""
    known = np.isfinite(table.value[name]) & np.isfinite(target[0])
    x, y, x_se, y_se = (v[known] for v in (table.value[name], target[0], table.se[name], target[1]))
    settings = {key: [v for v, there in zip(values, known, strict=True) if there]
                for key, values in table.settings.items()}  # fmt: skip
    tau = tau_with_errors(x, y, x_se, y_se, n_bootstrap, seed)
    psi = granulated(x, y, settings, axes, n_bootstrap, seed)
    return xr.Dataset(
        {
            "tau": tau.value, "tau_se": tau.se, "tau_low": tau.low, "tau_high": tau.high, "tau_p_single": tau.p,
            "tau_noise_se": tau.noise_se, "tau_shift": tau.shift, "psi": psi.value, "psi_low": psi.low,
            "psi_high": psi.high, "psi_axis": ("axis", psi.of_axis), "n_runs": float(known.sum()),
            "information": conditional_information(x, y, settings, axes),
        }
    )  # fmt: skip


def _opened(given: Iterable[Any]) -> list[Run]:
    """Runs, with those of folders in place of the folders."""
    runs: list[Run] = []
    for _, item in flattened(given):
        if isinstance(item, Run):
            runs.append(item)
        elif not is_path(item):
            raise RunError(
                f"a {type(item).__name__} is no run; give runs, a folder of runs, or a table (pandas.DataFrame) with a "
                "row for each network"
            )
        elif (Path(item) / MANIFEST).exists() or not Path(item).is_dir():
            runs.append(open_run(item))
        else:
            inside = sorted(Path(item).glob(f"*/{MANIFEST}"))
            if not inside:
                raise RunError(f"{os.fspath(item)}: holds no runs; name the folder whose subfolders are the runs")
            runs += [open_run(path.parent) for path in inside]
    return runs


def _from_runs(runs: Sequence[Run], checkpoint: str) -> RunTable:
    """The stored numbers of runs that have finished at least one iteration."""
    finished = [run for run in runs if run.manifest["ends"]]
    if len(finished) < FEWEST_RUNS:
        raise _too_few(len(finished), "that have finished")
    rows, names = [], distinct_labels([run.path.name for run in finished])
    lacking: dict[str, list[str]] = {}
    settings: dict[str, dict[str, dict[str, str]]] = {}
    for name, run in zip(names, finished, strict=True):
        (found,) = run.select([checkpoint]).values()
        stored = run_diagnostics(run, found)
        rows.append(stored.numbers)
        for kind, own in stored.settings.items():
            settings.setdefault(kind, {})[name] = own
        for kind, problem in stored.problems.items():
            if problem:
                warnings.warn(f"{name} counts without its {kind}: {problem}", stacklevel=3)
            else:
                lacking.setdefault(kind, []).append(name)
    for kind, without in lacking.items():
        advice = f"add it with {_MADE_BY.get(kind, f'pn.{kind}')}"
        if kind in _analyses():
            advice = f"compute={[kind]} (--compute {kind}) adds it"
        warnings.warn(
            f"the saved {kind} of {len(without)} of {len(finished)} runs is not of the {checkpoint} "
            f"({', '.join(without[:3])}{', ...' if len(without) > 3 else ''}), so that they count without it; {advice}",
            stacklevel=3,
        )
    for kind, by_run in settings.items():
        _check_one_quantity(kind, by_run)
    kinds = {name: number.kind for row in rows for name, number in row.items()}
    value = {name: np.array([row[name].value if name in row else np.nan for row in rows]) for name in kinds}
    se = {name: np.array([row[name].se if name in row else np.nan for row in rows]) for name in kinds}
    main = frozenset(name for row in rows for name, number in row.items() if number.is_main)
    return RunTable(names, value, se, kinds, differing_settings(finished), main)


def _check_one_quantity(kind: str, settings: Mapping[str, Mapping[str, str]]) -> None:
    """Refuse to rank numbers of different matrices, and warn of those of different numbers of examples.

    Parameters
    ----------
    kind : str
    settings : mapping
        What the datasets of this kind were made with, by run.

    Raises
    ------
    RunError
    """
    for name in (*MEANING, *SIZES):
        runs: dict[str, str] = {}  # the first run of each value
        for run, own in settings.items():
            runs.setdefault(own.get(name, "none"), run)
        if len(runs) < 2:
            continue
        (one, first), (other, second), *_ = runs.items()
        found = f"the saved {kind} of {first} has {name} {one}, that of {second} {other}"
        if name in MEANING:
            raise RunError(
                f"{found}: they are numbers of different quantities, which cannot be ranked; make them anew with the "
                "same settings, or move the files of some away"
            )
        warnings.warn(f"{found}: differences between runs may be due to that", stacklevel=4)


def _from_frame(frame: pd.DataFrame, axes: Sequence[str]) -> RunTable:
    """A user's own table, in which a column of repetitions is a setting that is no axis."""
    frame, axes = frame.rename(columns=str), list(map(str, axes))
    missing = [name for name in axes if name not in frame]
    if missing:
        raise RunError(f"the table has no column {missing[0]!r}; it has {', '.join(frame.columns)}")
    settings = [*axes, *(name for name in _REPETITIONS if name in frame and name not in axes)]
    numeric = frame.drop(columns=settings).select_dtypes("number").astype(float)
    names = [name for name in numeric.columns if not (name.endswith("_se") and name[:-3] in numeric)]
    value = {name: numeric[name].to_numpy() for name in names}
    unknown = np.full(len(frame), np.nan)
    se = {name: numeric[f"{name}_se"].to_numpy() if f"{name}_se" in numeric else unknown for name in names}
    labels = distinct_labels([str(label) for label in frame.index])
    return RunTable(labels, value, se, dict.fromkeys(names, "table"), {name: list(frame[name]) for name in settings})


def _target(table: RunTable, target: str) -> tuple[Array, Array]:
    if target not in table.value:
        advice = " (runs of this version record training errors)" if target in (GAP, "train_error") else ""
        raise RunError(f"no run has stored {target}{advice}; there are {', '.join(sorted(table.value)) or 'none'}")
    values = table.value[target]
    known = values[np.isfinite(values)]
    if len(known) < FEWEST_RUNS:
        raise _too_few(len(known), f"with a {target}")
    if np.ptp(known) == 0:
        raise RunError(
            f"{target} is {known[0]:.4g} in all {len(known)} runs, so nothing can go with it; choose another"
        )
    return values, table.se[target]


def _too_few(n: int, which: str) -> RunError:
    return RunError(
        f"there are {n} runs {which}, and fewer than {FEWEST_RUNS} have no rank correlation to speak of; train more, "
        "such as pntrain RECIPE --sweep seed=0:5"
    )


def _chosen(table: RunTable, target: str, wanted: Sequence[str] | None) -> list[str]:
    """The diagnostics that count, in the order of their kinds."""
    goal = np.isfinite(table.value[target])
    left_out = {target} if wanted is not None else {target, "test_error", "validation_error", GAP}
    if wanted is None and table.main is not None:
        left_out |= table.value.keys() - table.main
    usable = []
    for name, values in table.value.items():
        known = values[np.isfinite(values) & goal]
        if name not in left_out and len(known) >= FEWEST_RUNS and np.ptp(known) > 0:
            usable.append(name)
    if wanted is not None:
        for one in [wanted] if isinstance(wanted, str) else wanted:
            if not any(_is_meant(one, name, table.kind[name]) for name in usable):
                raise RunError(
                    f"fewer than {FEWEST_RUNS} runs have different values of {one!r}; there are "
                    f"{', '.join(usable) or 'none'}"
                )
        asked = [wanted] if isinstance(wanted, str) else list(wanted)
        usable = [name for name in usable if any(_is_meant(one, name, table.kind[name]) for one in asked)]
    if not usable:
        raise RunError(
            "the runs have no diagnostics to correlate; run analyses on each first, such as pnanalysis hessian RUN, or "
            f"compute them now (--compute {' or '.join(_analyses())})"
        )
    return usable


def _is_meant(wanted: str, name: str, kind: str) -> bool:
    return wanted in (name, kind) or name.startswith(f"{wanted} ")


def _axes(table: RunTable, axes: Sequence[str] | None) -> list[str]:
    if axes is None:
        return [name for name in table.settings if name not in _REPETITIONS]
    unknown = [name for name in axes if name not in table.settings]
    if unknown:
        there = ", ".join(table.settings) or "none"
        raise RunError(f"the runs do not differ in {unknown[0]!r}; the settings that differ are {there}")
    return list(axes)


def _column(values: Sequence[Any]) -> Array | list[str]:
    """Settings as numbers where they are."""
    if all(isinstance(value, int | float) for value in values):
        return np.array(values, dtype=float)
    return [str(value) for value in values]


def _analyses() -> dict[str, Callable[..., xr.Dataset]]:
    """Analyses that can be asked for, by the kind of their dataset."""
    from pnanalysis.analyses.blocks import blocks
    from pnanalysis.analyses.eigenpairs import eigenpairs
    from pnanalysis.analyses.hessian import hessian
    from pnanalysis.analyses.learning_coefficient import learning_coefficient
    from pnanalysis.analyses.saturation import saturation
    from pnanalysis.analyses.sharpness import sharpness

    return {
        "hessian": hessian, "eigenpairs": eigenpairs, "blocks": blocks, "sharpness": sharpness,
        "saturation": saturation, "learning_coefficient": learning_coefficient,
    }  # fmt: skip


def _compute_missing(
    runs: Sequence[Run], kinds: Sequence[str], checkpoint: str, data: DataLike | None, device: str | None, seed: int,
    progress: bool,
) -> None:  # fmt: skip
    """Run analyses whose results are not stored, and save them: what is done is never done again.

    A dataset of other checkpoints stays as it is, whatever the settings that it was made with: the missing one is saved
    beside it, and so is unfinished work, apart from that of the analysis itself, which may have other settings.
    """
    for kind in [kinds] if isinstance(kinds, str) else kinds:
        analyse = _analyses()[kind]
        takes = signature(analyse).parameters
        for run in runs:
            if not run.manifest["ends"]:
                continue
            (wanted,) = run.select([checkpoint]).values()
            if has_saved(run, kind, wanted):
                continue
            stem = file_beside(kind, wanted) if kind in run.files else kind
            folder = run.path / ANALYSIS / f"{stem}.correlate.unfinished"
            own = {"checkpoints": (checkpoint,), "vectors": False, "state": folder}
            options = {name: value for name, value in own.items() if name in takes}
            if kind == "saturation":  # of all checkpoints, in one pass
                del options["checkpoints"]
            ds = analyse(run, data=data, device=device, seed=seed, progress=progress, **options)
            save(ds, run.path / ANALYSIS / f"{stem}.nc")
            if "state" in takes:
                remove_unfinished(folder)
