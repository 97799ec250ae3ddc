"""Damaged and made-up input of every reader: it is read, or there is one sentence; never another error.

``make fuzz`` tries many more inputs than the few of each kind that run with the other tests, which are the same each
time. A find is printed with its input.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

import pnanalysis.cli
import trainers.cli
from pnanalysis import schema
from pnanalysis.errors import PnError
from pnanalysis.inputs.data import load_data
from pnanalysis.io import digest, netcdf, zarr_store
from pnanalysis.io.runs import open_run
from pnanalysis.io.weights import read_weights
from pnanalysis.io.writer import RunWriter
from tests.fuzz.conftest import Counts

MANY = int(os.environ.get("FUZZ", "0"))
fuzzed = settings(
    max_examples=MANY or 60,
    derandomize=not MANY,
    database=None,
    deadline=timedelta(seconds=10),
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
#: Numbers that lie at the edges of what formats and machines can hold.
EDGES = [0, -1, 2**31, 2**53, 2**63, -(2**63) - 1, 2**64, 10**30, 10**400, 1e308, -0.0, float("inf"), float("nan")]
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(EDGES),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
edits = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=8), st.integers(0, 8)), min_size=1, max_size=5
)


def damaged(raw: bytes, changes: list[tuple[float, bytes, int]]) -> bytes:
    """Bytes of which some are replaced by others, at fractions of their length, and perhaps by more or fewer."""
    for place, new, n_removed in changes:
        at = int(place * len(raw))
        raw = raw[:at] + new + raw[at + n_removed :]
    return raw


def replaced(document: Any, keys: list[int], value: Any) -> Any:
    """A document with one entry replaced, found by a path of numbers."""
    if not keys or not isinstance(document, dict | list) or not document:
        return value
    names = list(document) if isinstance(document, dict) else range(len(document))
    key = names[keys[0] % len(names)]
    changed = dict(document) if isinstance(document, dict) else list(document)
    changed[key] = replaced(document[key], keys[1:], value)
    return changed


def tried(counts: Counts, reader: str, read: Callable[[], Any]) -> None:
    """Count what a reader makes of an input; errors other than ours are finds."""
    message = None
    try:
        read()
    except PnError as error:
        message = str(error)
    assert message is None or len(message.splitlines()) == 1, message
    counts[reader]["read" if message is None else "refused"] += 1


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def dataset() -> xr.Dataset:
    series = {
        name: (("iteration", "epoch"), np.linspace(0, 1, 10).reshape(2, 5))
        for name in ("train_loss", "penalty", "validation_error", "test_error")
    }
    coords = {"iteration": np.arange(2), "epoch": np.arange(1, 6), "label": ("iteration", ["plain", "other"])}
    return schema.finish(xr.Dataset(series, coords), "history", recipe="none", command="pntrain")


MANIFEST = {
    "id": "a", "recipe": "tiny", "config": {"epochs": 1}, "ends": [0],
    "model": {"name": "tanh7", "options": {"width": 4}}, "data": {"name": "digits", "split_seed": 0},
    "champion": 0, "layers": [["a"]], "loss": "mse",
}  # fmt: skip


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return undigested_manifest(tmp_path_factory.mktemp("fuzz") / "run")


def undigested_manifest(run: Path) -> Path:
    """That of a new run, without a digest, which would tell all changes."""
    writer = RunWriter.create(run, MANIFEST)
    writer.save_checkpoint(0, 0, {"weight": torch.ones(2)})
    writer.release()
    file = run / "run.json"
    entries = json.loads(file.read_text())
    del entries[digest.KEY]
    file.write_text(json.dumps(entries))
    return file


def opened(file: Path) -> None:
    """Read a run as ``pnanalysis info`` does."""
    run = open_run(file.parent)
    _ = run.champion, [str(checkpoint) for checkpoint in run.checkpoints]


def test_what_is_not_damaged_is_read(manifest: Path, store: Path, netcdf_bytes: bytes, scratch: Path) -> None:
    opened(manifest)
    (scratch / "sound.safetensors").write_bytes(WEIGHTS)
    assert read_weights(scratch / "sound.safetensors").keys() == {"weight", "n", "half"}
    (scratch / "sound.nc").write_bytes(netcdf_bytes)
    assert netcdf.load(scratch / "sound.nc").attrs["kind"] == zarr_store.load(store).attrs["kind"] == "history"


@fuzzed
@given(keys=st.lists(st.integers(0, 40), min_size=1, max_size=4), value=values)
def test_manifests_with_other_entries(manifest: Path, counts: Counts, keys: list[int], value: Any) -> None:
    before = manifest.read_bytes()
    try:
        manifest.write_text(json.dumps(replaced(json.loads(before), keys, value)))
        tried(counts, "manifest, entries", lambda: opened(manifest))
    finally:
        manifest.write_bytes(before)


@fuzzed
@given(changes=edits)
def test_manifests_with_other_bytes(manifest: Path, counts: Counts, changes: list[tuple[float, bytes, int]]) -> None:
    before = manifest.read_bytes()
    try:
        manifest.write_bytes(damaged(before, changes))
        tried(counts, "manifest, bytes", lambda: opened(manifest))
    finally:
        manifest.write_bytes(before)


WEIGHTS = save({"weight": torch.ones(3, 2), "n": torch.tensor(3), "half": torch.ones(2).half()})
_HEADER_END = 8 + int.from_bytes(WEIGHTS[:8], "little")


@fuzzed
@given(changes=edits)
def test_safetensors_with_other_bytes(scratch: Path, counts: Counts, changes: list[tuple[float, bytes, int]]) -> None:
    file = scratch / "fuzz.safetensors"
    file.write_bytes(damaged(WEIGHTS, changes))
    tried(counts, "safetensors, bytes", lambda: read_weights(file))


@fuzzed
@given(keys=st.lists(st.integers(0, 6), min_size=1, max_size=4), value=values)
def test_safetensors_with_other_headers(scratch: Path, counts: Counts, keys: list[int], value: Any) -> None:
    header = json.dumps(replaced(json.loads(WEIGHTS[8:_HEADER_END]), keys, value)).encode()
    file = scratch / "fuzz.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + WEIGHTS[_HEADER_END:])
    tried(counts, "safetensors, headers", lambda: read_weights(file))


@pytest.fixture(scope="module")
def netcdf_bytes() -> bytes:
    """A dataset without a digest, which would tell all changes."""
    buffer = io.BytesIO()
    dataset().to_netcdf(buffer, engine="h5netcdf")
    return buffer.getvalue()


@fuzzed
@given(changes=edits)
def test_netcdf_with_other_bytes(
    netcdf_bytes: bytes,
    scratch: Path,
    counts: Counts,
    changes: list[tuple[float, bytes, int]],
) -> None:
    file = scratch / "fuzz.nc"
    file.write_bytes(damaged(netcdf_bytes, changes))
    tried(counts, "netcdf, bytes", lambda: netcdf.load(file))


@fuzzed
@given(name=st.sampled_from(["kind", "schema_version", "command", "iteration", "dims"]), value=values)
def test_netcdf_with_other_attributes(scratch: Path, counts: Counts, name: str, value: Any) -> None:
    ds, buffer = dataset(), io.BytesIO()
    ds.attrs[name] = value
    try:
        ds.to_netcdf(buffer, engine="h5netcdf")
    except Exception:  # what cannot be written cannot be read either
        return
    file = scratch / "fuzz.nc"
    file.write_bytes(buffer.getvalue())
    tried(counts, "netcdf, attributes", lambda: netcdf.load(file))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "history.zarr"
    zarr_store.save(dataset(), path)
    return path


@fuzzed
@given(which=st.integers(0, 100), changes=edits)
def test_zarr_with_other_bytes(
    store: Path, counts: Counts, which: int, changes: list[tuple[float, bytes, int]]
) -> None:
    files = sorted(file for file in store.rglob("*") if file.is_file())
    file = files[which % len(files)]
    before = file.read_bytes()
    try:
        file.write_bytes(damaged(before, changes))
        tried(counts, "zarr, bytes", lambda: zarr_store.load(store))
    finally:
        file.write_bytes(before)


@fuzzed
@given(suffix=st.sampled_from(["png", "jpg", "bmp", "webp", "ppm"]), changes=edits)
def test_images_with_other_bytes(
    scratch: Path, counts: Counts, suffix: str, changes: list[tuple[float, bytes, int]]
) -> None:
    folder = scratch / "fuzz-images"
    for split in ("train", "test"):
        (folder / split / "cat").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (5, 4), "red").save(folder / split / "cat" / f"0.{suffix}")
    file = folder / "train/cat" / f"0.{suffix}"
    file.write_bytes(damaged(file.read_bytes(), changes))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PNANALYSIS_DATA", str(folder / "cache"))
            tried(counts, "images, bytes", lambda: load_data(f"imagefolder:{folder}", (3, 4, 5)))
    finally:
        for split in ("train", "test"):
            (folder / split / "cat" / f"0.{suffix}").unlink()


APPS = {"pnanalysis": (pnanalysis.cli.app, pnanalysis.cli.main), "pntrain": (trainers.cli.app, trainers.cli.main)}
#: Commands that work without a run are left out: what is fuzzed here are the options, and no work is to begin.
NO_RUN = {"demo", "reproduce"}


def _options() -> list[tuple[str, list[str], list[str]]]:
    """Program, the arguments that keep it from working, and the names of options, for each command."""
    found = []
    for program, (app, _) in APPS.items():
        command: Any = typer.main.get_command(app)
        for name, one in getattr(command, "commands", {"": command}).items():
            names = [option for p in one.params for option in p.opts if option.startswith("--") and option != "--out"]
            start = [name, "no-such-run"] if program == "pnanalysis" else ["tanh7", "--data", "imagefolder:no-such"]
            if name not in NO_RUN:
                found.append((program, start, names))
    return found


COMMANDS = _options()
words = st.text(max_size=6) | st.sampled_from(EDGES).map(str) | st.integers().map(str) | st.floats().map(str)


@fuzzed
@given(which=st.integers(0, len(COMMANDS) - 1), options=st.lists(st.tuples(st.integers(0, 60), words), max_size=4))
def test_command_lines_with_any_options(counts: Counts, which: int, options: list[tuple[int, str]]) -> None:
    program, start, names = COMMANDS[which]
    arguments = [f"{names[i % len(names)]}={word}" for i, word in options]
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()) as errors,
    ):
        patch.setattr(sys, "argv", [program, *start, *arguments])
        with pytest.raises(SystemExit) as ending:
            APPS[program][1]()
    assert ending.value.code in (0, 2), arguments
    assert errors.getvalue().count("\n") <= 1, arguments
    counts["command line"]["refused" if ending.value.code else "read"] += 1
