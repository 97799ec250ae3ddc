"""The spectral density of an operator, as a dataset with error bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

from pnanalysis import schema
from pnanalysis.arrays import Array
from pnanalysis.checks import at_least, check_seed, human, one_of, positive
from pnanalysis.errors import CurvatureError
from pnanalysis.spectra import lanczos
from pnanalysis.spectra.averaged import is_averaged
from pnanalysis.spectra.data_error import DATA_ERRORS, DataForms
from pnanalysis.spectra.deflation import sample_spectrum
from pnanalysis.spectra.density_error import density_with_error
from pnanalysis.spectra.forecast import Forecast
from pnanalysis.spectra.half_samples import contrasts_of_means, has_half_samples, sample_examples
from pnanalysis.spectra.linear_operator import as_operator, round_off
from pnanalysis.spectra.memory import MODES, Storage, memory_limit
from pnanalysis.spectra.moments import coupling_left, moments
from pnanalysis.spectra.plan import planned_work, with_basis_that_fits
from pnanalysis.spectra.quadrature import Extremes, SpectralMeasure, all_ritz_values, averaged_rule, extremes, ritz
from pnanalysis.spectra.sample import SamplingSettings, SpectrumSample
from pnanalysis.spectra.sharing import part_of, processes_of
from pnanalysis.spectra.stopping import Until, checked_targets
from pnanalysis.spectra.summary import effective_rank, summarise
from pnanalysis.spectra.total_error import with_data_errors
from pnanalysis.terminal.progress import progress_bar

#: Errors of finite differences that several products together may change an eigenvalue by.
_SEVERAL = 3.0
#: Points of the grid that a density is given on.
N_GRID = 1024
#: Products where neither a budget nor numbers of steps and probes are given.
N_HVP = 900
#: Products that a budget has at least, and that some of them are spent on deflation from.
FEWEST = 4
#: Lanczos steps per probe, and probes, where only the other number is given.
N_LANCZOS, N_PROBES = 90, 10


def spectral_density(
    operator: Any,
    n_lanczos: int | None = None,
    n_probes: int | None = None,
    deflate: bool = True,
    kernel_width: float | None = None,
    seed: int = 0,
    progress: bool = True,
    *,
    n_hvp: int | None = None,
    until: Mapping[str, float] | None = None,
    grid: Array | None = None,
    top_k: int = 10,
    ridge: float = 1.0,
    basis_dtype: torch.dtype | None = None,
    basis_device: torch.device | str | None = None,
    basis: str = "auto",
    max_memory_bytes: int | None = None,
    symmetry_tolerance: float | None = None,
    state: str | Path | None = None,
    save_every: float = 300.0,
    title: str = "spectrum",
    data_error: str = "examples",
    n_classes: int | None = None,
) -> xr.Dataset:
    """Estimate the spectrum of a symmetric operator from its products with vectors.

    Parameters
    ----------
    operator : LinearOperator or matrix
        Anything :func:`pnanalysis.as_operator` takes.
    n_lanczos, n_probes : int, optional
        Lanczos steps per probe, and number of probes, in place of a budget ``n_hvp``; the cost is their product. If
        one of them is given, the other is 90 steps (P where that is less) or 10 probes. A single probe is divided up
        as under ``n_hvp``.
    deflate : bool
        Treat the Krylov space of the first probe exactly, and run the others in its orthogonal complement (see
        :mod:`pnanalysis.spectra.deflation`). ``False`` gives plain stochastic Lanczos quadrature, and so do fewer than
        four products.
    kernel_width : float, optional
        Standard deviation of the Gaussian kernel, in units of the eigenvalues. Default: see
        :func:`default_kernel_width`.
    seed : int
        Of the random probes, which are the same on every device.
    progress : bool
        Show a progress bar on a terminal, and say on standard error what time and memory are to come, once two products
        have been measured (see :mod:`pnanalysis.spectra.forecast`). This resets CUDA's statistics of peaks.
    n_hvp : int, optional
        A budget of products, 900 by default. The first probe's Ritz values decide how much of it goes into deflation,
        a fixed rule divides the rest, and each probe is deflated for those after it. At equal cost this is two to
        four times as accurate as ``n_lanczos`` and ``n_probes``.
    until : mapping of str to float, optional
        Relative errors at which to stop within the budget, such as ``{"trace": 0.02}``: standard errors of ``trace``,
        ``frobenius_norm`` and ``effective_rank``, and the residual bound of ``lambda_max``. All of them are to be
        reached; the attribute ``until_reached`` says whether they were.
    grid : ndarray, optional
        Points to evaluate the density at, ``(eigenvalue,)``, ascending. Default: :func:`default_grid`.
    top_k : int
        How many of the largest eigenvalues to list.
    ridge : float
        The ``z`` of the effective dimension, in units of the eigenvalues.
    basis_dtype, basis_device : optional
        Of the Lanczos basis, float32 or float64; the operator's own by default, float32 if that is a half precision.
        ``torch.float64`` makes Lanczos on a float32 operator more accurate, and ``"cpu"`` helps when the device is
        short of memory.
    basis : {"auto", "memory", "half", "disk", "none"}
        How the Lanczos basis is kept: see :mod:`pnanalysis.spectra.memory`. ``"auto"`` is the first of these for which
        there is room; the attribute ``basis`` says which. ``"none"`` takes a few vectors whatever the budget, but
        deflates nothing, and leaves out the error of the choice of examples.
    max_memory_bytes : int, optional
        Bound on the memory for the bases (60 % of the free memory by default); probes run in smaller groups, and bases
        are kept in another way, to stay within it.
    symmetry_tolerance : float, optional
        Largest relative difference of ``u.Hv`` and ``v.Hu`` that is not an error: 1e-6 for products in float64, 0.01 in
        float32 and 0.2 in bfloat16 by default.
    state : path, optional
        A folder for unfinished work, saved every ``save_every`` seconds. The same call resumes from it and gives the
        same result as without the interruption. The folder stays: delete it once the dataset is saved.
    title : str
        Label of the progress bar.
    data_error : {"examples", "groups", "none"}
        Whether to estimate the error that the choice of examples causes, for operators over examples
        (:class:`pnanalysis.spectra.averaged.AveragedOperator`); others have none. ``"examples"`` takes the forms of
        single examples in vectors that are there anyway, for the trace, the Frobenius norm, the extreme eigenvalues,
        the numbers of classes and, nearly, the effective rank and dimension and the distance of two spectra (see
        :mod:`pnanalysis.spectra.data_error`), and a few products on two halves of the examples. ``"groups"`` also
        takes the spectra of balanced half samples, for all numbers and the density (see
        :mod:`pnanalysis.spectra.half_samples`): seven times the products of the spectrum itself.
    n_classes : int, optional
        Of a classifier: how far as many of the largest eigenvalues stand out is then part of the summary, with an error
        of the examples.

    Returns
    -------
    xarray.Dataset
        Of kind ``"spectral_density"``. ``node`` and ``weight`` are the estimated spectral measure; ``sampled`` is 1
        for nodes from random probes and 0 for nodes that stand for exactly one eigenvalue. ``density`` on the grid
        comes with ``density_se``. ``deflated_value`` are the Ritz values of the deflated space and
        ``deflated_residual`` bounds on their distance to the nearest eigenvalue. For the rest see
        :func:`pnanalysis.spectra.summary.summarise`. The attribute ``method`` is
        ``"deflated"``, ``"plain"`` or, where the budget covers all P columns, ``"exact"``, and ``n_hvp`` is what was
        spent, of ``n_hvp_planned``; vectors took up to ``basis_bytes`` of memory. The attribute ``data_error`` says
        which error for the choice of examples is included (see
        :func:`pnanalysis.spectra.total_error.with_data_errors`), and ``n_hvp_data`` what it cost beyond ``n_hvp`` and
        the forms, in products over all examples.

    Raises
    ------
    CurvatureError
        If the operator is not symmetric or not finite, ``n_lanczos`` exceeds P, the budget or memory bound is too
        small, a target error is not understood, the state folder was saved with other arguments, or
        ``data_error="groups"`` is asked of an operator without examples.

    Warns
    -----
    UserWarning
        If the operator is less symmetric than round-off explains. The attribute ``asymmetry`` is the size ``|S q|`` of
        the skew part's product with random unit vectors, relative to the norm of the operator, and ``round_off`` what
        the arithmetic explains.

    References
    ----------
    Ghorbani, Krishnan and Xiao, arXiv 1901.10159. Chen, Trogdon and Ubaru, Analysis of stochastic Lanczos
    quadrature for spectrum approximation, arXiv 2105.06595. Bhattacharjee et al., arXiv 2410.21690.

    Examples
    --------
    >>> import numpy as np
    >>> ds = spectral_density(np.diag(np.r_[np.zeros(990), np.arange(1.0, 11.0)]), n_hvp=60, progress=False)
    >>> round(float(ds.trace), 6), int(ds.n_outliers)
    (55.0, 10)
    """
    operator = as_operator(operator)
    at_least(0, n_lanczos=n_lanczos, n_probes=n_probes, n_hvp=n_hvp, top_k=top_k, n_classes=n_classes)
    check_seed(seed=seed)
    positive(ridge=ridge, kernel_width=kernel_width)
    one_of(DATA_ERRORS, data_error=data_error)
    one_of(("auto", *MODES), basis=basis)
    targets = checked_targets(until)
    n_lanczos, n_probes, n_hvp = _amounts(operator.shape[0], n_lanczos, n_probes, n_hvp, targets is not None)
    budget = n_hvp or n_lanczos * n_probes
    deflate = deflate and budget >= FEWEST  # of fewer products none would be left to sample with
    if getattr(operator, "by_differences", False) and "effective_rank" in (targets or {}):
        raise CurvatureError(
            "finite differences do not give the effective rank; take another target, or exact products"
        )
    if data_error == "groups" and not is_averaged(operator):
        raise CurvatureError('data_error="groups" needs an operator over examples, such as pnanalysis.HessianOperator')
    dtype, place = lanczos.basis_dtype(operator, basis_dtype), torch.device(basis_device or operator.device)
    part, processes = part_of(operator), processes_of(operator)
    settings = SamplingSettings(
        n_lanczos,
        n_probes,
        n_hvp,
        deflate,
        seed,
        Storage(dtype, place, part=None if part.is_all else part),
        memory_limit(operator, dtype, place, max_memory_bytes),
        symmetry_tolerance,
        None if state is None else Path(state),
        save_every,
        until=None if targets is None else Until(targets, _relative_errors),
    )
    settings = with_basis_that_fits(operator.shape[0], settings, basis, processes)
    mode = settings.storage.mode
    forms, forecast = None, Forecast(operator.device, title, progress and processes.is_first)
    if data_error != "none" and is_averaged(operator) and mode != "none":
        forms = forecast.prepared(partial(DataForms, operator, budget, n_classes))
        settings = replace(settings, data=forms)
    kept = {"memory": "", "half": " in half precision", "disk": " and the disk", "none": ", none is kept"}[mode]
    work = planned_work(operator.shape[0], settings)
    if not part.is_all:
        kept += f", in each of {part.processes.n} processes"
    with progress_bar(f"{title} ({human(work.peak)} for the basis{kept})", budget, progress) as advance:
        watched, note = forecast.watch(operator, advance, work)
        sample = sample_spectrum(watched, settings, note)
    by_differences = bool(getattr(operator, "by_differences", False))
    own = round_off(operator)
    of_sums = max(sample.rounding, own if by_differences else 0)
    facts = {
        "dtype": str(operator.dtype).removeprefix("torch."),
        "round_off": max(_SEVERAL * own if by_differences else own, sample.rounding),
        **({"basis_round_off": of_sums} if of_sums else {}),
        **({"finite_differences": True} if by_differences else {}),
        "positive_semidefinite": bool(getattr(operator, "positive_semidefinite", False)),
        **({} if n_classes is None else {"n_classes": n_classes}),
    }
    of_data = xr.Dataset(attrs={"data_error": "none"})
    if forms is not None:
        of_half = partial(
            spectral_density, n_lanczos=n_lanczos, n_probes=n_probes, deflate=deflate, seed=seed,
            n_hvp=None if n_hvp is None else max(sample.n_hvp, FEWEST),
            grid=np.array([0.0, 1.0]), top_k=top_k, ridge=ridge, basis_dtype=basis_dtype, basis_device=basis_device,
            basis=basis, max_memory_bytes=max_memory_bytes, symmetry_tolerance=symmetry_tolerance,
            save_every=save_every, progress=progress, data_error="none", n_classes=n_classes,
        )  # fmt: skip
        of_data = sample_examples(forms, data_error, of_half, settings.state, title)
    ds = _dataset(sample, facts, of_data, top_k, ridge, kernel_width, grid)
    attributes: dict[str, Any] = {"seed": seed, "device": str(operator.device), "basis": mode}
    attributes |= {"basis_bytes": work.peak, "n_hvp_planned": work.n_products}
    if targets is not None:
        attributes |= {"until": targets, "until_reached": sample.method == "exact" or sample.until_reached}
    return schema.finish(with_data_errors(ds), "spectral_density", deflate=settings.deflate, **attributes, **ds.attrs)


def _amounts(
    n_parameters: int, n_lanczos: int | None, n_probes: int | None, n_hvp: int | None, has_targets: bool
) -> tuple[int, int, int | None]:
    """Steps, probes and budget, with defaults for what is not given; a budget goes before the other two.

    Raises
    ------
    CurvatureError
    """
    if n_hvp is None and n_lanczos is None and n_probes is None:
        n_hvp = N_HVP
    if n_hvp is not None and n_hvp < FEWEST:
        raise CurvatureError(f"n_hvp is {n_hvp}; a spectrum takes at least {FEWEST} products")
    if n_hvp is None and has_targets:
        raise CurvatureError(
            "until takes a budget: give n_hvp, the most products to spend, without n_lanczos, n_probes"
        )
    if n_hvp is None and n_lanczos is not None and not 1 <= n_lanczos <= n_parameters:
        raise CurvatureError(f"n_lanczos is {n_lanczos}; it must lie between 1 and {n_parameters}, the parameters")
    if n_hvp is None and n_probes is not None and n_probes < 1:
        raise CurvatureError(f"n_probes is {n_probes}; at least one probe is needed")
    return n_lanczos or min(N_LANCZOS, n_parameters), n_probes or N_PROBES, n_hvp


def _relative_errors(sample: SpectrumSample) -> dict[str, float]:
    """Of the quantities that may have target errors."""
    ds = _quadrature_dataset(sample)
    measure = SpectralMeasure.from_dataset(ds)
    sums = moments(ds, measure)
    rank = effective_rank(measure, sums.gain)
    bounds = extremes(*all_ritz_values(ds, own=False))
    pairs = {
        "trace": (sums.trace.se, sums.trace.value),
        "frobenius_norm": (sums.square.se / 2, sums.square.value),
        "effective_rank": (rank.se, rank.value),
        "lambda_max": (bounds.max_high - bounds.max_low, bounds.max_low),
    }
    return {name: error / abs(value) if value else float(error > 0) for name, (error, value) in pairs.items()}


def _dataset(
    sample: SpectrumSample,
    facts: dict[str, Any],
    of_data: xr.Dataset,
    top_k: int,
    ridge: float,
    kernel_width: float | None,
    grid: Array | None,
) -> xr.Dataset:
    ds = _quadrature_dataset(sample).assign_attrs(facts)
    ds = ds.merge(summarise(ds, top_k=top_k, ridge=ridge)).merge(of_data)
    measure = SpectralMeasure.from_dataset(ds)
    n_steps = max((len(probe.alpha) for probe in sample.probes if probe.sampled), default=sample.n_deflated)
    if kernel_width is None:
        kernel_width = default_kernel_width(measure, float(ds.lambda_min), float(ds.lambda_max), n_steps)
    ds["kernel_width"] = ((), float(kernel_width))
    ds = smooth(ds, default_grid(ds) if grid is None else grid)
    ds.attrs = {
        "method": sample.method,
        "n_hvp": sample.n_hvp,
        "n_lanczos": n_steps,
        "n_probes": len(sample.probes),
        "n_single": len(sample.single),
        "n_deflated": sample.n_deflated,
        "n_parameters": sample.n_parameters,
        "kernel_width": kernel_width,
        "ridge": ridge,
        "asymmetry": sample.asymmetry,
        **facts,
        **of_data.attrs,
    }
    return ds


def _quadrature_dataset(sample: SpectrumSample) -> xr.Dataset:
    """Ritz values, and the measure they add up to, before any summary."""
    results = [ritz(probe.alpha, probe.beta) for probe in sample.probes]
    value, weight, residual = (_padded([result[i] for result in results]) for i in range(3))
    couplings = np.array([probe.beta[-1] if probe.deflated else 0.0 for probe in sample.probes])
    # in the whole space, a Ritz pair of the complement is also off by the couplings to what was deflated before
    before = np.sqrt(np.cumsum(couplings**2) - couplings**2)
    residual = np.hypot(residual, before[:, None])
    data: dict[str, Any] = {
        "ritz_value": (("probe", "lanczos"), value),
        "ritz_weight": (("probe", "lanczos"), weight),
        "ritz_residual": (("probe", "lanczos"), residual),
        "ritz_coupling": ("probe", before),
    }
    deflated, outer = _deflated(sample, value, residual)
    data |= deflated
    bounds = extremes(*all_ritz_values(xr.Dataset(data), own=False))
    weights = np.array([float(probe.sampled) for probe in sample.probes])
    measure = _average(sample, weights, bounds)
    # the precision of a probe depends on what was left of the spectrum when it ran, which takes an estimate of it:
    # first average with equal weights, then with the inverse variances that this average gives
    variances = measure.trace_variances()
    if len(variances) > 1 and min(variances.values()) > 0:
        weights = np.array([1 / variances[probe.n_before] if probe.sampled else 0.0 for probe in sample.probes])
        measure = _average(sample, weights, bounds)
    weights = weights / weights.sum() if weights.any() else weights
    coupling = np.sqrt(sum(weight * np.sum(couplings[:i] ** 2) for i, weight in enumerate(weights)))
    data |= {
        "node": ("quadrature", measure.node),
        "weight": ("quadrature", measure.weight),
        "sampled": ("quadrature", measure.sampled.astype(float)),
        "node_run": ("quadrature", measure.probe.astype(float)),
        "node_n_before": ("quadrature", measure.n_before.astype(float)),
        "probe_weight": ("probe", weights),
        "n_parameters": ((), sample.n_parameters),
        "coupling": ((), float(coupling)),
    }
    if "ritz_merged" in data:
        data["coupled_node"], data["coupled_weight"] = _coupled(sample, data["deflated_value"][1], weights)
    if sample.single:
        alpha, beta = (np.array([getattr(probe, name)[0] for probe in sample.single]) for name in ("alpha", "beta"))
        data["single_mean"] = ("single", alpha)
        data["single_mean_square"] = ("single", alpha**2 + beta**2)
        data["single_coupling"] = ((), outer)
        sums = moments(xr.Dataset(data), measure)
        extra = 2 * float(coupling) ** 2
        data["probe_trace"] = ((), measure.total(measure.node).value)
        data["probe_square"] = ((), measure.total(measure.node**2).value + extra)
        data["single_weight"] = ((), sums.of_single)
        n = sample.n_parameters
        measure = measure.calibrated(sums.trace.value / n, (sums.square.value - extra) / n)
        data["weight"] = ("quadrature", measure.weight)
    return xr.Dataset(data)


def _deflated(sample: SpectrumSample, value: Array, residual: Array) -> tuple[dict[str, Any], float]:
    """Ritz values of what was deflated, together where their couplings are known, and how it is coupled to the rest."""
    is_deflated = np.array([probe.deflated for probe in sample.probes])
    if sample.merged is not None and is_deflated.any():
        merged_value, merged_residual, outer = sample.merged.eigenvalues(_spaces(sample))
        return {
            "deflated_value": ("component", merged_value),
            "deflated_residual": ("component", merged_residual),
            "ritz_merged": ("probe", is_deflated.astype(float)),
        }, outer
    own = is_deflated[:, None] & np.isfinite(value)
    order = np.argsort(-value[own])
    columns = {"deflated_value": value[own][order], "deflated_residual": residual[own][order]}
    outer = float(np.sqrt(sum(float(probe.beta[-1]) ** 2 for probe in sample.probes if probe.deflated)))
    return {name: ("component", column) for name, column in columns.items() if is_deflated.any()}, outer


def _coupled(sample: SpectrumSample, whole: Array, weights: Array) -> tuple[tuple[str, Array], tuple[str, Array]]:
    """What the coupling of the deflated spaces adds to the average of the probes' estimates with ``weights``."""
    assert sample.merged is not None
    n_before = np.cumsum([0, *(probe.deflated for probe in sample.probes)])
    fractions = np.bincount(n_before[:-1], weights, minlength=int(n_before[-1]) + 1).astype(float)
    if not weights.any():  # nothing was sampled: then all spaces count
        fractions[-1] = 1.0
    node, gain = sample.merged.correction(_spaces(sample), whole, fractions)
    return ("coupled", node), ("coupled", gain)


