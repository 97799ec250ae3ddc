"""Batches that are the same on every pass, whatever the loader that they come from does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch

from pnanalysis.checks import human
from pnanalysis.errors import USER_ERRORS, DataError, PnError, reason
from pnanalysis.inputs.batches import batch_size, fingerprint, map_tensors, tensors
from pnanalysis.inputs.random_states import random_states, seeded_states, set_random_states
from pnanalysis.spectra.free_memory import free_bytes

#: Fraction of the free memory that kept batches may fill; a spectrum needs the rest.
KEPT_FRACTION = 0.5


class SameBatches:
    """The batches of a loader, the same on every pass.

    They are read once and kept while they fit in memory. Beyond that, each pass reads the loader again and compares
    the contents of every batch with those of the first pass. A loader that shuffles, samples or augments gives the same
    batches again if it draws from the global random generators or from that of a ``DataLoader``, since these are in the
    same state whenever reading begins. In between and afterwards they are as they were.

    Parameters
    ----------
    loader : re-iterable of batches
    n : int, optional
        Read only the leading batches that hold this many examples; all by default, or where there are fewer.
    prepare : callable, optional
        ``prepare(batch)``, applied to every batch as it is read, such as :func:`pnanalysis.inputs.batches.as_pair`.
        A :class:`DataError` that it raises is completed by the number of the batch.
    seed : int
        Of the global random generators while batches are read.
    device : torch.device or str
        Where ``prepare`` puts the batches.
    max_bytes : int, optional
        The most to keep; by default half of the memory that is free on the device.
    name : str
        What the loader is called in messages.

    Raises
    ------
    DataError
        If a batch cannot be read or prepared; on a later pass, if its contents have changed.

    Examples
    --------
    >>> loader = torch.utils.data.DataLoader(range(100), batch_size=20, shuffle=True)
    >>> batches = SameBatches(loader, n=40)
    >>> len(batches), all(torch.equal(a, b) for a, b in zip(batches, batches))
    (2, True)
    """

    def __init__(
        self,
        loader: Iterable[Any],
        n: int | None = None,
        *,
        prepare: Callable[[Any], Any] | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        max_bytes: int | None = None,
        name: str = "data",
    ) -> None:
        self.loader, self.prepare, self.seed, self.name = loader, prepare, seed, name
        limit = int(KEPT_FRACTION * free_bytes(torch.device(device))) if max_bytes is None else max_bytes
        self.kept: list[Any] | None = []
        self._contents: list[str] = []
        self._held = 0
        # What lies in a list stays as it is. A loader may fill the same memory with every batch.
        listed = {id(t) for batch in loader for t in tensors(batch)} if isinstance(loader, list | tuple) else set()
        for batch in read(loader, n, prepare=prepare, seed=seed, name=name):
            if self.kept is None:
                self._contents.append(_contents(batch))
                continue
            own = map_tensors(batch, lambda t: t if id(t) in listed else t.detach().clone())
            self.kept.append(own)
            self._held += sum(tensor.nbytes for tensor in tensors(own) if id(tensor) not in listed)
            if self._held > limit:
                self._contents, self.kept = [_contents(known) for known in self.kept], None
        self._size = len(self._contents if self.kept is None else self.kept)

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Any]:
        return iter(self.kept) if self.kept is not None else self._read_again()

    def _read_again(self) -> Iterator[Any]:
        n_read = 0
        for batch in islice(read(self.loader, prepare=self.prepare, seed=self.seed, name=self.name), self._size):
            if _contents(batch) != self._contents[n_read]:
                break
            yield batch
            n_read += 1
        if n_read < self._size:
            raise DataError(
                f"{self.name}: batch {n_read} is another one each time that the loader is read, and the batches do not "
                f"fit in memory ({human(self._held)} and more); make the loader with shuffle=False and without "
                "augmentation, or ask for fewer examples (n)"
            )

    def shuffled(self, generator: torch.Generator) -> Iterator[Any]:
        """One pass in a random order; in that of the loader where the batches are not kept."""
        if self.kept is None:
            yield from self
        else:
            yield from (self.kept[i] for i in torch.randperm(len(self.kept), generator=generator).tolist())


def read(
    loader: Iterable[Any],
    n: int | None = None,
    *,
    prepare: Callable[[Any], Any] | None = None,
    seed: int = 0,
    name: str = "data",
) -> Iterator[Any]:
    """One pass over the batches of a loader, which neither sees nor moves the caller's random generators.

    The parameters are those of :class:`SameBatches`.

    Raises
    ------
    DataError
        If a batch cannot be read or prepared.
    """
    n_read = 0
    for index, batch in enumerate(_undisturbed(loader, seed, name)):
        try:
            batch = batch if prepare is None else prepare(batch)
            n_read += 0 if n is None else batch_size(batch)
        except PnError as error:
            raise DataError(f"{name}, batch {index}: {error}") from error
        yield batch
        if n is not None and n_read >= n:
            break


def _undisturbed(loader: Iterable[Any], seed: int, name: str) -> Iterator[Any]:
    """The batches as they are, read with random numbers that are set back."""
    before = [(generator, generator.get_state()) for generator in _generators(loader)]
    randomness = _OwnRandomness(seed)
    batches: Iterator[Any] | None = None
    n_read = 0
    try:
        while True:
            try:
                with randomness:
                    batches = iter(loader) if batches is None else batches
                    batch = next(batches)
            except StopIteration:
                return
            except (PnError, torch.OutOfMemoryError):
                raise
            except USER_ERRORS as error:  # the user's code may raise anything
                raise DataError(f"{name}: batch {n_read} cannot be read ({reason(error)})") from error
            yield batch
            n_read += 1
    finally:
        for generator, state in before:
            generator.set_state(state)


def _generators(loader: Any) -> Iterator[torch.Generator]:
    """Generators that a ``DataLoader`` or its samplers hold."""
    samplers = getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)
    for part in (loader, *samplers, getattr(samplers[1], "sampler", None)):
        generator = getattr(part, "generator", None)
        if isinstance(generator, torch.Generator):
            yield generator


class _OwnRandomness:
    """Within the context, the global generators of torch, NumPy and Python are in states of its own, seeded once."""

    def __init__(self, seed: int) -> None:
        self._outside: list[Any] = []
        self._own: list[Any] = seeded_states(seed)

    def __enter__(self) -> None:
        self._outside = random_states()
        set_random_states(self._own)

    def __exit__(self, *exception: object) -> None:
        self._own = random_states()
        set_random_states(self._outside)


def _contents(batch: Any) -> str:
    return fingerprint(*tensors(batch))
