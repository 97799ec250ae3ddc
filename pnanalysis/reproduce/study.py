"""A whole study: make the cells that are missing, then write tables and figures from all that are there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import joblib

from pnanalysis.checks import at_least
from pnanalysis.inputs.sources import resolve_device
from pnanalysis.reproduce.page import write_page
from pnanalysis.reproduce.plan import chosen_cells, make_plan
from pnanalysis.reproduce.running import Worker, run_cells
from pnanalysis.reproduce.settings import SCALES


def reproduce(
    experiments: Sequence[str],
    scale: str,
    out: Path,
    *,
    seeds: int | None = None,
    data: str | None = None,
    work: Path | None = None,
    jobs: int | None = None,
    minutes: float | None = None,
    only: Iterable[str] = (),
    train: bool = True,
    page: Path | None = None,
    keep: bool = False,
    device: str = "auto",
    log: Callable[[str], None] = print,
) -> Path:
    """Run experiments at a scale, and write the page of results.

    Parameters
    ----------
    experiments : sequence of str
        ``S1`` to ``S9``, ``S9-sweep``, or ``all``.
    scale : {"smoke", "cpu", "paper"}
    out : Path
        Folder of the results.
    seeds : int, optional
    data : str, optional
        In place of the scale's.
    work : Path, optional
        Folder of the trainings, ``out/work`` by default.
    jobs : int, optional
        Trainings at a time.
    minutes : float, optional
        Stop after so long.
    only : iterable of str
        Ids of the cells to make; all by default.
    train : bool
        Whether to make cells at all.
    page : Path, optional
        ``out/RESULTS.md`` by default.
    keep : bool
        Keep trainings whose cell is done.
    device : str
    log : callable
        Receives lines about the progress.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    PnError
        If a name is unknown, or cells could not be made.
    """
    plan = make_plan(experiments, scale, seeds, out)
    at_least(1, jobs=jobs)
    plan.check()
    page = page or out / "RESULTS.md"
    if not train:
        return write_page(plan, page)
    jobs = jobs or default_jobs(device)
    worker = Worker(plan, data or SCALES[scale].data, work or out / "work", device, keep)
    try:
        run_cells(plan, chosen_cells(plan, only), worker, jobs=jobs, minutes=minutes, log=log)
    finally:
        write_page(plan, page)
    return page


def default_jobs(device: str) -> int:
    """One per core, or a single one on a GPU."""
    return 1 if resolve_device(device).type == "cuda" else joblib.cpu_count()
