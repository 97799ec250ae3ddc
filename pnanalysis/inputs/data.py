"""Data as tensors on a device: resolve a data set, split it by seed, give normalised batches.

A registered data set is a factory ``factory(path, input_shape)`` that returns :class:`RawImages`; a custom one is
named ``module:factory`` and may return :class:`Splits`, a mapping of split names, arrays in any form that a batch may
have (:func:`pnanalysis.inputs.batches.as_pair`), a torch ``Dataset`` or ``IterableDataset``, or any re-iterable of
batches such as a ``DataLoader``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from pnanalysis.errors import USER_ERRORS, DataError, PnError
from pnanalysis.inputs.batches import LABELS, as_pair, as_tensors, batch_size, can_cut, fingerprint, tensors
from pnanalysis.inputs.registry import DATASETS, describe_error, import_object, resolve
from pnanalysis.inputs.splits import Batch, DatasetSplit, LoaderSplit, Split

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class RawImages:
    """What a registered data set consists of: uint8 images ``(N, C, H, W)`` and integer targets ``(N,)``."""

    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    classes: tuple[str, ...]


#: What stands before a file of text where data are named.
TEXT = "text:"


@dataclass(frozen=True)
class TextFile:
    """A text file, which is read once it is known by which network: see :func:`pnanalysis.inputs.text.load_text`.

    Attributes
    ----------
    path : Path
    tokens : int
        Length of examples.
    """

    path: Path
    tokens: int = 256


AnySplit = Split | LoaderSplit | DatasetSplit


@dataclass(frozen=True)
class Splits:
    """Training, validation and test examples of one data set."""

    train: AnySplit
    validation: AnySplit | None = None
    test: AnySplit | None = None
    name: str = ""
    classes: tuple[str, ...] = ()
    fingerprint: str = ""
    split_hash: str = ""

    def to(self, device: torch.device | str) -> Splits:
        """All splits on another device."""
        moved: dict[str, Any] = {
            name: part.to(device) for name, part in self._parts.items() if not isinstance(part, DatasetSplit)
        }
        return replace(self, **moved)

    def get(self, split: str) -> AnySplit:
        """A split by name.

        Raises
        ------
        DataError
            If the data set has no such split.
        """
        if split not in self._parts:
            raise DataError(f"data set {self.name!r} has no split {split!r}; it has {', '.join(self._parts)}")
        return self._parts[split]

    def examples(
        self, split: str, n: int | None, seed: int, device: torch.device | str, dtype: torch.dtype | None = None
    ) -> Split | LoaderSplit:
        """Examples of a split, the same on every pass; of a loader the leading batches.

        Parameters
        ----------
        split : str
        n : int or None
            How many, drawn by ``seed``; fewer if there are fewer, all if ``None``.
        seed : int
            Also of the random numbers that a loader draws from the global generators, so that it shuffles by it.
        device : torch.device or str
        dtype : torch.dtype, optional
            Of floating-point numbers; complex ones become the matching complex type, integers stay as they are.

        Raises
        ------
        DataError
            If there is no such split, it is empty, or its numbers are not finite.
        """
        part = self._chosen(split, n, seed)
        return part.to(device, dtype).kept() if isinstance(part, LoaderSplit) else part.to(device, dtype)

    def single_pass(
        self, split: str, n: int | None, seed: int, device: torch.device | str, dtype: torch.dtype | None = None
    ) -> Split | LoaderSplit:
        """The same as :meth:`examples` for one pass over them, for which the batches of a loader need not be kept."""
        return self._chosen(split, n, seed).to(device, dtype)

    def in_memory(self) -> Splits:
        """The same data, with torch data sets read as a whole."""
        read: dict[str, Any] = {
            name: part.read(name=name) for name, part in self._parts.items() if isinstance(part, DatasetSplit)
        }
        return _with_fingerprint(replace(self, **read)) if read else self

    def _chosen(self, split: str, n: int | None, seed: int) -> Split | LoaderSplit:
        part, name = self.get(split), f"{self.name}: {split}"
        if isinstance(part, LoaderSplit):
            return replace(part, n=n, seed=seed, name=name)
        if isinstance(part, DatasetSplit):
            part = part.read(n, seed, name)
            if isinstance(part, LoaderSplit):
                return part
            n = None
        part.check(name)
        return part.subset(None if n is None else min(n, len(part)), seed)

    @property
    def _parts(self) -> dict[str, AnySplit]:
        return {name: getattr(self, name) for name in SPLITS if getattr(self, name) is not None}


#: What a user may give as data: see the first lines of this module.
DataLike = str | TextFile | Splits | Dataset[Any] | Mapping[str, Any] | Iterable[Any]


_MAY_DOWNLOAD: ContextVar[bool] = ContextVar("may download", default=False)


@contextmanager
def downloads_allowed() -> Iterator[None]:
    """Let data sets be downloaded in the body: trainings do, analyses never, for a manifest names their data."""
    token = _MAY_DOWNLOAD.set(True)
    try:
        yield
    finally:
        _MAY_DOWNLOAD.reset(token)


def may_download() -> bool:
    """Whether a data set that is not there may be downloaded, for the factories of data sets to ask."""
    return _MAY_DOWNLOAD.get()


def text_file(data: Any, tokens: int | None = None) -> TextFile | None:
    """The text file that ``text:FILE`` names; ``None`` for all other data."""
    if isinstance(data, TextFile):
        return data
    if not isinstance(data, str) or not data.startswith(TEXT):
        return None
    return TextFile(Path(data.removeprefix(TEXT)), TextFile.tokens if tokens is None else tokens)


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
        found = import_object(spec, DataError)
        return as_splits(_made(spec, found) if callable(found) else found, spec)
    found = _made(spec, factory, argument or None, shape)
    return _split(found, spec, shape, split_seed) if isinstance(found, RawImages) else as_splits(found, spec)


def _made(spec: str, factory: Callable[..., Any], *arguments: Any) -> Any:
    """The data that a factory makes."""
    try:
        return factory(*arguments)
    except PnError:
        raise
    except USER_ERRORS as error:  # user code may raise anything
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
    if isinstance(data, Mapping) and not (data.keys() & set(LABELS) and not data.keys() & set(SPLITS)):
        unknown = set(data) - set(SPLITS)
        if unknown or "train" not in data:
            raise DataError(f"{name}: a mapping of splits needs 'train' and may have {SPLITS[1:]}, not {sorted(data)}")
        splits: dict[str, Any] = {key: _as_split(value, name) for key, value in data.items()}
        return _with_fingerprint(Splits(**splits, name=name))
    return _with_fingerprint(Splits(train=_as_split(data, name), name=name))


def data_directory() -> Path:
    """Where downloads and caches go: ``$PNANALYSIS_DATA``, or ``data`` in the current folder."""
    return Path(os.environ.get("PNANALYSIS_DATA", "data"))


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


def _as_split(data: Any, name: str) -> AnySplit:
    if isinstance(data, Split | LoaderSplit | DatasetSplit):
        return data
    if type(data) is TensorDataset:  # a class made from it may do something to the examples that it returns
        data = data.tensors
    if _is_one_batch(data):
        inputs, targets = as_pair(data)
        if not can_cut((inputs, targets)):
            raise DataError(f"{name}: {_lengths(inputs)} inputs but {_lengths(targets)} targets")
        return Split(inputs, targets)
    if isinstance(data, Dataset):
        return DatasetSplit(data)
    if isinstance(data, Iterator):
        raise DataError(
            f"{name}: an iterator is used up after one pass; give the DataLoader or list that it is made of"
        )
    if isinstance(data, Iterable) and not isinstance(data, str | bytes | Mapping | Tensor | np.ndarray):
        return LoaderSplit(data)
    raise DataError(
        f"{name}: expected Splits, a mapping of splits, (inputs, targets), a Dataset or a DataLoader, "
        f"got {type(data).__name__}"
    )


def _is_one_batch(data: Any) -> bool:
    """Whether data are the arrays of all examples; a list or tuple of batches is not."""
    if isinstance(data, Mapping):
        return True
    if not isinstance(data, tuple | list) or len(data) < 2:
        return False
    if all(isinstance(part, Tensor | np.ndarray) for part in data):
        return True
    return len(data) == 2 and all(_has_arrays(part) for part in data) and not all(map(_is_batch, data))


def _is_batch(part: Any) -> bool:
    try:
        as_pair(part)
    except DataError:
        return False
    return True


def _has_arrays(part: Any) -> bool:
    return isinstance(part, Tensor | np.ndarray | Mapping | tuple | list) and any(
        True for _ in tensors(as_tensors(part))
    )


def _lengths(nest: Any) -> str:
    return " and ".join(str(length) for length in dict.fromkeys(len(t) for t in tensors(nest) if t.ndim))


def _with_fingerprint(splits: Splits) -> Splits:
    parts = [getattr(splits, name) for name in SPLITS]
    held = [t for part in parts if isinstance(part, Split) for t in tensors([part.inputs, part.targets])]
    return replace(splits, fingerprint=fingerprint(*held)) if held else splits
