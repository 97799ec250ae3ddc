"""Damage is found: a flipped bit gives the same values or one clear error, never other values."""

from __future__ import annotations

import errno
import io
import os
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from safetensors.torch import save_file

import pnanalysis as pn
from pnanalysis import schema
from pnanalysis.analyses.spectrum_cache import SpectrumCache
from pnanalysis.errors import CurvatureError, ModelError, PnError, RunError, SchemaError
from pnanalysis.geometry.flat_weights import FlatWeights
from pnanalysis.io import netcdf, zarr_store
from pnanalysis.io.files import read_regular
from pnanalysis.io.runs import MANIFEST, Checkpoint, Run, open_run
from pnanalysis.io.verification import verify, verify_file
from pnanalysis.io.weights import read_weights
from pnanalysis.io.writer import RunWriter

FLIPS = 40


def history(n: int = 5) -> xr.Dataset:
    rng = np.random.default_rng(0)
    names = ("train_loss", "penalty", "validation_error", "test_error")
    series = {name: (("iteration", "epoch"), rng.random((2, n))) for name in names}
    coords = {"iteration": np.arange(2), "epoch": np.arange(1, n + 1), "label": ("iteration", ["plain", "other"])}
    return schema.finish(xr.Dataset(series, coords), "history", recipe="none", command="pntrain")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    writer = RunWriter.create(tmp_path / "run", {})
    writer.save_checkpoint(0, 0, {"weight": torch.randn(6, 4), "n": torch.tensor(3), "half": torch.ones(2).half()})
    writer.release()
    return tmp_path / "run/checkpoints/iter00/epoch000.safetensors"


def flipped(raw: bytes, bit: int) -> bytes:
    changed = bytearray(raw)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def random_bits(raw: bytes, n: int = FLIPS) -> list[int]:
    return np.random.default_rng(1).choice(8 * len(raw), n, replace=False).tolist()


def test_every_flipped_bit_of_a_checkpoint_is_found(checkpoint: Path) -> None:
    raw, before = checkpoint.read_bytes(), read_weights(checkpoint)
    messages = []
    for bit in [*range(8 * 8), *random_bits(raw, 300)]:
        checkpoint.write_bytes(flipped(raw, bit))
        try:
            after = read_weights(checkpoint)
        except ModelError as error:
            messages.append(str(error))
        else:  # the flip is in the digest's own name
            assert before.keys() == after.keys()
            assert all(before[name].equal(after[name]) for name in before)
    assert len(messages) > 300
    assert all(str(checkpoint) in message for message in messages)
    checkpoint.write_bytes(raw)
    assert read_weights(checkpoint).keys() == before.keys()


def test_a_flipped_bit_of_a_weight_is_found_where_weights_are_read_in_pieces(checkpoint: Path) -> None:
    FlatWeights(Checkpoint("a", checkpoint), ["weight"])
    raw = checkpoint.read_bytes()
    checkpoint.write_bytes(flipped(raw, 8 * len(raw) - 20))
    with pytest.raises(ModelError, match="damaged"):
        FlatWeights(Checkpoint("a", checkpoint), ["weight"])


