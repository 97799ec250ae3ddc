"""``pnanalysis info``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pnanalysis import schema
from pnanalysis.cli import options
from pnanalysis.console import make_table, show
from pnanalysis.runs import Run, open_run


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("info")(info)


def info(
    path: Annotated[Path, typer.Argument(metavar="RUN|FILE.nc", help="A run directory or a saved dataset.")],
    json: options.Json = False,
) -> None:
    """What is in a run directory or a dataset.

    [bold]Example[/bold]

      pnanalysis info runs/lenet5
    """
    if path.is_file():
        ds = schema.load(path)
        rows = [
            [str(name), " x ".join(f"{d} {n}" for d, n in a.sizes.items()), a.units, a.long_name]
            for name, a in ds.items()
        ]
        show(make_table(f"{path}: {ds.attrs['kind']}", ["variable", "dims", "units", "meaning"], rows))
        rows = [[str(key), str(value)] for key, value in ds.attrs.items()]
        show(make_table("made by", ["attribute", "value"], rows))
        return
    show(make_table(str(path), ["entry", "value"], _describe(open_run(path))))


def _describe(run: Run) -> list[list[Any]]:
    manifest, config = run.manifest, run.manifest["config"]
    champion = f"{run.champion.name}" if run.ends else "none yet"
    return [
        ["recipe", f"{manifest['recipe']} ({manifest.get('strategy', '?')})"],
        ["status", f"{manifest.get('status', '?')}, {len(run.ends)} of {config.get('iterations', '?')} iterations"],
        ["model", manifest["model"]["name"]],
        ["data", f"{manifest['data']['name']} ({manifest['data'].get('fingerprint', '')})"],
        ["seed", str(config.get("seed", "?"))],
        ["device", f"{manifest.get('device', '?')} ({manifest.get('device_name', '?')})"],
        ["checkpoints", str(len(run.checkpoints))],
        ["champion", champion],
        ["analyses", ", ".join(child for child in run.results.children if child != "history") or "none yet"],
        ["begun, ended", f"{manifest.get('started')}, {manifest.get('ended')}"],
    ]
