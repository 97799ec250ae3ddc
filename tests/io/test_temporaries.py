"""Unfinished files: never taken for results, removed by the next writer, with the permissions that the user wants."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pnanalysis.errors import RunError
from pnanalysis.io import atomic, netcdf
from pnanalysis.io.atomic import atomic_directory, atomic_path
from pnanalysis.io.lock import LOCK, Lock, is_held
from pnanalysis.io.runs import open_run
from pnanalysis.io.writer import RunWriter
from tests.io.test_damage import history

_KILLED = """
import os, signal, sys
from pnanalysis.io.atomic import atomic_directory, atomic_path
with {manager}(sys.argv[1]) as temporary:
    {write}
    os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(manager: str, path: Path) -> None:
    """Have a process killed while it writes."""
    write = "temporary.write_text('half')" if manager == "atomic_path" else "temporary.mkdir()"
    script = _KILLED.format(manager=manager, write=write)
    assert subprocess.run([sys.executable, "-c", script, str(path)], check=False).returncode == -9


def test_what_a_kill_leaves_is_no_dataset_and_goes_with_the_next_save(tmp_path: Path) -> None:
    killed("atomic_path", tmp_path / "history.nc")
    assert len(list(tmp_path.iterdir())) == 1
    assert not [*tmp_path.rglob("*.nc"), *tmp_path.rglob("*.safetensors")]
    netcdf.save(history(), tmp_path / "history.nc")
    assert [path.name for path in tmp_path.iterdir()] == ["history.nc"]


def test_a_killed_folder_goes_with_the_next(tmp_path: Path) -> None:
    killed("atomic_directory", tmp_path / "a.zarr")
    with atomic_directory(tmp_path / "a.zarr") as temporary:
        temporary.mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["a.zarr"]


