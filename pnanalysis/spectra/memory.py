"""How much memory a spectrum needs, and how many probes fit into what is free."""

from __future__ import annotations

import torch

from pnanalysis.checks import human
from pnanalysis.errors import CurvatureError
from pnanalysis.spectra.free_memory import free_bytes

#: Fraction of the free memory that a basis may fill if no bound is given; the operator needs the rest.
DEFAULT_FRACTION = 0.6
#: Vectors of P numbers that an operator holds while it computes a product.
_OPERATOR_VECTORS = 4


def basis_bytes(n_parameters: int, n_lanczos: int, n_probes: int, dtype: torch.dtype, n_deflated: int = 0) -> int:
    """Bytes of Lanczos bases: ``((n_lanczos + 3) * n_probes + n_deflated) * P`` numbers of ``dtype``.

    A basis takes ``n_lanczos`` vectors per probe; three more are the current vector, its product and the work space
    of Gram-Schmidt. ``n_deflated`` vectors are shared by all probes. The operator's own memory comes on top.
    """
    return ((n_lanczos + 3) * n_probes + n_deflated) * n_parameters * dtype.itemsize


def basis_limit(
    n_parameters: int, dtype: torch.dtype, device: torch.device, max_memory_bytes: int | None = None
) -> int:
    """The most memory for bases: the bound if there is one and what is free allows it, else 60 % of what is free.

    What is free has to hold the operator's own vectors too: its parameters, their gradient, a vector and its product.
    """
    free = free_bytes(device)
    if max_memory_bytes is None:
        return int(DEFAULT_FRACTION * free)
    return min(max_memory_bytes, max(free - _OPERATOR_VECTORS * n_parameters * dtype.itemsize, 0))


def probes_at_once(
    n_parameters: int,
    n_lanczos: int,
    n_probes: int,
    dtype: torch.dtype,
    device: torch.device,
    n_deflated: int = 0,
    max_memory_bytes: int | None = None,
) -> int:
    """The most probes whose bases fit in memory together.

    Parameters
    ----------
    max_memory_bytes : int, optional
        The bound; by default 60 % of what is free on ``device``.

    Raises
    ------
    CurvatureError
        If not even one probe fits.
    """
    each = basis_bytes(n_parameters, n_lanczos, 1, dtype)
    shared = basis_bytes(n_parameters, n_lanczos, 0, dtype, n_deflated)
    limit = max_memory_bytes
    if limit is None:  # the deflated vectors are there already, and no longer count as free
        limit = int(DEFAULT_FRACTION * free_bytes(device)) + shared
    fitting = (limit - shared) // each
    if fitting < 1:
        advice = "; in Python, basis_device='cpu' keeps the basis in host memory" if device.type == "cuda" else ""
        raise CurvatureError(
            f"one probe of {n_lanczos} Lanczos steps on {n_parameters:,} parameters needs {human(each + shared)}, "
            f"the bound is {human(limit)}: lower n_lanczos or n_hvp (--n-lanczos, --n-hvp), or raise max_memory_bytes "
            f"(--memory){advice}"
        )
    return min(n_probes, int(fitting))


def vectors_at_once(
    n_parameters: int, n_wanted: int, dtype: torch.dtype, device: torch.device, max_memory_bytes: int | None = None
) -> int:
    """How many of ``n_wanted`` vectors fit in memory with three more to work with; may be 0."""
    limit = int(DEFAULT_FRACTION * free_bytes(device)) if max_memory_bytes is None else max_memory_bytes
    return max(min(n_wanted, limit // (n_parameters * dtype.itemsize) - 3), 0)
