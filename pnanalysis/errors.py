"""Errors for users: their messages are one sentence that says what is wrong and what to do."""

import re

#: Characters that a terminal obeys instead of showing them, that reverse the text after them, that end a line, or that
#: stand for bytes of a file name that are no text.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Text as it may be shown, with control characters as escapes: names of runs, layers and files may hold any."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def reason(error: BaseException) -> str:
    """The type and first line of an error that another library or the user's code has raised."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


#: What torch's devices and the host say, of which only CUDA and its kin have an error of their own for it.
_NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory|_ALLOC_FAILED", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the host or a device has no more memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None


#: What code of the user's (networks, losses, data sets) may raise; ``exit()`` in it must not end the program as done.
USER_ERRORS = (Exception, SystemExit)


class PnError(ValueError):
    """Any error that the user can mend; command lines print it on one line and exit with status 2."""

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))


class RunError(PnError):
    """A run directory is missing, damaged, not of pnanalysis, or cannot be written."""


class ModelError(PnError):
    """A model or its weights cannot be found or read, or do not fit each other."""


class DataError(PnError):
    """A data set cannot be found, read or batched."""


class TrainingError(PnError):
    """Training cannot start or continue (an unknown recipe or layer, a loss that is not finite)."""


class DivergenceError(TrainingError):
    """The loss or the weights of a training are not finite any more."""


class CurvatureError(PnError):
    """A curvature operator or a spectral estimate is ill-defined for the given input."""


class Indivisible(CurvatureError):
    """The examples of an operator cannot be divided into as many parts."""


class ProcessLost(CurvatureError):
    """Another of several processes that compute together has ended, or does not answer."""


class SchemaError(PnError):
    """A dataset or its file cannot be read, or lacks what its kind requires."""
