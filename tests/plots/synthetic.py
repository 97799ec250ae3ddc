"""Datasets of known shape for every figure, made from formulas and seeded generators: the same on every machine.

They hold only what the figures draw, with the labels of :mod:`pnanalysis.kinds`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr

from pnanalysis import schema

ITERATIONS, EPOCHS = np.arange(4), np.arange(1, 7)
LAYERS = ["tanh1", "tanh2", "tanh3", "tanh4", "tanh5"]
CHAMPION = 2


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    """Standard normal numbers."""
    return np.random.default_rng(seed).standard_normal(shape)


def dataset(kind: str, coords: dict[str, Any], variables: dict[str, Any], **attrs: Any) -> xr.Dataset:
    """A dataset with the kind's labels and units."""
    return schema.stamp(xr.Dataset(variables, coords=coords), kind, **attrs)


def history(epochs: np.ndarray = EPOCHS, champion: int = CHAMPION) -> xr.Dataset:
    """Losses that decay to a value that differs between iterations."""
    dims, falling = ("iteration", "epoch"), np.exp(-0.5 * epochs)
    depth = 1 + 0.1 * ITERATIONS[:, None]
    error = 0.1 * depth + 0.3 * falling + 0.004 * noise(len(ITERATIONS), len(epochs))
    variables = {
        "train_loss": (dims, 2.0 * depth * falling + 0.05),
        "validation_error": (dims, error),
        "test_error": (dims, error + 0.01),
    }
    attrs = {"champion": champion, "n_validation": 500, "n_test": 500, "strategy": "persistent"}
    return dataset("history", {"iteration": ITERATIONS, "epoch": epochs}, variables, **attrs)


def spectra(**coords: Any) -> xr.Dataset:
    """Two Gaussian bulks with outliers; the density is uncertain on part of the axis."""
    grid = np.linspace(-3, 16, 400)
    outliers = np.array([[5.0, 9.0, 14.0], [4.0, 6.0, 8.0]])
    spikes = np.exp(-0.5 * ((grid - outliers[..., None]) / 0.15) ** 2).sum(1) * 1e-4
    density = np.exp(-0.5 * (grid / 0.4) ** 2) + 0.01 * np.exp(-0.5 * ((grid - 1) / 0.7) ** 2) + spikes
    at = ("checkpoint", "eigenvalue")
    scalars = {
        "bulk_edge_low": [-2.0, -2.0], "bulk_edge_high": [3.5, 3.0], "lambda_max": [14.0, 8.0],
        "n_outliers": [3.0, 3.0], "n_outliers_negative": [0.0, 0.0],
    }  # fmt: skip
    variables = {
        "node": (("checkpoint", "quadrature"), outliers),
        "density": (at, density),
        "density_se": (at, np.where(np.abs(grid - 2) < 1.5, 0.4, 0.0) * density),
        "deflated_value": (("checkpoint", "component"), outliers),
        "kernel_width": ("checkpoint", [0.15, 0.15]),
        **{name: ("checkpoint", values) for name, values in scalars.items()},
    }
    return dataset("hessian", {"checkpoint": ["plain", "champion"], "eigenvalue": grid, **coords}, variables)


def spectra_of_examples() -> xr.Dataset:
    """The two spectra with the error of the choice of examples, which is largest in the tail."""
    ds = spectra()
    data_se = (0.25 + 0.5 * (ds.eigenvalue > 4)) * ds.density
    total = np.hypot(ds.density_se, data_se)
    return ds.assign(density_probe_se=ds.density_se, density_data_se=data_se, density_se=total)


def layer_spectra() -> xr.Dataset:
    """The two spectra as one layer's, and in a narrower version as another's."""
    names = [f"{name}:{layer}" for layer in ("fc1", "fc2") for name in ("plain", "champion")]
    layers = ("checkpoint", ["fc1", "fc1", "fc2", "fc2"])
    narrow = spectra().copy()
    narrow["density"] = narrow.density.where(narrow.eigenvalue < 6, 0.0)
    return xr.concat([spectra(), narrow], dim="checkpoint").assign_coords(checkpoint=names, layer=layers)


