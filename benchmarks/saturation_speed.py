"""Time of a training step under SaturationMonitor at its default sampling, relative to the same step alone.

    python benchmarks/saturation_speed.py [--threads 1] [--repeats 7]

The trainings take single steps in turn in one process, 50 steps per repeat (with one record). CPU time is measured,
which other processes disturb little; medians over the repeats. If delve is installed, its SaturationTracker at its own
defaults is included; it computes another kind of saturation, from the covariance of layer outputs.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import pnanalysis as pn
from pnanalysis.inputs.models import build_model

BATCHES = {"lenet5": 256, "tanh7": 256, "resnet18": 16}
EVERY = 50


@contextmanager
def _delve(model: nn.Module) -> Iterator[Callable[[], None]]:
    """delve's tracker; statistics are computed and written after the last step, as at the end of an epoch."""
    from delve import SaturationTracker

    with tempfile.TemporaryDirectory() as folder:
        tracker = SaturationTracker(folder, save_to="csv", modules=model, device="cpu", stats=["lsat"])
        yield tracker.add_saturations
        tracker.close()


@contextmanager
def _pnanalysis(model: nn.Module) -> Iterator[Callable[[], None]]:
    with pn.SaturationMonitor(model, every=EVERY):
        yield lambda: None


def measure(name: str, repeats: int) -> str:
    """One line of the table."""
    torch.manual_seed(0)
    batch_size = BATCHES[name]
    images, labels = torch.randn(batch_size, 3, 32, 32), torch.randint(10, (batch_size,))
    original = build_model(name)
    sides: dict[str, Callable[[nn.Module], AbstractContextManager[Callable[[], None]]]] = {
        "alone": lambda model: nullcontext(lambda: None), "pnanalysis": _pnanalysis,
    }  # fmt: skip
    with contextlib.suppress(ImportError):
        import delve  # noqa: F401

        logging.disable(logging.INFO)  # one line per layer
        sides["delve"] = _delve

    def repeat() -> dict[str, float]:
        """CPU seconds per step of each training, over steps taken in turn."""
        spent = dict.fromkeys(sides, 0.0)
        with ExitStack() as stack:
            trained = []
            for side, watch in sides.items():
                start = time.process_time()
                model = copy.deepcopy(original)
                finish = stack.enter_context(watch(model))
                trained.append((side, model, torch.optim.Adam(model.parameters(), lr=1e-3), finish))
                spent[side] += time.process_time() - start
            for step in range(EVERY):
                for side, model, optimiser, finish in trained:
                    start = time.process_time()
                    optimiser.zero_grad()
                    cross_entropy(model(images), labels).backward()
                    optimiser.step()
                    if step == EVERY - 1:
                        finish()
                    spent[side] += time.process_time() - start
        return {side: total / EVERY for side, total in spent.items()}

    repeat()  # warm up
    times = [repeat() for _ in range(repeats)]
    ratios = {side: statistics.median(seconds[side] / seconds["alone"] for seconds in times) for side in sides}
    alone = statistics.median(seconds["alone"] for seconds in times)
    text = ", ".join(f"with {side} {ratio:.3f} times" for side, ratio in ratios.items() if side != "alone")
    return f"{name}, batch {batch_size}: {1e3 * alone:.1f} ms per step, {text}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--networks", nargs="+", default=list(BATCHES))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.networks:
        print(measure(name, options.repeats), flush=True)


if __name__ == "__main__":
    main()
