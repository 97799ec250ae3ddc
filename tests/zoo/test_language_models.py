"""Language models of transformers from the folders that they are saved in, by the command line and in Python."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import pnanalysis as pn
from pnanalysis.errors import ModelError
from pnanalysis.inputs.data import TextFile
from pnanalysis.inputs.hugging_face import pretrained
from pnanalysis.inputs.splits import Split
from tests.cli.conftest import run

__all__ = ["run"]  # the fixture

pytestmark = pytest.mark.zoo
transformers: Any = pytest.importorskip("transformers")

TOKENS = 12
#: transformers computes losses in float32, whatever the precision of the logits.
SINGLE = 1e-6


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def save(path: Path, vocabulary: int = 256, seed: int = 0, **options: Any) -> Path:
    """A small GPT-2 for bytes."""
    torch.manual_seed(seed)
    sizes = {"n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
    config = transformers.GPT2Config(vocab_size=vocabulary, bos_token_id=0, eos_token_id=0, **sizes)
    transformers.GPT2LMHeadModel(config).save_pretrained(path, **options)
    return path


def save_tokenizer(path: Path) -> None:
    """One token for each word."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(["?", "ugly", "is", "better", "than", "Beautiful", "."])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(path)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("Beautiful is better than ugly.\n" * 5)
    return path


def loss_of_transformers(folder: Path, ids: torch.Tensor) -> float:
    """The mean over next tokens of blocks that overlap by one token, as transformers computes it from labels."""
    network = transformers.GPT2LMHeadModel.from_pretrained(folder).double()
    losses, counts = [], []
    for start in range(0, len(ids) - 1, TOKENS):
        block = ids[None, start : start + TOKENS + 1]
        losses.append(network(input_ids=block, labels=block).loss.item())
        counts.append(block.numel() - 1)
    return sum(x * n for x, n in zip(losses, counts, strict=True)) / sum(counts)


def loss_here(folder: Path, text: Path, tokenizer: Path | None = None) -> float:
    split = pn.load_text(text, TOKENS, tokenizer=tokenizer).train
    assert isinstance(split, Split)
    return pn.HessianOperator(pretrained(folder), F.cross_entropy, split.batches(4), dtype=torch.float64).loss()


def test_the_loss_is_that_of_transformers(tmp_path: Path, text: Path) -> None:
    folder = save(tmp_path / "gpt")
    ids = torch.tensor(list(text.read_bytes()))
    assert loss_here(folder, text) == pytest.approx(loss_of_transformers(folder, ids), rel=SINGLE)


def test_the_tokenizer_of_the_folder_is_used(tmp_path: Path, text: Path) -> None:
    folder = save(tmp_path / "gpt", vocabulary=7)
    save_tokenizer(folder)
    ids = torch.tensor([5, 2, 3, 4, 1, 6] * 5)
    assert loss_here(folder, text, folder) == pytest.approx(loss_of_transformers(folder, ids), rel=SINGLE)
    ds = pn.hessian(f"hf:{folder}", data=TextFile(text, TOKENS), n=None, n_hvp=6, progress=False)
    assert ds.attrs["n"] == 3


def test_tied_weights_count_once_and_shards_are_the_same_network(tmp_path: Path) -> None:
    whole = pretrained(save(tmp_path / "whole"))
    parts = pretrained(save(tmp_path / "parts", max_shard_size="30KB"))
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))
    names = [name for name, _ in whole.named_parameters()]
    assert "transformer.wte.weight" in names
    assert "lm_head.weight" not in names


def test_hessian_on_the_command_line(
    tmp_path: Path, text: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "gpt")
    data = ("--data", f"text:{text}", "--tokens", TOKENS, "--n", 8)
    layer = "transformer.h.0.attn.c_attn"
    done = run("pnanalysis", "hessian", "--model", "hf:gpt", *data, "--n-hvp", 12, "--params", layer, "-o", "a.nc")
    assert (done.status, done.err) == (0, done.err)
    ds = pn.load("a.nc").squeeze("checkpoint")
    split = pn.load_text(text, TOKENS).train
    assert isinstance(split, Split)
    batches = split.subset(8, seed=0).batches(512)
    operator = pn.HessianOperator(pretrained(tmp_path / "gpt"), F.cross_entropy, batches, params=layer)
    v = torch.randn(operator.shape[0], generator=torch.Generator().manual_seed(0))
    for _ in range(30):
        v = operator.matvec(v / v.norm())
    assert (ds.attrs["n"], ds.attrs["model"]) == (8, "GPT2LMHeadModel")
    largest = max(abs(float(ds.lambda_max)), abs(float(ds.lambda_min)))
    assert largest == pytest.approx(float(v.norm()), rel=0.02)


@pytest.mark.parametrize("command", ["saturation", "sharpness", "compare", "landscape"])
def test_other_commands(
    command: str, tmp_path: Path, text: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "a")
    save(tmp_path / "b", seed=1)
    extra = ["--no-hessian"] if command == "compare" else []
    data = ("--data", f"text:{text}", "--tokens", TOKENS, "--n", 4)
    done = run("pnanalysis", command, "hf:a", "hf:b", *data, *extra, "-o", "out.nc", "--quiet")
    assert done.status == 0, done.err
    assert pn.load("out.nc").sizes.get("checkpoint", 2) == 2


def test_weights_that_do_not_fit_the_config_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "gpt")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": 3}))
    with pytest.raises(ModelError, match=r"lacks 'transformer\.h\.2\."):
        pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": 1}))
    with pytest.raises(ModelError, match=r"holds 'transformer\.h\.1\."):
        pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config | {"n_positions": 20}))
    with pytest.raises(ModelError, match=r"transformer\.wpe\.weight|cannot read"):
        pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["Nothing"]}))
    with pytest.raises(ModelError, match="names no network of transformers"):
        pretrained(folder)


def test_the_switches_of_the_user_stay(tmp_path: Path) -> None:
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, dict(os.environ)
    pretrained(save(tmp_path / "gpt"))
    assert (constants.HF_HUB_OFFLINE, dict(os.environ)) == before
