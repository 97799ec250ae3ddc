"""Interactive figures: values under the pointer, one layer or iteration at a time. Plain data for plotly.js to draw.

Each is a set of curves with lists to choose from: a curve is shown if each list is set to the curve's own value, or to
"all".
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import xarray as xr

from pnanalysis.analyses.trajectory import WHOLE
from pnanalysis.plots.style import CHAMPION, COLOURS, PLAIN, QUIET, label
from pnanalysis.report.datasets import BAD_DATASET, GivenDatasets, RunDatasets

ALL = "all"
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
_PROJECTIONS = {
    "plane": "plane through start and ends", "pca": "principal components", "pca_end": "components about the end",
}  # fmt: skip
_ERRORS = ("validation_error", "test_error", "train_loss", "penalty")


@dataclass(frozen=True)
class Choice:
    """A list to choose from: displayed text by value; the first option is selected at first."""

    key: str
    label: str
    options: dict[str, str]


@dataclass(frozen=True)
class Explorer:
    """One interactive figure: lists to choose from, curves (plotly traces) and axes (plotly layout).

    ``key`` is the kind of its dataset.
    """

    key: str
    title: str
    choices: list[Choice]
    traces: list[dict[str, Any]]
    layout: dict[str, Any] = field(default_factory=dict)

    def json(self) -> str:
        """Curves and axes as JSON for a script element."""
        # an escaped "<" keeps any name in the data from closing the element
        return json.dumps({"data": self.traces, "layout": self.layout}).replace("<", "\\u003c")


def explorers(datasets: RunDatasets | GivenDatasets) -> Iterator[Explorer]:
    """Every interactive figure that the datasets allow."""
    makers = {"history": _history, "hessian": _hessian, "saturation": _saturation, "trajectory": _trajectory}
    for kind, ds in datasets.readable().items():
        # saturation of checkpoints without a training has no epochs to follow
        if kind in makers and not (kind == "saturation" and "epoch" not in ds.dims):
            try:
                yield makers[kind](ds.sel(run=_own_run(datasets.name, ds)) if "run" in ds.dims else ds)
            except BAD_DATASET:  # the printed figure gives the reason
                continue


def _history(ds: xr.Dataset) -> Explorer:
    shown = [name for name in _ERRORS if bool(ds[name].notnull().any())]
    names = {name: str(ds[name].attrs["long_name"]) for name in shown}
    traces = [
        _trace(
            ds.epoch.values, ds[name].sel(iteration=iteration).values, _name(int(iteration), ds),
            _look(int(iteration), ds), {"quantity": name, "iteration": str(iteration)},
            hovertemplate="epoch %{x}: %{y:.4g}",
        )
        for name in shown
        for iteration in ds.iteration.values
    ]  # fmt: skip
    choices = [Choice("quantity", "Quantity", names), _iterations(ds)]
    return Explorer("history", "Explore the training", choices, traces, _axes("epoch", ""))


def _hessian(ds: xr.Dataset) -> Explorer:
    names = [str(name) for name in ds.checkpoint.values]
    grid, traces = ds.eigenvalue.values, []
    for i, name in enumerate(names):
        density, se = (ds[variable].isel(checkpoint=i).values for variable in ("density", "density_se"))
        curve = _trace(
            grid, np.where(density > 0, density, np.nan), name,
            {"color": COLOURS[i % len(COLOURS)], "dash": _DASHES[i % len(_DASHES)]}, {"checkpoint": name},
            hovertemplate="%{y:.3g} ± %{customdata:.1g} at %{x:.4g}",
        )  # fmt: skip
        traces.append({**curve, "mode": "lines", "customdata": _numbers(se)})
    layout = _axes(label(ds.eigenvalue) if ds.eigenvalue.attrs else "eigenvalue [loss]", label(ds.density))
    top = float(ds.density.max())
    layout["yaxis"] |= {"type": "log", "range": [float(np.log10(top)) - 8, float(np.log10(top)) + 0.3]}
    return Explorer(
        "hessian", "Explore the spectrum", [Choice("checkpoint", "Checkpoint", _same([ALL, *names]))], traces, layout
    )


def _saturation(ds: xr.Dataset) -> Explorer:
    layers = [str(layer) for layer in ds.layer.values]
    levels = sorted(ds["quantile"].values.tolist(), reverse=True)
    traces = []
    for layer, level, iteration in product(layers, levels, ds.iteration.values):
        at = ds.sel(iteration=iteration, layer=layer, quantile=level)
        curve = _trace(
            ds.epoch.values, at.abs_percentile.values, _name(int(iteration), ds), _look(int(iteration), ds),
            {"layer": layer, "level": f"{level:g}", "iteration": str(iteration)},
            hovertemplate="epoch %{x}: %{y:.4f} ± %{customdata:.1g}",
        )  # fmt: skip
        traces.append({**curve, "customdata": _numbers(at.abs_percentile_se.values)})
    choices = [
        Choice("layer", "Layer", _same(layers)),
        Choice("level", "Percentile of |activation|", _same(f"{level:g}" for level in levels)),
        _iterations(ds),
    ]
    return Explorer("saturation", "Explore the saturation", choices, traces, _axes("epoch", "|activation|"))


def _trajectory(ds: xr.Dataset) -> Explorer:
    paths = list(dict.fromkeys(zip(ds.run.values.tolist(), ds.iteration.values.tolist(), strict=True)))
    first, several = str(ds.run.values[0]), len(set(ds.run.values.tolist())) > 1
    if "layer" in ds.dims:
        ds = ds.sel(layer=WHOLE)
    projections = {name: title for name, title in _PROJECTIONS.items() if name in ds}
    traces = []
    for projection in projections:
        for run, iteration in paths:
            at = ds.isel(checkpoint=np.flatnonzero((ds.run == run).values & (ds.iteration == iteration).values))
            x, y = at[projection].isel(component=slice(2)).values.T
            name = (f"{run} " if several else "") + _name(int(iteration), ds if run == first else None)
            look = _look(int(iteration), ds) if run == first else {"color": COLOURS[2], "dash": "dot"}
            curve = _trace(
                x, y, name, look, {"projection": projection, "path": name},
                hovertemplate="epoch %{customdata[0]}, validation error %{customdata[1]:.2%}",
            )  # fmt: skip
            known = zip(at.epoch.values.tolist(), _numbers(at.validation_error.values), strict=True)
            traces.append({**curve, "customdata": list(map(list, known))})
    choices = [
        Choice("projection", "Projection", projections),
        Choice("path", "Path", _same([ALL, *(trace["name"] for trace in traces)])),
    ]
    layout = _axes("[parameter units]", "[parameter units]")
    layout["yaxis"] |= {"scaleanchor": "x"}
    return Explorer("trajectory", "Explore the trajectories", choices, traces, {**layout, "hovermode": "closest"})


def _own_run(name: str, ds: xr.Dataset) -> str:
    """The run's own name among several; the first if the folder has been renamed since."""
    names = [str(run) for run in ds.run.values]
    return name if name in names else names[0]


