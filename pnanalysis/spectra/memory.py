"""How the vectors of Lanczos bases are kept, how much memory a spectrum needs, and how many probes fit into it.

A basis is what a spectrum needs most memory for: a vector of P numbers for each product. It is kept

``"memory"``
    in the precision of the arithmetic, on the device;
``"half"``
    in float16, while the arithmetic and the coefficients stay as they are. Each Lanczos vector is rounded before its
    product is taken. The rounding errors of two vectors are independent of each other, so that the basis stays
    orthogonal to ``3e-4 / sqrt(P)`` or so;
``"disk"``
    in a file that is mapped into memory, which the system holds as much of as there is room for;
``"none"``
    not at all, but for the last two vectors. Without the others to orthogonalise against, Krylov spaces find the same
    eigenvalues again and again: see :mod:`pnanalysis.spectra.ghosts`.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pnanalysis.checks import human
from pnanalysis.errors import CurvatureError
from pnanalysis.spectra.free_memory import free_bytes
from pnanalysis.spectra.linear_operator import ROUND_OFF, empty_columns
from pnanalysis.spectra.scratch import scratch_folder
from pnanalysis.spectra.sharing import Part, part_of, processes_of

#: In the order in which they are tried: from the most accurate and fastest to what fits anywhere.
MODES = ("memory", "half", "disk", "none")
#: Fraction of the free memory that a basis may fill if no bound is given; the operator needs the rest.
DEFAULT_FRACTION = 0.6
#: Vectors of P numbers that an operator holds while it computes a product.
_OPERATOR_VECTORS = 4
#: The current vector, its product, the work space of Gram-Schmidt and the next vector.
_WORKING_VECTORS = 4
#: Bytes that probes of a single product may take together: little beside what a spectrum needs in any case. From the
#: second number on, one runs at a time.
_SINGLES, _LONG = 2**26, 2**23


@dataclass(frozen=True)
class Storage:
    """Where and in which precision bases are kept.

    Attributes
    ----------
    dtype : torch.dtype
        Of the arithmetic: float32 or float64.
    device : torch.device
    mode : {"memory", "half", "disk", "none"}
    folder : Path, optional
        For the file of ``"disk"``; by default the one of :func:`pnanalysis.spectra.scratch.scratch_folder`.
    part : Part, optional
        The entries of each vector that this process holds, where several divide vectors among them. Memory is then that
        of the process that holds most, and includes the whole vectors that products put together.
    """

    dtype: torch.dtype
    device: torch.device
    mode: str = "memory"
    folder: Path | None = None
    part: Part | None = None

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of the vectors that are kept."""
        return torch.float16 if self.mode == "half" else self.dtype

    @property
    def round_off(self) -> float:
        """What storing vectors changes in eigenvalues at most, relative to the largest.

        At most 4e-4 with ``"half"`` in spectra of 2,000 to 4,000 diagonal entries, whose few large Lanczos coordinates
        are the worst case; less by the square root of P where eigenvectors are spread over many parameters. How much it
        is for one operator, :meth:`pnanalysis.spectra.lanczos.Lanczos.rounding` measures.
        """
        return ROUND_OFF["float16"] if self.mode == "half" else 0.0

    def columns(self, n_parameters: int, n: int) -> torch.Tensor:
        """Room for ``n`` vectors, ``(P, n)``, each contiguous.

        Raises
        ------
        CurvatureError
            If there is no such file.
        """
        if self.part is not None:
            n_parameters = self.part.length
        if self.mode != "disk":
            return empty_columns(n_parameters, n, self.stored_dtype, self.device)
        folder = self.folder or scratch_folder()
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".basis-", dir=folder)
        try:
            _reserve(handle, n * n_parameters * self.dtype.itemsize)
            kept = torch.from_file(name, shared=True, size=n * n_parameters, dtype=self.dtype)
        except (OSError, RuntimeError) as error:
            raise CurvatureError(f"{folder}: no room for a basis on the disk ({error}); give another folder") from error
        finally:
            os.close(handle)
            os.unlink(name)  # it lives for as long as it is mapped
        return kept.view(n, n_parameters).T

    def kept(self, n_lanczos: int) -> int:
        """How many of the vectors of a probe are kept."""
        return min(n_lanczos, 2) if self.mode == "none" else n_lanczos

    def vectors_bytes(self, n_parameters: int, n: int) -> int:
        """Bytes of ``n`` vectors that are kept, or of their part."""
        n_held = n_parameters if self.part is None else self.part.largest
        return n * n_held * self.stored_dtype.itemsize

    def needed(self, n_parameters: int, n_lanczos: int, n_probes: int, n_deflated: int = 0) -> int:
        """Bytes of memory for bases of ``n_probes`` probes, and for ``n_deflated`` vectors that they share.

        Four more vectors for each probe are the current one, its product, the work space of Gram-Schmidt and the next
        one. The operator's own memory comes on top.
        """
        n_working = _WORKING_VECTORS - (self.mode == "none")  # the next vector takes the place of the last but one
        entries = n_working * n_parameters
        if self.part is not None:
            entries = n_working * self.part.largest + self.part.n_whole * n_parameters
        working = n_probes * entries * self.dtype.itemsize
        if self.mode == "disk":
            return working
        return working + self.vectors_bytes(n_parameters, n_probes * self.kept(n_lanczos) + n_deflated)


