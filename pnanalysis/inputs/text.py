"""Text files as data of language models: blocks of tokens, each with the next token as its target."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pnanalysis.checks import at_least
from pnanalysis.errors import DataError
from pnanalysis.inputs.batches import IGNORED
from pnanalysis.inputs.data import TEXT, Splits, TextFile, as_splits
from pnanalysis.inputs.hugging_face import encoded
from pnanalysis.inputs.splits import Split
from pnanalysis.io.files import read_regular

_LARGEST_FILE = 2**28  # bytes


def splits_for(network: nn.Module, text: TextFile) -> Splits:
    """A text file as data of a network: by the tokenizer that belongs to it, or as bytes.

    Raises
    ------
    DataError
        Also if the network has fewer tokens or positions than the text.
    """
    splits = load_text(text.path, text.tokens, tokenizer=getattr(network, "tokenizer_folder", None))
    if isinstance(splits.train, Split):
        check_fits(getattr(network, "config", None), splits.train.inputs, str(text.path))
    return splits


def load_text(
    path: str | os.PathLike[str], tokens: int = TextFile.tokens, *, tokenizer: str | os.PathLike[str] | None = None
) -> Splits:
    """A text file as data: blocks of tokens ``(N, T)`` with the next tokens as targets ``(N, T)``.

    The network's outputs should be logits ``(N, C, T)``, as torch's cross-entropy takes them; the loss is then a mean
    over tokens. Blocks follow each other without overlap. The last one may be shorter: it is filled up with zeros at
    its end, whose targets are -100, which do not count in the loss.

    Parameters
    ----------
    path : path
    tokens : int
        Length of blocks, ``T``.
    tokenizer : path, optional
        Folder with the tokenizer of a model of transformers. Without one a token is a byte, from 0 to 255.

    Returns
    -------
    Splits
        With all blocks as ``train``.

    Raises
    ------
    DataError
        If the file cannot be read, or has fewer than two tokens.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     written = Path(folder, "a.txt").write_text("abcdef")
    ...     split = load_text(Path(folder, "a.txt"), tokens=3).train
    >>> split.inputs.tolist(), split.targets.tolist()
    ([[97, 98, 99], [100, 101, 0]], [[98, 99, 100], [101, 102, -100]])
    """
    at_least(1, tokens=tokens)
    path = Path(path)
    raw = read_regular(path, _LARGEST_FILE, DataError)
    ids = _bytes(raw) if tokenizer is None else torch.tensor(encoded(Path(tokenizer), _decoded(raw, path)))
    if len(ids) < 2:
        raise DataError(f"{path}: has {len(ids)} tokens; each is to be predicted from those before it, so give more")
    return as_splits(blocks(ids.long(), tokens), f"{TEXT}{path.name}")


def blocks(ids: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Tokens ``(L,)`` as inputs and targets ``(N, T)``, each target the token after its input."""
    n = -(-(len(ids) - 1) // tokens)
    fill = n * tokens - (len(ids) - 1)
    inputs, targets = F.pad(ids[:-1], (0, fill)), F.pad(ids[1:], (0, fill), value=IGNORED)
    return inputs.view(n, tokens), targets.view(n, tokens)


def check_fits(config: Any, inputs: Tensor, origin: str) -> None:
    """Refuse tokens or positions that a network does not have, as its config says; nothing without one.

    Raises
    ------
    DataError
    """
    size, length = (getattr(config, name, None) for name in ("vocab_size", "max_position_embeddings"))
    if isinstance(size, int) and int(inputs.max()) >= size:
        raise DataError(
            f"{origin}: holds token {int(inputs.max())}, and the network has {size}; save its own tokenizer beside it, "
            "or without one give it 256 tokens for the bytes"
        )
    if isinstance(length, int) and inputs.shape[1] > length:
        raise DataError(f"{origin}: blocks of {inputs.shape[1]} tokens, and the network takes {length}; give --tokens")


def _bytes(raw: bytes) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0)


def _decoded(raw: bytes, path: Path) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not text in UTF-8 (byte {error.start}); save it in this encoding") from error
