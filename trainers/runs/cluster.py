"""Calls on the workers of a Dask cluster (https://distributed.dask.org), on one machine or on many."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pnanalysis.errors import TrainingError, reason

T = TypeVar("T")
#: Seconds to wait for the scheduler.
_TIMEOUT = 30


def on_cluster(address: str, function: Callable[..., T], calls: Sequence[tuple[Any, ...]]) -> Iterator[T]:
    """Results of a function of this package's, as they come; as many calls are made at a time as there are threads.

    A call whose worker dies is made again by another one. If the caller is interrupted, calls that have not begun are
    withdrawn; Dask cannot stop the others.

    Parameters
    ----------
    address : str
        Of the scheduler, such as ``tcp://node1:8786``, or the path of its ``--scheduler-file``.
    function : callable
    calls : sequence of tuple
        Arguments of each call.

    Raises
    ------
    TrainingError
        If Dask is not installed, there is no scheduler at the address, or a call has cost several workers their life.
    """
    try:
        from distributed import Client, KilledWorker, as_completed
    except ImportError as error:
        raise TrainingError("a Dask cluster needs Dask: pip install 'pnanalysis[dask]'") from error
    is_file = address.endswith(".json")
    if is_file and not Path(address).is_file():  # Dask would wait for it
        raise TrainingError(f"{address}: no such file; a Dask scheduler writes it where --scheduler-file says")
    place = {"scheduler_file": address} if is_file else {"address": address}
    try:
        client = Client(**place, timeout=_TIMEOUT)
    except (OSError, ValueError) as error:  # TimeoutError is an OSError
        raise TrainingError(f"there is no Dask scheduler at {address} ({reason(error)})") from error
    with client:
        futures = [client.submit(_called, function, arguments, pure=False) for arguments in calls]
        try:
            for future in as_completed(futures):
                yield future.result()
        except KilledWorker as error:
            raise TrainingError(
                "a call has cost several workers of the cluster their life, perhaps for lack of memory; continue with "
                "--resume and workers with more of it"
            ) from error
        finally:
            client.cancel(futures)


def _called(function: Callable[..., T], arguments: tuple[Any, ...]) -> T:
    """In a worker, where xarray would lock its files through the scheduler, which does not know those in memory."""
    import dask

    with dask.config.set(scheduler="threads"):
        return function(*arguments)