def _spaces(sample: SpectrumSample) -> list[tuple[Array, Array]]:
    """``alpha`` and ``beta`` of each deflated space."""
    return [(probe.alpha, probe.beta) for probe in sample.probes if probe.deflated]


def _two_within(mean: float, deviation: float, bounds: Extremes) -> tuple[Array, Array]:
    """The two nodes with this mean and deviation, one at the nearer bound, the other within both."""
    down, up = mean - bounds.min_low, bounds.max_high - mean
    if deviation == 0 or min(down, up) <= 0 or deviation**2 > down * up:  # no measure within the bounds has these
        return np.array([mean]), np.array([1.0])
    near = -down if down < up else up
    far = -(deviation**2) / near
    node, weight = np.array([near, far]), np.array([-far, near]) / (near - far)
    order = np.argsort(node)
    return mean + node[order], weight[order]


def _average(sample: SpectrumSample, weights: Array, bounds: Extremes) -> SpectralMeasure:
    """Average the probes' estimates of the spectrum with weights in proportion to ``weights`` ``(probe,)``."""
    weights = weights / weights.sum() if weights.any() else weights
    parts: list[tuple[Array, Array, int, int]] = []
    for index, probe in enumerate(sample.probes):
        if probe.deflated:
            # exactly one eigenvalue each, in the estimates of all later probes; in all, if nothing was sampled
            later = float(weights[index + 1 :].sum()) if weights.any() else 1.0
            value = ritz(probe.alpha, probe.beta)[0]
            parts.append((value, np.full(len(value), later / sample.n_parameters), -index, probe.n_before))
        if probe.sampled:
            node, fraction = averaged_rule(probe.alpha, probe.beta)
            # Nodes outside the spectrum's bounds: take the Gauss rule, whose nodes never are. After a single step that
            # is one node, which does not know the variance: then two nodes of these moments within the bounds.
            if node[0] < bounds.min_low or node[-1] > bounds.max_high:
                node, fraction, _ = ritz(probe.alpha, probe.beta)
                if len(probe.alpha) == 1:
                    node, fraction = _two_within(probe.alpha[0], probe.beta[0], bounds)
            mass = weights[index] * (1 - probe.n_before / sample.n_parameters)
            parts.append((node, mass * fraction, index + 1, probe.n_before))
    return SpectralMeasure(
        np.concatenate([node for node, *_ in parts]),
        np.concatenate([weight for _, weight, *_ in parts]),
        np.concatenate([np.full(len(node), probe) for node, _, probe, _ in parts]),
        np.concatenate([np.full(len(node), n_before) for node, *_, n_before in parts]),
        sample.n_parameters,
    )


