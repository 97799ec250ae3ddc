"""What a run from a stranger may hold: nothing of it leads out of the run, hangs, or ends in anything but one error."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from pnanalysis.analyses.spectrum_cache import SpectrumCache
from pnanalysis.checks import check_writable
from pnanalysis.errors import CurvatureError, DataError, ModelError, PnError, RunError, SchemaError
from pnanalysis.inputs.sources import as_source
from pnanalysis.io import datasets, netcdf
from pnanalysis.io.atomic import check_replaceable
from pnanalysis.io.files import check_inside, open_regular
from pnanalysis.io.runs import ANALYSIS, MANIFEST, Run, open_run
from pnanalysis.io.weights import read_state_dicts
from pnanalysis.io.writer import RunWriter
from tests.io.test_damage import history


@pytest.fixture
def own_run(tiny_run: Run, tmp_path: Path) -> Run:
    """A copy of the finished run, to be changed at will."""
    shutil.copytree(tiny_run.path, tmp_path / "own")
    return open_run(tmp_path / "own")


def replaced_by_link(file: Path, elsewhere: Path) -> None:
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


def replaced_by_pipe(file: Path, elsewhere: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def replaced_by_device(file: Path, elsewhere: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


@pytest.mark.parametrize("replace", [replaced_by_link, replaced_by_pipe, replaced_by_device])
def test_only_regular_files_in_the_run_are_read(own_run: Run, tmp_path: Path, replace) -> None:
    checkpoint = own_run.plain
    replace(checkpoint.path, tmp_path / "elsewhere.safetensors")
    with pytest.raises(ModelError, match="is a link|no such weights file|not a regular file"):
        checkpoint.load()
    replace(own_run.path / "history.nc", tmp_path / "elsewhere.nc")
    with pytest.raises(SchemaError, match="is a link|not a regular file"):
        _ = open_run(own_run.path).history
    replace(own_run.path / MANIFEST, tmp_path / "elsewhere.json")
    with pytest.raises(RunError, match="is a link|not a regular file"):
        open_run(own_run.path)


def test_a_folder_that_leads_out_of_the_run_is_neither_read_nor_written(own_run: Run, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (own_run.path / "checkpoints/iter00").rename(outside)
    (own_run.path / "checkpoints/iter00").symlink_to(outside)
    before = sorted(outside.iterdir())
    with pytest.raises(ModelError, match="link out of the run"):
        open_run(own_run.path).plain.load()
    with pytest.raises(RunError, match="link out of the run"):
        RunWriter(own_run.path, own_run.manifest).save_checkpoint(0, 9, own_run.ends[2].load())
    assert sorted(outside.iterdir()) == before


def test_links_in_a_circle_lead_out_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "round").symlink_to(tmp_path / "about")
    (tmp_path / "about").symlink_to(tmp_path / "round")
    with pytest.raises(RunError, match="its folder is a link out of the run"):
        check_inside(tmp_path / "round/file", tmp_path, RunError)


def test_weights_outside_of_runs_may_be_links(own_run: Run, tmp_path: Path) -> None:
    from pnanalysis.io.weights import read_weights

    (tmp_path / "link.safetensors").symlink_to(own_run.plain.path)
    assert read_weights(tmp_path / "link.safetensors").keys() == own_run.plain.load().keys()


def write_external_link(file: h5py.File, secret: Path) -> None:
    file["leak"] = h5py.ExternalLink(str(secret), "/secret")


def write_circle(file: h5py.File, secret: Path) -> None:
    file["round"], file["about"] = h5py.SoftLink("/about"), h5py.SoftLink("/round")


def write_external_storage(file: h5py.File, secret: Path) -> None:
    file.create_dataset("leak", (8,), "u1", external=[(str(secret), 0, 8)])


def write_virtual(file: h5py.File, secret: Path) -> None:
    layout = h5py.VirtualLayout((3,), "f8")
    layout[:] = h5py.VirtualSource(str(secret), "secret", (3,))
    file.create_virtual_dataset("leak", layout)


def write_bomb(file: h5py.File, secret: Path) -> None:
    file.create_dataset("bomb", (2**40,), "f8", chunks=(2**20,), compression="gzip")


def write_many_arrays(file: h5py.File, secret: Path) -> None:
    for i in range(5_001):
        file.create_dataset(f"{i}", (), "u1")


def write_many_attributes(file: h5py.File, secret: Path) -> None:
    for i in range(1_001):
        file["train_loss"].attrs[f"{i}"] = 0


def write_large_attribute(file: h5py.File, secret: Path) -> None:
    file.attrs.create("large", np.zeros(2**24 + 1, "u1"))


def write_other_filter(file: h5py.File, secret: Path) -> None:
    file.create_dataset("packed", (8,), "f8", chunks=(8,), compression="lzf")


def write_kind(file: h5py.File, secret: Path) -> None:
    file.attrs["kind"] = np.arange(3)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_external_link, "is a link"),
        (write_circle, "is a link"),
        (write_external_storage, "lies in another file"),
        (write_virtual, "lies in another file"),
        (write_bomb, "bytes of memory"),
        (write_many_arrays, "holds 5,0.. arrays, more than any"),
        (write_many_attributes, "'train_loss' has 1,0.. attributes, more than any"),
        (write_large_attribute, "has an attribute 'large' that is too large"),
        (write_other_filter, "'packed' is packed in an unknown way; use zlib"),
        (write_kind, "not a pnanalysis dataset"),
    ],
)
def test_hostile_hdf5_is_one_error(tmp_path: Path, write, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    secret = tmp_path / "secret.h5"
    with h5py.File(secret, "w") as file:
        file["secret"] = np.arange(3.0)
    path = netcdf.save(history(), tmp_path / "hostile.nc")
    with h5py.File(path, "r+") as file:
        write(file, secret)
    with pytest.raises(SchemaError, match=message) as caught:
        netcdf.load(path)
    assert str(path) in str(caught.value)
    assert capfd.readouterr().err == ""


def test_a_file_that_is_too_large_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with open(tmp_path / "large.nc", "wb") as file:
        file.truncate(2**40)  # a sparse file
    with pytest.raises(SchemaError, match="at most"):
        netcdf.load(tmp_path / "large.nc")


@pytest.mark.parametrize("name", ["link", "pipe"])
def test_a_zarr_store_holds_only_regular_files(tmp_path: Path, name: str) -> None:
    store = datasets.save(history(), tmp_path / "a.zarr")
    chunk = next(path for path in (store / "train_loss").iterdir() if path.name[0] != ".")
    (replaced_by_link if name == "link" else replaced_by_pipe)(chunk, tmp_path / "chunk")
    with pytest.raises(SchemaError, match="is a link, pipe or device"):
        datasets.load(store)


def nested(depth: int) -> Any:
    return [] if depth == 0 else [nested(depth - 1)]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"id": 3}, "id is not text"),
        ({"recipe": None}, "recipe is not text"),
        ({"config": []}, "config is not an object"),
        ({"model": "lenet5"}, "model is not an object|lacks model.name"),
        ({"model": {"name": ["a"]}}, "model.name is not text"),
        ({"model": {"name": "a", "options": 1}}, "model.options"),
        ({"data": {"name": 1}}, "data.name is not text"),
        ({"data": {"name": "digits", "split_seed": "x"}}, "split_seed"),
        ({"ends": {}}, "ends is not a list"),
        ({"ends": [-1]}, "ends is not a list"),
        ({"ends": [True]}, "ends is not a list"),
        ({"ends": [0] * 100_001}, "ends is not a list"),
        ({"champion": "x"}, "champion is not"),
        ({"champion": 99}, "the champion is iteration 99, of 3"),
        ({"loss": {}}, "loss is not text"),
        ({"layers": [1]}, "layers is not"),
        ({"versions": []}, "versions is not"),
        ({"strategy": []}, "strategy is not"),
        ({"schema_version": "1"}, "schema_version"),
        ({"config": nested(50)}, "nested more than"),
        ({"config": {"seed": 2**70}}, "64 bits"),
    ],
)
def test_a_manifest_of_wrong_types_is_one_error(own_run: Run, entries: dict[str, Any], message: str) -> None:
    (own_run.path / MANIFEST).write_text(json.dumps(own_run.manifest | entries))
    with pytest.raises(RunError, match=message):
        open_run(own_run.path)


@pytest.mark.parametrize("text", [b"\xff", b"[" * 100_000, b"null", b'{"format": ' + b"1" * 10_000 + b"}"])
def test_a_manifest_that_is_no_json_object_is_one_error(own_run: Run, text: bytes) -> None:
    (own_run.path / MANIFEST).write_bytes(text)
    with pytest.raises(RunError, match="unreadable|not a manifest"):
        open_run(own_run.path)


def test_a_manifest_chooses_no_path(own_run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    own_run.manifest["data"]["name"] = f"cifar10:{folder}"
    with pytest.raises(DataError, match="--data cifar10:"):
        _ = as_source(own_run).data
    assert not folder.exists()


def test_an_analysis_downloads_nothing(own_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    def download(*arguments: object, **options: object) -> None:
        raise AssertionError("a download was tried")

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", download)
    monkeypatch.setenv("PNANALYSIS_DATA", str(tmp_path / "data"))
    own_run.manifest["data"]["name"] = "cifar10"
    with pytest.raises(DataError, match="download nothing"):
        _ = as_source(own_run).data
    assert not (tmp_path / "data").exists()


def test_the_report_embeds_only_what_was_read(own_run: Run, tmp_path: Path) -> None:
    from pnanalysis.report.datasets import RunDatasets
    from pnanalysis.report.page import _downloads

    folder = own_run.path / ANALYSIS
    folder.mkdir(exist_ok=True)
    secret = tmp_path / "secret"
    secret.write_bytes(b"private")
    (folder / "x.nc").symlink_to(secret)
    (folder / "y.nc").write_bytes(b"private")
    names = [entry["name"] for entry in _downloads(RunDatasets(own_run))]
    assert names == ["own-history.nc"]


def test_unfinished_work_is_no_way_out(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "hessian.unfinished").symlink_to(tmp_path / "outside")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner/spectrum").symlink_to(tmp_path / "outside")
    for name in ("hessian.unfinished", "inner"):
        with pytest.raises(CurvatureError, match="is a link"):
            SpectrumCache.claim(tmp_path / name, {"seed": 0})
    assert not list((tmp_path / "outside").iterdir())


def test_a_device_is_never_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.nc"
    os.mkfifo(pipe)
    for save in (datasets.check_destination, lambda path: netcdf.save(history(), path)):
        with pytest.raises(PnError, match="device.* pipe|device or pipe"):
            save(pipe)
    assert pipe.is_fifo()


@pytest.mark.parametrize("path", ["/dev/stdout", "/dev/null"])
def test_streams_of_the_system_are_no_files_even_where_they_lead_to_one(path: str) -> None:
    # only checks, never a save: a mistake here would break the machine
    for check in (check_replaceable, check_writable):
        with pytest.raises(PnError, match="device"):
            check(path)


def test_an_archive_that_grows_beyond_reason_is_not_read(tmp_path: Path) -> None:
    plain = tmp_path / "plain.pt"
    torch.save({"weight": torch.zeros(2**23)}, plain)
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in source.namelist():
            archive.writestr(name, source.read(name))
    assert read_state_dicts(plain)[""]["weight"].shape == (2**23,)
    with pytest.raises(ModelError, match=r"bomb\.pt: 33,\d+,\d+ bytes are compressed into it"):
        read_state_dicts(bomb)


def test_an_archive_of_too_many_parts_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "many.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(100_001):
            archive.writestr(f"many/data/{i}", b"")
    with pytest.raises(ModelError, match=r"many\.pt: holds 100,001 parts, more than the 100,000"):
        read_state_dicts(path)


def test_refused_files_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, open_descriptor = [], os.open
    monkeypatch.setattr(os, "open", lambda *arguments: opened.append(open_descriptor(*arguments)) or opened[-1])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RunError, match="not a regular file"):
        open_regular(tmp_path / "pipe", RunError)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[-1])
