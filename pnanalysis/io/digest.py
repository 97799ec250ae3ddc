"""SHA-256 digests that files carry in themselves: any bit that changes is found when they are read.

Of a NetCDF file the digest follows the content, where readers of HDF5 do not look. Of a safetensors file it is an entry
of the header, computed with zeros in its own place. Of JSON it is an entry of the object, computed over all others.
Files without one were written by others, or by an older version.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from pnanalysis.errors import PnError

_TRAILER = b"\npnanalysis sha256 "
_DIGITS = 64
#: The key in the metadata of a safetensors file, and its value before the digest is known.
KEY, BLANK = "sha256", "0" * _DIGITS
_ENTRY = b'"sha256":"'
_CHUNK = 2**22
_AGAIN = "restore it from a copy, or compute it again"


def with_trailer(content: bytes | memoryview) -> bytes:
    """The content of a file, followed by its digest."""
    return b"".join((content, _TRAILER, hashlib.sha256(content).hexdigest().encode()))


def check_trailer(raw: bytes, path: str | os.PathLike[str], error: type[PnError]) -> bool:
    """Whether a file ends with its digest.

    Raises
    ------
    PnError
        If that is the digest of something else.
    """
    end = len(raw) - _DIGITS - len(_TRAILER)
    if end < 0 or raw[end : end + len(_TRAILER)] != _TRAILER:
        return False
    _compare([memoryview(raw)[:end]], raw[-_DIGITS:], path, error)
    return True


def with_entry(raw: bytes) -> bytes:
    """The bytes of a safetensors file whose metadata hold :data:`BLANK` under :data:`KEY`, with its digest there."""
    place = _place(raw)
    assert place is not None, "no place for the digest"
    return b"".join((raw[:place], hashlib.sha256(raw).hexdigest().encode(), raw[place + _DIGITS :]))


def sign(path: Path) -> None:
    """Write its digest into a safetensors file that :func:`with_entry` would take. The file is read in pieces."""
    with open(path, "rb+") as file:
        length = file.read(8)
        place = _place(length + file.read(int.from_bytes(length, "little")))
        assert place is not None, "no place for the digest"
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256")
        file.seek(place)
        file.write(digest.hexdigest().encode())


def check_entry(file: BinaryIO, path: str | os.PathLike[str], error: type[PnError], advice: str = _AGAIN) -> bool:
    """Whether a safetensors file holds its digest. The file is read in pieces.

    Raises
    ------
    PnError
        If that is the digest of something else.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if length > size:
        return False  # the reader of the format says what is wrong
    file.seek(0)
    header = file.read(8 + length)
    place = _place(header)
    if place is None:
        return False
    rest = iter(lambda: file.read(_CHUNK), b"")
    pieces = (header[:place], BLANK.encode(), header[place + _DIGITS :])
    _compare(itertools.chain(pieces, rest), header[place : place + _DIGITS], path, error, advice)
    return True


def of_entries(entries: Mapping[str, Any]) -> str:
    """The digest of a JSON object, however it is written, over all entries but :data:`KEY`."""
    others = {name: value for name, value in entries.items() if name != KEY}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def check_entries(
    entries: Mapping[str, Any], path: str | os.PathLike[str], error: type[PnError], advice: str = _AGAIN
) -> bool:
    """Whether a JSON object holds its digest.

    Raises
    ------
    PnError
        If that is the digest of something else.
    """
    if KEY not in entries:
        return False
    if of_entries(entries) != entries[KEY]:
        raise _damaged(path, error, advice)
    return True


def _place(raw: bytes) -> int | None:
    """Where the digest is in the header of a safetensors file: only metadata have texts as values."""
    place = raw.find(_ENTRY, 8, 8 + int.from_bytes(raw[:8], "little"))
    return None if place < 0 else place + len(_ENTRY)


def _compare(
    pieces: Iterable[bytes | memoryview],
    recorded: bytes,
    path: str | os.PathLike[str],
    error: type[PnError],
    advice: str = _AGAIN,
) -> None:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    if digest.hexdigest().encode() != recorded:
        raise _damaged(path, error, advice)


def _damaged(path: str | os.PathLike[str], error: type[PnError], advice: str) -> PnError:
    what = "its content is not what was written (its SHA-256 digest differs)"
    return error(f"{Path(path)}: is damaged, for {what}; {advice}")
