"""Text files as blocks of tokens, each with the next token as its target."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pnanalysis as pn
from pnanalysis.errors import DataError
from pnanalysis.inputs.data import TextFile
from pnanalysis.inputs.splits import Split
from pnanalysis.inputs.text import blocks

VOCABULARY = 128


class Bigrams(nn.Module):
    """Logits ``(N, C, T)`` of the next token from the present one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Embedding(VOCABULARY, VOCABULARY)
        self.config = SimpleNamespace(vocab_size=VOCABULARY, max_position_embeddings=64)

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits(ids).transpose(1, 2)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("Beautiful is better than ugly. Explicit is better than implicit.\n" * 4)
    return path


@pytest.mark.parametrize("n", [2, 9, 10, 11, 24])
def test_every_token_but_the_first_is_a_target_once(n: int) -> None:
    ids = torch.arange(n)
    inputs, targets = blocks(ids, 5)
    counted = targets != -100
    assert torch.equal(targets[counted], ids[1:])
    assert torch.equal(inputs[counted], ids[:-1])
    assert inputs.shape == targets.shape == (-(-(n - 1) // 5), 5)


def test_the_loss_is_a_mean_over_tokens_whatever_their_blocks(text: Path) -> None:
    network, raw = Bigrams().double(), torch.tensor(list(text.read_bytes()))
    expected = F.cross_entropy(network(raw[None, :-1])[0].T, raw[1:]).item()
    for tokens in (7, 64):
        split = pn.load_text(text, tokens).train
        assert isinstance(split, Split)
        operator = pn.GGNOperator(network, F.cross_entropy, split.batches(3))
        assert operator.loss() == pytest.approx(expected, rel=1e-12)


def test_a_text_by_name_is_read_for_the_network(text: Path) -> None:
    ds = pn.hessian(Bigrams(), data=TextFile(text, tokens=8), n=4, n_hvp=6, progress=False)
    assert (ds.attrs["n"], ds.attrs["data"]) == (4, "text:text.txt")
    with pytest.raises(DataError, match="blocks of 256 tokens, and the network takes 64; give --tokens"):
        pn.hessian(Bigrams(), data=f"text:{text}", n_hvp=6, progress=False)


def test_tokens_that_the_network_does_not_have_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "umlaut.txt"
    path.write_text("Grüße", encoding="utf-8")
    with pytest.raises(DataError, match="holds token 195, and the network has 128"):
        pn.hessian(Bigrams(), data=f"text:{path}", n_hvp=6, progress=False)


@pytest.mark.parametrize("content", ["", "a"])
def test_a_text_without_anything_to_predict_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "short.txt"
    path.write_text(content)
    with pytest.raises(DataError, match="give more"):
        pn.load_text(path)


def test_a_missing_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no\.txt"):
        pn.load_text(tmp_path / "no.txt")
