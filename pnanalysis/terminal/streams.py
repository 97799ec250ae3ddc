"""Standard output and error that may be missing, closed or broken: what is written there is dropped."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from pnanalysis.errors import printable

#: Errors of a stream that nobody reads any more: the reader has ended, the terminal is closed.
_NOBODY_READS = (errno.EPIPE, errno.EIO, errno.EBADF)


class LastingStream:
    """A text stream that drops what is written once the stream behind it is missing, closed or broken.

    Characters that its encoding lacks are written as escapes.

    Attributes
    ----------
    error : OSError or ValueError or None
        What broke it.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream
        self.error: OSError | ValueError | None = None

    def write(self, text: str) -> int:
        """Write, or drop the text."""
        if self.stream is not None and self.error is None:
            try:
                try:
                    self.stream.write(text)
                except UnicodeEncodeError:
                    encoding = self.stream.encoding or "ascii"
                    self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            except (OSError, ValueError) as error:  # ValueError: closed within Python
                self.error = error
        return len(text)

    def flush(self) -> None:
        """Flush what has not been dropped."""
        if self.stream is not None and self.error is None:
            try:
                self.stream.flush()
            except (OSError, ValueError) as error:
                self.error = error

    def isatty(self) -> bool:
        """Whether a terminal shows what is written."""
        try:
            return self.stream is not None and self.error is None and self.stream.isatty()
        except (OSError, ValueError):
            return False

    @property
    def lost(self) -> bool:
        """Whether something was dropped that somebody may have waited for, as on a full disk."""
        return isinstance(self.error, OSError) and self.error.errno not in _NOBODY_READS

    def __getattr__(self, name: str) -> Any:
        if self.stream is None:
            raise AttributeError(name)
        return getattr(self.stream, name)


def error_stream() -> LastingStream:
    """Standard error as it is now."""
    return sys.stderr if isinstance(sys.stderr, LastingStream) else LastingStream(sys.stderr)


def write_line(line: str) -> None:
    """Write a line on standard error; above a progress bar where there is one."""
    stream = error_stream()
    stream.write(f"{printable(line)}\n")
    stream.flush()


@contextmanager
def lasting_streams() -> Iterator[tuple[LastingStream, LastingStream]]:
    """Replace standard output and error by lasting ones within the body."""
    _open_missing()
    before = sys.stdout, sys.stderr
    lasting = LastingStream(sys.stdout), LastingStream(sys.stderr)
    sys.stdout, sys.stderr = lasting
    try:
        yield lasting
    finally:
        sys.stdout, sys.stderr = before
        for stream in lasting:
            stream.flush()
            if stream.error is not None:
                _drop_rest(stream)


def _open_missing() -> None:
    """Open the standard descriptors that are closed, lest a data file gets their number, and messages with it."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # which gives the lowest number that is free


def _drop_rest(stream: LastingStream) -> None:
    """Send what is left in a broken stream nowhere, which Python would try to write when it ends."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, stream.fileno())
        finally:
            os.close(nowhere)
