"""Results of ``coverage.py`` as tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from true_values import BOUNDS

Results = dict[str, Any]
#: Numbers whose error does not include the choice of examples where that is told by forms.
_UNCOVERED = ("negative_mass", "negative_curvature")
_TEXT = """\
# Do the stated errors hold?

{command}. *held*: fraction of the repetitions in which a 95 % interval contains the true value: the worst spectrum,
which one that is, and the median over the spectra. *width*: mean half-width of the interval in units of 1.96 times the
root-mean-square error, 1 where it is just right: the widest spectrum and the median. Where *bound* is noted the
interval is a bound and not a statistical one: it may hold always, and be wide. *given*: how often there is an interval,
where that is not always.
"""


def table(results: Results, baseline: Results, gapless: set[str], command: str) -> list[str]:
    """All tables; with a baseline, its figures are in brackets."""
    lines = _TEXT.format(command=command).split("\n")
    if baseline:
        lines += ["In brackets: the earlier version.", ""]
    sections = {key.partition(": ")[0] for key in results}
    if "intervals" in sections:
        lines += _intervals(results, baseline)
        lines += _outliers(results, baseline, gapless)
        lines += _distances(results, baseline)
    lines += _blocks(results, "blocks", "Error of random signs")
    lines += _blocks(results, "block examples", "Differences of two disjoint sets of 512 examples")
    lines += _examples(results, baseline)
    if "null" in sections:
        lines += _null(results, baseline)
    return lines


def _select(results: Results, section: str) -> dict[tuple[str, str], Any]:
    """The cells of a section by subject and budget."""
    found = {}
    for key, result in results.items():
        name, _, rest = key.partition(": ")
        if name == section:
            subject, _, budget = rest.rpartition(": ")
            found[subject, budget] = result
    return found


def _budgets(selected: dict[tuple[str, str], Any]) -> list[str]:
    return list(dict.fromkeys(budget for _, budget in selected))


def _intervals(results: Results, baseline: Results) -> Iterator[str]:
    now, before = _select(results, "intervals"), _select(baseline, "intervals")
    budgets = _budgets(now)
    counts = {budget: sorted({cell["n"] for (_, b), cell in now.items() if b == budget}) for budget in budgets}
    repetitions = ", ".join(f"{budget}: {' to '.join(map(str, n[:: len(n) - 1 or 1]))}" for budget, n in counts.items())
    yield f"## Error of probes, {len({subject for subject, _ in now})} spectra (repetitions by products: {repetitions})"
    yield ""
    for budget in budgets:
        yield f"### {budget} products" if budget.isdigit() else "### Default budget"
        yield ""
        yield "| number | spectra | held, worst | | held, median | width, worst | median | given |"
        yield "|---" * 8 + "|"
        names = dict.fromkeys(name for (_, b), cell in now.items() if b == budget for name in cell["statistics"])
        for name in [*names, "density"]:
            yield _interval_row(name, _held_and_width(now, name, budget), _held_and_width(before, name, budget))
        yield ""


def _held_and_width(cells: dict[tuple[str, str], Any], name: str, budget: str) -> dict[str, list[float]]:
    """By spectrum: fraction held, width, and how often there is an interval."""
    if name == "density":
        return {subject: [cell["density"], np.nan, 1.0] for (subject, b), cell in cells.items() if b == budget}
    return {
        subject: cell["statistics"][name]
        for (subject, b), cell in cells.items()
        if b == budget and name in cell["statistics"]
    }


def _interval_row(name: str, now: dict[str, list[float]], before: dict[str, list[float]]) -> str:
    if not now:
        return f"| {name} | 0 | | | | | | |"
    summaries = [_summary(rows) for rows in (now, before)]
    worst = min(now, key=lambda subject: now[subject][0])
    columns = []
    for i, form in enumerate(("{:.0%}", "{:.0%}", "{:.2g}", "{:.2g}", "{:.0%}")):
        texts = ["" if np.isnan(row[i]) else form.format(row[i]) for row in summaries]
        columns.append(_beside(*texts))
    label = f"{name} (bound)" if name in BOUNDS else name
    return f"| {label} | {len(now)} | {columns[0]} | {worst} | " + " | ".join(columns[1:]) + " |"


def _summary(rows: dict[str, list[float]]) -> list[float]:
    """Worst and median fraction held, worst and median width, mean fraction with an interval."""
    if not rows:
        return [np.nan] * 5
    held, width, given = np.array(list(rows.values()), dtype=float).T
    width = width[np.isfinite(width)]
    widths = [width.max(), float(np.median(width))] if len(width) else [np.nan, np.nan]
    return [held.min(), float(np.median(held)), *widths, given.mean()]


def _beside(now: str, before: str) -> str:
    return f"{now} ({before})" if before else now


def _outliers(results: Results, baseline: Results, gapless: set[str]) -> Iterator[str]:
    now, before = _select(results, "intervals"), _select(baseline, "intervals")
    spikes, spikes_before = _select(results, "spikes"), _select(baseline, "spikes")
    budgets = _budgets(now | spikes)
    yield "## Outliers: fraction of repetitions with any on spectra without a gap, and with as many as there are spikes"
    yield ""
    yield "| spectrum | " + " | ".join(budgets) + " |"
    yield "|---" * (len(budgets) + 1) + "|"
    yield from _rows([name for name in _subjects(now) if name in gapless], budgets, now, before, "outliers")
    yield from _rows(_subjects(spikes), budgets, spikes, spikes_before, "found")
    yield ""


def _distances(results: Results, baseline: Results) -> Iterator[str]:
    now, before = _select(results, "intervals"), _select(baseline, "intervals")
    budgets = _budgets(now)
    yield "## W1 distance of two estimates of one matrix: mean over its stated noise, and fraction called beyond noise"
    yield ""
    yield "| spectrum | " + " | ".join(f"{budget}, ratio | beyond" for budget in budgets) + " |"
    yield "|---" * (2 * len(budgets) + 1) + "|"
    for subject in _subjects(now):
        columns = []
        for budget in budgets:
            for name, form in (("w1", "{:.2f}"), ("w1 beyond", "{:.0%}")):
                columns.append(_beside(*(_text(cells, (subject, budget), name, form) for cells in (now, before))))
        yield f"| {subject} | " + " | ".join(columns) + " |"
    yield ""


def _blocks(results: Results, section: str, what: str) -> Iterator[str]:
    """Numbers of single blocks: over all blocks, or pairs of them, of all networks."""
    cells = _select(results, section)
    if not cells:
        return
    n = " to ".join(map(str, sorted({cell["n"] for cell in cells.values()})))
    yield f"## {what}, all layers of {len(_subjects(cells))} networks by themselves ({n} repetitions)"
    yield ""
    yield "| number | products | blocks | held, worst | | held, all | width, worst | median | given |"
    yield "|---" * 9 + "|"
    for name in dict.fromkeys(name for cell in cells.values() for name in cell["statistics"]):
        for budget in _budgets(cells):
            rows = {subject: np.array(cell["statistics"][name], dtype=float)
                    for (subject, b), cell in cells.items() if b == budget}  # fmt: skip
            held, width, given = np.concatenate(list(rows.values()), axis=1)
            worst = min(rows, key=lambda subject: rows[subject][0].min())
            yield (
                f"| {name} | {budget} | {len(held)} | {held.min():.0%} | {worst} | "
                f"{np.average(held, weights=given):.1%} | "
                f"{width.max():.2g} | {np.median(width):.2g} | {given.mean():.0%} |"
            )
    yield ""


def _examples(results: Results, baseline: Results) -> Iterator[str]:
    for section, what in (("examples", "the error of examples"), ("groups", "half samples")):
        now, before = _select(results, section), _select(baseline, section)
        if not now:
            continue
        names = list(dict.fromkeys(name for cell in now.values() for name in cell["statistics"]))
        yield f"## Two disjoint sets of 512 examples, with {what}: fraction of differences beyond their 95 % interval"
        yield ""
        labels = [name + " (these examples)" * (section == "examples" and name in _UNCOVERED) for name in names]
        yield "| network | repetitions | " + " | ".join(labels) + " | W1 |"
        yield "|---" * (len(names) + 3) + "|"
        for (subject, budget), cell in now.items():
            columns = []
            for name in names:
                pair = (cells.get((subject, budget), {}).get("statistics", {}).get(name) for cells in (now, before))
                columns.append(_beside(*("" if row is None else f"{row[0]:.0%}" for row in pair)))
            columns.append(
                _beside(*(_text(cells, (subject, budget), "w1 beyond", "{:.0%}") for cells in (now, before)))
            )
            yield f"| {subject} | {cell['n']} | " + " | ".join(columns) + " |"
        totals = (_pooled(now, name) for name in [*names, "w1 beyond"])
        before_totals = (_pooled(before, name) for name in [*names, "w1 beyond"])
        columns = [_beside(*pair) for pair in zip(totals, before_totals, strict=True)]
        yield f"| all | {sum(cell['n'] for cell in now.values())} | " + " | ".join(columns) + " |"
        yield ""


def _pooled(cells: dict[tuple[str, str], Any], name: str) -> str:
    """Fraction beyond the interval over the repetitions of all networks."""
    found = [
        (cell["n"], cell[name] if name in cell else cell["statistics"][name][0])
        for cell in cells.values()
        if name in cell or name in cell["statistics"]
    ]
    return f"{sum(n * value for n, value in found) / sum(n for n, _ in found):.1%}" if found else ""


def _null(results: Results, baseline: Results) -> Iterator[str]:
    now, before = _select(results, "null"), _select(baseline, "null")
    yield "## Whole comparisons where nothing differs: fraction with any claim"
    yield ""
    yield "| pair | repetitions | any claim | rows |"
    yield "|---|---|---|---|"
    for (subject, budget), cell in now.items():
        any_claim = _beside(*(_text(cells, (subject, budget), "any", "{:.0%}") for cells in (now, before)))
        rows = ", ".join(f"{row} {count}" for row, count in cell["rows"].items())
        yield f"| {subject} | {cell['n']} | {any_claim} | {rows} |"
    yield ""


def _subjects(cells: dict[tuple[str, str], Any]) -> list[str]:
    return list(dict.fromkeys(subject for subject, _ in cells))


def _text(cells: dict[tuple[str, str], Any], key: tuple[str, str], name: str, form: str) -> str:
    value = cells.get(key, {}).get(name)
    return "" if value is None else form.format(value)


def _rows(
    subjects: Iterable[str], budgets: list[str], now: dict[tuple[str, str], Any], before: dict[tuple[str, str], Any],
    name: str,
) -> Iterator[str]:  # fmt: skip
    for subject in subjects:
        columns = [_beside(*(_text(cells, (subject, b), name, "{:.0%}") for cells in (now, before))) for b in budgets]
        yield f"| {subject} | " + " | ".join(columns) + " |"
