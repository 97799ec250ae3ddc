"""Many persistent chains of the kink regression, or for each as many restarts, as one dataset of their final losses.

``python -m trainers.runs.kink_study`` goes on where it was interrupted: at the next iteration, or the next chain.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
import xarray as xr

from pnanalysis import schema
from pnanalysis.checks import at_least
from pnanalysis.errors import TrainingError
from pnanalysis.io import netcdf
from pnanalysis.terminal.console import run_app
from trainers.choices import Strategy
from trainers.problems import kink_ensemble
from trainers.recipes import RECIPES
from trainers.seeds import derive_seed
from trainers.zoo.kink import kink_data

app = typer.Typer(name="kink_study", add_completion=False, pretty_exceptions_enable=False)

_CONFIG = RECIPES["kink"].config


def study(
    out: Path,
    *,
    strategy: str = "persistent",
    data: str = "kink6",
    chains: int = 20,
    iterations: int = _CONFIG.iterations,
    steps: int = _CONFIG.epochs,
    lam: float = _CONFIG.lam,
    seed: int = 0,
    device: str = "cpu",
) -> xr.Dataset:
    """Train all chains at once, or the restarts of one chain after the other.

    Parameters
    ----------
    out : Path
        The dataset; what is in it already is not trained again.
    strategy : {"persistent", "restart"}
    data : {"kink6", "kink20"}
    chains : int
        Starting points. The first restart of each is the plain training from the same point as its chain.
    iterations : int
        Trainings of each chain, or restarts, the plain one included.
    steps : int
        Of gradient descent.
    lam : float
    seed : int
        Chains of different seeds start from different points.
    device : str

    Returns
    -------
    xarray.Dataset
        Kind ``ensemble``: ``final_loss`` (iteration, member).

    Raises
    ------
    TrainingError
        If a setting is unusable, or the dataset was begun with others.
    """
    at_least(1, chains=chains, iterations=iterations, steps=steps)
    x, y = kink_data(data)
    starts = [derive_seed(seed, "kink start", chain) for chain in range(chains)]
    options: dict[str, Any] = {
        "lr": _CONFIG.lr, "momentum": _CONFIG.momentum, "steps": steps, "samples": 1, "device": device,
        "progress": False,
    }  # fmt: skip
    saved = netcdf.load(out) if out.is_file() else None

    def save(ds: xr.Dataset) -> None:
        netcdf.save(ds, out)

    if strategy == "persistent":
        return kink_ensemble.train_chains(
            x, y, seeds=starts, lams=[lam], iterations=iterations, resume=saved,
            on_iteration=save, **options,
        )  # fmt: skip
    about = {"lr": _CONFIG.lr, "momentum": _CONFIG.momentum, "steps": steps, "data": data, "strategy": strategy}
    rows = [] if saved is None else _restored(saved, iterations, starts, about)
    for start in starts[len(rows) :]:
        others = [derive_seed(start, "restart", k) for k in range(1, iterations)]
        trained = kink_ensemble.train_restarts(x, y, seeds=[start, *others], iterations=1, **options)
        rows.append(_as_iterations(trained, about))
        netcdf.save(_joined(rows), out)
    return _joined(rows)


def _as_iterations(trained: xr.Dataset, about: Mapping[str, Any]) -> xr.Dataset:
    """Members of one iteration as the iterations of one member."""
    losses = trained.final_loss.isel(iteration=0).values[:, None]
    coords = {"iteration": range(len(losses)), "seed": ("member", trained.seed.values[:1])}
    ds = xr.Dataset({"final_loss": (("iteration", "member"), losses)}, coords)
    return schema.finish(ds, "ensemble", width=trained.attrs["width"], **about)


def _restored(saved: xr.Dataset, iterations: int, starts: list[int], about: Mapping[str, Any]) -> list[xr.Dataset]:
    """The restarts of each start that is done, if they are those of these settings."""
    schema.validate(saved, "ensemble")
    n = saved.sizes["member"]
    ours = {**about, "number of iterations": iterations, "seed": starts[:n]}
    theirs = {name: saved.attrs.get(name) for name in about}
    theirs |= {"number of iterations": saved.sizes["iteration"], "seed": saved.seed.values.tolist()}
    for name, value in ours.items():
        if theirs[name] != value:
            raise TrainingError(f"cannot resume from a dataset with another {name}; use the same or begin again")
    return [saved.isel(member=[k]) for k in range(n)]


def _joined(rows: list[xr.Dataset]) -> xr.Dataset:
    return xr.concat(rows, dim="member", combine_attrs="override")


@app.command()
def kink_study(
    out: Annotated[Path, typer.Option(help="The dataset to write, or to go on with.")],
    strategy: Annotated[Strategy, typer.Option(help="persistent or restart.")] = "persistent",
    data: Annotated[str, typer.Option(help="kink6 or kink20.")] = "kink6",
    chains: Annotated[int, typer.Option(help="Starting points.")] = 20,
    iterations: Annotated[int, typer.Option(help="Trainings from each, the plain one included.")] = _CONFIG.iterations,
    epochs: Annotated[int, typer.Option(help="Steps of each training.")] = _CONFIG.epochs,
    lam: Annotated[float, typer.Option(help="Strength of the persistent penalty.")] = _CONFIG.lam,
    seed: Annotated[int, typer.Option(help="Seed of the starting points.")] = 0,
    device: Annotated[str, typer.Option(metavar="cpu|cuda|auto")] = "cpu",
) -> None:
    """Train many persistent chains of the kink regression, or restarts."""
    study(
        out, strategy=strategy, data=data, chains=chains, iterations=iterations, steps=epochs, lam=lam, seed=seed,
        device=device,
    )  # fmt: skip


def main() -> None:
    """Entry point of ``python -m trainers.runs.kink_study``."""
    run_app(app)


if __name__ == "__main__":
    main()
