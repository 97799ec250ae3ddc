"""Fuzzing guided by coverage: inputs that reach new lines of a reader are kept and changed further.

    FUZZ=2000 python -m tests.fuzz.guided

Needs ``atheris``. Each reader runs in a process of its own, on ten times as many inputs as each kind of ``make fuzz``.
An error other than ours ends it and is printed with its input.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

READERS = ("manifest", "safetensors", "torch.save", "netcdf")
#: Bytes of the largest input.
_LARGEST = 2**16


def main() -> None:
    """Fuzz every reader, and add what happened to the table of ``make fuzz``."""
    from tests.fuzz.conftest import FILE

    n = 10 * int(os.environ.get("FUZZ", "2000"))
    found = json.loads(FILE.read_text()) if FILE.is_file() else {}
    for reader in READERS:
        with tempfile.TemporaryDirectory() as scratch:
            child = multiprocessing.get_context("spawn").Process(target=_fuzz, args=(reader, n, scratch))
            child.start()
            child.join()
            if child.exitcode:
                sys.exit(f"{reader}: see the input above")
            row = json.loads((Path(scratch) / "counts.json").read_text())
        print(f"{reader}, guided: {row}", flush=True)
        found[f"{reader}, guided"] = row
        FILE.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")


def _fuzz(reader: str, n: int, scratch: str) -> None:
    import atheris

    with atheris.instrument_imports(include=["pnanalysis.io", "pnanalysis.schema", "pnanalysis.kinds"]):
        from pnanalysis.errors import PnError
        from tests.fuzz import test_fuzz as inputs

    read, first = _reader(reader, inputs, Path(scratch))
    (corpus := Path(scratch) / "corpus").mkdir()
    (corpus / "sound").write_bytes(first)
    read(first)  # from where it starts, a reader has to get to its end
    counts: Counter[str] = Counter()

    def one(raw: bytes) -> None:
        try:
            read(raw)
            counts["read"] += 1
        except PnError:
            counts["refused"] += 1
        if counts.total() >= n:
            (Path(scratch) / "counts.json").write_text(json.dumps(dict(sorted(counts.items()))))
            os._exit(0)  # the fuzzer does not return

    atheris.Setup(
        ["guided", str(corpus), f"-max_len={_LARGEST}", "-timeout=20", "-rss_limit_mb=6000", "-verbosity=0"], one
    )
    atheris.Fuzz()


def _reader(reader: str, inputs: Any, scratch: Path) -> tuple[Callable[[bytes], object], bytes]:
    """What reads bytes, and bytes that it can read."""
    import torch

    from pnanalysis.io import netcdf
    from pnanalysis.io.weights import read_weights

    def of_file(name: str, read: Callable[[Path], object]) -> Callable[[bytes], object]:
        file = scratch / name

        def write_and_read(raw: bytes) -> object:
            file.write_bytes(raw)
            return read(file)

        return write_and_read

    if reader == "manifest":
        return of_file("run/run.json", inputs.opened), inputs.undigested_manifest(scratch / "run").read_bytes()
    if reader == "safetensors":
        return of_file("fuzz.safetensors", read_weights), inputs.WEIGHTS
    buffer = io.BytesIO()
    if reader == "torch.save":
        torch.save({"weight": torch.ones(3, 2), "bias": torch.zeros(3)}, buffer)
        return of_file("fuzz.pt", read_weights), buffer.getvalue()
    inputs.dataset().to_netcdf(buffer, engine="h5netcdf")
    return of_file("fuzz.nc", netcdf.load), buffer.getvalue()


if __name__ == "__main__":
    main()
