"""``pnanalysis info``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pnanalysis.cli import options
from pnanalysis.errors import PnError
from pnanalysis.terminal.console import Cell, Table, make_table, print_line, print_table

if TYPE_CHECKING:
    import torch
    import xarray as xr

    from pnanalysis.io.runs import Run

_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("info")(info)


def info(
    path: Annotated[
        Path, typer.Argument(metavar="RUN|FILE", help="A run directory, a saved dataset, or a file of weights.")
    ],
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare every file with the digest recorded in it, and list the results.")
    ] = False,
    json: options.Json = False,
) -> None:
    """List the contents of a run directory, a dataset, or a file of weights.

    [bold]Examples[/bold]

      pnanalysis info runs/lenet5

      pnanalysis info runs/lenet5/analysis/hessian.nc

      pnanalysis info runs/lenet5 --verify
    """
    if verify:
        _verify(path)
        return
    from pnanalysis.io import datasets
    from pnanalysis.io.runs import open_run
    from pnanalysis.io.weights import INDEX_SUFFIXES, read_state_dicts

    if path.suffix in datasets.SUFFIXES:
        tables = _of_dataset(path, datasets.load(path))
    elif path.suffix in _WEIGHTS or path.name.endswith(INDEX_SUFFIXES):
        tables = (_of_weights(f"{path} {key}".strip(), state) for key, state in read_state_dicts(path).items())
    elif path.is_file():
        raise PnError(
            f"{path}: is not a run directory, a dataset ({', '.join(datasets.SUFFIXES)}) "
            f"or a file of weights ({', '.join(_WEIGHTS)})"
        )
    else:
        tables = iter([make_table(str(path), ["entry", "value"], _of_run(open_run(path)))])
    for table in tables:
        print_table(table)


def _verify(path: Path) -> None:
    """Print what was checked.

    Raises
    ------
    PnError
        If a file is damaged.
    """
    from pnanalysis.io import verification
    from pnanalysis.io.runs import is_run, open_run

    is_of_run = is_run(path) and path.suffix != ".zarr"
    findings = list(verification.verify(open_run(path))) if is_of_run else [verification.verify_file(path)]
    names = [str(one.path.relative_to(path)) if is_of_run else str(path) for one in findings]
    print_table(
        make_table(
            f"{path}: files checked", ["file", "result"],
            [[name, one.text] for name, one in zip(names, findings, strict=True)],
        )
    )  # fmt: skip
    damaged = [name for name, one in zip(names, findings, strict=True) if one.problem]
    if damaged:
        raise PnError(
            f"{path}: {len(damaged)} of {len(findings)} files cannot be read as they were written, such as "
            f"{damaged[0]}; restore them from a copy, or compute them again"
        )
    confirmed = sum(one.is_confirmed for one in findings)
    print_line(f"{path}: {len(findings)} files read, {confirmed} of them confirmed by their digests")


def _of_dataset(path: Path, ds: xr.Dataset) -> Iterator[Table]:
    rows = [
        [str(name), " x ".join(f"{dim} {size}" for dim, size in array.sizes.items()), array.units, array.long_name]
        for name, array in ds.items()
    ]
    yield make_table(f"{path}: {ds.attrs['kind']}", ["variable", "dims", "units", "meaning"], rows)
    yield make_table("made by", ["attribute", "value"], [[str(key), str(value)] for key, value in ds.attrs.items()])


def _of_weights(title: str, state: Mapping[str, torch.Tensor]) -> Table:
    """One row per tensor."""
    rows = [
        [name, " x ".join(map(str, tensor.shape)) or "scalar", str(tensor.dtype).removeprefix("torch."), tensor.numel()]
        for name, tensor in sorted(state.items())
    ]
    total = sum(tensor.numel() for tensor in state.values())
    return make_table(f"{title}: {len(rows)} tensors, {total:,} numbers", ["tensor", "shape", "dtype", "numbers"], rows)


def _of_run(run: Run) -> list[list[Cell]]:
    manifest, config = run.manifest, run.manifest["config"]
    champion = run.champion.name if run.ends else "none yet"
    return [
        ["recipe", f"{manifest['recipe']} ({manifest.get('strategy', '?')})"],
        ["status", f"{run.status}, {len(run.ends)} of {config.get('iterations', '?')} iterations"],
        ["model", manifest["model"]["name"]],
        ["data", f"{manifest['data']['name']} ({manifest['data'].get('fingerprint', '')})"],
        ["seed", str(config.get("seed", "?"))],
        ["device", f"{manifest.get('device', '?')} ({manifest.get('device_name', '?')})"],
        ["processes", str(manifest.get("n_processes", 1))],
        ["checkpoints", str(len(run.checkpoints))],
        ["champion", champion],
        ["analyses", ", ".join(kind for kind in run.files if kind != "history") or "none yet"],
        ["begun, ended", f"{manifest.get('started')}, {manifest.get('ended')}"],
    ]