def eigenpairs() -> xr.Dataset:
    """Two networks with outliers that class means nearly predict; the last pair of the second has not converged."""
    k, layers = 6, ["conv1", "conv2", "fc1", "fc2"]
    value = np.array([[9.0, 6, 4, 2.5, 1, 0.8], [7.0, 5, 4.5, 2, 1.1, 0.7]])
    part = np.abs(noise(2, k, 4, seed=1)) + 0.1
    level = np.abs(noise(2, 4, k, seed=2)) + 0.2
    pair, square = ("checkpoint", "pair"), ("checkpoint", "other")
    variables = {
        "value": (pair, value), "value_low": (pair, 0.85 * value), "value_high": (pair, 1.15 * value),
        "value_data_se": (pair, 0.07 * value), "converged": (pair, np.array([[1] * k, [1] * (k - 1) + [0]])),
        "layer_part": ((*pair, "layer"), part / part.sum(-1, keepdims=True)),
        "layer_share": (("checkpoint", "layer"), np.array([[0.1, 0.2, 0.6, 0.1]] * 2)),
        "level_part": (("checkpoint", "level", "pair"), level / level.sum(1, keepdims=True)),
        "class_part": (pair, np.linspace(0.9, 0.1, 2 * k).reshape(2, k)),
        "class_value": (("checkpoint", "class"), 0.8 * value[:, :4]),
        "cross_value": (("checkpoint", "class_pair"), 0.9 * value),
        "gradient_top": ("checkpoint", [0.6, 0.4]), "gradient_top_se": ("checkpoint", [0.05, 0.08]),
        "update_top": ("checkpoint", [0.1, 0.05]), "top_chance": ("checkpoint", [0.01, 0.01]),
        "overlap": (square, np.array([[1, 0.45], [0.45, 1]])),
        "overlap_halves": (square, np.array([[0.8, 0.4], [0.4, 0.7]])),
        "overlap_chance": (square, np.full((2, 2), 0.01)),
    }  # fmt: skip
    names = ["plain", "champion"]
    coords = {"checkpoint": names, "other": names, "pair": np.arange(1, k + 1), "layer": layers}
    return dataset("eigenpairs", coords | {"level": ["class", "cross", "within", "same"]}, variables, n_top=4)


def blocks(bits: bool = True) -> xr.Dataset:
    """Six layers of two networks; the last two are weakly coupled to the others."""
    names = ["conv1", "conv2", "fc1", "fc2", "fc3", "head"]
    n, k = len(names), 2
    trace = np.array([[30.0, 12, 6, 3, 1.5, 0.8], [45.0, 15, 5, 2.5, 1.4, 0.9]])
    near = np.exp(-0.6 * np.abs(np.arange(n)[:, None] - np.arange(n)))
    norm = trace / 3
    energy = norm[:, :, None] * norm[:, None, :] * near**2
    apart = energy.sum(-1) - norm**2
    at, square = ("checkpoint", "block"), ("checkpoint", "block", "other")
    share = apart / energy.sum(-1)
    variables = {"n_parameters": (at, np.full((k, n), 100.0)), "n_hvp": ("checkpoint", [200.0, 200.0])}
    for name, value, rel in (("trace", trace, 0.1), ("frobenius_norm", norm, 0.08), ("off_diagonal_share", share, 0.1)):
        variables |= {name: (at, value), f"{name}_se": (at, rel * value), f"{name}_probe_se": (at, 0.4 * rel * value)}
    variables |= {"energy": (square, energy), "energy_se": (square, np.full((k, n, n), 0.01))}
    coords: dict[str, Any] = {"checkpoint": ["plain", "champion"], "block": names, "other": names}
    if bits:
        width = ("checkpoint", "bits", "block")
        value = trace[:, None] * np.array([1e-2, 1e-4])[:, None]
        order = np.broadcast_to(np.arange(1.0, n + 1), value.shape)
        variables |= {
            "js_divergence": (square, 0.3 * (1 - near) + 0.02), "wasserstein1": (square, 0.1 * (1 - near) + 0.003),
            "sensitivity": (width, value), "sensitivity_se": (width, 0.1 * value), "quadratic": (width, 0.6 * value),
            "loss_increase": (width, 0.5 * value - 1e-4), "loss_increase_data_se": (width, 0.1 * value + 1e-5),
            "rank": (width, order), "rank_low": (width, order - (order == 3)),
            "rank_high": (width, order + (order == 2)),
        }  # fmt: skip
        for name in ("js_divergence", "wasserstein1"):
            value = np.stack([variables[name][1]] * k)
            half = np.where(np.eye(n, dtype=bool), np.nan, 0.9 * value.mean())
            variables |= {
                name: (square, value), f"{name}_low": (square, np.maximum(value - half, 0)),
                f"{name}_high": (square, value + half),
            }  # fmt: skip
        coords["bits"] = [4, 8]
    return dataset("blocks", coords, variables, data_error="examples")


