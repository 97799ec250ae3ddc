"""A small decoder-only transformer, for benchmarks that must not need more than torch."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

#: Width, layers, heads, vocabulary and context of sizes in the literature.
SIZES = {
    "tiny": (64, 2, 2, 128, 32),
    "nanoGPT": (384, 6, 6, 65, 256),
    "GPT-2 124M": (768, 12, 12, 50257, 256),
}


class Block(nn.Module):
    """Attention and a perceptron, each behind a layer norm and beside a residual connection."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        heads = self.attention(self.norms[0](x)).view(n, length, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.output(mixed.transpose(1, 2).reshape(n, length, width))
        return x + self.mlp(self.norms[1](x))


class GPT(nn.Module):
    """Logits ``(n * length, vocabulary)`` of the next token, with tied embeddings.

    ``plain`` computes attention by its plain implementation, which can be differentiated twice.
    """

    plain = False

    def __init__(self, size: str) -> None:
        super().__init__()
        width, n_layers, n_heads, self.vocabulary, self.context = SIZES[size]
        self.tokens, self.places = nn.Embedding(self.vocabulary, width), nn.Embedding(self.context, width)
        self.blocks = nn.Sequential(*(Block(width, n_heads) for _ in range(n_layers)))
        self.norm = nn.LayerNorm(width)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH) if self.plain else nullcontext():
            return self._logits(tokens)

    def _logits(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        return (self.norm(self.blocks(x)) @ self.tokens.weight.T).flatten(0, 1)


def random_text(model: GPT, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random tokens and the tokens after them, ``(n, context)`` and ``(n * context,)``."""
    tokens = torch.randint(model.vocabulary, (n, model.context + 1), device=device)
    return tokens[:, :-1], tokens[:, 1:].flatten()
