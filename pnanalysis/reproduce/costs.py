"""What the cells cost, and what is left: on a page of its own, as times differ between machines."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from pnanalysis.reproduce.markdown import table
from pnanalysis.reproduce.plan import Plan


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
        hours = [f"{spent[f'{name}_seconds'] / 3600:.2f}" for name in ("training", "measuring")]
        rows.append([experiment, f"{len(done)} of {len(cells)}", *hours, f"{spent['epochs']:,.0f}",
                     f"{spent['products']:,.0f}", "; ".join(sorted(machines)) or "–"])  # fmt: skip
    columns = ["experiment", "cells", "training, h", "measuring, h", "epochs", "products with Hessians", "hardware"]
    return (
        "# What the results cost\n\nWritten by `pnanalysis reproduce`, from the cells. Hours are of wall time of one "
        "process with one thread, beside whatever else the machine did.\n\n" + table(columns, rows) + "\n"
    )


def write_costs(plan: Plan, path: Path) -> None:
    """Write that page."""
    path.write_text(costs(plan))
