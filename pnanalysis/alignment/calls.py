"""Calls of operations in a traced graph, as the rules see them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pnanalysis.alignment.labelled import Labelled, Labels


@dataclass(frozen=True)
class Call:
    """A call of an operation in the traced graph: its arguments by name, with labelled tensors for tensors.

    Attributes
    ----------
    labels : Labels
    name : str
    arguments : dict
    results : list
        What it returns, as tensors without values; ``None`` for what is no tensor.
    given : list
        Its arguments that are tensors, without values.
    """

    labels: Labels
    name: str
    arguments: dict[str, Any]
    results: list[Any]
    given: list[Any] = field(default_factory=list)

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    @property
    def source(self) -> Labelled:
        """The first tensor among the arguments."""
        return self.values[0]

    @property
    def values(self) -> list[Labelled]:
        """All tensors among the arguments, in order."""
        return list(labelled_in(list(self.arguments.values())))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the first result."""
        first = self.results[0]
        return tuple(first.shape) if isinstance(first, Tensor) else ()

    def dims(self, ndim: int) -> list[int]:
        """The axes that the operation names, from 0 on; all where it names none."""
        given = self["dim"] if self["dim"] is not None else self["dims"]
        chosen = list(range(ndim)) if given is None or given == [] else [given] if isinstance(given, int) else given
        return [dim % ndim for dim in chosen] if ndim else []

    def dim(self, name: str = "dim") -> int:
        """One axis, from 0 on."""
        return int((self[name] or 0) % max(len(self.source.axes), 1))


Result = Labelled | tuple[Labelled | None, ...] | None
Rule = Callable[[Call], Result]


def labelled_in(nest: Any) -> list[Labelled]:
    """The labelled tensors in a nest of lists."""
    if isinstance(nest, Labelled):
        return [nest]
    return [value for part in nest for value in labelled_in(part)] if isinstance(nest, list | tuple) else []
