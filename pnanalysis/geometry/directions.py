"""Random directions of parameter space, scaled filter by filter to the weights they are to perturb.

References
----------
H. Li et al., "Visualizing the Loss Landscape of Neural Nets", NeurIPS 2018, arXiv:1712.09913, section 4.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from pnanalysis.inputs.copies import as_real, matching_dtype
from pnanalysis.io.weights import State


def filter_normalised(tensors: Iterable[tuple[str, Tensor]], n: int, generator: torch.Generator) -> State:
    """Gaussian directions, each filter (the entries of one output) scaled to the norm of the tensor's own filter.

    Parameters
    ----------
    tensors : iterable of (str, Tensor of shape (F, ...))
        Name and value of each parameter; numbers are drawn in this order, one tensor at a time.
    n : int
        How many directions to draw.
    generator : torch.Generator
        On the CPU.

    Returns
    -------
    dict of str to Tensor, shape (n, F, ...)
        In float64 (complex128 for complex tensors), on the CPU; zeros for tensors with fewer than two axes (biases,
        batch normalisation).
    """
    return {name: _filter_normalised(tensor, n, generator) for name, tensor in tensors}


def random_directions(state: Mapping[str, Tensor], names: Sequence[str], seed: int = 0) -> tuple[State, State]:
    """Two directions of :func:`filter_normalised` about a state, in its form.

    They span the first random plane of :func:`pnanalysis.trajectory` with the same seed, if ``state`` is its plain end.

    Parameters
    ----------
    state : mapping of tensors
    names : sequence of str
        Its parameters, in the order of the network. Its other tensors, the buffers, get zeros.
    seed : int
    """
    generator = torch.Generator().manual_seed(seed)
    first, second = ({name: torch.zeros_like(tensor) for name, tensor in state.items()} for _ in range(2))
    for name, pair in filter_normalised(((name, state[name]) for name in names), 2, generator).items():
        first[name], second[name] = pair.to(state[name])
    return first, second


def _filter_normalised(tensor: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """The directions of one tensor, (n, F, ...)."""
    dtype = matching_dtype(tensor, torch.float64)
    if tensor.ndim < 2:
        return torch.zeros(n, *tensor.shape, dtype=dtype)
    filters = as_real(tensor.detach().to(dtype).cpu()).flatten(1)
    norms = filters.norm(dim=1, keepdim=True)
    drawn = torch.randn(n, *filters.shape, generator=generator, dtype=torch.float64)
    scaled = drawn * (norms / drawn.norm(dim=2, keepdim=True))
    return scaled.view(dtype).view(n, *tensor.shape)
