"""Networks that answer with more than a tensor, inputs by name, and data that do not fit: in every analysis."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pnanalysis as pn
from pnanalysis.errors import PnError
from pnanalysis.evaluation.diagnosis import clear_errors
from pnanalysis.evaluation.forward import prediction
from pnanalysis.inputs.networks import open_files
from pnanalysis.inputs.sources import Source, as_source
from pnanalysis.io.runs import Run

ANALYSES: dict[str, Callable[[Source], Any]] = {
    "hessian": lambda source: pn.hessian(source, n_hvp=12, progress=False),
    "compare": lambda source: pn.compare(source, split="train", hessian=False, saturation=False, progress=False),
    "functional_distance": lambda source: pn.functional_distance(source, split="train", progress=False),
    "landscape": lambda source: pn.landscape(source, n_points=3, progress=False),
    "curve": lambda source: pn.landscape(source, view="curve", n_points=3, n_steps=3, progress=False),
    "sharpness": lambda source: pn.sharpness(
        source, n_steps=2, n_directions=2, measures=("worst", "average"), second_order=False, progress=False
    ),
    "saturation": lambda source: pn.saturation(source, split="train", progress=False),
}


class Scores(NamedTuple):
    logits: Tensor
    hidden: Tensor


@dataclass
class Answer:
    """What torch cannot take apart."""

    logits: Tensor


class Net(nn.Module):
    """Two heads, in one of several wrappings."""

    def __init__(self, wrap: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.body, self.act, self.head, self.side = nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.Linear(5, 3)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        hidden = self.act(self.body(x))
        return self.wrap(self.head(hidden), self.side(hidden))


WRAPPINGS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tensor": lambda a, b: a,
    "tuple": lambda a, b: (a, b),
    "mapping": lambda a, b: {"aux": b, "out": a},
    "named": lambda a, b: Scores(a, b),
    "object": lambda a, b: Answer(a),
}


def data(n: int = 60) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 4, generator=generator), torch.randint(3, (n,), generator=generator)


def source_of(folder: Path, make: Callable[[], nn.Module], examples: Any, loss: Any = "cross_entropy") -> Source:
    files = []
    for seed in range(2):
        torch.manual_seed(seed)
        files.append(folder / f"w{seed}.pt")
        torch.save(make().state_dict(), files[-1])
    return open_files(make, files, examples, loss)


def first_head(outputs: Any, targets: Tensor) -> Tensor:
    found = prediction(outputs)
    assert found is not None
    return F.cross_entropy(found, targets)


def numbers(ds: Any) -> dict[str, np.ndarray]:
    return {name: array.values for name, array in ds.data_vars.items() if array.dtype.kind == "f"}


@pytest.mark.parametrize("analysis", ANALYSES.values(), ids=ANALYSES.keys())
def test_what_a_network_wraps_its_answer_in_does_not_matter_to_a_loss_that_takes_it(
    tmp_path: Path, analysis: Callable[[Source], Any]
) -> None:
    expected = numbers(analysis(source_of(tmp_path, lambda: Net(WRAPPINGS["tensor"]), data(), first_head)))
    for name in ("tuple", "mapping", "named"):
        found = numbers(analysis(source_of(tmp_path, lambda name=name: Net(WRAPPINGS[name]), data(), first_head)))
        assert found.keys() == expected.keys()
        for variable, values in expected.items():
            np.testing.assert_allclose(found[variable], values, rtol=1e-4, atol=1e-6, err_msg=f"{name} {variable}")


@pytest.mark.parametrize("name", ["compare", "functional_distance", "landscape", "sharpness", "hessian"])
@pytest.mark.parametrize("wrapping", ["tuple", "mapping", "named", "object"])
def test_a_loss_that_takes_tensors_asks_for_a_wrapped_network(tmp_path: Path, name: str, wrapping: str) -> None:
    source = source_of(tmp_path, lambda: Net(WRAPPINGS[wrapping]), data())
    with pytest.raises(PnError, match="wrap the network in a module that returns its logits") as raised:
        ANALYSES[name](source)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["compare", "landscape", "sharpness"])
def test_a_network_whose_answer_cannot_be_taken_apart_runs_on_each_example(tmp_path: Path, name: str) -> None:
    few = data(12)
    expected = numbers(ANALYSES[name](source_of(tmp_path, lambda: Net(WRAPPINGS["tensor"]), few, first_head)))
    found = numbers(ANALYSES[name](source_of(tmp_path, lambda: Net(WRAPPINGS["object"]), few, first_head)))
    for variable, values in expected.items():
        np.testing.assert_allclose(found[variable], values, rtol=1e-4, atol=1e-6, err_msg=variable)


def test_an_answer_without_a_prediction_cannot_be_compared(tmp_path: Path) -> None:
    source = source_of(
        tmp_path, lambda: Net(lambda a, b: {"head": a}), data(), lambda o, t: F.cross_entropy(o["head"], t)
    )
    with pytest.raises(PnError, match="w0 returns a dict, in which there is no prediction"):
        ANALYSES["compare"](source)
    assert float(ANALYSES["landscape"](source).loss.min()) > 0


@pytest.mark.parametrize("operator", [pytest.param("ggn", marks=pytest.mark.slow), "fisher"])
def test_operators_take_outputs_in_nests(tmp_path: Path, operator: str) -> None:
    traces = []
    for name, loss in (("tuple", first_head), ("tensor", F.cross_entropy)):
        (tmp_path / name).mkdir()
        source = source_of(tmp_path / name, lambda name=name: Net(WRAPPINGS[name]), data(), loss)
        traces.append(pn.hessian(source, operator=operator, n_hvp=60, dtype="float64", progress=False).trace.values)
    np.testing.assert_allclose(*traces, rtol=1e-6)


def test_targets_may_hold_what_a_loss_needs_beside_them(tmp_path: Path) -> None:
    x, y = data()
    weights = torch.rand(60, generator=torch.Generator().manual_seed(2))

    def weighted(outputs: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
        return (F.cross_entropy(outputs, targets[0], reduction="none") * targets[1]).mean()

    source = source_of(tmp_path, lambda: Net(WRAPPINGS["tensor"]), [(x, (y, weights))], weighted)
    with torch.no_grad():
        expected = [float(weighted(source.model(c)(x), (y, weights))) for c in source.checkpoints]
    np.testing.assert_allclose(ANALYSES["compare"](source).loss.values.ravel(), expected, rtol=1e-5)
    np.testing.assert_allclose(ANALYSES["landscape"](source).loss[0, 0, [0, -1]], expected, rtol=1e-5)
    np.testing.assert_allclose(ANALYSES["sharpness"](source).loss, expected, rtol=1e-5)


class Named(nn.Module):
    """Takes its inputs by keyword, as Hugging Face's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.act, self.head = nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.head(self.act(self.body(x * scale)))


