"""Checkpoints side by side: what they are called, their networks, and the examples that all of them see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pnanalysis.errors import ModelError, RunError
from pnanalysis.inputs.data import SPLITS, Split, Splits
from pnanalysis.inputs.sources import Source, as_sources, check_same_data
from pnanalysis.io.runs import Checkpoint, Run


@dataclass(frozen=True)
class Member:
    """One of the checkpoints that are compared.

    Attributes
    ----------
    label : str
        Its name in datasets: the checkpoint's, with the source's in front where there are several sources.
    description : str
        What it is within its run, in words; empty for a user's own weights.
    """

    label: str
    source: Source
    checkpoint: Checkpoint
    description: str = ""

    def network(self, device: torch.device) -> nn.Module:
        """A network of its own with the checkpoint's weights, in eval mode."""
        return deepcopy(self.source.model(self.checkpoint, device))

    @property
    def start(self) -> Checkpoint | None:
        """The point its training started from, where that was saved."""
        run = self.source.run
        if run is None:
            return None
        first = run.trajectory(self.checkpoint.iteration)[0]
        return first if first.epoch == 0 else None


def members(runs: Sequence[Any], checkpoints: Sequence[str] | None = None) -> list[Member]:
    """The checkpoints to compare, the reference first.

    Parameters
    ----------
    runs : sequence of Run, Source or path
    checkpoints : sequence of str, optional
        See :meth:`pnanalysis.io.runs.Run.select`. By default plain and champion of a single run, the champion of each
        of several, and all of a user's own files.

    Raises
    ------
    RunError
        If fewer than two are left.
    """
    sources = as_sources(runs)
    found = []
    for source in sources:
        wanted = ("champion",) if checkpoints is None and source.run is not None and len(sources) > 1 else checkpoints
        for name, checkpoint in source.select(wanted).items():
            label = name if len(sources) == 1 else f"{source.label}/{name}"
            found.append(Member(label, source, checkpoint, _describe(source.run, checkpoint)))
    if len(found) < 2:
        there = f"there is only {found[0].label}" if found else "none is given"
        raise RunError(f"a comparison needs at least two checkpoints, {there}; name another run, weights or checkpoint")
    return found


def _describe(run: Run | None, checkpoint: Checkpoint) -> str:
    if run is None:
        return ""
    ends = run.ends
    if checkpoint not in ends:
        return checkpoint.name
    best = checkpoint == run.champion
    if run.manifest.get("strategy") == "restart":
        return f"the best of {len(ends)} restarts" if best else f"restart {checkpoint.iteration}"
    if checkpoint.iteration == 0:
        return "the plain model"
    return f"iteration {checkpoint.iteration}" + (", the champion" if best else "")


class Examples:
    """The examples that all members see in the same order, each in the shape that its own network takes.

    Loaders have no fingerprint to tell them apart: the first member's is used for all.

    Raises
    ------
    DataError
        If the members were trained on different data, or on other halves of the same.
    ModelError
        If they were trained by different losses.
    """

    def __init__(self, chosen: Sequence[Member], device: torch.device) -> None:
        self.device = device
        self.data: list[Splits] = []
        self.which: list[int] = []
        for member in chosen:
            check_same_loss(chosen[0].source, member.source, (chosen[0].label, member.label))
            member.source.share_data(chosen[0].source)
            data = member.source.data
            if self.data:
                check_same_data(chosen[0].source, member.source, (chosen[0].label, member.label))
            at = next((i for i, known in enumerate(self.data) if _alike(known, data)), len(self.data))
            if at == len(self.data):
                self.data.append(data)
            self.which.append(at)

    @property
    def splits(self) -> list[str]:
        """The names of the splits that there are."""
        return [name for name in SPLITS if getattr(self.data[0], name) is not None]

    def nearest(self, split: str) -> str:
        """The split itself, or the last of train, validation and test that there is."""
        return split if split in self.splits else self.splits[-1]

    def batches(
        self, split: str, n: int | None, batch_size: int, seed: int, at_least: int = 10
    ) -> tuple[int, Iterator[tuple[list[Any], Any]]]:
        """How many batches there are, and each as (inputs of every member, targets).

        ``n`` examples are drawn by ``seed``, all if there are fewer; batches are smaller than ``batch_size`` where
        that would give fewer than ``at_least``.
        """
        streams = []
        for data in self.data:
            part = data.get(split)
            if isinstance(part, Split):
                size = len(part) if n is None else min(n, len(part))
                batch_size = max(min(batch_size, size // at_least), 8)
                part = part.subset(size, seed)
            else:
                part = part.subset(n, seed)
            streams.append(part.to(self.device).batches(batch_size))

        def stream() -> Iterator[tuple[list[Any], Any]]:
            for parts in zip(*streams, strict=True):
                yield [parts[at][0] for at in self.which], parts[0][1]

        return len(streams[0]), stream()


def _alike(a: Splits, b: Splits) -> bool:
    """Whether networks of one can be fed from the other: the same examples in the same shape."""
    if not (isinstance(a.train, Split) and isinstance(b.train, Split)):
        return True
    return a.train.inputs.shape == b.train.inputs.shape and a.train.inputs.dtype == b.train.inputs.dtype


def check_same_loss(first: Source, other: Source, names: tuple[str, str] | None = None) -> None:
    """Refuse to compare losses of networks that were trained by different ones.

    Raises
    ------
    ModelError
        It calls the two by ``names``, or by their labels.
    """
    a, b = first.attrs.get("loss"), other.attrs.get("loss")
    one, two = names or (first.label, other.label)
    if a != b:
        raise ModelError(f"{one} has the loss {a}, {two} has {b}: compare networks by one, given with --loss")


_Points = dict[str, tuple[Source, Checkpoint]]


def _of_several(sources: list[Source], names: Sequence[str] | None) -> _Points:
    """Checkpoints of several runs by ``RUN/NAME``; by default the champion of each (all of a user's own files)."""
    labels = [source.label for source in sources]
    wanted: list[tuple[str, Source, list[str] | None]] = []
    if names is None:
        wanted = [(label, s, ["champion"] if s.run else None) for label, s in zip(labels, sources, strict=True)]
    for name in names or ():
        found = [(label, s) for label, s in zip(labels, sources, strict=True) if name.startswith(f"{label}/")]
        if not found:
            raise RunError(f"{name!r} names no checkpoint of {', '.join(labels)}; write RUN/NAME")
        wanted += [(label, source, [name[len(label) + 1 :]]) for label, source in found]
    return {
        f"{label}/{name}": (source, checkpoint)
        for label, source, selected in wanted
        for name, checkpoint in source.select(selected).items()
    }
