"""Is the champion of a persistent run another minimum than the plain model, and a better one than restarts give?"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import nn

from pnanalysis import schema
from pnanalysis.analyses.champion_numbers import Number, as_variables, numbers_of
from pnanalysis.analyses.champion_verdict import better_answer, minimum_answer
from pnanalysis.analyses.comparison import ComparisonRequest, compare_selected
from pnanalysis.analyses.contest import Contest, contest
from pnanalysis.analyses.hessian import names_of
from pnanalysis.analyses.landscape import LandscapeOptions, network_landscape
from pnanalysis.analyses.null_distribution import null_distribution, selected_among
from pnanalysis.analyses.significant_differences import ROUND_OFF, single_p_values
from pnanalysis.analyses.work_folder import WorkFolder, weights_digest, within
from pnanalysis.checks import at_least
from pnanalysis.curvature.operators import HessianOperator
from pnanalysis.errors import ModelError
from pnanalysis.evaluation.diagnosis import clear_errors
from pnanalysis.evaluation.disagreement import evaluate
from pnanalysis.evaluation.losses import loss_on
from pnanalysis.inputs.batches import batch_size, can_cut, joined, rows
from pnanalysis.inputs.data import DataLike
from pnanalysis.inputs.models import Loss, ModelLike
from pnanalysis.inputs.selection import Given, Selection
from pnanalysis.inputs.sources import resolve_device
from pnanalysis.significance import holm
from pnanalysis.terminal.progress import progress_bar

#: What ``quick=True`` asks for in place of the defaults.
QUICK: dict[str, Any] = {"n": 1000, "hessian": {"n": 256, "n_hvp": 60}, "cka": False, "n_points": 7, "n_line": 512}
#: How attributes begin that say of which matrix numbers are.
_MATRICES = ("hessian_", "eigenpairs_", "blocks_")
_DEFAULTS: dict[str, Any] = {"n": None, "hessian": True, "cka": True, "n_points": 11, "n_line": 2048}
_N_RESTARTS = 5  # of the alignment
_N_BATCHES = 8  # at least, whose gradients tell the error of their mean


def champion(
    *given: Given,
    restarts: Given | None = None,
    model: ModelLike | None = None,
    data: DataLike | None = None,
    loss: str | Loss | None = None,
    n: int | None = None,
    hessian: bool | Mapping[str, Any] | None = None,
    eigenpairs: bool | Mapping[str, Any] = False,
    sharpness: bool | Mapping[str, Any] = False,
    blocks: bool | Mapping[str, Any] = False,
    learning_coefficient: bool | Mapping[str, Any] = False,
    cka: bool | None = None,
    saturation: bool = True,
    align: bool = True,
    n_points: int | None = None,
    n_line: int | None = None,
    quick: bool = False,
    batch_size: int = 256,
    device: str | None = "cpu",
    seed: int = 0,
    progress: bool = True,
    state: str | os.PathLike[str] | None = None,
) -> xr.Dataset:
    """Is the champion of a persistent run another minimum than the plain model, and a better one?

    Everything is measured on the plain model, on the champion, and on plain restarts, whose numbers are the null
    distribution: what another start alone does.

    Parameters
    ----------
    *given, model, data, loss
        One persistent run; see :func:`pnanalysis.hessian`. Of networks in memory or files of weights, the first is the
        plain model, the second the champion, and the others are restarts. Where the plain model is itself the champion
        of a run, the best of the later iterations (``challenger``) is judged.
    restarts : run, path, or several, optional
        Runs of the same network and data that hold restarts. By default the control that ``pntrain --control`` has
        trained beside the run. Of other runs the plain model counts.
    n : int or None
        Examples of each split, drawn by ``seed``; all by default.
    hessian, eigenpairs, sharpness, blocks, learning_coefficient : bool or mapping
        Spectra (on by default), leading eigenpairs, sharpness, curvature of blocks and local learning coefficients of
        the training loss: see :func:`pnanalysis.compare`. Spectra saved with a run are used if they are of the same
        weights, examples and settings.
    cka, saturation : bool
        Whether to compare layers and activations (on by default).
    align : bool
        Whether to draw the line to each network with its hidden units relabelled, too.
    n_points, n_line : int, optional
        Points of each line from end to end, and training examples on it: 11 and 2,048.
    quick : bool
        Smaller defaults of all of these: :data:`QUICK`.
    batch_size : int
    device : str or None
    seed : int
    progress : bool
    state : path, optional
        Folder for unfinished work, from which an interrupted call with the same arguments resumes: finished lines, and
        of spectra, eigenpairs, sharpness, blocks and chains what :func:`pnanalysis.compare` keeps. It can be removed
        once the call returns.

    Returns
    -------
    xarray.Dataset
        Kind ``champion``; dims ``diagnostic``, ``checkpoint`` (plain, champion, restarts), ``path`` and ``position``,
        ``reference`` (plain, best restart) and ``training``.

        - ``value`` of each diagnostic of each network with its errors; where it is that of a pair with the plain model
          (coordinate ``of_pair``), the plain model's own is NaN;
        - ``difference`` of champion minus plain, with ``difference_p`` as in :func:`pnanalysis.compare`;
        - ``null_mean``, ``null_low`` and ``null_high``: mean of the restarts and 95 % interval of prediction for one
          more; ``null_p_single`` and ``null_p`` (adjusted for all diagnostics by Holm's step-down) of the champion
          being one more; its ``null_rank`` among them (1 is the lowest) with ``null_rank_p``;
        - ``loss``, ``excess``, ``barrier`` and ``distance`` on the line from the plain model to each network, as it is
          and aligned;
        - ``error_difference`` of the champion from the plain model and from the best of as many restarts, picked in
          the same way; paired, with p-values adjusted for the two;
        - ``criterion`` and ``test_error`` of all trainings, and ``selection_p``: how often the best of as many, drawn
          from persistent iterations and restarts together, has a test error as low.

        The attributes ``minimum`` and ``better`` are the two answers in a word or two, and
        :func:`pnanalysis.verdict` gives them in sentences.

    Raises
    ------
    PnError
        If there is no iteration after the plain model, or restarts are of another network or other data.

    Notes
    -----
    *Another minimum?* The lower of the two barriers decides, as it is or aligned: the same basin if it is within its
    error of zero, another minimum otherwise. See :func:`pnanalysis.analyses.champion_verdict.minimum_answer` for the
    whole rule.

    *Better?* If its test error is significantly below that of the plain model and that of the best of as many
    restarts: see :func:`pnanalysis.analyses.champion_verdict.better_answer`. The paired errors are about other
    examples, for these networks; only restarts can tell what another training would have given, and the p-values of
    ranks say how much so many of them can.

    References
    ----------
    Y. Min, "Persistent Neurons", arXiv:2007.01419. J. Frankle et al., arXiv:1912.05671 (barriers). S. Ainsworth et
    al., arXiv:2209.04836 (alignment).

    Examples
    --------
    >>> ds = champion(open_run("runs/lenet5"))  # doctest: +SKIP
    >>> print(*verdict(ds), sep="\\n")  # doctest: +SKIP
    """
    asked = {"n": n, "hessian": hessian, "cka": cka, "n_points": n_points, "n_line": n_line}
    asked = {name: value for name, value in asked.items() if value is not None}
    settings = _DEFAULTS | (QUICK if quick else {}) | asked
    at_least(2, n_points=settings["n_points"])
    at_least(1, n_line=settings["n_line"])
    wanted = ComparisonRequest.of(
        n=settings["n"], hessian=settings["hessian"], eigenpairs=eigenpairs, sharpness=sharpness, blocks=blocks,
        learning_coefficient=learning_coefficient, cka=settings["cka"], saturation=saturation, batch_size=batch_size,
        seed=seed,
    )  # fmt: skip
    found = contest(given, restarts, model, data, loss)
    torch_device = resolve_device(device)
    options = LandscapeOptions(n_points=settings["n_points"], n_restarts=_N_RESTARTS, align=align, seed=seed)
    folder = None if state is None else Path(state)
    lines, not_aligned = _lines(
        found.selection, options, settings["n_line"], torch_device, progress, within(folder, "lines")
    )
    compared = compare_selected(found.selection, wanted, torch_device, progress, folder)
    gradient = None
    if wanted.spectra is not None:
        gradient = _gradients(found.selection, settings["n_line"], seed, torch_device, progress)
    ds = judged(found, compared, lines, gradient)
    first = found.selection[0].source
    attrs = found.attrs | {"not_aligned": not_aligned or (None if align else "alignment is turned off")}
    ds = ds.assign_attrs({name: value for name, value in attrs.items() if value is not None})
    return schema.finish(
        ds.assign_attrs(minimum=minimum_answer(ds).word, better=better_answer(ds).word), "champion",
        **first.dataset_attrs(), **attrs, n=settings["n"], n_line=settings["n_line"], batch_size=batch_size, seed=seed,
        device=str(torch_device), dtype="float32",
    )  # fmt: skip


def judged(found: Contest, compared: xr.Dataset, lines: xr.Dataset, gradient: xr.Dataset | None = None) -> xr.Dataset:
    """The variables of :func:`champion` from what was measured.

    Parameters
    ----------
    found : Contest
    compared : xarray.Dataset
        Of :func:`pnanalysis.analyses.comparison.compare_selected`.
    lines : xarray.Dataset
        Kind ``barrier``, on the training split, along ``checkpoint``: all networks after the plain one.
    gradient : xarray.Dataset, optional
        ``gradient_norm`` and ``gradient_noise`` along ``checkpoint``.
    """
    numbers = numbers_of(compared, lines, gradient)
    ds = xr.Dataset(
        as_variables(numbers) | _null(numbers),
        coords={
            "diagnostic": [one.name for one in numbers], "checkpoint": found.selection.labels,
            "title": ("diagnostic", [one.title for one in numbers]),
            "diagnostic_units": ("diagnostic", [one.units for one in numbers]),
            "of_pair": ("diagnostic", [one.of_pair for one in numbers]),
            "percent": ("diagnostic", [one.percent for one in numbers]),
            "whole": ("diagnostic", [one.whole for one in numbers]),
            "log_scale": ("diagnostic", [one.is_log for one in numbers]),
            "description": ("checkpoint", [item.description for item in found.selection]),
        },
    )  # fmt: skip
    names = [name for name in ("loss", "excess", "barrier") for name in (name, f"{name}_se")] + ["distance"]
    ds = ds.merge(lines[names].reindex(checkpoint=found.selection.labels), compat="override")
    if gradient is not None:
        ds = ds.assign(gradient_noise=gradient.gradient_noise)
    if "js_divergence" in compared:
        ds = ds.assign(js_divergence=compared.js_divergence.isel(other=0, drop=True))
    split = str(compared.attrs["function_split"])
    kept = {key: compared.attrs[key] for key in ("classes", "function_split", "n_hessian") if key in compared.attrs}
    kept |= {key: value for key, value in compared.attrs.items() if key.startswith(_MATRICES)}
    ds = ds.assign_attrs(kept, n_examples=int(compared.n_examples.sel(split=split)))
    ds = ds.merge(_against(found, compared, split), combine_attrs="no_conflicts")
    return _with_selection(ds, found)


def _null(numbers: list[Number]) -> dict[str, Any]:
    """The champion among the restarts."""
    value, se = (np.array([one.array(part) for one in numbers]) for part in ("value", "se"))
    found = null_distribution(
        value[:, 2:], value[:, 1], se[:, 2:], se[:, 1], np.array([one.is_log for one in numbers]),
        np.array([one.resolution for one in numbers]),
    )  # fmt: skip
    parts = {
        "null_n": found.n, "null_mean": found.mean, "null_low": found.low, "null_high": found.high,
        "null_score": found.score, "null_p_single": found.p_single, "null_p": found.p, "null_rank": found.rank,
        "null_rank_p": found.rank_p,
    }  # fmt: skip
    return {name: ("diagnostic", values) for name, values in parts.items()}


def _against(found: Contest, compared: xr.Dataset, split: str) -> xr.Dataset:
    """The champion's errors less those of the plain model and of the best restart, paired by example."""
    name = _judged_by(compared, split)
    picked = found.best_restart(_criterion(compared))
    others = [0] if picked is None else [0, 2 + picked]
    at = compared.sel(split=split).isel(checkpoint=1, other=others)
    p = dict(single_p_values(compared))[f"{name}_difference"]
    place = list(compared.split.values).index(split)
    variables = {
        "error_difference": ("reference", at[f"{name}_difference"].values),
        "error_difference_se": ("reference", at[f"{name}_difference_se"].values),
        "error_difference_p": ("reference", holm(p[1, others, place])),
    }
    if "only_wrong" in compared:
        variables["only_wrong"] = ("reference", at.only_wrong.values)
        back = compared.sel(split=split).isel(checkpoint=others, other=1)
        variables["only_right"] = ("reference", back.only_wrong.values)
    best = None if picked is None else found.selection.labels[2 + picked]
    names = ["plain"] if picked is None else ["plain", "best restart"]
    return xr.Dataset(
        variables, {"reference": names}, {"judged_by": name} | ({} if best is None else {"best_restart": best})
    )


def _judged_by(compared: xr.Dataset, split: str) -> str:
    """Errors if there are any but the loss itself, which squared errors may be."""
    at = compared.sel(split=split)
    if not bool(at.error.notnull().all()):
        return "loss"
    is_loss = "classes" not in compared.attrs and np.allclose(at.loss, at.error, rtol=ROUND_OFF, atol=0)
    return "loss" if is_loss else "error"


def _criterion(compared: xr.Dataset) -> np.ndarray:
    """What networks without a history are picked by: validation error or loss, else training loss; of the restarts."""
    split = "validation" if "validation" in compared.split.values else "train"
    name = _judged_by(compared, split) if split == "validation" else "loss"
    return compared[name].sel(split=split).values[2:]


def _with_selection(ds: xr.Dataset, found: Contest) -> xr.Dataset:
    """With what all trainings were judged by, and what choosing the best of them does."""
    own, others = found.own, found.others
    if own is None:
        return ds
    known = [own] if others is None else [own, others]
    n = [len(one.criterion) for one in known]
    names = [f"iteration {i + 1}" for i in range(n[0])] + [f"restart {i + 1}" for i in range(sum(n[1:]))]
    ds = ds.assign_coords(training=names).assign(
        criterion=("training", np.concatenate([one.criterion for one in known])),
        training_test_error=("training", np.concatenate([one.test_error for one in known])),
    )
    if others is None:
        return ds
    own, others = own.candidates, others.candidates
    if not (len(own.criterion) and len(others.criterion)):
        return ds
    if not (np.isfinite(own.test_error).all() and np.isfinite(others.test_error).all()):
        return ds
    chance = selected_among(own.criterion, own.test_error, others.criterion, others.test_error)
    return ds.assign(selection_p=chance.p, selection_least_p=chance.least_p, best_of_restarts=chance.expected)


def _lines(
    selection: Selection, options: LandscapeOptions, n: int, device: torch.device, progress: bool, state: Path | None
) -> tuple[xr.Dataset, str]:
    """Loss on the line from the plain model to every other network; and why networks could not be aligned, if so."""
    source = selection[0].source
    batches = {"train": selection.split(source, "train", n, options.seed, device).batches(512)}
    (first, plain), *others = selection.networks(device, torch.float32).items()
    rows, reason = [], ""

    def line(name: str, network: nn.Module, align: bool) -> xr.Dataset:
        pair, how = {first: plain, name: network}, replace(options, align=align)
        failed = None
        try:
            ds, _ = network_landscape(pair, source.loss, batches, how, label=source.label, progress=progress)
        except ModelError as error:
            if not align:
                raise
            failed, how = str(error), replace(options, align=False)
            ds, _ = network_landscape(pair, source.loss, batches, how, label=source.label, progress=progress)
        return schema.finish(ds, "barrier", not_aligned=failed)

    settings = {**asdict(options), "n": n, "plain": weights_digest(plain)} | names_of(selection)
    with WorkFolder.held(state, settings) as cache:
        loss = 0.0 if cache is None else _loss(plain, source.loss, batches["train"], device)
        for name, network in others:
            compute = partial(line, name, network, options.align and not reason)
            ds = compute() if cache is None else cache.of(network, batches["train"]).part("", loss, compute)
            reason = reason or str(ds.attrs.get("not_aligned", ""))
            rows.append(ds.isel(split=0, drop=True))
    lines = xr.concat(rows, dim="checkpoint", join="outer", combine_attrs="drop")
    return lines.assign_coords(checkpoint=[name for name, _ in others]), reason


def _loss(network: nn.Module, loss: Loss, batches: Iterable[Any], device: torch.device) -> float:
    """What tells whether a user's code or data have changed since lines were saved."""
    pairs = (([inputs], targets) for inputs, targets in batches)
    scores = evaluate({"plain": network}, pairs, loss_on(loss, device, torch.float32), lambda *steps: None)
    return float(np.mean(scores.losses))


def _gradients(selection: Selection, n: int, seed: int, device: torch.device, progress: bool) -> xr.Dataset:
    """Norm of the gradient of the training loss, and what the choice of examples contributes to it."""
    source = selection[0].source
    part = selection.split(source, "train", n, seed, device)
    batches = _mixed(part.batches(max(1, min(512, n // _N_BATCHES))), seed)
    found = []
    with progress_bar("gradients", len(selection), progress) as advance:
        for item in selection:
            network = selection.network(item, device, torch.float32)
            with clear_errors(item.label, network, batches, source.loss):
                op = HessianOperator(network, source.loss, batches, device=device, expected_products=1)
                found.append(_gradient(op))
            advance()
    norm, noise = np.array(found).T
    return xr.Dataset(
        {"gradient_norm": ("checkpoint", norm), "gradient_noise": ("checkpoint", noise)},
        {"checkpoint": selection.labels},
    )


def _mixed(batches: Iterable[Any], seed: int) -> list[Any]:
    """The same examples in batches of random ones, where they can be told apart: data may come class after class."""
    given = list(batches)
    with suppress(RuntimeError, ValueError):
        whole = reduce(joined, given)
        if can_cut(whole):
            order = torch.randperm(batch_size(whole), generator=torch.Generator().manual_seed(seed))
            return [rows(whole, chosen) for chosen in order.split(batch_size(given[0]))]
    return given


def _gradient(op: HessianOperator) -> tuple[float, float]:
    """Norm of the mean gradient, and of its error: of random batches of b examples with gradients g it is the root of
    ``sum b |g - mean|^2 / (N (K - 1))``."""
    sizes, weights = np.array(op.batches.sizes, dtype=float), np.array(op.batches.weights)
    mean, squares = torch.zeros(op.shape[0], dtype=torch.float64, device=op.device), []
    for weight, one in zip(weights[op.batches.counting], op.batch_gradients(), strict=True):
        mean.add_(one.double(), alpha=float(weight))
        squares.append(float(one.double() @ one.double()))
    total, norm = sizes.sum(), float(mean.norm())
    if len(sizes) < 2 or not np.allclose(weights, sizes / total):
        return norm, np.nan
    scatter = max(float(sizes @ np.array(squares)) - total * norm**2, 0.0)
    return norm, float(np.sqrt(scatter / (total * (len(sizes) - 1))))
