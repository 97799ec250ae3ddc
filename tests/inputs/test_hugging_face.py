"""What is refused in folders of Hugging Face's libraries before anything in them is used."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from pnanalysis.errors import DataError, ModelError
from pnanalysis.inputs.hugging_face import encoded, folder_of
from pnanalysis.inputs.models import build_model


def folder(path: Path, weights: str = "model.safetensors", **config: Any) -> str:
    """A folder with this config and an empty file of weights, as the name of a model."""
    (path / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"]} | config))
    (path / weights).touch()
    return f"hf:{path}"


def test_names_of_folders() -> None:
    assert folder_of("hf:a/b") == folder_of(Path("hf:a/b")) == Path("a/b")
    assert folder_of("hf") is folder_of("a/hf:b") is folder_of(None) is folder_of(3) is None


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder; nothing is fetched"):
        build_model(f"hf:{tmp_path}/openai-community/gpt2")


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        build_model(f"hf:{tmp_path}")


@pytest.mark.parametrize("content", ["{", "[1]", "[" * 100_000])
def test_a_damaged_config_is_refused(tmp_path: Path, content: str) -> None:
    name = folder(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match="copy it again"):
        build_model(name)


def test_code_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "modeling.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelError, match=r"code of its own \(auto_map\)"):
        build_model(folder(tmp_path, auto_map={"AutoModelForCausalLM": "modeling.Model"}))


def test_code_of_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["t.T", None]}}))
    with pytest.raises(DataError, match=r"code of its own \(auto_map\)"):
        encoded(tmp_path, "text")


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="quantised"):
        build_model(folder(tmp_path, quantization_config={"bits": 4}))


def test_pickles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no safetensors"):
        build_model(folder(tmp_path, weights="pytorch_model.bin"))


@pytest.mark.parametrize(
    ("shard", "message"), [("../model.safetensors", "own folder"), ("gone.safetensors", "missing")]
)
def test_shards_elsewhere_or_missing_are_refused(tmp_path: Path, shard: str, message: str) -> None:
    name = folder(tmp_path, weights="model.safetensors.index.json")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"wte.weight": shard}}))
    with pytest.raises(ModelError, match=message):
        build_model(name)


def test_without_transformers_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelError, match="pip install 'transformers"):
        build_model(folder(tmp_path))
