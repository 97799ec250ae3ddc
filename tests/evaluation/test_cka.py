"""CKA against direct formulas and known invariances."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from torch import nn

from pnanalysis.evaluation.cka import OUTPUT, CentredKernelAlignment, linear_kernel, u_centred, unbiased_hsic


def features(n: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_hsic(k: np.ndarray, m: np.ndarray) -> float:
    """The U-statistic itself: over all quadruples of different examples (Song et al. 2012, eq. 4)."""
    total, count = 0.0, 0
    for i, j, q, r in permutations(range(len(k)), 4):
        total += k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q])
        count += 1
    return total / count


def hsic(k: torch.Tensor, m: torch.Tensor) -> float:
    return float(unbiased_hsic(torch.stack([k, m]))[0, 1])


def direct_cka(batches: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Ratio of the means over batches, weighted by their sizes, by the closed form of Song et al."""

    def hsic(k: np.ndarray, m: np.ndarray) -> float:
        n = len(k)
        k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
        ones = np.ones(n)
        middle = (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
        return float((np.trace(k @ m) + middle - 2 / (n - 2) * (ones @ k @ m @ ones)) / (n * (n - 3)))

    grams = [(x @ x.T, y @ y.T, len(x)) for x, y in batches]
    across = sum(n * hsic(k, m) for k, m, n in grams)
    return across / np.sqrt(sum(n * hsic(k, k) for k, _, n in grams) * sum(n * hsic(m, m) for _, m, n in grams))


def test_unbiased_hsic_is_the_u_statistic() -> None:
    x, y = features(7, 3, 0), features(7, 4, 1) + features(7, 3, 0)[:, :1]
    k, m = (u_centred(z @ z.T) for z in (x, y))
    assert hsic(k, m) == pytest.approx(naive_hsic((x @ x.T).numpy(), (y @ y.T).numpy()), rel=1e-10)
    centred = u_centred(linear_kernel(x.float()))
    assert hsic(centred, m) == pytest.approx(hsic(k, m), rel=1e-5)  # features in float32
    np.testing.assert_allclose(k.sum(0), 0, atol=1e-12)


def test_unbiased_hsic_of_independent_features_averages_to_zero() -> None:
    values = [
        hsic(*(u_centred(z @ z.T) for z in (features(8, 3, 2 * s), features(8, 3, 2 * s + 1)))) for s in range(400)
    ]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(len(values))
    assert np.std(values) > 0


def streamed(x: torch.Tensor, y: torch.Tensor, sizes: list[int]) -> tuple[float, float]:
    """CKA of two linear layers' outputs, given as tables of features."""
    a, b = nn.Identity(), nn.Identity()
    alignment = CentredKernelAlignment([a, b])
    with alignment:
        for p, q in zip(x.split(sizes), y.split(sizes), strict=True):
            a(p.float()), b(q.float())
            alignment.collect(len(p))
    cka, se = alignment.result()
    assert alignment.layers == [OUTPUT]
    return float(cka[0, 1, 0]), float(se[0, 1, 0])


def test_streamed_cka_is_the_average_over_batches() -> None:
    x = features(97, 6, 0)
    y = torch.cat([x[:, :3] * 2 + 1, features(97, 4, 1)], dim=1)
    sizes = [30, 30, 30, 7]
    cka, se = streamed(x, y, sizes)
    parts = [(p.numpy(), q.numpy()) for p, q in zip(x.split(sizes), y.split(sizes), strict=True)]
    assert cka == pytest.approx(direct_cka(parts), rel=1e-5)
    left_out = np.array([direct_cka(parts[:i] + parts[i + 1 :]) for i in range(4)])
    assert se == pytest.approx(np.sqrt(3 / 4 * ((left_out - left_out.mean()) ** 2).sum()), rel=1e-4)
    assert streamed(x[:94], y[:94], [30, 30, 30, 4])[0] != cka
    assert (
        streamed(x[:93], y[:93], [30, 30, 30, 3])[0] == streamed(x[:90], y[:90], [30, 30, 30])[0]
    )  # three are too few


def test_cka_does_not_see_rotation_scale_or_shift() -> None:
    x, y = features(80, 6, 0), features(80, 5, 1) + features(80, 6, 0)[:, :5]
    q, _ = torch.linalg.qr(features(6, 6, 2))
    reference, _ = streamed(x, y, [40, 40])
    assert 0.1 < reference < 0.9
    assert streamed(3 * x @ q + 5, y, [40, 40])[0] == pytest.approx(reference, rel=2e-5)
    assert streamed(x, 0.1 * x @ q - 2, [40, 40])[0] == pytest.approx(1, rel=1e-5)
    stretched = x * torch.tensor([9.0, 1, 1, 1, 1, 1])
    assert streamed(x, stretched, [40, 40])[0] < 0.9  # only isotropic scaling


def test_the_jackknife_error_is_the_spread_over_data() -> None:
    """Over independent data sets CKA spreads by what each says of its own error."""
    values, errors = [], []
    mix = features(6, 6, 1000)
    for s in range(60):
        x = features(160, 6, s)
        value, se = streamed(x, x @ mix + features(160, 6, 5000 + s), [20] * 8)
        values.append(value)
        errors.append(se)
    # the spread of 60 values is itself known to 1 / sqrt(118) = 9 %; three of these, and a tenth for the jackknife
    assert np.std(values, ddof=1) == pytest.approx(np.sqrt(np.mean(np.square(errors))), rel=0.37)


class Turned(nn.Module):
    """A layer whose outputs have examples along dim 1, and as many positions."""

    def __init__(self, turn: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.turn, self.fc = turn, nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> dict[str, object]:
        h = self.fc(x.transpose(0, 1) if self.turn else x)
        logits = torch.tanh(h).mean(0 if self.turn else 1)
        return {"logits": logits, "cache": [h]}


def test_examples_are_told_from_positions() -> None:
    a, b = Turned(False), Turned(True)
    alignment = CentredKernelAlignment([a, b])
    with alignment:
        for seed in range(3):
            x = features(8, 8 * 3, seed).view(8, 8, 3).float()
            a(x), b(x)
            alignment.collect(8)
    cka, _ = alignment.result()
    assert alignment.layers == ["fc", OUTPUT]
    np.testing.assert_allclose(cka, 1.0, rtol=1e-5)  # the same numbers, laid out differently
    assert torch.overrides._get_current_function_mode_stack() == []
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in (*a.modules(), *b.modules()))


def test_padded_encoders_are_compared_without_their_fast_path() -> None:
    encoders = [nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval() for _ in "ab"]
    alignment = CentredKernelAlignment(encoders)
    padding = torch.arange(5) >= torch.tensor([2, 5, 3, 4, 5, 2])[:, None]
    with torch.no_grad(), alignment:
        for encoder in encoders:
            encoder(torch.ones(6, 5, 8).cumsum(1) + torch.randn(6, 1, 8), src_key_padding_mask=padding)
        alignment.collect(6)
    cka, _ = alignment.result()
    assert np.isfinite(cka[0, 1, alignment.layers.index(OUTPUT)])
    assert torch.backends.mha.get_fastpath_enabled()
