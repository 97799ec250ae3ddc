"""Calls on the workers of a Dask cluster (https://distributed.dask.org), on one machine or on many."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from pnanalysis.errors import TrainingError, reason

T = TypeVar("T")
#: Seconds to wait for the scheduler.
_TIMEOUT = 30
_SCHEMES = ("tcp", "tls", "ws", "wss")
#: In a worker with several threads.
_ONE_AT_A_TIME = threading.Lock()


def on_cluster(address: str, function: Callable[..., T], calls: Sequence[tuple[Any, ...]]) -> Iterator[T]:
    """Results of a function, as they come: one call at a time in each worker, since they share its random state.

    A call whose worker dies is made again by another one. If the caller is interrupted, calls that have not begun are
    withdrawn; Dask cannot stop the others.

    Parameters
    ----------
    address : str
        Of the scheduler, such as ``tcp://node1:8786``, or the path of its ``--scheduler-file``.
    function : callable
        Of a module that the workers can import.
    calls : sequence of tuple
        Arguments of each call.

    Raises
    ------
    TrainingError
        If Dask is not installed, there is no scheduler at the address, or the cluster or a call fails.
    """
    try:
        from distributed import Client, KilledWorker, as_completed
    except ImportError as error:
        raise TrainingError("a Dask cluster needs Dask: pip install 'pnanalysis[dask]'") from error
    is_file = address.endswith(".json")
    if is_file and not Path(address).is_file():  # Dask would wait for it
        raise TrainingError(f"{address}: no such file; a Dask scheduler writes it where --scheduler-file says")
    scheme, separator, _ = address.partition("://")
    if separator and scheme not in _SCHEMES:  # Dask's own threads would say so, again and again
        raise TrainingError(f"there is no Dask scheduler at {address}: it must begin with {'://, '.join(_SCHEMES)}://")
    place = {"scheduler_file": address} if is_file else {"address": address}
    try:
        client = Client(**place, timeout=_TIMEOUT)
    except Exception as error:  # of many kinds, by what is wrong with the address
        raise TrainingError(f"there is no Dask scheduler at {address} ({reason(error)})") from error
    with client:
        futures = []
        try:
            futures += [client.submit(_called, function, arguments, pure=False) for arguments in calls]
            if not client.scheduler_info()["workers"]:  # a cluster that adapts to its work starts them now
                warnings.warn(f"the cluster at {address} has no workers; runs wait until there are some", stacklevel=2)
            for future in as_completed(futures):
                yield future.result()
        except KilledWorker as error:
            raise TrainingError(
                "a run has killed several workers of the cluster, perhaps for lack of memory; continue with --resume "
                "and workers with more of it"
            ) from error
        except Exception as error:
            raise TrainingError(f"the cluster has failed ({reason(error)}); continue with --resume") from error
        finally:
            with suppress(Exception):  # the scheduler may be gone
                client.cancel(futures)


def _called(function: Callable[..., T], arguments: tuple[Any, ...]) -> T:
    """In a worker, where xarray would lock its files through the scheduler, which does not know those in memory."""
    import dask

    with _ONE_AT_A_TIME, dask.config.set(scheduler="threads"):
        return function(*arguments)
