"""The kink regression: its points, and the loss of the plateau on which most networks get stuck.

See :mod:`trainers.problems.escape` for the reason.
"""

from __future__ import annotations

import numpy as np

from pnanalysis.errors import TrainingError

#: Loss of the best two-sided linear fit on both built-in data sets (the plateau of arXiv:2007.01419, section 3).
PLATEAU = 4.2


def kink_data(name: str = "kink6") -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets, shape (n,), of a built-in data set.

    Parameters
    ----------
    name : {"kink6", "kink20"}
        Six points, or twenty of a cosine; both are odd in x and scaled to the same plateau, 4.2.

    Raises
    ------
    TrainingError
        If there is no such data set.
    """
    if name == "kink6":
        x = np.array([-3.0, -2.0, -1.0, 1.0, 2.0, 3.0])
        y = np.array([-1.0, 2.0, -1.0, 1.0, -2.0, 1.0])
    elif name == "kink20":
        right = np.linspace(1.0, 3.0, 10)
        x = np.concatenate([-right[::-1], right])
        y = np.sign(x) * np.cos(np.pi * (np.abs(x) - 1))
    else:
        raise TrainingError(f"unknown kink data {name!r}; there are kink6 and kink20")
    return x, y * np.sqrt(PLATEAU / two_sided_fit_loss(x, y))


def two_sided_fit_loss(x: np.ndarray, y: np.ndarray) -> float:
    """Mean squared error of the best pair of lines, one for x < 0 and one for x >= 0: where a stuck network ends."""
    residuals = []
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    for side in (x < 0, x >= 0):
        design = np.stack([x[side], np.ones(side.sum())], axis=1)
        residuals.append(y[side] - design @ np.linalg.lstsq(design, y[side], rcond=None)[0])
    return float(np.mean(np.concatenate(residuals) ** 2))
