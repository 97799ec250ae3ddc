"""Options that several commands have, and how analyses are saved, drawn and printed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from pnanalysis.checks import check_figure, check_room, check_writable, shown
from pnanalysis.errors import PnError, reason
from pnanalysis.terminal.console import (
    Table,
    json_option,
    print_line,
    print_saved,
    print_status,
    print_table,
    when_interrupted,
)

if TYPE_CHECKING:
    import xarray as xr

    from pnanalysis.inputs.data import TextFile
    from pnanalysis.inputs.sources import Source


def _dataset_file(path: Path | None) -> Path | None:
    """Callback of ``--output``: check the path before anything is computed."""
    if path is None:
        return None
    from pnanalysis.io.datasets import check_destination  # here, because xarray is slow to import

    return check_destination(path)


def figure_file(path: Path | None) -> Path | None:
    """Callback of options for figures: check their path before anything is computed."""
    return None if path is None else check_figure(path)


#: Room for a dataset that must be there before any work: most are smaller.
_DATASET_BYTES = 2**20

Split = Literal["train", "validation", "test"]
Dtype = Literal["float32", "float64"]
_INPUT, _OUTPUT = "Model and data", "Output"
Paths = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="[RUN]...", help="Run directories; with --model, more files of weights.", show_default=False
    ),
]
Checkpoints = Annotated[
    list[str] | None,
    typer.Option(
        "--checkpoint", "-c", metavar="NAME", rich_help_panel=_INPUT,
        help="plain, champion, challenger (the best iteration after plain), start, ends, all, iterNN, iterNN/epochNNN "
        "or a file's name; may be repeated.",
        autocompletion=lambda: ["plain", "champion", "challenger", "start", "ends", "all"],
    ),
]  # fmt: skip
Model = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|MODULE:FACTORY|hf:DIR",
        rich_help_panel=_INPUT,
        help="Your own model, built by a call without arguments, or a folder that save_pretrained wrote.",
    ),
]
Weights = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE...", rich_help_panel=_INPUT,
        help="Weights of --model: safetensors files, or state dicts saved by torch.save.",
    ),
]  # fmt: skip
Data = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC", rich_help_panel=_INPUT,
        help="digits, cifar10, imagefolder:PATH, text:FILE or module:factory; by default what the run was trained on.",
    ),
]  # fmt: skip
Tokens = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=_INPUT, help="Tokens in each example of text:FILE; 256 by default.", show_default=False
    ),
]
LossName = Annotated[
    str | None,
    typer.Option(
        "--loss", metavar="NAME|MODULE:FUNCTION", rich_help_panel=_INPUT,
        help="By default the loss that the run was trained with; cross_entropy for --model.",
    ),
]  # fmt: skip
Output = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", metavar="FILE.nc|zarr", rich_help_panel=_OUTPUT, callback=_dataset_file,
        help="Where to save, as NetCDF4 or Zarr; by default RUN/analysis/KIND.nc.",
    ),
]  # fmt: skip
Plot = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.png|pdf|svg", rich_help_panel=_OUTPUT, callback=figure_file, help="Also draw the figure."
    ),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json", rich_help_panel=_OUTPUT, callback=json_option, is_eager=True,
        help="Print one JSON object instead of tables.",
    ),
]  # fmt: skip
Params = Annotated[list[str] | None, typer.Option(metavar="LAYER", help="Restrict to this layer; may be repeated.")]
BatchNorm = Annotated[
    Literal["eval", "train"],
    typer.Option(help="Use running (eval) or batch (train) statistics of batch normalisation."),
]
Amp = Annotated[Literal["no", "tf32", "bf16"], typer.Option(help="Arithmetic of the passes; sums stay in --dtype.")]
Draws = Annotated[int | None, typer.Option(help="Average over random draws of a network that draws in eval mode.")]
Method = Annotated[
    Literal["exact", "finite_difference"],
    typer.Option(help="Exact products, or differences of gradients where torch has no second derivative."),
]
DataError = Annotated[
    Literal["examples", "groups", "none"],
    typer.Option(
        help="Error for the choice of examples: of the trace, the Frobenius norm and the extreme eigenvalues "
        "(examples), of all numbers, the density and the distance of spectra (groups; takes 8 times as long), or none."
    ),
]
Budget = Annotated[
    int | None,
    typer.Option("--n-hvp", help="The most products to spend on each spectrum, 900 by default."),
]
BudgetOfEach = Annotated[
    int | None,
    typer.Option(
        "--n-hvp",
        help="The most products to spend on each spectrum, and on all blocks of a network; 200 and 100 by default.",
    ),
]
#: What compare and champion measure where they are asked to, one by one or all at once.
Further = Annotated[
    bool,
    typer.Option(
        "--all", help="Also eigenpairs, sharpness, blocks and learning coefficients; --no-... leaves one of them out."
    ),
]
Eigenpairs = Annotated[
    bool | None,
    typer.Option(
        "--eigenpairs/--no-eigenpairs",
        help="Leading Hessian eigenvalues, and spaces of their vectors.",
        show_default=False,
    ),
]
Sharpness = Annotated[
    bool | None,
    typer.Option(
        "--sharpness/--no-sharpness", help="Rises of the loss nearby, and relative flatness.", show_default=False
    ),
]
Blocks = Annotated[
    bool | None,
    typer.Option(
        "--blocks/--no-blocks",
        help="Traces and norms of the Hessian's layers, and what lies between them.",
        show_default=False,
    ),
]
LearningCoefficient = Annotated[
    bool | None,
    typer.Option(
        "--learning-coefficient/--no-learning-coefficient", help="Local learning coefficients.", show_default=False
    ),
]
Until = Annotated[
    list[str] | None,
    typer.Option(
        "--until", metavar="NAME=ERROR",
        help="Stop at this relative error of trace, frobenius_norm, effective_rank or lambda_max, such as trace=0.02; "
        "may be repeated.",
    ),
]  # fmt: skip
Quiet = Annotated[bool, typer.Option("--quiet", "-q", rich_help_panel=_OUTPUT, help="Print no progress and no tables.")]
Device = Annotated[str, typer.Option(metavar="cpu|cuda|auto", help="auto uses CUDA if available.")]
#: How radii of neighbourhoods are written.
RADII = "NAME=RADIUS[,RADIUS]"
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn at random.")]


def sources(
    paths: Iterable[Path] | None,
    model: str | None,
    weights: list[Path] | None,
    data: str | None,
    loss: str | None,
    output: Path | None,
    tokens: int | None = None,
) -> list[Source]:
    """The runs, or the model with its files of weights, that the command line names.

    Raises
    ------
    PnError
        If neither is named, weights are given without a model, or the result could not be saved.
    """
    from pnanalysis.inputs.hugging_face import folder_of
    from pnanalysis.inputs.networks import open_files
    from pnanalysis.inputs.selection import as_sources
    from pnanalysis.inputs.sources import as_source
    from pnanalysis.io.runs import is_run

    given = list(paths or [])
    described = data_of(data, tokens)
    if model is None and any(folder_of(path) is not None for path in given):
        return as_sources(given, None, described, loss)
    if model is not None and (weights or not given or not is_run(given[0])):
        return [open_files(model, [*(weights or []), *given], described, loss or "cross_entropy")]
    if weights:
        raise PnError("--weights needs --model: a registered name or module:factory")
    if not given:
        raise PnError("nothing to analyse: name a run directory, or your own --model, --weights and --data")
    found = [as_source(path, model, described, loss) for path in given]
    destination("new", found[0], output)  # for its check, before anything is computed
    return found


def data_of(spec: str | None, tokens: int | None) -> str | TextFile | None:
    """The data that ``--data`` and ``--tokens`` name.

    Raises
    ------
    PnError
        If the tokens are not those of a text.
    """
    from pnanalysis.inputs.data import text_file

    found = text_file(spec, tokens)
    if found is None and tokens is not None:
        raise PnError("--tokens is for --data text:FILE; leave it out")
    return found or spec


def destination(kind: str, first: Source, output: Path | None) -> Path:
    """Where a dataset is saved: ``output`` if given, else in the first run, else in the current folder.

    Raises
    ------
    PnError
        If nothing can be written there.
    """
    from pnanalysis.io.files import check_inside

    if output is None:
        path = check_writable(_place(kind, first))
        if first.run is not None:
            check_inside(path, first.run.path, PnError)
    else:
        path = output
    check_room(path, _DATASET_BYTES, "a dataset may take", "make room, or give --output on another disk")
    return path


def unfinished(kind: str, first: Source, output: Path | None, quiet: bool) -> Path:
    """The folder of unfinished work beside the dataset; says so where there is some, and what an interrupt leaves.

    Raises
    ------
    PnError
        If nothing can be written there.
    """
    folder = destination(kind, first, output).with_suffix(".unfinished")
    if any(any(folder.rglob(saved)) for saved in ("*.nc", "*.safetensors")):
        print_status(f"continuing from what is saved in {folder}", quiet)
    when_interrupted("run the same command again to continue")
    return folder


def _place(kind: str, first: Source) -> Path:
    """Where a dataset is saved by default."""
    from pnanalysis.io.runs import ANALYSIS

    return (first.run.path / ANALYSIS if first.run is not None else Path()) / f"{kind}.nc"


def size(text: str | None) -> int | None:
    """Bytes from a text such as ``500M`` or ``8G``.

    Raises
    ------
    PnError
        If the text is anything else.
    """
    if text is None:
        return None
    units = {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    try:
        n_bytes = int(float(number) * (units[unit] if unit else 1))
        if n_bytes < 1:
            raise ValueError("not above 0")
        return n_bytes
    except (ValueError, OverflowError, KeyError) as error:
        raise PnError(f"--memory {shown(text)}: write a number and K, M, G or T, such as 8G") from error


def targets(texts: list[str] | None) -> dict[str, float] | None:
    """Target errors by quantity from texts such as ``trace=0.02``.

    Raises
    ------
    PnError
        If a text is anything else.
    """
    if not texts:
        return None
    found: dict[str, float] = {}
    for text in texts:
        name, _, number = text.partition("=")
        try:
            found[name] = float(number)
        except ValueError as error:
            raise PnError(
                f"--until {shown(text)}: write a quantity and its relative error, such as trace=0.02"
            ) from error
    return found


def radii(texts: list[str] | None, option: str) -> dict[str, float | list[float]] | None:
    """Radii by neighbourhood from texts such as ``ball=0.05,0.1``.

    Raises
    ------
    PnError
        If a text is anything else.
    """
    from pnanalysis.perturbation.neighbourhoods import KINDS

    found: dict[str, float | list[float]] = {}
    for text in texts or ():
        name, _, numbers = text.partition("=")
        try:
            kind = KINDS[name]
            values = [float(number) for number in numbers.split(",")] if numbers else []
        except (ValueError, KeyError) as error:
            raise PnError(
                f"{option} {text}: write {'|'.join(KINDS)}=RADIUS or several, such as ball=0.05 or ball=0.05,0.1"
            ) from error
        chosen = kind.radius if option == "--radius" else kind.average_radius
        found[name] = values if len(values) > 1 else values[0] if values else chosen
    return found or None


def further(everything: bool, n: int, n_hvp: int | None, **asked: bool | None) -> dict[str, Any]:
    """Settings of the analyses that are off by default, or False, by name.

    Parameters
    ----------
    everything : bool
        Whether those are wanted that nothing is said about.
    n : int
        Examples.
    n_hvp : int, optional
        Products for all blocks of a network.
    **asked : bool or None
        By name of the analysis; None says nothing.
    """
    found: dict[str, Any] = {
        name: {"n": n} if one or (everything and one is None) else False for name, one in asked.items()
    }
    if found.get("blocks") and n_hvp is not None:
        found["blocks"]["n_hvp"] = n_hvp
    return found


class Together(NamedTuple):
    """Whether this process is one of several, whether it is the one that writes and prints, and its device."""

    several: bool
    is_first: bool
    device: str


def are_several() -> bool:
    """Whether ``torchrun`` has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def refuse_several(command: str) -> None:
    """Refuse what every process of ``torchrun`` would compute again, and write to the same file.

    Raises
    ------
    PnError
        In the first process; the others end without a word.
    """
    if not are_several():
        return
    if os.environ["RANK"] != "0":
        raise typer.Exit(2)
    raise PnError(f"pnanalysis {command} runs in one process; start it without torchrun (hessian divides its work)")


