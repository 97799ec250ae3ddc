"""Whether a spectrum fits into memory and on the disk, told before the first product."""

from __future__ import annotations

import warnings
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch

from pnanalysis.checks import check_room, human
from pnanalysis.errors import CurvatureError, PnError
from pnanalysis.io.atomic import atomic_path
from pnanalysis.spectra.allocation import default_steps, shares
from pnanalysis.spectra.forecast import Work
from pnanalysis.spectra.memory import MODES, probes_at_once, vectors_at_once
from pnanalysis.spectra.sample import SamplingSettings
from pnanalysis.spectra.scratch import scratch_folder
from pnanalysis.spectra.sharing import ALONE, Alone

#: Up to this P, a budget that covers all P columns is spent on them, and the spectrum is exact.
LARGEST_EXACT = 5000
#: The same where a target error may be reached with fewer products than that.
LARGEST_EXACT_UNTIL = 100
#: Entries of the pieces of vectors that are copied, drawn and multiplied at a time, on a CPU.
_COPIED = 2**20
#: Matrices in float64 that an exact spectrum takes.
_EXACT_MATRICES = 4
#: Vectors for the largest eigenvalue over halves of the examples: a few steps, weights and working space.
_VECTORS_FOR_HALVES = 7
#: A file in the folder of unfinished work.
_MODE = "basis"


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


def with_basis_that_fits(
    n_parameters: int, settings: SamplingSettings, mode: str, processes: Alone = ALONE
) -> SamplingSettings:
    """The settings with a basis that is kept as ``mode`` says; with ``"auto"``, the first way for which there is room.

    Nothing is deflated where no basis is kept. Several processes keep it in the same way, for which all have room.

    Raises
    ------
    CurvatureError
        If the memory bound is too small for any phase of sampling.
    PnError
        If the disk cannot hold the unfinished work.

    Warns
    -----
    UserWarning
        If there is room for none, and ``mode`` does not say so.
    """
    if is_exact(n_parameters, settings):
        processes.by_all(lambda: check_fits(n_parameters, settings))
        return settings
    if mode == "auto":
        mode, bound = processes.by_first(lambda: _as_before(settings))
        settings = replace(settings, max_memory_bytes=bound)
    on_gpu = settings.storage.device.type != "cpu"
    candidates = [each for each in MODES if each != "disk" or not on_gpu] if mode == "auto" else [mode]
    if mode == "disk" and on_gpu:
        raise CurvatureError("a basis on the disk is mapped into host memory: give basis_device='cpu' with it")
    for each in candidates:
        storage = replace(settings.storage, mode=each, folder=settings.state)
        found = replace(settings, storage=storage, deflate=settings.deflate and each != "none")
        try:
            processes.by_all(partial(check_fits, n_parameters, found))
        except PnError:
            if each == candidates[-1]:
                raise
            continue
        if each == "none" != mode and processes.is_first:
            warnings.warn(
                "no basis fits into memory or on the disk: none is kept and nothing is deflated, which makes errors "
                "larger; raise max_memory_bytes (--memory), or lower n_hvp (--n-hvp)",
                stacklevel=3,
            )
        if processes.is_first:
            _note_mode(found)
        return found
    raise AssertionError("there is a last candidate")


def _as_before(settings: SamplingSettings) -> tuple[str, int | None]:
    """How the basis of unfinished work is kept and within which bound, which what is free now must not change."""
    if settings.state is not None and any(settings.state.glob("*.safetensors")):
        with suppress(OSError, ValueError):
            mode, bound = (settings.state / _MODE).read_text(encoding="ascii", errors="replace").split()
            if mode in MODES:
                return mode, int(bound)
    return "auto", settings.max_memory_bytes


def _note_mode(settings: SamplingSettings) -> None:
    """Keep both for a later call; where they cannot be written, nothing else of the work can."""
    if settings.state is not None:
        with suppress(OSError), atomic_path(settings.state / _MODE) as temporary:
            temporary.write_text(f"{settings.storage.mode} {settings.max_memory_bytes}", encoding="ascii")


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
    if is_exact(n_parameters, settings):
        return
    n_vectors, storage = settings.storage.kept(settings.budget), settings.storage
    if settings.state is not None:
        copies = 2 if storage.mode == "disk" else 1  # the basis itself, and what is saved of it
        check_room(
            settings.state, copies * storage.vectors_bytes(n_parameters, n_vectors), "the unfinished work may take",
            "make room, save elsewhere (--output), or spend fewer products (--n-hvp)",
        )  # fmt: skip
    if storage.mode == "disk":
        place = (storage.folder or scratch_folder()) / "basis"
        try:
            check_room(
                place, storage.vectors_bytes(n_parameters, n_vectors), "takes",
                "make room, or spend fewer products (--n-hvp)",
            )  # fmt: skip
        except PnError as error:
            raise CurvatureError(str(error)) from error


