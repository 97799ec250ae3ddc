"""What lies between and around minima: loss and error on lines, curves and planes through parameter space."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import xarray as xr
from torch import nn

from pnanalysis import schema
from pnanalysis.alignment.weight_matching import Relabelling, check_relabelling
from pnanalysis.alignment.weight_matching import align as match
from pnanalysis.analyses.eigenvector_plane import eigenvector_plane
from pnanalysis.analyses.trajectory import plane_points
from pnanalysis.checks import ascending, at_least, check_seed, one_of, positive, resolve_dtype
from pnanalysis.errors import DataError, ModelError, RunError
from pnanalysis.evaluation.diagnosis import clear_errors
from pnanalysis.geometry.barriers import profiles
from pnanalysis.geometry.curves import CURVES, train_curve
from pnanalysis.geometry.loss_surface import BATCH_NORM, LossSurface, check_same_function
from pnanalysis.geometry.planes import plane_along, plane_through_three, random_plane
from pnanalysis.inputs.batches import first_examples
from pnanalysis.inputs.data import DataLike, LoaderSplit, Split
from pnanalysis.inputs.examples import check_same_data, check_same_loss
from pnanalysis.inputs.models import Loss, ModelLike, device_of
from pnanalysis.inputs.selection import Given, SelectedCheckpoint, Selection, as_sources, champion_beside, nothing_given
from pnanalysis.inputs.sources import AnyCheckpoint, Source, resolve_device
from pnanalysis.io.runs import Run
from pnanalysis.io.weights import State

VIEWS = ("line", "curve", "plane", "random", "eigenvectors")
#: Those that are planes.
_PLANES = ("plane", "random", "eigenvectors")


@dataclass(frozen=True)
class LandscapeOptions:
    """What to draw and how: see :func:`landscape`."""

    view: str = "line"
    align: bool = False
    n_points: int | None = None
    extrapolate: float = 0.0
    span: Sequence[float] | None = None
    curve: str = "bezier"
    n_bends: int = 1
    n_steps: int = 1000
    lr: float = 3e-3
    n_restarts: int = 5
    rotations: bool = True
    bn: str = "reestimate"
    dtype: str = "float32"
    seed: int = 0
    pairs: Sequence[int] = (1, 2)

    def __post_init__(self) -> None:
        one_of(VIEWS, view=self.view)
        one_of(BATCH_NORM, bn=self.bn)
        one_of(CURVES, curve=self.curve)
        if self.align and self.view not in ("line", "curve"):
            raise ModelError("only lines and curves are aligned: a relabelled network lies on another plane")
        if self.span is not None and self.view not in _PLANES:
            raise ModelError("only planes have a span; a line is extended with extrapolate")
        ascending("span", self.span, 4)
        if not isinstance(self.extrapolate, Real) or not 0 <= self.extrapolate < 100:
            raise ModelError(f"extrapolate is {self.extrapolate}; it must be a fraction of the line from 0 to 100")
        at_least(1, n_steps=self.n_steps, n_bends=self.n_bends, n_restarts=self.n_restarts)
        at_least(2, n_points=self.n_points)
        if len(self.pairs) != 2 or self.pairs[0] == self.pairs[1]:
            raise ModelError(f"pairs is {self.pairs}; a plane needs the numbers of two different eigenpairs, from 1 on")
        at_least(1, **dict(zip(("first pair", "second pair"), self.pairs, strict=True)))
        check_seed(seed=self.seed)
        positive(lr=self.lr)
        resolve_dtype(self.dtype)

    @property
    def kind(self) -> str:
        """Of the dataset."""
        return "landscape" if self.view in _PLANES else "barrier"


def landscape(
    *given: Given,
    model: ModelLike | None = None,
    data: DataLike | None = None,
    loss: str | Loss | None = None,
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
    rotations: bool = True,
    bn: str = "reestimate",
    eigenpairs: xr.Dataset | None = None,
    pairs: Sequence[int] = (1, 2),
    splits: Sequence[str] | None = None,
    n: int | None = 2048,
    batch_size: int = 512,
    dtype: str = "float32",
    device: str | None = "cpu",
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    r"""Loss and error between two minima, on a plane through three, or on a plane around one.

    Parameters
    ----------
    *given, model, data, loss
        See :func:`pnanalysis.hessian`; all of one architecture. ``landscape([a, b], data=loader)`` for networks in
        memory.
    checkpoints : sequence of str, optional
        See :meth:`pnanalysis.io.runs.Run.select`; of several runs as ``RUN/NAME``. By default a line leads from plain
        to champion of a run, from one run's champion to the other's, or between two networks; a plane is that of
        :func:`pnanalysis.trajectory` through start, plain end and champion; others are around the champion.
    view : {"line", "curve", "plane", "random", "eigenvectors"}
        ``curve`` is the line and a trained curve of low loss; ``eigenvectors`` the plane along two of the Hessian.
    align : bool
        Add to a line or curve the line to the second network with its hidden units relabelled
        (:func:`pnanalysis.alignment.weight_matching.align`).
    n_points : int, optional
        From end to end, both counted (25), or along each axis of a plane (21).
    extrapolate : float
        Extend a line beyond both ends by this fraction of its length.
    span : four floats, optional
        ``x_min, x_max, y_min, y_max``; by default a quarter more on each side than the three points span (no side
        less than half the other), or -1 to 1 for random planes; along eigenvectors as far as the quadratic part of
        the loss rises by about 1, and at most half the norm of the weights.
    curve, n_bends, n_steps, lr
        See :func:`pnanalysis.geometry.curves.train_curve`; trained on the whole training split.
    n_restarts : int
        Of the alignment.
    rotations : bool
        Whether alignment may also rotate channels within heads of attention, and others that only enter linear maps.
    bn : {"reestimate", "interpolate"}
        Running statistics of batch normalisation: estimated again at each point from the ``n`` training examples, or
        combined like parameters.
    eigenpairs : xarray.Dataset, optional
        Of :func:`pnanalysis.eigenpairs`, with vectors, of the same weights; by default the largest are computed, on the
        same training examples.
    pairs : two ints
        Numbers of the eigenpairs along x and y, from 1 on.
    splits : sequence of str, optional
        By default train and test (or validation); for planes, train only.
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
        and ``barrier`` an estimate of its largest value from end to end, never below 0. Kind ``landscape`` for planes:
        ``loss`` and ``error`` on the grid (y, x).

    Raises
    ------
    PnError
        If the checkpoints are not as many as the view needs, coincide, lie on one line (planes), or are of different
        architectures; if the view is unknown, or the network cannot be aligned.

    Notes
    -----
    Standard errors are those of a mean over examples drawn at random: the scatter to expect with other examples, not
    with other training runs. Those of ``excess`` and ``barrier`` are paired: the excess is computed per example, which
    removes what an example contributes at all points alike. The highest of many noisy points would overstate a
    barrier: it is picked on one half of the examples and measured on the other, both ways round
    (:func:`pnanalysis.geometry.barriers.profile`).

    References
    ----------
    J. Frankle et al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis", ICML 2020, arXiv:1912.05671.
    S. Ainsworth et al., "Git Re-Basin", arXiv:2209.04836. T. Garipov et al., arXiv:1802.10026.
    H. Li et al., arXiv:1712.09913. K. Jordan et al., "REPAIR", arXiv:2211.08403.
    """
    options = LandscapeOptions(
        view, align, n_points, extrapolate, span, curve, n_bends, n_steps, lr, n_restarts, rotations, bn, dtype, seed,
        tuple(pairs),
    )  # fmt: skip
    at_least(1, n=n, batch_size=batch_size)
    sources = as_sources(given, model, data, loss)
    points = _choose(sources, checkpoints, view)
    first, torch_device = sources[0], resolve_device(device)
    for other in sources[1:]:
        check_same_data(first, other)
        check_same_loss(first, other)
    if splits is None:
        others = [name for name in ("test", "validation") if getattr(first.data, name) is not None]
        splits = ("train", *others[:1]) if view in ("line", "curve") else ("train",)
    if not splits:
        raise DataError("no split to look at; name train, validation or test")
    parts = {name: first.split(name, n, seed, torch_device) for name in dict.fromkeys(("train", *splits))}
    sizes = {name: len(part) for name, part in parts.items() if isinstance(part, Split)} or n
    ds, settings = network_landscape(
        points.networks(torch_device, resolve_dtype(dtype)), first.loss,
        {name: part.batches(batch_size) for name, part in parts.items()},
        options, splits=splits, label=first.label,
        curve_data=first.split("train", None, seed, torch_device) if view == "curve" else None,
        eigenpairs=eigenpairs, progress=progress,
    )  # fmt: skip
    if all(item.source.run is not None for item in points):
        settings["places"] = [_place(item) for item in points]
    if view == "plane":
        settings["plane_points"] = [item.origin for item in points]
    return schema.finish(
        ds, options.kind, **first.dataset_attrs(), view=view, checkpoints=points.labels, **settings, n=sizes,
        batch_size=batch_size, seed=seed, device=str(torch_device), dtype=dtype,
    )  # fmt: skip


def network_landscape(
    networks: Mapping[str, nn.Module],
    loss: Loss,
    batches: Mapping[str, Any],
    options: LandscapeOptions,
    *,
    splits: Sequence[str] = ("train",),
    curve_data: Split | LoaderSplit | None = None,
    eigenpairs: xr.Dataset | None = None,
    label: str = "network",
    progress: bool = True,
) -> tuple[xr.Dataset, dict[str, Any]]:
    """Loss and error between or around networks in memory.

    Parameters
    ----------
    networks : mapping of str to Module
        By label, as many as the view needs, all of one architecture and on one device.
    loss : callable
        ``loss(outputs, targets)``, averaged over the batch.
    batches : mapping of str to re-iterable of (inputs, targets)
        By split; ``"train"`` among them, for batch normalisation and alignment.
    options : LandscapeOptions
    splits : sequence of str
        Those to evaluate.
    curve_data : Split or LoaderSplit
        What a curve is trained on.
    eigenpairs : xarray.Dataset, optional
        See :func:`landscape`.
    label : str
        What the networks are called in messages.
    progress : bool

    Returns
    -------
    (xarray.Dataset, dict)
        See :func:`landscape`; and the settings that played a part, for its attributes.
    """
    names, first = list(networks), next(iter(networks.values()))
    surface = LossSurface(
        first,
        loss,
        device_of(first, names[0]),
        resolve_dtype(options.dtype),
        batches["train"] if options.bn == "reestimate" else None,
    )
    if options.view == "curve" and surface.norms and options.bn != "reestimate":
        raise ModelError("a curve through networks with batch normalisation needs their statistics re-estimated")
    states = [surface.anchor(network.state_dict(), name) for name, network in networks.items()]
    for (name, network), state in zip(networks.items(), states, strict=True):
        check_same_function(surface, state, network, batches["train"], (name, names[0]))
    evaluated = {name: batches[name] for name in splits}
    settings: dict[str, Any] = {"bn": options.bn if surface.norms else None}
    with clear_errors(label, surface.model, batches["train"], surface.loss):
        if options.view == "plane":
            ds = plane_through_three(surface, states, names, evaluated, options.span, options.n_points or 21, progress)
        elif options.view == "random":
            ds = random_plane(
                surface, states[0], names[0], evaluated, options.span, options.n_points or 21, options.seed, progress
            )
        elif options.view == "eigenvectors":
            plane = eigenvector_plane(
                first, states[0], loss, batches["train"], options.pairs, eigenpairs, dtype=options.dtype,
                seed=options.seed, label=names[0], progress=progress,
            )  # fmt: skip
            ds = plane_along(
                surface, states[0], names[0], evaluated, plane.directions, plane.axes, "parameter units",
                options.span or plane.span, options.n_points or 21, progress,
            )  # fmt: skip
            settings |= {"pairs": options.pairs, "eigenvalues": plane.values}
        else:
            paths, chosen = _paths(surface, states, batches["train"], options, curve_data, progress)
            settings |= chosen
            ds = profiles(surface, paths, evaluated, options.n_points or 25, options.extrapolate, progress)
            ds.position.attrs |= {"long_name": f"position from {names[0]} (0) to {names[1]} (1)", "units": "1"}
    return ds, settings


def _paths(
    surface: LossSurface, states: list[State], batches: Iterable[Any], options: LandscapeOptions,
    curve_data: Split | LoaderSplit | None, progress: bool,
) -> tuple[dict[str, tuple[list[State], str]], dict[str, Any]]:  # fmt: skip
    """The paths from the first state to the second: anchors and kind of curve by name; and the settings used."""
    settings: dict[str, Any] = {}
    paths = {"line": (states, "line")}
    if options.align:
        relabelling = _relabelling(surface, states, batches, options, progress)
        paths["aligned"] = ([states[0], relabelling.apply(states[1])], "line")
        settings = {
            "n_relabelled": relabelling.n_moved,
            "relabelled": relabelling.summary(),
            "not_followed": relabelling.not_followed or None,
            "n_restarts": options.n_restarts,
        }
    if options.view == "curve":
        if curve_data is None:
            raise DataError("a curve is trained: give the examples to train it on")
        names = ("n_bends", "n_steps", "lr")
        training = {name: getattr(options, name) for name in names}
        bent = train_curve(
            surface, (states[0], states[1]), curve_data, kind=options.curve, **training, seed=options.seed,
            progress=progress,
        )  # fmt: skip
        paths["curve"] = (bent, options.curve)
        settings |= {"curve": options.curve, **training}
    return paths, settings


def _choose(sources: list[Source], names: Sequence[str] | None, view: str) -> Selection:
    """The checkpoints a view needs, by the names they go by; all different."""
    if not sources:
        raise nothing_given()
    needed = {"plane": 3, "random": 1, "eigenvectors": 1}.get(view, 2)
    if names is None and view == "plane":
        found = plane_points(*sources)
        chosen = [
            SelectedCheckpoint(_short_name(name, sources[0], source, at), source, at) for name, source, at in found
        ]
    elif len(sources) == 1:
        one = sources[0]
        own = _default(one.run, view) if names is None and one.run is not None else names
        chosen = [SelectedCheckpoint(name, one, checkpoint) for name, checkpoint in one.select(own).items()]
    else:
        chosen = _of_several(sources, names)
    if len(chosen) != needed:
        checkpoints = "1 checkpoint" if needed == 1 else f"{needed} checkpoints"
        raise RunError(
            f"view {view!r} needs {checkpoints}, there are {len(chosen)}: {', '.join(item.label for item in chosen)}; "
            "choose with -c"
        )
    by_identity: dict[object, str] = {}
    for item in chosen:
        other = by_identity.setdefault(item.checkpoint.identity, item.label)
        if other != item.label:
            raise RunError(
                f"{other} and {item.label} are the same checkpoint; name others (-c), such as iter00 and iter01"
            )
    return Selection(sources, chosen)


def _default(run: Run, view: str) -> Sequence[str]:
    """Two ends to join; around one point, the champion."""
    return ["champion"] if view in ("random", "eigenvectors") else run.contenders


def _of_several(sources: list[Source], names: Sequence[str] | None) -> list[SelectedCheckpoint]:
    """Checkpoints of several runs by ``RUN/NAME``; by default the champion of each (:func:`champion_beside`)."""
    wanted: list[tuple[Source, list[str] | None]] = []
    if names is None:
        wanted = [(source, [champion_beside(source, sources)] if source.run else None) for source in sources]
    for name in names or ():
        found = [source for source in sources if name.startswith(f"{source.label}/")]
        if not found:
            labels = ", ".join(source.label for source in sources)
            raise RunError(f"{name!r} names no checkpoint of {labels}; write RUN/NAME")
        wanted += [(source, [name[len(source.label) + 1 :]]) for source in found]
    return [
        SelectedCheckpoint(f"{source.label}/{name}", source, checkpoint)
        for source, selected in wanted
        for name, checkpoint in source.select(selected).items()
    ]


def _short_name(name: str, first: Source, source: Source, checkpoint: AnyCheckpoint) -> str:
    """``start``, ``plain`` or ``champion`` of the first run where it is one of them."""
    names = ("start", "plain", "champion") if source is first and source.run is not None else ()
    return next((known for known in names if getattr(source.run, known) == checkpoint), name)


def _place(item: SelectedCheckpoint) -> tuple[str, int, int]:
    """Which checkpoint it is, whatever its role in the run: that may change as training goes on."""
    assert item.source.run is not None
    return item.source.run.path.name, item.checkpoint.iteration, item.checkpoint.epoch


def _relabelling(
    surface: LossSurface, states: list[State], batches: Iterable[Any], options: LandscapeOptions, progress: bool
) -> Relabelling:
    """The relabelling that brings the second state nearest to the first, checked on a few examples."""
    few = surface.cast(first_examples(next(iter(batches)), 4)[0])
    found = match(
        surface.model, states[0], states[1], few, rotations=options.rotations, n_restarts=options.n_restarts,
        seed=options.seed, progress=progress,
    )  # fmt: skip
    check_relabelling(surface.model, states[1], found, few)
    return found
