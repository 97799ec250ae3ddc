"""What eigenvectors say about a network: their layers, the gradient and the last update among them, its classes."""

from __future__ import annotations

import numpy as np
import xarray as xr
from torch import Tensor

from pnanalysis.arrays import Array
from pnanalysis.curvature.base import CurvatureOperator
from pnanalysis.curvature.class_structure import LEVELS, class_structure
from pnanalysis.errors import CurvatureError, Indivisible
from pnanalysis.spectra.data_error import FEWEST_GROUPS
from pnanalysis.spectra.inner_products import coordinates, norms
from pnanalysis.spectra.linear_operator import empty_columns
from pnanalysis.spectra.subspaces import participation, squared_cosines

#: Groups of examples whose gradients are compared.
_GROUPS = FEWEST_GROUPS
#: Vectors that are kept meanwhile.
GRADIENTS_KEPT = _GROUPS


def numbers_of(
    operator: CurvatureOperator, V: Tensor, update: Tensor | None, directions: bool = True, classes: bool = True
) -> xr.Dataset:
    """Numbers of the eigenvectors of one matrix that belong to a network.

    Parameters
    ----------
    operator : CurvatureOperator
    V : Tensor
        Eigenvectors ``(P, k)``.
    update : Tensor, optional
        The last step of the training, ``(P,)``.
    directions, classes : bool
        Whether the parts of gradient and update, and the class structure, are among them.

    Returns
    -------
    xarray.Dataset
        ``participation``, ``layer_part``, ``layer_share``, those of :func:`_directions` and of :func:`_classes`. The
        attribute ``class_note`` says why there are no classes where that is so.
    """
    ds = _by_layer(operator, V).assign(participation=("pair", participation(V)))
    if directions:
        ds = _directions(ds, operator, V, update)
    return _classes(ds, operator, V) if classes else ds


def gradient_errors(operator: CurvatureOperator, V: Tensor) -> tuple[Array, float]:
    """Parts ``(8,)`` of the gradient in a space without one of eight groups of the examples at a time, and the norm of
    the gradient's own error for the choice of examples; the space stays. NaN where examples cannot be divided.
    """
    each = empty_columns(operator.shape[0], _GROUPS, operator.dtype, operator.device)
    try:
        for i in range(_GROUPS):
            each[:, i] = operator.subset([i], _GROUPS, expected_products=1).gradient()
    except Indivisible:
        return np.full(_GROUPS, np.nan), np.nan
    gram = coordinates(each, each).cpu().double().numpy()
    inner = coordinates(V.to(each), each).cpu().double().numpy()
    others = (1 - np.eye(_GROUPS)) / (_GROUPS - 1)
    inside = np.square(inner @ others).sum(0)
    whole = np.einsum("ai,ab,bi->i", others, gram, others)
    part = np.divide(inside, whole, out=np.full(_GROUPS, np.nan), where=whole > 0)
    scatter = max(float(np.trace(gram) - gram.sum() / _GROUPS), 0.0)
    return part, float(np.sqrt(scatter / (_GROUPS * (_GROUPS - 1))))


def jackknife_se(parts: Array) -> float:
    """Standard error of a number, from its values ``(group,)`` without one of the groups of examples at a time."""
    return float(np.sqrt((len(parts) - 1) * parts.var()))


def _by_layer(operator: CurvatureOperator, V: Tensor) -> xr.Dataset:
    """The part of each vector, and of the parameters, in each layer."""
    layers = list(dict.fromkeys(layer for _, layer, _ in operator.tensors))
    part, size = np.zeros((V.shape[1], len(layers))), np.zeros(len(layers))
    begin = 0
    for _, layer, n in operator.tensors:
        at = layers.index(layer)
        part[:, at] += norms(V[begin : begin + n]).square().cpu().numpy()
        size[at] += n
        begin += n
    total = part.sum(1, keepdims=True)
    return xr.Dataset(
        {"layer_part": (("pair", "layer"), part / total), "layer_share": ("layer", size / size.sum())},
        {"layer": layers},
    )


def _directions(ds: xr.Dataset, operator: CurvatureOperator, V: Tensor, update: Tensor | None) -> xr.Dataset:
    """The parts of the gradient and of the last update along the vectors, and in the space of as many as classes."""
    n_classes = operator.n_classes
    n_top = V.shape[1] if n_classes is None else min(n_classes, V.shape[1])
    gradient = operator.gradient()
    along = squared_cosines(V, gradient)
    ds = ds.assign(
        gradient_part=("pair", along), gradient_top=along[:n_top].sum(), top_chance=n_top / operator.shape[0],
        gradient_norm=float(norms(gradient[:, None])),
    ).assign_attrs(n_top=n_top)  # fmt: skip
    if update is not None:
        along = squared_cosines(V, update)
        ds = ds.assign(
            update_part=("pair", along), update_top=along[:n_top].sum(), update_norm=float(norms(update[:, None]))
        )
    return ds


def _classes(ds: xr.Dataset, operator: CurvatureOperator, V: Tensor) -> xr.Dataset:
    """The class structure, or why there is none."""
    try:
        found = class_structure(operator, V)
    except CurvatureError as error:
        return ds.assign_attrs(class_note=str(error))
    whole = found.level_form.sum(0)
    n = operator.shape[0]
    part = np.divide(found.level_form, whole, out=np.zeros(found.level_form.shape), where=whole > 0)
    ds = ds.assign(
        level_part=(("level", "pair"), part),
        ggn_value=("pair", whole), class_part=("pair", found.class_part), cross_part=("pair", found.cross_part),
        class_value=("class", found.class_value), class_chance=found.class_rank / n,
    )  # fmt: skip
    if len(found.cross_value):
        ds = ds.assign(cross_value=("class_pair", found.cross_value), cross_chance=found.cross_rank / n)
    return ds.assign_coords(level=list(LEVELS))


__all__ = ["GRADIENTS_KEPT", "gradient_errors", "jackknife_se", "numbers_of"]
