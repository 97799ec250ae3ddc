"""How much memory this process may still take: the least of what is free, of its cgroup and of its own limit."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_CGROUPS = Path("/sys/fs/cgroup")
_PROCESS = Path("/proc/self")
_MACHINE = Path("/proc/meminfo")
#: Files of a cgroup with its limit and its use, and what its use has of caches of files that would be dropped if memory
#: were short; of version 2 and version 1.
_CGROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
#: What macOS counts as free, or gives up at once: names of pages in ``vm_stat``.
_PAGES_OF_MACOS = ("free", "inactive", "speculative", "purgeable")
#: Where no system says anything.
_UNKNOWN = 2**32


def free_bytes(device: torch.device) -> int:
    """Memory that is free now on a CUDA device, or for this process on the host for any other device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return max(min([_available(), *_left_in_cgroups(), *_left_of_limit()]), 0)


def _available() -> int:
    """Memory of the machine that is free, or would be if caches of files were dropped."""
    for found in (_of_linux, _of_macos, _of_windows, _of_posix):
        with suppress(OSError, ValueError, LookupError, AttributeError, subprocess.SubprocessError):
            return found()
    return _UNKNOWN


def _of_linux() -> int:
    return _entry(_MACHINE, "MemAvailable:", 1024)


def _of_macos() -> int:
    printed = subprocess.run(["vm_stat"], capture_output=True, text=True, timeout=10, check=True).stdout
    size = int(re.findall(r"page size of (\d+) bytes", printed)[0])
    pages = dict(re.findall(r"^Pages (\w+): +(\d+)\.", printed, re.MULTILINE))
    return size * sum(int(pages.get(name, 0)) for name in _PAGES_OF_MACOS)


class _WindowsMemory(ctypes.Structure):
    """``MEMORYSTATUSEX`` of the Windows API."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        ("physical", ctypes.c_uint64),
        ("free", ctypes.c_uint64),
        ("others", ctypes.c_uint64 * 5),
    )


def _of_windows() -> int:
    status = _WindowsMemory()
    status.length = ctypes.sizeof(status)
    api = getattr(ctypes, "windll").kernel32  # noqa: B009 (only there on Windows)
    if not api.GlobalMemoryStatusEx(ctypes.byref(status)):
        raise OSError("the memory of this machine is not known")
    return int(status.free)


def _of_posix() -> int:
    """What is free, or else half of what there is: not every system has a name for the former."""
    names = os.sysconf_names
    pages = os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in names else os.sysconf("SC_PHYS_PAGES") // 2
    return pages * os.sysconf("SC_PAGE_SIZE")


def _entry(file: Path, name: str, unit: int = 1) -> int:
    """The number beside a name in a file of lines of names and numbers."""
    lines = (line.split() for line in file.read_text().splitlines())
    return unit * int(next((line[1] for line in lines if line[:1] == [name]), ""))


def _left_in_cgroups() -> Iterator[int]:
    """What the process's cgroup and those around it leave."""
    try:
        lines = (_PROCESS / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = _CGROUPS / "memory" if controllers else _CGROUPS
        group = root / name.lstrip("/")
        # Within a container the name is that of the host, and its limit is found at the root.
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(root))):
            for limit, used, cached in _CGROUP_FILES:
                with suppress(OSError, ValueError):  # no such file, or "max"
                    left = int((folder / limit).read_text()) - int((folder / used).read_text())
                    with suppress(OSError, ValueError):
                        left += _entry(folder / "memory.stat", cached)
                    yield left


def _left_of_limit() -> Iterator[int]:
    """What ``ulimit -v`` leaves."""
    if resource is None:
        return
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    with suppress(OSError, ValueError):
        if limit != resource.RLIM_INFINITY:
            yield limit - int((_PROCESS / "statm").read_text().split()[0]) * resource.getpagesize()