def saturation() -> xr.Dataset:
    """Percentiles of |a| that approach one, faster in later layers; iterations 1 and 3 are equal."""
    epochs = np.arange(7)
    rate = np.array([0.0, 0.1, 0.3, 0.1])[:, None, None] + 0.5 + 0.2 * np.arange(len(LAYERS))
    at = 1 - 0.4 * np.exp(-rate * epochs[:, None])
    at[1:, 0] = np.nan  # the start is that of the plain training
    known, bins = np.where(np.isnan(at), np.nan, 1.0), np.linspace(-0.95, 0.95, 20)
    humps = at[..., None] * np.abs(bins) ** 4 + (1 - at[..., None]) * np.exp(-8 * bins**2) + 0.02
    dims = ("iteration", "epoch", "layer")
    variables = {
        "abs_percentile": ((*dims, "quantile"), at[..., None]),
        "abs_percentile_se": ((*dims, "quantile"), 0.15 * (1 - at[..., None])),
        "histogram": ((*dims, "bin"), humps),
        "histogram_se": ((*dims, "bin"), 0.1 * humps),
        "saturation_measure": (dims, at - 0.1 * np.arange(len(LAYERS))),
        "saturation_measure_se": (dims, 0.03 * known),
        "dead_units": (dims, known * [0, 1, 0, 2, 4]),
        "n_units": (dims, known * 16),
    }
    coords = {"iteration": ITERATIONS, "epoch": epochs, "layer": LAYERS, "quantile": [98.0], "bin": bins}
    coords["activation"] = ("layer", ["tanh"] * len(LAYERS))
    return dataset("saturation", coords, variables, champion=CHAMPION)


def saturation_of_files() -> xr.Dataset:
    """The last epochs as four unrelated files."""
    ds = saturation().isel(epoch=-1, drop=True).rename(iteration="checkpoint")
    return ds.assign_coords(checkpoint=["a", "b", "c", "d"]).isel(layer=slice(4))


def trajectory() -> xr.Dataset:
    """Spirals from one start, near a plane."""
    epochs = np.arange(7)
    where = [(0, e) for e in epochs] + [(i, e) for i in ITERATIONS[1:] for e in epochs[1:]]
    iteration, epoch = np.array(where).T
    angle = 0.3 * iteration + 0.1 * epoch
    points = np.stack([epoch * np.cos(angle), epoch * np.sin(angle)], axis=-1)
    cosine = 1 - np.exp(-0.5 * epoch[:, None]) * (1 + 0.1 * iteration[:, None] + 0.05 * ITERATIONS)
    at = ("checkpoint", "component")
    variables = {
        "plane": (at, points), "plane_residual": ("checkpoint", 0.1 * epoch), "pca": (at, points - points.mean(0)),
        "pca_end": (at, points - points[6]), "cosine": (("checkpoint", "end"), cosine),
        **{f"explained_variance{end}": ("component", [0.8, 0.15]) for end in ("", "_end", "_plane")},
    }  # fmt: skip
    coords = {
        "run": ("checkpoint", ["run"] * len(epoch)), "iteration": ("checkpoint", iteration),
        "epoch": ("checkpoint", epoch), "end_run": ("end", ["run"] * 4), "end_iteration": ("end", ITERATIONS),
    }  # fmt: skip
    return dataset("trajectory", coords, variables, champion=CHAMPION, plane_points=["a", "b", "c"])


def trajectory_layers() -> xr.Dataset:
    """The spirals of the whole network, and smaller ones of four layers."""
    ds = trajectory()
    layers = [ds.assign(pca=(ds.pca.dims, ds.pca.values / (1 + k))) for k in range(5)]
    return xr.concat(layers, dim="layer", data_vars="all").assign_coords(layer=["all", "fc1", "fc2", "fc3", "fc4"])


def gradients(epochs: np.ndarray = EPOCHS) -> xr.Dataset:
    """A falling loss gradient, a constant push, and signs that flip once."""
    layers, n = ["conv1", "conv2"], len(epochs)
    sign = np.sign(epochs[:, None] - np.array([0.5, 3.5, 7.5]))
    variables = {
        "loss_gradient_norm": (("layer", "epoch"), np.array([[1.0], [3.0]]) * np.exp(-0.4 * epochs)),
        "fluctuation_norm": (("layer", "epoch"), np.array([[0.01], [0.0]]) * (1 + epochs % 2)),
        "constant_norm": ("layer", [0.05, 0.1]),
        "sign": (("layer", "epoch", "end"), np.broadcast_to(sign, (2, n, 3))),
    }
    ds = dataset("gradients", {"layer": layers, "epoch": epochs, "end": [0, 1, 2]}, variables)
    return ds.expand_dims(iteration=[3])


