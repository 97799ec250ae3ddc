"""Networks, state dicts and weight files of a user's own as a source of checkpoints."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Number
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pnanalysis.errors import DataError, ModelError
from pnanalysis.inputs.data import DataLike, Splits
from pnanalysis.inputs.hugging_face import folder_of, pretrained
from pnanalysis.inputs.models import Loss, ModelLike, new_model, resolve_loss
from pnanalysis.inputs.sources import AnyCheckpoint, MemoryCheckpoint, PathLike, Source, name_of
from pnanalysis.io.runs import Checkpoint
from pnanalysis.io.weights import INDEX_SUFFIXES, is_state_dict, state_dicts, weights_file


def open_files(
    model: ModelLike,
    weights: Sequence[PathLike],
    data: DataLike | None = None,
    loss: str | Loss = "cross_entropy",
    label: str = "model",
) -> Source:
    """The source of a user's own model and weight files.

    Parameters
    ----------
    model : str, Module or callable
        Registered name, ``module:factory``, ``hf:DIR``, an instance, or a callable that returns one.
    weights : sequence of paths
        See :func:`pnanalysis.io.weights.read_state_dicts`. None are needed for ``hf:DIR``, whose folder holds them.
    data, loss
        See :func:`as_sources`.
    label : str

    Raises
    ------
    ModelError
        If there are no weight files, or one is missing.
    """
    if not weights and folder_of(model) is not None:  # its folder holds them
        return source_of_networks([(None, model)], None, data, loss, str(model) if label == "model" else label)
    if not weights:
        raise ModelError("no weights given: name at least one file of weights")
    label = label if label != "model" or not isinstance(model, str) else model
    return source_of_networks([(None, path) for path in weights], model, data, loss, label)


def source_of_networks(
    networks: Sequence[tuple[str | None, Any]],
    model: ModelLike | None,
    data: DataLike | None,
    loss: str | Loss | None,
    label: str = "networks",
) -> Source:
    """One source of networks, state dicts and weight files, by the names they were given or names of their own."""
    checkpoints = [_as_checkpoint(item, name) for name, (_, item) in zip(_names(networks), networks, strict=True)]
    loaded = [checkpoint.network for checkpoint in checkpoints if isinstance(checkpoint, MemoryCheckpoint)]
    held = [network for network in loaded if network is not None]
    if model is None and not held:
        raise ModelError("weights need the network that they belong to; give model=...")
    if len(held) == len(checkpoints):
        model = None  # every checkpoint brings its own

    def make_data() -> Splits:
        if data is None:
            raise DataError("no data given: name a data set with --data (data=... in Python)")
        return source.splits_of(data)

    kinds = ", ".join(dict.fromkeys(type(network).__name__ for network in held))
    source = Source(
        label=label,
        checkpoints=checkpoints,
        make_model=lambda: new_model(held[0] if model is None else model),
        make_data=make_data,
        make_loss=lambda: resolve_loss(loss or "cross_entropy"),
        attrs={"model": kinds if model is None else name_of(model), "loss": name_of(loss or "cross_entropy")},
    )
    return source


def _names(networks: Sequence[tuple[str | None, Any]]) -> list[str]:
    """A name for each: the one it was given, a file's stem, or ``network`` with a number.

    Raises
    ------
    ModelError
        If two were given the same name, or one file twice.
    """
    paths = [item.path if isinstance(item, Checkpoint) else item for _, item in networks]
    paths = [folder_of(path) or path for path in paths]
    files = [Path(path) for (name, _), path in zip(networks, paths, strict=True) if name is None and is_path(path)]
    twice = [path for i, path in enumerate(files) if path in files[:i]]
    if twice:
        raise ModelError(f"{twice[0]}: is named twice")
    stems = iter(_short_names(files))
    n_unnamed = sum(name is None and not is_path(path) for (name, _), path in zip(networks, paths, strict=True))
    numbered = iter([f"network {i + 1}" for i in range(n_unnamed)] if n_unnamed > 1 else ["network"])
    names = [
        name or (next(stems) if is_path(path) else next(numbered))
        for (name, _), path in zip(networks, paths, strict=True)
    ]
    same = [name for i, name in enumerate(names) if name in names[:i]]
    if same:
        raise ModelError(f"two networks are called {same[0]!r}; give each a name of its own, in a mapping")
    return names


def _short_names(files: list[Path]) -> list[str]:
    """File stems where they are distinct, else with as many parent folders as it takes."""
    for depth in range(1, 6):
        names = ["/".join(_without_suffix(path).parts[-depth:]) for path in files]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in files]


def _without_suffix(path: Path) -> Path:
    """Without what tells the format; folders have no suffix, even if their names have dots."""
    index = next((suffix for suffix in INDEX_SUFFIXES if path.name.endswith(suffix)), None)
    if index:
        return path.with_name(path.name.removesuffix(index))
    return path if path.is_dir() else path.with_suffix("")


def _as_checkpoint(item: Any, name: str) -> AnyCheckpoint:
    if isinstance(item, nn.Module):
        return MemoryCheckpoint(name, network=item)
    if isinstance(item, Mapping) and is_weights(item):
        return MemoryCheckpoint(name, state=item)
    if isinstance(item, Checkpoint):
        return replace(item, name=name)
    folder = folder_of(item)
    if folder is not None:
        return MemoryCheckpoint(name, network=pretrained(folder))
    if is_path(item):
        return Checkpoint(name, weights_file(item))
    raise ModelError(
        f"{name}: a {type(item).__name__} is no run, network, state dict or weights file; "
        "give one of these, or a mapping or list of them"
    )


def is_weights(item: Mapping[Any, Any] | nn.ModuleDict) -> bool:
    """Whether a mapping is a state dict, or a checkpoint of training with one in it, and not one of networks by name.

    Those of training also hold counters, or the state of an optimizer.
    """
    if isinstance(item, nn.ModuleDict):
        return False
    if is_state_dict(item):
        return True
    of_training = any(
        value is None
        or isinstance(value, Number)
        or "optim" in str(key).lower()
        or (isinstance(value, Mapping) and "param_groups" in value)
        for key, value in item.items()
    )
    return of_training and bool(state_dicts(item))


def is_path(item: Any) -> bool:
    return isinstance(item, str | os.PathLike)


def check_no_mixed_state(item: Mapping[Any, Any] | nn.ModuleDict) -> None:
    """Refuse a mapping of which some entries are tensors: a state dict with other things in it.

    Raises
    ------
    ModelError
    """
    tensors = [isinstance(value, Tensor) for value in item.values()]
    if any(tensors):
        other, value = next((key, value) for key, value in item.items() if not isinstance(value, Tensor))
        raise ModelError(f"a state dict holds tensors only, but {other!r} is a {type(value).__name__}; leave it out")
