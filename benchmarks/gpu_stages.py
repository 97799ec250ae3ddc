"""What ``gpu.py`` measures: one function for each stage, which yields rows as it finds them."""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gpt import GPT, random_text
from penalty_speed import N_ENDS, step_times, wait
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import pnanalysis as pn
from pnanalysis.curvature.operators import HessianOperator
from pnanalysis.inputs.models import build_model
from pnanalysis.inputs.splits import Split
from pnanalysis.spectra.lanczos import Lanczos
from pnanalysis.spectra.linear_operator import DiagonalOperator
from pnanalysis.spectra.random_vectors import random_unit_vectors

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]


@dataclass
class Setup:
    """Where and how long to measure."""

    device: torch.device
    small: bool
    deadline: float = 0.0
    longest: float = 90.0
    networks: list[str] = field(default_factory=list)  # what they are called before the comma; all if it is empty

    @property
    def left(self) -> float:
        """Seconds that the stage still has."""
        return self.deadline - time.perf_counter()

    @contextmanager
    def share(self, part: float) -> Iterator[None]:
        """Give the body a part of what the stage still has."""
        whole = self.deadline
        self.deadline = time.perf_counter() + part * max(self.left, 0.0)
        try:
            yield
        finally:
            self.deadline = whole

    @contextmanager
    def limit(self) -> Iterator[None]:
        """Let the body take what is left, and at most ``longest`` seconds.

        What a library computes is not interrupted before it returns.

        Raises
        ------
        TimeoutError
        """

        seconds = max(min(self.longest, self.left), 0.01)

        def end(*_: object) -> None:
            raise TimeoutError(f"more than {seconds:.3g} s")

        before = signal.signal(signal.SIGALRM, end)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def wait(self) -> None:
        """Wait for what the device is computing."""
        wait(self.device)

    def seconds(self, call: Callable[[], object], repeats: int = 5) -> float:
        """Median time of a call, after one to warm up."""
        call()
        times = []
        for _ in range(repeats):
            self.wait()
            start = time.perf_counter()
            call()
            self.wait()
            times.append(time.perf_counter() - start)
            if self.left < 0:
                break
        return statistics.median(times)

    def peak(self, call: Callable[[], object]) -> int:
        """Bytes that a call takes beyond what is there; 0 where the device does not count them."""
        if self.device.type != "cuda":
            call()
            return 0
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        return torch.cuda.max_memory_allocated(self.device) - before