def _padded(rows: Sequence[Array]) -> Array:
    """Rows of unequal length as one table, filled up with NaN."""
    table = np.full((len(rows), max(len(row) for row in rows)), np.nan)
    for row, values in zip(table, rows, strict=True):
        row[: len(values)] = values
    return table


def default_kernel_width(measure: SpectralMeasure, lambda_min: float, lambda_max: float, n_lanczos: int) -> float:
    """The wider of two lengths: 1/500 of the range, and the spacing of the nodes in the bulk.

    The first is about the resolution of a figure and close to the width of Ghorbani et al. (variance 1e-5 on a
    range of 2). The second, the width of the central 98 % of the spectrum over ``2 n_lanczos``, keeps single
    nodes from showing as peaks. A spectrum of a single point gets a width of one part in 500 of its magnitude.
    """
    order = np.argsort(measure.node)
    cumulative = np.cumsum(measure.weight[order])
    low, high = measure.node[order][np.searchsorted(cumulative, [0.01, 0.99]).clip(max=len(order) - 1)]
    width = max((lambda_max - lambda_min) / 500, (high - low) / (2 * n_lanczos))
    magnitude = max(abs(lambda_max), abs(lambda_min))
    return float(width if width > 1e-12 * magnitude else magnitude / 500 or 1.0)


