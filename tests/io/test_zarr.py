"""Zarr stores: what is written is read again, rows are appended safely, and nothing else is overwritten."""

from __future__ import annotations

import resource
import warnings
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr

import pnanalysis as pn
from pnanalysis.errors import RunError, SchemaError
from pnanalysis.io import collection, datasets, netcdf, zarr_store
from pnanalysis.io.collection import collect_runs, open_runs
from pnanalysis.io.runs import ANALYSIS, Run, open_run
from pnanalysis.io.verification import verify_file
from tests.io.test_damage import flipped
from trainers import Config, train


@pytest.fixture
def paths(tiny_run: Run) -> xr.Dataset:
    """A short trajectory: it has strings, integers, floats, and variables without the dim of its rows."""
    return pn.trajectory(tiny_run, iterations=[0, 1], progress=False).isel(checkpoint=slice(7))


def rows(ds: xr.Dataset) -> list[xr.Dataset]:
    return [ds.isel(checkpoint=[k]) for k in range(ds.sizes["checkpoint"])]


def types(ds: xr.Dataset) -> dict[str, str]:
    """Kinds of dtypes, without the lengths of strings."""
    return {str(name): array.dtype.str if array.dtype.kind != "U" else "U" for name, array in ds.variables.items()}


def test_a_dataset_comes_back_with_its_attrs_coords_and_dtypes(paths: xr.Dataset, tmp_path: Path) -> None:
    ds = paths.assign_coords(flag=("checkpoint", np.arange(paths.sizes["checkpoint"]) % 2 == 0), note="α and β")
    ds["small"] = ("checkpoint", np.arange(paths.sizes["checkpoint"], dtype=np.float32))
    ds.attrs["bounds"] = [0.5, float("inf")]
    loaded = pn.load(pn.save(ds, tmp_path / "t.zarr"))
    assert loaded.identical(ds)
    assert {name: a.dtype for name, a in loaded.variables.items()} == {
        name: a.dtype for name, a in ds.variables.items()
    }
    assert set(loaded.coords) == set(ds.coords)


def test_a_netcdf_file_becomes_a_store(paths: xr.Dataset, tmp_path: Path) -> None:
    from_netcdf = pn.load(pn.save(paths, tmp_path / "t.nc"))
    assert pn.load(pn.save(from_netcdf, tmp_path / "t.zarr")).identical(paths)


def test_saving_again_replaces_a_store(paths: xr.Dataset, tmp_path: Path) -> None:
    path = tmp_path / "t.zarr"
    pn.save(paths, path)
    pn.save(paths.isel(checkpoint=slice(3)), path)
    assert pn.load(path).sizes["checkpoint"] == 3
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("occupy", [Path.touch, Path.mkdir, lambda path: zarr.open_group(path, mode="w")])
def test_nothing_but_a_store_of_ours_is_overwritten(paths: xr.Dataset, tmp_path: Path, occupy) -> None:
    path = tmp_path / "t.zarr"
    occupy(path)
    before = sorted(path.rglob("*"))
    for write in (pn.save, lambda ds, path: zarr_store.append(ds, path, "checkpoint")):
        with pytest.raises(SchemaError, match="choose another name"):
            write(paths, path)
    with pytest.raises(SchemaError, match="not a Zarr store of pnanalysis"):
        pn.load(path)
    assert sorted(path.rglob("*")) == before


