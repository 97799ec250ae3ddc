"""What to do when a pass over the network does not fit into memory: take half as many examples, and go on."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from pnanalysis.errors import is_out_of_memory

T = TypeVar("T")


def until_it_fits(compute: Callable[[], T], halve: Callable[[], None]) -> T:
    """The result of ``compute``, after as many calls of ``halve`` as it takes not to run out of memory.

    Raises
    ------
    Exception
        Of ``halve``, where there is nothing left to halve; all others of ``compute``.
    """
    while True:
        try:
            return compute()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # only here are the tensors free that the traceback held
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        halve()
