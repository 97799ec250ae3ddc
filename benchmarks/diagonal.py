"""Errors of the Hessian's diagonal at equal products: ``pn.blocks(diagonal=True)``, XDiag, and random signs alone.

``python benchmarks/diagonal.py [--seeds 20]``. A minute of one core. Writes ``results/diagonal.md``.

References
----------
E. Epperly, J. Tropp, R. Webber, "XTrace: making the most of every sample in stochastic trace estimation",
arXiv:2301.07825, section 2.4 on XDiag.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from networks import dense_hessian, trained, training_examples

from pnanalysis.spectra.block_products import Partition, Plan, block_forms
from pnanalysis.spectra.linear_operator import as_operator

RESULTS = Path(__file__).parent / "results" / "diagonal.md"
SUBJECTS = ("digits tanh MLP", "digits ReLU MLP")
PRODUCTS = (60, 100, 200)


def krylov_and_signs(H: np.ndarray, n: int, seed: int) -> np.ndarray:
    """What ``pn.blocks`` computes: half of the products for a Krylov space, half for signs."""
    partition = Partition(("all",), (0,), (len(H),))
    sums = block_forms(as_operator(H), partition, Plan(n, seed, diagonal=True)).diagonal
    assert sums is not None
    return sums.value


def xdiag(H: np.ndarray, n: int, seed: int) -> np.ndarray:
    """A sketch of ``n / 2`` vectors, each of which estimates what the sketch of all others leaves."""
    m = n // 2
    signs = np.random.default_rng([seed, 1]).choice([-1.0, 1.0], (len(H), m))
    Q, R = np.linalg.qr(H @ signs)
    Z = H @ Q
    S = np.linalg.inv(R).T  # column i is orthogonal to the columns of R but i
    S /= np.linalg.norm(S, axis=0)
    QS, ZS = Q @ S, Z @ S
    left_out = -QS * ZS + signs * QS * np.einsum("ij,ij->j", S, R)
    return np.asarray((Q * Z).sum(1) + left_out.mean(1))


def signs_alone(H: np.ndarray, n: int, seed: int) -> np.ndarray:
    """The mean of ``z * Hz`` (Bekas, Kokiopoulou and Saad)."""
    signs = np.random.default_rng([seed, 2]).choice([-1.0, 1.0], (len(H), n))
    return np.asarray((signs * (H @ signs)).mean(1))


WAYS: dict[str, Callable[[np.ndarray, int, int], np.ndarray]] = {
    "pn.blocks": krylov_and_signs, "XDiag": xdiag, "signs alone": signs_alone,
}  # fmt: skip


def check_xdiag() -> None:
    """Leaving each vector out of the sketch, as written, gives the same; in expectation it is the diagonal."""
    rng = np.random.default_rng(0)
    half = rng.standard_normal((12, 12))
    H = half + half.T
    signs = np.random.default_rng([3, 1]).choice([-1.0, 1.0], (12, 4))
    found = np.zeros(12)
    for i in range(4):
        Q = np.linalg.qr(np.delete(H @ signs, i, axis=1))[0]
        rest = H @ signs[:, i] - Q @ (Q.T @ (H @ signs[:, i]))
        found += (np.einsum("pk,pk->p", Q, H @ Q) + signs[:, i] * rest) / 4
    np.testing.assert_allclose(xdiag(H, 8, 3), found, atol=1e-10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    check_xdiag()
    lines = [
        "# Diagonals",
        "",
        f"Root-mean-square error of the Hessian's diagonal, relative to its root mean square, over {options.seeds} "
        "seeds (float64, against the exact matrix). In brackets: relative to that of `pn.blocks(diagonal=True)`.",
        "",
        "| network | products | " + " | ".join(WAYS) + " |",
        "|---|---|" + "---|" * len(WAYS),
    ]
    for subject in SUBJECTS:
        H = dense_hessian(trained(subject), *training_examples(subject)).numpy()
        exact = np.diag(H)
        for n in PRODUCTS:
            errors = [
                np.sqrt(np.mean([(way(H, n, seed) - exact) ** 2 for seed in range(options.seeds)]) / np.mean(exact**2))
                for way in WAYS.values()
            ]
            cells = [f"{error:.2%}" + (f" ({error / errors[0]:.2f})" if i else "") for i, error in enumerate(errors)]
            lines.append(f"| {subject}, P = {len(H):,} | {n} | " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    RESULTS.write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