class Paired(Named):
    """The same, for a pair of inputs that comes as one tensor."""

    def forward(self, both: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(both[:, :4], both[:, 4:])


@pytest.mark.parametrize("analysis", ANALYSES.values(), ids=ANALYSES.keys())
def test_inputs_by_name_and_by_position(tmp_path: Path, analysis: Callable[[Source], Any]) -> None:
    x, y = data()
    scale = torch.rand(60, 1, generator=torch.Generator().manual_seed(1)) + 0.5
    cuts = [slice(0, 25), slice(25, 50), slice(50, 60)]
    expected = numbers(analysis(source_of(tmp_path, Paired, [(torch.cat([x, scale], 1)[c], y[c]) for c in cuts])))
    for batches in ([({"x": x[c], "scale": scale[c]}, y[c]) for c in cuts], [((x[c], scale[c]), y[c]) for c in cuts]):
        found = numbers(analysis(source_of(tmp_path, Named, batches)))
        for variable, values in expected.items():
            np.testing.assert_allclose(found[variable], values, rtol=1e-4, atol=1e-6, err_msg=variable)


def test_networks_with_named_inputs_are_aligned(tmp_path: Path) -> None:
    x, y = data()
    source = source_of(tmp_path, Named, [({"x": x, "scale": torch.ones(60, 1)}, y)])
    ds = pn.landscape(source, align=True, n_points=3, progress=False)
    line, aligned = (float(ds.distance.sel(path=path)) for path in ("line", "aligned"))
    assert aligned < line


BAD = {
    "inputs": (
        (torch.randn(40, 7), torch.zeros(40).long()),
        r"the network cannot take these data: inputs of shape \(2, 7\)",
    ),
    "class": (
        (torch.randn(40, 4), torch.full((40,), 9)),
        r"the target 9 is not a class of a network with 3 outputs \(0 to 2\)",
    ),
    "negative class": ((torch.randn(40, 4), torch.full((40,), -1)), "the target -1 is not a class"),
    "targets": ((torch.randn(40, 4), torch.zeros(40, 2)), r"targets of shape \(2, 2\), float32"),
    "whole inputs": ((torch.ones(40, 4).long(), torch.zeros(40).long()), r"inputs of shape \(2, 4\), int64"),
}


@pytest.mark.parametrize(
    ("name", "case"),
    [(name, case) for name in ANALYSES for case in BAD if name != "saturation" or "inputs" in case],
)
def test_data_that_do_not_fit_are_one_sentence_that_says_what(tmp_path: Path, name: str, case: str) -> None:
    examples, message = BAD[case]
    source = source_of(tmp_path, lambda: Net(WRAPPINGS["tensor"]), examples)
    with pytest.raises(PnError, match=message) as raised:
        ANALYSES[name](source)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("case", [case for case in BAD if "inputs" not in case])
def test_saturation_needs_no_targets(tmp_path: Path, case: str) -> None:
    ds = ANALYSES["saturation"](source_of(tmp_path, lambda: Net(WRAPPINGS["tensor"]), BAD[case][0]))
    assert ds.attrs["kind"] == "saturation"


def test_gradients_say_which_data_do_not_fit(tiny_run: Run) -> None:
    wrong = as_source(tiny_run, data=(torch.randn(40, 1, 8, 8), torch.full((40,), 12)))
    with pytest.raises(PnError, match="the target 12 is not a class of a network with 10 outputs"):
        pn.gradient_split(wrong, progress=False)


def test_a_late_target_is_found_too(tmp_path: Path) -> None:
    x, y = data(600)
    y[577] = 5
    source = source_of(tmp_path, lambda: Net(WRAPPINGS["tensor"]), (x, y))
    for name in ("hessian", "compare", "landscape", "sharpness"):
        with pytest.raises(PnError, match="the target 5 is not a class of a network with 3 outputs"):
            ANALYSES[name](source)


def test_what_torch_raises_is_a_sentence_and_what_is_no_fault_of_the_data_passes() -> None:
    with (
        pytest.raises(PnError, match=r"here: the network .* computed with here \(RuntimeError: no kernel, at test_f"),
        clear_errors("here"),
    ):
        raise RuntimeError("no kernel\nand a long trace")
    with pytest.raises(KeyError), clear_errors("here", nn.Linear(2, 2), [(torch.ones(3, 2), torch.zeros(3))]):
        raise KeyError("a mistake of this package")
    with pytest.raises(KeyboardInterrupt), clear_errors("here"):
        raise KeyboardInterrupt
    with pytest.raises(PnError, match="^own$"), clear_errors("here"):
        raise PnError("own")
