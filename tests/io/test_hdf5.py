"""Datasets read array by array are those that xarray and h5netcdf read, and files written so are those they write."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import xarray as xr

from pnanalysis.io import netcdf
from pnanalysis.io.hdf5 import read_arrays, write_arrays
from pnanalysis.io.runs import Run


def read_both_ways(raw: bytes) -> tuple[xr.Dataset | None, xr.Dataset]:
    with h5py.File(BytesIO(raw), "r") as file:
        ours = read_arrays(file)
    with xr.open_dataset(BytesIO(raw), engine="h5netcdf") as ds:
        return ours, ds.load()


def check_alike(raw: bytes) -> None:
    ours, theirs = read_both_ways(raw)
    assert ours is not None
    xr.testing.assert_identical(ours, theirs)
    assert (list(ours.variables), list(ours.coords)) == (list(theirs.variables), list(theirs.coords))
    for one, other in ((ours, theirs), *((ours[name], theirs[name]) for name in theirs.variables)):
        assert {key: type(value) for key, value in one.attrs.items()} == {
            key: type(value) for key, value in other.attrs.items()
        }
    for name, variable in theirs.variables.items():
        assert ours[name].dtype == variable.dtype, name


def all_kinds() -> xr.Dataset:
    """Numbers, flags, times and strings, with and without dims, coordinates, fill values and entries."""
    return xr.Dataset(
        {
            "number": (("x", "without"), np.arange(6.0).reshape(3, 2), {"units": "1", "list": [1, 2], "one": [3.5]}),
            "missing": ("x", [1.0, np.nan, 3.0]),
            "flag": ("x", [True, False, True]),
            "count": ("x", np.array([1, 2, 3], dtype=np.int8)),
            "empty": (("x", "none"), np.zeros((3, 0))),
            "name": ("x", ["a", "", "ü"]),
            "text": ((), "a single one"),
            "scalar": ((), np.float32(2.5)),
        },
        {"x": ["p", "q", "r"], "own": ("x", [10, 20, 30]), "when": np.datetime64("2026-01-02", "ns")},
        {"title": "t", "empty": "", "numbers": np.arange(3), "names": ["a", "b"], "flag": np.int64(1)},
    )


def test_of_all_kinds() -> None:
    check_alike(bytes(all_kinds().to_netcdf(engine="h5netcdf")))
    check_alike(netcdf.as_bytes(all_kinds()))


def test_of_a_run(tiny_run: Run) -> None:
    paths = list(tiny_run.path.rglob("*.nc"))
    assert paths
    for path in paths:
        check_alike(path.read_bytes())


def _with_two_axes_of_one_scale(file: h5py.File) -> None:
    file["a"] = np.zeros((2, 2))


def _with_a_fixed_string(file: h5py.File) -> None:
    file["a"] = np.bytes_(b"fixed")


def _with_two_scales(file: h5py.File) -> None:
    file["a"] = np.zeros(2)
    for name in ("x", "y"):
        file[name] = np.arange(2)
        file[name].make_scale(name)
        file["a"].dims[0].attach_scale(file[name])


def _with_nothing_in_it(file: h5py.File) -> None:
    file["a"] = h5py.Empty("f4")


def _with_a_dimension_that_has_grown(file: h5py.File) -> None:
    file["x"] = np.arange(3)
    file["x"].make_scale("x")
    file["a"] = np.zeros(2)
    file["a"].dims[0].attach_scale(file["x"])


def _with_a_scale_in_a_group(file: h5py.File) -> None:
    file["group/x"] = np.arange(2)
    file["group/x"].make_scale("x")
    file["a"] = np.zeros(2)
    file["a"].dims[0].attach_scale(file["group/x"])


@pytest.mark.parametrize(
    "write",
    [
        _with_two_axes_of_one_scale, _with_a_fixed_string, _with_two_scales, _with_nothing_in_it,
        _with_a_dimension_that_has_grown, _with_a_scale_in_a_group,
    ],
)  # fmt: skip
def test_what_xarray_would_not_write_is_left_to_it(write, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.nc", "w") as file:
        write(file)
        assert read_arrays(file) is None


def test_an_array_with_the_name_of_a_dimension_it_does_not_have_is_left_to_xarray() -> None:
    ds = xr.Dataset({"x": ("y", [1.0, 2.0]), "z": ("x", [1.0, 2.0, 3.0])})
    ours, theirs = read_both_ways(bytes(ds.to_netcdf(engine="h5netcdf")))
    assert ours is None
    assert "x" in theirs.variables


def as_xarray_writes_it(ds: xr.Dataset) -> bytes:
    numbers = [name for name, v in ds.variables.items() if v.ndim and v.size and v.dtype.kind in "biufM"]
    encoding = {name: {"zlib": True, "fletcher32": True} for name in numbers}
    return bytes(ds.drop_encoding().to_netcdf(engine="h5netcdf", encoding=encoding))


def structure(raw: bytes) -> dict[str, Any]:
    """Everything in a file but the programs that wrote it, with names in place of references."""
    with h5py.File(BytesIO(raw)) as file:
        found: dict[str, Any] = {"": attributes(file, file)}
        for name, item in file.items():
            filters = (item.chunks, item.compression, item.compression_opts, item.shuffle, item.fletcher32)
            values = item[()] if item.dtype == object else item[()].tobytes()
            found[name] = item.dtype, item.maxshape, filters, repr(item.fillvalue), repr(values), attributes(file, item)
        return found


def attributes(file: h5py.File, item: h5py.HLObject) -> dict[str, Any]:
    found = {}
    for name in item.attrs:
        value: Any = item.attrs[name]
        if name == "DIMENSION_LIST":
            value = [file[one].name for (one,) in value]
        elif name == "REFERENCE_LIST":
            value = sorted((file[one].name, int(axis)) for one, axis in value)
        stored = item.attrs.get_id(name)
        found[name] = repr(value), str(stored.dtype), stored.shape
    found.pop("_NCProperties", None)
    return found


def check_written_alike(ds: xr.Dataset) -> None:
    with h5py.File(BytesIO(), "w", track_order=True) as file:
        assert write_arrays(ds, file)
    ours, theirs = structure(netcdf.as_bytes(ds)), structure(as_xarray_writes_it(ds))
    assert list(ours) == list(theirs)
    for name, expected in theirs.items():
        assert ours[name] == expected, name


def test_all_kinds_are_written_as_xarray_does() -> None:
    ds = all_kinds().drop_vars("empty").assign(
        big=("x", np.arange(3, dtype=">f8")), small=("x", np.arange(3, dtype="f4")),
        byte=("x", np.arange(3, dtype="u1")), filled=("x", [1, 2, 3], {"_FillValue": 2}),
    )  # fmt: skip
    check_written_alike(ds)
    xr.testing.assert_identical(netcdf_from(netcdf.as_bytes(ds)), netcdf_from(as_xarray_writes_it(ds)))


def netcdf_from(raw: bytes) -> xr.Dataset:
    with xr.open_dataset(BytesIO(raw), engine="h5netcdf") as ds:
        return ds.load()


def test_files_of_a_run_are_written_as_xarray_does(tiny_run: Run) -> None:
    for path in tiny_run.path.rglob("*.nc"):
        check_written_alike(netcdf.load(path))


def test_the_same_dataset_gives_the_same_bytes() -> None:
    assert netcdf.as_bytes(all_kinds()) == netcdf.as_bytes(all_kinds())


@pytest.mark.parametrize(
    "ds",
    [
        xr.Dataset({"a": ("x", np.zeros(0))}),
        xr.Dataset({"a": ("x", np.zeros(2, dtype=complex))}),
        xr.Dataset({"a": ("x", np.zeros(2), {"flag": True})}),
        xr.Dataset({"a": ("x", np.zeros(2))}, attrs={"bytes": b"b"}),
        xr.Dataset({"a": ("x", np.zeros(2))}, attrs={"CLASS": "c"}),
        xr.Dataset({"a/b": ("x", np.zeros(2))}),
        xr.Dataset({"a": ("x", np.zeros(2)), "x": ("y", np.zeros(3))}),
        xr.Dataset({1: ("x", np.zeros(2))}),
    ],
    ids=["empty", "complex", "flag", "bytes", "reserved", "path", "not of its dimension", "number as a name"],
)  # fmt: skip
def test_what_only_xarray_can_write_or_refuse_is_left_to_it(ds: xr.Dataset) -> None:
    with h5py.File(BytesIO(), "w", track_order=True) as file:
        assert not write_arrays(ds, file)
        assert not list(file)
