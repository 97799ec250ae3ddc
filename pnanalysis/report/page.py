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
from pnanalysis.io import netcdf
from pnanalysis.io.atomic import atomic_path
from pnanalysis.io.runs import Run
from pnanalysis.report.datasets import Given, GivenDatasets, RunDatasets, Study, studies
from pnanalysis.report.figures import pictures
from pnanalysis.report.interactive import explorers
from pnanalysis.report.tables import cells, sentences
from pnanalysis.schema import provenance

_DOWNLOAD_LIMIT = 4_000_000  # bytes of a file above which the page only names it


def write_report(given: Sequence[Given], path: str | os.PathLike[str], *, title: str | None = None) -> Path:
    """Write one self-contained HTML page about runs and the results of their analyses, or about any datasets.

    Parameters
    ----------
    given : sequence of Run, Dataset, or path of a run or dataset
        A restart run with the same recipe, model and data as another run is shown as its control. Datasets that do not
        lie in a run, such as those of networks in memory, are shown together, after the runs.
    path : path
    title : str, optional

    Returns
    -------
    pathlib.Path

    Raises
    ------
    RunError, SchemaError
        If there is nothing to report on, a run has not been trained for an epoch, or a dataset cannot be read.
    """
    if not given:
        raise RunError("nothing to report on; name at least one run or dataset")
    found = studies(given)
    environment = Environment(
        loader=PackageLoader("pnanalysis.report"), autoescape=select_autoescape(["html", "j2"]), trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    html = environment.get_template("report.html.j2").render(
        title=title or "Minima of " + ", ".join(study.main.name for study in found),
        sentences=[sentence for study in found for sentence in sentences(study)],
        table=cells(found),
        has_runs=any(isinstance(study.main, RunDatasets) for study in found),
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
        "sources": [facts for member in members for facts in _sources(member)],
        "downloads": [entry for member in members for entry in _downloads(member)],
    }


def _sources(member: RunDatasets | GivenDatasets) -> list[dict[str, Any]]:
    """How a run was trained, or how each of the datasets was computed."""
    if isinstance(member, RunDatasets):
        return [_facts(member.run)]
    return [{"dataset": name} | ds.attrs for name, ds in member.readable().items()]


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


def _downloads(member: RunDatasets | GivenDatasets) -> list[dict[str, Any]]:
    """The datasets as files, written anew from what was read: nothing else can come into the page."""
    found: list[dict[str, Any]] = []
    for kind, ds in member.readable().items():
        if member.is_store(kind):
            continue
        content = netcdf.as_bytes(ds)
        data = base64.b64encode(content).decode() if len(content) <= _DOWNLOAD_LIMIT else ""
        name = f"{member.name}-{kind}" if isinstance(member, RunDatasets) else kind
        found.append({"name": f"{name}.nc", "size": f"{len(content) / 1000:,.0f} kB", "data": data})
    return found
