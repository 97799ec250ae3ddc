"""The local learning coefficient: how singular a minimum is, by the volume of low loss around it."""

from __future__ import annotations

import math
import os
import shutil
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import nn

from pnanalysis import schema
from pnanalysis.analyses.hessian import has_all, names_of
from pnanalysis.analyses.work_folder import WorkFolder, loss_tolerance
from pnanalysis.arrays import Array
from pnanalysis.checks import at_least, check_seed, positive, resolve_dtype
from pnanalysis.curvature.operators import HessianOperator
from pnanalysis.curvature.parameters import Selection as Parameters
from pnanalysis.curvature.parameters import select_parameters
from pnanalysis.errors import CurvatureError, ModelError
from pnanalysis.evaluation.diagnosis import clear_errors
from pnanalysis.geometry.loss_surface import LossSurface, check_same_function
from pnanalysis.inputs.data import DataLike, n_examples
from pnanalysis.inputs.models import Loss, ModelLike, device_of
from pnanalysis.inputs.selection import Given, select
from pnanalysis.inputs.sources import resolve_device
from pnanalysis.io.collection import padded
from pnanalysis.io.unfinished import Unfinished
from pnanalysis.sampling.anchor import Anchor
from pnanalysis.sampling.langevin import SAMPLERS, Posterior, Stiff
from pnanalysis.sampling.local_learning import Plan, sample, with_shorter_steps, with_steps_that_hold
from pnanalysis.sampling.stacked_gradients import StackedGradients
from pnanalysis.sampling.stein import is_large
from pnanalysis.spectra.density import spectral_density
from pnanalysis.spectra.free_memory import free_bytes
from pnanalysis.spectra.restarted import extreme_pairs
from pnanalysis.spectra.summary import summarise
from pnanalysis.terminal.progress import progress_bar

#: Burn-in and draws where they are chosen here: in relaxations of the flattest directions, and in steps at least.
#: Squared distances decorrelate in 2.5 of these with momentum (LeNet-5: four to five) and in one without. The R-hat of
#: four chains that have converged is nearly always below its bound where their halves hold ten times that.
_RELAXATIONS = {"full": (10, 90), "minibatch": (2, 16), "sgld": (2, 16)}
_FEWEST = (100, 400)
#: Passes over the data by single batches, at which the loss is measured once or twice.
_FEWEST_PASSES = 50
#: Both together, at most.
_MOST_STEPS = 20_000
#: How often chains start with shorter steps where they diverge.
_ATTEMPTS = 4
#: Step sizes that are chosen here, times the largest curvature that chains meet; 4 is where they diverge. With the
#: noise of batches longer steps spread the draws.
_COURANT = {"full": 1.0, "minibatch": 0.25, "sgld": 0.05}
#: Directions that count as stiff, the relative residual of their eigenvalues, and products spent on them at most, and
#: on the Gaussian estimate.
_STIFF, _TOLERANCE, _PRODUCTS = 10, 1e-2, 80
DATA_ERRORS = ("examples", "none")


@dataclass(frozen=True)
class ChainOptions:
    """How to sample; see :func:`learning_coefficient`.

    ``step_sizes`` and ``localizations`` are those of a grid; a step size of ``None`` is chosen.
    """

    n_chains: int = 4
    n_draws: int | None = None
    burn_in: int | None = None
    step_sizes: tuple[float | None, ...] = (None,)
    localizations: tuple[float, ...] = (100.0,)
    beta: float | None = None
    sampler: str = "full"
    params: Parameters = None
    data_error: str = "examples"
    seed: int = 0

    def beta_of(self, anchor: Anchor) -> float:
        """The inverse temperature for the examples that count."""
        return self.beta or 1 / math.log(max(anchor.n_examples, 2))

    def __post_init__(self) -> None:
        at_least(2, n_chains=self.n_chains)
        at_least(8, n_draws=self.n_draws)
        at_least(0, burn_in=self.burn_in)
        check_seed(seed=self.seed)
        positive(beta=self.beta)
        for name, values in (("localization", self.localizations), ("step_size", self.step_sizes)):
            if not values:
                raise ModelError(f"no {name} is given; give one, or leave {name} out for its default")
            for value in values:
                positive(**{name: math.nan if value is None and name == "localization" else value})
        for option, choice, choices in (
            ("sampler", self.sampler, SAMPLERS), ("data_error", self.data_error, DATA_ERRORS),
        ):  # fmt: skip
            if choice not in choices:
                raise ModelError(f"{option} is {choice!r}; it must be {' or '.join(choices)}")