def join_processes(device: str) -> Together:
    """Join the other processes of ``torchrun``, where it has started this one.

    Raises
    ------
    PnError
        If there are fewer CUDA devices than processes on this machine.
    """
    if not are_several():
        return Together(False, True, device)
    from pnanalysis.curvature.processes import join
    from pnanalysis.inputs.sources import resolve_device

    return Together(True, os.environ["RANK"] == "0", str(join(resolve_device(device))))


def deliver(
    ds: xr.Dataset,
    first: Source | None,
    output: Path | None,
    plot: Path | None,
    quiet: bool,
    tables: Callable[[xr.Dataset], Table | Iterable[Table | str]],
    **drawing: Any,
) -> None:
    """Save a dataset, print its tables, draw its figure with the arguments ``drawing``, and print where the files are.

    It is saved as ``output``, or else at its :func:`destination` in ``first``; not at all if both are ``None``.

    Raises
    ------
    PnError
        If it could be saved elsewhere only; the message says where. The tables are printed before.
    """
    if output is None and first is not None:
        output = _place(str(ds.attrs["kind"]), first)
    failure = None if output is None else _save(ds, output)
    printed = tables(ds)
    for item in [printed] if isinstance(printed, Table) else printed:
        if isinstance(item, Table):
            print_table(item, quiet)
        else:
            print_line(item, quiet)
    if failure is not None:
        raise failure
    if plot is not None:
        from pnanalysis import plots

        plots.save_figure(plots.plot(ds, **drawing), plot)
    if output is not None or plot is not None:
        print_saved(quiet, output, plot)


def _save(ds: xr.Dataset, output: Path) -> PnError | None:
    """Save a dataset, or keep it in the folder for temporary files and return an error that says so."""
    from pnanalysis.io.datasets import save

    try:
        save(ds, output)
    except OSError as error:
        kept = Path(tempfile.mkdtemp(prefix="pnanalysis-")) / output.name
        try:
            save(ds, kept)
        except OSError:
            shutil.rmtree(kept.parent, ignore_errors=True)
            raise error from None
        cause = error.strerror or reason(error)
        return PnError(
            f"{output}: cannot be written, {cause}; the result is kept in {kept}: make room and move it there"
        )
    return None
