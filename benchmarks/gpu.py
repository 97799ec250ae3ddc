"""All that is to be measured on a GPU, in one command that fits into a few minutes.

    python benchmarks/gpu.py --minutes 8 [--device cuda] [--only products syncs] [--output benchmarks/results/gpu.md]

tests
    The tests that need a GPU.
products
    A Hessian product over the gradient of the same loss, for networks from LeNet-5 to GPT-2, eager and compiled, beside
    PyHessian, hessian-eigenthings and curvlinops (also compiled); those of them that are installed. PyHessian keeps the
    graph of one batch, so that a product is a backward pass alone; with a data loader it computes all of it.
arithmetic
    One spectrum in float32, TensorFloat-32 and bfloat16: times, and distances from that in float64, and a figure of
    all of them.
bases
    One spectrum with each way to keep the basis: times, peak memory and what was said beforehand.
whole
    Ghorbani et al.'s setting, 50,000 images and 90 steps of 10 probes, for as long as its share of the time lasts.
training
    An epoch by the trainer and by a ``DataLoader`` loop; twenty LeNet-5 as one program and one after the other; a step
    with twenty earlier end points and without.
syncs
    How often Lanczos waits for the device, per step.
memory
    How much memory 100 products leave behind.
recurrent
    A product of an LSTM, whose cuDNN kernels differentiate once only.

Every stage has a share of the time and stops between two rows when it is used up; a product may take a minute. Rows are
written as they come, as JSON beside the table; what fails is a row, and the others go on. ``--device cpu --small``
tries the script. For a machine that reaches no package index, the peers are fetched elsewhere, on the same platform::

    pip download --dest wheels pyhessian hessian-eigenthings==1.0.0a5 curvlinops-for-pytorch
    pip install --no-index --find-links wheels pyhessian hessian-eigenthings curvlinops-for-pytorch
"""

from __future__ import annotations

import argparse
import json
import platform
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from gpt import GPT, random_text
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import pnanalysis as pn
from pnanalysis.curvature.operators import HessianOperator
from pnanalysis.inputs.models import build_model
from pnanalysis.inputs.splits import Split
from pnanalysis.io.hardware import cpu_name
from pnanalysis.spectra.lanczos import Lanczos
from pnanalysis.spectra.linear_operator import DiagonalOperator
from pnanalysis.spectra.random_vectors import random_unit_vectors

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu.md"
Row = dict[str, Any]
#: Packages whose versions are noted.
_PACKAGES = (
    "numpy", "torchvision", "transformers", "pyhessian", "hessian-eigenthings", "curvlinops-for-pytorch",
)  # fmt: skip
#: Columns of rows that are for a figure.
_DRAWN = ("eigenvalue", "density")


@dataclass
class Setup:
    """Where and how long to measure."""

    device: torch.device
    small: bool
    deadline: float = 0.0
    longest: float = 60.0

    @property
    def left(self) -> float:
        """Seconds that the stage still has."""
        return self.deadline - time.perf_counter()

    @contextmanager
    def limit(self) -> Iterator[None]:
        """Let the body take ``longest`` seconds; what a library computes is not interrupted before it returns.

        Raises
        ------
        TimeoutError
        """

        def end(*_: object) -> None:
            raise TimeoutError(f"more than {self.longest:g} s")

        before = signal.signal(signal.SIGALRM, end)
        signal.setitimer(signal.ITIMER_REAL, self.longest)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def wait(self) -> None:
        """Wait for what the device is computing."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

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
    pytest = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-p", "no:cacheprovider", "--no-header"]
    return [*pytest, "-m", "cuda", *(str(file.relative_to(ROOT)) for file in files)]


def run_tests(setup: Setup) -> Iterator[Row]:
    """The tests marked ``cuda``."""
    try:
        done = subprocess.run(tests_command(), cwd=ROOT, capture_output=True, text=True, timeout=max(setup.left, 1))
        lines = done.stdout.strip().splitlines()
        failed = [line for line in lines if line.startswith("FAILED")]
        summary = next((line for line in reversed(lines) if " in " in line), done.stderr[-200:])
        yield {"what": "tests", "result": summary.strip("= "), "failed": failed}
    except subprocess.TimeoutExpired:
        yield {"what": "tests", "result": "not done in their share of the time"}


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
        "ResNet-50, batch 64": resnet50,
        "nanoGPT, 16 x 256 tokens": text("nanoGPT", 16),
        "GPT-2 124M, 4 x 256 tokens": text("GPT-2 124M", 4),
    }


def products(setup: Setup) -> Iterator[Row]:
    """Products beside gradients, and beside the peers'."""
    for name, network in networks(setup).items():
        if setup.left < 0:
            return
        try:
            with setup.limit():
                model, batch = network()
                model = model.to(setup.device)
                unit = setup.seconds(lambda model=model, batch=batch: gradient(model, batch))
        except Exception as error:  # the other networks go on
            yield {"what": name, "failed": _reason(error)}
            continue
        for contender, make in CONTENDERS.items():
            if setup.left < 0:
                return
            row: Row = {"what": name, "package": contender, "gradient_s": unit}
            try:
                with setup.limit():
                    start = time.perf_counter()
                    call = make(model, batch)
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
            _release(setup)


