"""The choice of parameters by layer, name and pattern."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from pnanalysis.curvature.operators import HessianOperator
from pnanalysis.curvature.parameters import split_vector
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


def test_parts_of_vectors_can_be_read_as_complex_numbers_wherever_they_begin() -> None:
    vector = torch.arange(13.0)
    parts = split_vector(vector, [torch.Size([2]), torch.Size([1]), torch.Size([3, 2]), torch.Size([4])])
    assert torch.equal(torch.cat([part.flatten() for part in parts]), vector)
    assert torch.view_as_complex(parts[2]).tolist() == [3 + 4j, 5 + 6j, 7 + 8j]
    assert parts[1].data_ptr() == vector[2:].data_ptr()  # where that is safe, nothing is copied
