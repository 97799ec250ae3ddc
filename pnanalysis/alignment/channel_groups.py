"""Groups of interchangeable channels, merged by union-find when two prove to be the same."""

from __future__ import annotations

from dataclasses import dataclass

from pnanalysis.errors import ModelError


@dataclass(frozen=True)
class IndexedAxis:
    """An axis of a tensor that a group indexes, with ``repeat`` consecutive entries per channel.

    ``signed``: whether the entries change sign with the channel (a weight does, a running variance does not).
    """

    tensor: str
    dim: int
    repeat: int
    signed: bool


@dataclass(frozen=True)
class Group:
    """``size`` interchangeable channels; where ``odd``, the sign of each may be flipped as well."""

    size: int
    uses: tuple[IndexedAxis, ...]
    odd: bool


@dataclass(frozen=True)
class ChannelAxis:
    """The axis along which an activation carries channels, and of which group (``None``: not to be relabelled)."""

    group: int | None
    dim: int
    repeat: int = 1


class ChannelGroups:
    """Groups of channels and the tensor axes they index, built up and merged while a network is traced.

    Parameters
    ----------
    canonical : dict
        Every name of a tensor to the first name of the same tensor.
    """

    def __init__(self, canonical: dict[str, str]) -> None:
        self.canonical = canonical
        self._parent: list[int] = []
        self._size: list[int] = []
        self._fixed: list[bool] = []
        self._even: list[bool] = []
        self._uses: dict[tuple[str, int], tuple[ChannelAxis, bool]] = {}

    def groups(self) -> list[Group]:
        """The groups that may be relabelled, with the axes they index."""
        uses: dict[int, list[IndexedAxis]] = {}
        for (tensor, dim), (axis, signed) in self._uses.items():
            root = self._root(axis.group)
            if root is not None and not self._fixed[root] and self._size[root] > 1:
                uses.setdefault(root, []).append(IndexedAxis(tensor, dim, axis.repeat, signed))
        return [Group(self._size[root], tuple(found), not self._even[root]) for root, found in uses.items()]

    def open(self, size: int, dim: int) -> ChannelAxis:
        """A new group, carried along ``dim``."""
        self._parent.append(len(self._parent))
        self._size.append(size)
        self._fixed.append(False)
        self._even.append(False)
        return ChannelAxis(self._parent[-1], dim)

    def bind(self, tensor: str, dim: int, axis: ChannelAxis, signed: bool = True) -> None:
        """Record that the group of ``axis`` indexes this axis of a tensor; if another group does, merge them."""
        key = (self.canonical[tensor], dim)
        if key in self._uses:
            self.unify(self._uses[key][0], axis)
        else:
            self._uses[key] = (axis, signed)

    def unify(self, a: ChannelAxis, b: ChannelAxis, where: str = "") -> ChannelAxis:
        """Merge the channels of two activations; with ``where``, they must lie along the same axis."""
        first, second = self._root(a.group), self._root(b.group)
        if first is None or second is None:
            self.fix(a)
            self.fix(b)
            return a if second is None else b
        if (self._size[first], a.repeat) != (self._size[second], b.repeat) or (where and a.dim != b.dim):
            raise misunderstood("an operation on channels of different layout", where)
        self._parent[second] = first
        self._fixed[first] |= self._fixed[second]
        self._even[first] |= self._even[second]
        return a

    def _root(self, group: int | None) -> int | None:
        while group is not None and self._parent[group] != group:
            group = self._parent[group]
        return group

    def fix(self, axis: ChannelAxis | None) -> None:
        """Exclude these channels from relabelling."""
        root = self._root(axis.group) if axis is not None else None
        if root is not None:
            self._fixed[root] = True

    def mark_even(self, axis: ChannelAxis) -> ChannelAxis:
        """Exclude these channels from sign flips."""
        root = self._root(axis.group)
        if root is not None:
            self._even[root] = True
        return axis


def misunderstood(what: str, where: str = "") -> ModelError:
    """The error for an operation that the tracing does not cover."""
    place = f" ({where})" if where else ""
    return ModelError(
        f"this network cannot be aligned: {what}{place} is not supported, so its channels cannot be followed"
    )
