"""How far networks lie from one another as functions: predictions, probabilities and layers on the same examples.

Distance in parameters says little of this: permuting a network's hidden units moves it far and changes nothing that
it computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import xarray as xr

from pnanalysis import schema
from pnanalysis.checks import at_least, one_of
from pnanalysis.evaluation.cka import CentredKernelAlignment
from pnanalysis.evaluation.disagreement import FunctionPairs, cka_variables, evaluate
from pnanalysis.evaluation.forward import loss_on
from pnanalysis.inputs.data import SPLITS
from pnanalysis.inputs.selection import Examples, members
from pnanalysis.inputs.sources import Source, resolve_device
from pnanalysis.io.runs import Run
from pnanalysis.terminal.progress import progress_bar


def functional_distance(
    *runs: Run | Source,
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
    *runs : Run or Source
        Runs, or a user's own models and weights; architectures may differ, outputs may not.
    checkpoints : sequence of str, optional
        See :func:`pnanalysis.compare`.
    split : {"test", "validation", "train"}
        Examples to look at; where there is no such split, the last there is.
    n : int or None
        How many, drawn by ``seed``; all if ``None``.
    batch_size : int
        Examples at a time; fewer where that would give less than ten batches.
    cka : bool
        Compare the layers too.
    device : str or None
    seed : int
    progress : bool

    Returns
    -------
    xarray.Dataset
        Kind ``functional``, dims ``checkpoint`` and ``other``. For classifiers ``disagreement``, the share of
        examples that two networks put into different classes, ``expected_disagreement`` (see Notes), and
        ``js_divergence``, the mean Jensen-Shannon divergence of their probabilities, in nats (at most log 2). For
        real-valued targets ``rms_difference`` of the outputs. ``cka`` (checkpoint, other, layer): see
        :class:`pnanalysis.evaluation.cka.CentredKernelAlignment`. ``_se`` is a standard error, over examples or (CKA) batches.

    Raises
    ------
    PnError
        If there are fewer than two checkpoints, data sets differ, or the numbers of outputs do.

    Notes
    -----
    *The yardstick.* Two networks of accuracies :math:`a, b` among :math:`C` classes whose mistakes are independent
    of one another and fall on every wrong class alike disagree on a share

    .. math:: 1 - a b - (1 - a)(1 - b) / (C - 1)

    of the examples. Networks that find the same examples hard, or confuse the same classes, disagree on fewer.

    References
    ----------
    S. Fort, H. Hu, B. Lakshminarayanan, "Deep Ensembles: A Loss Landscape Perspective", arXiv:1912.02757
    (disagreement). For CKA see :class:`pnanalysis.evaluation.cka.CentredKernelAlignment`.
    """
    at_least(1, n=n, batch_size=batch_size)
    at_least(0, seed=seed)
    one_of(SPLITS, split=split)
    chosen = members(runs, checkpoints)
    torch_device = resolve_device(device)
    examples = Examples(chosen, torch_device)
    split = examples.nearest(split)
    networks = [member.network(torch_device) for member in chosen]
    alignment = CentredKernelAlignment(networks) if cka else None
    loss = loss_on(chosen[0].source.loss, torch_device, torch.float32)
    function = FunctionPairs(loss, len(chosen))
    total, batches = examples.batches(split, n, batch_size, seed)
    with progress_bar(f"{split} examples", total, progress) as advance:
        scores = evaluate(loss, chosen, networks, batches, advance, function, alignment)
    variables = function.variables(1 - scores.errors.mean(1), scores.classes)
    labels = [member.label for member in chosen]
    coords: dict[str, Any] = {"checkpoint": labels, "other": labels}
    if alignment is not None:
        variables |= cka_variables(alignment)
        coords["layer"] = alignment.layers
    return schema.finish(
        xr.Dataset(variables, coords=coords), "functional", **chosen[0].source.dataset_attrs(), function_split=split,
        n=function.n, batch_size=batch_size, seed=seed, device=str(torch_device), dtype="float32",
    )  # fmt: skip
