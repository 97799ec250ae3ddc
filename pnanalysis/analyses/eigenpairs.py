"""Eigenvalues and eigenvectors of the loss Hessian (or GGN, or Fisher) as data: at checkpoints, or of any matrix."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from scipy.sparse import issparse
from scipy.sparse.linalg import LinearOperator as ScipyLinearOperator
from torch import Tensor, nn

from pnanalysis import schema
from pnanalysis.analyses.eigenspace_overlaps import overlaps
from pnanalysis.analyses.finished_eigenpairs import finished_or_computed
from pnanalysis.analyses.hessian import has_all, names_of
from pnanalysis.analyses.network_eigenpairs import EigenpairOptions, Found
from pnanalysis.analyses.other_weights import Weights, by_label, parameters_of
from pnanalysis.analyses.stacking import along_checkpoints
from pnanalysis.analyses.work_folder import WorkFolder, weights_digest
from pnanalysis.checks import at_least, resolve_dtype
from pnanalysis.curvature.base import CurvatureOperator
from pnanalysis.curvature.batch_weights import Weight
from pnanalysis.curvature.peers import make_operator
from pnanalysis.errors import CurvatureError
from pnanalysis.evaluation.diagnosis import clear_errors
from pnanalysis.inputs.data import Batch, DataLike, n_examples
from pnanalysis.inputs.models import Loss, ModelLike
from pnanalysis.inputs.selection import SelectedCheckpoint, select
from pnanalysis.inputs.sources import resolve_device
from pnanalysis.io.runs import Checkpoint
from pnanalysis.spectra.linear_operator import LinearOperator, as_operator
from pnanalysis.terminal.progress import Advance, progress_bar


def eigenpairs(
    *given: Any,
    k: int = 10,
    which: str = "largest",
    model: ModelLike | None = None,
    data: DataLike | None = None,
    loss: str | Loss | None = None,
    checkpoints: Sequence[str] | None = None,
    operator: str = "hessian",
    split: str = "train",
    n: int | None = 2048,
    batch_size: int = 512,
    params: str | Sequence[str] | None = None,
    bn_mode: str = "eval",
    dtype: str = "float32",
    amp: str = "no",
    weight: Weight = None,
    draws: int | None = None,
    method: str = "exact",
    tolerance: float = 1e-4,
    max_hvp: int = 1000,
    data_error: str = "halves",
    classes: bool = True,
    vectors: bool = True,
    device: str | None = "cpu",
    seed: int = 0,
    progress: bool = True,
    state: str | os.PathLike[str] | None = None,
    previous: Weights | Mapping[str, Weights] | None = None,
    max_memory_bytes: int | None = None,
) -> xr.Dataset:
    r"""The ``k`` eigenpairs at one end of the spectrum, with bounds, errors, and what they say about the network.

    Parameters
    ----------
    *given : operator or matrix; or Run, Source, path, Module, state dict, or mapping or sequence of these
        A single operator, or anything :func:`pnanalysis.as_operator` takes; or what :func:`pnanalysis.hessian` takes.
    k : int
        How many pairs; all where the matrix has fewer.
    which : {"largest", "smallest", "magnitude"}
        The largest eigenvalues, the smallest (most negative) ones, or those of the largest magnitude.
    model, data, loss, checkpoints
        See :func:`pnanalysis.hessian`.
    operator : {"hessian", "ggn", "fisher"}
        Hessian of the mean loss, generalised Gauss-Newton, or empirical Fisher.
    split, n, batch_size, params, bn_mode, dtype, amp, weight, draws, method
        See :func:`pnanalysis.hessian`.
    tolerance : float
        Residuals to reach, relative to the largest magnitude of the eigenvalues.
    max_hvp : int
        The most products, after which what has been found is returned, converged or not (``converged`` says which).
        Each pair takes two at least. Pairs over halves of the examples take as many over each half.
    data_error : {"halves", "groups", "examples", "none"}
        Errors for the choice of examples: of the eigenvalues (``"examples"``, at the cost of ``k`` products or less),
        and also of the space, by the same pairs over two halves of the examples (``"halves"``, about twice the
        products). ``"groups"`` takes seven pairs of balanced halves (about seven times the products, and 14 times the
        vectors in memory) and gives standard errors to all that is said of the vectors.
    classes : bool
        Whether to find the class structure, for classifiers and the largest eigenvalues.
    vectors : bool
        Whether to keep the eigenvectors (``vector``). Saved datasets have them beside themselves, read where they are
        used: see :mod:`pnanalysis.io.beside`.
    device : str or None
    seed : int
        Of examples and start vectors.
    progress : bool
    state : path, optional
        Folder for unfinished work, from which an interrupted call with the same arguments resumes, to end with the same
        numbers. It holds the finished networks and a subfolder for the one in progress, whose vectors are saved every
        five minutes and when the work is interrupted, and can be removed once the call returns.
    previous : Module, state dict or path, or mapping of str to these, optional
        The weights before the last update, of several networks by their names. By default those of the checkpoint that
        a run stored before; of files and networks in memory there are none.
    max_memory_bytes : int, optional
        Bound on the memory for vectors, by default 60 % of what is free. There are up to ``2 k + 10`` between restarts,
        as many as there is room for; the fewer, the more products. What products take is not in it.

    Returns
    -------
    xarray.Dataset
        Kind ``eigenpairs``, dim ``pair``; with ``checkpoint`` in front unless a single operator was given.

        - ``value``, ``residual`` (:math:`\lVert Hv - \lambda v \rVert` by a product of its own); ``value_bound``,
          within which of each value there is an eigenvalue: residual and round-off; ``value_data_se``, and the 95 %
          interval ``value_low`` to ``value_high`` of both (the attribute ``interval_covers`` says what is in it);
          ``value_form`` (pair, group), the curvature of each group of examples along each vector;
          ``value_half``, the eigenvalues over halves of the examples; ``converged``.
        - ``vector`` (pair, parameter); ``sin_theta`` and ``space_sin_theta``, bounds of the angle of each vector, and
          of the space of its ``cluster`` (Davis and Kahan); ``layer_part`` (pair, layer), which sums to one;
          ``participation``, the inverse participation ratio.
        - For ``which="largest"``: parts of the gradient and of the last update (between the last two stored checkpoints
          of a run, or from ``previous``) along each vector (``gradient_part``, ``update_part``), and in the top space
          of as many dimensions as classes (``gradient_top``, ``update_top``), with ``top_chance`` for a random vector.
          ``gradient_top_without`` (without_group) is ``gradient_top`` without one of eight groups of the examples, and
          ``gradient_top_half`` (half) that over half samples, with ``data_error="groups"``: differences between
          networks are paired by them.
        - For classifiers: ``level_part`` (level, pair), ``class_part``, ``cross_part``, ``class_value``,
          ``cross_value``: see :mod:`pnanalysis.curvature.class_structure`.
        - For several checkpoints, ``overlap`` (checkpoint, other) of their spaces, from 0 to 1, with
          ``overlap_chance`` for random spaces, and ``overlap_halves`` between different halves of the examples, whose
          diagonal is the ceiling: what one network's spaces have in common over different examples.
        - With ``data_error="groups"`` alone, ``NAME_data_se`` of ``participation``, ``layer_part``, ``gradient_part``,
          ``update_part``, ``update_top``, ``level_part``, ``class_part``, ``cross_part`` and ``overlap``, and
          ``gradient_top_se`` of both gradient and space: see :mod:`pnanalysis.analyses.eigenpair_halves`.

    Raises
    ------
    PnError
        If a checkpoint, the data or a setting is invalid, there is no room for the vectors, or the operator is not
        symmetric.

    Warns
    -----
    UserWarning
        If pairs have not converged, or copies of repeated eigenvalues may have been left out.

    Notes
    -----
    The error of eigenvalues for the choice of examples is of first order: it says nothing about the bias of extreme
    eigenvalues, which are too large over few examples. If those over halves of the examples (``value_half``) are much
    larger, so are those over all of them. Of clustered eigenvalues, neither single vectors nor their layers mean much:
    look at ``space_sin_theta``.

    References
    ----------
    K. Wu and H. Simon, Thick-restart Lanczos, SIAM J. Matrix Anal. Appl. 22 (2000). G. Gur-Ari, D. Roberts, E. Dyer,
    "Gradient Descent Happens in a Tiny Subspace", arXiv:1812.04754. V. Papyan, arXiv:1901.08244.

    Examples
    --------
    >>> import numpy as np
    >>> ds = eigenpairs(np.diag([3.0, 2.0, 0.5, -1.0]), k=2, progress=False)
    >>> ds.value.values.round(6)
    array([3., 2.])
    """
    at_least(1, n=n, batch_size=batch_size)
    options = EigenpairOptions(
        k, which, operator, params, bn_mode, dtype, amp, weight, draws, method, tolerance, max_hvp, data_error, classes,
        seed, max_memory_bytes,
    )  # fmt: skip
    if len(given) == 1 and is_matrix(given[0]):
        if any(option is not None for option in (model, data, loss, checkpoints)):
            raise CurvatureError("an operator has its own network, data and loss; leave model, data and loss out")
        if previous is not None:
            raise CurvatureError("an operator has no last update; leave previous out")
        with progress_bar("eigenpairs", None, progress) as advance:
            folder = None if state is None else Path(state)
            found = finished_or_computed(
                as_operator(given[0]), options, folder, advance=advance, title="eigenpairs" if progress else ""
            )
        ds = found.with_vector if vectors else found.dataset
        return schema.finish(ds, "eigenpairs", operator=type(given[0]).__name__, k=k, which=which, seed=seed)
    torch_device = resolve_device(device)
    selection = select(given, checkpoints, model=model, data=data, loss=loss)
    selection.check_weights()
    before = by_label("previous", previous, selection.labels, parameters_of)
    settings = {**asdict(options), "weight": options.weight_name, "split": split, "n": n, "batch_size": batch_size}
    del settings["max_memory_bytes"]  # what was begun goes on in as many vectors, whatever there is room for now
    by_key: dict[object, tuple[Found, str]] = {}
    with WorkFolder.held(state, settings | names_of(selection)) as cache:
        for each in selection.measurable(split, n, batch_size, seed, torch_device):
            with progress_bar(each.item.label, None, progress) as advance:
                one = network_eigenpairs(
                    each.network, each.loss, each.batches, options, label=each.item.label, device=torch_device,
                    previous=before.get(each.item.label) or previous_state(each.item), advance=advance,
                    progress=progress,
                    folder=None if cache is None else cache.of(each.network, each.batches).file("").with_suffix(""),
                )  # fmt: skip
            by_key[each.item.key] = one, weights_digest(each.network)
    every = [by_key[item.key][0] for item in selection]
    ds = along_checkpoints([one.with_vector if vectors else one.dataset for one in every], selection.labels)
    ds = ds.assign_coords(
        **selection.coordinates, weights_digest=("checkpoint", [by_key[item.key][1] for item in selection])
    )
    if len(every) > 1:
        common = overlaps(every, selection.labels, selection.shares_examples)
        ds = ds.assign(common).assign_coords(other=selection.labels)
    n_used = n_examples(each.part, each.batches)
    return schema.finish(
        ds, "eigenpairs", **selection.sources[0].dataset_attrs(), operator=operator, k=k, which=which, split=split,
        n=n_used, all_examples=has_all(each.item.source, split, n, n_used), batch_size=batch_size, bn_mode=bn_mode,
        params=params, seed=seed, device=str(torch_device), dtype=dtype, amp=amp, draws=draws,
    )  # fmt: skip


def network_eigenpairs(
    network: nn.Module,
    loss: Loss,
    batches: Iterable[Batch],
    options: EigenpairOptions,
    *,
    label: str = "network",
    device: torch.device | str = "cpu",
    previous: Mapping[str, Tensor] | None = None,
    advance: Advance | None = None,
    progress: bool = False,
    folder: Path | None = None,
) -> Found:
    """Eigenpairs of one network over batches in memory.

    Parameters
    ----------
    network : Module
    loss : callable
        ``loss(outputs, targets)``, averaged over the batch.
    batches : re-iterable of (inputs, targets)
    options : EigenpairOptions
    label : str
        What the network is called in messages.
    device : torch.device or str
    previous : mapping, optional
        The state before the last update.
    advance : callable, optional
        Called with the products of each step.
    progress : bool
        Whether to say on standard error what is to come, after the first products.
    folder : Path, optional
        Of unfinished work, which is taken up again.
    """
    with clear_errors(label, network, batches, loss):
        op: LinearOperator = make_operator(
            "native", options.operator, network, loss, batches, params=options.params, bn_mode=options.bn_mode,
            dtype=resolve_dtype(options.dtype), device=device, amp=options.amp, weight=options.weight,
            draws=options.draws, method=options.method, expected_products=options.n_products,
        )  # fmt: skip
        update = None
        if previous is not None and isinstance(op, CurvatureOperator):
            update = op.vector_of(dict(network.named_parameters())) - op.vector_of(previous)
        return finished_or_computed(
            op, options, folder, update=update, advance=advance, title=label if progress else ""
        )


def previous_state(item: SelectedCheckpoint) -> Mapping[str, Tensor] | None:
    """The state of the checkpoint that was stored before this one in its training; ``None`` where there is none."""
    run, checkpoint = item.source.run, item.checkpoint
    if run is None or not isinstance(checkpoint, Checkpoint):
        return None
    path = run.trajectory(checkpoint.iteration)
    at = next((i for i, one in enumerate(path) if one.identity == checkpoint.identity), 0)
    return dict(item.source.model(path[at - 1]).named_parameters()) if at else None


def is_matrix(given: Any) -> bool:
    """Whether it is an operator or a matrix, rather than a run or a network."""
    if isinstance(given, nn.Module):
        return False
    return isinstance(given, Tensor | np.ndarray | ScipyLinearOperator | LinearOperator) or issparse(given)
