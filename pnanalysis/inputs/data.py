"""Data as tensors on a device: resolve a data set, split it by seed, give normalised batches.

A registered data set is a factory ``factory(path, input_shape)`` that returns :class:`RawImages`; a custom one is
named ``module:factory`` and may return :class:`Splits`, a mapping of split names, a pair ``(inputs, targets)``, a torch
``Dataset``, or any re-iterable of batches such as a ``DataLoader``.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pnanalysis.errors import DataError
from pnanalysis.inputs.batches import batch_size, map_tensors, tensors
from pnanalysis.inputs.registry import DATASETS, describe_error, import_object, resolve

SPLITS = ("train", "validation", "test")
Batch = tuple[Any, Any]


@dataclass(frozen=True)
class RawImages:
    """What a registered data set consists of: uint8 images ``(N, C, H, W)`` and integer targets ``(N,)``."""

    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Split:
    """Examples as tensors; :meth:`take` gives normalised batches.

    Attributes
    ----------
    inputs : Tensor, shape (N, ...)
        uint8 images, or floats that are used as they are.
    targets : Tensor, shape (N, ...)
    offset, scale : Tensor or None, shape (C, 1, 1)
        ``(inputs - offset) * scale`` is what a network sees.
    """

    inputs: Tensor
    targets: Tensor
    offset: Tensor | None = None
    scale: Tensor | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    def to(self, device: torch.device | str) -> Split:
        """The same examples on another device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if value is not None}
        return replace(self, **moved)

    def take(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Normalised inputs and targets of the chosen examples."""
        inputs = self.inputs[index]
        if self.offset is not None and self.scale is not None:
            inputs = inputs.to(self.offset.dtype).sub_(self.offset).mul_(self.scale)
        return inputs, self.targets[index]

    def subset(self, n: int | None, seed: int = 0) -> Split:
        """``n`` examples drawn without replacement by seed; all of them in order if ``n`` is ``None``.

        Raises
        ------
        DataError
            If there are fewer than ``n``.
        """
        if n is None or n == len(self):
            return self
        if not 0 < n <= len(self):
            raise DataError(f"{n} examples requested, the split has {len(self)}")
        index = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:n]
        index = index.to(self.inputs.device)
        return replace(self, inputs=self.inputs[index], targets=self.targets[index])

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

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.split), self.batch_size):
            yield self.split.take(slice(start, start + self.batch_size))


@dataclass(frozen=True)
class LoaderSplit:
    """A custom re-iterable of batches, whose order and batch size are kept."""

    loader: Iterable[Batch]
    device: torch.device | str = "cpu"
    n_batches: int | None = None

    def to(self, device: torch.device | str) -> LoaderSplit:
        """The same batches, moved to the device when they are read."""
        return replace(self, device=device)

    def subset(self, n: int | None, seed: int = 0) -> LoaderSplit:
        """The leading batches that hold ``n`` examples, all if there are fewer (``seed`` is not used)."""
        if n is None:
            return self
        seen, count = 0, 0
        for batch in self.loader:
            seen, count = seen + batch_size(_pair(batch)), count + 1
            if seen >= n:
                return replace(self, n_batches=count)
        if not count:
            raise DataError(
                "the loader gives no batches; an iterator is used up after one pass, so give a DataLoader or a list"
            )
        return self

    def batches(self, batch_size: int) -> list[Batch]:
        """The batches on the device, all at once (``batch_size`` is the loader's own)."""
        return list(self.stream(batch_size))

    def stream(self, batch_size: int) -> Iterator[Batch]:
        """The batches on the device, one at a time."""
        for batch in islice(self.loader, self.n_batches):
            yield map_tensors(_pair(batch), lambda tensor: tensor.to(self.device))


@dataclass(frozen=True)
class Splits:
    """Training, validation and test examples of one data set."""

    train: Split | LoaderSplit
    validation: Split | LoaderSplit | None = None
    test: Split | LoaderSplit | None = None
    name: str = ""
    classes: tuple[str, ...] = ()
    fingerprint: str = ""
    split_hash: str = ""

    def to(self, device: torch.device | str) -> Splits:
        """All splits on another device."""
        moved = {name: getattr(self, name).to(device) for name in SPLITS if getattr(self, name) is not None}
        return replace(self, **moved)

    def get(self, split: str) -> Split | LoaderSplit:
        """A split by name.

        Raises
        ------
        DataError
            If the data set has no such split.
        """
        found = getattr(self, split) if split in SPLITS else None
        if found is None:
            there = [name for name in SPLITS if getattr(self, name) is not None]
            raise DataError(f"data set {self.name!r} has no split {split!r}; it has {', '.join(there)}")
        return cast("Split | LoaderSplit", found)


#: What a user may give as data: see the first lines of this module.
DataLike = str | Splits | Dataset[Any] | Mapping[str, Any] | Iterable[Any]


def n_examples(part: Split | LoaderSplit, batches: Iterable[Batch]) -> int:
    """How many examples there are in the batches of a split."""
    return len(part) if isinstance(part, Split) else sum(batch_size(batch) for batch in batches)


def load_data(spec: str, input_shape: Sequence[int] | None = None, split_seed: int = 0) -> Splits:
    """Load a data set and split its test images into validation and test halves by seed.

    Parameters
    ----------
    spec : str
        A registered name, ``name:path``, or ``module:factory``.
    input_shape : sequence of int, optional
        ``(C, H, W)`` that the network expects; images are resized to it.
    split_seed : int
        Seed of the validation/test split.

    Raises
    ------
    DataError
        If the data set is unknown or unreadable.
    """
    name, _, argument = spec.partition(":")
    shape = tuple(input_shape) if input_shape else None
    try:
        factory = resolve(DATASETS, name)
    except DataError:
        if not argument:
            raise
        factory = None
    if factory is None:
        return as_splits(_made(spec), spec)
    found = factory(argument or None, shape)
    return _split(found, spec, shape, split_seed) if isinstance(found, RawImages) else as_splits(found, spec)


def _made(spec: str) -> Any:
    """Data from ``module:factory``; the name may also be that of the data themselves."""
    factory = import_object(spec, DataError)
    if not callable(factory):
        return factory
    try:
        return factory()
    except DataError:
        raise
    except Exception as error:  # user code may raise anything
        raise DataError(f"data {spec!r} cannot be made: {describe_error(error)}") from error


def as_splits(data: Any, name: str = "data") -> Splits:
    """Splits from any data that the module docstring lists.

    Raises
    ------
    DataError
        If it is none of these.
    """
    if isinstance(data, Splits):
        return data if data.name else replace(data, name=name)
    if isinstance(data, Mapping):
        unknown = set(data) - set(SPLITS)
        if unknown or "train" not in data:
            raise DataError(f"{name}: a mapping of splits needs 'train' and may have {SPLITS[1:]}, not {sorted(data)}")
        splits: dict[str, Any] = {key: _as_split(value, name) for key, value in data.items()}
        return _with_fingerprint(Splits(**splits, name=name))
    return _with_fingerprint(Splits(train=_as_split(data, name), name=name))


def data_directory() -> Path:
    """Where downloads and caches go: ``$PNANALYSIS_DATA``, or ``data`` in the current folder."""
    return Path(os.environ.get("PNANALYSIS_DATA", "data"))


def fingerprint(*tensors: Tensor) -> str:
    """SHA-256 over shapes, dtypes and contents, shortened to 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def resize(images: Tensor, input_shape: Sequence[int]) -> Tensor:
    """Bilinear resize of uint8 images ``(N, C, H, W)`` to ``input_shape = (C', H', W')``; grey images are repeated.

    Raises
    ------
    DataError
        If the channels can be neither kept nor repeated.
    """
    channels, height, width = input_shape
    if images.shape[1] != channels:
        if images.shape[1] != 1:
            raise DataError(f"images have {images.shape[1]} channels, the network expects {channels}")
        images = images.expand(-1, channels, -1, -1)
    if tuple(images.shape[2:]) == (height, width):
        return images.contiguous()
    resized = [
        torch.nn.functional.interpolate(part.float(), (height, width), mode="bilinear", antialias=True)
        for part in images.split(4096)
    ]
    return torch.cat(resized).round_().clamp_(0, 255).to(torch.uint8)


def _split(raw: RawImages, name: str, shape: tuple[int, ...] | None, seed: int) -> Splits:
    print_of_data = fingerprint(raw.train_inputs, raw.train_targets, raw.test_inputs, raw.test_targets)
    train, test = raw.train_inputs, raw.test_inputs
    if shape is not None:
        train, test = resize(train, shape), resize(test, shape)
    offset, scale = _normalisation(train)
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))
    half = len(test) // 2

    def part(index: Tensor) -> Split:
        return Split(test[index], raw.test_targets[index], offset, scale)

    return Splits(
        train=Split(train, raw.train_targets, offset, scale),
        validation=part(order[:half]),
        test=part(order[half:]),
        name=name,
        classes=raw.classes,
        fingerprint=print_of_data,
        split_hash=fingerprint(order),
    )


def _normalisation(images: Tensor) -> tuple[Tensor, Tensor]:
    """Exact mean and inverse standard deviation per channel of uint8 images, from integer histograms."""
    channels = images.shape[1]
    values = torch.arange(256, dtype=torch.float64)
    counts = torch.stack([torch.bincount(images[:, c].reshape(-1), minlength=256) for c in range(channels)]).double()
    fraction = counts / counts.sum(1, keepdim=True)
    mean = fraction @ values
    std = (fraction @ values.square() - mean.square()).clamp_min(1e-12).sqrt()
    return mean.float().view(-1, 1, 1), (1 / std).float().view(-1, 1, 1)


def _as_split(data: Any, name: str) -> Split | LoaderSplit:
    if isinstance(data, Split | LoaderSplit):
        return data
    arrays = isinstance(data, tuple | list) and all(isinstance(part, Tensor | np.ndarray) for part in data)
    if arrays and len(data) == 2:
        data = [torch.as_tensor(part) for part in data]
        if len(data[0]) != len(data[1]):
            raise DataError(f"{name}: {len(data[0])} inputs but {len(data[1])} targets")
        return Split(data[0], data[1])
    if isinstance(data, Dataset):
        pairs = [data[i] for i in range(len(cast("Any", data)))]
        try:
            inputs = torch.stack([torch.as_tensor(x) for x, _ in pairs])
            return Split(inputs, torch.stack([torch.as_tensor(y) for _, y in pairs]))
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"{name}: its examples cannot be stacked ({error}); return a DataLoader instead") from error
    if isinstance(data, Iterable) and not isinstance(data, Iterator):
        return LoaderSplit(data)
    raise DataError(
        f"{name}: expected Splits, a mapping of splits, (inputs, targets), a Dataset or a DataLoader, "
        f"got {type(data).__name__}"
    )


def _pair(batch: Any) -> Batch:
    """A batch of a custom loader as a pair of inputs and targets."""
    if isinstance(batch, tuple | list) and len(batch) == 2 and next(tensors(batch), None) is not None:
        return batch[0], batch[1]
    got = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, tuple | list) else type(batch).__name__
    raise DataError(f"each batch of the data must be a pair of tensors (inputs, targets), not {got}")


def _with_fingerprint(splits: Splits) -> Splits:
    parts = [getattr(splits, name) for name in SPLITS]
    tensors = [t for part in parts if isinstance(part, Split) for t in (part.inputs, part.targets)]
    return replace(splits, fingerprint=fingerprint(*tensors)) if tensors else splits
