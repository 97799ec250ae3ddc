"""Memory and disk are planned before the first product."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pnanalysis.errors import CurvatureError, PnError
from pnanalysis.spectra import free_memory
from pnanalysis.spectra.density import spectral_density
from pnanalysis.spectra.free_memory import free_bytes
from pnanalysis.spectra.linear_operator import DiagonalOperator

P = 20_000
UNIT = P * 8


class Untouched(DiagonalOperator):
    """An operator that must not be asked for a product."""

    def matmat(self, V: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a product was computed before the plan was checked")


@pytest.fixture
def operator() -> DiagonalOperator:
    return Untouched(torch.arange(float(P), dtype=torch.float64))


@pytest.mark.parametrize(
    ("budget", "vectors"),
    [
        ({"n_hvp": 200}, 60),
        ({"n_hvp": 200, "deflate": False}, 30),
        ({"n_lanczos": 40, "n_probes": 5}, 80),  # the first phase fits, the second does not
        ({"n_lanczos": 40, "n_probes": 5, "deflate": False}, 40),
    ],
)
def test_a_phase_that_does_not_fit_is_refused_at_once(operator, budget: dict[str, int], vectors: int) -> None:
    with pytest.raises(CurvatureError, match=r"the bound is .* \(--n-lanczos, --n-hvp\), raise .* \(--memory\)"):
        spectral_density(operator, **budget, max_memory_bytes=vectors * UNIT, basis="memory", progress=False)


def test_an_exact_spectrum_is_bounded_too() -> None:
    with pytest.raises(CurvatureError, match="all 1,000 columns of the matrix take 30.5 MiB"):
        spectral_density(Untouched(torch.ones(1000)), n_hvp=1000, max_memory_bytes=10**6, progress=False)


def test_what_is_free_bounds_a_generous_limit(operator, monkeypatch) -> None:
    monkeypatch.setattr("pnanalysis.spectra.memory.free_bytes", lambda device: 30 * UNIT)
    with pytest.raises(CurvatureError, match="the bound is 3.97 MiB"):  # 26 vectors: four are the operator's own
        spectral_density(operator, n_hvp=200, max_memory_bytes=10**12, basis="memory", progress=False)


def test_a_disk_too_small_for_unfinished_work_is_refused(operator, tmp_path: Path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100 * UNIT))
    with pytest.raises(PnError, match=r"unfinished work may take .* has 15.3 MiB free; .*--n-hvp"):
        spectral_density(operator, n_hvp=200, basis="memory", state=tmp_path / "state", progress=False)


def test_unfinished_work_goes_on_as_it_began_whatever_is_free_now(tmp_path: Path) -> None:
    values = torch.linspace(0, 1, 3000)

    class Stopping(DiagonalOperator):
        left = 50

        def matmat(self, V: torch.Tensor) -> torch.Tensor:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return super().matmat(V)

    options = {"n_hvp": 100, "progress": False, "state": tmp_path / "state"}
    with pytest.raises(KeyboardInterrupt):
        spectral_density(Stopping(values), **options, max_memory_bytes=40 * 12_000)
    resumed = spectral_density(DiagonalOperator(values), **options, max_memory_bytes=200 * 12_000)
    assert resumed.attrs["basis"] == "half"


def test_the_least_of_machine_cgroup_and_limit_counts(tmp_path: Path, monkeypatch) -> None:
    cpu = torch.device("cpu")
    process, groups = tmp_path / "process", tmp_path / "groups"
    for folder, limit in ((groups / "job", "3000000"), (groups / "job/step", "max")):
        folder.mkdir(parents=True)
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text("1000000")
    process.mkdir()
    (process / "cgroup").write_text("0::/job/step\n")
    (process / "statm").write_text("10 5 1")
    monkeypatch.setattr(free_memory, "_PROCESS", process)
    monkeypatch.setattr(free_memory, "_CGROUPS", groups)
    assert free_bytes(cpu) == 2_000_000
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1_000_000, 1_000_000))
    assert free_bytes(cpu) == 1_000_000 - 10 * resource.getpagesize()
    (process / "cgroup").write_text("5:cpu,memory:/\n3:cpu:/job\n")
    (groups / "memory").mkdir()
    (groups / "memory/memory.limit_in_bytes").write_text("900000")
    (groups / "memory/memory.usage_in_bytes").write_text("1000000")
    assert free_bytes(cpu) == 0
    (groups / "memory/memory.stat").write_text("cache 500000\ntotal_inactive_file 300000\n")
    assert free_bytes(cpu) == 200_000  # caches of files make room where it is needed


def test_caches_of_files_in_a_cgroup_are_free(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "cgroup").write_text("0::/\n")
    for name, text in {
        "memory.max": "8000000",
        "memory.current": "7900000",
        "memory.stat": "anon 900000\nfile 7000000\nactive_file 100000\ninactive_file 6900000\n",
    }.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(free_memory, "_PROCESS", tmp_path)
    monkeypatch.setattr(free_memory, "_CGROUPS", tmp_path)
    assert free_bytes(torch.device("cpu")) == 7_000_000


VM_STAT = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                                3000.
Pages active:                            200000.
Pages inactive:                            2000.
Pages speculative:                          500.
Pages throttled:                              0.
Pages wired down:                        100000.
Pages purgeable:                            100.
"Translation faults":                 123456789.
"""


def test_memory_of_systems_without_proc(tmp_path: Path, monkeypatch) -> None:
    cpu = torch.device("cpu")
    for name in ("_MACHINE", "_PROCESS", "_CGROUPS"):
        monkeypatch.setattr(free_memory, name, tmp_path / "none")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    printed = subprocess.CompletedProcess(["vm_stat"], 0, stdout=VM_STAT)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: printed)
    assert free_bytes(cpu) == 16384 * 5600
    monkeypatch.setattr(subprocess, "run", _no_program)
    physical = {"SC_PHYS_PAGES": 4000, "SC_PAGE_SIZE": 4096}  # macOS has no SC_AVPHYS_PAGES
    monkeypatch.setattr(os, "sysconf_names", physical)
    monkeypatch.setattr(os, "sysconf", physical.__getitem__)
    assert free_bytes(cpu) == 2000 * 4096
    windows = SimpleNamespace(kernel32=SimpleNamespace(GlobalMemoryStatusEx=_status_of_windows))
    monkeypatch.setattr(ctypes, "windll", windows, raising=False)
    assert free_bytes(cpu) == 7_000_000
    monkeypatch.delattr(ctypes, "windll")
    monkeypatch.setattr(os, "sysconf_names", {})
    monkeypatch.delattr(os, "sysconf")
    assert free_bytes(cpu) == free_memory._UNKNOWN


def _no_program(*_: object, **__: object) -> None:
    raise FileNotFoundError("vm_stat")


def _status_of_windows(reference: Any) -> int:
    status = reference._obj
    assert status.length == ctypes.sizeof(status) == 64
    status.free = 7_000_000
    return 1


def test_a_basis_on_the_disk_is_there_twice_where_unfinished_work_is_saved(
    operator, tmp_path: Path, monkeypatch
) -> None:
    asked: dict[str, int] = {}
    for basis in ("memory", "disk"):

        def note(path: Path, n_bytes: int, *_: str, basis: str = basis) -> None:
            asked.setdefault(basis, n_bytes)  # then comes the room for the basis alone

        monkeypatch.setattr("pnanalysis.spectra.plan.check_room", note)
        with pytest.raises(AssertionError, match="a product was computed"):
            spectral_density(operator, n_hvp=50, basis=basis, state=tmp_path / basis, progress=False)
    assert asked["disk"] == 2 * asked["memory"] > 0