def default_grid(*datasets: xr.Dataset, n_points: int = N_GRID) -> Array:
    """An even grid over the spectra of one or more datasets, with four kernel widths to spare at both ends."""
    low = min(float((ds.lambda_min - 4 * ds.kernel_width).min()) for ds in datasets)
    high = max(float((ds.lambda_max + 4 * ds.kernel_width).max()) for ds in datasets)
    return np.linspace(low, high, n_points)


def smooth(ds: xr.Dataset, grid: Array, kernel_width: float | None = None) -> xr.Dataset:
    """Give the density and its standard error on another grid, or with another kernel.

    No products are needed: both follow from the nodes, so that several checkpoints can share one grid. The standard
    error is that of the smoothed density: smoothing by the kernel is no part of it. For the choice of probes it covers
    the random masses of the nodes and, where two probes or more were sampled, their random places
    (:func:`pnanalysis.spectra.density_error.density_with_error`).

    Parameters
    ----------
    ds : xarray.Dataset
        A ``"spectral_density"`` dataset of one checkpoint.
    grid : ndarray
        ``(eigenvalue,)``, ascending.
    kernel_width : float, optional
        Standard deviation of the Gaussian kernel; the dataset's own by default.

    Raises
    ------
    CurvatureError
        If the kernel width is not positive or the grid not ascending.
    """
    width = float(ds["kernel_width"]) if kernel_width is None else float(kernel_width)
    grid = np.asarray(grid, dtype=np.float64)
    if not width > 0:
        raise CurvatureError(f"kernel_width is {width:g}; it must be positive")
    if grid.ndim != 1 or not (np.diff(grid) > 0).all():
        raise CurvatureError("the grid must be one ascending row of eigenvalues")

    def kernel_at(node: Array) -> Array:
        kernel: Array = np.exp(-0.5 * ((grid[:, None] - node) / width) ** 2) / (width * np.sqrt(2 * np.pi))
        return kernel

    measure = SpectralMeasure.from_dataset(ds)
    density, se = density_with_error(ds, kernel_at(measure.node), grid, width)
    if "coupled_node" in ds:
        n_parameters, known = float(ds["n_parameters"]), np.isfinite(ds["coupled_node"].values)
        gain = kernel_at(ds["coupled_node"].values[known]) @ ds["coupled_weight"].values[known] / n_parameters
        density = np.maximum(density + gain, 0.0)
        # what couples the spaces to the rest is of about this size, too, and of an unknown form
        se = np.hypot(se, np.abs(gain) * (1 + coupling_left(ds, measure, moments(ds, measure))))
    if ds.attrs.get("finite_differences"):  # whose errors move eigenvalues
        moved = float(ds.attrs["round_off"]) * float(np.abs(measure.node).max())
        se = np.hypot(se, moved * np.abs(np.gradient(density, grid))) if len(grid) > 1 else se
    smoothed = ds.drop_dims("eigenvalue", errors="ignore").assign_coords(eigenvalue=("eigenvalue", grid))
    smoothed["density"] = ("eigenvalue", density, _labels("density"))
    if has_half_samples(ds):
        data_se = np.sqrt(contrasts_of_means(ds, kernel_at).variance)
        smoothed["density_probe_se"] = ("eigenvalue", se, _labels("density_probe_se"))
        smoothed["density_data_se"] = ("eigenvalue", data_se, _labels("density_data_se"))
        se = np.hypot(se, data_se)
    smoothed["density_se"] = ("eigenvalue", se, _labels("density_se"))
    smoothed["kernel_width"] = ((), width, _labels("kernel_width"))
    smoothed.attrs |= {"kernel_width": width}
    return smoothed


def _labels(name: str) -> dict[str, str]:
    variable = schema.SCHEMAS["spectral_density"][name]
    return {"long_name": variable.long_name, "units": variable.units}
