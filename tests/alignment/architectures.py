"""Small networks with attention in all the ways that people write it, and a few others."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS, TOKENS, CLASSES = 12, 3, 5, 4


class Head(nn.Module):
    """Patches or tokens to the stream, a body, the mean over tokens, a linear output."""

    def __init__(self, body: nn.Module, width: int = WIDTH, inputs: int = 6) -> None:
        super().__init__()
        self.embed, self.body, self.out = nn.Linear(inputs, width), body, nn.Linear(width, CLASSES)
        self.position = nn.Parameter(torch.randn(1, TOKENS, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(self.embed(x) + self.position).mean(1))


class FusedBlock(nn.Module):
    """Queries, keys and values by one layer, unbound from a view; a scale on what is added to the stream."""

    def __init__(self, query_norm: bool = False, mlp: str = "gelu") -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        size = WIDTH // HEADS
        self.q_norm = nn.LayerNorm(size) if query_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(size) if query_norm else nn.Identity()
        self.scale = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.gated = mlp == "swiglu"
        self.up, self.down = nn.Linear(WIDTH, 20 if self.gated else 10), nn.Linear(10, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(n, t, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, -1)
        x = x + self.scale * self.proj(attended)
        hidden = self.up(self.norm2(x))
        if self.gated:
            gate, hidden = hidden.chunk(2, dim=-1)
            return x + self.down(F.silu(gate) * hidden)
        return x + self.down(F.gelu(hidden))


class Packed(nn.Module):
    """GPT-2's layer: a linear map whose weight is transposed."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


class CausalModel(nn.Module):
    """A language model with packed, masked attention written out, and the embedding's weight in the output."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, WIDTH), nn.Embedding(TOKENS, WIDTH)
        self.norm1, self.norm2, self.last = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.attention, self.project = Packed(WIDTH, 3 * WIDTH), Packed(WIDTH, WIDTH)
        self.up, self.down = Packed(WIDTH, 10), Packed(10, WIDTH)
        self.register_buffer("mask", torch.ones(TOKENS, TOKENS).tril().bool()[None, None])

    def forward(self, tokens: Tensor) -> Tensor:
        n, t = tokens.shape
        x = self.tokens(tokens) + self.places(torch.arange(t))
        q, k, v = self.attention(self.norm1(x)).split(WIDTH, dim=2)
        q, k, v = (part.view(n, t, HEADS, -1).transpose(1, 2) for part in (q, k, v))
        scores = (q @ k.transpose(-2, -1)) / q.size(-1) ** 0.5
        scores = scores.masked_fill(~self.mask[:, :, :t, :t], float("-inf"))
        x = x + self.project((scores.softmax(-1) @ v).transpose(1, 2).contiguous().view(n, t, -1))
        hidden = self.up(self.norm2(x))
        hidden = 0.5 * hidden * (1 + torch.tanh(0.8 * (hidden + 0.044715 * hidden**3)))
        return F.linear(self.last(x + self.down(hidden)), self.tokens.weight)


class RootMeanSquare(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class RotaryModel(nn.Module):
    """Rotary positions, keys and values for several heads each, gated units, norms without means."""

    def __init__(self, rotate: int = 4) -> None:
        super().__init__()
        self.size, self.groups, self.rotate = 4, 2, rotate
        self.embed, self.out = nn.Embedding(11, WIDTH), nn.Linear(WIDTH, 11, bias=False)
        self.q, self.o = nn.Linear(WIDTH, 24, bias=False), nn.Linear(24, WIDTH, bias=False)
        self.k, self.v = nn.Linear(WIDTH, 8, bias=False), nn.Linear(WIDTH, 8, bias=False)
        self.gate, self.up = nn.Linear(WIDTH, 10, bias=False), nn.Linear(WIDTH, 10, bias=False)
        self.down = nn.Linear(10, WIDTH, bias=False)
        self.norm1, self.norm2, self.last = (RootMeanSquare(WIDTH) for _ in range(3))

    def turned(self, x: Tensor) -> Tensor:
        half = self.rotate // 2
        turning, passing = x[..., : self.rotate], x[..., self.rotate :]
        angles = torch.arange(x.shape[2])[:, None] / 10.0 ** torch.arange(half)
        cos, sin = (torch.cat([f(angles)] * 2, -1) for f in (torch.cos, torch.sin))
        other = torch.cat([-turning[..., half:], turning[..., :half]], -1)
        return torch.cat([turning * cos + other * sin, passing], -1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        n, t, _ = x.shape
        normed = self.norm1(x)
        q, k, v = (f(normed).view(n, t, -1, self.size).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = self.turned(q), self.turned(k)
        k, v = (part[:, :, None].expand(n, 2, 3, t, 4).reshape(n, 6, t, 4) for part in (k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(attended.transpose(1, 2).reshape(n, t, -1))
        normed = self.norm2(x)
        return self.out(self.last(x + self.down(F.silu(self.gate(normed)) * self.up(normed))))


class EinsumAttention(nn.Module):
    """Weights with an axis for heads of its own, a scale for each head, and units with an odd activation."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.randn(HEADS, WIDTH, 4)) for _ in range(3))
        self.o, self.slope = nn.Parameter(torch.randn(HEADS, 4, WIDTH)), nn.Parameter(torch.rand(HEADS, 1, 1))
        self.up, self.down = nn.Linear(WIDTH, 10), nn.Linear(10, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("ntd,hdc->nhtc", x, weight) for weight in (self.q, self.k, self.v))
        weights = (self.slope * torch.einsum("nhtc,nhsc->nhts", q, k)).softmax(-1)
        x = x + torch.einsum("nhts,nhsc,hcd->ntd", weights, v, self.o)
        return x + self.down(torch.tanh(self.up(x)))


