"""Who takes part where a champion is judged: plain model, champion, and restarts of the same cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pnanalysis.arrays import Array
from pnanalysis.errors import RunError
from pnanalysis.inputs.selection import Given, SelectedCheckpoint, Selection, as_sources
from pnanalysis.inputs.sources import Source
from pnanalysis.io.runs import Checkpoint, Run

#: Settings in which a persistent run and its restarts may differ.
_OWN_SETTINGS = {
    "strategy", "seed", "iterations", "lam", "layers", "penalty", "origin", "checkpoint_every", "recipe", "compile",
}  # fmt: skip


@dataclass(frozen=True)
class Trainings:
    """What trainings were judged by when they were made: the criterion of the champion (lowest is best), test errors.

    Attributes
    ----------
    criterion, test_error : ndarray, shape (n,)
        The criterion is infinite for trainings whose loss is not finite, which are never chosen.
    name : str
        Of the criterion.
    """

    criterion: Array
    test_error: Array
    name: str = "validation error"

    @classmethod
    def of(cls, run: Run, iterations: Sequence[int]) -> Trainings:
        """The end points of some iterations of a run, from its history."""
        history = run.history.isel(epoch=-1)
        is_validated = bool(history.validation_error.notnull().any())
        last = history.sel(iteration=list(iterations))
        loss = last.train_loss.values.astype(float)
        criterion = last.validation_error.values.astype(float) if is_validated else loss
        criterion = np.where(np.isfinite(criterion) & np.isfinite(loss), criterion, np.inf)
        name = "validation error" if is_validated else "training loss"
        return cls(criterion, last.test_error.values.astype(float), name)

    @property
    def candidates(self) -> Trainings:
        """Those that can be chosen."""
        kept = np.isfinite(self.criterion)
        return Trainings(self.criterion[kept], self.test_error[kept], self.name)


@dataclass(frozen=True)
class Contest:
    """Plain model, champion and restarts.

    Attributes
    ----------
    selection : Selection
        The plain model first, then the champion, then the restarts.
    own : Trainings or None
        All iterations after the plain one, of which the champion is the best; ``None`` for networks without a history.
    others : Trainings or None
        The restarts, in their order.
    attrs : dict
        What a reader should know, for the dataset.
    """

    selection: Selection
    own: Trainings | None = None
    others: Trainings | None = None
    attrs: dict[str, Any] = field(default_factory=dict)

    @property
    def n_restarts(self) -> int:
        return len(self.selection) - 2

    def best_restart(self, criterion: Array | None) -> int | None:
        """The place among the restarts of the best of as many as the champion is the best of, picked in the same way.

        Of more restarts than that, the first count; those whose loss is not finite, never. ``criterion`` takes the
        place of their history.
        """
        known = criterion if self.others is None else self.others.criterion
        if known is None:
            return None
        places = np.flatnonzero(np.isfinite(known))
        if self.own is not None:
            places = places[: len(self.own.candidates.criterion)]
        return int(places[np.argmin(known[places])]) if len(places) else None


def contest(
    given: Sequence[Given],
    restarts: Given | None = None,
    model: Any = None,
    data: Any = None,
    loss: Any = None,
) -> Contest:
    """Resolve what was given into plain model, champion and restarts: see :func:`pnanalysis.champion`.

    Raises
    ------
    RunError
        If there is no iteration after the plain model, or what was given is no persistent run.
    """
    sources = as_sources(given, model, data, loss)
    if len(sources) != 1:
        what = "nothing is given" if not sources else f"{len(sources)} runs are given"
        raise RunError(f"{what}: name one persistent run; others' plain models can be its restarts, with --restarts")
    (source,) = sources
    if source.run is None:
        return _of_networks(source, restarts)
    run = source.run
    role = _check_persistent(run)
    plain, best = run.plain, getattr(run, role)
    chosen = [
        SelectedCheckpoint("plain", source, plain, "the plain model"),
        SelectedCheckpoint(role, source, best, f"iteration {best.iteration}"),
    ]
    found = [_beside(source, one) for one in _runs_of(restarts, run)]
    others = [(one, end) for one in found for end in _plain_trainings(one, plain)]
    chosen += [
        SelectedCheckpoint(f"restart {i + 1}", one, end, f"{one.label}/{end.name}")
        for i, (one, end) in enumerate(others)
    ]
    own = Trainings.of(run, range(1, len(run.ends)))
    known = [Trainings.of(_run(one), [end.iteration]) for one, end in others]
    together = None
    if known and {one.name for one in known} == {own.name}:
        together = Trainings(
            np.concatenate([one.criterion for one in known]),
            np.concatenate([one.test_error for one in known]),
            own.name,
        )
    n_candidates = len(own.candidates.criterion)
    attrs = {
        "role": role, "iteration": best.iteration, "n_iterations": n_candidates, "criterion": own.name,
        "restarts": [one.label for one in found], "note": _note(run, role, found, len(own.criterion) - n_candidates),
    }  # fmt: skip
    return Contest(Selection([source, *found], chosen), own, together, attrs)


def _run(source: Source) -> Run:
    assert source.run is not None
    return source.run


def _beside(source: Source, run: Run) -> Source:
    """The source of another run with the model, data and loss of the first.

    Raises
    ------
    RunError
        If these are not what it was trained with.
    """
    first = _run(source).manifest
    same = [run.manifest.get("model") == first.get("model")]
    same += [run.manifest["data"].get(key) == first["data"].get(key) for key in ("fingerprint", "split_hash")]
    if not all(same):
        what = "another network" if not same[0] else "other data" if not same[1] else "other validation and test halves"
        raise RunError(
            f"{run.path}: was trained with {what} than {_run(source).path}, so that its networks are no restarts of it"
        )
    own = {"run": run.path.name, "run_id": run.id, "recipe": run.manifest["recipe"]}
    return replace(
        source, label=run.path.name, run=run, checkpoints=run.checkpoints, make_data=lambda: source.data,
        attrs=source.attrs | own,
    )  # fmt: skip


def _of_networks(source: Source, restarts: Given | None) -> Contest:
    """Networks or files of weights: the first is the plain model, the second the champion, the others restarts."""
    if restarts is not None:
        raise RunError("restarts= is for runs; of networks, the third and all further ones are the restarts")
    named = list(source.select(None).items())
    if len(named) < 2:
        raise RunError("a plain model and a champion are needed: give at least two networks, in this order")
    chosen = [SelectedCheckpoint(name, source, checkpoint) for name, checkpoint in named]
    return Contest(
        Selection([source], chosen), attrs={"role": named[1][0], "restarts": [name for name, _ in named[2:]]}
    )


def _check_persistent(run: Run) -> str:
    """The role of the checkpoint to judge: champion, or challenger where that is the plain model.

    Raises
    ------
    RunError
    """
    strategy = str(run.manifest.get("strategy"))
    if strategy == "restart":
        raise RunError(
            f"{run.path}: holds restarts, without a persistent iteration; name the persistent run, and this one with "
            "--restarts"
        )
    if strategy == "plain" or len(run.ends) < 2:
        raise RunError(
            f"{run.path}: has no persistent iteration after the plain model, so there is no champion to judge; train "
            "some with pntrain RECIPE --iterations 6 --control"
        )
    return run.contenders[1]


def _runs_of(restarts: Given | None, run: Run) -> list[Run]:
    """The runs that hold restarts: those given, or the control that was trained beside the run."""
    if restarts is None:
        return [] if run.control is None else [run.control]
    found = as_sources([restarts])
    for one in found:
        if one.run is None:
            raise RunError("restarts are runs, or paths of runs")
    return [_run(one) for one in found]


def _plain_trainings(source: Source, plain: Checkpoint) -> list[Checkpoint]:
    """The end points that no penalty has repelled: of a control all, else the plain model; but not ``plain`` again."""
    run = _run(source)
    ends = run.ends if run.manifest.get("strategy") == "restart" else run.ends[:1]
    return [end for end in ends if not end.equals(plain)]


def _note(run: Run, role: str, found: Sequence[Source], n_diverged: int) -> str | None:
    """What a reader should know about the choice, in sentences."""
    sentences = []
    if n_diverged:
        counted = "1 later iteration has" if n_diverged == 1 else f"{n_diverged} later iterations have"
        sentences.append(f"{counted} diverged, and cannot be chosen: the {role} is the best of the others.")
    if role == "challenger":
        sentences.append(
            "The plain model has the lowest validation error of all iterations, so that there is no champion beside "
            f"it: {run.challengers} is judged in its place."
        )
    for one in found:
        own, other = (dict(each.manifest["config"]) for each in (run, _run(one)))
        differing = [name for name in own if name not in _OWN_SETTINGS and own[name] != other.get(name)]
        if differing:
            values = ", ".join(f"{name} {other.get(name)} instead of {own[name]}" for name in differing)
            sentences.append(
                f"The restarts in {one.label} were trained differently ({values}): a poor null distribution."
            )
    return " ".join(sentences) or None
