"""Groups of interchangeable channels, merged by union-find as it becomes known which are the same."""

from __future__ import annotations

from dataclasses import dataclass

from pnanalysis.errors import ModelError


@dataclass(frozen=True)
class Use:
    """An axis of a tensor that a group indexes, each channel ``repeat`` times in a row.

    ``signed`` says whether the entries change sign with the channel (a weight does, a running variance does not).
    """

    tensor: str
    dim: int
    repeat: int
    signed: bool


@dataclass(frozen=True)
class Group:
    """``size`` interchangeable channels; where ``odd``, the sign of each may be flipped as well."""

    size: int
    uses: tuple[Use, ...]
    odd: bool


@dataclass(frozen=True)
class Axis:
    """Where a value carries its channels: group (``None``: not to be relabelled), axis, repetitions."""

    group: int | None
    dim: int
    repeat: int = 1


class ChannelGroups:
    """Opens groups, notes which axes of which tensors they index, and merges them.

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
        self._uses: dict[tuple[str, int], tuple[Axis, bool]] = {}

    def groups(self) -> list[Group]:
        """The groups that are free, with their uses."""
        uses: dict[int, list[Use]] = {}
        for (tensor, dim), (axis, signed) in self._uses.items():
            root = self._root(axis.group)
            if root is not None and not self._fixed[root] and self._size[root] > 1:
                uses.setdefault(root, []).append(Use(tensor, dim, axis.repeat, signed))
        return [Group(self._size[root], tuple(found), not self._even[root]) for root, found in uses.items()]

    def open(self, size: int, dim: int) -> Axis:
        """A new group, carried along ``dim``."""
        self._parent.append(len(self._parent))
        self._size.append(size)
        self._fixed.append(False)
        self._even.append(False)
        return Axis(self._parent[-1], dim)

    def bind(self, tensor: str, dim: int, axis: Axis, signed: bool = True) -> None:
        """The group of ``axis`` indexes this axis of a tensor; where another does so too, they are one."""
        key = (self.canonical[tensor], dim)
        if key in self._uses:
            self.unify(self._uses[key][0], axis)
        else:
            self._uses[key] = (axis, signed)

    def unify(self, a: Axis, b: Axis, where: str = "") -> Axis:
        """The channels of two values are the same ones; with ``where``, they lie along the same axis too."""
        first, second = self._root(a.group), self._root(b.group)
        if first is None or second is None:
            self.fix(a)
            self.fix(b)
            return a if second is None else b
        if (self._size[first], a.repeat) != (self._size[second], b.repeat) or (where and a.dim != b.dim):
            raise misunderstood("channels of unlike layout put together", where)
        self._parent[second] = first
        self._fixed[first] |= self._fixed[second]
        self._even[first] |= self._even[second]
        return a

    def _root(self, group: int | None) -> int | None:
        while group is not None and self._parent[group] != group:
            group = self._parent[group]
        return group

    def fix(self, axis: Axis | None) -> None:
        """These channels keep their places."""
        root = self._root(axis.group) if axis is not None else None
        if root is not None:
            self._fixed[root] = True

    def mark_even(self, axis: Axis) -> Axis:
        """These channels keep their signs."""
        root = self._root(axis.group)
        if root is not None:
            self._even[root] = True
        return axis


def misunderstood(what: str, where: str = "") -> ModelError:
    """The error for what cannot be followed."""
    place = f" ({where})" if where else ""
    return ModelError(f"this network cannot be aligned: what becomes of its channels in {what}{place} is not known")