def barrier() -> xr.Dataset:
    """A hill on the straight line, none on the other path."""
    position = np.linspace(0, 1, 17)
    hill = np.stack([np.sin(np.pi * position) ** 2, np.zeros(17)])[:, None] * np.array([1.0, 1.2])[:, None]
    slope = 0.5 + 0.2 * position
    at, top = ("path", "split", "position"), ("path", "split")
    height = np.array([[1.0, 1.2], [0.0, 0.0]])
    variables = {
        "loss": (at, slope + hill), "loss_se": (at, 0.03 + 0.1 * hill),
        "error": (at, 0.2 * slope + 0.3 * hill), "error_se": (at, 0.01 + 0.02 * hill),
        "barrier": (top, height), "barrier_se": (top, 0.05 * height),
        "error_barrier": (top, 0.3 * height), "error_barrier_se": (top, 0.02 * height),
    }  # fmt: skip
    coords = {"position": position, "path": ["line", "aligned"], "split": ["train", "test"]}
    return dataset("barrier", coords, variables, checkpoints=["plain", "champion"])


def landscape() -> xr.Dataset:
    """Two wells on a plane."""
    x, y = np.linspace(-2, 8, 30), np.linspace(-2, 6, 24)
    wells = np.exp(-((x - 6) ** 2 + y[:, None] ** 2) / 6) + np.exp(-((x - 2) ** 2 + (y[:, None] - 4) ** 2) / 5)
    variables = {
        "loss": (("split", "y", "x"), 2.5 - 2 * wells[None]),
        "point_position": (("point", "component"), [[0.0, 0.0], [6.0, 0.0], [2.0, 4.0]]),
    }
    units = {"units": "parameter units"}
    coords = {
        "split": ["train"], "point": ["start", "plain", "champion"],
        "x": ("x", x, {"long_name": "along start to plain", **units}),
        "y": ("y", y, {"long_name": "across, towards champion", **units}),
    }  # fmt: skip
    return dataset("landscape", coords, variables, plane_points=["a", "b", "c"])


def sharpness() -> xr.Dataset:
    """Rises of three checkpoints in three neighbourhoods, with names too long for horizontal labels."""
    rise = np.array([[0.03, 0.02, 0.2], [0.02, 0.02, 0.1], [0.05, 0.01, 0.4]])
    at = ("checkpoint", "neighbourhood")
    variables = {
        "rise": (at, rise), "rise_se": (at, 0.1 * rise), "one_step": (at, 0.7 * rise), "one_step_se": (at, 0.1 * rise),
        "radius": ("neighbourhood", [0.05, 0.5, 0.001]),
    }  # fmt: skip
    names = ["network-of-monday", "network-of-tuesday", "network-of-friday"]
    return dataset("sharpness", {"checkpoint": names, "neighbourhood": ["ball", "adaptive", "box"]}, variables)


def sharpness_over_radii() -> xr.Dataset:
    """Rises of two checkpoints over three radii of two neighbourhoods, and relative flatness."""
    radius, average = np.array([[0.025, 0.0005], [0.05, 0.001], [0.1, 0.002]]), np.array([[0.01], [0.02], [0.04]])
    dims = ("checkpoint", "radius_index", "neighbourhood")
    rise = np.array([1.0, 3.0])[:, None, None] * (radius / radius[0]) ** 2 * [0.01, 0.002]
    mean = np.array([2.0, 1.0])[:, None, None] * (average / average[0]) ** 2 * [0.001, 0.003]
    variables = {
        "rise": (dims, rise), "rise_se": (dims, 0.1 * rise), "rise_quadratic": (dims, rise * [0.8, np.nan]),
        "average": (dims, mean), "average_se": (dims, 0.15 * mean), "average_quadratic": (dims, 0.9 * mean),
        "radius": (dims[1:], radius), "average_radius": (dims[1:], np.broadcast_to(average, (3, 2))),
        "relative_flatness": ("checkpoint", [12.0, 30.0]), "relative_flatness_low": ("checkpoint", [10.0, 25.0]),
        "relative_flatness_high": ("checkpoint", [14.0, 35.0]),
    }  # fmt: skip
    return dataset("sharpness", {"checkpoint": ["plain", "champion"], "neighbourhood": ["ball", "box"]}, variables)


