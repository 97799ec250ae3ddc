"""Datasets read array by array are those that xarray and h5netcdf read."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import h5py
import numpy as np
import pytest
import xarray as xr

from pnanalysis.io import netcdf
from pnanalysis.io.hdf5 import read_arrays
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
