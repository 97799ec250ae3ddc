"""Errors for the choice of examples of what is measured along a training, from the matrices of single examples."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pnanalysis.curvature.operators import HessianOperator
from pnanalysis.errors import CurvatureError
from pnanalysis.spectra.data_error import FEWEST_GROUPS, DataForms, Influence
from pnanalysis.spectra.inner_products import inner_products
from pnanalysis.spectra.random_vectors import random_unit_vectors
from pnanalysis.spectra.trace import trace_estimate


class ExampleErrors:
    """Standard errors of eigenvalues and of the trace, for a network that is measured again and again.

    Attributes
    ----------
    reason : str
        Why there are none; empty as long as there are.
    n_forms : int
        Quadratic forms so far, each of which costs about a product.
    """

    def __init__(self, reason: str = "") -> None:
        self.reason, self.n_forms = reason, 0

    def of_eigenvalue(self, op: HessianOperator, value: float, vector: Tensor) -> float:
        """Of the quadratic form ``value`` of a vector ``(P,)`` that belongs to an eigenvalue; NaN without one."""
        if self.reason or not np.isfinite(value):
            return np.nan
        forms = DataForms(op, 1)
        forms.add_leading([value], [vector[:, None]])
        self.n_forms += 1
        self._note(op, forms.reason)
        found = forms.leading_influences
        return found[0].se if found else np.nan

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
        forms, weight = op.forms(probes, probes).numpy(), op.group_weights
        if len(weight) < FEWEST_GROUPS:
            raise CurvatureError(f"there are {len(weight)} groups of examples, fewer than {FEWEST_GROUPS}")
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
        """Give up where matrices of examples cannot be had at all, which will not change."""
        try:
            if reason and len(op.group_weights) < FEWEST_GROUPS:
                self.reason = reason
        except CurvatureError:
            self.reason = reason