def correlation() -> xr.Dataset:
    """Five diagnostics of twelve runs of a grid, one of them significant."""
    tau = np.array([0.3, -0.8, 0.1, -0.4, 0.05])
    lr = np.repeat([0.01, 0.1], 6)
    target = 0.1 + 0.02 * np.arange(12) + 0.3 * lr
    value = tau[:, None] * target + 0.01 * noise(5, 12)
    value[2] = 10.0 ** (2 * np.abs(noise(12, seed=1)))
    variables = {
        "tau": ("diagnostic", tau), "tau_low": ("diagnostic", tau - 0.2), "tau_high": ("diagnostic", tau + 0.15),
        "tau_p": ("diagnostic", [0.5, 0.01, 1.0, 0.2, 1.0]), "psi": ("diagnostic", 0.7 * tau),
        "n_runs": ("diagnostic", np.full(5, 12.0)), "value": (("diagnostic", "run"), value),
        "value_se": (("diagnostic", "run"), np.full((5, 12), 0.004)), "target": ("run", target),
        "target_se": ("run", np.full(12, 0.01)),
    }  # fmt: skip
    names = ["lambda_max", "rise adaptive 0.5", "trace", "average ball 0.01", "relative_flatness"]
    coords = {"diagnostic": names, "run": [f"run {i}" for i in range(12)], "axis": ["lr"], "lr_setting": ("run", lr)}
    return dataset("correlation", coords, variables, target_name="test_error")


def learning_coefficients(localization: list[float] | None = None) -> xr.Dataset:
    """Of three checkpoints, the last of which has not converged; over step sizes, too, if localizations are given."""
    names, steps = ["plain", "iter01", "network-of-friday"], np.array([1e-4, 3e-4, 1e-3])
    shape, dims = (3,), ("checkpoint",)
    if localization:
        shape, dims = (3, len(localization), 3), ("checkpoint", "localization", "step_size")
    value = 8 + noise(*shape)
    value[2] = np.nan
    excess = (8 + noise(*shape, 2, 60).cumsum(-1) / 20) * (1 - np.exp(-np.arange(60) / 8)) / 200
    own = {
        "learning_coefficient": value,
        "learning_coefficient_low": value - 0.8,
        "learning_coefficient_high": value + 0.9,
    }
    scalars = own | {
        "learning_coefficient_se": 0 * value + 0.4, "gaussian": np.full(shape, 8.5), "nbeta": np.full(shape, 200.0),
        "converged": np.isfinite(value) * 1.0, "epsilon": np.broadcast_to(steps if localization else 1e-3, shape),
    }  # fmt: skip
    variables = {name: (dims, number) for name, number in scalars.items()}
    variables["excess"] = ((*dims, "chain", "draw"), excess)
    variables["burn_in"] = ("checkpoint", [20, 20, 20])
    coords = {"checkpoint": names} | ({"localization": localization} if localization else {})
    return dataset("learning_coefficient", coords, variables)


