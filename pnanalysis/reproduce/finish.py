"""Make a cell of a finished training: ``python -m pnanalysis.reproduce.finish`` with a job as JSON.

It runs in a process of its own, beside those of other cells.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

from pnanalysis.errors import DataError, PnError, RunError
from pnanalysis.inputs.sources import as_source, resolve_device
from pnanalysis.io import netcdf
from pnanalysis.io.hardware import cpu_name
from pnanalysis.io.manifest import read_manifest
from pnanalysis.io.runs import ANALYSIS, MANIFEST, Run, open_run
from pnanalysis.reproduce.cells import FINISHED, SECONDS, Cell, Store, planned
from pnanalysis.reproduce.measures import MEASURES
from pnanalysis.reproduce.settings import SCALES, Setting

#: Status of a training that ended by itself: none of these is tried again.
ENDED = (FINISHED, "failed", "diverged")
STUDY = "study.nc"


def finish(cell: Cell, scale: str, setting: Setting, run_path: Path, out: Path, data: str, device: str) -> Path:
    """Measure a run and save its cell.

    Parameters
    ----------
    cell : Cell
    scale : str
    setting : Setting
        The one that it was trained with, whatever the scale's is by now.
    run_path : Path
        Folder of the training, which has ended.
    out : Path
    data : str
        The data as this machine names them.
    device : str

    Returns
    -------
    Path
        The cell's folder.
    """
    started = time.monotonic()
    if setting.recipe == "kink":
        entries, datasets = _of_study(run_path)
    elif setting.recipe == "two-well":
        entries, datasets = _of_descent(open_run(run_path))
    else:
        entries, datasets = _of_images(open_run(run_path), cell, setting, data, device)
    entries["cost"]["measuring_seconds"] = round(time.monotonic() - started, 2)
    record = {**planned(cell, scale, setting), **entries, "cores": os.cpu_count()}
    return Store(out).save(cell, record, datasets)


def _of_images(
    run: Run, cell: Cell, setting: Setting, data: str, device: str
) -> tuple[dict[str, Any], dict[str, xr.Dataset]]:
    if not is_of_setting(run.manifest, cell, setting):
        raise RunError(f"{run.path}: was trained with other settings than its cell has now; run the command again")
    source = as_source(run, data=data)
    is_finished = run.status == FINISHED
    if is_finished and source.data.fingerprint != run.manifest["data"].get("fingerprint"):
        raise DataError(f"{data}: has changed since {run.path} was trained; give the same data, or remove that folder")
    datasets = {"history": run.history} if (run.path / "history.nc").is_file() else {}
    products = 0
    for name, options in setting.measures.items() if is_finished else ():
        datasets[name] = MEASURES[name](source, resolve_device(device), **options)
        products += int(datasets[name].attrs.get("products", 0))
    entries = _entries(run.manifest)
    seconds = datasets["history"].seconds if "history" in datasets else None
    entries["cost"] |= {
        "training_seconds": 0.0 if seconds is None else round(float(seconds.sum()), 2),
        "epochs": 0 if seconds is None else int(np.isfinite(seconds).sum()),
        "products": products,
    }
    return entries, datasets


def _of_descent(run: Run) -> tuple[dict[str, Any], dict[str, xr.Dataset]]:
    """S1: where each descent ends."""
    ds = netcdf.load(run.path / ANALYSIS / "descent.nc", within=run.path)
    entries = _entries(run.manifest)
    entries["cost"] |= _training_cost(run.path)
    return entries, {"descent": ds[["path", "value", "end", "end_value", "champion"]].isel(
        step=slice(None, None, 10 if ds.sizes["iteration"] < 10 else 500)
    )}  # fmt: skip


def _training_cost(folder: Path) -> dict[str, float]:
    """What a training that does not time its steps has taken, as the worker has noted it."""
    found: dict[str, float] = {}
    if (folder / SECONDS).is_file():
        found |= json.loads((folder / SECONDS).read_text())
    return found


def _of_study(folder: Path) -> tuple[dict[str, Any], dict[str, xr.Dataset]]:
    """S2: final losses by iteration and chain."""
    ds = netcdf.load(folder / STUDY)
    kept = ds[["final_loss"]].astype(np.float32, keep_attrs=True)
    versions = {name: metadata.version(name) for name in ("pnanalysis", "torch")}
    entries = {
        "status": FINISHED,
        "failure": None,
        "champion": None,
        "versions": versions,
        "cost": _training_cost(folder),
    }
    entries |= {"device": ds.attrs.get("device", "cpu"), "device_name": cpu_name()}
    return entries, {"ensemble": kept}


def _entries(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a record keeps of a run's manifest: nothing that names a folder of this machine."""
    data = {name: value for name, value in manifest["data"].items() if name != "name"}
    data["name"] = str(manifest["data"]["name"]).partition(":")[0]
    config = {**manifest["config"], "data": data["name"]}
    names = ("status", "failure", "champion", "layers", "versions", "device", "device_name", "git_revision")
    return {name: manifest.get(name) for name in names} | {"config": config, "data": data, "cost": {}}


def is_of_setting(manifest: Mapping[str, Any], cell: Cell, setting: Setting, *, goes_on: bool = False) -> bool:
    """Whether a training has a cell's settings; one that ``goes_on`` may have had fewer iterations so far."""
    begun, n_train = manifest.get("config", {}), manifest.get("data", {}).get("n_train", 0)
    wanted = json.loads(json.dumps({"recipe": setting.recipe, **setting.training(cell.variant, cell.arm)}))
    more = wanted.get("iterations", math.inf) > begun.get("iterations", 0)
    if goes_on and more:
        wanted.pop("iterations", None)
    is_same = all(begun.get(name) == value for name, value in wanted.items())
    # every class has the same number of images, so that there may be a few less than planned
    return is_same and (setting.n_train is None or 0.9 * setting.n_train < n_train <= setting.n_train)


def ended(run_path: Path) -> str | None:
    """How a training ended by itself, or ``None`` if it has not.

    Raises
    ------
    RunError
        If its manifest is damaged.
    """
    if not (run_path / MANIFEST).is_file():
        return None
    status = str(read_manifest(run_path / MANIFEST).get("status"))
    return status if status in ENDED else None


def main() -> int:
    """Entry point: one JSON argument."""
    job = json.loads(sys.argv[1])
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    cell = Cell(**job["cell"])
    # a study that was begun by an earlier version does not hand on its settings
    setting = Setting(**job["setting"]) if "setting" in job else SCALES[job["scale"]].settings[cell.experiment]
    try:
        finish(
            cell, job["scale"], setting, Path(job["run"]), Path(job["out"]),
            job["data"], job["device"],
        )  # fmt: skip
    except (PnError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
