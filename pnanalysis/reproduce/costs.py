"""What the cells cost, and what is left: on a page of its own, as times differ between machines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from pnanalysis.reproduce.markdown import UNKNOWN as DASH
from pnanalysis.reproduce.markdown import table
from pnanalysis.reproduce.plan import Plan, duration


def costs(plan: Plan) -> str:
    """The page of costs."""
    rows = []
    for experiment in plan.experiments:
        cells = [cell for cell in plan.cells if cell.experiment == experiment]
        results = [plan.store.load(cell, plan.scale, plan.setting(experiment)) for cell in cells]
        done = [result for result in results if result is not None]
        spent: Counter[str] = Counter()
        machines = set()
        for result in done:
            spent.update({name: float(value) for name, value in result.record.get("cost", {}).items()})
            machines.add(f"{result.record.get('device_name') or result.record.get('device')}, "
                         f"{result.record.get('cores')} cores")  # fmt: skip
        times = [_known(spent, f"{name}_seconds", duration) for name in ("training", "measuring")]
        counts = [_known(spent, name, "{:,.0f}".format) for name in ("epochs", "products")]
        rows.append([experiment, f"{len(done)} of {len(cells)}", *times, *counts, "; ".join(sorted(machines)) or DASH])
    columns = ["experiment", "cells", "training", "measuring", "epochs", "products with Hessians", "hardware"]
    return (
        "# What the results cost\n\nWritten by `pnanalysis reproduce`, from the cells. Times are wall times of one "
        "process with one thread, summed over cells, beside whatever else the machine did.\n\n"
        + table(columns, rows) + "\n"
    )  # fmt: skip


def _known(spent: Counter[str], name: str, shown: Callable[[float], str]) -> str:
    """A sum as text, and a dash where no cell has noted it."""
    return shown(spent[name]) if name in spent else DASH


def write_costs(plan: Plan, path: Path) -> None:
    """Write that page."""
    path.write_text(costs(plan))
