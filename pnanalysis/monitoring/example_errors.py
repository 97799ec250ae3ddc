"""Errors for the choice of examples of what is measured along a training, from the matrices of single examples."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pnanalysis.arrays import Array
from pnanalysis.curvature.operators import HessianOperator
from pnanalysis.errors import CurvatureError, PnError
from pnanalysis.spectra.data_error import FEWEST_GROUPS, DataForms, Influence, weights_of_groups
from pnanalysis.spectra.inner_products import inner_products
from pnanalysis.spectra.random_vectors import random_unit_vectors
from pnanalysis.spectra.trace import trace_estimate

#: How far ahead of the critical step and behind it the loss is taken for its slope there, relative to that step.
_AHEAD = 0.05


class ExampleErrors:
    """Standard errors of what is measured of a network again and again.

    Attributes
    ----------
    reason : str
        Why there are none; empty as long as there are.
    note : str
        The last reason why a number had no error.
    n_forms : int
        Quadratic forms so far, each of which costs about a product.
    """

    def __init__(self, reason: str = "") -> None:
        self.reason, self.note, self.n_forms = reason, reason, 0

    def of_eigenvalues(self, op: HessianOperator, values: Array, vectors: Tensor) -> Array:
        """Of eigenvalues ``(k,)``, which are the quadratic forms of vectors ``(P, k)``; NaN for those that are NaN."""
        found = np.full(len(values), np.nan)
        known = np.flatnonzero(np.isfinite(values))
        if self.reason or not len(known):
            return found
        forms = DataForms(op, 1)
        forms.add_leading(values[known], [vectors[:, torch.from_numpy(known).to(vectors.device)]])
        self.n_forms += len(known)
        self._note(op, forms.reason)
        if influences := forms.leading_influences:
            found[known] = [one.se for one in influences]
        return found

    def of_loss(self, op: HessianOperator) -> float:
        """Of the loss."""
        return self._of_mean(op, lambda: op.group_losses().numpy())

    def of_gradient_norm(self, op: HessianOperator, gradient: Tensor) -> float:
        """Of the norm of the gradient ``(P,)``: to first order that of the gradient's part along itself."""
        norm = gradient.norm()
        if not float(norm) > 0:
            return np.nan
        return self._of_mean(op, lambda: op.slopes((gradient / norm)[:, None])[0].numpy())

    def of_critical_sharpness(
        self, op: HessianOperator, back: Tensor, scale: float, sharpness: float, round_off: float
    ) -> float:
        r"""Of the critical sharpness, given the last step backwards ``(P,)`` and the critical multiple of it.

        The multiple :math:`s` is where :math:`L(s) = L(0)`. With the weight of an example, whose loss is
        :math:`\ell_i`, it changes by :math:`-(\ell_i(s) - \ell_i(0)) / L'(s)`.
        """
        if not np.isfinite(scale):
            return np.nan
        ahead, behind = ((1 - scale * factor) * back for factor in (1 + _AHEAD, 1 - _AHEAD))
        rise = op.loss_at(ahead) - op.loss_at(behind)
        if not rise > round_off:
            return np.nan
        slope = rise / (2 * _AHEAD)  # by the logarithm of s, as is that of the sharpness, but for its sign
        change = self._of_mean(op, lambda: (op.group_losses((1 - scale) * back) - op.group_losses(back)).numpy())
        return sharpness * change / slope

    def _of_mean(self, op: HessianOperator, compute: Callable[[], Array]) -> float:
        """Of the mean of numbers ``(G,)`` of groups of examples; NaN where they cannot be had."""
        if self.reason:
            return np.nan
        try:
            each, weight = compute(), op.group_weights
        except PnError as error:
            self._note(op, str(error))
            return np.nan
        return Influence(weight, each, np.zeros(len(weight))).se

    def trace(self, op: HessianOperator, n_probes: int, seed: int) -> dict[str, float]:
        """Hutchinson's estimate with its errors: for probes, for examples, and both; exact with P probes."""
        if not self.reason:
            try:
                return self._trace(op, n_probes, seed)
            except CurvatureError as error:
                self._note(op, str(error))
        found = trace_estimate(op, "hutchinson", n_probes, seed=seed)
        return {"trace": found.value, "trace_se": found.se, "trace_probe_se": found.se, "trace_data_se": np.nan}

    def _trace(self, op: HessianOperator, n_probes: int, seed: int) -> dict[str, float]:
        """The trace from forms, which are products as well: no product is made twice."""
        p = op.n_parameters
        is_exact = n_probes >= p
        if is_exact:
            probes = torch.eye(p, dtype=op.dtype, device=op.device)
        else:
            probes = random_unit_vectors(op, range(n_probes), seed) * p**0.5
        weight = weights_of_groups(op)
        forms = op.forms(probes, probes).numpy()
        self.n_forms += probes.shape[1]
        samples = forms @ weight + inner_products(probes, op.product_without_data(probes)).cpu().numpy()
        if is_exact:
            value, probe_se = float(samples.sum()), 0.0
            influence = Influence(weight, forms.sum(0), np.zeros(len(weight)))
        else:
            value, probe_se = float(samples.mean()), float(samples.std(ddof=1) / n_probes**0.5)
            first, second = (forms[half::2].mean(0) for half in (0, 1))
            influence = Influence(weight, forms.mean(0), (first - second) / 2)
        return {
            "trace": value, "trace_se": float(np.hypot(probe_se, influence.se)), "trace_probe_se": probe_se,
            "trace_data_se": influence.se,
        }  # fmt: skip

    def _note(self, op: HessianOperator, reason: str) -> None:
        """Keep the reason; give up where matrices of examples cannot be had at all, which will not change."""
        self.note = reason or self.note
        try:
            if reason and len(op.group_weights) < FEWEST_GROUPS:
                self.reason = reason
        except CurvatureError:
            self.reason = reason
