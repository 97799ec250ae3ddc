"""Weights read from their files, slice by slice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pnanalysis.errors import ModelError
from pnanalysis.geometry.flat_weights import FlatWeights
from pnanalysis.io.runs import Checkpoint


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_slices_equal_the_tensors_of_any_type_and_format(tmp_path: Path, dtype: torch.dtype, suffix: str) -> None:
    state = {"a": torch.randn(5, 7).to(dtype), "steps": torch.tensor(3), "b": torch.randn(4).to(dtype)}
    path = tmp_path / f"w.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    weights = FlatWeights(Checkpoint("w", path), ["a", "b"])
    assert torch.equal(weights.read("a", 3, 30), state["a"].ravel()[3:30].double())
    assert torch.equal(weights.read("b", 0, 4), state["b"].double())
    with pytest.raises(ModelError, match="another architecture"):
        FlatWeights(Checkpoint("w", path), ["c"])


def test_damaged_files_raise_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.randn(50)}, path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ModelError, match="cut short"):
        FlatWeights(Checkpoint("w", path), ["a"]).read("a", 0, 50)
    path.write_bytes(b"not weights at all")
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        FlatWeights(Checkpoint("w", path), ["a"])


@pytest.mark.parametrize(
    "header",
    [[], {"w": {"dtype": "F32", "shape": [2], "data_offsets": [-100, -92]}},
     {"w": {"dtype": "F32", "shape": [2], "data_offsets": []}},
     {"w": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 8]}}],
)  # fmt: skip
def test_a_strangers_header_is_refused(header: object, tmp_path: Path) -> None:
    raw = json.dumps(header).encode()
    file = tmp_path / "epoch000.safetensors"
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(8))
    with pytest.raises(ModelError):
        FlatWeights(Checkpoint("start", file), ["w"])


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_complex_tensors_are_read_as_pairs_of_real_numbers(tmp_path: Path, suffix: str) -> None:
    state = {"a": torch.randn(5, 7, dtype=torch.complex64), "b": torch.randn(4)}
    path = tmp_path / f"w.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    weights = FlatWeights(Checkpoint("w", path), ["a", "b"])
    assert weights.shapes["a"] == (5, 7, 2)
    assert torch.equal(weights.read("a", 3, 30), torch.view_as_real(state["a"]).ravel()[3:30].double())
    assert torch.equal(weights.read("b", 1, 4), state["b"][1:].double())
