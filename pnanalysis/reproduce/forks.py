"""Start Python modules without the seconds that imports take: as forks of a process that has imported what they need.

``python -m pnanalysis.reproduce.forks MODULE...`` imports these modules, then reads starts from standard input, one by
one: a line of JSON with a module and its arguments. Each runs in a process of its own, as under ``python -m``, and is
answered on standard output by its exit status and the last line of its errors.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from types import FrameType
from typing import IO, Any

_TAIL = 8192  # bytes of errors that are looked at


class Fork:
    """Runs one module at a time, and many in turn.

    Parameters
    ----------
    preload : sequence of str
        Modules to import beforehand; the ones that are to run must not be among them.
    environment : dict of str to str
    """

    def __init__(self, preload: Sequence[str], environment: dict[str, str]) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__, *preload], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._errors, text=True, env=environment,
        )  # fmt: skip

    def run(self, module: str, arguments: Sequence[str]) -> str:
        """Run a module; returns the last line of its errors, empty for success.

        A signal that is sent to :attr:`process` meanwhile reaches the module, if it is SIGTERM.
        """
        assert self.process.stdin
        assert self.process.stdout
        answer = ""
        with suppress(BrokenPipeError):  # it was stopped, or has crashed
            print(json.dumps([module, *arguments]), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        if not answer:
            return _last_line(self._errors) or f"exit status {self.process.wait()}"
        status, line = json.loads(answer)
        return str(line or f"exit status {status}") if status else ""

    @property
    def is_alive(self) -> bool:
        """Whether it can run another module."""
        return self.process.poll() is None

    def close(self) -> None:
        """Let the process end, which it does once nothing runs any more."""
        assert self.process.stdin
        assert self.process.stdout
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self._errors.close()


class _Server:
    """The other end: starts what it is told to, hands SIGTERM on to it, and without anything to hand it on to ends."""

    def __init__(self) -> None:
        self._child = 0
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to what runs, too
        signal.signal(signal.SIGTERM, self._hand_on)

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        if not self._child:
            raise SystemExit(128 + number)
        os.kill(self._child, number)

    def serve(self) -> None:
        for line in sys.stdin:
            module, *arguments = json.loads(line)
            with tempfile.TemporaryFile() as errors:
                status = self._run(module, arguments, errors)
                print(json.dumps([status, _last_line(errors)]), flush=True)

    def _run(self, module: str, arguments: list[str], errors: IO[bytes]) -> int:
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # until it is known whom it is for
        self._child = os.fork()
        if not self._child:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            _become(module, arguments, errors)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        # The process is gone for good only when it is waited for: until then its number is no other's.
        os.waitid(os.P_PID, self._child, os.WEXITED | os.WNOWAIT)
        ended, self._child = self._child, 0
        return os.waitstatus_to_exitcode(os.waitpid(ended, 0)[1])


def _become(module: str, arguments: list[str], errors: IO[bytes]) -> None:
    """Run a module in place of this process, which then ends."""
    status: Any = 1
    try:
        with open(os.devnull, "r+b", buffering=0) as null:
            for number in (0, 1):
                os.dup2(null.fileno(), number)
        os.dup2(errors.fileno(), 2)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 (nothing is buffered)
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as ending:
        status = ending.code or 0
        if not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status & 0xFF)


def _last_line(errors: IO[bytes]) -> str:
    """The last line that is not empty."""
    size = errors.seek(0, os.SEEK_END)
    errors.seek(max(0, size - _TAIL))
    lines = errors.read().decode(errors="replace").split("\n")
    return next((line.rstrip() for line in reversed(lines) if line.strip()), "")


def main() -> None:
    """Entry point: modules to import."""
    for name in sys.argv[1:]:
        with suppress(ImportError):  # who needs it says so
            import_module(name)
    _Server().serve()


if __name__ == "__main__":
    main()