def learning_coefficient(
    *given: Given,
    model: ModelLike | None = None,
    data: DataLike | None = None,
    loss: str | Loss | None = None,
    checkpoints: Sequence[str] | None = None,
    n_chains: int = 4,
    n_draws: int | None = None,
    burn_in: int | None = None,
    step_size: float | Sequence[float] | Array | None = None,
    localization: float | Sequence[float] | Array = 100.0,
    beta: float | None = None,
    sampler: str = "full",
    params: Parameters = None,
    split: str = "train",
    n: int | None = 2048,
    batch_size: int = 256,
    data_error: str = "examples",
    dtype: str = "float32",
    device: str | None = "cpu",
    seed: int = 0,
    progress: bool = True,
    state: str | os.PathLike[str] | None = None,
) -> xr.Dataset:
    r"""The local learning coefficient of each checkpoint, with what shows whether its chains have converged.

    Parameters
    ----------
    *given, model, data, loss
        See :func:`pnanalysis.hessian`.
    checkpoints : sequence of str, optional
        See :meth:`pnanalysis.io.runs.Run.select`; by default plain and champion of runs, and all other networks.
    n_chains : int
        Langevin chains, all from the checkpoint; they share their passes over the network.
    n_draws, burn_in : int, optional
        Steps of each chain that count, and those before that do not. By default 90 and ten times what the flattest
        directions need to relax, :math:`1/\sqrt{\varepsilon\gamma}` steps, at least 400 and 100, and no more than
        20,000 in all; without momentum 16 and two times :math:`2/(\varepsilon\gamma)`.
    step_size : float or sequence or array of float, optional
        :math:`\varepsilon`; by default the inverse of the largest curvature of the potential that chains meet,
        :math:`n\beta\lambda + \gamma`, apart from the ten stiffest directions at the checkpoint; a quarter of that with
        single batches, or less where these differ much, and a twentieth of the inverse of the largest curvature there
        is with ``"sgld"``. Several give a calibration, along a dim ``step_size``.
    localization : float or sequence or array of float
        :math:`\gamma`, in units of one over squared parameters: how strongly chains are held near the checkpoint.
        Coefficients are compared at one value. Several give a calibration, along a dim ``localization``.
    beta : float, optional
        Inverse temperature; by default :math:`1/\log n`.
    sampler : {"full", "minibatch", "sgld"}
        Gradients of all examples with momentum, or of one batch a step without, which costs less where there are many,
        with an error by the noise of batches; ``"sgld"`` is that of Lau et al. See
        :mod:`pnanalysis.sampling.langevin`.
    params : optional
        Parameters that move, as for :class:`pnanalysis.HessianOperator`; all trainable ones by default. The
        coefficient is then one of these with the others fixed [2]_.
    split, n, batch_size, dtype, device
        As for :func:`pnanalysis.landscape`. The examples that count in the loss make the posterior: the attribute ``n``
        of the dataset says how many, without those whose targets are all ignored (``ignore_index``).
    data_error : {"examples", "none"}
        Whether the error includes that of the choice of examples, for which all of them are evaluated at 100 draws of
        each chain.
    seed : int
        Of examples and noise.
    progress : bool
    state : path, optional
        Folder for unfinished work, from which an interrupted call with the same arguments resumes, to end with the same
        numbers. It holds a file for each finished network and a subfolder for the one in progress, whose chains are
        saved every five minutes and when they are interrupted, and can be removed once the call returns.

    Returns
    -------
    xarray.Dataset
        Kind ``learning_coefficient``, dim ``checkpoint``. ``learning_coefficient`` is
        :math:`\hat\lambda = n\beta\,(\langle L\rangle - L(w^*))`, NaN where the chains have not converged;
        ``learning_coefficient_chain_se`` and ``_data_se`` are its standard errors for the length of the chains and
        for the choice of examples at this checkpoint, and with ``"minibatch"`` ``_batch_se`` is that for the noise of
        single batches; ``_se``, ``_low`` and ``_high`` are of all. ``gaussian`` is
        what :math:`\hat\lambda` would be if the loss were its second-order expansion,
        :math:`\tfrac12\sum_i h_i/(h_i + \gamma/n\beta)` over the positive eigenvalues of the Hessian: a
        :math:`\hat\lambda` far from it means that the minimum is not quadratic at this temperature. ``rhat`` (of the
        loss), ``distance_rhat`` and ``effective_draws`` say whether the chains have converged, and ``converged`` (0 or
        1) that they have: R-hats below 1.05 and 1.1 (or distances within 1 % between halves of chains), and 100
        effective draws. ``stein_excess`` shows what R-hat does not, steps that are too long: about the fraction by
        which the coefficient is too large, see :mod:`pnanalysis.sampling.stein`. ``excess`` and ``distance`` ``(chain,
        draw)`` are the loss above that of the checkpoint and the distance from it, burn-in included; ``"minibatch"``
        measures the loss at some of the draws, and has NaN at the others. ``influence`` ``(chain, example)`` is how the
        coefficient changes with the weight of each example, as each chain has it (with the error of examples), and
        ``second_influence`` ``(chain, change, example)`` how that changes with random changes of all weights.
        Attributes: ``n``, the number of examples that count, ``beta``, and ``all_examples`` (0 or 1), whether these are
        all that the split has.

    Raises
    ------
    ModelError
        If an option is invalid, or the chains leave the region where the loss is finite.

    Notes
    -----
    For a quadratic minimum of :math:`d` parameters, :math:`\hat\lambda` tends to :math:`d/2` as :math:`n` grows, and to
    less where parameters are redundant [1]_. In a singular minimum it is below its limit as long as the pull
    :math:`\gamma` holds the chains where the loss is nearly quadratic: in deep linear networks at the defaults, half or
    a third of it. A negative value means that the checkpoint is no minimum: chains find lower losses nearby.

    The error of examples is that of the infinitesimal jackknife: of how :math:`\hat\lambda` changes with the weight of
    each example, which is a covariance under the posterior. Products of independent chains keep noise from adding to
    it.

    References
    ----------
    .. [1] E. Lau, Z. Furman, G. Wang, D. Murfet, S. Wei, "The Local Learning Coefficient: A Singularity-Aware
       Complexity Measure", AISTATS 2025, arXiv:2308.12108.
    .. [2] G. Wang, J. Hoogland, S. van Wingerden, Z. Furman, D. Murfet, "Differentiation and Specialization of
       Attention Heads via the Refined Local Learning Coefficient", ICLR 2025, arXiv:2410.02984.

    R. Giordano, T. Broderick, "The Bayesian Infinitesimal Jackknife for Variance", arXiv:2305.06466.

    Examples
    --------
    >>> import torch
    >>> net = torch.nn.Linear(3, 1)
    >>> data = torch.randn(50, 3), torch.randn(50, 1)
    >>> ds = learning_coefficient(net, data=data, loss="mse", n_draws=200, burn_in=50, progress=False)
    >>> sorted(ds.excess.sizes)
    ['chain', 'checkpoint', 'draw']
    """
    at_least(2, n=n, batch_size=batch_size)
    options = ChainOptions(
        n_chains, n_draws, burn_in, _as_tuple(step_size), _as_tuple(localization), beta, sampler, params, data_error,
        seed,
    )  # fmt: skip
    torch_dtype = resolve_dtype(dtype)
    selection, torch_device = select(given, checkpoints, model=model, data=data, loss=loss), resolve_device(device)
    settings = {**asdict(options), "split": split, "n": n, "batch_size": batch_size, "dtype": dtype}
    found = {}
    with WorkFolder.held(state, settings | names_of(selection)) as cache:
        for each in selection.measurable(split, n, batch_size, seed, torch_device, torch_dtype):
            found[each.item.key] = network_learning_coefficient(
                each.network, each.loss, each.batches, options, dtype=torch_dtype, label=each.item.label,
                progress=progress, cache=None if cache is None else cache.of(each.network, each.batches),
            )  # fmt: skip
    rows = padded([found[item.key] for item in selection])  # shorter chains are filled up with NaN
    ds = xr.concat(rows, dim="checkpoint", combine_attrs="override").assign_coords(selection.coordinates)
    single = [name for name, value in (("step_size", step_size), ("localization", localization)) if _is_single(value)]
    n_used = n_examples(each.part, each.batches)
    return schema.finish(
        ds.squeeze(single), "learning_coefficient",
        **selection.sources[0].dataset_attrs(), n_chains=n_chains, sampler=sampler, params=params, split=split,
        n=int(ds.attrs["n"]), beta=float(ds.attrs["beta"]), all_examples=has_all(each.item.source, split, n, n_used),
        batch_size=batch_size, data_error=data_error, seed=seed, device=str(torch_device), dtype=dtype,
    )  # fmt: skip


