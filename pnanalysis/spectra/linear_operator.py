"""Symmetric linear operators: the protocol, and operators made from matrices.

Vectors are columns. Wherever several vectors cross the boundary of a function or class of this package, they are a
tensor ``(P, k)``, or ``(..., P, k)`` for several sets of them: start vectors, bases, deflated spaces, Ritz vectors.
Each column is contiguous in memory (the tensor is the transposed view of a ``(k, P)`` one), as
:func:`contiguous_columns` and :func:`empty_columns` make it: a product of a network splits a vector into views, and
BLAS reads bases row by row.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator as ScipyLinearOperator
from scipy.sparse.linalg import aslinearoperator

from pnanalysis.arrays import Array
from pnanalysis.errors import CurvatureError
from pnanalysis.spectra.sharing import part_of

NOT_FINITE = "a product of the operator held NaN or infinite values; check the weights and the data"


@runtime_checkable
class LinearOperator(Protocol):
    """A real symmetric linear map known by its products.

    Anything with these five members will do; no base class is needed. ``shape`` is ``(P, P)``; ``device`` and
    ``dtype`` are those of the vectors that the products take and return. An attribute ``arithmetic``, a key of
    :data:`ROUND_OFF`, may say that the products are less precise than their ``dtype``; an attribute ``round_off``, how
    far they are off relative to the norm, and ``by_differences``, that this is no mere round-off; a method
    ``note_error`` is then told how far those were off that an interrupted process made. For ``processes`` and ``part``
    of operators that several processes share see :mod:`pnanalysis.spectra.sharing`.
    """

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        """Product with one vector: ``(P,)`` to ``(P,)``."""
        ...

    def matmat(self, V: torch.Tensor) -> torch.Tensor:
        """Products with ``k`` vectors at once: ``(P, k)`` to ``(P, k)``."""
        ...


#: Round-off of products, and of the largest eigenvalues, relative to the norm of the operator, by the arithmetic that
#: computes them: the largest, rounded up, that was measured on small trained networks in double, single and bfloat16.
ROUND_OFF = {"float64": 1e-14, "float32": 1e-6, "tf32": 1e-3, "float16": 1e-3, "bfloat16": 4.5e-3}

#: Dtypes of operators.
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_COMPLEX = "the products of the operator are complex; give a real symmetric one"


class DenseOperator:
    """A dense symmetric matrix ``(P, P)`` as an operator on its own device and in its own dtype."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix = matrix
        self.shape = _square(tuple(matrix.shape))
        self.device = matrix.device
        self.dtype = matrix.dtype

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        return self.matrix @ v

    def matmat(self, V: torch.Tensor) -> torch.Tensor:
        return self.matrix @ V


class DiagonalOperator:
    """The diagonal matrix of ``eigenvalues`` ``(P,)``: a spectrum that is known exactly, at no cost per product.

    Gaussian probes and probes uniform on the sphere do not see a rotation of the operator, so every statement
    about their estimates on a dense matrix can be checked on the diagonal of its eigenvalues.
    """

    def __init__(self, eigenvalues: torch.Tensor) -> None:
        if eigenvalues.ndim != 1:
            raise CurvatureError(f"the eigenvalues must be one vector, not of shape {tuple(eigenvalues.shape)}")
        self.eigenvalues = eigenvalues
        self.shape = (len(eigenvalues), len(eigenvalues))
        self.device = eigenvalues.device
        self.dtype = eigenvalues.dtype

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        return self.eigenvalues * v

    def matmat(self, V: torch.Tensor) -> torch.Tensor:
        return self.eigenvalues[:, None] * V


class _FromScipy:
    """A SciPy linear operator or sparse matrix; products cross to NumPy in host memory and back."""

    def __init__(self, operator: ScipyLinearOperator) -> None:
        self.operator = operator
        self.shape = _square(tuple(operator.shape))
        self.device = torch.device("cpu")
        single = operator.dtype is not None and np.dtype(operator.dtype) == np.float32
        self.dtype = torch.float32 if single else torch.float64

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        return self._tensor(self.operator.matvec(v.numpy(force=True)))

    def matmat(self, V: torch.Tensor) -> torch.Tensor:
        return self._tensor(self.operator.matmat(V.numpy(force=True)))

    def _tensor(self, product: Array) -> torch.Tensor:
        if np.iscomplexobj(product):
            raise CurvatureError(_COMPLEX)
        return torch.from_numpy(np.ascontiguousarray(product)).to(self.dtype)


