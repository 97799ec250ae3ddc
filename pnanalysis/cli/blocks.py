"""``pnanalysis blocks``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pnanalysis.cli import options
from pnanalysis.estimates import Estimate
from pnanalysis.terminal.console import Table, make_table

if TYPE_CHECKING:
    import xarray as xr

#: Rows of a table; the largest by trace where there are more blocks.
_MOST_ROWS = 40


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("blocks")(blocks)


def blocks(
    runs: options.Paths = None,
    checkpoint: options.Checkpoints = None,
    by: Annotated[
        Literal["layers", "tensors", "qkv", "heads", "experts"],
        typer.Option(help="What the parameters are divided into."),
    ] = "layers",
    block: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LAYER[PART]",
            help="A block of your own, in place of --by: a layer, a pattern, or a part such as attn[q.3/12]; may be "
            "repeated.",
        ),
    ] = None,
    operator: Annotated[Literal["hessian", "ggn", "fisher"], typer.Option()] = "hessian",
    n_hvp: Annotated[int, typer.Option("--n-hvp", help="Products for all blocks together.")] = 200,
    until: Annotated[
        list[str] | None,
        typer.Option(
            metavar="trace=ERROR",
            help="Stop once the probes' error of every trace is below this part of the network's trace: trace=0.02.",
        ),
    ] = None,
    diagonal: Annotated[bool, typer.Option("--diagonal", help="Save the diagonal itself, with its errors.")] = False,
    spectra: Annotated[bool, typer.Option("--spectra", help="Spectra of the blocks, and how far they differ.")] = False,
    n_spectrum: Annotated[int, typer.Option(help="Products for each spectrum, over each half of the examples.")] = 60,
    bits: Annotated[
        list[int] | None,
        typer.Option(help="Rank the blocks by what rounding their weights to so many bits does; may be repeated."),
    ] = None,
    quantised: Annotated[
        Path | None,
        typer.Option(help="Rank the blocks by what other weights do: a file of the network's weights when quantised."),
    ] = None,
    split: Annotated[options.Split, typer.Option()] = "train",
    n: Annotated[int, typer.Option("--n", help="Examples, drawn at random by --seed.")] = 2048,
    batch_size: Annotated[int, typer.Option(help="Examples per batch, at most; changes memory use.")] = 512,
    params: options.Params = None,
    bn: options.BatchNorm = "eval",
    dtype: Annotated[options.Dtype, typer.Option()] = "float32",
    amp: options.Amp = "no",
    draws: options.Draws = None,
    method: options.Method = "exact",
    data_error: Annotated[
        Literal["examples", "none"], typer.Option(help="Whether errors include that of the choice of examples.")
    ] = "examples",
    model: options.Model = None,
    weights: options.Weights = None,
    data: options.Data = None,
    tokens: options.Tokens = None,
    loss: options.LossName = None,
    output: options.Output = None,
    plot: options.Plot = None,
    device: options.Device = "auto",
    seed: options.Seed = 0,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Curvature block by block: traces, Frobenius norms and couplings of all layers, from one set of products.

    As many products as for the trace of the whole network. What blocks and errors are: docs/concepts/blocks.md.

    [bold]Examples[/bold]

      pnanalysis blocks runs/lenet5 --plot blocks.pdf

      pnanalysis blocks runs/lenet5 -c champion --bits 4 --bits 8

      pnanalysis blocks runs/lenet5 -c champion --quantised champion-int4.safetensors

      pnanalysis blocks --model hf:gpt2 --data text:book.txt --by heads --spectra

      pnanalysis blocks runs/lenet5 --operator ggn --by tensors --diagonal
    """
    from pnanalysis.analyses.blocks import blocks as analyse
    from pnanalysis.analyses.work_folder import remove_unfinished

    given = options.sources(runs, model, weights, data, loss, output, tokens)
    unfinished = options.unfinished("blocks", given[0], output, quiet)
    ds = analyse(
        *given, blocks=block or by, checkpoints=checkpoint, operator=operator, n_hvp=n_hvp,
        until=options.targets(until), diagonal=diagonal, spectra=spectra, n_spectrum=n_spectrum, bits=bits,
        quantised=quantised, split=split, n=n, batch_size=batch_size, params=params, bn_mode=bn, dtype=dtype, amp=amp,
        draws=draws, method=method, data_error=data_error, device=device, seed=seed, progress=not quiet,
        state=unfinished,
    )  # fmt: skip
    options.deliver(ds, given[0], output, plot, quiet, _tables)
    remove_unfinished(unfinished)


