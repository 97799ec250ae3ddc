"""Products by other packages against our own."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from pnanalysis.curvature.peers import make_operator
from pnanalysis.errors import CurvatureError
from tests.curvature.conftest import NETWORKS, images
from tests.curvature.test_operators import relative


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("engine", "kind"), [("pyhessian", "hessian"), ("curvlinops", "hessian"), ("curvlinops", "ggn")]
)
def test_peers_compute_the_same_products(engine: str, kind: str) -> None:
    if engine == "curvlinops":
        pytest.importorskip("curvlinops")
    model, batches = NETWORKS["batchnorm"](), images((4, 4))
    ours = make_operator("native", kind, model, cross_entropy, batches)
    theirs = make_operator(engine, kind, model, cross_entropy, batches)
    V = torch.randn(ours.shape[0], 2).double()
    assert relative(theirs.matmat(V), ours.matmat(V)) < 1e-10


@pytest.mark.parametrize(
    ("engine", "kind", "options"),
    [
        ("magic", "hessian", {}),
        ("native", "kfac", {}),
        ("pyhessian", "ggn", {}),
        ("pyhessian", "hessian", {"params": "0"}),
    ],
)
def test_engines_that_cannot_do_it_say_so(engine: str, kind: str, options: dict[str, object]) -> None:
    with pytest.raises(CurvatureError):
        make_operator(engine, kind, NETWORKS["conv"](), cross_entropy, images(), **options)


def test_pyhessian_refuses_unequal_batches() -> None:
    with pytest.raises(CurvatureError, match="equal size"):
        make_operator("pyhessian", "hessian", NETWORKS["conv"](), cross_entropy, images())
