"""The errors users meet: one sentence that says what is wrong and what to do."""


def reason(error: BaseException) -> str:
    """The type and first line of an error that another library or the user's code has raised."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class PnError(ValueError):
    """Anything the user can put right; command lines print it on one line and exit with status 2."""


class RunError(PnError):
    """A run directory is missing, foreign, damaged or cannot be written."""


class ModelError(PnError):
    """A model or its weights cannot be resolved or do not fit together."""


class DataError(PnError):
    """A data set cannot be found, read or batched."""


class TrainingError(PnError):
    """Training cannot go on (a loss that is not finite, an unknown recipe or layer)."""


class CurvatureError(PnError):
    """A curvature operator or a spectral estimate is ill-defined for the given input."""


class SchemaError(PnError):
    """A dataset or file does not hold what its kind promises."""
