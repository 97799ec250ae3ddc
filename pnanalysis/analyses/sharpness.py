"""Sharpness: how far the loss rises near a minimum, at worst and on average, and relative flatness."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import xarray as xr

from pnanalysis import schema
from pnanalysis.analyses.network_sharpness import MEASURES, RADII, SharpnessOptions, network_sharpness
from pnanalysis.analyses.work_folder import WorkFolder
from pnanalysis.checks import at_least, resolve_dtype
from pnanalysis.inputs.data import DataLike
from pnanalysis.inputs.models import Loss, ModelLike
from pnanalysis.inputs.selection import Given, select
from pnanalysis.inputs.sources import resolve_device
from pnanalysis.terminal.progress import progress_bar

__all__ = ["RADII", "sharpness"]


def sharpness(
    *given: Given,
    model: ModelLike | None = None,
    data: DataLike | None = None,
    loss: str | Loss | None = None,
    checkpoints: Sequence[str] | None = None,
    radii: Mapping[str, float | Sequence[float]] | None = None,
    average_radii: Mapping[str, float | Sequence[float]] | None = None,
    measures: Sequence[str] = MEASURES,
    method: str = "frank-wolfe",
    n_steps: int = 10,
    n_starts: int = 2,
    group: int | None = None,
    n_directions: int = 16,
    layer: str | None = None,
    normalize_logits: bool = False,
    second_order: bool = True,
    split: str = "train",
    n: int | None = 2048,
    batch_size: int = 512,
    dtype: str = "float32",
    device: str | None = "cpu",
    seed: int = 0,
    progress: bool = True,
    state: str | os.PathLike[str] | None = None,
) -> xr.Dataset:
    r"""How far the loss rises in neighbourhoods of each checkpoint, by the definitions in use.

    Parameters
    ----------
    *given, model, data, loss
        See :func:`pnanalysis.hessian`.
    checkpoints : sequence of str, optional
        See :meth:`pnanalysis.io.runs.Run.select`; by default plain and champion of runs, and all other networks.
    radii, average_radii : mapping, optional
        Neighbourhood to radius :math:`\rho`, or to several, of the worst and of the average case. By default three
        radii of the first four; where one of the mappings is left out, as many as in the other, around the radii below
        (worst, average).

        ============= ======================================================================= =============
        neighbourhood perturbations :math:`\delta` of the worst case                          radii
        ============= ======================================================================= =============
        ball          :math:`\lVert\delta\rVert_2 \le \rho`, of SAM [1]_                      0.05, 0.01
        adaptive      :math:`\lVert\delta / |\theta|\,\rVert_2 \le \rho`, of ASAM [2]_        0.5, 0.1
        filter        the same, with the root mean square of a filter for :math:`|\theta|`    0.5, 0.1
        box           :math:`|\delta_i| \le \rho\,(|\theta_i| + 1)`, of Keskar et al. [3]_    0.001, 0.02
        linf          :math:`|\delta_i| \le \rho` [4]_                                        0.001, 0.02
        adaptive-linf :math:`|\delta_i| \le \rho\,|\theta_i|` [4]_                            0.01, 0.2
        ============= ======================================================================= =============

        For averages, :math:`\delta_i` are independent: in the first three, normal with standard deviations :math:`\rho`
        times 1, :math:`|\theta_i|` or the root mean square; in boxes, uniform.
    measures : sequence of {"worst", "average", "flatness"}
        What to measure.
    method : {"frank-wolfe", "gradient", "apgd"}
        How to look for the worst case: see :mod:`pnanalysis.perturbation.ascent`.
    n_steps : int
        Gradients over all examples that each ascent may take.
    n_starts : int
        Ascents, of which the highest counts: one from the checkpoint, the others from random points of the border.
    group : int, optional
        Look for a worst case of each so many examples, drawn by ``seed`` (those of a loader follow each other), and
        average over them (m-sharpness); by default one of all.
    n_directions : int
        Random directions of the average case, the same for all neighbourhoods, radii and checkpoints, each with both
        signs.
    layer : str, optional
        The layer, or weight, of relative flatness; by default the last weight matrix, which acts on the penultimate
        features.
    normalize_logits : bool
        Centre the logits of each example and divide them by their Euclidean norm before the loss [4]_.
    second_order : bool
        Compare with the second-order expansion of the loss, by products with the Hessian.
    split, n, batch_size, dtype, device
        As for :func:`pnanalysis.landscape`.
    seed : int
        Of examples, starts and directions.
    progress : bool
    state : path, optional
        Folder for finished parts, from which an interrupted call with the same arguments resumes.

    Returns
    -------
    xarray.Dataset
        Kind ``sharpness``, dims ``checkpoint``, ``radius_index`` (unless each neighbourhood is given a single radius)
        and ``neighbourhood``.

        - ``rise``: the largest rise of the mean loss that was found, a lower bound on the largest there is;
          ``rise_start`` what each ascent found; ``one_step`` the rise at the point where the linearised loss is
          largest, which SAM trains against; ``relative`` is ``100 * rise / (1 + loss)``, Keskar's measure;
        - ``average``: the mean rise, with its standard error ``average_se``, the parts of it from directions and from
          examples, and a 95 % interval;
        - ``rise_quadratic`` and ``average_quadratic``: the same of the second-order expansion (a lower bound; NaN for
          rises in boxes), with their standard errors: ``rise_quadratic_se`` over examples, ``average_quadratic_se``
          with its parts ``average_quadratic_direction_se`` and ``average_quadratic_data_se``;
        - ``relative_flatness`` [5]_ with its errors, for the layer ``flatness_layer``.

    Raises
    ------
    PnError
        If a neighbourhood or an option is unknown, a radius is not positive, or the loss is not finite within one.

    Notes
    -----
    Standard errors of rises, measured and of second order, are paired, over examples, at the points found. To first
    order, these are the errors of the largest rises themselves, since the point where a maximum is taken does not
    matter for its derivative by the weights of examples (Danskin). That the maximum was searched over the same examples
    makes it too large by an amount of order one over their number, which they leave out, as they do what ascents have
    missed.

    Running statistics of batch normalisation stay those of the checkpoint. Scales of biases and of the parameters of
    normalisation layers are formed like those of weights, but in ``filter``, where they stay as they are.

    References
    ----------
    .. [1] P. Foret et al., "Sharpness-Aware Minimization", ICLR 2021, arXiv:2010.01412.
    .. [2] J. Kwon et al., "ASAM: Adaptive Sharpness-Aware Minimization", ICML 2021, arXiv:2102.11600.
    .. [3] N. Keskar et al., "On Large-Batch Training for Deep Learning", ICLR 2017, arXiv:1609.04836, eq. 4 with the
       full space; they ascend by L-BFGS-B.
    .. [4] M. Andriushchenko et al., "A Modern Look at the Relationship between Sharpness and Generalization", ICML
       2023, arXiv:2302.07011.
    .. [5] H. Petzka et al., "Relative Flatness and Generalization", NeurIPS 2021, arXiv:2001.00939.

    Examples
    --------
    >>> import torch
    >>> net = torch.nn.Linear(3, 2)
    >>> data = torch.randn(50, 3), torch.randint(2, (50,))
    >>> ds = sharpness(net, data=data, radii={"adaptive": [0.1, 0.2]}, progress=False)
    >>> sorted(ds.rise.sizes)
    ['checkpoint', 'neighbourhood', 'radius_index']
    """
    at_least(1, n=n, batch_size=batch_size)
    options = SharpnessOptions(
        radii, average_radii, (measures,) if isinstance(measures, str) else tuple(measures), method, n_steps, n_starts,
        group, n_directions, layer, normalize_logits, second_order, dtype, seed,
    )  # fmt: skip
    torch_dtype = resolve_dtype(dtype)
    selection, torch_device = select(given, checkpoints, model=model, data=data, loss=loss), resolve_device(device)
    settings = {**asdict(options), "split": split, "n": n, "batch_size": batch_size}
    found = {}
    with (
        WorkFolder.held(state, settings) as cache,
        progress_bar("sharpness", len(selection.distinct()) * options.n_steps_in_all, progress) as advance,
    ):
        for item, network, own_loss, batches, _ in selection.measurable(
            split, n, batch_size, seed, torch_device, torch_dtype
        ):
            found[item.key] = network_sharpness(
                network, own_loss, batches, options, label=item.label, advance=advance,
                cache=None if cache is None else cache.of(network, batches),
            ).ds  # fmt: skip
    ds = xr.concat([found[item.key] for item in selection], dim="checkpoint", data_vars="all").assign_coords(
        selection.coordinates
    )
    shared = [name for name in ("radius", "average_radius") if name in ds]  # the same for all checkpoints
    ds = ds.assign({name: ds[name].isel(checkpoint=0, drop=True) for name in shared})
    attrs: dict[str, Any] = {
        "radii": options.worst, "average_radii": options.average, "measures": options.measures, "method": method,
        "n_steps": n_steps, "n_starts": n_starts, "group": group, "n_directions": n_directions,
        "normalize_logits": normalize_logits or None,
    }  # fmt: skip
    ds.attrs = {}
    return schema.finish(
        ds, "sharpness", **selection.sources[0].dataset_attrs(), **attrs, split=split, n=n, batch_size=batch_size,
        seed=seed, device=str(torch_device), dtype=dtype,
    )  # fmt: skip
