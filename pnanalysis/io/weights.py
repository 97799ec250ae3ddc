"""Weight files, read without ever running code from them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from pnanalysis.errors import ModelError, reason
from pnanalysis.io.digest import check_entry
from pnanalysis.io.files import open_regular, read_regular
from pnanalysis.io.unpickling import Inert, unpickled

State = dict[str, Tensor]
#: State dicts by the keys under which a file holds them, joined by dots; "" where it is one itself.
StateDicts = dict[str, State]

INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json")
#: What a folder of weights holds, by the names that libraries give these files; the first that is there counts.
_IN_FOLDERS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
)
_LARGEST_INDEX = 2**27  # bytes
_MAX_DEPTH = 4  # of state dicts within a checkpoint
_SAVE_ALONE = "where you trust it, load it and save its state dict alone: torch.save(model.state_dict(), ...)"


def read_state_dicts(path: str | os.PathLike[str], within: Path | None = None) -> StateDicts:
    """Read weights: a safetensors file, a file saved by ``torch.save``, or the index of a sharded checkpoint.

    Parameters
    ----------
    path : path
        Or a folder that holds one of these: see :func:`weights_file`.
    within : Path, optional
        The run to which the file belongs: see :func:`pnanalysis.io.files.open_regular`.

    Returns
    -------
    dict of str to dict of str to Tensor
        Every state dict in the file, on the CPU, by the key under which it is ("" where the file holds nothing else).
        Checkpoints of training hold several things: those that are no state dicts, and optimizers, are left out.

    Raises
    ------
    ModelError
        If the file is missing, damaged, or holds no state dict.
    """
    path = weights_file(path)
    return {"": _merged(path)} if is_index(path) else _read(path, within)


def read_weights(path: str | os.PathLike[str]) -> State:
    """The state dict in a file that holds a single one: see :func:`read_state_dicts`."""
    return sole(read_state_dicts(path), path)


def sole(found: StateDicts, origin: str | os.PathLike[str]) -> State:
    """The state dict where there is one.

    Raises
    ------
    ModelError
        If there are several.
    """
    if len(found) > 1:
        raise ModelError(f"{origin}: holds several state dicts ({', '.join(found)}); save the one you mean alone")
    return next(iter(found.values()))


def weights_file(path: str | os.PathLike[str]) -> Path:
    """The file itself, or the one that a folder of weights holds under the name that Hugging Face's libraries give it.

    Raises
    ------
    ModelError
        If there is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise ModelError(f"{path}: no such weights file")
    for name in _IN_FOLDERS:
        if (path / name).is_file():
            return path / name
    raise ModelError(f"{path}: a folder without weights ({', '.join(_IN_FOLDERS)}); name the file itself")


def holds_weights(path: Path) -> bool:
    """Whether a path is a folder of weights."""
    return any((path / name).is_file() for name in _IN_FOLDERS)


def is_index(path: Path) -> bool:
    """Whether a file lists the shards of a checkpoint."""
    return path.name.endswith(INDEX_SUFFIXES)


def shards(path: Path) -> dict[Path, list[str]]:
    """The files that an index lists, and the tensors to take from each.

    Raises
    ------
    ModelError
        If the index is damaged, or names a file outside of its folder.
    """
    try:
        names = json.loads(read_regular(path, _LARGEST_INDEX, ModelError))["weight_map"]
        found: dict[Path, list[str]] = {}
        for tensor, file in names.items():
            if Path(file).name != file:
                raise ModelError(f"{path}: names {file!r}, which is not in its own folder")
            found.setdefault(path.with_name(file), []).append(str(tensor))
    except ModelError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path}: not a readable index of weights ({reason(error)}); copy it again") from error
    for file in found:
        if not file.is_file():
            raise ModelError(f"{file}: is missing, though {path.name} lists it; copy it again")
    return found


def state_dicts(content: Mapping[Any, Any], depth: int = _MAX_DEPTH) -> StateDicts:
    """Every state dict in nested mappings, by its keys joined by dots; without those of optimizers."""
    if is_state_dict(content):
        return {"": content}  # type: ignore[dict-item]  # the mapping itself, with the versions that torch adds to it
    found: StateDicts = {}
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, Mapping) and depth and "optim" not in key.lower():
            inner = state_dicts(value, depth - 1)
            found |= {".".join(filter(None, (key, below))): state for below, state in inner.items()}
    return found


