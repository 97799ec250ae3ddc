"""What a comparison is asked for beside functions and errors: another analysis, with options of its own."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

from pnanalysis.analyses.hessian import names_of
from pnanalysis.checks import at_least, one_of
from pnanalysis.errors import PnError
from pnanalysis.inputs.data import SPLITS
from pnanalysis.inputs.selection import Selection


class Request(NamedTuple):
    """The examples of an analysis, and the options that are its own.

    Attributes
    ----------
    split : str
    n : int or None
    batch_size : int
    options : dict
    """

    split: str
    n: int | None
    batch_size: int
    options: dict[str, Any]


def read_request(
    requested: Mapping[str, Any], defaults: Mapping[str, Any], seed: int, known: Collection[str], what: str
) -> Request:
    """An analysis from keyword arguments that replace the defaults, checked before any work begins.

    Parameters
    ----------
    requested, defaults : mapping
    seed : int
        That of the comparison, unless one is requested.
    known : collection of str
        Options that the analysis takes.
    what : str
        It is called in messages.

    Raises
    ------
    PnError
        If an option is unknown, or examples are named wrongly.
    """
    options = {"seed": seed, **defaults, **requested}
    split, n = str(options.pop("split", "train")), options.pop("n")
    batch_size = options.pop("batch_size", 512)
    one_of(SPLITS, split=split)
    at_least(1, n=n, batch_size=batch_size)
    unknown = [name for name in options if name not in known]
    if unknown:
        raise PnError(f"compare takes no option {unknown[0]!r} for its {what}; there are {', '.join(sorted(known))}")
    return Request(split, n, batch_size, options)


def settings_of(request: Any, selection: Selection) -> dict[str, Any]:
    """What unfinished work depends on: a request's examples and ``options``, and what it is about, by names.

    Functions among the options have none that would be the same in another process, and are left out; so is the bound
    of memory, since work goes on as it was begun, whatever there is room for now.
    """
    options = {name: None if callable(value) else value for name, value in asdict(request.options).items()}
    options.pop("max_memory_bytes", None)
    examples = {"split": request.split, "n": request.n, "batch_size": request.batch_size}
    return options | examples | names_of(selection)
