"""The parts of a classifier's Gauss-Newton matrix, against single examples' gradients by a loop."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pnanalysis.curvature.class_structure import LEVELS, class_structure
from pnanalysis.curvature.operators import EmpiricalFisherOperator, GGNOperator, HessianOperator
from pnanalysis.errors import CurvatureError
from tests.curvature.conftest import NETWORKS, images

WEIGHTS = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)


def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of the loss of each label of each example ``(n, C, P)``, and the probabilities ``(n, C)``."""
    rows, p = [], torch.softmax(model(x), 1).detach()
    parameters = list(model.parameters())
    for i in range(len(x)):
        own = []
        for label in range(p.shape[1]):
            loss = F.cross_entropy(model(x[i : i + 1]), torch.tensor([label]))
            own.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters)]))
        rows.append(torch.stack(own))
    return torch.stack(rows), p


def parts_by_definition(model: nn.Module, x: Tensor, y: Tensor, omega: Tensor) -> dict[str, Tensor]:
    """The four matrices of the paper, dense."""
    g, p = gradients(model, x)
    _n, C, P = g.shape
    w = omega[:, None] * p
    zero = torch.zeros(P, P, dtype=g.dtype)
    parts = {level: zero.clone() for level in LEVELS}
    for c in range(C):
        own = y == c
        if not own.any():
            continue
        others = [label for label in range(C) if label != c]
        means = {label: (w[own, label, None] * g[own, label]).sum(0) / w[own, label].sum() for label in others}
        sizes = {label: w[own, label].sum() for label in others}
        centre = sum(sizes[label] * means[label] for label in others) / sum(sizes.values())
        parts["class"] += sum(sizes.values()) * torch.outer(centre, centre)
        for label in others:
            away = means[label] - centre
            parts["cross"] += sizes[label] * torch.outer(away, away)
            rest = g[own, label] - means[label]
            parts["within"] += (w[own, label, None] * rest).T @ rest
        parts["same"] += (w[own, c, None] * g[own, c]).T @ g[own, c]
    return parts


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("network", ["linear", "tanh", "conv", "batchnorm"])
def test_parts_are_those_of_the_definition(network: str, weighted: bool) -> None:
    model, batches = NETWORKS[network](), images((9, 5, 8))
    loss = partial(F.cross_entropy, weight=WEIGHTS) if weighted else F.cross_entropy
    op = GGNOperator(model, loss, batches)
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    omega = WEIGHTS[y] if weighted else torch.ones(len(y), dtype=torch.float64)
    parts = parts_by_definition(model, x, y, omega / omega.sum())
    dense = op.to_dense()
    torch.testing.assert_close(sum(parts.values()), dense, rtol=1e-8, atol=1e-12)
    V = torch.linalg.eigh(dense)[1][:, -6:].flip(1)
    found = class_structure(op, V)
    for level, forms in zip(LEVELS, found.level_form, strict=True):
        expected = torch.einsum("pk,pq,qk->k", V, parts[level], V)
        np.testing.assert_allclose(forms, expected, atol=1e-10 * float(dense.trace()))
    for name, matrix in (("class", parts["class"]), ("cross", parts["class"] + parts["cross"])):
        value, vector = torch.linalg.eigh(matrix)
        values = getattr(found, f"{name}_value")
        np.testing.assert_allclose(values, value[-len(values) :].flip(0), atol=1e-9 * float(value[-1]))
        span = vector[:, value > 1e-9 * value[-1]]
        assert span.shape[1] == getattr(found, f"{name}_rank")
        np.testing.assert_allclose(getattr(found, f"{name}_part"), (span.T @ V).square().sum(0), atol=1e-6)


def test_it_is_the_same_for_every_operator_and_way_of_batching() -> None:
    model, batches = NETWORKS["tanh"](), images((11, 6))
    V = torch.linalg.qr(torch.randn(GGNOperator(model, F.cross_entropy, batches).shape[0], 3).double())[0]
    found = [
        class_structure(kind(model, F.cross_entropy, part), V)
        for kind in (GGNOperator, HessianOperator, EmpiricalFisherOperator)
        for part in (batches, [tuple(torch.cat(one) for one in zip(*batches, strict=True))])
    ]
    for one in found[1:]:
        np.testing.assert_allclose(one.level_form, found[0].level_form, rtol=1e-9)
        np.testing.assert_allclose(one.class_value, found[0].class_value, rtol=1e-9)


def test_positions_of_maps_count_as_examples_and_ignored_ones_do_not() -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(2, 3, 1).double()
    x, y = torch.randn(4, 2, 3, 3).double(), torch.randint(0, 3, (4, 3, 3))
    y[0, 0] = -100
    op = GGNOperator(model, F.cross_entropy, [(x, y)])
    V = torch.eye(op.shape[0], dtype=torch.float64)
    mask = y.flatten() >= 0
    flat = x.movedim(1, -1).reshape(-1, 2, 1, 1)[mask]
    alone = GGNOperator(model, lambda o, t: F.cross_entropy(o.flatten(1), t), [(flat, y.flatten()[mask])])
    torch.testing.assert_close(op.to_dense(), alone.to_dense())
    found = class_structure(op, V)
    np.testing.assert_allclose(found.level_form.sum(0), op.to_dense().diag(), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_separated_classes_make_the_outliers(dtype: torch.dtype) -> None:
    """Examples of one class that are all alike have no scatter within pairs of classes."""
    torch.manual_seed(0)
    model = nn.Linear(8, 4).to(dtype)
    centres = torch.randn(4, 8, dtype=dtype)
    y = torch.arange(4).repeat(5)
    op = GGNOperator(model, F.cross_entropy, [(centres[y], y)])
    found = class_structure(op, torch.linalg.eigh(op.to_dense())[1][:, -4:].to(dtype))
    np.testing.assert_allclose(found.level_form[LEVELS.index("within")], 0, atol=1e-6)
    # the part of own labels lies in the span of the other means: the gradients of all labels, weighted, sum to zero
    np.testing.assert_allclose(found.cross_part, 1, atol=1e-4)


def test_two_classes_have_one_other_label_each() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 2).double(), torch.randn(10, 3).double(), torch.randint(0, 2, (10,))
    op = GGNOperator(model, F.cross_entropy, [(x, y)])
    found = class_structure(op, torch.eye(8, dtype=torch.float64))
    np.testing.assert_allclose(found.level_form[LEVELS.index("cross")], 0, atol=1e-14)
    np.testing.assert_allclose(found.class_value, found.cross_value)


def test_what_has_no_classes_is_refused() -> None:
    model = NETWORKS["tanh"]()
    x, y = images((6,))[0]
    V = torch.eye(3, dtype=torch.float64)
    squares = GGNOperator(model, F.mse_loss, [(x, torch.randn(6, 3).double())])
    with pytest.raises(CurvatureError, match="cross_entropy"):
        class_structure(squares, V)
    many = GGNOperator(nn.Linear(2, 201).double(), F.cross_entropy, [(torch.randn(3, 2).double(), torch.arange(3))])
    with pytest.raises(CurvatureError, match="2 to 200 classes, not 201"):
        class_structure(many, V)
    by_batch = GGNOperator(NETWORKS["batchnorm"](), F.cross_entropy, [(x, y)], bn_mode="train")
    with pytest.raises(CurvatureError, match="statistics of batches"):
        class_structure(by_batch, V)
