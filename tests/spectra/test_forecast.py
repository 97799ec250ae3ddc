"""Time and memory of what is to come, said after the first products."""

from __future__ import annotations

import json
import mmap
import os
import re
import subprocess
import sys
from pathlib import Path
from time import sleep
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import pnanalysis as pn
from pnanalysis.checks import human
from pnanalysis.spectra import forecast
from pnanalysis.spectra.forecast import Forecast, Work
from pnanalysis.spectra.linear_operator import DiagonalOperator
from pnanalysis.spectra.memory import Storage
from pnanalysis.spectra.used_memory import PeakMemory, used_bytes

CPU = torch.device("cpu")


class Slow(DiagonalOperator):
    """Ten seconds a product, and a minute for the first, on a clock of its own."""

    now = 0.0
    n_products = 0

    def __init__(self, n: int = 2000) -> None:
        super().__init__(torch.linspace(-1, 1, n))

    def matmat(self, V: torch.Tensor) -> torch.Tensor:
        self.now += 10.0 * V.shape[1] if self.n_products else 60.0
        self.n_products += V.shape[1]
        return super().matmat(V)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Slow:
    operator = Slow()
    monkeypatch.setattr(forecast, "perf_counter", lambda: operator.now)
    return operator


def said(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") <= 1
    return captured.err.strip()


@pytest.mark.parametrize(
    ("mode", "kept", "time"),
    [
        ("memory", "basis", "18 min"),  # 60 + 99 * 10 seconds
        ("half", "basis (half)", "18 min"),
        ("none", "basis (none kept)", "17 min"),  # the first product is with several vectors
    ],
)
def test_products_time_and_memory_are_said(
    mode: str, kept: str, time: str, slow: Slow, capsys: pytest.CaptureFixture[str]
) -> None:
    ds = pn.spectral_density(slow, n_hvp=100, basis=mode, title="a net")
    basis = human(ds.attrs["basis_bytes"])
    assert re.fullmatch(
        rf"a net: 100 products of 2,000 parameters, about {time}; memory .*B: {re.escape(kept)} {basis}, "
        r"products .*B, in use before .*B",
        said(capsys),
    )
    assert ds.attrs["n_hvp_planned"] == 100


def test_nothing_is_said_in_silence(slow: Slow, capsys: pytest.CaptureFixture[str]) -> None:
    quiet = pn.spectral_density(slow, n_hvp=30, progress=False)
    assert said(capsys) == ""
    loud = pn.spectral_density(slow, n_hvp=30)
    assert "30 products" in said(capsys)
    assert quiet.drop_attrs().identical(loud.drop_attrs())
    assert {name: value for name, value in quiet.attrs.items() if name != "created"} == {
        name: value for name, value in loud.attrs.items() if name != "created"
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_lanczos": 5, "n_probes": 4}, "20 products of 2,000 parameters, about 4 min"),
        ({"n_lanczos": 5, "n_probes": 4, "deflate": False}, "20 products of 2,000 parameters, about 4 min"),
        ({"n_lanczos": 1, "n_probes": 1}, "1 product of 2,000 parameters, about 1 min"),
        ({"n_hvp": 60, "until": {"trace": 1e-9}}, "at most 60 products of 2,000 parameters, about 11 min"),
    ],
)
def test_other_plans(options: dict[str, object], words: str, slow: Slow, capsys: pytest.CaptureFixture[str]) -> None:
    pn.spectral_density(slow, **options)
    assert words in said(capsys)


def test_all_columns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    operator = Slow(50)
    monkeypatch.setattr(forecast, "perf_counter", lambda: operator.now)
    pn.spectral_density(operator, n_hvp=900)
    assert "50 products of 50 parameters, about 8 min" in said(capsys)


def test_what_is_left_of_an_interrupted_spectrum(
    slow: Slow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"n_lanczos": 50, "n_probes": 1, "deflate": False, "state": tmp_path, "save_every": 0.0}
    interrupted = SimpleNamespace(left=30)
    product = Slow.matmat

    def stopping(self: Slow, V: torch.Tensor) -> torch.Tensor:
        interrupted.left -= 1
        if interrupted.left < 0:
            raise KeyboardInterrupt
        return product(self, V)

    with monkeypatch.context() as patched:
        patched.setattr(Slow, "matmat", stopping)
        with pytest.raises(KeyboardInterrupt):
            pn.spectral_density(slow, **options, progress=False)
    pn.spectral_density(slow, **options)
    assert "50 products of 2,000 parameters (30 done before), about 3 min" in said(capsys)