@pytest.mark.parametrize("has_digest", [True, False])
def test_every_flipped_bit_of_a_dataset_gives_the_same_values_or_one_error(
    tmp_path: Path, has_digest: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    path = netcdf.save(history(), tmp_path / "history.nc")
    raw, before = path.read_bytes(), netcdf.load(path)
    if not has_digest:
        raw = raw[: raw.rindex(b"\npnanalysis")]
    messages = []
    for bit in random_bits(raw):
        path.write_bytes(flipped(raw, bit))
        try:
            after = netcdf.load(path)
        except SchemaError as error:
            messages.append(str(error))
        else:
            assert after.identical(before) or not has_digest  # only a digest finds all changes
    assert len(messages) >= (FLIPS - 2) * has_digest
    assert all(str(path) in message and "\n" not in message for message in messages)
    assert capfd.readouterr().err == ""


def test_a_flip_in_an_array_is_found_by_the_format_alone(tmp_path: Path) -> None:
    ds = history(2000)
    path = netcdf.save(ds, tmp_path / "history.nc")
    raw = path.read_bytes()
    raw = raw[: raw.rindex(b"\npnanalysis")]
    path.write_bytes(flipped(raw, 8 * (len(raw) // 2)))  # most of the file is one of the compressed arrays
    with pytest.raises(SchemaError, match="not a readable"):
        netcdf.load(path)


def test_files_without_digests_are_read_as_before(tmp_path: Path) -> None:
    history().to_netcdf(tmp_path / "old.nc", engine="h5netcdf")
    assert netcdf.load(tmp_path / "old.nc").identical(history().assign_attrs(netcdf.load(tmp_path / "old.nc").attrs))
    save_file({"a": torch.arange(3)}, tmp_path / "old.safetensors")
    assert read_weights(tmp_path / "old.safetensors")["a"].tolist() == [0, 1, 2]
    assert [verify_file(tmp_path / name).text for name in ("old.nc", "old.safetensors")] == [
        "readable, has no digest"
    ] * 2


def test_other_programs_read_files_with_digests(tmp_path: Path) -> None:
    netcdf.save(history(), tmp_path / "history.nc")
    with xr.open_dataset(tmp_path / "history.nc") as ds:
        assert ds.train_loss.encoding["fletcher32"]
        xr.testing.assert_equal(ds, netcdf.load(tmp_path / "history.nc"))


def test_the_resume_state_is_verified_too(tmp_path: Path) -> None:
    writer = RunWriter.create(tmp_path / "run", {})
    writer.save_state({"a": torch.arange(30)}, iteration=1, epoch=2)
    file = tmp_path / "run/resume.safetensors"
    raw = file.read_bytes()
    file.write_bytes(flipped(raw, 8 * len(raw) - 1))
    with pytest.raises(PnError, match="damaged .*; delete it"):
        writer.load_state()


def test_every_flipped_bit_of_a_manifest_is_found(tmp_path: Path) -> None:
    entries = {"recipe": "tanh7", "config": {"lr": 0.001, "seed": 3}, "model": {"name": "a"}, "data": {"name": "b"}}
    writer = RunWriter.create(tmp_path / "run", {"id": "c", **entries, "ends": [3, 3], "champion": 1})
    file = tmp_path / "run" / MANIFEST
    raw, before = file.read_bytes(), open_run(tmp_path / "run").manifest
    found = 0
    for bit in random_bits(raw, 500):
        file.write_bytes(flipped(raw, bit))
        try:
            after = open_run(tmp_path / "run").manifest
        except RunError as error:
            found += "SHA-256" in str(error)
        else:  # white space, or the name of the digest
            assert {name: after[name] for name in before} == before
    assert found > 100
    writer.release()


def test_a_manifest_that_was_changed_on_purpose_says_what_to_do(tmp_path: Path) -> None:
    writer = RunWriter.create(tmp_path / "run", {"id": "c", "recipe": "a"})
    file = tmp_path / "run" / MANIFEST
    file.write_text(file.read_text().replace('"a"', '"b"'))
    with pytest.raises(RunError, match=r"if you have changed it yourself, delete its entry sha256$"):
        open_run(tmp_path / "run")
    writer.release()


def test_reading_takes_no_more_memory_than_the_file_has(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"few")
    tracemalloc.start()
    try:
        assert read_regular(tmp_path / "small", 2**30, RunError) == b"few"
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_run_is_verified_file_by_file(tiny_run: Run, tmp_path: Path) -> None:
    shutil.copytree(tiny_run.path, tmp_path / "own")
    run = open_run(tmp_path / "own")
    zarr_store.save(pn.trajectory(run, progress=False), run.path / "analysis/trajectory.zarr")
    found = {finding.path.relative_to(run.path).as_posix(): finding for finding in verify(open_run(run.path))}
    assert len(found) == len(run.checkpoints) + 2
    assert found["history.nc"].text == "intact"
    assert found["analysis/trajectory.zarr"].text == "intact"
    weights = run.plain.path
    raw = weights.read_bytes()
    weights.write_bytes(flipped(raw, 8 * len(raw) - 1))
    problems = [finding for finding in verify(run) if finding.problem]
    assert [finding.path for finding in problems] == [weights]
    assert problems[0].text == problems[0].problem
    assert str(weights) in problems[0].text
    assert not problems[0].is_confirmed


def test_a_disk_that_fails_while_reading_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(io.BufferedReader):
        def read(self, size: int | None = -1, /) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

    (tmp_path / "file").write_bytes(b"few")
    monkeypatch.setattr(os, "fdopen", lambda descriptor, mode: Failing(io.FileIO(descriptor)))
    with pytest.raises(RunError, match=r"file: cannot be read \(.*Input/output error"):
        read_regular(tmp_path / "file", 10, RunError)


@pytest.mark.parametrize(("size", "is_read"), [(10, True), (11, False)])
def test_a_file_may_be_as_large_as_its_limit(tmp_path: Path, size: int, is_read: bool) -> None:
    (tmp_path / "file").write_bytes(bytes(size))
    if is_read:
        assert read_regular(tmp_path / "file", 10, RunError) == bytes(size)
    else:
        with pytest.raises(RunError, match="has 11 bytes, and a file of this kind at most 10"):
            read_regular(tmp_path / "file", 10, RunError)


@pytest.mark.parametrize("damage", ["{", "[]", '{"seed": 1, "sha256": "0"}'])
def test_damaged_settings_of_unfinished_work_are_one_sentence(tmp_path: Path, damage: str) -> None:
    SpectrumCache.claim(tmp_path, {"seed": 0})
    (tmp_path / "a.nc").touch()
    SpectrumCache.claim(tmp_path, {"seed": 0})
    (tmp_path / "settings.json").write_text(damage)
    with pytest.raises(CurvatureError, match=r"settings.json: is damaged.*; delete the folder to start again$"):
        SpectrumCache.claim(tmp_path, {"seed": 0})
