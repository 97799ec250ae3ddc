"""Sources of checkpoints: a run, weight files or networks in memory, with their model, data and loss."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from pnanalysis.errors import DataError, ModelError
from pnanalysis.inputs.copies import copied, in_precision, unwrapped
from pnanalysis.inputs.data import DataLike, LoaderSplit, Split, Splits, as_splits, load_data, text_file
from pnanalysis.inputs.loading import check_finite, check_has_values, load_weights
from pnanalysis.inputs.models import LOSSES, Loss, ModelLike, new_model, resolve_loss
from pnanalysis.inputs.registry import DATASETS, registered
from pnanalysis.inputs.text import splits_for
from pnanalysis.io.runs import Checkpoint, Run, open_run
from pnanalysis.io.weights import StateDicts, state_dicts

PathLike = str | os.PathLike[str]


@dataclass(frozen=True, eq=False)
class MemoryCheckpoint:
    """A network or a state dict in memory: the counterpart of a `Checkpoint` on disk.

    Attributes
    ----------
    name : str
    network : Module or None
        Its architecture and weights; ``None`` where only ``state`` is given.
    state : dict or None
        Tensors by name, or nested mappings with such a dict in them, as training saves them.
    iteration, epoch : int
        Always -1: it belongs to no run.
    """

    name: str
    network: nn.Module | None = None
    state: Mapping[str, Any] | None = None
    iteration: int = -1
    epoch: int = -1

    @property
    def origin(self) -> str:
        """How messages refer to it."""
        return f"network {self.name!r}"

    @property
    def identity(self) -> object:
        """Equal for two checkpoints that are the same object in memory."""
        return id(self.network if self.network is not None else self.state)

    def state_dicts(self) -> StateDicts:
        """The network's state dict, or those in ``state``; the caller's own tensors, not copies."""
        if self.network is None:
            return state_dicts(self.state or {})
        network = unwrapped(self.network)
        check_has_values(network, self.origin)
        return {"": network.state_dict()}


AnyCheckpoint = Checkpoint | MemoryCheckpoint


@dataclass
class Source:
    """Checkpoints with the model, data and loss they belong to. Made by :func:`as_sources` or :func:`open_files`.

    Attributes
    ----------
    label : str
        Name of the run or model in datasets and figures.
    checkpoints : list of Checkpoint or MemoryCheckpoint
    make_model, make_data, make_loss : callable
        Factories, called when their product is first needed.
    attrs : dict
        Identity to write on datasets: run id, model, loss.
    run : Run or None
    data_key : str
        Equal for sources that would load the same data in the same shape; empty where that is not known.
    """

    label: str
    checkpoints: Sequence[AnyCheckpoint]
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

    @property
    def loss(self) -> Loss:
        """The loss, ``loss(outputs, targets)``."""
        return self.make_loss()

    @cached_property
    def template(self) -> nn.Module:
        """The network as its factory builds it. Built once; analyses work on copies."""
        return self.make_model()

    def splits_of(self, data: DataLike, split_seed: int = 0) -> Splits:
        """Data of any form for the network: in the shape that it takes, and text by its tokenizer."""
        text = text_file(data)
        if text is not None:
            return splits_for(self.template, text)
        if isinstance(data, str):
            return load_data(data, getattr(self.template, "input_shape", None), split_seed)
        return as_splits(data)

    def select(self, names: Iterable[str] | None) -> dict[str, AnyCheckpoint]:
        """Checkpoints by name: see :meth:`pnanalysis.io.runs.Run.select`; without a run, by the names they were given.

        ``None`` selects plain and champion of a run, and everything where there is no run.
        """
        if self.run is not None:
            return dict(self.run.select(("plain", "champion") if names is None else names))
        by_name = {checkpoint.name: checkpoint for checkpoint in self.checkpoints}
        chosen = list(by_name if names is None or list(names) == ["all"] else names)
        missing = [name for name in chosen if name not in by_name]
        if missing:
            raise ModelError(f"no weights named {missing[0]!r}; there are {', '.join(by_name)}")
        if not chosen:
            raise ModelError(f"no weights are named; there are {', '.join(by_name)}")
        return {name: by_name[name] for name in chosen}

    def model(
        self, checkpoint: AnyCheckpoint, device: torch.device | str = "cpu", dtype: torch.dtype | None = None,
        state: StateDicts | None = None,
    ) -> nn.Module:  # fmt: skip
        """A network of its own with the checkpoint's weights, in eval mode.

        Parameters
        ----------
        checkpoint : Checkpoint or MemoryCheckpoint
        device : torch.device or str
        dtype : torch.dtype, optional
            By default that of the network as it is built.
        state : dict, optional
            What the checkpoint holds, where that has been read already.
        """
        if isinstance(checkpoint, MemoryCheckpoint) and checkpoint.network is not None:
            model = in_precision(copied(checkpoint.network), dtype)
            check_finite(model, checkpoint.origin)
        else:
            # cast before the weights come in: a file of float64 then loses nothing in a float64 analysis
            model = in_precision(copied(self.template), dtype)
            load_weights(model, checkpoint.state_dicts() if state is None else state, checkpoint.origin)
        return model.to(device).eval()

    def split(
        self, name: str, n: int | None, seed: int, device: torch.device | str, dtype: torch.dtype | None = None
    ) -> Split | LoaderSplit:
        """``n`` examples of a split: see :meth:`pnanalysis.inputs.data.Splits.examples`."""
        return self.data.examples(name, n, seed, device, dtype)

    def dataset_attrs(self) -> dict[str, Any]:
        """Identity of run and data for a dataset's attributes; loads the data."""
        return {**self.attrs, "data": self.data.name, "data_fingerprint": self.data.fingerprint}


