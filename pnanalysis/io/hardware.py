"""What a run was made on, by name."""

from __future__ import annotations

import platform
from contextlib import suppress
from pathlib import Path

_CPU_INFO = Path("/proc/cpuinfo")


def cpu_name() -> str:
    """The processor's model, such as ``AMD EPYC 7B13``; its architecture where the system tells no more.

    Python's ``platform.processor()`` gives the architecture alone on Linux.
    """
    with suppress(OSError):
        for line in _CPU_INFO.read_text(errors="replace").splitlines():
            key, _, name = line.partition(":")
            if key.strip() == "model name" and name.strip():
                return " ".join(name.split())
    return platform.processor() or platform.machine()
