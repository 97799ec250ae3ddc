r"""Relative flatness of a layer: the trace of its Hessian, weighted by inner products of its weights.

With rows :math:`w_s` of the weight ``(d, m)``, one for each output, and blocks :math:`H_{ss'}` of the Hessian,

.. math:: \kappa = \sum_{s,s'} \langle w_s, w_{s'}\rangle \operatorname{tr} H_{ss'} = \operatorname{tr}(S^\top H S),

where :math:`S = W \otimes I`. Its estimate is the mean of :math:`\langle V, H V\rangle` over :math:`V = W R` with
random signs :math:`R` ``(m, m)``, in a basis of the rows' span: no more than ``min(d, m) * m`` numbers are random, and
where these are few, the trace is summed up exactly.

References
----------
H. Petzka, M. Kamp, L. Adilova, C. Sminchisescu, M. Boley, "Relative Flatness and Generalization", NeurIPS 2021,
arXiv:2001.00939.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pnanalysis.arrays import Array
from pnanalysis.curvature.operators import HessianOperator
from pnanalysis.curvature.parameters import Selection, select_parameters
from pnanalysis.errors import CurvatureError, ModelError
from pnanalysis.estimates import Estimate
from pnanalysis.perturbation.weight_uses import WeightUse
from pnanalysis.spectra.data_error import Influence
from pnanalysis.spectra.random_vectors import normal_numbers

#: Random directions, and the most of which all are taken instead.
N_PROBES = 64
#: Stream of random numbers.
_PROBES = 3
#: Deviation of the sum of forms, relative to the sizes of a vector and its product.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}


@dataclass(frozen=True)
class RelativeFlatness:
    """An estimate, with the parts of its standard error, and what single examples add to it.

    Attributes
    ----------
    value, se, probe_se, data_se, dof : float
    influence : Influence
    """

    value: float
    se: float
    probe_se: float
    data_se: float
    dof: float
    influence: Influence

    def interval(self) -> tuple[float, float]:
        """Ends of the 95 % interval."""
        return Estimate(self.value, self.se, dof=self.dof).interval()


def last_weight(model: nn.Module, uses: Sequence[WeightUse] = ()) -> str | None:
    """The name of the trainable matrix that is used last and so acts on the penultimate features.

    Parameters
    ----------
    model : Module
    uses : sequence of WeightUse
        In the order of a forward pass; the order in which parameters are registered takes its place without it.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.ndim > 1]
    order = [use.name for use in uses if use.name in names] or names
    return order[-1] if order else None


def output_dim(model: nn.Module, name: str, uses: Sequence[WeightUse] = ()) -> int:
    """The dim of a weight that counts outputs: as its last product shows, or as torch's own layers have it.

    Raises
    ------
    ModelError
        If it counts those of one group only, or is not known.
    """
    found = [use for use in uses if use.name == name]
    if any(use.is_grouped for use in found):
        raise ModelError(f"{name!r} is of a transposed convolution in groups, whose outputs share no rows")
    if found:
        return found[-1].output_dim
    layer = model.get_submodule(name.rpartition(".")[0])
    if not type(layer).__module__.startswith("torch.nn."):
        raise ModelError(f"it is not seen which dim of {name!r} counts outputs; multiply with it by F.linear or matmul")
    return 1 if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d) else 0


def weight_of(model: nn.Module, layer: Selection) -> str:
    """The name of the weight of a layer.

    Raises
    ------
    ModelError
        If it has none, or several.
    """
    names = select_parameters(model, layer)
    matrices = [name for name in names if name in dict(model.named_parameters()) and model.get_parameter(name).ndim > 1]
    if len(matrices) != 1:
        found = ", ".join(matrices[:3]) or "none"
        raise ModelError(f"relative flatness is that of one weight matrix, {layer!r} has {found}; name one")
    return matrices[0]


def relative_flatness(
    op: HessianOperator, weight: Tensor, seed: int = 0, n_probes: int = N_PROBES, output_dim: int = 0
) -> RelativeFlatness:
    """Relative flatness of a weight.

    Parameters
    ----------
    op : HessianOperator
        Of this weight alone.
    weight : Tensor, shape (d, m, ...)
    seed : int
    n_probes : int
    output_dim : int
        The dim of ``weight`` that counts outputs, d.
    """
    by_output = weight.detach().to(op.device, torch.float64).movedim(output_dim, 0)
    matrix = by_output.flatten(1)
    left, sizes, _ = torch.linalg.svd(matrix, full_matrices=False)
    spanned = left * sizes  # (d, r): rows have the same inner products
    n_random = spanned.shape[1] * matrix.shape[1]
    is_exact = n_random <= n_probes
    forms = []
    for i in range(n_random if is_exact else n_probes):
        rows = spanned @ _probe(i, spanned.shape[1], matrix.shape[1], is_exact, seed, op.device)
        v = rows.reshape(by_output.shape).movedim(0, output_dim).reshape(-1).to(op.dtype)[:, None]
        forms.append(op.forms(v, v)[0].numpy())
        if i == 0:
            _check(op, v[:, 0], float(op.group_weights @ forms[0]))
    return _estimate(np.array(forms), np.asarray(op.group_weights), is_exact)


def _check(op: HessianOperator, v: Tensor, form: float) -> None:
    """See that the forms of single examples add up to that of the whole.

    Raises
    ------
    CurvatureError
    """
    product = op.matvec(v).double()
    whole, size = float(v.double() @ product), float(v.double().norm() * product.norm())
    if abs(form - whole) > _TOLERANCE[op.dtype] * size:
        raise CurvatureError(f"the curvatures of single examples add up to {form:.6g}, not to {whole:.6g}")


def _probe(i: int, r: int, m: int, is_exact: bool, seed: int, device: torch.device) -> Tensor:
    if is_exact:
        unit = torch.zeros(r * m, dtype=torch.float64, device=device)
        unit[i] = 1.0
        return unit.reshape(r, m)
    signs = normal_numbers(r * m, i, seed, device, stream=_PROBES).sign()
    return torch.where(signs == 0, 1.0, signs).double().reshape(r, m)


def _estimate(forms: Array, weights: Array, is_exact: bool) -> RelativeFlatness:
    """From forms ``(probe, group)`` of single examples."""
    of_probes = forms @ weights
    if is_exact:
        influence = Influence(weights, forms.sum(0), np.zeros(forms.shape[1]))
        value, probe_se = float(of_probes.sum()), 0.0
    else:
        first, second = forms[::2].mean(0), forms[1::2].mean(0)
        influence = Influence(weights, forms.mean(0), (first - second) / 2)
        value, probe_se = float(of_probes.mean()), float(of_probes.std(ddof=1) / math.sqrt(len(forms)))
    data_se = influence.se
    se = math.hypot(probe_se, data_se) if math.isfinite(data_se) else probe_se
    parts = probe_se**4 / max(len(forms) - 1, 1) + (data_se**4 / influence.dof if math.isfinite(data_se) else 0.0)
    return RelativeFlatness(value, se, probe_se, data_se, se**4 / parts if parts else math.inf, influence)
