"""Digits of Lanczos in float32, by the number of parameters, on a diagonal operator.

    python benchmarks/lanczos_precision.py [--sizes 1e5 1e6 1e7] [--steps 6]

The table gives the largest relative error of the recurrence's coefficients against Lanczos in float64, the largest
overlap of two basis vectors, and, for comparison, the error of ``torch.linalg.vector_norm`` and of ``torch.bmm`` in
float32 on vectors of that length. 1e8 parameters at 4 steps take 10 GB.
"""

from __future__ import annotations

import argparse
import time

import torch

from pnanalysis.spectra.lanczos import Lanczos
from pnanalysis.spectra.linear_operator import DiagonalOperator

HEADER = """\
| parameters | alpha | beta | overlap | vector_norm | bmm | seconds |
|---|---|---|---|---|---|---|"""


def measure(n_parameters: int, n_steps: int) -> str:
    """One line of the table."""
    generator = torch.Generator().manual_seed(0)
    eigenvalues = torch.rand(n_parameters, generator=generator)
    start = torch.randn(n_parameters, 1, generator=generator)
    begin = time.perf_counter()
    single = Lanczos(DiagonalOperator(eigenvalues), start, n_steps).extend(n_steps)
    seconds = time.perf_counter() - begin
    alpha, beta, basis = single.alpha.double(), single.beta.double(), single.basis[0]
    gram = sum(part.double().T @ part.double() for part in basis.split(2**18))
    overlap = float((gram - torch.eye(n_steps, dtype=torch.float64)).abs().max())
    del single, basis
    double = Lanczos(DiagonalOperator(eigenvalues.double()), start.double(), n_steps).extend(n_steps)
    errors = [float((a / b - 1).abs().max()) for a, b in ((alpha, double.alpha), (beta, double.beta))]
    squared = float(start.double().square().sum())
    norm = float(torch.linalg.vector_norm(start)) / squared**0.5 - 1
    product = float(torch.bmm(start.T[None], start[None])) / squared - 1
    numbers = [*errors, overlap, abs(norm), abs(product)]
    return f"| {n_parameters:.0e} | " + " | ".join(f"{number:.1e}" for number in numbers) + f" | {seconds:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="+", default=[1e5, 1e6, 1e7])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(HEADER)
    for size in options.sizes:
        print(measure(round(size), options.steps), flush=True)


if __name__ == "__main__":
    main()
