"""Weight files, read without ever running code from them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from pnanalysis.errors import ModelError, reason

State = dict[str, torch.Tensor]


def read_weights(path: str | os.PathLike[str]) -> State:
    """Read a safetensors file, or a file of plain tensors saved by ``torch.save``.

    Parameters
    ----------
    path : path

    Returns
    -------
    dict of str to Tensor
        On the CPU. Of a checkpoint with a state dict under ``state_dict``, ``model_state_dict`` or ``model``, that.

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
            # Pickles begin with their protocol, the archives of torch.save with the magic number of zip files.
            is_pickle = raw[:2] in (b"\x80\x02", b"\x80\x04", b"\x80\x05", b"PK")
            cause = "it is a pickle, which could run code" if is_pickle else reason(error)
            raise ModelError(f"{path}: refused, it is not a safetensors file ({cause})") from error
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises errors of many types on bytes that it cannot read
        try:
            return load_safetensors(raw)  # a safetensors file under another suffix
        except SafetensorError:
            raise ModelError(
                f"{path}: holds more than plain tensors or is damaged; save model.state_dict() instead"
            ) from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise ModelError(f"{path}: holds no state dict; save model.state_dict() instead")
    return dict(loaded)
