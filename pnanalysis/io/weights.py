"""Weights on disk, read without ever running code from a file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from pnanalysis.errors import ModelError

State = dict[str, torch.Tensor]


def read_weights(path: str | os.PathLike[str]) -> State:
    """Read tensors by name from a safetensors file or a ``torch.save`` file, without ever running code from it.

    Raises
    ------
    ModelError
        If the file is missing, damaged, or holds anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"{path}: no such weights file")
    raw = path.read_bytes()
    if path.suffix == ".safetensors":
        try:
            return load_safetensors(raw)
        except SafetensorError as error:
            disguised = raw[:2] in (b"\x80\x02", b"\x80\x04", b"\x80\x05", b"PK")
            hint = "it is a pickle, which could run code" if disguised else str(error)
            raise ModelError(f"{path}: not a safetensors file ({hint}); refused") from error
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the unpickler makes of bytes that are no such file
        try:
            return load_safetensors(raw)  # under another suffix
        except SafetensorError:
            raise ModelError(
                f"{path}: holds more than plain tensors or is damaged; save model.state_dict() instead"
            ) from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise ModelError(f"{path}: holds no state dict; save model.state_dict()")
    return dict(loaded)
