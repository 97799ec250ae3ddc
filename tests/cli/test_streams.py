"""Standard output and error that are missing, broken or full."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pnanalysis.io import netcdf
from pnanalysis.io.runs import open_run
from pnanalysis.terminal.console import print_status
from pnanalysis.terminal.progress import progress_bar
from pnanalysis.terminal.streams import LastingStream
from tests.cli.conftest import TINY

COMMAND = ("pntrain", "tanh7", *TINY, "--epochs", 1, "--iterations", 2)


class Broken(io.StringIO):
    """A stream whose writes fail."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("stream", [None, Broken(errno.EIO), Broken(errno.EPIPE)], ids=["missing", "terminal", "pipe"])
def test_training_goes_on_without_anybody_to_read(run, tmp_path: Path, monkeypatch, stream: io.StringIO | None) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, stream)
    assert run(*COMMAND, "--out", tmp_path / "net").status == 0
    assert open_run(tmp_path / "net").manifest["status"] == "finished"


def test_a_table_that_a_full_disk_refuses_is_an_error(run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdout", Broken(errno.ENOSPC))
    done = run(*COMMAND, "--out", tmp_path / "net")
    assert done.status == 2
    assert "standard output cannot be written" in done.err.splitlines()[-1]
    assert open_run(tmp_path / "net").manifest["status"] == "finished"


def test_messages_of_the_library_do_not_need_a_stream(monkeypatch) -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed, Broken(errno.EIO)):
        monkeypatch.setattr(sys, "stderr", stream)
        print_status("a line")
        with progress_bar("work", 2) as advance:
            advance()


def test_characters_that_an_encoding_lacks_are_escaped() -> None:
    buffer = io.BytesIO()
    stream = LastingStream(io.TextIOWrapper(buffer, encoding="ascii"))
    stream.write("20 – 30")
    stream.flush()
    assert buffer.getvalue() == b"20 \\u2013 30"


def test_a_command_whose_streams_are_closed_writes_no_message_into_its_files(tmp_path: Path) -> None:
    """Descriptors 1 and 2 would be those of the next files to be opened."""
    code = (
        "import os, sys\n"
        "from pnanalysis.terminal.streams import lasting_streams\n"
        "with lasting_streams():\n"
        "    with open(sys.argv[1], 'w') as file:\n"
        "        os.write(2, b'message')\n"
        "        file.write('data')\n"
    )
    file = tmp_path / "file"
    done = subprocess.run(["sh", "-c", 'exec "$0" -c "$1" "$2" >&- 2>&-', sys.executable, code, str(file)], check=False)
    assert done.returncode == 0
    assert file.read_text() == "data"


@pytest.fixture
def hangup() -> Iterator[None]:
    """SIGHUP as a terminal's programs have it: what runs under nohup ignores it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangup")
def test_a_terminal_that_closes_interrupts(run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("trainers.runs.session.fit", lambda *_, **__: signal.raise_signal(signal.SIGHUP))
    done = run(*COMMAND, "--out", tmp_path / "net")
    assert done.status == 128 + signal.SIGHUP
    assert "--resume" in done.err.splitlines()[-1]
    assert open_run(tmp_path / "net").manifest["status"] == "interrupted"


def test_a_result_that_its_disk_refuses_is_kept_elsewhere(run, tiny_run, tmp_path: Path, monkeypatch) -> None:
    write = Path.write_bytes
    (tmp_path / "full").mkdir()

    def refused(path: Path, content: bytes) -> int:
        if path.parent.name == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", refused)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    done = run("pnanalysis", "saturation", tiny_run.path, "--n", 50, "-o", tmp_path / "full/a.nc")
    assert done.status == 2
    assert "saturation" in done.out  # the tables
    message = done.err.splitlines()[-1]
    assert "full/a.nc: cannot be written, No space left on device; the result is kept in" in message
    [kept] = tmp_path.glob("pnanalysis-*/a.nc")
    assert str(kept) in message
    assert netcdf.load(kept).attrs["kind"] == "saturation"
    assert not list((tmp_path / "full").iterdir())
