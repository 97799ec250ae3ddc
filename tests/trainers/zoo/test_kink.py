"""The points of the kink regression and the plateau of its loss."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pnanalysis.errors import TrainingError
from trainers.zoo.kink import kink_data, two_sided_fit_loss

X, Y = kink_data("kink6")


@pytest.mark.parametrize("name", ["kink6", "kink20"])
def test_two_sided_linear_fit_has_the_papers_plateau(name: str) -> None:
    x, y = kink_data(name)
    residuals = [y[side] - np.polyval(np.polyfit(x[side], y[side], 1), x[side]) for side in (x < 0, x > 0)]
    assert np.mean(np.concatenate(residuals) ** 2) == pytest.approx(4.2, rel=1e-12)
    assert two_sided_fit_loss(x, y) == pytest.approx(4.2, rel=1e-12)
    np.testing.assert_allclose(y, -y[::-1])
    assert len(x) == int(name.removeprefix("kink"))


def test_six_points_are_those_of_the_literature() -> None:
    np.testing.assert_array_equal(X, [-3, -2, -1, 1, 2, 3])
    np.testing.assert_allclose(Y, math.sqrt(2.1) * np.array([-1, 2, -1, 1, -2, 1]))


def test_unknown_data_is_refused() -> None:
    with pytest.raises(TrainingError, match="there are kink6 and kink20"):
        kink_data("kink7")