def gradient(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Of the loss of a batch, for all parameters."""
    return torch.autograd.grad(cross_entropy(model(batch[0]), batch[1]), list(model.parameters()))


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"


def _ours(model: nn.Module, batch: tuple[Tensor, Tensor], compiled: bool = False) -> Callable[[], object]:
    op = HessianOperator(model, cross_entropy, [batch], compile=compiled)
    v = torch.randn(op.shape[0], device=op.device)
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
    spent = time.perf_counter() - start
    yield {
        "what": f"{model}, {n:,} images, 10 probes in lockstep", "steps": done, "seconds": spent,
        "seconds_for_90": 90 * spent / max(done, 1), "products_per_s": 10 * done / spent,
    }  # fmt: skip


def training(setup: Setup) -> Iterator[Row]:
    """Epochs, several networks at once, and the penalty."""
    from training_speed import Images, by_fit, by_loader

    from trainers import PersistentPenalty
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
    model = build_model("lenet5").to(setup.device)
    penalty = PersistentPenalty(model, lam=1e-3)
    for _ in range(20):
        end = deepcopy(model)
        for parameter in end.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        penalty.add(end)
    times = {}
    for label, added in (("without", None), ("with 20 end points", penalty)):
        times[label] = setup.seconds(lambda added=added: fit(model, split, epochs=1, penalty=added), 3)
        row = {"what": "an epoch of LeNet-5, penalty", "package": label, "seconds": times[label]}
        yield row | {"ratio": times[label] / times["without"]}


def syncs(setup: Setup) -> Iterator[Row]:
    """Waits for the device in 64 steps of Lanczos on a diagonal matrix and on a network."""
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
                lanczos.extend(64)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        found = [str(each.filename).rsplit("/", 1)[-1] + f":{each.lineno}" for each in caught]
        yield {"what": f"Lanczos on {name}, 64 steps", "syncs": len(found), "where": sorted(set(found))}


def memory(setup: Setup) -> Iterator[Row]:
    """What 100 products leave behind."""
    if setup.device.type != "cuda":
        yield {"what": "memory slope", "result": "measured on CUDA only"}
        return
    model, batch = build_model("resnet18").eval().to(setup.device), images(256, 32, setup)
    op = HessianOperator(model, cross_entropy, [batch])
    v = torch.randn(op.shape[0], device=setup.device)
    op.matvec(v)
    before = torch.cuda.memory_allocated(setup.device)
    for _ in range(100):
        op.matvec(v)
    after = torch.cuda.memory_allocated(setup.device)
    yield {"what": "ResNet-18, 100 products", "bytes_left_behind": after - before}


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


#: Each stage and its share of the time.
STAGES: dict[str, tuple[Callable[[Setup], Iterator[Row]], float]] = {
    "recurrent": (recurrent, 0.02),
    "syncs": (syncs, 0.04),
    "memory": (memory, 0.04),
    "products": (products, 0.4),
    "arithmetic": (arithmetic, 0.12),
    "bases": (bases, 0.08),
    "training": (training, 0.12),
    "whole": (whole, 0.1),
    "tests": (run_tests, 0.08),
}


def _release(setup: Setup) -> None:
    if setup.device.type == "cuda":
        torch.cuda.empty_cache()


def environment(setup: Setup) -> Row:
    """What the numbers depend on."""
    on_gpu = setup.device.type == "cuda"
    name = torch.cuda.get_device_name(setup.device) if on_gpu else cpu_name()
    found: Row = {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda, "driver": _driver()}
    installed = {each.name.lower() for each in metadata.distributions() if each.name}
    packages = {name: metadata.version(name) for name in _PACKAGES if name in installed}
    return found | {"python": platform.python_version(), "packages": packages}


def _driver() -> str | None:
    """Version of the driver of the GPU, where there is one."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def write(found: dict[str, Any], output: Path) -> None:
    """JSON, and tables made of it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    env = found["environment"]
    lines = [
        "# On a GPU",
        "",
        f"`python benchmarks/gpu.py`; {env['device']}, torch {env['torch']}, CUDA {env['cuda']}, "
        f"driver {env['driver']}; {', '.join(f'{name} {version}' for name, version in env['packages'].items())}.",
    ]
    for stage, rows in found["stages"].items():
        columns = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in _DRAWN]
        lines += ["", f"## {stage}", "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        lines += ["| " + " | ".join(_shown(key, row.get(key)) for key in columns) + " |" for row in rows]
    output.write_text("\n".join(lines) + "\n")


def _shown(key: str, value: Any) -> str:
    if value is None:
        return ""
    if key.endswith("bytes") and isinstance(value, int):
        return f"{value / 2**20:,.1f} MiB"
    if isinstance(value, float):
        return f"{value:.3g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def draw(found: dict[str, Any], output: Path) -> None:
    """Products of all packages in units of the gradient, and spectra in all precisions over each other."""
    from pnanalysis.plots import save_figure
    from pnanalysis.plots.style import COLOURS, new_figure, style

    rows = [row for row in found["stages"].get("products", []) if "gradients" in row]
    spectra = [row for row in found["stages"].get("arithmetic", []) if "density" in row]
    with style():
        if rows:
            figure = new_figure(7.0, 3.2)
            _bars(figure.add_subplot(), rows)
            save_figure(figure, output.with_suffix(".png"))
        if spectra:
            figure = new_figure(7.0, 3.2)
            axes = figure.add_subplot()
            for row, colour, dashes in zip(spectra, COLOURS, ("-", "--", "-.", ":"), strict=False):
                axes.plot(row["eigenvalue"], row["density"], dashes, color=colour, label=row["arithmetic"])
            axes.set_yscale("log")
            axes.set_ylim(bottom=1e-8 * max(max(row["density"]) for row in spectra))
            axes.set_xlabel("eigenvalue")
            axes.set_ylabel("density")
            axes.legend()
            save_figure(figure, output.with_name(f"{output.stem}_spectra.png"))


def _bars(axes: Any, rows: list[Row]) -> None:
    from pnanalysis.plots.style import COLOURS

    names, packages = (list(dict.fromkeys(row[key] for row in rows)) for key in ("what", "package"))
    width = 0.8 / len(packages)
    for i, package in enumerate(packages):
        own = {row["what"]: row["gradients"] for row in rows if row["package"] == package}
        places = [at + (i - len(packages) / 2 + 0.5) * width for at in range(len(names))]
        axes.bar(places, [own.get(name, 0.0) for name in names], width, color=COLOURS[i % len(COLOURS)], label=package)
    axes.set_xticks(range(len(names)), [name.replace(", ", "\n") for name in names])
    axes.set_ylabel("Hessian product / gradient")
    axes.legend()


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write what is there after every row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument(
        "--longest", type=float, default=60.0, metavar="S", help="seconds that a product may take in all"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="small networks, to try the script")
    parser.add_argument("--only", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("there is no CUDA device; --device cpu --small tries the script")
        return
    warnings.simplefilter("ignore")
    setup = Setup(torch.device(options.device), options.small, longest=options.longest)
    found: dict[str, Any] = {"environment": environment(setup), "stages": {}}
    end = time.perf_counter() + 60 * options.minutes
    for i, stage in enumerate(options.only):
        measure, share = STAGES[stage]
        # what earlier stages have left of their shares is for the later ones
        following = sum(STAGES[name][1] for name in options.only[i:])
        start = time.perf_counter()
        setup.deadline = start + max(end - start, 0.0) * share / following
        rows = found["stages"].setdefault(stage, [])
        try:
            for row in measure(setup):
                rows.append(row)
                print(stage, json.dumps(row), flush=True)
                write(found, options.output)
        except Exception as error:  # the other stages go on
            rows.append({"what": stage, "failed": f"{type(error).__name__}: {error}"[:300]})
            print(stage, rows[-1], flush=True)
        write(found, options.output)
        _release(setup)
    draw(found, options.output)


if __name__ == "__main__":
    main()
