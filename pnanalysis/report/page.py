"""The page: template, figures, tables and downloads put together."""

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
from pnanalysis.io import netcdf, zarr_store
from pnanalysis.io.atomic import atomic_path
from pnanalysis.io.runs import Run
from pnanalysis.report.datasets import RunDatasets, Study, studies
from pnanalysis.report.figures import pictures
from pnanalysis.report.interactive import explorers
from pnanalysis.report.tables import rows, sentences
from pnanalysis.schema import provenance

_DOWNLOAD_LIMIT = 4_000_000  # bytes of a file above which the page only names it


def write_report(runs: Sequence[Run], path: str | os.PathLike[str], *, title: str | None = None) -> Path:
    """Write one self-contained HTML page about runs and the results of their analyses.

    Parameters
    ----------
    runs : sequence of Run
        A restart run with the same recipe, model and data as another run is shown as its control.
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
        raise RunError("no run to report on; name at least one run")
    found = studies(runs)
    environment = Environment(
        loader=PackageLoader("pnanalysis.report"), autoescape=select_autoescape(["html", "j2"]), trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    html = environment.get_template("report.html.j2").render(
        title=title or "Minima of " + ", ".join(study.main.name for study in found),
        sentences=[sentence for study in found for sentence in sentences(study)],
        table=[row.cells() for study in found for row in rows(study)],
        studies=[_section(study) for study in found],
        plotly=Markup(get_plotlyjs()),
        made=provenance(),
    )
    path = Path(path)
    with atomic_path(path) as temporary:
        temporary.write_text(html, encoding="utf-8", errors="backslashreplace")  # bytes of names that are no text
    return path


def _section(study: Study) -> dict[str, Any]:
    """What the template shows of one study."""
    members = [member for member in study if member is not None]
    return {
        "name": study.main.name,
        "pictures": [
            {"title": p.title, "caption": p.caption, "markup": Markup(p.markup), "points": p.points}
            for p in pictures(study)
        ],
        "explorers": list(explorers(study.main)),
        "runs": [_facts(member.run) for member in members],
        "downloads": [entry for member in members for entry in _downloads(member)],
    }


def _facts(run: Run) -> dict[str, Any]:
    manifest = run.manifest
    data = manifest["data"]
    return {
        "run": f"{run.path.name} ({manifest.get('strategy', '')}, {run.status})",
        "id": run.id,
        "command": manifest.get("command", ""),
        "data": f"{data.get('name', '')}, fingerprint {data.get('fingerprint', '')}",
        "seed": manifest["config"].get("seed", ""),
        "repelled layers": ", ".join(sorted({name for layers in manifest.get("layers", []) for name in layers})),
        "device": f"{manifest.get('device', '')} ({manifest.get('device_name', '')})",
        "processes": manifest.get("n_processes", 1),
        "versions": ", ".join(f"{name} {version}" for name, version in manifest.get("versions", {}).items()),
        "revision": manifest.get("git_revision") or "",
        "trained": f"{manifest.get('started', '')} to {manifest.get('ended', '')} UTC",
        "settings": json.dumps(manifest["config"]),
    }


def _downloads(member: RunDatasets) -> list[dict[str, Any]]:
    """The datasets as files, written anew from what was read: nothing else can come into the page."""
    found: list[dict[str, Any]] = []
    for kind, ds in member.readable().items():
        if member.run.files[kind].suffix == zarr_store.SUFFIX:  # a folder
            continue
        content = netcdf.as_bytes(ds)
        data = base64.b64encode(content).decode() if len(content) <= _DOWNLOAD_LIMIT else ""
        found.append({"name": f"{member.name}-{kind}.nc", "size": f"{len(content) / 1000:,.0f} kB", "data": data})
    return found
