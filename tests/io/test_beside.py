"""Eigenvectors beside their dataset: lazy, checked, replaced as a whole, never through links."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import pnanalysis as pn
from pnanalysis.errors import SchemaError
from pnanalysis.io import beside, datasets, netcdf, zarr_store


def pairs(seed: int = 0, n: int = 40) -> xr.Dataset:
    matrix = np.random.default_rng(seed).standard_normal((n, n))
    return pn.eigenpairs(matrix + matrix.T, k=3, progress=False)


def store_of(path: Path) -> Path:
    (found,) = path.with_suffix(".vectors").iterdir()
    return found


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
def test_vectors_come_back_and_are_not_read_before_they_are_used(suffix: str, tmp_path: Path) -> None:
    ds, path = pairs(), tmp_path / f"eigenpairs{suffix}"
    pn.save(ds, path)
    assert "vector" not in (zarr_store.load(path) if suffix == ".zarr" else netcdf.load(path))
    found = pn.load(path)
    assert not found.vector.variable._in_memory
    assert found.vector.sizes == ds.vector.sizes
    assert not found.vector.variable._in_memory
    np.testing.assert_array_equal(found.vector, ds.vector)
    assert found.vector.attrs == ds.vector.attrs
    pn.validate(found)
    assert "vector" not in datasets.load(path, large=False)


def test_saving_again_keeps_one_store_and_replaces_another(tmp_path: Path) -> None:
    path = tmp_path / "eigenpairs.nc"
    pn.save(pairs(), path)
    first = store_of(path)
    written = (first / ".zmetadata").stat().st_mtime_ns
    pn.save(pn.load(path), path)  # lazily, onto itself
    assert store_of(path) == first
    assert (first / ".zmetadata").stat().st_mtime_ns == written
    pn.save(pairs(1), path)
    assert store_of(path) != first
    np.testing.assert_array_equal(pn.load(path).vector, pairs(1).vector)
    pn.save(pn.load(path).drop_vars("vector"), path)
    assert not path.with_suffix(".vectors").exists()
    assert "vector" not in pn.load(path)


def test_a_kill_between_the_two_leaves_the_earlier_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "eigenpairs.nc"
    pn.save(pairs(), path)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(netcdf, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            pn.save(pairs(1), path)
    np.testing.assert_array_equal(pn.load(path).vector, pairs().vector)
    pn.save(pairs(2), path)  # and what it left is removed
    assert store_of(path)


def test_what_else_is_in_the_folder_stays(tmp_path: Path) -> None:
    path = tmp_path / "eigenpairs.nc"
    pn.save(pairs(), path)
    other = path.with_suffix(".vectors") / "mine.zarr"
    other.mkdir()
    pn.save(pairs(1), path)
    assert other.is_dir()


def test_damage_is_found(tmp_path: Path) -> None:
    path = tmp_path / "eigenpairs.nc"
    pn.save(pairs(), path)
    chunk = next(file for file in (store_of(path) / "vector").iterdir() if file.name[0] != ".")
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:-10] + bytes([whole[-10] ^ 1]) + whole[-9:])
    found = pn.load(path)
    with pytest.raises(Exception, match=r"(?i)checksum|crc"):
        found.vector.load()
    chunk.unlink()
    with pytest.raises(SchemaError, match="1 of 3 pieces of the vectors are gone"):
        pn.load(path)
    shutil.rmtree(store_of(path))
    with pytest.raises(SchemaError, match="are not beside it; copy them too"):
        pn.load(path)


def overwritten(path: Path) -> None:
    pn.save(pairs(1), path)


def moved(path: Path) -> None:
    path.with_suffix(".vectors").rename(path.with_name("elsewhere"))


def one_piece_gone(path: Path) -> None:
    next(file for file in (store_of(path) / "vector").iterdir() if file.name[0] != ".").unlink()


@pytest.mark.parametrize("harm", [overwritten, moved, one_piece_gone])
def test_what_happens_to_an_open_file_is_an_error_and_never_nan(harm: Callable[[Path], None], tmp_path: Path) -> None:
    ds, path = pairs(), tmp_path / "eigenpairs.nc"
    pn.save(ds, path)
    used, late = pn.load(path), pn.load(path)
    used.vector.load()
    harm(path)
    np.testing.assert_array_equal(used.vector, ds.vector)
    for read in (lambda: late.vector.values, lambda: late.vector[0, 3].values, lambda: late.isel(pair=[1]).load()):
        with pytest.raises(SchemaError, match=r"have been replaced, moved or removed since; load the dataset again"):
            read()


def test_vectors_are_found_from_another_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ds = pairs()
    pn.save(ds, "eigenpairs.nc")
    found = pn.load("eigenpairs.nc")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    np.testing.assert_array_equal(found.vector[[0, 2], 5:9], ds.vector[[0, 2], 5:9])
    np.testing.assert_array_equal(found.vector, ds.vector)


def test_the_same_saved_once_more_is_still_read(tmp_path: Path) -> None:
    ds, path = pairs(), tmp_path / "eigenpairs.nc"
    pn.save(ds, path)
    found = pn.load(path)
    shutil.rmtree(path.with_suffix(".vectors"))
    pn.save(ds, path)
    np.testing.assert_array_equal(found.vector, ds.vector)


def test_vectors_of_another_dataset_are_refused(tmp_path: Path) -> None:
    one, other = tmp_path / "one.nc", tmp_path / "other.nc"
    pn.save(pairs(), one)
    pn.save(pairs(1), other)
    mine = store_of(one)
    shutil.rmtree(mine)
    shutil.copytree(store_of(other), mine)
    with pytest.raises(SchemaError, match="holds the vectors of another dataset"):
        pn.load(one)


def test_names_in_a_file_lead_nowhere_else(tmp_path: Path) -> None:
    path = tmp_path / "eigenpairs.nc"
    netcdf.save(pairs().drop_vars("vector").assign_attrs({beside.DIGEST: "../../etc"}), path)
    with pytest.raises(SchemaError, match="is no digest"):
        pn.load(path)


def test_links_of_a_run_are_not_followed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    path = pn.save(pairs(), run / "eigenpairs.nc")
    folder = path.with_suffix(".vectors")
    shutil.move(folder, tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SchemaError, match="link"):
        datasets.load(path, within=run)


def test_lengths_are_checked_when_vectors_are_used() -> None:
    assert beside.check_unit(np.eye(2)).shape == (2, 2)
    with pytest.raises(SchemaError, match="not of unit length"):
        beside.check_unit(np.full((2, 3), np.nan))
