"""The manifest of a run, read as what it must be: entries of known types, and bounded in size, depth and numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pnanalysis import schema
from pnanalysis.checks import MOST_ITERATIONS
from pnanalysis.errors import RunError, reason
from pnanalysis.io import digest
from pnanalysis.io.files import read_regular

FORMAT = "pnanalysis-run"
_LARGEST = 2**24  # bytes
_DEPTH = 16
_BIGGEST = 2**63

Check = Callable[[Any], bool]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _BIGGEST


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_text_or_none(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _are_ends(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MOST_ITERATIONS and all(map(_is_count, value))


#: The entries that every manifest has, with what they must be, and those that may be left out. A dot leads into an
#: object.
_REQUIRED: dict[str, tuple[Check, str]] = {
    "id": (_is_text, "text"),
    "recipe": (_is_text, "text"),
    "config": (_is_object, "an object"),
    "model": (_is_object, "an object"),
    "model.name": (_is_text, "text"),
    "data": (_is_object, "an object"),
    "data.name": (_is_text, "text"),
    "ends": (_are_ends, "a list of epochs"),
    "champion": (lambda value: value is None or _is_count(value), "the number of an iteration, or null"),
}
_OPTIONAL: dict[str, tuple[Check, str]] = {
    "model.options": (_is_object, "an object"),
    "data.fingerprint": (_is_text, "text"),
    "data.split_hash": (_is_text, "text"),
    "data.split_seed": (_is_integer, "a whole number"),
    "loss": (_is_text, "text"),
    "strategy": (_is_text, "text"),
    "status": (_is_text, "text"),
    "device": (_is_text, "text"),
    "device_name": (_is_text, "text"),
    "n_processes": (_is_count, "a number of processes"),
    "layer_names": (_are_texts, "a list of texts"),
    "layers": (lambda value: isinstance(value, list) and all(map(_are_texts, value)), "a list of lists of texts"),
    "seeds": (_is_object, "an object"),
    "versions": (_is_object, "an object"),
    "command": (_is_text_or_none, "text"),
    "git_revision": (_is_text_or_none, "text"),
    "started": (_is_text_or_none, "text"),
    "ended": (_is_text_or_none, "text"),
    "failure": (_is_text_or_none, "text"),
}


def dump_manifest(manifest: Mapping[str, Any]) -> bytes:
    """The file of a manifest, with its digest."""
    entries = json.loads(json.dumps(manifest))  # as it will be read
    return (json.dumps({**entries, digest.KEY: digest.of_entries(entries)}, indent=2) + "\n").encode()


def read_manifest(file: Path) -> dict[str, Any]:
    """Read and check a manifest.

    Parameters
    ----------
    file : Path
        ``run.json`` in its run directory.

    Raises
    ------
    RunError
        If it is not a regular file, too large, not JSON, not a manifest, of a newer version, not what was written, or
        an entry is missing or is not what it must be.
    """
    raw = read_regular(file, _LARGEST, RunError, within=file.parent)
    try:
        manifest = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{file}: unreadable ({reason(error)}); restore it or train the run again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise RunError(f"{file}: not a manifest of pnanalysis; name a folder that pntrain has written")
    version = manifest.get("schema_version", 0)
    if not _is_integer(version):
        raise _damaged(file, "schema_version is not a whole number")
    if version > schema.SCHEMA_VERSION:
        raise RunError(f"{file}: written by a newer version of pnanalysis; upgrade to read it")
    _check_bounds(manifest, file)
    digest.check_entries(
        manifest, file, RunError, "restore it from a copy, or, if you have changed it yourself, delete its entry sha256"
    )
    manifest.pop(digest.KEY, None)
    missing = [name for name in _REQUIRED if not _has(manifest, name)]
    if missing:
        raise _damaged(file, f"it lacks {', '.join(missing)}")
    for name, (is_right, meant) in (_REQUIRED | _OPTIONAL).items():
        if _has(manifest, name) and not is_right(_get(manifest, name)):
            raise _damaged(file, f"{name} is not {meant}")
    champion, n = manifest["champion"], len(manifest["ends"])
    if champion is not None and champion >= max(n, 1):
        raise _damaged(file, f"the champion is iteration {champion}, of {n}")
    return manifest


def _get(manifest: dict[str, Any], name: str) -> Any:
    outer, _, inner = name.partition(".")
    return manifest[outer][inner] if inner else manifest[outer]


def _has(manifest: dict[str, Any], name: str) -> bool:
    outer, _, inner = name.partition(".")
    if not inner:
        return outer in manifest
    holder = manifest.get(outer)
    return isinstance(holder, dict) and inner in holder


def _check_bounds(item: Any, file: Path, depth: int = 0) -> None:
    """Refuse nesting and whole numbers that no run has."""
    if depth > _DEPTH:
        raise _damaged(file, f"its entries are nested more than {_DEPTH} deep")
    if isinstance(item, int) and abs(item) >= _BIGGEST:
        raise _damaged(file, "it has a whole number of more than 64 bits")
    if isinstance(item, dict | list):
        for inner in item.values() if isinstance(item, dict) else item:
            _check_bounds(inner, file, depth + 1)


def _damaged(file: Path, what: str) -> RunError:
    return RunError(f"{file}: damaged, {what}; restore it or train the run again")
