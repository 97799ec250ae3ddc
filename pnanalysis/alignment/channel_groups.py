"""Groups of interchangeable channels, merged by union-find whenever two turn out to be the same."""

from __future__ import annotations

from dataclasses import dataclass

from pnanalysis.errors import ModelError


@dataclass(frozen=True)
class TensorAxis:
    """An axis of a parameter or buffer that is indexed by the channels of a group.

    Attributes
    ----------
    tensor : str
    dim : int
    repeat : int
        Consecutive entries per channel (after flattening, one for each pixel).
    signed : bool
        Whether entries change sign with their channel, as a weight does and a running variance does not.
    """

    tensor: str
    dim: int
    repeat: int
    signed: bool


@dataclass(frozen=True)
class ChannelGroup:
    """Interchangeable channels, and every axis of every tensor that they index.

    Attributes
    ----------
    size : int
        Number of channels.
    axes : tuple of TensorAxis
    odd : bool
        Whether the sign of each channel may be flipped as well, since all functions applied to it are odd.
    """

    size: int
    axes: tuple[TensorAxis, ...]
    odd: bool


@dataclass(frozen=True)
class Channels:
    """The channels of a value in the network: their group, and where they lie in the value.

    Attributes
    ----------
    group : int or None
        ``None`` for channels that may not be permuted, such as those of the input.
    dim : int
    repeat : int
        Consecutive entries per channel.
    """

    group: int | None
    dim: int
    repeat: int = 1


class ChannelGroups:
    """Opens groups, records which axes of which tensors they index, and merges them.

    Parameters
    ----------
    canonical : dict
        Every name of a tensor to the first name of the same tensor, so that tied weights are one.
    """

    def __init__(self, canonical: dict[str, str]) -> None:
        self.canonical = canonical
        self._parent: list[int] = []
        self._size: list[int] = []
        self._fixed: list[bool] = []
        self._even: list[bool] = []
        self._bound: dict[tuple[str, int], tuple[Channels, bool]] = {}  # (tensor, dim) to its channels, and signed

    def groups(self) -> list[ChannelGroup]:
        """The groups that may be permuted."""
        axes: dict[int, list[TensorAxis]] = {}
        for (tensor, dim), (channels, signed) in self._bound.items():
            root = self._root(channels.group)
            if root is not None and not self._fixed[root] and self._size[root] > 1:
                axes.setdefault(root, []).append(TensorAxis(tensor, dim, channels.repeat, signed))
        return [ChannelGroup(self._size[root], tuple(own), not self._even[root]) for root, own in axes.items()]

    def open(self, size: int, dim: int) -> Channels:
        """A new group, in a value that carries it along ``dim``."""
        self._parent.append(len(self._parent))
        self._size.append(size)
        self._fixed.append(False)
        self._even.append(False)
        return Channels(self._parent[-1], dim)

    def bind(self, tensor: str, dim: int, channels: Channels, signed: bool = True) -> None:
        """Record that these channels index an axis of a tensor; if others do so too, their groups are merged."""
        key = (self.canonical[tensor], dim)
        if key in self._bound:
            self.unify(self._bound[key][0], channels)
        else:
            self._bound[key] = (channels, signed)

    def unify(self, a: Channels, b: Channels, node: str = "") -> Channels:
        """Merge the groups of two values whose channels are the same.

        With ``node``, the operation that combines the two values, they must lie along the same dim too.
        """
        first, second = self._root(a.group), self._root(b.group)
        if first is None or second is None:  # what equals channels that are fixed is fixed
            self.fix(a)
            self.fix(b)
            return a if second is None else b
        if (self._size[first], a.repeat) != (self._size[second], b.repeat) or (node and a.dim != b.dim):
            raise cannot_follow("a combination of values whose channels are laid out differently", node)
        self._parent[second] = first
        self._fixed[first] |= self._fixed[second]
        self._even[first] |= self._even[second]
        return a

    def fix(self, channels: Channels | None) -> None:
        """Forbid to permute these channels."""
        root = self._root(channels.group) if channels is not None else None
        if root is not None:
            self._fixed[root] = True

    def mark_even(self, channels: Channels) -> Channels:
        """Forbid to flip the signs of these channels."""
        root = self._root(channels.group)
        if root is not None:
            self._even[root] = True
        return channels

    def _root(self, group: int | None) -> int | None:
        """The group that stands for all those merged with this one."""
        while group is not None and self._parent[group] != group:
            group = self._parent[group]
        return group


def cannot_follow(what: str, node: str = "") -> ModelError:
    """The error for an operation whose effect on channels is unknown; ``node`` is its name in the traced graph."""
    place = f" ({node})" if node else ""
    return ModelError(
        f"this network cannot be aligned: its channels cannot be followed through {what}{place}; compare it unaligned"
    )
