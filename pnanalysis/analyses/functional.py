"""How far networks lie from one another as functions: predictions, probabilities and layers on the same examples.

Distance in parameters says little of this: permuting a network's hidden units moves it far and changes nothing that
it computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import xarray as xr
from torch import nn

from pnanalysis import schema
from pnanalysis.checks import at_least, check_seed, one_of
from pnanalysis.evaluation.cka import CentredKernelAlignment
from pnanalysis.evaluation.disagreement import FunctionPairs, cka_variables, evaluate
from pnanalysis.evaluation.losses import loss_on
from pnanalysis.evaluation.scores import Scores
from pnanalysis.inputs.data import SPLITS, DataLike
from pnanalysis.inputs.examples import Examples
from pnanalysis.inputs.models import Loss, ModelLike
from pnanalysis.inputs.selection import Given, select
from pnanalysis.inputs.sources import resolve_device
from pnanalysis.terminal.progress import Advance, progress_bar


def functional_distance(
    *given: Given,
    model: ModelLike | None = None,
    data: DataLike | None = None,
    loss: str | Loss | None = None,
    checkpoints: Sequence[str] | None = None,
    split: str = "test",
    n: int | None = None,
    batch_size: int = 256,
    cka: bool = True,
    device: str | None = "cpu",
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    r"""How much two or more networks differ in what they compute.

    Parameters
    ----------
    *given, model, data, loss
        See :func:`pnanalysis.hessian`; architectures may differ, numbers of outputs may not.
    checkpoints : sequence of str, optional
        See :func:`pnanalysis.compare`.
    split : {"test", "validation", "train"}
        Where the functions are compared; the last split there is if this one is missing.
    n : int or None
        How many, drawn by ``seed``; all if ``None``.
    batch_size : int
        Examples per pass; fewer where that would give fewer than ten batches.
    cka : bool
        Compare the layers, too.
    device : str or None
    seed : int
    progress : bool

    Returns
    -------
    xarray.Dataset
        Kind ``functional``, dims ``checkpoint`` and ``other``. For classifiers ``disagreement``, the fraction of
        examples that two networks put into different classes, ``expected_disagreement`` (see Notes), and
        ``js_divergence``, the mean Jensen-Shannon divergence of their probabilities, in nats (at most log 2). For
        real-valued targets ``rms_difference`` of the outputs. ``cka`` (checkpoint, other, layer): see
        :class:`pnanalysis.evaluation.cka.CentredKernelAlignment`. ``NAME_se`` is the standard error over examples, of
        CKA over batches.

    Raises
    ------
    PnError
        If there are fewer than two checkpoints, data sets differ, or the numbers of outputs do.

    Notes
    -----
    *The yardstick.* Two networks of accuracies :math:`a, b` among :math:`C` classes, whose mistakes are independent
    and equally likely to fall on any wrong class, disagree on a fraction

    .. math:: 1 - a b - (1 - a)(1 - b) / (C - 1)

    of the examples. Networks that find the same examples hard, or confuse the same classes, disagree on fewer.

    References
    ----------
    S. Fort, H. Hu, B. Lakshminarayanan, "Deep Ensembles: A Loss Landscape Perspective", arXiv:1912.02757
    (disagreement). For CKA see :class:`pnanalysis.evaluation.cka.CentredKernelAlignment`.
    """
    at_least(1, n=n, batch_size=batch_size)
    check_seed(seed=seed)
    one_of(SPLITS, split=split)
    selection = select(given, checkpoints, model=model, data=data, loss=loss, champions=True, at_least=2)
    torch_device = resolve_device(device)
    examples = Examples(selection, torch_device)
    split = examples.nearest(split)
    total, batches = examples.batches(split, n, batch_size, seed)
    with progress_bar(f"{split} examples", total, progress) as advance:
        ds, scores = compare_functions(
            selection.networks(torch_device, torch.float32),
            batches,
            selection[0].source.loss,
            cka=cka,
            device=torch_device,
            advance=advance,
        )
    return schema.finish(
        ds, "functional", **selection[0].source.dataset_attrs(), note=selection.note, function_split=split, n=scores.n,
        batch_size=batch_size, seed=seed, device=str(torch_device), dtype="float32",
    )  # fmt: skip


def compare_functions(
    networks: Mapping[str, nn.Module],
    batches: Iterable[tuple[Sequence[Any], Any]],
    loss: Loss,
    *,
    cka: bool = True,
    device: torch.device | str = "cpu",
    advance: Advance | None = None,
) -> tuple[xr.Dataset, Scores]:
    """Distances in function between networks over batches in memory, and their scores from the same passes.

    Parameters
    ----------
    networks : mapping of str to Module
        By label, in eval mode and float32, on the device of the batches.
    batches : iterable
        Pairs of the inputs of every network (a list) and the targets.
    loss : callable
    cka : bool
    device : torch.device or str
    advance : callable, optional
        Called for every batch.

    Returns
    -------
    (xarray.Dataset, Scores)
        Dims ``checkpoint``, ``other`` and ``layer``: see :func:`functional_distance`.
    """
    labels = list(networks)
    alignment = CentredKernelAlignment(list(networks.values())) if cka else None
    loss = loss_on(loss, torch.device(device), torch.float32)
    function = FunctionPairs(loss, len(labels))
    scores = evaluate(networks, batches, loss, advance or (lambda *_, **__: None), function, alignment)
    variables = function.variables(1 - scores.errors.mean(1), scores.classes)
    coords: dict[str, Any] = {"checkpoint": labels, "other": labels}
    if alignment is not None:
        variables |= cka_variables(alignment)
        coords["layer"] = alignment.layers
    return xr.Dataset(variables, coords=coords), scores
