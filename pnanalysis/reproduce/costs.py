"""What the cells cost, and what is left: on a page of its own, as times differ between machines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from pnanalysis.checks import duration
from pnanalysis.reproduce.cells import Result
from pnanalysis.reproduce.markdown import UNKNOWN as DASH
from pnanalysis.reproduce.markdown import table
from pnanalysis.reproduce.plan import Plan
from pnanalysis.reproduce.settings import PERSISTENT, RESTART


def costs(plan: Plan) -> str:
    """The page of costs."""
    rows, total = [], Counter[str]()
    for experiment in plan.experiments:
        setting = plan.setting(experiment)
        for arm in (PERSISTENT, RESTART):
            cells = [cell for cell in plan.cells if (cell.experiment, cell.arm) == (experiment, arm)]
            if not cells:
                continue
            results = [plan.store.load(cell, plan.scale, setting) for cell in cells]
            done = [result for result in results if result is not None]
            spent: Counter[str] = Counter()
            for result in done:
                spent.update({name: float(value) for name, value in result.record.get("cost", {}).items()})
            total.update(spent)
            machines = "; ".join(sorted({_machine(result) for result in done})) or DASH
            rows.append([experiment, arm, f"{len(done)} of {len(cells)}", *_shown(spent), machines])
    rows.append(["all", "", f"{len(plan.cells) - len(plan.left())} of {len(plan.cells)}", *_shown(total), ""])
    columns = ["experiment", "arm", "cells", "training", "measuring", "epochs", "products with Hessians", "hardware"]
    return (
        "# What the results cost\n\nWritten by `pnanalysis reproduce`, from the cells. Times are wall times of one "
        "process with one thread, summed over cells, beside whatever else the machine did; a dash is for what a cell "
        "has not recorded.\n\n" + table(columns, rows) + "\n" + _of_chains(plan)
    )  # fmt: skip


def _of_chains(plan: Plan) -> str:
    """How much longer a training of a chain takes than a restart, where both have been timed."""
    rows = []
    for experiment in plan.experiments:
        setting = plan.setting(experiment)
        for variant in (name for name in setting.variants if {PERSISTENT, RESTART} <= set(setting.arms_of(name))):
            chains, restarts = (
                {result.cell.seed: _per_training(result) for result in plan.results(experiment, variant, arm)}
                for arm in (PERSISTENT, RESTART)
            )
            ratios = [chains[seed] / restarts[seed] for seed in chains.keys() & restarts.keys() if restarts[seed]]
            known = sorted(ratio for ratio in ratios if ratio > 0)
            if known:
                ends = f" ({known[0]:.2f} to {known[-1]:.2f})" if len(known) > 1 else ""
                name = " ".join(filter(None, (experiment, variant)))
                rows.append([name, f"{sum(known) / len(known):.2f}{ends}", str(len(known))])
    if not rows:
        return ""
    text = (
        "Arms of equal cost have as many trainings of the same length. A chain computes a penalty, too, of all earlier "
        "end points, which takes the more of a training the smaller the network is. Ratios are means over seeds, with "
        "the smallest and the largest; what else the machine did is in them."
    )
    return (
        f"\n## Chains beside restarts\n\n{text}\n\n"
        + table(["experiment", "time of a training, chain / restarts", "seeds"], rows)
        + "\n"
    )


def _per_training(result: Result) -> float:
    """Seconds of one of a cell's trainings; 0 where they are unknown."""
    seconds = float((result.record.get("cost") or {}).get("training_seconds") or 0.0)
    return seconds / float(result.record["options"].get("iterations") or 1)


def _machine(result: Result) -> str:
    record = result.record
    return f"{record.get('device_name') or record.get('device')}, {record.get('cores')} cores"


def _shown(spent: Counter[str]) -> list[str]:
    times = [_known(spent, f"{name}_seconds", duration) for name in ("training", "measuring")]
    return times + [_known(spent, name, "{:,.0f}".format) for name in ("epochs", "products")]


def _known(spent: Counter[str], name: str, shown: Callable[[float], str]) -> str:
    """A sum as text, and a dash where no cell has noted it."""
    return shown(spent[name]) if name in spent else DASH


def write_costs(plan: Plan, path: Path) -> None:
    """Write that page."""
    path.write_text(costs(plan))