def basis_limit(n_held: int, dtype: torch.dtype, device: torch.device, max_memory_bytes: int | None = None) -> int:
    """The most memory for bases: the bound if there is one and what is free allows it, else 60 % of what is free.

    What is free has to hold the operator's own vectors too, of ``n_held`` numbers each: its parameters, their gradient,
    a vector and its product.
    """
    free = free_bytes(device)
    if device.type == "cpu":  # which the processes of torchrun share
        free //= max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
    if max_memory_bytes is None:
        return int(DEFAULT_FRACTION * free)
    return min(max_memory_bytes, max(free - _OPERATOR_VECTORS * n_held * dtype.itemsize, 0))


def memory_limit(operator: Any, dtype: torch.dtype, device: torch.device, max_memory_bytes: int | None = None) -> int:
    """:func:`basis_limit` for an operator; the least of several processes, which must keep bases in the same way."""
    part = part_of(operator)
    n_held = operator.shape[0] if part.is_all or part.n_whole else part.largest
    return int(processes_of(operator).least(basis_limit(n_held, dtype, device, max_memory_bytes)))


def probes_at_once(
    storage: Storage,
    n_parameters: int,
    n_lanczos: int,
    n_probes: int,
    n_deflated: int = 0,
    max_memory_bytes: int | None = None,
) -> int:
    """The most probes whose bases fit in memory together.

    Parameters
    ----------
    max_memory_bytes : int, optional
        The bound; by default 60 % of what is free on the device.

    Raises
    ------
    CurvatureError
        If not even one probe fits.
    """
    each = storage.needed(n_parameters, n_lanczos, 1)
    shared = storage.needed(n_parameters, n_lanczos, 0, n_deflated)
    limit = max_memory_bytes
    if limit is None:  # the deflated vectors are there already, and no longer count as free
        limit = int(DEFAULT_FRACTION * free_bytes(storage.device)) + shared
    fitting = (limit - shared) // each
    if fitting < 1:
        smaller = [mode for mode in MODES[MODES.index(storage.mode) + 1 :] if mode != "disk" or not _on_gpu(storage)]
        modes = f", keep it otherwise ({' or '.join(f'--basis {mode}' for mode in smaller)})" if smaller else ""
        advice = "; in Python, basis_device='cpu' keeps the basis in host memory" if _on_gpu(storage) else ""
        raise CurvatureError(
            f"one probe of {n_lanczos} Lanczos steps on {n_parameters:,} parameters needs {human(each + shared)}, "
            f"the bound is {human(limit)}: lower n_lanczos or n_hvp (--n-lanczos, --n-hvp), raise max_memory_bytes "
            f"(--memory){modes}{advice}"
        )
    return min(n_probes, int(fitting))


def vectors_at_once(storage: Storage, n_parameters: int, n_wanted: int, max_memory_bytes: int | None = None) -> int:
    """How many of ``n_wanted`` vectors fit in memory with those to work with; may be 0."""
    if storage.mode == "disk":
        return n_wanted
    limit = int(DEFAULT_FRACTION * free_bytes(storage.device)) if max_memory_bytes is None else max_memory_bytes
    left = limit - storage.needed(n_parameters, 0, 1)
    return max(min(n_wanted, left // storage.vectors_bytes(n_parameters, 1)), 0)


def singles_at_once(storage: Storage, n_parameters: int) -> int:
    """How many probes of a single product run together: one where vectors are long, as its working space is counted."""
    each = storage.needed(n_parameters, 0, 1)
    return 1 if each > _LONG else _SINGLES // max(each, 1)


def _reserve(handle: int, n_bytes: int) -> None:
    """Make a file as long as it will be, on the disk where the system can: a full disk is then found out here."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, n_bytes)
    else:
        os.truncate(handle, n_bytes)


def _on_gpu(storage: Storage) -> bool:
    return storage.device.type != "cpu"
