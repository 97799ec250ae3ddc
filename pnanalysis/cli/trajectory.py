"""``pnanalysis trajectory``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pnanalysis.cli import options
from pnanalysis.terminal.console import Cell, Table, make_table

if TYPE_CHECKING:
    import xarray as xr


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("trajectory")(trajectory)


def trajectory(
    runs: options.Paths = None,
    iteration: Annotated[
        list[int] | None, typer.Option(help="Iteration to project; may be repeated. All by default.")
    ] = None,
    projection: Annotated[
        list[str] | None,
        typer.Option(metavar="plane|pca|pca_end|random", help="May be repeated; all but random by default."),
    ] = None,
    components: Annotated[int, typer.Option(help="Number of principal components.")] = 2,
    random_planes: Annotated[int, typer.Option(help="Number of random planes, for --projection random.")] = 1,
    per_layer: Annotated[bool, typer.Option("--per-layer", help="Give everything for each layer too.")] = False,
    model: options.Model = None,
    weights: options.Weights = None,
    data: options.Data = None,
    tokens: options.Tokens = None,
    output: options.Output = None,
    plot: options.Plot = None,
    seed: Annotated[int, typer.Option(help="Seed of the random planes.")] = 0,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Project paths through parameter space on planes through their ends, principal components or random planes.

    [bold]Examples[/bold]

      pnanalysis trajectory runs/lenet5 --iteration 0 --iteration 3 --plot paths.pdf

      pnanalysis trajectory runs/lenet5 runs/lenet5-restart

      pnanalysis trajectory runs/lenet5 --per-layer --projection pca --projection random
    """
    from pnanalysis.analyses.trajectory import DEFAULT_PROJECTIONS
    from pnanalysis.analyses.trajectory import trajectory as analyse

    given = options.sources(runs, model, weights, data, None, output, tokens)
    ds = analyse(
        *given, iterations=iteration, projections=projection or DEFAULT_PROJECTIONS, n_components=components,
        n_random=random_planes, per_layer=per_layer, seed=seed, progress=not quiet,
    )  # fmt: skip
    drawing = {"kind": "trajectory_layers"} if per_layer else {}
    options.deliver(ds, given[0], output, plot, quiet, _table, **drawing)


def _table(ds: xr.Dataset) -> Table:
    """Each path's end, by layer if there are layers: distances, length, and the cosine with the first path's end."""
    from pnanalysis.analyses.trajectory import WHOLE

    ends = {(run, i): k for k, (run, i) in enumerate(zip(ds.run.values, ds.iteration.values, strict=True))}
    has_layers = "layer" in ds.dims
    rows: list[list[Cell]] = []
    for (run, iteration), k in ends.items():
        at = ds.isel(checkpoint=k)
        for name, part in [(str(n), at.sel(layer=n)) for n in ds.layer.values] if has_layers else [("", at)]:
            numbers = [part.distance_from_start, part.path_length]
            numbers += [part.plane_residual] if "plane_residual" in part else []
            numbers += [part.distance_to_end.isel(end=0), part.cosine.isel(end=0)]
            rows.append([str(run), int(iteration), *([name] if has_layers else []), *map(float, numbers)])
    explained = {name: ds[name] for name in ("explained_variance", "explained_variance_end") if name in ds}
    whole = [fraction.sel(layer=WHOLE) if "layer" in fraction.dims else fraction for fraction in explained.values()]
    text = "; about the plain end ".join(", ".join(f"{part:.1%}" for part in fraction.values) for fraction in whole)
    columns = ["run", "iteration", *(["layer"] if has_layers else []), "distance from start", "path length"]
    columns += [*(["distance from plane"] if "plane_residual" in ds else []), "distance to first end", "cosine with it"]
    title = "ends of the paths" + (f" (principal components explain {text})" if text else "")
    return make_table(title, columns, rows)