def test_a_failed_save_leaves_what_was_there(paths: xr.Dataset, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "t.zarr"
    pn.save(paths, path)

    def full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(zarr, "consolidate_metadata", full)
    with pytest.raises(OSError, match="No space"):
        pn.save(paths.isel(checkpoint=slice(3)), path)
    assert pn.load(path).identical(paths)
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_or_damaged_store_is_one_sentence(paths: xr.Dataset, tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match="no such Zarr store"):
        pn.load(tmp_path / "nowhere.zarr")
    path = pn.save(paths, tmp_path / "t.zarr")
    (path / "pca" / "0.0").write_bytes(b"not a chunk")
    with pytest.raises(SchemaError, match="not a readable Zarr store"):
        pn.load(path)
    (path / ".zmetadata").write_text("{")
    with pytest.raises(SchemaError, match="not a readable Zarr store"):
        pn.load(path)


@pytest.mark.parametrize(
    ("appended", "every"), [*(pytest.param(each, 1, marks=pytest.mark.slow) for each in (False, True)), (True, 24)]
)
def test_every_flipped_bit_of_a_store_is_found(paths: xr.Dataset, tmp_path: Path, appended: bool, every: int) -> None:
    """Of the store, or of some of its files."""
    path, n_found = tmp_path / "t.zarr", 0
    for row in rows(paths) if appended else ():
        zarr_store.append(row, path, "checkpoint")
    if not appended:
        pn.save(paths, path)
    assert verify_file(path).text == "intact"
    before = pn.load(path)
    for file in sorted(path.rglob("*"))[::every]:
        raw = file.read_bytes() if file.is_file() else b""
        step = max(1, len(raw) // 2 * 8 - 3)
        if file == path / ".zattrs":  # xarray reads this one, too
            step = 13 if every == 1 else 101
        for bit in range(0, 8 * len(raw), step):
            file.write_bytes(flipped(raw, bit))
            try:
                after = pn.load(path)
            except SchemaError:
                n_found += 1
            else:  # a file that the consolidated metadata replace, or padding
                assert after.identical(before), file
        if raw:
            file.write_bytes(raw)
    assert n_found > len(paths.variables) / every
    assert pn.load(path).identical(before)


def test_a_flipped_bit_of_the_attributes_is_found(paths: xr.Dataset, tmp_path: Path) -> None:
    path = pn.save(paths, tmp_path / "t.zarr")
    file = path / ".zmetadata"
    file.write_text(file.read_text().replace('"kind": "trajectory"', '"kind": "trajectorx"', 1))
    with pytest.raises(SchemaError, match="SHA-256"):
        pn.load(path)


def test_a_disk_that_fills_up_leaves_the_store_before(paths: xr.Dataset, tmp_path: Path) -> None:
    path = pn.save(paths.isel(checkpoint=slice(3)), tmp_path / "t.zarr")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (10, 100, 300, 1000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                pn.save(paths, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert pn.load(path).identical(paths.isel(checkpoint=slice(3)))
        assert list(tmp_path.iterdir()) == [path]


def test_stores_without_checksums_are_read_as_before(paths: xr.Dataset, tmp_path: Path) -> None:
    path = tmp_path / "t.zarr"
    paths.to_zarr(path, zarr_format=2, consolidated=True)
    assert pn.load(path).identical(paths)
    assert verify_file(path).text == "readable, has no digest"


def test_a_digest_of_the_metadata_does_not_vouch_for_chunks(paths: xr.Dataset, tmp_path: Path) -> None:
    encoding = zarr_store._checked(paths)
    encoding["iteration"]["filters"].pop()  # packed without a checksum
    paths.to_zarr(tmp_path / "t.zarr", zarr_format=2, consolidated=True, encoding=encoding)
    zarr_store._sign(tmp_path / "t.zarr")
    assert verify_file(tmp_path / "t.zarr").text == "readable, has no digest"


def test_a_store_that_is_replaced_while_it_is_read_is_read_again(
    paths: xr.Dataset, tmp_path: Path, monkeypatch
) -> None:
    path, loaded = pn.save(paths, tmp_path / "t.zarr"), zarr_store._loaded
    shorter = iter([paths.isel(checkpoint=slice(3)), paths.isel(checkpoint=slice(2))])

    def replaced(file: Path) -> xr.Dataset:
        ds = loaded(file)
        for other in shorter:
            pn.save(other, file)
            if other.sizes["checkpoint"] == 2:
                raise SchemaError("half of one and half of another")
            break
        return ds

    monkeypatch.setattr(zarr_store, "_loaded", replaced)
    assert zarr_store.load(path).sizes["checkpoint"] == 2


def test_a_store_that_is_replaced_again_and_again_is_given_up(paths: xr.Dataset, tmp_path: Path, monkeypatch) -> None:
    path, loaded = pn.save(paths, tmp_path / "t.zarr"), zarr_store._loaded

    def replaced(file: Path) -> xr.Dataset:
        ds = loaded(file)
        pn.save(paths, file)
        return ds

    monkeypatch.setattr(zarr_store, "_loaded", replaced)
    with pytest.raises(SchemaError, match="is being replaced by another process again and again"):
        zarr_store.load(path)


def test_a_store_that_would_fill_the_memory_is_not_loaded(paths: xr.Dataset, tmp_path: Path, monkeypatch) -> None:
    path = pn.save(paths, tmp_path / "t.zarr")
    monkeypatch.setattr(zarr_store, "_LARGEST", paths.nbytes // 2)
    with pytest.raises(SchemaError, match="bytes of memory; open it with open_store"):
        zarr_store.load(path)


def test_a_store_may_be_replaced_by_what_is_still_to_be_computed(paths: xr.Dataset, tmp_path: Path) -> None:
    path = pn.save(paths, tmp_path / "t.zarr")
    assert datasets.check_destination(path) == path
    (tmp_path / "other.zarr").mkdir()
    with pytest.raises(SchemaError, match="other.zarr"):
        datasets.check_destination(tmp_path / "other.zarr")


def test_a_tree_is_no_store(tiny_run: Run, tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match=r"ends in \.nc"):
        datasets.save(tiny_run.results, tmp_path / "tree.zarr")


@pytest.mark.parametrize("chunk_bytes", [1, pytest.param(100, marks=pytest.mark.slow), zarr_store._CHUNK_BYTES])
def test_rows_appended_one_by_one_are_the_whole(
    paths: xr.Dataset, tmp_path: Path, chunk_bytes: int, monkeypatch
) -> None:
    monkeypatch.setattr(zarr_store, "_CHUNK_BYTES", chunk_bytes)
    names = ["x" * k for k in range(paths.sizes["checkpoint"])]  # later strings are longer than the first
    ds = paths.assign_coords(note=("checkpoint", names))
    for row in rows(ds):
        zarr_store.append(row, tmp_path / "t.zarr", "checkpoint")
    loaded = pn.load(tmp_path / "t.zarr")
    assert loaded.identical(ds)
    assert types(loaded) == types(ds)


def test_as_many_rows_share_a_chunk_as_fit(paths: xr.Dataset, tmp_path: Path) -> None:
    """So that files do not become as many as rows."""
    zarr_store.append(rows(paths)[0], tmp_path / "t.zarr", "checkpoint")
    chunks = zarr.open_group(tmp_path / "t.zarr", mode="r")["iteration"].chunks
    assert chunks == (zarr_store._CHUNK_BYTES // paths.iteration.dtype.itemsize,)


def test_a_store_is_read_lazily(paths: xr.Dataset, tmp_path: Path) -> None:
    ds = zarr_store.open_store(pn.save(paths, tmp_path / "t.zarr"))
    assert not ds.pca.variable._in_memory
    assert ds.identical(paths)


class _Killed(BaseException):
    """Stands for a kill: nothing is cleaned up after it but what a kernel would."""


@pytest.mark.parametrize("moment", ["consolidate_metadata", pytest.param("Array.__setitem__", marks=pytest.mark.slow)])
def test_a_killed_append_leaves_the_finished_rows(paths: xr.Dataset, tmp_path: Path, moment: str, monkeypatch) -> None:
    path, parts = tmp_path / "t.zarr", rows(paths)
    for row in parts[:3]:
        zarr_store.append(row, path, "checkpoint")

    def killed(*_: object, **__: object) -> None:
        raise _Killed

    with monkeypatch.context() as patch:
        patch.setattr(f"zarr.{moment}", killed)
        with pytest.raises(_Killed):
            zarr_store.append(parts[5], path, "checkpoint")
    present = zarr.open_group(path, mode="r", use_consolidated=False)
    lengths = {array.shape[0] for _, array in present.arrays() if array.ndim}
    assert 4 in lengths  # some arrays had grown already
    group = next(folder for folder in path.iterdir() if folder.is_dir())
    leftovers = [path / ".zmetadata.1234.partial", group / ".zattrs.1234.partial"]
    for leftover in leftovers:
        leftover.touch()
    assert pn.load(path).identical(paths.isel(checkpoint=slice(3)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for row in parts[3:]:
            zarr_store.append(row, path, "checkpoint")
    assert pn.load(path).identical(paths)
    assert not any(leftover.exists() for leftover in leftovers)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda ds: ds.drop_vars("path_length"),
        lambda ds: ds.assign(extra=ds.path_length),
        lambda ds: ds.isel(component=slice(1)),
        lambda ds: ds.assign(path_length=ds.path_length.astype("float32")),
        lambda ds: ds.assign_coords(component=ds.component + 1),
        lambda ds: ds.assign(path_length=ds.path_length.expand_dims("more")),
    ],
)
def test_rows_that_do_not_fit_are_refused(paths: xr.Dataset, tmp_path: Path, spoil) -> None:
    first, second, *_ = rows(paths)
    zarr_store.append(first, tmp_path / "t.zarr", "checkpoint")
    with pytest.raises(SchemaError, match="rows to append"):
        zarr_store.append(spoil(second), tmp_path / "t.zarr", "checkpoint")
    assert pn.load(tmp_path / "t.zarr").identical(first)


def test_rows_need_their_dim(paths: xr.Dataset, tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match="no dim 'run'"):
        zarr_store.append(paths, tmp_path / "t.zarr", "run")


def test_a_run_lists_the_newer_of_a_file_and_a_store(own_run: Run, tmp_path: Path) -> None:
    ds = pn.trajectory(own_run, progress=False)
    pn.save(ds, own_run.path / ANALYSIS / "trajectory.nc")
    store = pn.save(ds, own_run.path / ANALYSIS / "trajectory.zarr")
    (own_run.path / ANALYSIS / ".trajectory-killed.nc").touch()
    assert own_run.files["trajectory"] == store
    assert set(own_run.files) == {"history", "trajectory"}
    assert own_run.results["trajectory"].to_dataset().identical(ds)


@pytest.fixture(scope="module")
def sweep(tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs that differ in seed, and one of them in the number of epochs."""
    from dataclasses import replace

    folder = tmp_path_factory.mktemp("sweep")
    for seed, epochs in ((0, 1), (1, 1), (2, 2)):
        config = replace(tiny_config, iterations=2, epochs=epochs, seed=seed)
        run = train(config, folder / f"seed={seed}", device="cpu", progress=False)
        netcdf.save(pn.trajectory(run, progress=False), run.path / ANALYSIS / "trajectory.nc")
    return folder


def test_collected_runs_are_those_of_the_folder(sweep: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(collection, "_BATCH", 2)
    ds = open_runs(collect_runs(sweep, "history", tmp_path / "s.zarr"))
    assert not ds.train_loss.variable._in_memory
    assert ds.run.values.tolist() == ["seed=0", "seed=1", "seed=2"]
    assert ds.seed.values.tolist() == [0, 1, 2]
    assert ds.epochs.values.tolist() == [1, 1, 2]
    assert ds.attrs["kind"] == "history"
    together = open_runs(sweep)
    for seed, epochs in ((0, 1), (1, 1), (2, 2)):
        alone = together.train_loss.sel(seed=seed, epochs=epochs)
        np.testing.assert_array_equal(ds.train_loss.isel(run=seed), alone)
    assert bool(ds.train_loss.sel(epoch=2).isel(run=0).isnull().all())
    assert pn.load(tmp_path / "s.zarr").identical(ds)


def test_collected_runs_may_differ_in_their_checkpoints(sweep: Path, tmp_path: Path) -> None:
    ds = open_runs(collect_runs(sweep, "trajectory", tmp_path / "t.zarr"))
    assert ds.sizes["run_setting"] == 3  # the trajectory has a coordinate called run
    own = pn.load(sweep / "seed=0" / ANALYSIS / "trajectory.nc")
    row = ds.isel(run_setting=0).sel(checkpoint=own.checkpoint)
    np.testing.assert_array_equal(row.pca, own.pca)
    assert row.run.values.tolist() == own.run.values.tolist()


def test_runs_that_are_alike_keep_their_types(sweep: Path, tmp_path: Path) -> None:
    import shutil

    for name in ("seed=0", "seed=1"):
        shutil.copytree(sweep / name, tmp_path / "alike" / name)
    ds = open_runs(collect_runs(tmp_path / "alike", "history", tmp_path / "s.zarr"))
    own = open_run(sweep / "seed=0").history
    assert {str(name): ds[name].dtype.kind for name in own.variables} == {
        str(name): "U" if a.dtype.kind == "O" else a.dtype.kind for name, a in own.variables.items()
    }


def test_a_failed_collection_leaves_nothing(sweep: Path, tmp_path: Path, monkeypatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(zarr_store, "append", full)
    with pytest.raises(OSError, match="No space"):
        collect_runs(sweep, "history", tmp_path / "s.zarr")
    assert not list(tmp_path.iterdir())


def test_a_folder_without_the_results_is_refused(sweep: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="none of its 3 runs has hessian results"):
        collect_runs(sweep, "hessian", tmp_path / "s.zarr")
    with pytest.raises(RunError, match="holds no runs"):
        collect_runs(tmp_path, "history", tmp_path / "s.zarr")
    assert not list(tmp_path.iterdir())


def test_other_datasets_are_not_saved_as_stores(paths: xr.Dataset, tmp_path: Path) -> None:
    other = paths.assign_attrs(kind="weather")
    for write in (pn.save, lambda ds, path: zarr_store.append(ds, path, "checkpoint")):
        with pytest.raises(SchemaError, match="not a pnanalysis dataset"):
            write(other, tmp_path / "t.zarr")
    assert not list(tmp_path.iterdir())
