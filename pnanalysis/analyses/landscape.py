"""What lies between and around minima: loss and error on lines, curves and planes through parameter space."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import xarray as xr
from torch.utils._pytree import tree_map

from pnanalysis import schema
from pnanalysis.alignment.weight_matching import Relabelling, check_preserved
from pnanalysis.alignment.weight_matching import align as match
from pnanalysis.analyses.trajectory import plane_points
from pnanalysis.checks import ascending, at_least, one_of, positive, resolve_dtype
from pnanalysis.errors import DataError, ModelError, RunError
from pnanalysis.evaluation.diagnosis import clear_errors
from pnanalysis.geometry.barriers import profiles
from pnanalysis.geometry.curves import CURVES, train_curve
from pnanalysis.geometry.loss_surface import BATCH_NORM, LossSurface
from pnanalysis.geometry.planes import about_one, through_three
from pnanalysis.inputs.data import Split
from pnanalysis.inputs.selection import _of_several, _Points, check_same_loss
from pnanalysis.inputs.sources import Source, as_sources, check_same_data, resolve_device
from pnanalysis.io.runs import Checkpoint, Run
from pnanalysis.io.weights import State

VIEWS = ("line", "curve", "plane", "random")


def landscape(
    *runs: Run | Source,
    checkpoints: Sequence[str] | None = None,
    view: str = "line",
    align: bool = False,
    n_points: int | None = None,
    extrapolate: float = 0.0,
    span: Sequence[float] | None = None,
    curve: str = "bezier",
    n_bends: int = 1,
    n_steps: int = 1000,
    lr: float = 3e-3,
    n_restarts: int = 5,
    bn: str = "reestimate",
    splits: Sequence[str] | None = None,
    n: int | None = 2048,
    batch_size: int = 512,
    dtype: str = "float32",
    device: str | None = "cpu",
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    r"""Loss and error between two minima, on a plane through three, or on a random plane about one.

    Parameters
    ----------
    *runs : Run or Source
        Runs of one architecture, or a user's own model and weights (:func:`pnanalysis.open_files`).
    checkpoints : sequence of str, optional
        See :meth:`pnanalysis.io.runs.Run.select`; of several runs as ``RUN/NAME``. By default a line leads from plain to
        champion of a run or from one run's champion to the other's, a plane is that of :func:`pnanalysis.trajectory`
        through start, plain end and champion, a random plane lies about the champion.
    view : {"line", "curve", "plane", "random"}
        ``curve`` is the line and beside it a trained curve of low loss.
    align : bool
        Add to a line or curve the line to the second network with its hidden units relabelled
        (:func:`pnanalysis.alignment.weight_matching.align`).
    n_points : int, optional
        From end to end, both counted (25), or along each axis of a plane (21).
    extrapolate : float
        Go on beyond both ends of a line by this share of its length.
    span : four floats, optional
        ``x_min, x_max, y_min, y_max``; by default a quarter more on each side than the three points take (no side
        less than half the other), or -1 to 1 for random planes.
    curve, n_bends, n_steps, lr
        See :func:`pnanalysis.geometry.curves.train_curve`; trained on the whole training split.
    n_restarts : int
        Of the alignment.
    bn : {"reestimate", "interpolate"}
        Running statistics of batch normalisation: estimated anew at each point from the ``n`` training examples, or
        combined like parameters.
    splits : sequence of str, optional
        By default train and test (or validation), for planes train alone.
    n : int or None
        Examples of each split, drawn by ``seed`` (fewer if there are fewer).
    batch_size : int
    dtype : {"float32", "float64"}
    device : str or None
    seed : int
        Of examples, alignment, curve and random directions.
    progress : bool

    Returns
    -------
    xarray.Dataset
        Kind ``barrier`` for lines and curves: ``loss`` and ``error`` along ``position``, for each ``path`` (line,
        aligned, curve) and ``split``. ``excess`` is the loss minus the linear interpolation of the two ends' losses,
        and ``barrier`` its largest value from end to end, never below 0. Kind ``landscape`` for planes: ``loss`` and
        ``error`` on the grid (y, x).

    Raises
    ------
    PnError
        If the checkpoints are not as many as the view needs, coincide, lie on one line (planes), or are of different
        architectures; if the view is unknown, or the network cannot be aligned.

    Notes
    -----
    Standard errors are those of a mean over examples drawn at random: the spread to expect with other examples, not
    with other training runs. Those of ``excess`` and ``barrier`` are paired: the excess is taken example by example,
    which removes what examples share at all points. They do not count that the largest point was chosen.

    References
    ----------
    J. Frankle et al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis", ICML 2020, arXiv:1912.05671.
    S. Ainsworth et al., "Git Re-Basin", arXiv:2209.04836. T. Garipov et al., arXiv:1802.10026.
    H. Li et al., arXiv:1712.09913. K. Jordan et al., "REPAIR", arXiv:2211.08403.
    """
    _check(view, align, bn, curve, extrapolate, span)
    at_least(1, n=n, batch_size=batch_size, n_steps=n_steps, n_bends=n_bends, n_restarts=n_restarts)
    at_least(2, n_points=n_points)
    at_least(0, seed=seed)
    positive(lr=lr)
    torch_dtype = resolve_dtype(dtype)
    sources = as_sources(runs)
    points = _choose(sources, checkpoints, view)
    first, torch_device = sources[0], resolve_device(device)
    for other in sources[1:]:
        other.share_data(first)
        check_same_data(first, other)
        check_same_loss(first, other)
    if splits is None:
        others = [name for name in ("test", "validation") if getattr(first.data, name) is not None]
        splits = ("train", *others[:1]) if view in ("line", "curve") else ("train",)
    if not splits:
        raise DataError("no split to look at; name train, validation or test")
    parts = {name: first.split(name, n, seed, torch_device) for name in dict.fromkeys(("train", *splits))}
    batches = {name: part.batches(batch_size) for name, part in parts.items()}
    surface = LossSurface(
        first.make_model(), first.loss, torch_device, torch_dtype,
        batches["train"] if bn == "reestimate" else None,
    )  # fmt: skip
    if view == "curve" and surface.norms and bn != "reestimate":
        raise ModelError("a curve through networks with batch normalisation needs their statistics re-estimated")
    states = [surface.anchor(c.load(), str(c.path)) for _, c in points.values()]
    sizes = {name: len(part) for name, part in parts.items() if isinstance(part, Split)} or n
    chosen, names = {name: batches[name] for name in splits}, list(points)
    settings: dict[str, Any] = {}
    with clear_errors(first.label, surface.model, batches["train"], surface.loss):
        if view == "plane":
            ds = through_three(surface, states, names, chosen, span, n_points or 21, progress)
            settings = {"plane_points": [_full_name(*point) for point in points.values()]}
        elif view == "random":
            ds = about_one(surface, states[0], names[0], chosen, span, n_points or 21, seed, progress)
        else:
            paths: dict[str, tuple[list[State], str]] = {"line": (states, "line")}
            if align:
                relabelling = _aligned(surface, states, batches["train"], n_restarts, seed, progress)
                paths["aligned"] = ([states[0], relabelling.apply(states[1])], "line")
                settings = {"n_relabelled": relabelling.n_moved, "n_restarts": n_restarts}
            if view == "curve":
                train = first.data.get("train").to(torch_device)
                bent = train_curve(
                    surface, (states[0], states[1]), train, kind=curve, n_bends=n_bends, n_steps=n_steps, lr=lr,
                    seed=seed, progress=progress,
                )  # fmt: skip
                paths["curve"] = (bent, curve)
                settings |= {"curve": curve, "n_bends": n_bends, "n_steps": n_steps, "lr": lr}
            ds = profiles(surface, paths, chosen, n_points or 25, extrapolate, progress)
            ds.position.attrs |= {"long_name": f"position from {names[0]} (0) to {names[1]} (1)", "units": "1"}
    return schema.finish(
        ds, "landscape" if view in ("plane", "random") else "barrier", **first.dataset_attrs(), view=view,
        checkpoints=names, **settings, bn=bn if surface.norms else None, n=sizes, batch_size=batch_size, seed=seed,
        device=str(torch_device), dtype=dtype,
    )  # fmt: skip


def _check(view: str, align: bool, bn: str, curve: str, extrapolate: float, span: Sequence[float] | None) -> None:
    one_of(VIEWS, view=view)
    one_of(BATCH_NORM, bn=bn)
    one_of(CURVES, curve=curve)
    if align and view not in ("line", "curve"):
        raise ModelError("only lines and curves are aligned: a relabelled network lies on another plane")
    if span is not None and view not in ("plane", "random"):
        raise ModelError("only planes have a span; a line is drawn out with extrapolate")
    ascending("span", span, 4)
    if not isinstance(extrapolate, Real) or not 0 <= extrapolate < 100:
        raise ModelError(f"extrapolate by a share of the line that is not negative, not by {extrapolate}")


def _choose(sources: list[Source], names: Sequence[str] | None, view: str) -> _Points:
    """The checkpoints a view needs, by the names they go by; all different."""
    if not sources:
        raise RunError("name a run, or your own model and weights")
    needed = {"plane": 3, "random": 1}.get(view, 2)
    if names is None and view == "plane":
        found = plane_points(*sources)
        chosen = {_short_name(name, sources[0], source, at): (source, at) for name, source, at in found}
    elif len(sources) == 1:
        one = sources[0]
        only = _default(one.run, view) if names is None and one.run is not None else names
        chosen = {name: (one, checkpoint) for name, checkpoint in one.select(only).items()}
    else:
        chosen = _of_several(sources, names)
    if len(chosen) != needed:
        checkpoints = "1 checkpoint" if needed == 1 else f"{needed} checkpoints"
        raise RunError(
            f"view {view!r} needs {checkpoints}, there are {len(chosen)}: {', '.join(chosen)}; choose with -c"
        )
    by_path: dict[Any, str] = {}
    for name, (_, checkpoint) in chosen.items():
        other = by_path.setdefault(checkpoint.path.resolve(), name)
        if other != name:
            raise RunError(f"{other} and {name} are the same checkpoint; name others (-c), such as iter00 and iter01")
    return chosen


def _default(run: Run, view: str) -> Sequence[str]:
    """Plain and champion; where these are one, plain and the last iteration; about one point, the champion."""
    if view == "random":
        return ["champion"]
    last = len(run.ends) - 1
    return ["plain", "champion"] if run.manifest["champion"] or last < 1 else ["plain", f"iter{last:02d}"]


def _short_name(name: str, first: Source, source: Source, checkpoint: Checkpoint) -> str:
    """``start``, ``plain`` or ``champion`` of the first run where it is one of them."""
    names = ("start", "plain", "champion") if source is first and source.run is not None else ()
    return next((known for known in names if getattr(source.run, known) == checkpoint), name)


def _full_name(source: Source, checkpoint: Checkpoint) -> str:
    """As :func:`pnanalysis.trajectory` calls it."""
    return f"{source.label}/{checkpoint.name}" if source.run is not None else checkpoint.name


def _aligned(
    surface: LossSurface, states: list[State], batches: Iterable[Any], n_restarts: int, seed: int, progress: bool
) -> Relabelling:
    """The relabelling that brings the second state nearest to the first, checked on a few examples."""
    few = tree_map(lambda part: part[:4], next(iter(batches))[0])
    found = match(surface.model, states[0], states[1], few, n_restarts=n_restarts, seed=seed, progress=progress)
    check_preserved(surface.model, states[1], found.apply(states[1]), few)
    return found