def images(n: int, size: int, setup: Setup, n_classes: int = 10) -> tuple[Tensor, Tensor]:
    """Random images and targets."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(n, 3, size, size, generator=generator)
    return inputs.to(setup.device), torch.randint(n_classes, (n,), generator=generator).to(setup.device)


# -- stages -------------------------------------------------------------------------------------------------------


def tests_command() -> list[str]:
    """Only files with such tests are read: others need packages that may be missing here, and time."""
    files = [file for file in sorted((ROOT / "tests").rglob("test_*.py")) if "pytest.mark.cuda" in file.read_text()]
    pytest = [sys.executable, "-m", "pytest", "-o", "addopts=", "-v", "--tb=short", "-p", "no:cacheprovider"]
    return [*pytest, "-m", "cuda", *(str(file.relative_to(ROOT)) for file in files)]


_OUTCOME = re.compile(r"(?P<test>tests/\S+?::.*?) (?P<outcome>PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)\b")
_REASON = re.compile(r"(?:FAILED|ERROR) (?P<test>tests/\S+?::.*?) - (?P<reason>.*)")


def tests(setup: Setup) -> Iterator[Row]:
    """The outcome of every test marked ``cuda``, as they end."""
    wide = os.environ | {"COLUMNS": "300", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        tests_command(), cwd=ROOT, env=wide, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    late = threading.Event()
    timer = threading.Timer(max(setup.left, 1.0), lambda: (late.set(), process.kill()))
    timer.start()
    said: list[str] = []
    ended = 0
    try:
        for line in process.stdout or ():
            said.append(line)
            if found := _OUTCOME.match(line):
                ended += 1
                yield {"what": found["test"], "outcome": found["outcome"].lower()}
            elif found := _REASON.match(line):
                yield {"what": found["test"], "outcome": "failed", "reason": found["reason"].strip()[:200]}
        process.wait()
    finally:
        timer.cancel()
        process.kill()
        process.wait()
    if late.is_set():
        yield {"what": "the other tests", "outcome": "not done in their share of the time"}
    elif not ended or process.returncode not in (0, 1):
        yield {"what": "pytest", "outcome": f"ended with {process.returncode}", "reason": "".join(said)[-300:].strip()}


Network = tuple[nn.Module, tuple[Tensor, Tensor]]


def networks(setup: Setup) -> dict[str, Callable[[], Network]]:
    """Networks in eval mode with a batch of data each, by name; made when they are needed."""

    def of_images(name: str, n: int) -> Callable[[], Network]:
        return lambda: (build_model(name).eval(), images(n, 32, setup))

    def resnet50() -> Network:
        from torchvision import models

        return models.resnet50().eval(), images(64, 224, setup, 1000)

    def text(name: str, n: int) -> Callable[[], Network]:
        def make() -> Network:
            model = GPT(name).eval()
            model.plain = True  # the peers' documentation asks for attention that can be differentiated twice
            return model, random_text(model, n, setup.device)

        return make

    if setup.small:
        return {"LeNet-5, batch 64": of_images("lenet5", 64), "tiny GPT, 4 x 32 tokens": text("tiny", 4)}
    return {
        "LeNet-5, batch 512": of_images("lenet5", 512),
        "ResNet-18, batch 512": of_images("resnet18", 512),
        "nanoGPT, 16 x 256 tokens": text("nanoGPT", 16),
        "GPT-2 124M, 4 x 256 tokens": text("GPT-2 124M", 4),
        "ResNet-50, batch 64": resnet50,
    }


def short(name: str) -> str:
    """What a network is called, without its batch."""
    return name.split(",")[0]


def products(setup: Setup) -> Iterator[Row]:
    """Products beside gradients, and beside the peers', all in float32; each network has its part of the time."""
    chosen = {
        name: network for name, network in networks(setup).items()
        if not setup.networks or short(name) in setup.networks
    }  # fmt: skip
    with _full_float32():
        for i, (name, network) in enumerate(chosen.items()):
            with setup.share(1 / (len(chosen) - i)):
                yield from _products_of(name, network, setup)


def _products_of(name: str, network: Callable[[], Network], setup: Setup) -> Iterator[Row]:
    """Rows of one network: first those of the contenders that are compiled, which are judged."""
    if setup.left < 0:
        return
    try:
        with setup.limit():
            model, batch = network()
            model = model.to(setup.device)
            unit = setup.seconds(lambda: gradient(model, batch))
    except Exception as error:  # the other networks go on
        yield {"what": name, "failed": _reason(error)}
        return
    ordered = sorted(CONTENDERS, key=lambda contender: "compiled" not in contender)  # stable
    n_compiled = sum("compiled" in contender for contender in ordered)
    for i, contender in enumerate(ordered):
        # one that compiles for long leaves the next of them as much
        with setup.share(1 / max(n_compiled - i, 1)):
            if setup.left < 0:
                return
            row: Row = {"what": name, "package": contender, "gradient_s": unit}
            call: Callable[[], object] | None = None
            try:
                with setup.limit():
                    start = time.perf_counter()
                    call = CONTENDERS[contender](model, batch)
                    call()
                    setup.wait()
                    row["first_s"] = time.perf_counter() - start
                    row["seconds"] = setup.seconds(call)
                    row["gradients"] = row["seconds"] / unit
                    row["peak_bytes"] = setup.peak(call)
            except ModuleNotFoundError:
                continue
            except Exception as error:  # a peer that cannot do it is a row too
                row["failed"] = _reason(error)
        yield row
        call = None  # and the graph that it keeps
        release(setup)


