"""Errors for users: their messages are one sentence that says what is wrong and what to do."""


def reason(error: BaseException) -> str:
    """The type and first line of an error that another library or the user's code has raised."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class PnError(ValueError):
    """Any error that the user can mend; command lines print it on one line and exit with status 2."""


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


class SchemaError(PnError):
    """A dataset or its file cannot be read, or lacks what its kind requires."""
