"""Curvature by blocks of parameters: layers, queries, keys and values, heads, experts, or any parts of them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import nn

from pnanalysis import schema
from pnanalysis.analyses.eigenpairs import is_matrix
from pnanalysis.analyses.hessian import has_all, names_of
from pnanalysis.analyses.network_blocks import BlockOptions, matrix_blocks, quantisations
from pnanalysis.analyses.other_weights import Weights, by_label, parameters_of
from pnanalysis.analyses.spectrum_cache import SpectrumCache
from pnanalysis.analyses.stacking import along_checkpoints
from pnanalysis.analyses.work_folder import weights_digest
from pnanalysis.checks import at_least, resolve_dtype
from pnanalysis.curvature.base import CurvatureOperator
from pnanalysis.curvature.batch_weights import Weight
from pnanalysis.curvature.fused_layout import check_fused_layouts
from pnanalysis.curvature.named_blocks import Blocks, blocks_of, fused_layers
from pnanalysis.curvature.peers import make_operator
from pnanalysis.curvature.quantisation import Scheme, scheme_of
from pnanalysis.errors import CurvatureError
from pnanalysis.evaluation.diagnosis import clear_errors
from pnanalysis.inputs.copies import unwrapped
from pnanalysis.inputs.data import Batch, DataLike, n_examples
from pnanalysis.inputs.models import Loss, ModelLike, canonical_names
from pnanalysis.inputs.selection import select
from pnanalysis.inputs.sources import resolve_device
from pnanalysis.spectra.linear_operator import LinearOperator, as_operator
from pnanalysis.terminal.progress import Advance, progress_bar

#: A scheme, or weights after it.
Quantised = Scheme | Weights
#: The scheme of a network.
SchemeOf = Callable[[nn.Module], Scheme]
_PART_OF_FUSED = re.compile(r"\[[qkv][.\]]")


def blocks(
    *given: Any,
    blocks: Blocks = "layers",
    model: ModelLike | None = None,
    data: DataLike | None = None,
    loss: str | Loss | None = None,
    checkpoints: Sequence[str] | None = None,
    operator: str = "hessian",
    n_hvp: int = 200,
    until: Mapping[str, float] | None = None,
    diagonal: bool = False,
    spectra: bool = False,
    n_spectrum: int = 60,
    bits: int | Sequence[int] | None = None,
    quantised: Quantised | Mapping[str, Quantised] | None = None,
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
    data_error: str = "examples",
    device: str | None = "cpu",
    seed: int = 0,
    progress: bool = True,
    state: str | os.PathLike[str] | None = None,
) -> xr.Dataset:
    r"""Traces, Frobenius norms and energies of all blocks of a curvature matrix, from one set of products.

    Parameters
    ----------
    *given : operator or matrix; or Run, Source, path, Module, state dict, or mapping or sequence of these
        A single operator, or anything :func:`pnanalysis.as_operator` takes; or what :func:`pnanalysis.hessian` takes.
    blocks : {"layers", "tensors", "qkv", "heads", "experts"}, sequence of str, or mapping
        What the parameters are divided into: see :func:`pnanalysis.curvature.named_blocks.blocks_of`. Or selections of
        layers, parameters and parts of them, such as ``["encoder.*", "attn[q.3/12]"]``, each a block. Of a matrix, the
        sizes of its blocks by label.
    model, data, loss, checkpoints
        See :func:`pnanalysis.hessian`.
    operator : {"hessian", "ggn", "fisher"}
        Hessian of the mean loss, generalised Gauss-Newton, or empirical Fisher.
    n_hvp : int
        Products for all blocks together: half of them for a Krylov space, half for random signs. From as many as there
        are parameters on, everything is exact.
    until : mapping, optional
        ``{"trace": 0.02}`` ends as soon as no block's trace has a standard error, for the random signs, above 2 % of
        the whole network's trace.
    diagonal : bool
        Also the diagonal itself, with the errors of every entry. Saved datasets have it beside themselves, read where
        it is used.
    spectra : bool
        Also the spectrum of each block, by ``n_spectrum`` products with this block alone on each of two halves of the
        examples, and how far those of two blocks differ.
    n_spectrum : int
    bits : int or sequence of int, optional
        Also what rounding the weights of each block to so many bits does to the loss.
    quantised : callable, Module, state dict or path, or mapping of str to these, optional
        The same for any other quantisation: a function of a parameter's name and values that returns the values it
        becomes, or the quantised weights themselves, as numbers of their shapes (those that are left out stay as they
        are); of several networks by their names. It is at ``bits`` 0 in the results.
    split, n, batch_size, params, bn_mode, dtype, amp, weight, draws, method
        See :func:`pnanalysis.hessian`.
    data_error : {"examples", "none"}
        Whether errors include that of the choice of examples. It takes no further products: examples are divided into
        16 groups, and each product is summed over the groups one after the other.
    device : str or None
    seed : int
        Of examples, their groups and random vectors.
    progress : bool
    state : path, optional
        Folder for unfinished work, from which an interrupted call with the same arguments resumes.

    Returns
    -------
    xarray.Dataset
        Kind ``blocks``, dims ``block`` and ``other`` (the same blocks again), with ``checkpoint`` in front unless a
        single operator was given. ``NAME_se`` is the standard error of both ``NAME_probe_se``, for the random signs,
        and ``NAME_data_se``, for the choice of examples; ``NAME_low`` and ``NAME_high`` are a 95 % interval.

        - ``trace``, ``frobenius_norm`` (block) of the diagonal blocks; ``network_trace``;
        - ``energy`` (block, other), squared Frobenius norms :math:`\lVert H_{kl} \rVert_F^2` of all blocks;
          ``off_diagonal_energy`` (block), the sum of a block's energies with all others, and ``off_diagonal_share``,
          its part of all energies of the block; ``network_off_diagonal_share``, the part of all energies that lies
          between different blocks;
        - ``trace_concentration``, :math:`\sum_k t_k^2 / (\sum_k \lvert t_k \rvert)^2` of the traces :math:`t_k`: 1
          where a single block has all of the trace, 1 over the number of blocks where they share it evenly;
        - ``n_parameters`` (block); ``n_hvp``;
        - with ``diagonal``: ``diagonal`` (statistic, parameter): value, and standard errors for signs and examples;
        - with ``spectra``: ``js_divergence`` and ``wasserstein1`` (block, other) between spectra over different halves
          of the examples, and off the diagonal their standard errors ``NAME_se``, for probes and examples, of one to
          two degrees of freedom, and the ends ``NAME_low`` and ``NAME_high`` of their 95 % Student intervals; on the
          diagonal, between those of one block: what chance alone gives. ``spectrum_node`` and ``spectrum_weight``
          (half, block, quadrature) are the spectra;
        - with ``bits`` or ``quantised`` (along ``bits``): ``sensitivity`` (block), the mean eigenvalue times the
          squared change of the weights (HAWQ-V2), its ``rank`` from the largest with a 95 % interval, and
          ``rank_probability`` (block, place); ``quadratic``, ``linear``, :math:`\tfrac12 \Delta w^\top H \Delta w`
          and :math:`g^\top \Delta w`, and the measured ``loss_increase``; all three for all blocks together as
          ``NAME_all``.

    Raises
    ------
    PnError
        If a checkpoint, the data or a setting is invalid, blocks overlap, or the operator is not symmetric.

    Notes
    -----
    Estimates of energies are not restricted to positive numbers: those that are far below the energies of their row
    and column may come out negative, within their errors. Errors of energies for the choice of examples are of first
    order: the energy of few examples is larger than that of many, for the noise of examples has energy, too.

    References
    ----------
    Y. Zhang et al., "Why Transformers Need Adam: A Hessian Perspective", arXiv:2402.16788. Z. Dong et al., "HAWQ-V2:
    Hessian Aware trace-Weighted Quantization of Neural Networks", arXiv:1911.03852. E. Epperly, J. Tropp, R. Webber,
    "XTrace: making the most of every sample in stochastic trace estimation", arXiv:2301.07825.

    Examples
    --------
    >>> import numpy as np
    >>> ds = blocks(np.diag([3.0, 2.0, 0.5, -1.0]), blocks={"a": 3, "b": 1}, progress=False)
    >>> ds.trace.values
    array([ 5.5, -1. ])
    """
    at_least(1, n=n, batch_size=batch_size)
    widths = () if bits is None else (bits,) if isinstance(bits, int) else tuple(bits)
    options = BlockOptions(
        blocks, n_hvp, until, operator, params, bn_mode, dtype, amp, weight, draws, method, diagonal, spectra,
        n_spectrum, widths, data_error, seed,
    )  # fmt: skip
    if len(given) == 1 and is_matrix(given[0]):
        if any(option is not None for option in (model, data, loss, checkpoints)):
            raise CurvatureError("an operator has its own network, data and loss; leave model, data and loss out")
        schemes = by_label("quantised", quantised, ["operator"], _scheme)
        with progress_bar("blocks", None, progress) as advance:
            folder = None if state is None else Path(state)
            ds = _of_operator(given[0], options, schemes.get("operator"), folder, advance)
        return schema.finish(ds, "blocks", operator=type(given[0]).__name__, blocks=_as_text(blocks), seed=seed)
    torch_device = resolve_device(device)
    selection = select(given, checkpoints, model=model, data=data, loss=loss)
    selection.check_weights()
    schemes = by_label("quantised", quantised, selection.labels, _scheme)
    settings = {**asdict(options), "weight": None, "split": split, "n": n, "batch_size": batch_size}
    found: dict[object, tuple[xr.Dataset, str]] = {}
    with SpectrumCache.held(state, settings | names_of(selection)) as cache:
        for each in selection.measurable(split, n, batch_size, seed, torch_device):
            with progress_bar(each.item.label, None, progress) as advance:
                one = network_blocks(
                    each.network, each.loss, each.batches, options, label=each.item.label, device=torch_device,
                    quantised=schemes.get(each.item.label), advance=advance,
                    cache=None if cache is None else cache.of(each.network, each.batches),
                )  # fmt: skip
            found[each.item.key] = one, weights_digest(each.network)
    ds = stack([found[item.key][0] for item in selection], selection.labels)
    ds = ds.assign_coords(
        **selection.coordinates, weights_digest=("checkpoint", [found[item.key][1] for item in selection])
    )
    n_used = n_examples(each.part, each.batches)
    return schema.finish(
        ds, "blocks", **selection.sources[0].dataset_attrs(), operator=operator, blocks=_as_text(blocks), split=split,
        n=n_used, all_examples=has_all(each.item.source, split, n, n_used), batch_size=batch_size, bn_mode=bn_mode,
        params=params, seed=seed, device=str(torch_device), dtype=dtype, amp=amp, draws=draws,
        bits_tried=list(widths) or None, quantised=_name_of(quantised),
    )  # fmt: skip


def network_blocks(
    network: nn.Module,
    loss: Loss,
    batches: Iterable[Batch],
    options: BlockOptions,
    *,
    label: str = "network",
    device: torch.device | str = "cpu",
    quantised: SchemeOf | None = None,
    cache: SpectrumCache | None = None,
    advance: Advance | None = None,
) -> xr.Dataset:
    """Blocks of one network over batches in memory.

    Parameters
    ----------
    network : Module
    loss : callable
        ``loss(outputs, targets)``, averaged over the batch.
    batches : re-iterable of (inputs, targets)
    options : BlockOptions
    label : str
        What the network is called in messages.
    device : torch.device or str
    quantised : callable, optional
        What gives the scheme of a network.
    cache : SpectrumCache, optional
        Keeps what is finished, and what is in progress.
    advance : callable, optional
        Called with the products of each step.
    """
    with clear_errors(label, network, batches, loss):
        names = blocks_of(network, options.blocks, options.params)
        op = make_operator(
            "native", options.operator, network, loss, batches, params=[one for own in names.values() for one in own],
            bn_mode=options.bn_mode, dtype=resolve_dtype(options.dtype), device=device, amp=options.amp,
            weight=options.weight, draws=options.draws, method=options.method, expected_products=1,
        )  # fmt: skip
        _check_layouts(op, options)
        tried = quantisations(network, options.bits, None if quantised is None else quantised(network))

        def compute(state: Path | None = None) -> xr.Dataset:
            ds = matrix_blocks(
                op, names, options, quantised=tried, state=state, advance=advance or (lambda steps: None)
            )
            return schema.finish(ds, "blocks")

        own = tried[-1].digest if quantised is not None else ""  # other weights have another file
        return compute() if cache is None else cache.finished(own, op, compute)


def _of_operator(
    given: Any, options: BlockOptions, quantised: SchemeOf | None, state: Path | None,
    advance: Callable[[float], None],
) -> xr.Dataset:  # fmt: skip
    """Blocks of a single operator or matrix."""
    op = as_operator(given)
    if isinstance(op, CurvatureOperator):
        names = blocks_of(op.model, options.blocks, op.names if _by_name(options) else None)
        chosen = [one for own in names.values() for one in own]
        own = op if sorted(chosen) == sorted(op.names) else op.restricted(chosen, 1)
        _check_layouts(op, options)
        tried = quantisations(op.model, options.bits, None if quantised is None else quantised(op.model))
        return matrix_blocks(own, names, options, quantised=tried, state=state, advance=advance)
    if options.spectra or options.bits or quantised is not None or not isinstance(options.blocks, Mapping):
        raise CurvatureError(
            "a matrix takes the sizes of its blocks by label, blocks={'a': 10, 'b': 20}, and neither spectra nor "
            "quantisation"
        )
    at_least(1, **{f"blocks[{label!r}]": size for label, size in options.blocks.items()})
    return matrix_blocks(op, options.blocks, options, state=state, advance=advance)


def _check_layouts(op: LinearOperator, options: BlockOptions) -> None:
    """See that fused layers of attention hold what the names of their parts say, where these are used."""
    named = map(str, _selections(options.blocks))
    uses_parts = any(name in ("qkv", "heads") or _PART_OF_FUSED.search(name) for name in named)
    if uses_parts and isinstance(op, CurvatureOperator):
        check_fused_layouts(op, fused_layers(op.model))


def _selections(blocks: Blocks) -> list[Any]:
    """What is selected, in whatever form."""
    given = blocks.values() if isinstance(blocks, Mapping) else [blocks]
    nested = (each if isinstance(each, Sequence) and not isinstance(each, str) else [each] for each in given)
    return [one for each in nested for one in each]


def _by_name(options: BlockOptions) -> bool:
    return isinstance(options.blocks, str)


def stack(rows: Sequence[xr.Dataset], labels: Sequence[str]) -> xr.Dataset:
    """Blocks of several networks along ``checkpoint``; NaN for blocks that a network does not have."""
    names = list(dict.fromkeys(str(name) for ds in rows for name in ds.block.values))
    places = {"block": names, "other": names, "place": np.arange(1, len(names) + 1)}
    return along_checkpoints(
        [ds.reindex({dim: of for dim, of in places.items() if dim in ds.dims}) for ds in rows], labels
    )


def _scheme(option: str, given: Quantised) -> SchemeOf:
    """What gives the scheme of a network, whose names tell whether a state dict is its own."""
    if callable(given) and not isinstance(given, nn.Module):
        scheme: Scheme = given
        return lambda network: scheme
    state = parameters_of(option, given)
    return lambda network: scheme_of(state, _names(network), canonical_names(unwrapped(network)))


def _names(network: nn.Module) -> set[str]:
    inner = unwrapped(network)
    return {*inner.state_dict(keep_vars=True), *(name for name, _ in inner.named_parameters(remove_duplicate=False))}


def _name_of(quantised: Any) -> str | None:
    if quantised is None:
        return None
    if isinstance(quantised, str | os.PathLike):
        return Path(quantised).name
    return str(getattr(quantised, "__qualname__", type(quantised).__name__))


def _as_text(blocks: Blocks) -> Any:
    return blocks if isinstance(blocks, str) else list(blocks)


__all__ = ["blocks", "network_blocks"]