def is_state_dict(item: Mapping[Any, Any]) -> bool:
    """Whether a mapping holds tensors by name, and nothing else but extra state of modules."""
    return any(isinstance(value, Tensor) for value in item.values()) and all(
        isinstance(name, str) and (isinstance(value, Tensor) or is_extra_state(name)) for name, value in item.items()
    )


def is_extra_state(name: str) -> bool:
    """Whether this is what a module adds to its state dict besides tensors."""
    return name.rpartition(".")[2] == "_extra_state"


def _read(path: Path, within: Path | None = None) -> StateDicts:
    """The state dicts of one file."""
    if path.suffix == ".safetensors":
        return {"": _read_safetensors(path, within)}
    with open_regular(path, ModelError, within):
        pass  # is a file, and not a pipe that would make its reader wait
    try:
        loaded = unpickled(path)
    except ModelError:
        raise
    except Exception as error:  # the unpickler raises errors of many types on bytes that it cannot read
        try:
            return {"": load_safetensors(path.read_bytes())}  # a safetensors file under another suffix
        except SafetensorError:
            raise ModelError(
                f"{path}: holds more than plain tensors or is damaged, and nothing is read that could run code; "
                + _SAVE_ALONE
            ) from error
    return found_in(loaded, path)


def found_in(loaded: Any, path: Path) -> StateDicts:
    """The state dicts in what a file held.

    Raises
    ------
    ModelError
        If there are none.
    """
    if not isinstance(loaded, Mapping):
        what = "a pickled object, which could run code, and" if isinstance(loaded, Inert) else "no tensors by name and"
        raise ModelError(f"{path}: holds {what} no state dict; {_SAVE_ALONE}")
    found = state_dicts(loaded)
    if found:
        return found
    if any(isinstance(value, Tensor) for value in loaded.values()):
        other, value = next((name, value) for name, value in loaded.items() if not isinstance(value, Tensor))
        quantised = ", as quantised networks do; give the weights before quantisation" if "packed" in str(other) else ""
        raise ModelError(
            f"{path}: holds no state dict, for {other!r} is a {type(value).__name__}{quantised or '; leave it out'}"
        )
    pickled = [key for key, value in loaded.items() if isinstance(value, Inert)]
    also = f" ({pickled[0]!r} is a pickled object, which could run code)" if pickled else ""
    raise ModelError(f"{path}: holds no state dict{also}; {_SAVE_ALONE}")


def check_digest(path: Path, within: Path | None = None) -> bool:
    """Whether a safetensors file holds a digest that confirms its content, without having it in memory.

    Raises
    ------
    ModelError
        If the digest contradicts the content, or the file cannot be read.
    """
    with open_regular(path, ModelError, within) as file:
        return check_entry(file, path, ModelError)


def _read_safetensors(path: Path, within: Path | None) -> State:
    with open_regular(path, ModelError, within) as file:
        check_entry(file, path, ModelError)
        file.seek(0)
        raw = file.read()
    try:
        return load_safetensors(raw)
    except (SafetensorError, KeyError, RuntimeError, TypeError, ValueError, OverflowError) as error:
        # Pickles begin with their protocol, the archives of torch.save with the magic number of zip files.
        is_pickle = raw[:2] in (b"\x80\x02", b"\x80\x04", b"\x80\x05", b"PK")
        cause = "it is a pickle, which could run code" if is_pickle else reason(error)
        raise ModelError(f"{path}: refused, it is not a safetensors file ({cause})") from error


def _merged(index: Path) -> State:
    """The tensors of all shards."""
    state: State = {}
    for file, names in shards(index).items():
        held = _read(file).get("", {})
        missing = [name for name in names if name not in held]
        if missing:
            raise ModelError(f"{file}: lacks {missing[0]!r}, which {index.name} lists; copy it again")
        state |= {name: held[name] for name in names}
    return state
