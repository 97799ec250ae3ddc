"""The trainer compared with hand-written loops, and several trainings at once with one after the other.

    python benchmarks/training_speed.py [--data imagefolder:PATH] [--model lenet5] [--device cpu] [--repeats 3]

One epoch over the training set, without evaluation, by :func:`trainers.fit`, by the same steps in a plain loop over
tensors, and by the usual loop over a torchvision ``DataLoader``. Then ``--members`` networks by
:func:`trainers.loop.batched_fit.fit_together`, and by as many calls of ``fit``. All take turns in one process;
medians of the repeats.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from pnanalysis.inputs.data import Split, load_data
from pnanalysis.inputs.models import build_model
from trainers import fit
from trainers.loop.batched_fit import SingleFit, fit_together


class Images(Dataset):
    """Single images as torchvision's datasets yield them: PIL images, converted to normalised tensors one by one."""

    def __init__(self, split: Split) -> None:
        self.images = [Image.fromarray(image.squeeze()) for image in split.inputs.permute(0, 2, 3, 1).numpy(force=True)]
        self.targets = split.targets.tolist()
        offset, scale = split.offset.flatten().tolist(), split.scale.flatten().tolist()
        mean, std = ([value / 255 for value in values] for values in (offset, [1 / s for s in scale]))
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        return self.transform(self.images[index]), self.targets[index]


def by_fit(model: nn.Module, split: Split, options: argparse.Namespace) -> None:
    fit(model, split, epochs=1, batch_size=options.batch_size, amp=options.amp, compile=options.compile)


def by_hand(model: nn.Module, split: Split, options: argparse.Namespace) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    for index in torch.randperm(len(split), device=split.inputs.device).split(options.batch_size):
        inputs, targets = split.take(index)
        optimizer.zero_grad()
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()


def by_loader(model: nn.Module, split: Split, options: argparse.Namespace) -> None:
    device = split.inputs.device
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loader = DataLoader(
        Images(split), options.batch_size, shuffle=True, num_workers=2, pin_memory=device.type == "cuda"
    )
    for inputs, targets in loader:
        optimizer.zero_grad()
        cross_entropy(model(inputs.to(device)), targets.to(device)).backward()
        optimizer.step()


def timed(sides: dict[str, Callable[[], None]], device: torch.device, repeats: int) -> dict[str, float]:
    """Median seconds of each side; they take turns, in alternating order, so that none always runs on warm caches."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats):
        for name, side in list(sides.items())[:: -1 if repeat % 2 else 1]:
            start = time.perf_counter()
            side()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def report(title: str, seconds: dict[str, float]) -> None:
    print(title)
    first = next(iter(seconds.values()))
    for name, value in seconds.items():
        print(f"  {name:34s} {value:8.2f} s   {value / first:5.2f} times")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--model", default="lenet5")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--amp", default="no", choices=("no", "bf16"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--n", type=int, help="number of training images to use")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: one per core")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    split = load_data(options.data, getattr(build_model(options.model), "input_shape", None)).train
    assert isinstance(split, Split)
    split = split.subset(options.n).to(device)
    model = build_model(options.model).to(device)
    few = split.subset(min(1000, len(split)))
    options.images = {len(part): Images(part) for part in (split, few)}
    sides = {"trainers.fit": by_fit, "tensor loop by hand": by_hand, "DataLoader, two workers": by_loader}
    for side in sides.values():  # warm up: choose kernels, allocate memory
        side(build_model(options.model).to(device), few, options)
    calls = {name: (lambda side=side: side(model, split, options)) for name, side in sides.items()}
    where = f"{options.model}, {len(split):,} images, batch {options.batch_size}, {device}, torch {torch.__version__}"
    report(f"one epoch: {where}", timed(calls, device, options.repeats))
    models = [build_model(options.model).to(device) for _ in range(options.members)]
    settings = {"epochs": 1, "batch_size": options.batch_size, "amp": options.amp, "compile": options.compile}
    calls = {
        "fit_together": lambda: fit_together([SingleFit(model) for model in models], split, **settings),
        "fit, one after the other": lambda: [fit(model, split, **settings) for model in models],
    }
    report(f"{options.members} networks: {where}", timed(calls, device, options.repeats))


if __name__ == "__main__":
    main()