class SlopedAttention(FusedBlock):
    """Attention whose heads differ by constants, and so must stay in their places."""

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, HEADS, 3, -1).permute(3, 0, 2, 1, 4)
        slopes = torch.tensor([0.5, 0.25, 0.125])[:, None, None]
        scores = q @ k.mT - slopes * (torch.arange(t)[:, None] - torch.arange(t)).abs()
        return x + self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, t, -1))


class Pooled(nn.Module):
    """A few learned tokens that read from the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, 4, WIDTH))
        self.read = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.latents.expand(len(x), -1, -1), x, x)[0]


class Architecture(NamedTuple):
    """How to make a network, the shape of its inputs (``None``: tokens), and the groups it has.

    Groups are written kind: (size, signs, number of groups).
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...] | None
    groups: list[tuple[str, int, str, int]]


def layer(**options: object) -> nn.Module:
    return Head(nn.TransformerEncoderLayer(WIDTH, HEADS, 10, batch_first=True, **options))  # type: ignore[arg-type]


def vision() -> nn.Module:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(8, 4, 2, HEADS, WIDTH, 10, num_classes=CLASSES)
    nn.init.normal_(model.heads.head.weight)  # type: ignore[union-attr,arg-type]
    return model


ATTENTION = [("heads", 3, "none", 1), ("query-key", 4, "each", 3), ("value", 4, "each", 3)]
UNITS = ("units", 10, "none", 1)
STREAM = ("stream", 12, "joint", 1)
VECTORS = (TOKENS, 6)

ARCHITECTURES = {
    "encoder layer": Architecture(layer, VECTORS, [*ATTENTION, UNITS, STREAM]),
    "encoder layer, norm first": Architecture(
        lambda: layer(norm_first=True, activation="gelu"), VECTORS, [*ATTENTION, UNITS, STREAM]
    ),
    "torchvision": Architecture(vision, (3, 8, 8), [*((k, n, s, 2 * m) for k, n, s, m in (*ATTENTION, UNITS)), STREAM]),
    "fused": Architecture(lambda: Head(FusedBlock()), VECTORS, [*ATTENTION, UNITS, STREAM]),
    "normed queries, gated units": Architecture(
        lambda: Head(FusedBlock(True, "swiglu")),
        VECTORS,
        [("heads", 3, "none", 1), ("query-key", 4, "joint", 1), ("value", 4, "each", 3), UNITS, STREAM],
    ),
    "packed and causal": Architecture(CausalModel, None, [*ATTENTION, UNITS, STREAM]),
    "rotary": Architecture(
        RotaryModel,
        None,
        [("heads", 2, "each", 1), ("heads", 3, "none", 2), ("value", 4, "each", 2), UNITS, ("stream", 12, "each", 1)],
    ),
    "partly rotary": Architecture(
        lambda: RotaryModel(2),
        None,
        [("heads", 2, "each", 1), ("heads", 3, "none", 2), ("query-key", 2, "each", 2), ("value", 4, "each", 2), UNITS,
         ("stream", 12, "each", 1)],
    ),
    "einsum": Architecture(
        lambda: Head(EinsumAttention()), VECTORS, [*ATTENTION, ("units", 10, "each", 1), ("stream", 12, "each", 1)]
    ),
    "sloped": Architecture(lambda: Head(SlopedAttention()), VECTORS, [*ATTENTION[1:], STREAM]),
    "learned tokens": Architecture(
        lambda: Head(Pooled()), VECTORS, [*ATTENTION, ("tokens", 4, "none", 1), ("units", 12, "each", 2)]
    ),
}  # fmt: skip


def made(name: str) -> tuple[nn.Module, Tensor]:
    """A network in eval mode and double precision, without zeros or ones among its parameters; and inputs."""
    torch.manual_seed(5)
    architecture = ARCHITECTURES[name]
    model = architecture.make().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    if architecture.shape is None:
        return model, torch.randint(11, (3, TOKENS))
    return model, torch.randn(3, *architecture.shape, dtype=torch.float64)
