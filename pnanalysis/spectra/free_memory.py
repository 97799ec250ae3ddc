"""How much memory this process may still take: the least of what is free, of its cgroup and of its own limit."""

from __future__ import annotations

import os
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
#: Files of a cgroup with its limit and its use, of version 2 and version 1.
_CGROUP_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))


def free_bytes(device: torch.device) -> int:
    """Memory that is free now on a CUDA device, or for this process on the host for any other device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return max(min([_available(), *_left_in_cgroups(), *_left_of_limit()]), 0)


def _available() -> int:
    """Memory of the machine that is free, or would be if caches of files were dropped."""
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


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
            for limit, used in _CGROUP_FILES:
                with suppress(OSError, ValueError):  # no such file, or "max"
                    yield int((folder / limit).read_text()) - int((folder / used).read_text())


def _left_of_limit() -> Iterator[int]:
    """What ``ulimit -v`` leaves."""
    if resource is None:
        return
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    with suppress(OSError, ValueError):
        if limit != resource.RLIM_INFINITY:
            yield limit - int((_PROCESS / "statm").read_text().split()[0]) * resource.getpagesize()
