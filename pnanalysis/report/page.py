"""Put the page together: template, figures, tables, downloads."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from pnanalysis.errors import RunError
from pnanalysis.io.atomic import atomic_path
from pnanalysis.io.runs import Run
from pnanalysis.report.figures import pictures
from pnanalysis.report.interactive import explorers
from pnanalysis.report.tables import sentences, studies, summary_table
from pnanalysis.schema import provenance

_DOWNLOAD_LIMIT = 4_000_000


def write_report(runs: Sequence[Run], path: str | os.PathLike[str], *, title: str | None = None) -> Path:
    """Write one self-contained HTML page about runs and what analyses have found.

    Parameters
    ----------
    runs : sequence of Run
        A restart run of the same recipe, model and data as another is shown as its control.
    path : path
    title : str, optional

    Returns
    -------
    pathlib.Path

    Raises
    ------
    RunError
        If there is no run, or one has not been trained for an epoch.
    """
    if not runs:
        raise RunError("name at least one run to report on")
    environment = Environment(
        loader=PackageLoader("pnanalysis.report"), autoescape=select_autoescape(["html", "j2"]), trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    html = environment.get_template("report.html.j2").render(
        title=title or "Minima of " + ", ".join(run.path.name for run, _ in studies(runs)),
        sentences=sentences(runs),
        table=summary_table(runs),
        studies=[_study(run, control) for run, control in studies(runs)],
        plotly=Markup(get_plotlyjs()),
        made=provenance(),
    )
    path = Path(path)
    with atomic_path(path) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return path


def _study(run: Run, control: Run | None) -> dict[str, Any]:
    members = [run] if control is None else [run, control]
    return {
        "name": run.path.name,
        "pictures": [
            {"title": p.title, "caption": p.caption, "markup": Markup(p.markup), "points": p.points}
            for p in pictures(run, control)
        ],
        "explorers": list(explorers(run)),
        "runs": [_facts(member) for member in members],
        "downloads": [entry for member in members for entry in _downloads(member)],
    }


def _facts(run: Run) -> dict[str, Any]:
    manifest = run.manifest
    data = manifest["data"]
    return {
        "run": f"{run.path.name} ({manifest.get('strategy', '')}, {manifest.get('status', '')})",
        "id": run.id,
        "command": manifest.get("command", ""),
        "data": f"{data.get('name', '')}, fingerprint {data.get('fingerprint', '')}",
        "seed": manifest["config"].get("seed", ""),
        "repelled layers": ", ".join(sorted({name for layers in manifest.get("layers", []) for name in layers})),
        "device": f"{manifest.get('device', '')} ({manifest.get('device_name', '')})",
        "versions": ", ".join(f"{name} {version}" for name, version in manifest.get("versions", {}).items()),
        "revision": manifest.get("git_revision") or "",
        "trained": f"{manifest.get('started', '')} to {manifest.get('ended', '')} UTC",
        "settings": json.dumps(manifest["config"]),
    }


def _downloads(run: Run) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for file in filter(Path.is_file, run.files.values()):  # a Zarr store is a folder
        size = file.stat().st_size
        data = base64.b64encode(file.read_bytes()).decode() if size <= _DOWNLOAD_LIMIT else ""
        found.append({"name": f"{run.path.name}-{file.name}", "size": f"{size / 1000:,.0f} kB", "data": data})
    return found
