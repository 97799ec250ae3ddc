"""Which matrix numbers are of, as titles and sentences call it, and as a comparison keeps it among its attributes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

_NAMES = {
    "hessian": ("Hessian", "Hessians"),
    "ggn": ("Gauss-Newton", "Gauss-Newton matrices"),
    "fisher": ("empirical Fisher", "empirical Fisher matrices"),
}


class MatrixOptions(Protocol):
    """What options of analyses of matrices have in common."""

    @property
    def operator(self) -> str: ...
    @property
    def params(self) -> Any: ...
    @property
    def bn_mode(self) -> str: ...


def matrix_attrs(name: str, options: MatrixOptions) -> dict[str, Any]:
    """Attributes of a comparison, such as ``hessian_operator``, that say which matrix numbers of one part are of."""
    found = {"operator": options.operator, "params": options.params}
    if options.bn_mode == "train":
        found["bn_mode"] = options.bn_mode
    return {f"{name}_{key}": value for key, value in found.items()}


def matrix_name(attrs: Mapping[str, Any], part: str = "", plural: bool = False) -> str:
    """The matrix of a dataset, such as ``Hessian`` or ``empirical Fisher of fc1``.

    Parameters
    ----------
    attrs : mapping
        Of the dataset.
    part : str
        Of a comparison: ``hessian``, ``eigenpairs`` or ``blocks``.
    plural : bool
    """
    prefix = f"{part}_" if part else ""
    operator = str(attrs.get(f"{prefix}operator", "hessian"))
    name = _NAMES.get(operator, (operator, operator))[plural]
    params = attrs.get(f"{prefix}params")
    if params is not None and len(params):
        name += f" of {params if isinstance(params, str) else ', '.join(map(str, params))}"
    return name + " with statistics of batches" * (attrs.get(f"{prefix}bn_mode") == "train")