def comparison() -> xr.Dataset:
    """Three checkpoints: one has a significantly different loss, none a different error; one interval reaches zero."""
    k, pair = 3, ("checkpoint", "other")
    apart = np.abs(np.subtract.outer(np.arange(k), np.arange(k))) / 10
    loss, error = np.array([[0.4], [0.5], [0.41]]), np.array([[0.004], [0.006], [0.01]])
    edge, top = np.array([100.0, 90.0, 60.0]), np.array([20.0, 12.0, 18.0])
    split = {"loss": (loss, 0.02), "error": (error, 0.003)}
    variables: dict[str, Any] = {
        "disagreement": (pair, apart), "disagreement_se": (pair, 0.1 * apart),
        "distance_from_start": ("checkpoint", edge),
        "cka": ((*pair, "layer"), 1 - apart[..., None] * np.array([0.1, 1.0, 2.0])), "trace": ("checkpoint", edge),
        "cka_se": ((*pair, "layer"), np.full((k, k, 3), 0.01)), "trace_se": ("checkpoint", 0.1 * edge),
        "trace_probe_se": ("checkpoint", 0.06 * edge), "trace_data_se": ("checkpoint", 0.08 * edge),
        "n_outliers": ("checkpoint", [9.0, 8.0, 0.0]), "outlier_p": ("checkpoint", [0.002, 0.01, 0.4]),
        "trace_difference": (pair, np.subtract.outer(edge, edge)), "trace_difference_se": (pair, np.full((k, k), 12.0)),
        "lambda_max": ("checkpoint", top), "lambda_max_data_se": ("checkpoint", 0.1 * top),
        "lambda_max_se": ("checkpoint", 0.1 * top), "lambda_max_low": ("checkpoint", 0.8 * top),
        "lambda_max_high": ("checkpoint", 1.2 * top), "lambda_max_difference": (pair, np.subtract.outer(top, top)),
        "lambda_max_difference_data_se": (pair, np.full((k, k), 1.5)),
        "lambda_max_difference_low": (pair, np.subtract.outer(top, top) - 0.1),
        "lambda_max_difference_high": (pair, np.subtract.outer(top, top) + 0.1),
    }  # fmt: skip
    for name, (values, se) in split.items():
        variables[name] = (("checkpoint", "split"), values)
        variables[f"{name}_se"] = (("checkpoint", "split"), np.full((k, 1), se))
        variables[f"{name}_difference"] = ((*pair, "split"), values[:, None] - values[None])
        variables[f"{name}_difference_se"] = ((*pair, "split"), np.full((k, k, 1), se))
    names = ["plain", "champion", "restart"]
    variables["n_examples"] = ("split", [500])
    coords = {"checkpoint": names, "other": names, "split": ["test"], "layer": ["fc1", "fc2", "output"]}
    return dataset("comparison", coords, variables, function_split="test", classes=10)


def functional() -> xr.Dataset:
    """The part of a comparison that concerns functions."""
    ds = comparison()
    return ds[["disagreement", "disagreement_se", "cka", "cka_se"]].assign_attrs(ds.attrs, kind="functional")