def test_where_nobody_tells_the_memory(
    slow: Slow, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (forecast, sys.modules[PeakMemory.__module__]):
        monkeypatch.setattr(module, "used_bytes", lambda device: None)
    pn.spectral_density(slow, n_hvp=30)
    assert "memory: basis " in (line := said(capsys))
    assert line.endswith("what products take is not known here")


def test_eigenpairs_say_it_too(slow: Slow, capsys: pytest.CaptureFixture[str]) -> None:
    pn.eigenpairs(slow, k=2, max_hvp=2000, tolerance=1e-2)
    line = said(capsys)
    assert line.startswith("eigenpairs: some 24 products of 2,000 parameters, about 5 min; memory ")
    pn.eigenpairs(slow, k=2, max_hvp=2000, tolerance=1e-2, progress=False)
    assert said(capsys) == ""


def test_the_parts_of_a_peak(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A preparation of 500 bytes beyond what is there, a product of 900, and later ones of 300, of which 50 stay."""
    rises, level = [500, 900, 300, 300], [1000]

    class Memory:
        def __init__(self, device: torch.device) -> None: ...

        def __enter__(self) -> Memory:
            self.before = level[0]
            return self

        def __exit__(self, *error: object) -> None:
            self.peak = self.before + rises.pop(0)
            level[0] += 40 + 50 * (len(rises) == 2)  # what was prepared or the result, and what stays
            self.after = level[0]

    monkeypatch.setattr(forecast, "PeakMemory", Memory)
    monkeypatch.setattr(forecast, "used_bytes", lambda device: 1000)
    told = Forecast(CPU, "it")
    told.prepared(lambda: None)
    operator = DiagonalOperator(torch.ones(10))
    work = Work(10, 3, Storage(torch.float32, CPU), 800, 160, beside=30)
    watched, advance = told.watch(operator, lambda steps=1, text="": None, work)
    for _ in range(2):
        watched.matmat(torch.ones(10, 1))
        advance(1)
    # beside those vectors: what stays, and a product less the space to work with that is free meanwhile
    assert told.peak == 1000 + 40 + (800 + 160) + 30 + 50 + 300 - (160 - 2 * 40)
    assert "memory 2.25 KiB: basis 960 B, products 340 B, in use before 0.977 KiB" in said(capsys)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_of_the_process_is_seen() -> None:
    def pages(n: int) -> mmap.mmap:  # new ones: what an allocator still holds of earlier tests would be used again
        found = mmap.mmap(-1, n, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        np.frombuffer(found, dtype=np.uint8)[:] = 1
        return found

    with PeakMemory(CPU) as memory:
        large, kept = pages(2**26), pages(2**25)
        sleep(0.1)
        large.close()
    assert memory.peak - memory.before == pytest.approx(96 * 2**20, rel=0.05)
    assert memory.after - memory.before == pytest.approx(32 * 2**20, rel=0.1)
    assert kept[-1] == 1
    assert used_bytes(torch.device("meta")) is None


PEAK = """
import json, sys, threading, time, torch
from torch import nn
import pnanalysis as pn
from pnanalysis.spectra import forecast
from pnanalysis.spectra.linear_operator import DiagonalOperator
from pnanalysis.spectra.used_memory import used_bytes

cpu, peak, found, over = torch.device("cpu"), 0, [], threading.Event()

def watch():
    global peak
    while not over.is_set():
        peak = max(peak, used_bytes(cpu))
        time.sleep(0.001)

class Noted(forecast.Forecast):
    def _line(self):
        found.append((self.before, self.peak))
        return super()._line()

pn.spectral_density(DiagonalOperator(torch.ones(50)), n_hvp=20, progress=False)
import pnanalysis.spectra.density, pnanalysis.analyses.network_eigenpairs
for module in (pnanalysis.spectra.density, pnanalysis.analyses.network_eigenpairs):
    module.Forecast = Noted
torch.manual_seed(0)
width = int(sys.argv[2])
net = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))
data = torch.randn(16, width), torch.randint(10, (16,))
loss = nn.functional.cross_entropy
threading.Thread(target=watch).start()
if sys.argv[1] == "eigenpairs":
    pn.eigenpairs(net, data=data, loss=loss, k=5, max_hvp=60, data_error=sys.argv[3])
else:
    n_products = int(sys.argv[4])
    op = pn.HessianOperator(net, loss, [data], expected_products=n_products)
    pn.spectral_density(op, n_hvp=n_products, basis=sys.argv[1], data_error=sys.argv[3])
over.set()
before, said = found[0]
print(json.dumps({"rise": peak - before, "said": said - before}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("kind", "width", "data_error", "n_products"),
    [
        ("memory", 1000, "none", 20),
        ("half", 1000, "none", 20),
        ("disk", 1000, "examples", 20),
        ("none", 1000, "none", 20),
        ("eigenpairs", 700, "halves", 20),
        ("memory", 1000, "examples", 20),
        ("memory", 1000, "examples", 50),  # products are traced
        ("half", 1000, "examples", 50),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_the_peak_of_networks_is_what_was_said(kind: str, width: int, data_error: str, n_products: int) -> None:
    """Beyond what the process takes in any case, with two million parameters (a half of that for eigenpairs)."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(
        [sys.executable, "-c", PEAK, kind, str(width), data_error, str(n_products)], capture_output=True, text=True,
        check=True, env=environment,
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    assert np.isclose(found["said"], found["rise"], rtol=0.1), found
    assert done.stderr.count("; memory ") == 1
