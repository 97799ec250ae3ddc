"""States of Lanczos iterations in files: written by one process, or a part by each of several, and read by any number.

Processes that hold a part of each vector write a file each, ``NAME.0-of-4.safetensors`` and so on, next to where one
process would write ``NAME.safetensors``. An interruption may leave them a few steps apart. Vectors are only added, so
that the state at the earliest of these steps is in all files, and every process finds its part of it whatever
the parts were when it was saved.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pnanalysis.errors import CurvatureError
from pnanalysis.io import digest
from pnanalysis.io.atomic import atomic_path
from pnanalysis.io.files import open_regular
from pnanalysis.io.unfinished import write_signed
from pnanalysis.spectra.linear_operator import ROUND_OFF, note_error, round_off
from pnanalysis.spectra.sharing import ALONE, Part

if TYPE_CHECKING:
    from pnanalysis.spectra.lanczos import Lanczos

_PART = re.compile(r"\.(\d+)-of-(\d+)$")
_AGAIN = "delete it to start again"
#: Tensors of a state that all processes have alike.
_ALIKE = ("alpha", "beta", "norm", "mirror", "skew", "rounding")


@dataclass(frozen=True)
class _File:
    """One file, what it holds of each vector, and the step at which it was written."""

    path: Path
    index: int
    n: int
    step: int
    ranges: tuple[tuple[int, int], ...]


def save_state(lanczos: Lanczos, path: Path, label: str, alone: bool = False) -> None:
    """Write the state, or this process's part of it, atomically; of several processes all or none.

    Parameters
    ----------
    lanczos : Lanczos
    path : Path
        Of the file of one process.
    label : str
    alone : bool
        Do not wait for the others, which may be interrupted too.

    Raises
    ------
    OSError
        If it cannot be written; the disk may be full.
    """
    part = lanczos.part
    metadata = {"label": label, "exponent": str(lanczos.exponent), "error": repr(round_off(lanczos.operator))}
    if not part.is_all:
        _remove_others(path, part.processes.n)
        path = path.with_suffix(f".{part.processes.rank}-of-{part.processes.n}{path.suffix}")
        metadata["ranges"] = json.dumps(part.ranges)
    tensors = {name: tensor.contiguous() for name, tensor in lanczos.state(lanczos.step).items()}
    waits = not (alone or part.is_all)
    try:
        with atomic_path(path) as temporary:
            write_signed(tensors, temporary, metadata)
            if waits:
                waits = False
                failed = next(filter(None, part.processes.gathered("")), "")
                if failed:
                    raise OSError(failed)
    except OSError as error:
        if waits:
            part.processes.gathered(f"another process: {error.strerror or error}")
        raise


def restore_state(lanczos: Lanczos, path: Path, label: str) -> bool:
    """Read the state of the latest step that is saved; returns whether there is any.

    Raises
    ------
    CurvatureError
        In every process, if what is there is damaged, or was saved under another label or by other settings.
    """
    part, processes = lanczos.part, lanczos.processes
    if part.is_all:  # the first process reads, the others get what it has read
        found = processes.by_first(lambda: _restore(lanczos, path, label))
        if found is not None:
            lanczos.step, lanczos.exponent, _ = found
            for tensor in lanczos.state(lanczos.step).values():
                for piece in tensor if tensor.ndim == 3 else [tensor]:
                    processes.send(piece)
    else:
        found = _restore(lanczos, path, label)
    if found is not None:
        note_error(lanczos.operator, found[-1])
    return found is not None


def _restore(lanczos: Lanczos, path: Path, label: str) -> tuple[int, int, float] | None:
    """Read this process's part; returns the step, the exponent and the error of the products so far, or ``None``."""
    part = lanczos.part
    together = part.processes if not part.is_all else ALONE
    files = together.by_all(lambda: list(_files_of(path)))
    chosen = _chosen(files, lanczos, part)
    if chosen is None:
        return None
    n, step = chosen
    ours = [file for file in files if file.n == n]
    read = together.by_all(lambda: _read(ours, step, lanczos, label))
    tensors, exponent, error = next(alike for alike in together.gathered(read) if alike is not None)
    for name, tensor in lanczos.state(step).items():
        if name in _ALIKE:
            tensor.copy_(tensors[name])
    lanczos.step, lanczos.exponent = step, exponent
    return step, exponent, error


def _files_of(path: Path) -> Iterator[_File]:
    """All files of one state that this process sees."""
    candidates = [path] if path.is_file() else []
    for candidate in [*candidates, *sorted(path.parent.glob(f"{path.stem}.*-of-*{path.suffix}"))]:
        place = _PART.search(candidate.stem)
        index, n = (int(place[1]), int(place[2])) if place else (0, 1)
        with open_regular(candidate, CurvatureError):
            pass  # a link or a pipe is none of ours
        try:
            with safe_open(candidate, "pt") as file:
                step, length = file.get_slice("alpha").get_shape()[1], file.get_slice("next").get_shape()[1]
                ranges = json.loads((file.metadata() or {}).get("ranges", f"[[0, {length}]]"))
            yield _File(candidate, index, n, step, tuple((begin, end) for begin, end in ranges))
        except (OSError, SafetensorError, ValueError, TypeError, IndexError) as error:
            _check_digest(candidate)
            raise _not_a_state(candidate) from error