def as_source(
    run: Run | Source | str | os.PathLike[str],
    model: ModelLike | None = None,
    data: DataLike | None = None,
    loss: str | Loss | None = None,
) -> Source:
    """The source of a run, given as such or by its path.

    Parameters
    ----------
    run : Run, Source or path
    model, data, loss : optional
        Take the place of what the manifest names. Runs of a user's own model, data or loss need them, since a
        manifest is never trusted to name code.

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
        raise ModelError(
            f"{run.path}: was trained with the model {spec}; to run that code, give it again (--model {spec})"
        )
    data_spec = manifest["data"]["name"]
    data_name = data if data is None or isinstance(data, str) else f"object {id(data)}"

    def make_model() -> nn.Module:
        return new_model(spec if model is None else model, options if model is None or model == spec else None)

    def make_data() -> Splits:
        if data is None and not _is_registered(data_spec):
            raise DataError(f"{run.path}: was trained on {data_spec or 'no data set'}; give the data with --data")
        if data is None and ":" in data_spec:
            raise DataError(
                f"{run.path}: was trained on {data_spec}; to read from that path, give it again (--data {data_spec})"
            )
        splits = source.splits_of(data_spec if data is None else data, manifest["data"].get("split_seed", 0))
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
            raise ModelError(
                f"{run.path}: was trained with the loss {named}; to run that code, give it again (--loss {named})"
            )
        return resolve_loss(loss or named)

    source = Source(
        label=run.path.name,
        checkpoints=run.checkpoints,
        make_model=make_model,
        make_data=make_data,
        make_loss=make_loss,
        attrs={
            "run": run.path.name,
            "run_id": run.id,
            "recipe": manifest["recipe"],
            "model": name_of(model or spec),
            "loss": name_of(loss or manifest.get("loss", "cross_entropy")),
        },
        run=run,
        data_key="" if model is not None else json.dumps([manifest["model"], manifest["data"], data_name]),
    )
    return source


def name_of(given: Any) -> str:
    """What a model or loss is called in attributes.

    Objects of a user's own get a name that no registered one has, and that differs from object to object.
    """
    if isinstance(given, str):
        return given
    known = next((name for name, loss in LOSSES.items() if loss is given), None)
    return known or f"own {type(given).__name__} {id(given):x}"


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device to work on; ``auto`` or ``None`` takes CUDA where there is one.

    Raises
    ------
    ModelError
        If CUDA is requested where there is none, or the name is not a device.
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