def network_learning_coefficient(
    network: nn.Module,
    loss: Loss,
    batches: Iterable[Any],
    options: ChainOptions,
    *,
    dtype: torch.dtype = torch.float32,
    label: str = "network",
    progress: bool = False,
    cache: WorkFolder | None = None,
) -> xr.Dataset:
    """The same of one network over batches in memory, with dims ``localization`` and ``step_size`` always.

    Parameters
    ----------
    network : Module
        Stays as it is.
    loss : callable
        ``loss(outputs, targets)``, averaged over the batch.
    batches : re-iterable of (inputs, targets)
        On the network's device.
    options : ChainOptions
    dtype : torch.dtype
    label : str
        What the network is called in messages.
    progress : bool
    cache : WorkFolder, optional
        Keeps what is finished, and the chains in progress.

    Returns
    -------
    xarray.Dataset
        With the attributes ``n``, the examples that count, and ``beta``.
    """
    device = device_of(network, label)
    surface = LossSurface(network, loss, device, dtype)
    state = surface.anchor(network.state_dict(), label)
    check_same_function(surface, state, network, batches, (label, label))
    with clear_errors(label, surface.model, batches, surface.loss):
        names = select_parameters(surface.model, options.params)
        parts = [name for name in names if name not in state]
        if parts:
            raise ModelError(f"{parts[0]} is a part of a parameter; chains move whole parameters, so name these")
        anchor = Anchor(StackedGradients(surface, state, names), batches)

        def compute() -> xr.Dataset:
            folder = None if cache is None else cache.file("").with_suffix("")
            ds = _of_chains(anchor, network, loss, options, dtype, label, progress, folder)
            return schema.finish(ds, "learning_coefficient", n=anchor.n_examples, beta=options.beta_of(anchor))

        if cache is None:
            return compute()
        ds = cache.part("", anchor.loss, compute)
        if cache.file("").is_file():  # else there was no room for it
            shutil.rmtree(cache.file("").with_suffix(""), ignore_errors=True)
        return ds


