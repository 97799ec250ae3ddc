"""What an analysis looks at: a model, checkpoints of it and data, from a run or from a user's own files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pnanalysis.errors import DataError, ModelError
from pnanalysis.inputs.data import LoaderSplit, Split, Splits, as_splits, load_data
from pnanalysis.inputs.models import Loss, build_model, load_weights, resolve_loss
from pnanalysis.inputs.registry import DATASETS, registered
from pnanalysis.io.runs import Checkpoint, Run, open_run


@dataclass
class Source:
    """A model factory, checkpoints, data and loss under one roof. Made by :func:`as_source` or :func:`open_files`.

    Attributes
    ----------
    label : str
        Name of the run or model in datasets and figures.
    checkpoints : list of Checkpoint
    attrs : dict
        Identity to write on datasets: run id, model, data.
    run : Run or None
    data_key : str
        Equal for sources that would load the same data in the same shape; empty where that is not known.
    """

    label: str
    checkpoints: list[Checkpoint]
    make_model: Callable[[], nn.Module]
    make_data: Callable[[], Splits]
    make_loss: Callable[[], Loss]
    attrs: dict[str, Any] = field(default_factory=dict)
    run: Run | None = None
    data_key: str = ""

    @cached_property
    def data(self) -> Splits:
        """The data set; loaded once."""
        return self.make_data()

    def share_data(self, other: Source) -> None:
        """Use what ``other`` has loaded where it is the same, in place of loading it again."""
        if self.data_key and self.data_key == other.data_key:
            self.__dict__.setdefault("data", other.data)

    @property
    def loss(self) -> Loss:
        """The loss, ``loss(outputs, targets)``."""
        return self.make_loss()

    def select(self, names: Iterable[str] | None) -> dict[str, Checkpoint]:
        """Checkpoints by name (see :meth:`pnanalysis.io.runs.Run.select`); a user's own files by file name.

        ``None`` stands for plain and champion of a run, and for all of a user's own files.
        """
        if self.run is not None:
            return self.run.select(("plain", "champion") if names is None else names)
        by_name = {checkpoint.name: checkpoint for checkpoint in self.checkpoints}
        chosen = list(by_name if names is None or list(names) == ["all"] else names)
        missing = [name for name in chosen if name not in by_name]
        if missing:
            raise ModelError(f"no weights named {missing[0]!r}; there are {', '.join(by_name)}")
        if not chosen:
            raise ModelError(f"no weights are named; there are {', '.join(by_name)}")
        return {name: by_name[name] for name in chosen}

    def model(self, checkpoint: Checkpoint, device: torch.device | str = "cpu") -> nn.Module:
        """The network with the checkpoint's weights, in eval mode on the device."""
        model = load_weights(self.make_model(), checkpoint.load(), str(checkpoint.path))
        return model.to(device).eval()

    def check(self, chosen: Mapping[str, Checkpoint]) -> None:
        """Try the weights of all of a user's own files, before long work on the first begins.

        Raises
        ------
        ModelError
            If some cannot be read or do not fit the model.
        """
        if self.run is None and len(chosen) > 1:
            for checkpoint in chosen.values():
                self.model(checkpoint)

    def split(self, name: str, n: int | None, seed: int, device: torch.device | str) -> Split | LoaderSplit:
        """``n`` examples of a split, drawn by seed, on the device; fewer if there are fewer."""
        part = self.data.get(name)
        if isinstance(part, Split) and part.inputs.is_floating_point() and not part.inputs.isfinite().all():
            raise DataError(f"{self.data.name}: some of the {name} inputs are not finite; mend or leave them out")
        return part.subset(min(n, len(part)) if n is not None and isinstance(part, Split) else n, seed).to(device)

    def dataset_attrs(self) -> dict[str, Any]:
        """Identity of run and data for a dataset's attributes; call it once the data are loaded."""
        return {**self.attrs, "data": self.data.name, "data_fingerprint": self.data.fingerprint}


def as_source(
    run: Run | Source | str | os.PathLike[str],
    model: str | nn.Module | None = None,
    data: Any = None,
    loss: str | Loss | None = None,
) -> Source:
    """A source from a run (or its path).

    Parameters
    ----------
    run : Run, Source or path
    model, data, loss : optional
        Override what the manifest names. Runs of a user's own model or data need them, since a manifest
        is never trusted to name code.

    Raises
    ------
    ModelError, DataError
        If the run names code instead of a registered model or data set, and no override is given.
    """
    if isinstance(run, Source):
        return run
    run = run if isinstance(run, Run) else open_run(run)
    manifest = run.manifest
    spec, options = manifest["model"]["name"], manifest["model"].get("options", {})
    if model is None and ":" in spec:
        raise ModelError(f"{run.path}: was trained with the model {spec}; vouch for that code with --model {spec}")
    data_spec = manifest["data"]["name"]
    named = data is None or isinstance(data, str)

    def make_model() -> nn.Module:
        if model is None:
            return build_model(spec, options)
        return deepcopy(model) if isinstance(model, nn.Module) else build_model(model, options if model == spec else {})

    def make_data() -> Splits:
        if data is None and not _is_registered(data_spec):
            raise DataError(f"{run.path}: was trained on {data_spec or 'no data set'}; give the data with --data")
        shape, seed = getattr(make_model(), "input_shape", None), manifest["data"].get("split_seed", 0)
        splits = load_data(data or data_spec, shape, seed) if isinstance(data or data_spec, str) else as_splits(data)
        recorded = manifest["data"].get("fingerprint")
        if data is None and recorded and splits.fingerprint != recorded:
            raise DataError(
                f"{data_spec}: has changed since {run.path} was trained "
                f"(fingerprint {splits.fingerprint}, then {recorded})"
            )
        return splits

    def make_loss() -> Loss:
        named = manifest.get("loss", "cross_entropy")
        if loss is None and ":" in named:
            raise ModelError(f"{run.path}: was trained with the loss {named}; vouch for that code with --loss {named}")
        return resolve_loss(loss or named)

    return Source(
        label=run.path.name,
        checkpoints=run.checkpoints,
        make_model=make_model,
        make_data=make_data,
        make_loss=make_loss,
        attrs={
            "run": run.path.name,
            "run_id": run.id,
            "recipe": manifest["recipe"],
            "model": _name(model or spec),
            "loss": _name(loss or manifest.get("loss", "cross_entropy")),
        },
        run=run,
        data_key=json.dumps([manifest["model"], manifest["data"], data]) if model is None and named else "",
    )