def _two_wells(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return -np.exp(-((x - 2) ** 2 + (y + 2) ** 2) / 5) - 1.5 * np.exp(-((x + 2) ** 2 + (y + 1) ** 2))


def surface() -> xr.Dataset:
    """The two-well surface, and tilted."""
    x, y = np.linspace(-4, 4, 40), np.linspace(-4, 2, 30)
    value = _two_wells(x, y[:, None])
    tilted = value + 0.03 * (x - y[:, None])
    variables = {"value": (("iteration", "y", "x"), np.stack([value, tilted]))}
    return dataset("surface", {"iteration": [0, 1], "x": x, "y": y}, variables)


def descent() -> xr.Dataset:
    """Straight to each of the wells."""
    along = np.linspace(0, 1, 21)[:, None]
    ends, start = np.array([[2.0, -2.0], [-2.0, -1.0]]), np.array([-0.335, -1.4])
    path = start + along * (ends[:, None] - start) + 0.3 * np.sin(np.pi * along) * [0.0, 1.0]
    variables = {
        "path": (("iteration", "step", "component"), path),
        "end_value": ("iteration", _two_wells(*ends.T)),
    }
    return dataset("descent", {"iteration": [0, 1], "component": ["x", "y"]}, variables, strategy="persistent")


def basin() -> xr.Dataset:
    """Left, right, and a corner of neither."""
    x, y = np.linspace(-4, 4, 33), np.linspace(-4, 2, 25)
    where = np.where(x + 0.2 * y[:, None] < -0.5, 0, 1)
    where[(x < -3) & (y[:, None] > 1)] = -1
    variables = {
        "basin": (("y", "x"), where), "minimum": (("well", "component"), [[-2.0, -1.0], [2.0, -2.0]]),
        "minimum_value": ("well", [-1.534, -1.0]), "share": ("well", [(where == k).mean() for k in range(2)]),
    }  # fmt: skip
    return dataset("basin", {"x": x, "y": y}, variables)


def ensemble() -> xr.Dataset:
    """Four chains of two penalties, some of which leave the plateau at 4.2."""
    iteration, x = np.arange(5), np.linspace(-4, 4, 41)
    left = iteration[:, None] >= np.array([2, 9, 3, 1])
    loss = np.where(left, 0.5, 4.2)
    variables = {
        "final_loss": (("iteration", "member"), loss),
        "prediction": (("iteration", "member", "x"), np.abs(x) * (5 - loss[..., None]) / 4),
        "data_x": ("point", [-3.0, -1.0, 1.0, 3.0]), "data_y": ("point", [3.0, 1.0, 1.0, 3.0]),
    }  # fmt: skip
    coords = {
        "iteration": iteration,
        "x": x,
        "seed": ("member", [0, 1, 2, 3]),
        "lam": ("member", [0.01, 0.01, 0.1, 0.1]),
    }
    return dataset("ensemble", coords, variables, strategy="persistent")


def restarts() -> xr.Dataset:
    """Twelve single trainings, a third of which leave the plateau at 4.2."""
    ds = ensemble().isel(iteration=[-1], member=[0] * 12).drop_vars("lam")
    loss = 4.2 - np.where(np.arange(12) % 3 == 1, 2.0 + 0.1 * np.arange(12), 0.05 * np.arange(12))
    ds["final_loss"] = (("iteration", "member"), loss[None])
    return ds.assign_coords(seed=("member", np.arange(12)), iteration=[0]).assign_attrs(strategy="restart")


def curvature_along_training() -> xr.Dataset:
    """An eigenvalue that rises to its threshold and stays there, and critical sharpness below it from a step on."""
    step = np.arange(0, 300, 10)
    top = 40 * np.tanh(step / 80) + 0.8 * noise(len(step)) * (step > 150)
    values = top[:, None] * np.array([1.0, 0.6])
    names = ("lambda_max", "preconditioned_lambda_max", "threshold", "loss", "gradient_norm")
    numbers = (top, top, np.full(len(step), 40.0), np.exp(-step / 90) + 0.01, 0.5 * np.exp(-step / 60) + 0.02)
    variables: dict[str, Any] = {name: ("step", one) for name, one in zip(names, numbers, strict=True)}
    variables["eigenvalue"] = (("step", "pair"), values)
    critical = np.where(step > 0, 0.8 * top, np.nan)
    for name, factor in (("", 1.0), ("_low", 0.975), ("_high", 1.025)):
        variables[f"critical_sharpness{name}"] = ("step", factor * critical)
    for name in ("eigenvalue", "critical_sharpness", *(name for name in names if name != "threshold")):
        dims, value = variables[name]
        variables[f"{name}_se"] = (dims, 0.08 * value)
    return dataset("curvature_monitor", {"step": step, "pair": [1, 2]}, variables, optimizer="SGD")


def escape() -> xr.Dataset:
    """Probabilities that rise at three speeds."""
    iteration = np.arange(8)
    probability = 1 - np.exp(-np.array([[0.1], [0.5], [0.2]]) * iteration)
    at, half = ("strategy", "iteration"), 0.5 * np.sqrt(probability * (1 - probability))
    variables = {
        "probability": (at, probability), "probability_low": (at, probability - half),
        "probability_high": (at, probability + half), "n_starts": ("strategy", [20, 20, 20]),
    }  # fmt: skip
    names = ["persistent, λ = 0.01", "persistent, λ = 0.1", "restart"]
    coords = {"strategy": names, "iteration": iteration, "lam": ("strategy", [0.01, 0.1, np.nan])}
    return dataset("escape", coords, variables, confidence=0.95)


def champion(n_restarts: int = 5) -> xr.Dataset:
    """A champion behind a barrier, flatter than restarts and as good as they are."""
    from pnanalysis.analyses.champion_numbers import Number, as_variables
    from pnanalysis.analyses.null_distribution import null_distribution
    from pnanalysis.estimates import Estimate

    k, position = n_restarts + 2, np.linspace(0, 1, 11)
    scatter = noise(6, k, seed=3)
    spec = [
        ("barrier", "barrier of the training loss", 1.0, 0.1, 1.3, True, False),
        ("distance", "distance of weights", 20.0, 0.5, 17.0, True, False),
        ("test_error", "test error", 0.12, 0.004, 0.121, False, True),
        ("lambda_max", "Hessian lambda_max", 20.0, 1.5, 9.0, False, False),
        ("n_outliers", "Hessian outliers", 9.0, 0.0, 9.0, False, False),
        ("norm", "norm of the parameters", 15.0, 0.5, 15.2, False, False),
    ]  # fmt: skip
    numbers = []
    for (name, title, mean, spread, own, of_pair, percent), row in zip(spec, scatter, strict=True):
        values = [Estimate(mean + spread * one, spread / 2) for one in row]
        values[0] = Estimate(np.nan) if of_pair else values[0]
        values[1] = Estimate(own, spread / 2)
        difference = Estimate(own - values[0].value, spread, p=0.01 if name == "lambda_max" else 0.5)
        numbers.append(Number(name, title, values, difference, of_pair, percent, name == "n_outliers"))
    value = np.array([one.array("value") for one in numbers])
    null = null_distribution(
        value[:, 2:], value[:, 1], 0 * value[:, 2:], 0 * value[:, 1], np.zeros(6, bool), np.array([0, 0, 0, 0, 1, 0])
    )
    top = np.append([np.nan, 1.3], 1 + 0.1 * scatter[0, 2:])[:, None, None] * np.array([1.0, 0.5])[:, None]
    excess = 4 * top * position * (1 - position)
    variables = as_variables(numbers) | {
        **{f"null_{name}": ("diagnostic", getattr(null, name)) for name in ("mean", "low", "high", "p", "score")},
        "excess": (("checkpoint", "path", "position"), excess),
        "excess_se": (("checkpoint", "path", "position"), 0.03 * excess),
        "barrier": (("checkpoint", "path"), top[..., 0]), "barrier_se": (("checkpoint", "path"), 0.03 * top[..., 0]),
    }  # fmt: skip
    coords = {
        "diagnostic": [one.name for one in numbers], "path": ["line", "aligned"], "position": position,
        "checkpoint": ["plain", "champion", *(f"restart {i + 1}" for i in range(n_restarts))],
        **{
            name: ("diagnostic", [getattr(one, name) for one in numbers])
            for name in ("title", "of_pair", "percent", "whole")
        },
        "log_scale": ("diagnostic", [False] * 6),
    }  # fmt: skip
    return dataset("champion", coords, variables, role="champion")


#: By the stored picture's name: figure, dataset, and options, whose values may be functions that make a dataset.
PICTURES: dict[str, tuple[str, Callable[[], xr.Dataset], dict[str, Any]]] = {
    "history": ("history", history, {}),
    "history_one_epoch": ("history", lambda: history(EPOCHS[:1]), {}),
    "errors": ("errors", history, {"control": lambda: history(champion=1) * 1.02}),
    "hessian": ("hessian", spectra, {}),
    "hessian_symlog": ("hessian", spectra, {"symlog": True}),
    "hessian_examples": ("hessian", spectra_of_examples, {}),
    "layer_spectra": ("layer_spectra", layer_spectra, {}),
    "eigenpairs": ("eigenpairs", eigenpairs, {}),
    "blocks": ("blocks", blocks, {}),
    "blocks_two_networks": ("blocks", lambda: blocks(bits=False), {}),
    "saturation": ("saturation", saturation, {}),
    "saturation_of_files": ("saturation", saturation_of_files, {}),
    "saturation_gap": ("saturation_gap", saturation, {}),
    "saturated_layers": ("saturated_layers", saturation, {}),
    "activation_histogram": ("activation_histogram", saturation, {}),
    "trajectory": ("trajectory", trajectory, {}),
    "trajectories": ("trajectories", trajectory, {}),
    "trajectory_layers": ("trajectory_layers", trajectory_layers, {}),
    "cosines": ("cosines", trajectory, {}),
    "pca": ("pca", trajectory, {}),
    "barrier": ("barrier", barrier, {}),
    "landscape": ("landscape", landscape, {"trajectory": trajectory}),
    "sharpness": ("sharpness", sharpness, {}),
    "sharpness_over_radii": ("sharpness", sharpness_over_radii, {}),
    "correlation": ("correlation", correlation, {}),
    "learning_coefficient": ("learning_coefficient", learning_coefficients, {}),
    "learning_coefficient_calibration": (
        "learning_coefficient",
        lambda: learning_coefficients([10.0, 100.0]),
        {},
    ),
    "learning_coefficient_localizations": (
        "learning_coefficient",
        lambda: learning_coefficients([10.0, 30.0, 100.0]).isel(step_size=1),
        {},
    ),
    "curvature_monitor": ("curvature_monitor", curvature_along_training, {}),
    "gradients": ("gradients", gradients, {}),
    "gradients_one_epoch": ("gradients", lambda: gradients(EPOCHS[:1]), {}),
    "champion": ("champion", champion, {}),
    "champion_without_restarts": ("champion", lambda: champion(0), {}),
    "comparison": ("comparison", comparison, {}),
    "functional": ("functional", functional, {}),
    "descent": ("descent", descent, {"surfaces": surface}),
    "surface": ("surface", surface, {"descents": descent}),
    "surface_3d": ("surface_3d", surface, {"descents": descent}),
    "basin": ("basin", basin, {}),
    "ensemble": ("ensemble", ensemble, {}),
    "ensemble_by_seed": ("ensemble", restarts, {}),
    "escape": ("escape", escape, {}),
}