def _of_chains(
    anchor: Anchor, network: nn.Module, loss: Loss, options: ChainOptions, dtype: torch.dtype, label: str,
    progress: bool, folder: Path | None,
) -> xr.Dataset:  # fmt: skip
    """Chains and the Gaussian value beside them; unfinished chains are kept in a folder."""
    device = anchor.point.device
    nbeta = anchor.n_examples * options.beta_of(anchor)
    state = None
    if folder is not None:
        names = {"names": anchor.gradients.names}
        state = Unfinished(folder, names, [anchor.loss], loss_tolerance(anchor.loss), ModelError)
    op = _hessian(network, loss, anchor.batches, options, dtype, device)
    stiff = None if op is None else _stiff(op, options, state)
    grid = _grid(options, nbeta, stiff, label)
    n_batches = len(anchor.factors)
    burn_in, n_draws = _lengths(grid, options, n_batches)
    scaled = None if options.sampler == "sgld" else stiff
    _check_memory(len(grid) * options.n_chains * len(anchor.point) * dtype.itemsize, device)
    plan = Plan(
        grid, options.n_chains, burn_in, n_draws, options.sampler, scaled, options.seed,
        options.data_error == "examples",
    )  # fmt: skip
    plan = with_steps_that_hold(anchor, plan, state)
    for _ in range(_ATTEMPTS):
        burn_in, n_draws = _lengths(plan.posteriors, options, n_batches)
        plan = replace(plan, burn_in=burn_in, n_draws=n_draws)
        _warn_of_length(plan, options, label)
        with progress_bar(f"chains of {label}", plan.n_steps, progress) as advance:
            found = sample(anchor, plan, advance, state)
        shorter = with_shorter_steps(plan, found, state)
        if shorter is None:
            break
        plan = shorter
    _warn_of_steps(found, label)
    rows = iter(found.isel(posterior=i) for i in range(len(grid)))
    table = [xr.concat([next(rows) for _ in options.step_sizes], "step_size") for _ in options.localizations]
    ds = xr.concat(table, "localization").assign_coords(localization=list(options.localizations))
    spectrum = None if op is None else _spectrum(op, options.seed)
    gaussian = [_gaussian(spectrum, gamma / nbeta) for gamma in options.localizations]
    columns = {name: ("localization", [one[name] for one in gaussian]) for name in gaussian[0]}
    return ds.assign(columns).assign(loss=found.loss, burn_in=burn_in)