def test_the_file_of_a_living_writer_stays(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a.nc") as first:
        with atomic_path(tmp_path / "a.nc") as second:
            second.write_text("second")
        first.write_text("first")
    assert (tmp_path / "a.nc").read_text() == "first"


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_decides_on_permissions(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        path = netcdf.save(history(), tmp_path / "a.nc")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_file_keeps_its_permissions_when_it_is_replaced(tmp_path: Path) -> None:
    path = netcdf.save(history(), tmp_path / "a.nc")
    path.chmod(0o600)
    netcdf.save(history(), path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_link_is_replaced_and_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "a.nc").symlink_to(tmp_path / "precious")
    netcdf.save(history(), tmp_path / "a.nc")
    assert (tmp_path / "precious").read_text() == "precious"
    assert not (tmp_path / "a.nc").is_symlink()


def test_one_writer_at_a_time_and_the_other_learns_whose_turn_it_is(tmp_path: Path) -> None:
    first, second = Lock(tmp_path), Lock(tmp_path)
    first.acquire()
    with pytest.raises(RunError, match=f"being written by process {os.getpid()} on"):
        second.acquire()
    first.release()
    second.acquire()
    second.release()
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from pnanalysis.io.lock import Lock\n"
        "lock = Lock(Path(sys.argv[1])); lock.acquire(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False).returncode == -9
    assert (tmp_path / LOCK).is_file()
    lock = Lock(tmp_path)
    lock.acquire()
    lock.release()
    assert not (tmp_path / LOCK).exists()


def test_looking_at_a_lock_neither_disturbs_its_owner_nor_takes_it(tmp_path: Path) -> None:
    lock = Lock(tmp_path)
    assert not is_held(tmp_path)
    lock.acquire()
    assert is_held(tmp_path)
    assert is_held(tmp_path)
    lock.release()
    assert not is_held(tmp_path)
    assert not list(tmp_path.iterdir())


def test_whoever_looks_keeps_no_writer_out(tmp_path: Path) -> None:
    (tmp_path / LOCK).touch()
    looking = os.open(tmp_path / LOCK, os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    writer = threading.Thread(target=Lock(tmp_path).acquire)
    writer.start()
    writer.join(0.1)
    assert writer.is_alive(), "it waits, for the other only looks"
    os.close(looking)
    writer.join(30)
    assert not writer.is_alive()


@pytest.mark.parametrize(("leaves_a_file", "recorded"), [(True, "running"), (False, "running"), (False, "failed")])
def test_a_run_that_nobody_writes_is_not_running(tmp_path: Path, leaves_a_file: bool, recorded: str) -> None:
    entries = {"id": "a", "recipe": "b", "config": {}, "model": {"name": "c"}, "data": {"name": "d"}, "ends": []}
    writer = RunWriter.create(tmp_path / "run", {**entries, "champion": None, "status": recorded})
    assert open_run(tmp_path / "run").status == recorded
    writer.release()
    if leaves_a_file:  # as a kill does
        (tmp_path / "run" / LOCK).touch()
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert open_run(tmp_path / "run").status == ("interrupted" if recorded == "running" else recorded)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


def test_a_lock_that_is_forgotten_is_released(tmp_path: Path) -> None:
    Lock(tmp_path).acquire()
    Lock(tmp_path).acquire()


def test_where_the_file_system_has_no_locks_work_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(fcntl, "flock", refuse)
    lock = Lock(tmp_path)
    lock.acquire()
    lock.release()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("replaced", [False, True])
def test_a_lock_whose_file_went_meanwhile_is_taken_on_the_new_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: bool
) -> None:
    flock, calls = fcntl.flock, []

    def removed_by_its_owner(descriptor: int, operation: int) -> None:
        flock(descriptor, operation)
        calls.append(descriptor)
        if len(calls) == 1:
            (tmp_path / LOCK).unlink()
            if replaced:
                (tmp_path / LOCK).touch()

    monkeypatch.setattr(fcntl, "flock", removed_by_its_owner)
    lock = Lock(tmp_path)
    lock.acquire()
    assert len(calls) == 2
    assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    with pytest.raises(RunError, match="is being written by"):
        Lock(tmp_path).acquire()
    lock.release()


def test_a_lock_that_is_held_is_acquired_once(tmp_path: Path) -> None:
    lock = Lock(tmp_path)
    lock.acquire()
    lock.acquire()
    lock.release()
    Lock(tmp_path).acquire()


def test_a_copy_of_the_process_leaves_the_lock_to_its_owner(tmp_path: Path) -> None:
    lock = Lock(tmp_path)
    lock.acquire()
    child = os.fork()
    if not child:
        lock.release()
        os._exit(0)
    os.waitpid(child, 0)
    assert (tmp_path / LOCK).is_file()
    with pytest.raises(RunError, match="is being written by"):
        Lock(tmp_path).acquire()
    lock.release()


@pytest.mark.parametrize("name", ["run.json", "checkpoints/iter00/epoch001.safetensors"])
def test_a_folder_that_vanishes_while_it_is_written_is_not_made_again(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = RunWriter.create(tmp_path / "run", {})

    def vanish(*_: object) -> None:
        (tmp_path / "run").rename(tmp_path / "elsewhere")

    monkeypatch.setattr("pnanalysis.io.writer.check_inside", vanish)
    with pytest.raises(RunError, match="the folder of the run is gone; put it back"):
        writer._write(name, b"")
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_begun_in_a_folder_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="sweep: this folder is gone; put it back"):
        RunWriter.create(tmp_path / "sweep" / "run", {}, parents=False)
    assert not (tmp_path / "sweep").exists()
    RunWriter.create(tmp_path / "sweep" / "run", {}).release()


def test_a_folder_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "long.zarr"
    folder.mkdir()
    (folder / "old").write_text("kept")
    replace = os.replace

    def fails(source: object, target: object) -> None:
        if (
            Path(str(source)).name == "long.zarr" and Path(str(source)).parent != tmp_path
        ):  # the new one, into its place
            raise OSError("no room")
        replace(source, target)  # type: ignore[arg-type]

    def replaced() -> None:
        with atomic_directory(folder) as new:
            new.mkdir()

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="no room"):
        replaced()
    assert [path.name for path in tmp_path.iterdir()] == ["long.zarr"]
    assert (folder / "old").read_text() == "kept"


def test_what_another_users_process_is_writing_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of_another_user(process: int, signal: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    unfinished = atomic._unfinished_name(tmp_path / "file")
    unfinished.touch()
    monkeypatch.setattr(os, "kill", of_another_user)
    with atomic_path(tmp_path / "file") as temporary:
        temporary.touch()
    assert sorted(tmp_path.iterdir()) == [unfinished, tmp_path / "file"]


def test_what_threads_of_a_failed_writer_still_write_is_removed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped, pauses = threading.Event(), []

    def go_on(folder: Path) -> None:
        while not stopped.is_set():
            with contextlib.suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "late").write_text("late")

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 1:
            while not any(tmp_path.iterdir()):
                pass
        else:
            stopped.set()
            thread.join()

    monkeypatch.setattr(atomic.time, "sleep", pause)
    writing = atomic_directory(tmp_path / "store")
    thread = threading.Thread(target=go_on, args=[writing.__enter__()])
    thread.start()
    with pytest.raises(ValueError, match="failed"):
        writing.gen.throw(ValueError("failed"))  # type: ignore[attr-defined]
    assert not any(tmp_path.iterdir())
    assert len(pauses) >= 2
