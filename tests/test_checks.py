"""Invalid arguments of every analysis raise an error of one sentence before any work is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import pnanalysis as pn
from pnanalysis.checks import (
    LARGEST_COUNT,
    LARGEST_SEED,
    ascending,
    at_least,
    check_seed,
    one_of,
    positive,
    resolve_dtype,
    shown,
)
from pnanalysis.errors import PnError
from pnanalysis.io.runs import Run

NAN = float("nan")
COUNTS = (0, -3, 2.5, NAN, "many", [1], 2**31, 10**30)
SIZES = (0.0, -1.0, NAN, float("inf"), "wide")
NAMES = ("nonsense", 3)
SEEDS = (-1, 0.5, "x", True, 2**63, 2**70)
COMMON: dict[str, tuple[Any, ...]] = {"n": COUNTS, "batch_size": COUNTS, "seed": SEEDS, "device": NAMES[:1]}
INVALID: dict[Callable[..., Any], dict[str, tuple[Any, ...]]] = {
    pn.hessian: {
        **COMMON, "dtype": ("float16", "int64", None), "n_lanczos": COUNTS, "n_probes": COUNTS, "n_hvp": (*COUNTS, 3),
        "kernel_width": SIZES, "operator": NAMES, "engine": NAMES, "split": NAMES, "bn_mode": NAMES, "amp": NAMES,
        "params": ("nonsense",), "checkpoints": ((), ("nonsense",), (3,)),
    },
    pn.landscape: {
        **COMMON, "dtype": ("float16", None), "n_points": (*COUNTS, 1), "n_steps": COUNTS, "n_bends": COUNTS,
        "n_restarts": COUNTS, "lr": SIZES, "extrapolate": (-1.0, NAN, "far", 1000), "view": NAMES, "bn": NAMES,
        "curve": NAMES, "splits": ((), ("nonsense",)), "span": ((0, 1, 0, 1),), "checkpoints": ((), ("nonsense",)),
    },
    pn.sharpness: {
        **COMMON, "dtype": ("float16", None), "n_steps": (*COUNTS, 1), "n_starts": COUNTS, "split": NAMES,
        "radii": ({}, {"cube": 1.0}, {"ball": 0}, {"ball": NAN}, {"box": "x"}), "checkpoints": ((), ("nonsense",)),
        "average_radii": ({}, {"cube": 1.0}, {"ball": []}), "measures": ((), ("nonsense",)), "method": NAMES,
        "group": COUNTS, "n_directions": (*COUNTS, 1), "layer": ("nonsense",),
    },
    pn.saturation: {
        **COMMON, "bins": COUNTS, "saturation_bins": COUNTS, "exact_limit": (-1, 0.5), "split": NAMES,
        "percentiles": ((), (101.0,), (NAN,), ("x",)), "bin_range": ((1, 1), (2, 1), (NAN, 1), (1,), "wide"),
        "checkpoints": ((), ("nonsense",)),
    },
    pn.compare: {**COMMON, "split": NAMES, "checkpoints": ((), ("nonsense",), ("plain",))},
    pn.functional_distance: {**COMMON, "split": NAMES, "checkpoints": ((), ("nonsense",))},
    pn.gradient_split: {**COMMON, "window": (-1, 0.5, 99), "iterations": ((), (0,), (99,), ("x",)), "split": NAMES},
    pn.trajectory: {
        "n_components": COUNTS, "n_random": COUNTS, "seed": SEEDS, "projections": (("nonsense",),),
        "iterations": ((99,),),
    },
}  # fmt: skip
CASES = [
    pytest.param(analysis, name, value, id=f"{analysis.__name__}-{name}-{value}")
    for analysis, arguments in INVALID.items()
    for name, values in arguments.items()
    for value in values
]


@pytest.mark.parametrize(("analysis", "name", "value"), CASES)
def test_an_invalid_argument_is_one_sentence(
    tiny_run: Run, analysis: Callable[..., Any], name: str, value: Any
) -> None:
    with pytest.raises(PnError) as raised:
        analysis(tiny_run, progress=False, **{name: value})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("span", [(), (1, 1, 0, 1), (0, 1, 1, 0), (NAN,) * 4, (0, 1), "wide"])
@pytest.mark.parametrize("view", ["plane", "random"])
def test_a_span_has_four_ascending_numbers(tiny_run: Run, span: Any, view: str) -> None:
    with pytest.raises(PnError, match="each minimum below its maximum"):
        pn.landscape(tiny_run, view=view, span=span, progress=False)


@pytest.mark.parametrize("analysis", [it for it in INVALID if it is not pn.gradient_split])  # its run has no default
def test_no_run_at_all_is_one_sentence(analysis: Callable[..., Any]) -> None:
    with pytest.raises(PnError) as raised:
        analysis(progress=False)
    assert "\n" not in str(raised.value)


def test_valid_arguments_pass() -> None:
    at_least(1, n=np.int64(1), batch_size=None)
    positive(lr=np.float32(0.1), kernel_width=None, ridge=2)
    ascending("span", [0, 1.5, -2, -1], 4)
    ascending("span", None, 4)
    one_of(["a", "b"], view="b")
    assert resolve_dtype("float64") is torch.float64


def test_a_single_name_is_one_checkpoint(tiny_run: Run) -> None:
    assert list(tiny_run.select("plain")) == ["plain"]


def test_bounds_are_included_and_values_in_messages_are_short() -> None:
    at_least(1, n=LARGEST_COUNT, batch_size=1, epochs=None)
    check_seed(seed=LARGEST_SEED, other=0, third=None)
    check_seed(-LARGEST_SEED, seed=-LARGEST_SEED)
    with pytest.raises(PnError, match=r"^n is 2147483648; it must be at most 2,147,483,647$"):
        at_least(1, n=LARGEST_COUNT + 1)
    with pytest.raises(PnError, match=r"^seed is 9223372036854775808; it must be at most"):
        check_seed(seed=LARGEST_SEED + 1)
    positive(kernel_width=1e100)
    with pytest.raises(PnError, match=r"^kernel_width is 1e\+308; it must be a number above 0 and at most 1e\+100$"):
        positive(kernel_width=1e308)
    assert shown(3) == "3"
    assert len(shown("x" * 10**6)) < 80
    assert shown(10**5000) == "a int that cannot be written out"
