"""A pass that does not fit into memory is repeated in pieces that do, with the same result."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import pnanalysis as pn
from pnanalysis.curvature.operators import EmpiricalFisherOperator, GGNOperator, HessianOperator
from pnanalysis.curvature.smaller_passes import until_it_fits
from pnanalysis.errors import CurvatureError, is_out_of_memory
from tests.curvature.conftest import Hungry, relative


def hungry() -> Hungry:
    torch.manual_seed(0)
    return Hungry(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(45, 5, generator=generator), torch.randint(3, (45,), generator=generator)
    return list(zip(inputs.double().split(32), targets.split(32), strict=True))


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch):
    return lambda most: monkeypatch.setattr(Hungry, "most", most)


@pytest.mark.filterwarnings("ignore:.* examples at a time do not fit")
@pytest.mark.parametrize(
    ("expected_products", "kind"),
    [
        (1, HessianOperator), (1, EmpiricalFisherOperator), (1000, GGNOperator),
        *(pytest.param(*case, marks=pytest.mark.slow)
          for case in ((1, GGNOperator), (1000, HessianOperator), (1000, EmpiricalFisherOperator))),
    ],
)  # fmt: skip
def test_operators_go_on_with_smaller_passes(kind, expected_products, batches, limit) -> None:
    op = kind(hungry(), cross_entropy, batches, expected_products=expected_products)
    reference = op.to_dense()
    limit(10)
    op._keep_nothing()
    dense = op.to_dense()
    assert op.micro_batch == 8
    assert relative(dense, reference) < 1e-12
    assert op.n_examples == 45


@pytest.mark.parametrize("quantity", ["loss", "gradient", "forms"])
def test_all_that_an_operator_gives(quantity, batches, limit) -> None:
    ask = {
        "loss": lambda op: torch.tensor(op.loss()),
        "gradient": lambda op: op.gradient(),
        "forms": lambda op: op.forms(*torch.ones(2, op.n_parameters, 1, dtype=torch.float64).unbind()),
    }[quantity]
    op = HessianOperator(hungry(), cross_entropy, batches)
    expected = ask(op)
    limit(16)
    op._keep_nothing()
    with pytest.warns(UserWarning, match="going on with 16"):
        found = ask(op)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


def test_what_is_kept_of_batches_is_given_up_first(batches, limit) -> None:
    op = HessianOperator(hungry(), cross_entropy, batches, expected_products=1000)
    v = torch.ones(op.n_parameters, dtype=torch.float64)
    expected = op.matvec(v)
    assert op._cached_bytes

    fail = [True]
    inner = op._sum_of_products

    def once(V: Tensor) -> Tensor:
        if fail and fail.pop():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inner(V)

    op._sum_of_products = once
    torch.testing.assert_close(op.matvec(v), expected)
    assert op.micro_batch is None
    assert op._cached_bytes == 0


def test_no_more_is_kept_of_batches_than_fits(batches) -> None:
    batches = [batches[0]] * 3
    op = HessianOperator(hungry(), cross_entropy, batches, expected_products=1000)
    expected = op.to_dense()
    each = op._cached_bytes // 3
    op._keep_nothing()
    op._cache_bytes = 5 * each // 2
    torch.testing.assert_close(op.to_dense(), expected, rtol=1e-12, atol=0)
    assert (len(op._cache), op._cached_bytes) == (2, 2 * each)


def test_batches_too_large_from_the_start(batches, limit) -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs, targets)  # what batches weigh then is measured, by passes over whole ones

    reference = HessianOperator(hungry(), loss, batches).to_dense()
    limit(20)
    with pytest.warns(UserWarning, match="going on with 16"):
        op = HessianOperator(hungry(), loss, batches)
    assert relative(op.to_dense(), reference) < 1e-12


def test_a_spectrum_interrupted_by_it_is_the_same_to_round_off(batches, limit) -> None:
    options = {"n_hvp": 20, "data_error": "examples"}
    whole = pn.hessian(hungry(), loss=cross_entropy, data=batches, **options)
    limit(16)
    with pytest.warns(UserWarning, match="going on with 16"):
        cut = pn.hessian(hungry(), loss=cross_entropy, data=batches, **options)
    for name in ("trace", "trace_se", "lambda_max"):
        assert cut[name].item() == pytest.approx(whole[name].item(), rel=1e-6)  # spectra are computed in float32


@pytest.mark.filterwarnings("ignore:.* examples at a time do not fit")
@pytest.mark.parametrize(
    ("options", "most", "sentence"),
    [
        ({}, 0, "a pass over a single example takes too much"),
        ({"draws": 2}, 20, "its random numbers belong to whole batches"),
    ],
)
def test_one_sentence_where_nothing_can_be_halved(options, most, sentence, batches, limit) -> None:
    op = HessianOperator(hungry(), cross_entropy, batches, **options)
    limit(most)
    with pytest.raises(CurvatureError, match=sentence):
        op.loss()


def test_batch_statistics_are_not_cut(limit) -> None:
    model = Hungry(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    op = HessianOperator(model, cross_entropy, [(torch.randn(32, 5), torch.arange(32) % 3)], bn_mode="train")
    limit(20)
    with pytest.raises(CurvatureError, match="takes statistics over each batch"):
        op.loss()


def test_other_errors_pass_through() -> None:
    def broken() -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        until_it_fits(broken, lambda: pytest.fail("nothing to halve"))


def test_the_error_of_the_host_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(ValueError("out of memory"))