def planned_work(n_parameters: int, settings: SamplingSettings) -> Work:
    """The products and vectors of a spectrum; what its operator takes comes on top."""
    storage, bound, budget = settings.storage, settings.max_memory_bytes, settings.budget
    if is_exact(n_parameters, settings):
        matrices = _EXACT_MATRICES * n_parameters**2 * torch.float64.itemsize
        return Work(n_parameters, n_parameters, storage, 0, matrices, at_once=max(settings.n_probes, 1))
    phases = _phases(n_parameters, settings)
    n_steps, n_deflated = phases[-1]
    at_once = 1
    if not _is_in_turn(settings):
        n_probes = settings.n_probes if settings.n_hvp is None else len(equal_probes(n_parameters, settings))
        at_once = probes_at_once(storage, n_parameters, n_steps, n_probes, n_deflated, bound)
    else:
        n_columns = vectors_at_once(storage, n_parameters, min(budget, n_parameters), bound)
        n_steps = max(n_columns, fewest_columns(n_parameters, budget))
    working = storage.needed(n_parameters, 0, at_once)
    vectors = storage.vectors_bytes(n_parameters, at_once * storage.kept(n_steps) + n_deflated)
    on_disk = storage.mode == "disk"
    return Work(
        n_parameters, budget, storage, 0 if on_disk else vectors,
        working + min(_COPIED, n_parameters) * storage.dtype.itemsize, on_disk=vectors if on_disk else 0,
        at_once=at_once, n_read=_vectors_read(n_parameters, settings, n_steps),
        products=f"at most {budget:,} products" if settings.until is not None else "",
        **_for_examples(n_parameters, settings),
    )  # fmt: skip


def _for_examples(n_parameters: int, settings: SamplingSettings) -> dict[str, int]:
    """Bytes that the error of the choice of examples takes beside the vectors of a spectrum, and afterwards."""
    if settings.data is None:
        return {}
    vector = replace(settings.storage, mode="memory").vectors_bytes(n_parameters, 1)
    n_kept = 1 if settings.deflate else 2 + settings.data.n_leading  # the first of the leading ones, or all and a copy
    return {"beside": n_kept * vector, "afterwards": _VECTORS_FOR_HALVES * vector}


def _vectors_read(n_parameters: int, settings: SamplingSettings, n_columns: int) -> int:
    """How often a vector that is kept is projected off: once for each vector that comes after it, nearly."""
    budget, n_steps, n_probes = settings.budget, min(settings.n_lanczos, n_parameters), settings.n_probes
    if settings.storage.mode == "none":
        return 2 * budget
    if not settings.deflate:
        return sum(n * (n + 1) // 2 for n in equal_probes(n_parameters, settings))
    if not _is_in_turn(settings):
        n_others = min(n_steps, n_parameters - n_steps)
        each = n_others * n_steps + n_others * (n_others + 1) // 2
        return n_steps * (n_steps + 1) // 2 + (n_probes - 1) * each
    full = min(n_columns, budget)
    return full * (full + 1) // 2 + (budget - full) * full


def _is_in_turn(settings: SamplingSettings) -> bool:
    """Whether probes run one after the other, each deflated for those after it."""
    return settings.deflate and (settings.n_hvp is not None or settings.n_probes == 1)


def _check_memory(n_parameters: int, settings: SamplingSettings) -> None:
    bound = settings.max_memory_bytes
    if is_exact(n_parameters, settings):
        need = _EXACT_MATRICES * n_parameters**2 * torch.float64.itemsize
        if bound is not None and need > bound:
            raise CurvatureError(
                f"all {n_parameters:,} columns of the matrix take {human(need)}, the bound is {human(bound)}: "
                "give fewer products than parameters (n_hvp, --n-hvp), or raise max_memory_bytes (--memory)"
            )
        return
    for n_steps, n_deflated in _phases(n_parameters, settings):
        probes_at_once(settings.storage, n_parameters, n_steps, 1, n_deflated, bound)


def _phases(n_parameters: int, settings: SamplingSettings) -> list[tuple[int, int]]:
    """Steps of a probe, and vectors that are deflated by then, in each phase."""
    if not settings.deflate:
        return [(min(max(equal_probes(n_parameters, settings)), n_parameters), 0)]
    if not _is_in_turn(settings):
        n_steps = settings.n_lanczos
        return [(n_steps, 0), (max(min(n_steps, n_parameters - n_steps), 1), n_steps)]
    return [(fewest_columns(n_parameters, settings.budget), 0)]