def _iterations(ds: xr.Dataset) -> Choice:
    return Choice("iteration", "Iteration", _same([ALL, *(str(iteration) for iteration in ds.iteration.values)]))


def _same(values: Iterable[str]) -> dict[str, str]:
    """Options that are displayed as they are."""
    return {value: value for value in values}


def _name(iteration: int, ds: xr.Dataset | None) -> str:
    champion = None if ds is None else ds.attrs.get("champion")
    own = "plain" if iteration == 0 and ds is not None else f"iteration {iteration}"
    return f"{own} (champion)" if iteration == champion else own


def _look(iteration: int, ds: xr.Dataset) -> dict[str, Any]:
    """Line style: plain and champion as in the printed figures, the others in grey."""
    if iteration == 0:
        return {"color": PLAIN, "dash": "solid", "width": 2.5}
    if iteration == int(ds.attrs.get("champion", -1)):
        return {"color": CHAMPION, "dash": "dash", "width": 2.5}
    return {"color": QUIET, "dash": _DASHES[iteration % len(_DASHES)], "width": 1.2}


def _trace(
    x: np.ndarray, y: np.ndarray, name: str, line: dict[str, Any], chosen_by: dict[str, str], hovertemplate: str
) -> dict[str, Any]:
    return {
        "type": "scatter", "mode": "lines+markers", "marker": {"size": 4}, "name": name,
        "x": _numbers(x), "y": _numbers(y), "line": line,
        "meta": chosen_by, "hovertemplate": f"{hovertemplate}<extra>%{{fullData.name}}</extra>",
    }  # fmt: skip


def _axes(x: str, y: str) -> dict[str, Any]:
    return {
        "xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}, "hovermode": "x unified",
        "margin": {"l": 70, "r": 10, "t": 40, "b": 50}, "height": 420,
        "modebar": {"bgcolor": "rgba(0,0,0,0)"},
    }  # fmt: skip


def _numbers(values: np.ndarray) -> list[float | None]:
    """Five digits are enough for a screen; None stands for unknown values, which JSON cannot hold as NaN."""
    return [float(f"{value:.5g}") if np.isfinite(value) else None for value in values.astype(float)]