def _warn_of_steps(found: xr.Dataset, label: str) -> None:
    """Say which draws are not those of their posterior, whatever R-hat is."""
    columns = (found[name].values for name in ("stein_excess", "stein_excess_se", "epsilon"))
    for excess, se, step in zip(*columns, strict=True):
        if is_large(float(excess), float(se)):
            off = f"by Stein's identity off by {excess:.2f} ± {se:.2f}".replace("-", "\N{MINUS SIGN}")
            do = f"take a step_size below {step:.2g}" if excess > 0 else "take a longer burn_in"
            warnings.warn(
                f"{label}: draws are not those of the posterior, {off}, and so about is the coefficient; {do}",
                stacklevel=2,
            )


def _hessian(
    network: nn.Module, loss: Loss, batches: Iterable[Any], options: ChainOptions, dtype: torch.dtype,
    device: torch.device,
) -> HessianOperator | None:  # fmt: skip
    """The Hessian; ``None``, with a warning, where torch cannot differentiate twice."""
    try:
        op = HessianOperator(
            network, loss, batches, params=options.params, dtype=dtype, device=device, expected_products=_PRODUCTS
        )
        _ = op.product_check
    except CurvatureError as error:
        warnings.warn(f"no curvature to choose steps by or to compare with: {error}", stacklevel=2)
        return None
    return op


