"""Whether a spectrum fits into memory and on the disk, told before the first product."""

from __future__ import annotations

import torch

from pnanalysis.checks import check_room, human
from pnanalysis.errors import CurvatureError
from pnanalysis.spectra.allocation import default_steps, shares
from pnanalysis.spectra.memory import basis_bytes, probes_at_once
from pnanalysis.spectra.sample import SamplingSettings

#: Up to this P, a budget that covers all P columns is spent on them, and the spectrum is exact.
LARGEST_EXACT = 5000
#: The same where a target error may be reached with fewer products than that.
LARGEST_EXACT_UNTIL = 100
#: Matrices in float64 that an exact spectrum takes.
_EXACT_MATRICES = 4


def is_exact(n_parameters: int, settings: SamplingSettings) -> bool:
    """Whether the budget is spent on all P columns."""
    largest = LARGEST_EXACT if settings.until is None else LARGEST_EXACT_UNTIL
    return settings.deflate and n_parameters <= min(settings.budget, largest)


def equal_probes(n_parameters: int, settings: SamplingSettings) -> list[int]:
    """Steps of each probe where nothing is deflated."""
    if settings.n_hvp is None:
        return [settings.n_lanczos] * settings.n_probes
    return shares(settings.n_hvp, max(round(settings.n_hvp / default_steps(settings.n_hvp, n_parameters)), 1))


def fewest_columns(n_parameters: int, budget: int) -> int:
    """The least that makes sense for probes in turn: a basis, and as many deflated vectors."""
    return min(2 * default_steps(budget, n_parameters), budget, n_parameters)


def check_fits(n_parameters: int, settings: SamplingSettings) -> None:
    """Refuse what any phase of sampling would have no room for.

    Raises
    ------
    CurvatureError
        If the memory bound is too small.
    PnError
        If the disk cannot hold the unfinished work.
    """
    _check_memory(n_parameters, settings)
    if settings.state is not None and not is_exact(n_parameters, settings):
        check_room(
            settings.state, basis_bytes(n_parameters, settings.budget, 1, settings.basis_dtype),
            "the unfinished work may take",
            "make room, save elsewhere (--output), or spend fewer products (--n-hvp)",
        )  # fmt: skip


def _check_memory(n_parameters: int, settings: SamplingSettings) -> None:
    dtype, bound = settings.basis_dtype, settings.max_memory_bytes
    if is_exact(n_parameters, settings):
        need = _EXACT_MATRICES * n_parameters**2 * torch.float64.itemsize
        if bound is not None and need > bound:
            raise CurvatureError(
                f"all {n_parameters:,} columns of the matrix take {human(need)}, the bound is {human(bound)}: "
                "give fewer products than parameters (n_hvp, --n-hvp), or raise max_memory_bytes (--memory)"
            )
        return
    phases: list[tuple[int, int]] = []  # steps of a probe, and vectors that are deflated by then
    if not settings.deflate:
        phases += [(min(max(equal_probes(n_parameters, settings)), n_parameters), 0)]
    elif settings.n_hvp is None and settings.n_probes > 1:
        n_steps = settings.n_lanczos
        phases += [(n_steps, 0), (max(min(n_steps, n_parameters - n_steps), 1), n_steps)]
    else:
        phases += [(fewest_columns(n_parameters, settings.budget), 0)]
    for n_steps, n_deflated in phases:
        probes_at_once(n_parameters, n_steps, 1, dtype, settings.basis_device, n_deflated, bound)
