"""Which checkpoints an analysis is about, and how they are labelled."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, ValuesView
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, overload

import torch
from torch import nn

from pnanalysis.errors import ModelError, PnError, RunError
from pnanalysis.inputs.copies import copied
from pnanalysis.inputs.data import Batch, DataLike, LoaderSplit, Split, Splits
from pnanalysis.inputs.hugging_face import folder_of
from pnanalysis.inputs.models import Loss, ModelLike
from pnanalysis.inputs.networks import check_no_mixed_state, is_path, is_weights, source_of_networks
from pnanalysis.inputs.sources import AnyCheckpoint, Source, as_source
from pnanalysis.io.runs import Checkpoint, Run, is_run
from pnanalysis.io.weights import StateDicts

#: What analyses accept: runs, networks, state dicts, files, and mappings or sequences of these.
Given = Run | Source | nn.Module | str | os.PathLike[str] | Mapping[str, Any] | Sequence[Any]

_KEPT_BYTES = 2e9  # of weights that were read ahead of their turn; beyond, a file is read again rather than held


@dataclass(frozen=True, eq=False)
class SelectedCheckpoint:
    """One of the checkpoints that an analysis is about.

    Attributes
    ----------
    label : str
        Its name in datasets: the checkpoint's, after the source's where there are several sources.
    source : Source
    checkpoint : Checkpoint or MemoryCheckpoint
    description : str
        What it is within its run, in words; empty for a user's own weights.
    """

    label: str
    source: Source
    checkpoint: AnyCheckpoint
    description: str = ""

    @property
    def key(self) -> tuple[str, object]:
        """Equal for two names of the same weights: the champion may be the plain model."""
        return self.source.label, self.checkpoint.identity

    @property
    def origin(self) -> str:
        """How messages refer to it, with or without other sources."""
        return f"{self.source.label}/{self.checkpoint.name}" if self.source.run is not None else self.checkpoint.name

    @property
    def start(self) -> Checkpoint | None:
        """The point its training started from, where that was saved."""
        run = self.source.run
        if run is None:
            return None
        first = run.trajectory(self.checkpoint.iteration)[0]
        return first if first.epoch == 0 else None


class Measurable(NamedTuple):
    """A network on its device, and what its source measures it with.

    Attributes
    ----------
    item : SelectedCheckpoint
    network : Module
    loss : callable
    batches : re-iterable of (inputs, targets)
    part : Split or LoaderSplit
        The examples that batches have.
    """

    item: SelectedCheckpoint
    network: nn.Module
    loss: Loss
    batches: Iterable[Batch]
    part: Split | LoaderSplit


class Selection(Sequence[SelectedCheckpoint]):
    """The checkpoints that an analysis is about; the first is the reference. Made by :func:`select`.

    Each file is read and each architecture built once, however often an analysis comes back to a checkpoint.
    """

    def __init__(
        self, sources: Sequence[Source], chosen: Sequence[SelectedCheckpoint], note: str | None = None
    ) -> None:
        self.sources = list(sources)
        #: What a reader should know about the choice, in a sentence.
        self.note = note
        self._chosen = list(chosen)
        self._kept: dict[tuple[str, object], StateDicts] = {}
        self._read: dict[tuple[object, ...], Split | LoaderSplit] = {}

    @overload
    def __getitem__(self, at: int) -> SelectedCheckpoint: ...
    @overload
    def __getitem__(self, at: slice) -> list[SelectedCheckpoint]: ...
    def __getitem__(self, at: int | slice) -> SelectedCheckpoint | list[SelectedCheckpoint]:
        return self._chosen[at]

    def __len__(self) -> int:
        return len(self._chosen)

    @property
    def labels(self) -> list[str]:
        """Their labels, in order."""
        return [item.label for item in self]

    @property
    def coordinates(self) -> dict[str, Any]:
        """The coordinates of a dataset with a row for each: labels, iterations and epochs."""
        return {
            "checkpoint": self.labels,
            "iteration": ("checkpoint", [item.checkpoint.iteration for item in self]),
            "epoch": ("checkpoint", [item.checkpoint.epoch for item in self]),
        }

    @property
    def shares_examples(self) -> bool:
        """Whether all sources have the same data, of which equal seeds draw the same examples."""
        return len(self.sources) == 1 or len({source.data.fingerprint for source in self.sources}) == 1

    def distinct(self, source: Source | None = None) -> list[SelectedCheckpoint]:
        """Each set of weights once, under its first name; of one source or of all."""
        first: dict[tuple[str, object], SelectedCheckpoint] = {}
        for item in self:
            if source is None or item.source is source:
                first.setdefault(item.key, item)
        return list(first.values())

    def network(
        self, item: SelectedCheckpoint, device: torch.device | str, dtype: torch.dtype | None = None, *,
        last: bool = True,
    ) -> nn.Module:  # fmt: skip
        """A network with the checkpoint's weights, in eval mode.

        ``last=False`` says that the analysis will come back to it: the weights are then kept, within limits.
        """
        state = self._kept.pop(item.key, None)
        if state is None and (isinstance(item.checkpoint, Checkpoint) or item.checkpoint.network is None):
            state = item.checkpoint.state_dicts()
        network = item.source.model(item.checkpoint, device, dtype, state)
        if not last and state is not None and self._room_for(state):
            self._kept[item.key] = state
        return network

    def networks(self, device: torch.device | str, dtype: torch.dtype | None = None) -> dict[str, nn.Module]:
        """A network of its own for every label, all at once."""
        found: dict[str, nn.Module] = {}
        first: dict[tuple[str, object], nn.Module] = {}
        for item in self:
            known = first.get(item.key)
            found[item.label] = self.network(item, device, dtype) if known is None else copied(known)
            first.setdefault(item.key, found[item.label])
        return found

    def measurable(
        self, split: str, n: int | None, batch_size: int, seed: int, device: torch.device,
        dtype: torch.dtype | None = None, networks: Mapping[str, nn.Module] | None = None,
    ) -> Iterator[Measurable]:  # fmt: skip
        """Every distinct network, one after the other, with the examples of its source.

        Parameters
        ----------
        split, n, seed
            Which examples: see :meth:`split`.
        batch_size : int
        device : torch.device
        dtype : torch.dtype, optional
        networks : mapping of str to Module, optional
            The networks by label, where they have been made already: each is on the device in its turn, then on the
            host.
        """
        for source in self.sources:
            part = self.split(source, split, n, seed, device, dtype)
            batches = part.batches(batch_size)
            for item in self.distinct(source):
                network = self.network(item, device, dtype) if networks is None else networks[item.label].to(device)
                yield Measurable(item, network, source.loss, batches, part)
                if networks is not None:
                    network.cpu()

    def split(
        self, source: Source, name: str, n: int | None, seed: int, device: torch.device | str,
        dtype: torch.dtype | None = None,
    ) -> Split | LoaderSplit:  # fmt: skip
        """Examples for the checkpoints of a source, the same ones for all sources of one loader or data set.

        See :meth:`pnanalysis.inputs.data.Splits.examples`.
        """
        origin = source.data.get(name).identity
        key = (origin, name, n, seed, str(device), dtype)
        if key not in self._read:
            self._read[key] = source.split(name, n, seed, device, dtype)
        return self._read[key]

    def check_weights(self) -> None:
        """Read the weights of a user's own files and put them into the network, before long work on the first begins.

        Raises
        ------
        ModelError
            If some cannot be read, do not fit the model, or are not finite.
        """
        files = [item for item in self.distinct() if item.source.run is None]
        for item in files if len(files) > 1 else ():
            self.network(item, "cpu", last=False)

    def _room_for(self, state: StateDicts) -> bool:
        dicts = [one for kept in (*self._kept.values(), state) for one in kept.values()]
        held = sum(getattr(tensor, "nbytes", 0) for one in dicts for tensor in one.values())
        return held <= _KEPT_BYTES


def select(
    given: Iterable[Any],
    names: Iterable[str] | None = None,
    *,
    model: ModelLike | None = None,
    data: DataLike | None = None,
    loss: str | Loss | None = None,
    champions: bool = False,
    at_least: int = 1,
) -> Selection:
    """Resolve what was given to an analysis into checkpoints with distinct labels.

    Parameters
    ----------
    given, model, data, loss
        See :func:`as_sources`.
    names : iterable of str, optional
        See :meth:`pnanalysis.io.runs.Run.select`; by default plain and champion of runs and all of a user's own
        networks.
    champions : bool
        For a comparison: by default two different end points of one run (:attr:`~pnanalysis.io.runs.Run.contenders`),
        and of several runs the champion of each (:func:`champion_beside`).
    at_least : int
        How many checkpoints are needed.

    Raises
    ------
    RunError
        If there are fewer, or nothing was given.
    """
    sources = as_sources(given, model, data, loss)
    if not sources and at_least < 2:
        raise nothing_given()
    chosen = []
    for source in sources:
        own = names
        if names is None and champions and source.run is not None:
            own = (champion_beside(source, sources),) if len(sources) > 1 else source.run.contenders
        elif source.run is None and any(other.run is not None for other in sources):
            own = None  # names are those of checkpoints in runs; of networks beside runs, all count
        for name, checkpoint in source.select(own).items():
            label = name if len(sources) == 1 else f"{source.label}/{name}"
            chosen.append(SelectedCheckpoint(label, source, checkpoint, _describe(source.run, checkpoint, name)))
    if len(chosen) < at_least:
        there = f"there is only {chosen[0].label}" if chosen else "none is given"
        raise RunError(f"a comparison needs at least two checkpoints, {there}; name another run, weights or checkpoint")
    return Selection(sources, chosen, _note(chosen) if names is None else None)


def champion_beside(source: Source, sources: Iterable[Source]) -> str:
    """The name of the end point that stands for the run of one of several sources.

    See :meth:`pnanalysis.io.runs.Run.champion_beside`.
    """
    others = [other.run for other in sources if other is not source and other.run is not None]
    return "champion" if source.run is None else source.run.champion_beside(others)


def _note(chosen: Iterable[SelectedCheckpoint]) -> str | None:
    """A sentence about the runs whose challenger stands for them, if there are any."""
    runs = {item.source.label: item.source.run for item in chosen if item.label.rpartition("/")[2] == "challenger"}
    sentences = [
        f"The champion of {label} is the plain model: so that no network is compared with itself, {run.challengers} "
        "takes its place."
        for label, run in runs.items()
        if run is not None
    ]
    return " ".join(sentences) or None


def nothing_given() -> RunError:
    """The error for an analysis that was given nothing."""
    return RunError("name a run, or give networks, or a model with weight files")


def as_sources(
    given: Iterable[Any], model: ModelLike | None = None, data: DataLike | None = None,
    loss: str | Loss | None = None,
) -> list[Source]:  # fmt: skip
    """Sources of everything that was given to an analysis, with labels that differ.

    Parameters
    ----------
    given : iterable
        Runs or their paths, sources, networks, state dicts, weight files; mappings of names to these, or sequences of
        these. Each run is a source; networks, state dicts and files together form one.
    model : str, Module or callable, optional
        The architecture of state dicts and weight files; for a run, in place of what its manifest names.
    data : str or object, optional
        Registered name, ``module:factory``, or anything :func:`pnanalysis.inputs.data.as_splits` understands.
    loss : str or callable, optional
        ``loss(outputs, targets)``, averaged over the batch; cross-entropy by default, or what a run's manifest names.

    Raises
    ------
    PnError
        If something that was given is none of these, weights come without a model, or two have the same name.
    """
    items = list(flattened(given))  # once: an iterator has no second pass
    sources: list[Source] = []
    networks: list[tuple[str | None, Any]] = []
    place = None  # of the source of networks, that of the first of them
    for name, item in items:
        if isinstance(item, Source):
            sources.append(item if name is None else replace(item, label=name))
        elif isinstance(item, Run) or (is_path(item) and not folder_of(item) and (model is None or is_run(Path(item)))):
            if is_path(item) and Path(item).exists() and not is_run(Path(item)):
                what = "a file" if Path(item).is_file() else "a folder of weights"
                raise ModelError(f"{item}: is {what}; weights need the network they belong to, model=...")
            source = as_source(item, model, data, loss)
            sources.append(source if name is None else replace(source, label=name))
        else:
            place = len(sources) if place is None else place
            networks.append((name, item))
    if any(option is not None for option in (model, data, loss)) and items and _all_sources(items):
        raise PnError("a Source brings its own model, data and loss; give these where it is made")
    if networks:
        own = source_of_networks(networks, model, data, loss)
        sources.insert(place or 0, _borrowing(own, sources[0], data, loss) if sources else own)
    labels = distinct_labels([source.label for source in sources])
    relabelled = [
        source if label == source.label else replace(source, label=label)
        for source, label in zip(sources, labels, strict=True)
    ]
    return _sharing_data(relabelled)  # after the labels: a relabelled source is another object, with data of its own


def flattened(given: Iterable[Any], name: str | None = None) -> Iterator[tuple[str | None, Any]]:
    """Each thing that was given, with its name where it came in a mapping."""
    for item in given:
        if isinstance(item, Mapping | nn.ModuleDict) and not is_weights(item):
            check_no_mixed_state(item)
            for key, value in item.items():
                yield from flattened([value], str(key) if name is None else f"{name}/{key}")
        elif isinstance(item, list | tuple | set | Iterator | ValuesView | nn.ModuleList):
            values = list(item)
            numbered = name is not None and len(values) > 1
            for i, value in enumerate(values):
                yield from flattened([value], f"{name} {i + 1}" if numbered else name)
        else:
            yield name, item


def _all_sources(items: Iterable[tuple[str | None, Any]]) -> bool:
    return all(isinstance(item, Source) for _, item in items)


def _borrowing(own: Source, other: Source, data: Any, loss: Any) -> Source:
    """A source of networks that takes data and loss from a run beside it where it was given none."""
    if data is None:
        own = replace(own, make_data=_data_of(other))
    if loss is None:
        own = replace(own, make_loss=other.make_loss, attrs=own.attrs | {"loss": other.attrs.get("loss")})
    return own


def _sharing_data(sources: Sequence[Source]) -> list[Source]:
    """The sources, those of one data set loading it once."""
    first: dict[str, Source] = {}
    shared = []
    for source in sources:
        known = first.setdefault(source.data_key, source) if source.data_key else source
        shared.append(source if known is source else replace(source, make_data=_data_of(known)))
    return shared


def _data_of(source: Source) -> Callable[[], Splits]:
    return lambda: source.data


def distinct_labels(labels: Sequence[str]) -> list[str]:
    """The labels, those that occur more than once with a number."""
    return [f"{label}#{i + 1}" if labels.count(label) > 1 else label for i, label in enumerate(labels)]


def _describe(run: Run | None, checkpoint: AnyCheckpoint, name: str) -> str:
    if run is None:
        return ""
    ends = run.ends
    if checkpoint not in ends:
        return checkpoint.name
    best = checkpoint == run.champion
    if run.manifest.get("strategy") == "restart":
        return f"the best of {len(ends)} restarts" if best else f"restart {checkpoint.iteration}"
    if checkpoint.iteration == 0:
        return "the plain model"
    role = ", the champion" if best else f", {run.challengers}" if name == "challenger" else ""
    return f"iteration {checkpoint.iteration}{role}"
