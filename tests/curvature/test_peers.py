"""Operators by name, and the same products from other packages."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.nn.functional import cross_entropy

from pnanalysis.curvature import peers
from pnanalysis.curvature.peers import make_operator
from pnanalysis.errors import CurvatureError
from tests.curvature.conftest import NETWORKS, images, relative


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("engine", "kind"), [("pyhessian", "hessian"), ("curvlinops", "hessian"), ("curvlinops", "ggn")]
)
def test_peers_compute_the_same_products(engine: str, kind: str) -> None:
    pytest.importorskip(engine)  # the package of the same name
    model, batches = NETWORKS["batchnorm"](), images((4, 4))
    ours = make_operator("native", kind, model, cross_entropy, batches)
    theirs = make_operator(engine, kind, model, cross_entropy, batches)
    V = torch.randn(ours.shape[0], 2).double()
    assert relative(theirs.matmat(V), ours.matmat(V)) < 1e-10


@pytest.mark.parametrize(
    ("engine", "kind", "options", "message"),
    [
        ("magic", "hessian", {}, "unknown engine 'magic'"),
        ("native", "kfac", {}, "unknown operator 'kfac'"),
        ("pyhessian", "ggn", {}, "has the Hessian only"),
        ("pyhessian", "hessian", {"params": "0"}, "use the native engine"),
        ("pyhessian", "hessian", {"weight_decay": 0.5}, "no weight decay"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(engine: str, kind: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(CurvatureError, match=message):
        make_operator(engine, kind, NETWORKS["conv"](), cross_entropy, images(), **options)


def test_pyhessian_refuses_unequal_batches() -> None:
    with pytest.raises(CurvatureError, match="equal size"):
        make_operator("pyhessian", "hessian", NETWORKS["conv"](), cross_entropy, images())


@pytest.mark.parametrize(("much", "n_left"), [(0, 1), (2**40, 3)])
def test_operators_that_keep_much_are_freed_before_the_next_is_made(
    much: int, n_left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "_MUCH", much)
    gc.collect()
    before = len(peers._made)
    gc.disable()
    try:
        for _ in range(3):
            op = make_operator(
                "native",
                "hessian",
                NETWORKS["tanh"](),
                cross_entropy,
                images(),
                expected_products=1000,
                dtype=torch.float64,
            )
            op.matvec(torch.ones(op.shape[0]))
            del op
        assert len(peers._made) == before + n_left
    finally:
        gc.enable()