def _chosen(files: list[_File], lanczos: Lanczos, part: Part) -> tuple[int, int] | None:
    """By how many processes the files were written that hold the latest step, and that step."""
    together = part.processes if not part.is_all else ALONE
    steps: dict[int, dict[int, int]] = {}
    for seen in together.gathered([(file.n, file.index, file.step) for file in files]):
        for n, index, step in seen:
            steps.setdefault(n, {})[index] = step
    apart = None if lanczos.reorthogonalise else 1  # steps that the last two vectors allow to go back
    usable = [
        (min(known.values()), n == part.processes.n, n)
        for n, known in steps.items()
        if len(known) == n and (apart is None or max(known.values()) - min(known.values()) <= apart)
        and all(together.gathered(_covers([file for file in files if file.n == n], part)))
    ]  # fmt: skip
    if not usable:
        return None
    step, _, n = max(usable)
    return n, step


def _covers(files: list[_File], part: Part) -> bool:
    """Whether files hold all entries of a part."""
    return sum(length for file in files for _, _, length in _overlaps(part.ranges, file.ranges)) == part.length


def _overlaps(ours: tuple[tuple[int, int], ...], theirs: tuple[tuple[int, int], ...]) -> Iterator[tuple[int, int, int]]:
    """Entries that two parts share: places in the one and in the other, and how many follow each other there."""
    at = 0
    for begin, end in ours:
        there = 0
        for first, last in theirs:
            low, high = max(begin, first), min(end, last)
            if low < high:
                yield at + low - begin, there + low - first, high - low
            there += last - first
        at += end - begin


def _read(files: list[_File], step: int, lanczos: Lanczos, label: str) -> tuple[dict[str, Tensor], int, float] | None:
    """Copy this process's part of the vectors; returns what all have alike, if it sees the file that has it."""
    alike: tuple[dict[str, Tensor], int, float] | None = None
    state = lanczos.state(step)
    for each in files:
        pieces = list(_overlaps(lanczos.part.ranges, each.ranges))
        if not pieces and each.step != step:
            continue
        _check_digest(each.path)
        try:
            with safe_open(each.path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("label") != label:
                    raise KeyError("label")
                basis, following = file.get_slice("basis"), file.get_slice("next")
                whole = sum(end - begin for begin, end in each.ranges)
                k, kept, _ = state["basis"].shape
                n_held = lanczos.n_kept(each.step)
                if basis.get_shape() != [k, n_held, whole] or following.get_shape() != [k, whole]:
                    raise KeyError("basis")
                for ours, theirs, length in pieces:
                    into, source = slice(ours, ours + length), slice(theirs, theirs + length)
                    for i in range(k):
                        _copy(state["basis"][i, :, into], basis[i, :kept, source])
                        last = following[i, source] if each.step == step else basis[i, lanczos.place(step), source]
                        _copy(state["next"][i, into], last)
                if each.step == step and alike is None:
                    tensors = {name: file.get_tensor(name) for name in _ALIKE if name in file.keys()}  # noqa: SIM118
                    tensors.setdefault("skew", state["skew"].new_full(state["skew"].shape, float("nan")).cpu())
                    if "norm" in tensors:
                        tensors.setdefault("rounding", tensors["norm"] * ROUND_OFF["float16"])
                    for name, tensor in tensors.items():
                        if tensor.shape != state[name].shape or not tensor.is_floating_point():
                            raise KeyError(name)
                    alike = tensors, int(metadata.get("exponent", "0")), float(metadata.get("error", "0"))
        except (OSError, SafetensorError, KeyError, RuntimeError, ValueError) as error:
            raise _not_a_state(each.path) from error
    return alike


def _copy(into: Tensor, tensor: Tensor) -> None:
    if into.shape != tensor.shape or into.dtype != tensor.dtype:
        raise KeyError("basis")
    into.copy_(tensor)


def _remove_others(path: Path, n: int) -> None:
    """Remove what was saved by another number of processes, once that of as many as there are now is complete."""
    files = [path, *path.parent.glob(f"{path.stem}.*-of-*{path.suffix}")]
    by_number = [(int(place[2]) if (place := _PART.search(file.stem)) else 1, file) for file in files]
    if sum(number == n for number, _ in by_number) == n:
        for number, file in by_number:
            if number != n:
                file.unlink(missing_ok=True)


def _check_digest(path: Path) -> None:
    with open_regular(path, CurvatureError) as opened:
        digest.check_entry(opened, path, CurvatureError, _AGAIN)


def _not_a_state(path: Path) -> CurvatureError:
    return CurvatureError(f"{path} is not the saved state of this spectrum: {_AGAIN}")


__all__ = ["restore_state", "save_state"]
