"""Random directions of parameter space, scaled filter by filter to the weights they are to perturb.

References
----------
H. Li et al., "Visualizing the Loss Landscape of Neural Nets", NeurIPS 2018, arXiv:1712.09913, section 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pnanalysis.inputs.copies import as_real, matching_dtype
from pnanalysis.io.weights import State
from pnanalysis.spectra.inner_products import wide_dtype
from pnanalysis.spectra.random_vectors import normal_numbers


class FilterNormalised:
    """Gaussian directions, each filter scaled to the norm of the tensor's own filter.

    A filter is an entry of the first axis: one output of a linear layer or a convolution, one token of an embedding,
    but one input of a transposed convolution.

    They are drawn on the device of the tensors, one tensor at a time, and are the same on every device.

    Parameters
    ----------
    n : int
        How many directions to draw.
    seed : int
    """

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed = n, seed
        self._place = 0  # pairs of numbers that have been drawn of each direction

    def of(self, tensor: Tensor) -> Tensor:
        """The parts of all directions in the parameter that comes next.

        Parameters
        ----------
        tensor : Tensor, shape (F, ...)
            Its value.

        Returns
        -------
        Tensor, shape (n, F, ...)
            In float64 (complex128 for complex tensors; float32 on Metal), on the tensor's device; zeros for tensors
            with fewer than two axes (biases, batch normalisation).
        """
        wide = wide_dtype(tensor.device)
        dtype = matching_dtype(tensor, wide)
        if tensor.ndim < 2:
            return torch.zeros(self.n, *tensor.shape, dtype=dtype, device=tensor.device)
        filters = as_real(tensor.detach()).flatten(1)
        norms = torch.linalg.vector_norm(filters, dim=1, keepdim=True, dtype=wide)
        drawn = torch.empty(self.n, *filters.shape, dtype=wide, device=tensor.device)
        for i, direction in enumerate(drawn):
            numbers = normal_numbers(filters.numel(), i, self.seed, tensor.device, first=self._place)
            direction.copy_(numbers.view(filters.shape))
            direction.mul_(norms / direction.norm(dim=1, keepdim=True))
        self._place += (filters.numel() + 1) // 2
        return drawn.view(dtype).view(self.n, *tensor.shape)


def random_directions(state: Mapping[str, Tensor], names: Sequence[str], seed: int = 0) -> tuple[State, State]:
    """Two directions of :class:`FilterNormalised` about a state, in its form.

    They span the first random plane of :func:`pnanalysis.trajectory` with the same seed, if ``state`` is its plain end.

    Parameters
    ----------
    state : mapping of tensors
    names : sequence of str
        Its parameters, in the order of the network. Its other tensors, the buffers, get zeros.
    seed : int
    """
    directions = FilterNormalised(2, seed)
    first, second = ({name: torch.zeros_like(tensor) for name, tensor in state.items()} for _ in range(2))
    for name in names:
        pair = directions.of(state[name])
        first[name], second[name] = pair.to(state[name])
    return first, second