def _tables(ds: xr.Dataset) -> Iterator[Table | str]:
    for name in ds.checkpoint.values:
        at = ds.sel(checkpoint=name).dropna("block", subset=["trace"])
        yield _blocks(str(name), at)
        if at.sizes["block"] > _MOST_ROWS:
            yield f"and {at.sizes['block'] - _MOST_ROWS} blocks of smaller traces, which are in the dataset"
        for bits in at.bits.values if "sensitivity" in at else ():
            yield _ranks(str(name), at.sel(bits=bits))
        if "js_divergence" in at:
            yield _spectra(str(name), at)
            if (hidden := at.sizes["block"] * (at.sizes["block"] - 1) // 2 - _MOST_ROWS) > 0:
                yield f"and {hidden} pairs of blocks that are closer to each other, which are in the dataset"


def _part(at: xr.Dataset, name: str) -> Estimate:
    from pnanalysis.analyses.diagnostics import estimate_of

    return estimate_of(at, name)


def _blocks(name: str, ds: xr.Dataset) -> Table:
    """One row per block, and one for the network."""
    import numpy as np

    rows: list[list[object]] = []
    for i in np.sort(np.argsort(-np.abs(ds.trace.values), kind="stable")[:_MOST_ROWS]):
        at = ds.isel(block=i, other=i)
        apart = Estimate(float(at.off_diagonal_share), float(at.off_diagonal_share_se), percent=True)
        rows.append(
            [str(at.block.item()), f"{int(at.n_parameters):,}", _part(at, "trace"), _part(at, "frobenius_norm"), apart]
        )
    rows.append(["all", f"{int(ds.n_parameters.sum()):,}", _part(ds, "network_trace"), None, None])
    title = f"{name}: blocks of the {ds.attrs['operator']} over {ds.attrs['n']} examples, {int(ds.n_hvp)} products"
    columns = ["block", "parameters", "trace", "Frobenius norm", "energy with other blocks"]
    return make_table(title, columns, rows)


def _ranks(name: str, ds: xr.Dataset) -> Table:
    """Blocks from the most sensitive to the least."""
    rows: list[list[object]] = []
    ds = ds.sortby("rank").dropna("block", subset=["rank"])
    for i in range(min(ds.sizes["block"], _MOST_ROWS)):
        at = ds.isel(block=i)
        low, high = int(at.rank_low), int(at.rank_high)
        place = f"{int(at['rank'])}" + (f" ({low} to {high})" if low < high else "")
        increase = Estimate(float(at.loss_increase), float(at.loss_increase_data_se), signed=True)
        quadratic = Estimate(float(at.quadratic), float(at.quadratic_data_se))
        rows.append([place, str(at.block.item()), _part(at, "sensitivity"), quadratic, float(at.linear), increase])
    columns = [
        "rank",
        "block",
        "mean eigenvalue x change",
        "second order",
        "first order",
        "measured change of the loss",
    ]
    given = ds.attrs.get("quantised", "a file")
    what = f"rounded to {int(ds.bits)} bits" if ds.bits > 0 else f"quantised as in {given}"
    return make_table(f"{name}: weights {what}, block by block", columns, rows)


def _spectra(name: str, ds: xr.Dataset) -> Table | str:
    """How far spectra of two blocks differ, from the largest divergence on, and how far those of one block do."""
    import numpy as np

    ds = ds.sel(other=ds.block.values)
    first, second = np.triu_indices(ds.sizes["block"], 1)
    if not len(first):
        return "there is a single block, whose spectrum is compared with no other"
    values, rows = ds.js_divergence.values, []
    for i in np.argsort(-values[first, second], kind="stable")[:_MOST_ROWS]:
        k, m = first[i], second[i]
        at = ds.isel(block=k, other=m)
        pair = [str(ds.block.values[k]), str(ds.block.values[m])]
        rows.append([*pair, _part(at, "js_divergence"), float(max(values[k, k], values[m, m])),
                     _part(at, "wasserstein1")])  # fmt: skip
    title = f"{name}: distances between spectra of blocks over two halves of the examples, with 95 % intervals"
    columns = ["block", "other block", "Jensen-Shannon divergence [nat]", "by chance", "Wasserstein-1 distance"]
    return make_table(title, columns, rows)
