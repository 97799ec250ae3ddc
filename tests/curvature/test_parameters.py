"""The choice of parameters by layer, name and pattern."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from pnanalysis.curvature.operators import HessianOperator
from pnanalysis.errors import CurvatureError
from tests.curvature.conftest import NETWORKS, dense_hessian, images, relative


@pytest.mark.parametrize("selection", ["0", "0.weight", ["4"], ["0*", "4.bias"], "*.bias"])
def test_a_selection_is_a_block_of_the_matrix(selection) -> None:
    model, batches = NETWORKS["conv"](), images()
    chosen = {"0": ["0.weight", "0.bias"], "0.weight": ["0.weight"], "4": ["4.weight", "4.bias"],
              "0*": ["0.weight", "0.bias"], "4.bias": ["4.bias"], "*.bias": ["0.bias", "2.bias", "4.bias"]}  # fmt: skip
    names = {n for s in ([selection] if isinstance(selection, str) else selection) for n in chosen[s]}
    mask = torch.cat([torch.full((p.numel(),), name in names) for name, p in model.named_parameters()])
    op = HessianOperator(model, cross_entropy, batches, params=selection)
    assert relative(op.to_dense(), dense_hessian(model, batches)[mask][:, mask]) < 1e-10


def test_frozen_parameters_are_left_out_or_refused() -> None:
    model = NETWORKS["conv"]()
    model[0].requires_grad_(False)
    assert HessianOperator(model, cross_entropy, images()).names[0] == "2.weight"
    with pytest.raises(CurvatureError, match="frozen"):
        HessianOperator(model, cross_entropy, images(), params="0")
    with pytest.raises(CurvatureError, match="none that are trainable"):
        HessianOperator(model.requires_grad_(False), cross_entropy, images())
