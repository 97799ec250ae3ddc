"""The examples of one split: tensors, a loader, or a torch data set that is read when its examples are needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate

from pnanalysis.errors import DataError, reason
from pnanalysis.inputs.batches import as_pair, batch_size, is_finite, move, rows, tensors
from pnanalysis.inputs.repeatable import SameBatches, read
from pnanalysis.torch_internals import tree_leaves, tree_map

Batch = tuple[Any, Any]

_READ_AT_ONCE = 64  # examples of a data set that are collated together
_NOT_FINITE = "some numbers are not finite (NaN or infinite); correct them or leave them out"


@dataclass(frozen=True)
class Split:
    """Examples as tensors; :meth:`take` gives normalised batches.

    Attributes
    ----------
    inputs : Tensor, shape (N, ...), or nest of such tensors
        uint8 images, or floats that are used as they are.
    targets : Tensor, shape (N, ...), or nest of such tensors
    offset, scale : Tensor or None, shape (C, 1, 1)
        ``(inputs - offset) * scale`` is what a network sees.
    """

    inputs: Any
    targets: Any
    offset: Tensor | None = None
    scale: Tensor | None = None

    @property
    def identity(self) -> object:
        """Equal for two splits that would read the same examples."""
        return id(self)

    def __len__(self) -> int:
        return batch_size((self.inputs, self.targets))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Split:
        """The same examples on another device, and in another precision."""
        return Split(*(move(value, device, dtype) for value in vars(self).values()))

    def take(self, index: Tensor | slice) -> Batch:
        """Normalised inputs and targets of the chosen examples."""
        inputs = rows(self.inputs, index)
        if self.offset is not None and self.scale is not None:
            inputs = inputs.to(self.offset.dtype).sub(self.offset).mul_(self.scale)
        return inputs, rows(self.targets, index)

    def subset(self, n: int | None, seed: int = 0) -> Split:
        """``n`` examples drawn without replacement by seed; all of them in order if ``n`` is ``None``.

        Raises
        ------
        DataError
            If there are fewer than ``n``.
        """
        if n is None or n == len(self):
            return self
        index = _drawn(n, len(self), seed)
        return replace(self, inputs=rows(self.inputs, index), targets=rows(self.targets, index))

    def check(self, name: str) -> None:
        """Refuse a split without examples, or with numbers that are not finite.

        Raises
        ------
        DataError
            It names the split and the first example.
        """
        if not len(self):
            raise DataError(f"{name}: there are no examples")
        for tensor in tensors([self.inputs, self.targets]):
            if not is_finite(tensor):
                where = (
                    f", example {_first_not_finite(tensor)}" if tensor.ndim and tensor.layout is torch.strided else ""
                )
                raise DataError(f"{name}{where}: {_NOT_FINITE}")

    def batches(self, batch_size: int) -> Batches:
        """All examples in order, ``batch_size`` at a time."""
        return Batches(self, batch_size)

    def stream(self, batch_size: int) -> Iterator[Batch]:
        """The same, for a single pass."""
        return iter(self.batches(batch_size))


@dataclass(frozen=True)
class Batches:
    """A re-iterable of normalised batches, made when they are needed."""

    split: Split
    batch_size: int

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.split), self.batch_size):
            yield self.split.take(slice(start, start + self.batch_size))


@dataclass(frozen=True)
class LoaderSplit:
    """A re-iterable of batches, whose order and batch size are kept.

    Attributes
    ----------
    loader : re-iterable of batches
        Of any form that :func:`pnanalysis.inputs.batches.as_pair` takes.
    device : torch.device or str
    dtype : torch.dtype or None
        Of floating-point tensors, once they are read.
    n : int or None
        Only the leading batches, which hold this many examples.
    seed : int
        Of the random numbers that the loader draws from the global generators.
    name : str
        What it is called in messages.
    """

    loader: Iterable[Any]
    device: torch.device | str = "cpu"
    dtype: torch.dtype | None = None
    n: int | None = None
    seed: int = 0
    name: str = "data"

    @property
    def identity(self) -> object:
        """Equal for two splits that would read the same examples."""
        return id(self.loader)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> LoaderSplit:
        """The same batches, on the device and in the precision when they are read."""
        loader = [move(pair, device, dtype) for pair in self.loader] if isinstance(self.loader, SameBatches) else None
        return replace(self, loader=self.loader if loader is None else loader, device=device, dtype=dtype)

    def subset(self, n: int | None, seed: int = 0) -> LoaderSplit:
        """The leading batches that hold ``n`` examples, all if there are fewer; a loader that shuffles does by seed."""
        return replace(self, n=n, seed=seed)

    def kept(self) -> LoaderSplit:
        """The same batches on every pass: see :class:`pnanalysis.inputs.repeatable.SameBatches`."""
        return replace(self, loader=self.batches(0), n=None)

    def batches(self, batch_size: int) -> SameBatches:
        """The batches on the device, the same on every pass (``batch_size`` is the loader's own).

        Raises
        ------
        DataError
            If there are none, or one cannot be read, is of another form, empty, or not finite.
        """
        if isinstance(self.loader, SameBatches):
            return self.loader
        batches = SameBatches(self.loader, self.n, device=self.device, **self._options())
        if not len(batches):
            raise self._nothing()
        return batches

    def stream(self, batch_size: int) -> Iterator[Batch]:
        """The batches on the device, one at a time, for a single pass."""
        if isinstance(self.loader, SameBatches):
            yield from self.loader
            return
        batch = None
        for batch in read(self.loader, self.n, **self._options()):
            yield batch
        if batch is None:
            raise self._nothing()

    def _options(self) -> dict[str, Any]:
        return {"prepare": self._prepare, "seed": self.seed, "name": self.name}

    def _prepare(self, batch: Any) -> Batch:
        pair = as_pair(batch)
        if not batch_size(pair):
            raise DataError("it is empty; leave it out")
        if not all(map(is_finite, tensors(pair))):
            raise DataError(_NOT_FINITE)
        return cast("Batch", move(pair, self.device, self.dtype))

    def _nothing(self) -> DataError:
        return DataError(
            f"{self.name}: the loader gives no batches; an iterator is used up after one pass, so give a DataLoader or "
            "a list"
        )


@dataclass(frozen=True)
class DatasetSplit:
    """A torch data set, of which only the examples that are asked for are read.

    Attributes
    ----------
    dataset : Dataset or IterableDataset
        Of examples in any form that a batch may have (:func:`pnanalysis.inputs.batches.as_pair`).
    """

    dataset: Dataset[Any]

    @property
    def identity(self) -> object:
        """Equal for two splits that would read the same examples."""
        return id(self.dataset)

    def read(self, n: int | None = None, seed: int = 0, name: str = "data") -> Split | LoaderSplit:
        """``n`` examples drawn without replacement by seed, or the first of a stream; all if there are fewer.

        They are tensors, or the batches of a loader where they do not fit in memory.

        Raises
        ------
        DataError
            If there are none, or some cannot be read or stacked.
        """
        loader = LoaderSplit(_Collated(self.dataset, n, seed, name), n=n, seed=seed, name=name)
        kept = loader.batches(_READ_AT_ONCE).kept
        if kept is None:
            return loader
        if not all(isinstance(leaf, Tensor) for leaf in tree_leaves(kept[0])):  # texts, for example
            return replace(loader, loader=kept)
        try:
            inputs, targets = tree_map(lambda *parts: torch.cat(parts) if parts[0].ndim else parts[0], *kept)
        except (RuntimeError, ValueError) as error:
            raise _not_stacked(name, error) from error
        return Split(inputs, targets)


class _Collated:
    """Chosen examples of a data set, read one by one, stacked a few at a time."""

    def __init__(self, dataset: Dataset[Any], n: int | None, seed: int, name: str) -> None:
        self.dataset, self.n, self.seed, self.name = dataset, n, seed, name

    def __iter__(self) -> Iterator[Any]:
        examples = self._examples()
        while some := list(islice(examples, _READ_AT_ONCE)):
            try:
                stacked = default_collate(some)
            except (TypeError, ValueError, RuntimeError, KeyError) as error:
                raise _not_stacked(self.name, error) from error
            yield stacked

    def _examples(self) -> Iterator[Any]:
        if isinstance(self.dataset, IterableDataset):
            return islice(iter(self.dataset), self.n)
        try:
            size = len(cast("Any", self.dataset))
        except TypeError as error:
            raise DataError(f"{self.name}: the data set has no length; give a DataLoader with a sampler") from error
        chosen = range(size) if self.n is None or self.n >= size else _drawn(self.n, size, self.seed).tolist()
        return (self.dataset[i] for i in chosen)


def _not_stacked(name: str, error: Exception) -> DataError:
    return DataError(
        f"{name}: the examples of the data set cannot be stacked ({reason(error)}); "
        "give a DataLoader with a collate_fn of its own"
    )


def _drawn(n: int, size: int, seed: int) -> Tensor:
    if not 0 < n <= size:
        raise DataError(f"{n} examples requested, the split has {size}")
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:n]


def _first_not_finite(tensor: Tensor) -> int:
    return int(tensor.isfinite().reshape(len(tensor), -1).all(1).logical_not().nonzero()[0])