def _stiff(op: HessianOperator, options: ChainOptions, state: Unfinished | None) -> Stiff:
    """The directions of the largest curvature; those that unfinished chains were begun with, where there are any."""
    saved = None if state is None else state.load("stiff")
    if saved is not None:
        return Stiff(saved[0]["value"].numpy(), saved[0]["vector"].to(op.device))
    k = min(_STIFF, (op.shape[0] - 1) // 2)
    pairs = extreme_pairs(op, k + 1, tolerance=_TOLERANCE, max_hvp=_PRODUCTS, seed=options.seed)
    last = len(pairs.value) - 1  # fewer where the rank is lower
    values = np.append(pairs.value[:last], pairs.value[last] + pairs.residual[last])
    # the order in memory is that of a saved copy, for the round-off of products depends on it
    stiff = Stiff(values, pairs.vector[:, :last].contiguous())
    if state is not None:
        state.save("stiff", {"value": torch.from_numpy(stiff.value), "vector": stiff.vector})
    return stiff


def _grid(options: ChainOptions, nbeta: float, stiff: Stiff | None, label: str) -> list[Posterior]:
    """A posterior for each localization and step size.

    Without a Hessian, steps are chosen by the pull alone, and made to fit the curvature that chains meet.
    """

    def posterior(gamma: float, step: float | None) -> Posterior:
        if step is not None:
            return Posterior(nbeta, gamma, step)
        value, courant = 0.0, _COURANT[options.sampler]
        if stiff is not None:
            value = float(stiff.value[0]) if options.sampler == "sgld" else stiff.rest
        return Posterior(nbeta, gamma, courant / (nbeta * max(value, 0.0) + gamma), courant)

    return [posterior(gamma, step) for gamma, step in product(options.localizations, options.step_sizes)]


def _spectrum(op: HessianOperator, seed: int) -> xr.Dataset:
    return spectral_density(op, n_hvp=_PRODUCTS, seed=seed, data_error="none", progress=False)


def _gaussian(spectrum: xr.Dataset | None, ridge: float) -> dict[str, float]:
    """The coefficient of the second-order expansion of the loss, with its 95 % interval; NaN without a Gaussian."""
    names = {end: f"gaussian{end}" for end in ("", "_low", "_high")}
    if spectrum is None or not float(spectrum.lambda_min) > -ridge:
        return dict.fromkeys(names.values(), math.nan)
    found = summarise(spectrum, ridge=ridge)
    return {name: float(found[f"effective_dimension{end}"]) / 2 for end, name in names.items()}


def _lengths(grid: Sequence[Posterior], options: ChainOptions, n_batches: int) -> tuple[int, int]:
    """Burn-in and draws: what is asked for, or multiples of the slowest relaxation, and of passes by single batches."""
    before, after = (relaxations * _slowest(grid, options.sampler) for relaxations in _RELAXATIONS[options.sampler])
    burn_in = options.burn_in
    if burn_in is None:
        burn_in = int(min(max(before, _FEWEST[0]), _MOST_STEPS / 4))
    n_draws = options.n_draws
    if n_draws is None:
        fewest = max(_FEWEST[1], _FEWEST_PASSES * n_batches) if options.sampler == "minibatch" else _FEWEST[1]
        n_draws = int(min(max(after, fewest), _MOST_STEPS - burn_in))
    return burn_in, max(n_draws, 8)


def _slowest(grid: Sequence[Posterior], sampler: str) -> float:
    """Steps in which directions relax that only the pull holds."""
    rate = min(one.step_size * one.localization for one in grid)
    return 1 / math.sqrt(rate) if sampler == "full" else 2 / rate


def _warn_of_length(plan: Plan, options: ChainOptions, label: str) -> None:
    """Say before they run which chains are too short to converge, as far as steps and pull tell."""
    relaxations = plan.n_draws / _slowest(plan.posteriors, plan.sampler)
    if options.n_draws is None and relaxations < _RELAXATIONS[plan.sampler][1] / 2:
        warnings.warn(
            f"{label}: {plan.n_draws:,} draws are {relaxations:.1f} relaxations of its flattest directions, and may "
            "not converge; take a larger localization, or n_draws of your own",
            stacklevel=2,
        )


def _check_memory(n_bytes: int, device: torch.device) -> None:
    """Refuse chains that do not fit: a step holds positions, velocities, noise, a gradient and what is added to it."""
    needed, free = 7 * n_bytes, free_bytes(device)
    if needed > free:
        raise ModelError(
            f"these chains need {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free; take fewer chains, "
            "settings or parameters (params)"
        )


def _is_single(value: Any) -> bool:
    """Whether an option is one number, or none at all, rather than several."""
    return value is None or isinstance(value, str) or np.ndim(value) == 0


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return (value,) if _is_single(value) else tuple(np.asarray(value, dtype=object).ravel().tolist())