def as_sources(runs: Iterable[Run | Source | str | os.PathLike[str]]) -> list[Source]:
    """A source from each run, with labels that tell them apart: one that is given twice is numbered."""
    sources = [as_source(run) for run in runs]
    labels = [source.label for source in sources]
    return [
        replace(source, label=f"{source.label}#{i + 1}") if labels.count(source.label) > 1 else source
        for i, source in enumerate(sources)
    ]


def check_same_data(first: Source, other: Source, names: tuple[str, str] | None = None) -> None:
    """Refuse to lay networks side by side that were trained on different data, or on other halves of the same.

    Raises
    ------
    DataError
        It calls the two by ``names``, or by their labels.
    """
    a, b = first.data, other.data
    one, two = names or (first.label, other.label)
    if a.fingerprint != b.fingerprint:
        raise DataError(
            f"{one} and {two} are of different data sets ({a.name} {a.fingerprint}, {b.name} "
            f"{b.fingerprint}): compare networks on one, given with --data"
        )
    if a.split_hash != b.split_hash:
        raise DataError(
            f"{one} and {two} were trained with different validation and test halves of {a.name}: "
            "what one was picked by would test the other; train both with one --split-seed"
        )


def open_files(
    model: str | nn.Module | Callable[[], nn.Module],
    weights: Sequence[str | os.PathLike[str]],
    data: Any = None,
    loss: str | Loss = "cross_entropy",
    label: str = "model",
) -> Source:
    """A source from a user's own model and weight files.

    Parameters
    ----------
    model : str, Module or callable
        Registered name, ``module:factory``, an instance, or a callable that returns one.
    weights : sequence of paths
        safetensors files, or ``torch.save`` files that hold nothing but tensors.
    data : str or object
        Registered name, ``module:factory``, or anything :func:`pnanalysis.inputs.data.as_splits` understands.
    loss : str or callable
        ``loss(outputs, targets)``, averaged over the batch.

    Raises
    ------
    ModelError
        If there are no weight files, or one is missing.
    """
    files = [Path(path) for path in weights]
    if not files:
        raise ModelError("no weights given: name at least one file of weights")
    missing = [path for path in files if not path.is_file()]
    if missing:
        raise ModelError(f"{missing[0]}: no such weights file")
    twice = [path for i, path in enumerate(files) if path in files[:i]]
    if twice:
        raise ModelError(f"{twice[0]}: is named twice")
    names = _short_names(files)

    def make_model() -> nn.Module:
        if isinstance(model, nn.Module):
            return deepcopy(model)  # the user's own keeps its weights
        return build_model(model) if isinstance(model, str) else model()

    def make_data() -> Splits:
        if data is None:
            raise DataError("no data given: name a data set with --data")
        shape = getattr(make_model(), "input_shape", None)
        return load_data(data, shape) if isinstance(data, str) else as_splits(data)

    return Source(
        label=label if label != "model" or not isinstance(model, str) else model,
        checkpoints=[Checkpoint(name, path) for name, path in zip(names, files, strict=True)],
        make_model=make_model,
        make_data=make_data,
        make_loss=lambda: resolve_loss(loss),
        attrs={"model": _name(model), "loss": _name(loss)},
    )


def _name(given: Any) -> str:
    """What a model or loss is called in attributes; objects are told apart from whatever has a name."""
    return given if isinstance(given, str) else f"own {type(given).__name__} {id(given):x}"


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device to work on; ``auto`` or ``None`` takes CUDA where there is one.

    Raises
    ------
    ModelError
        If CUDA is asked for where there is none, or the name is not a device.
    """
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"{device!r} is not a device; use cpu, cuda or cuda:N") from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ModelError("no CUDA device here; use --device cpu")
    return resolved


def _is_registered(spec: str) -> bool:
    return spec.partition(":")[0] in registered(DATASETS)


def _short_names(files: list[Path]) -> list[str]:
    """File stems where they are distinct, else with as many parent folders as it takes."""
    for depth in range(1, 6):
        names = ["/".join(path.with_suffix("").parts[-depth:]) for path in files]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in files]
