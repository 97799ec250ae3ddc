"""The examples that several networks see, and whether their losses on them can be compared at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from pnanalysis.errors import DataError, ModelError
from pnanalysis.inputs.batches import tensors
from pnanalysis.inputs.data import SPLITS, Split, Splits
from pnanalysis.inputs.selection import SelectedCheckpoint
from pnanalysis.inputs.sources import Source


class Examples:
    """The examples that all checkpoints see in the same order, each in the shape that its own network takes.

    Loaders and torch data sets have no fingerprint to distinguish them: the first checkpoint's is used for all.

    Raises
    ------
    DataError
        If the networks were trained on different data, or on other halves of the same.
    ModelError
        If they were trained by different losses.
    """

    def __init__(self, chosen: Sequence[SelectedCheckpoint], device: torch.device) -> None:
        self.device = device
        self.data: list[Splits] = []
        self.which: list[int] = []
        for item in chosen:
            check_same_loss(chosen[0].source, item.source, (chosen[0].label, item.label))
            data = item.source.data
            if self.data:
                check_same_data(chosen[0].source, item.source, (chosen[0].label, item.label))
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
    ) -> tuple[int | None, Iterator[tuple[list[Any], Any]]]:
        """How many batches there are, where that is known, and each as (inputs of every checkpoint, targets).

        ``n`` examples are drawn by ``seed``, all if there are fewer; batches are smaller than ``batch_size`` where
        that would give fewer than ``at_least``. Floating-point numbers are in float32.
        """
        parts = [data.single_pass(split, n, seed, self.device, torch.float32) for data in self.data]
        sizes = [len(part) for part in parts if isinstance(part, Split)]
        if sizes:
            batch_size = max(min(batch_size, min(sizes) // at_least), 8)

        def stream() -> Iterator[tuple[list[Any], Any]]:
            for pairs in zip(*(part.stream(batch_size) for part in parts), strict=True):
                yield [pairs[at][0] for at in self.which], pairs[0][1]

        return -(-sizes[0] // batch_size) if sizes else None, stream()


def _alike(a: Splits, b: Splits) -> bool:
    """Whether networks of one can be fed from the other: the same examples in the same shape."""
    first, second = a.train, b.train
    if not (isinstance(first, Split) and isinstance(second, Split)):
        return True
    one, two = ([(t.shape, t.dtype) for t in tensors(part.inputs)] for part in (first, second))
    return one == two


def check_same_data(first: Source, other: Source, names: tuple[str, str] | None = None) -> None:
    """Refuse to compare networks that were trained on different data, or on other halves of the same.

    Raises
    ------
    DataError
        It calls the two by ``names``, or by their labels.
    """
    a, b = first.data, other.data
    one, two = names or (first.label, other.label)
    if a.fingerprint != b.fingerprint:
        raise DataError(
            f"{one} and {two} are of different data sets ({a.name} {a.fingerprint}, {b.name} "
            f"{b.fingerprint}): compare networks on one, given with --data"
        )
    if a.split_hash != b.split_hash:
        raise DataError(
            f"{one} and {two} were trained with different validation and test halves of {a.name}: "
            "what one was picked by would test the other; train both with one --split-seed"
        )


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
