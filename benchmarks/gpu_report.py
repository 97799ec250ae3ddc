"""What ``gpu.py`` has found: merged with what was found before, judged, and written as JSON, table and figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pnanalysis.errors import PnError
from pnanalysis.io.atomic import atomic_path

Row = dict[str, Any]
#: What says which measurement a row is.
_IDENTITY = ("what", "package", "arithmetic")
#: Columns of rows that are for a figure.
_DRAWN = ("eigenvalue", "density")
#: Times that products of ResNet-18 are to be faster than PyHessian's, and the time of a step with a penalty at most.
PYHESSIAN_TIMES, PENALTY_RATIO = 5.0, 1.05
_OURS, _THEIRS = "pnanalysis, compiled", "curvlinops, compiled"


def stored(output: Path, environment: Row) -> dict[str, Any]:
    """What was found before in this environment; nothing of another one, whose numbers must not stand beside these.

    Raises
    ------
    PnError
        If the file is not one of ``gpu.py``.
    """
    path = output.with_suffix(".json")
    nothing: dict[str, Any] = {"environment": environment, "stages": {}}
    try:
        found = json.loads(path.read_text())
        same = found["environment"] == environment
        stages = {stage: [dict(row) for row in rows] for stage, rows in found["stages"].items()}
    except FileNotFoundError:
        return nothing
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        raise PnError(f"{path} is no file of results of gpu.py; move it away, or give another --output") from None
    return {"environment": environment, "stages": stages} if same else nothing


def begin(stages: dict[str, list[Row]], stage: str) -> None:
    """Forget how a stage ended before it was done, and the outcomes of earlier tests."""
    stages[stage] = [row for row in stages.get(stage, []) if stage != "tests" and row["what"] != unfinished(stage)]


def unfinished(stage: str) -> str:
    """What the row is of that says how a stage failed."""
    return f"stage {stage}"


def put(rows: list[Row], row: Row) -> None:
    """Let a row take the place of what it measures anew, such as a whole network that had failed; else add it."""
    old = [i for i, each in enumerate(rows) if all(row.get(key) == each[key] for key in _IDENTITY if key in each)]
    for i in reversed(old):
        del rows[i]
    rows.insert(old[0] if old else len(rows), row)


def write(found: dict[str, Any], output: Path, networks: list[str]) -> None:
    """JSON, and tables made of it; ``networks`` are all that products are of."""
    judged = verdicts(found["stages"], networks)
    with atomic_path(output.with_suffix(".json")) as path:
        path.write_text(json.dumps(found | {"targets": judged}, indent=1) + "\n")
    env = found["environment"]
    lines = [
        "# On a GPU",
        "",
        f"`python benchmarks/gpu.py{' --small' * env['small']}`; {env['device']}, torch {env['torch']}, "
        f"CUDA {env['cuda']}, driver {env['driver']}, Python {env['python']}; "
        f"{', '.join(f'{name} {version}' for name, version in env['packages'].items())}.",
    ]
    for stage, rows in (found["stages"] | {"targets": judged}).items():
        columns = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in _DRAWN]
        if columns:
            lines += ["", f"## {stage}", "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
            lines += ["| " + " | ".join(_shown(key, row.get(key)) for key in columns) + " |" for row in rows]
    with atomic_path(output) as path:
        path.write_text("\n".join(lines) + "\n")


def _shown(key: str, value: Any) -> str:
    if value is None:
        return ""
    if key.endswith("bytes") and isinstance(value, int):
        return f"{value / 2**20:,.1f} MiB"
    if isinstance(value, float):
        return f"{value:.3g}"
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return " ".join(text.replace("|", "\\|").split())


# -- targets ------------------------------------------------------------------------------------------------------


def verdicts(stages: dict[str, list[Row]], networks: list[str]) -> list[Row]:
    """Whether each target is met: rows of ``target``, ``verdict`` ("met", "missed" or "not measured") and ``found``.

    One counterexample misses a target; it is met when all that it speaks of was measured.
    """
    judged = {
        "the tests that need a GPU pass": _tests(stages.get("tests", [])),
        "faster than curvlinops compiled, on every network": _curvlinops(stages.get("products", []), networks),
        f"{PYHESSIAN_TIMES:g} times as fast as PyHessian on ResNet-18": _pyhessian(stages.get("products", [])),
        f"a step with 20 end points takes at most {PENALTY_RATIO:g} times as long": _ratios(
            stages.get("training", []), ("a step of lenet5", "a step of resnet18")
        ),
        "no step of Lanczos waits for the device": _numbers(stages.get("syncs", []), "syncs", 2),
        "memory does not grow over 100 products": _numbers(stages.get("memory", []), "growth_bytes", 1),
    }
    return [{"target": target, "verdict": verdict, "found": text} for target, (verdict, text) in judged.items()]


def _judged(good: list[bool], complete: bool) -> str:
    return "missed" if not all(good) else "met" if good and complete else "not measured"


def _tests(rows: list[Row]) -> tuple[str, str]:
    outcomes = [row.get("outcome", "failed") for row in rows]
    ended = [each for each in outcomes if each in ("passed", "failed", "error")]
    counts = ", ".join(f"{outcomes.count(each)} {each}" for each in dict.fromkeys(outcomes))
    return _judged([each == "passed" for each in ended], len(ended) == len(outcomes)), counts


def _curvlinops(rows: list[Row], networks: list[str]) -> tuple[str, str]:
    times = {(row["what"], row.get("package")): row["seconds"] for row in rows if "seconds" in row}
    found = {
        name: times[name, _THEIRS] / times[name, _OURS]
        for name in networks if (name, _OURS) in times and (name, _THEIRS) in times
    }  # fmt: skip
    text = [f"{name}: {found[name]:.2f} times as fast" if name in found else f"{name}: ?" for name in networks]
    return _judged([ratio > 1 for ratio in found.values()], len(found) == len(networks)), "; ".join(text)


def _pyhessian(rows: list[Row]) -> tuple[str, str]:
    times = {row["package"]: row["seconds"] for row in rows if row["what"].startswith("ResNet-18") and "seconds" in row}
    ours = [seconds for package, seconds in times.items() if package.startswith("pnanalysis")]
    theirs = {package: seconds for package, seconds in times.items() if package.startswith("PyHessian")}
    found = {package: seconds / min(ours) for package, seconds in theirs.items()} if ours else {}
    text = "; ".join(f"{package}: {ratio:.2f} times as fast" for package, ratio in found.items())
    return _judged([ratio >= PYHESSIAN_TIMES for ratio in found.values()], len(found) == 2), text


def _ratios(rows: list[Row], names: tuple[str, ...]) -> tuple[str, str]:
    found = {
        name: row["ratio"] for name in names for row in rows if row["what"].startswith(name + " ") and "ratio" in row
    }
    text = "; ".join(f"{name}: {ratio:.3f}" for name, ratio in found.items())
    return _judged([ratio <= PENALTY_RATIO for ratio in found.values()], len(found) == len(names)), text


def _numbers(rows: list[Row], key: str, expected: int) -> tuple[str, str]:
    """Of numbers that are to be zero or less, of so many rows."""
    found = {row["what"]: row[key] for row in rows if key in row}
    text = "; ".join(f"{what}: {_shown(key, number)}" for what, number in found.items())
    return _judged([number <= 0 for number in found.values()], len(found) == expected), text


# -- figures ------------------------------------------------------------------------------------------------------


def draw(found: dict[str, Any], output: Path) -> None:
    """Products of all packages in units of the gradient, and spectra in all precisions over each other."""
    from pnanalysis.plots import save_figure
    from pnanalysis.plots.style import COLOURS, new_figure, style

    rows = [row for row in found["stages"].get("products", []) if "gradients" in row]
    spectra = [row for row in found["stages"].get("arithmetic", []) if "density" in row]
    with style():
        if rows:
            figure = new_figure(7.0, 3.2)
            _bars(figure.add_subplot(), rows)
            save_figure(figure, output.with_suffix(".png"))
        if spectra:
            figure = new_figure(7.0, 3.2)
            axes = figure.add_subplot()
            for row, colour, dashes in zip(spectra, COLOURS, ("-", "--", "-.", ":"), strict=False):
                axes.plot(row["eigenvalue"], row["density"], dashes, color=colour, label=row["arithmetic"])
            axes.set_yscale("log")
            axes.set_ylim(bottom=1e-8 * max(max(row["density"]) for row in spectra))
            axes.set_xlabel("eigenvalue")
            axes.set_ylabel("density")
            axes.legend()
            save_figure(figure, output.with_name(f"{output.stem}_spectra.png"))


def _bars(axes: Any, rows: list[Row]) -> None:
    from pnanalysis.plots.style import COLOURS

    names, packages = (list(dict.fromkeys(row[key] for row in rows)) for key in ("what", "package"))
    width = 0.8 / len(packages)
    for i, package in enumerate(packages):
        own = {row["what"]: row["gradients"] for row in rows if row["package"] == package}
        places = [at + (i - len(packages) / 2 + 0.5) * width for at in range(len(names))]
        axes.bar(places, [own.get(name, 0.0) for name in names], width, color=COLOURS[i % len(COLOURS)], label=package)
    axes.set_xticks(range(len(names)), [name.replace(", ", "\n") for name in names])
    axes.set_ylabel("Hessian product / gradient")
    axes.legend()