def import_compiler() -> None:
    """Import what tracing and ``torch.compile`` would: an import that a limit interrupts fails from then on."""
    for name in (
        "sympy",
        "torch.fx.experimental.symbolic_shapes",
        "torch._dynamo.convert_frame",
        "torch._inductor.compile_fx",
    ):
        importlib.import_module(name)


@contextmanager
def _full_float32() -> Iterator[None]:
    """No TensorFloat-32, torch's default in convolutions, which our products leave out and peers do not."""
    cudnn = torch.backends.cudnn
    before, cudnn.allow_tf32 = cudnn.allow_tf32, False
    try:
        yield
    finally:
        cudnn.allow_tf32 = before


def gradient(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Of the loss of a batch, for all parameters."""
    return torch.autograd.grad(cross_entropy(model(batch[0]), batch[1]), list(model.parameters()))


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"


def _ours(model: nn.Module, batch: tuple[Tensor, Tensor], compiled: bool = False) -> Callable[[], object]:
    op = HessianOperator(model, cross_entropy, [batch], compile=compiled)
    v = torch.randn(op.shape[0], device=op.device)
    with warnings.catch_warnings():  # what is not compiled must not be taken for it
        warnings.filterwarnings("error", message="(products are not compiled|the traced product)")
        op.matvec(v)
    return lambda: op.matvec(v)


def _pyhessian(model: nn.Module, batch: tuple[Tensor, Tensor], loader: bool = False) -> Callable[[], object]:
    from pyhessian import hessian
    from pyhessian.utils import hessian_vector_product

    given = {"dataloader": [batch]} if loader else {"data": batch}
    peer = hessian(deepcopy(model), cross_entropy, cuda=batch[0].is_cuda, **given)
    columns = [torch.randn_like(parameter) for parameter in peer.params]
    if loader:
        return lambda: peer.dataloader_hv_product(columns)
    return lambda: hessian_vector_product(peer.gradsH, peer.params, columns)


def _eigenthings(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Callable[[], object]:
    from hessian_eigenthings.operators import HessianOperator as Peer

    peer = Peer(deepcopy(model), [batch], lambda network, data: cross_entropy(network(data[0]), data[1]))
    v = torch.randn(sum(p.numel() for p in model.parameters()), device=batch[0].device)
    return lambda: peer.matvec(v)


def _curvlinops(model: nn.Module, batch: tuple[Tensor, Tensor], compiled: bool = False) -> Callable[[], object]:
    import curvlinops

    model = deepcopy(model)
    peer = curvlinops.HessianLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), [batch], check_deterministic=False
    )
    if compiled:
        peer._mp = torch.compile(peer._mp)
    v = torch.randn(peer.shape[1], device=batch[0].device)
    return lambda: peer @ v


#: Each makes a call that computes one product.
CONTENDERS: dict[str, Callable[[nn.Module, tuple[Tensor, Tensor]], Callable[[], object]]] = {
    "pnanalysis": _ours,
    "pnanalysis, compiled": lambda model, batch: _ours(model, batch, compiled=True),
    "PyHessian, graph kept": _pyhessian,
    "PyHessian, data loader": lambda model, batch: _pyhessian(model, batch, loader=True),
    "hessian-eigenthings": _eigenthings,
    "curvlinops": _curvlinops,
    "curvlinops, compiled": lambda model, batch: _curvlinops(model, batch, compiled=True),
}


def arithmetic(setup: Setup) -> Iterator[Row]:
    """One spectrum in several precisions."""
    from scipy.stats import wasserstein_distance

    name, n, n_hvp = ("lenet5", 64, 20) if setup.small else ("resnet18", 512, 60)
    model, batch = build_model(name).eval().to(setup.device), images(n, 32, setup)
    reference = None
    for label, options in (
        ("float64", {"dtype": torch.float64}),
        ("float32", {}),
        ("TensorFloat-32", {"amp": "tf32"}),
        ("bfloat16", {"amp": "bf16"}),
    ):
        if setup.left < 0 or (setup.device.type == "cpu" and label == "TensorFloat-32"):
            continue
        start = time.perf_counter()
        op = HessianOperator(model, cross_entropy, [batch], **options)
        ds = pn.spectral_density(op, n_hvp=n_hvp, progress=False, data_error="none")
        row = {"what": f"{name}, {n} images, {n_hvp} products", "arithmetic": label}
        row |= {"seconds": time.perf_counter() - start, "trace": float(ds.trace), "trace_se": float(ds.trace_se)}
        row["lambda_max"] = float(ds.lambda_max)
        row |= {"eigenvalue": ds.eigenvalue.values.tolist(), "density": ds.density.values.tolist()}
        if reference is None:
            reference = ds
        row["w1"] = float(wasserstein_distance(ds.node, reference.node, ds.weight, reference.weight))
        yield row


def bases(setup: Setup) -> Iterator[Row]:
    """One spectrum with each way to keep the basis."""
    n = 200_000 if setup.small else 50_000_000
    op = DiagonalOperator(torch.linspace(0, 1, n, device=setup.device) ** 4)
    modes = ("memory", "half", "none") if setup.device.type != "cpu" else ("memory", "half", "disk", "none")
    for mode in modes:
        if setup.left < 0:
            return
        start, found = time.perf_counter(), []
        peak = setup.peak(
            lambda mode=mode, found=found: found.append(pn.spectral_density(op, n_hvp=60, basis=mode, progress=False))
        )
        ds = found[0]
        error = float(ds.trace) / float(op.eigenvalues.double().sum()) - 1
        yield {
            "what": f"{n:,} parameters, 60 products, basis {mode}", "seconds": time.perf_counter() - start,
            "peak_bytes": peak, "trace_error": error, "trace_se": float(ds.trace_se / ds.trace),
        }  # fmt: skip


def whole(setup: Setup) -> Iterator[Row]:
    """The whole training set, 90 steps of 10 probes, for as long as there is time."""
    n, model = (512, "lenet5") if setup.small else (50_000, "resnet18")
    inputs, targets = images(n, 32, setup)
    op = HessianOperator(
        build_model(model).eval().to(setup.device), cross_entropy,
        list(zip(inputs.split(512), targets.split(512), strict=True)), amp="no" if setup.small else "tf32",
    )  # fmt: skip
    lanczos = Lanczos(op, random_unit_vectors(op, range(10), 0), 90)
    start, done = time.perf_counter(), 0
    while done < 90 and setup.left > 0:
        lanczos.extend(1)
        setup.wait()
        done += 1
    if not done:
        return
    spent = time.perf_counter() - start
    yield {
        "what": f"{model}, {n:,} images, 10 probes in lockstep", "steps": done, "seconds": spent,
        "seconds_for_90": 90 * spent / done, "products_per_s": 10 * done / spent,
    }  # fmt: skip


def training(setup: Setup) -> Iterator[Row]:
    """Epochs, several networks at once, and the penalty."""
    from training_speed import Images, by_fit, by_loader

    from trainers.loop.batched_fit import SingleFit, fit_together
    from trainers.loop.fit import fit

    n = 1024 if setup.small else 10_000
    pixels = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    grey = torch.full((3, 1, 1), 127.5)
    split = Split(pixels, torch.arange(n) % 10, grey, 1 / grey).to(setup.device)
    options = argparse.Namespace(batch_size=256, amp="no", compile=False, images={n: Images(split)})
    for name in ("lenet5",) if setup.small else ("lenet5", "resnet18"):
        for label, side in (("trainers.fit", by_fit), ("DataLoader, two workers", by_loader)):
            if setup.left > 0:
                model = build_model(name).to(setup.device)
                spent = setup.seconds(lambda side=side, model=model: side(model, split, options), 2)
                yield {"what": f"an epoch of {name}, {n:,} images", "package": label, "seconds": spent}
    members = 4 if setup.small else 20
    models = [build_model("lenet5").to(setup.device) for _ in range(members)]
    sides: dict[str, Callable[[], object]] = {
        "as one program": lambda: fit_together([SingleFit(model) for model in models], split, epochs=1),
        "one after the other": lambda: [fit(model, split, epochs=1) for model in models],
    }
    for label, call in sides.items():
        if setup.left > 0:
            yield {"what": f"{members} LeNet-5, an epoch", "package": label, "seconds": setup.seconds(call, 2)}
    for name, n_steps in (("lenet5", 10),) if setup.small else (("lenet5", 100), ("resnet18", 20)):
        if setup.left > 0:
            plain, penalised = step_times(name, n_steps, setup.device)
            row = {"what": f"a step of {name} with {N_ENDS} end points", "seconds_without": plain}
            yield row | {"seconds": penalised, "ratio": penalised / plain}


def syncs(setup: Setup) -> Iterator[Row]:
    """Waits for the device in 64 steps of Lanczos on a diagonal matrix and on a network, checks in between left out."""
    if setup.device.type != "cuda":
        yield {"what": "syncs", "result": "counted on CUDA only"}
        return
    model, batch = build_model("lenet5").eval().to(setup.device), images(256, 32, setup)
    operators = {
        "diagonal matrix": DiagonalOperator(torch.linspace(0, 1, 1_000_000, device=setup.device)),
        "LeNet-5": HessianOperator(model, cross_entropy, [batch]),
    }
    for name, op in operators.items():
        lanczos = Lanczos(op, random_unit_vectors(op, [0], 0), 80).extend(16)  # traces and checks come first
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                for _ in range(64):
                    lanczos._advance()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        # the first use of this mode warns of itself
        waits = [each for each in caught if "synchronizing CUDA operation" in str(each.message)]
        found = [f"{Path(each.filename).name}:{each.lineno}" for each in waits]
        yield {"what": f"Lanczos on {name}, 64 steps", "syncs": len(found), "where": sorted(set(found))}


def memory(setup: Setup) -> Iterator[Row]:
    """By how much the memory in use grows over 100 products."""
    if setup.device.type != "cuda":
        yield {"what": "memory slope", "result": "measured on CUDA only"}
        return
    model, batch = build_model("resnet18").eval().to(setup.device), images(256, 32, setup)
    op = HessianOperator(model, cross_entropy, [batch])
    v = torch.randn(op.shape[0], device=setup.device)
    for _ in range(3):  # what is kept for later products is made
        op.matvec(v)
    before = torch.cuda.memory_allocated(setup.device)
    for _ in range(100):
        op.matvec(v)
    after = torch.cuda.memory_allocated(setup.device)
    yield {"what": "ResNet-18, 100 products", "growth_bytes": after - before}


class Recurrent(nn.Module):
    """An LSTM that classifies sequences ``(n, length, 8)``."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(8, 32, batch_first=True), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x)[0][:, -1])


def recurrent(setup: Setup) -> Iterator[Row]:
    """A product of an LSTM, against float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(32, 12, 8, generator=generator), torch.randint(10, (32,), generator=generator)
    torch.manual_seed(0)
    model = Recurrent()
    here = HessianOperator(model, cross_entropy, [(x, y)], device=setup.device)
    exact = HessianOperator(model, cross_entropy, [(x.double(), y)], dtype=torch.float64, device="cpu")
    v = torch.randn(here.shape[0], generator=generator)
    found, true = here.matvec(v.to(setup.device)).double().cpu(), exact.matvec(v.double())
    yield {"what": "LSTM", "relative_error": float((found - true).norm() / true.norm())}


#: Each stage and its share of the time; tests say first whether the others are worth it.
STAGES: dict[str, tuple[Callable[[Setup], Iterator[Row]], float]] = {
    "tests": (tests, 0.12),
    "syncs": (syncs, 0.03),
    "memory": (memory, 0.03),
    "products": (products, 0.5),
    "training": (training, 0.1),
    "recurrent": (recurrent, 0.02),
    "arithmetic": (arithmetic, 0.08),
    "bases": (bases, 0.06),
    "whole": (whole, 0.06),
}


def release(setup: Setup) -> None:
    """Give memory that is not in use back to the device."""
    gc.collect()
    if setup.device.type == "cuda":
        torch.cuda.empty_cache()