def as_operator(source: Any) -> LinearOperator:
    """Make a :class:`LinearOperator` of a matrix, or pass an operator through.

    Parameters
    ----------
    source : torch.Tensor, numpy.ndarray, scipy sparse matrix, scipy LinearOperator or LinearOperator
        Square and symmetric (symmetry is checked, on random vectors, where a spectrum is asked for). Integer
        matrices are taken as float64.

    Returns
    -------
    LinearOperator

    Raises
    ------
    CurvatureError
        If ``source`` is none of these, is not square, is empty, is complex or has a dtype that cannot be computed with.

    Examples
    --------
    >>> import numpy as np, torch
    >>> op = as_operator(np.diag([3.0, 1.0]))
    >>> op.matvec(torch.ones(2, dtype=op.dtype))
    tensor([3., 1.], dtype=torch.float64)
    """
    if isinstance(source, torch.Tensor | np.ndarray):
        try:
            dense = torch.as_tensor(source)
        except TypeError as error:
            raise CurvatureError(f"the matrix has the dtype {source.dtype}, which torch lacks; give float64") from error
        if dense.is_complex():
            raise CurvatureError("the matrix is complex; give a real symmetric one")
        return as_operator(DenseOperator(dense if dense.is_floating_point() else dense.double()))
    if isinstance(source, LinearOperator) and isinstance(source.dtype, torch.dtype):
        _square(tuple(source.shape))
        if source.dtype not in _DTYPES:
            raise CurvatureError(
                f"the operator has the dtype {source.dtype}; give a real one in float64, float32, bfloat16 or float16"
            )
        return source
    try:
        operator = aslinearoperator(source)
    except (TypeError, ValueError) as error:
        raise CurvatureError(
            f"cannot make an operator of a {type(source).__name__}: give a square torch tensor, NumPy array, SciPy "
            "matrix or LinearOperator, or an object with shape, device, dtype, matvec and matmat"
        ) from error
    if operator.dtype is not None and np.issubdtype(operator.dtype, np.complexfloating):
        raise CurvatureError("the operator is complex; give a real symmetric one")
    return _FromScipy(operator)


def arithmetic(operator: LinearOperator) -> str:
    """What computes the products: a key of :data:`ROUND_OFF`."""
    return str(getattr(operator, "arithmetic", operator.dtype)).removeprefix("torch.")


def round_off(operator: LinearOperator) -> float:
    """Relative error of the products, and so of the largest eigenvalues, that the arithmetic causes."""
    return float(getattr(operator, "round_off", ROUND_OFF[arithmetic(operator)]))


def note_error(operator: LinearOperator, error: float) -> None:
    """Tell an operator that products of an earlier process, which go on here, were off by so much."""
    note = getattr(operator, "note_error", None)
    if note is not None:
        note(error)


def not_symmetric(operator: LinearOperator, found: str) -> CurvatureError:
    """The error for an operator that is not symmetric, with the likely reason."""
    advice = "every product must use the same data, with nothing random in the model (dropout, augmentation)"
    if getattr(operator, "by_differences", False):
        advice = "finite differences are too coarse here: compute in float64, or take exact products"
    return CurvatureError(f"the operator is not symmetric: {found}; {advice}")


def contiguous_columns(V: torch.Tensor) -> torch.Tensor:
    """The same vectors ``(..., P, k)``, each contiguous in memory; not copied if they are so already."""
    return V.mT.contiguous().mT


def empty_columns(n_parameters: int, k: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory for ``k`` vectors, ``(P, k)``, each contiguous; the values are arbitrary."""
    return torch.empty(k, n_parameters, dtype=dtype, device=device).T


def checked_product(operator: LinearOperator, V: torch.Tensor) -> torch.Tensor:
    """``operator.matmat(V)`` for vectors ``(P, k)`` of any dtype on any device; on the operator's device.

    The operator gets a copy of the vectors, on which it may work in place.

    Raises
    ------
    CurvatureError
        If the product is no tensor, is complex, or is not of the shape of the vectors.
    """
    product = operator.matmat(V.to(device=operator.device, dtype=operator.dtype, copy=True))
    if not isinstance(product, torch.Tensor):
        raise CurvatureError(f"the operator's matmat returns a {type(product).__name__}; it must return a torch tensor")
    if product.shape != V.shape:
        raise CurvatureError(
            f"a product of the operator with vectors of shape {tuple(V.shape)} has the shape {tuple(product.shape)}; "
            "its matmat must return the shape it is given"
        )
    if product.is_complex():
        raise CurvatureError(_COMPLEX)
    return product


def dense_matrix(operator: LinearOperator, chunk: int) -> torch.Tensor:
    """The matrix of an operator, ``(P, P)``, symmetrised; from ``chunk`` products at a time."""
    part, n = part_of(operator), operator.shape[0]
    eye = torch.eye(n, dtype=operator.dtype, device=operator.device)
    columns = [operator.matmat(contiguous_columns(part.of(some.T))) for some in torch.split(eye, chunk)]
    dense = torch.cat([part.whole(some, n) for some in columns], dim=1)
    return (dense + dense.T) / 2


def _square(shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
        raise CurvatureError(f"an operator must be square and not empty, this one has shape {shape}")
    return shape[0], shape[1]
