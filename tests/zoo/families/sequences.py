"""Recurrent networks, embeddings and attention."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.zoo.entry import DIFFERENCES, Batch, Entry, sequences, tokens


class Last(nn.Module):
    """Classifies a sequence by the last output of a recurrent layer."""

    def __init__(self, kind: type[nn.RNNBase], **options: object) -> None:
        super().__init__()
        self.recurrent = kind(3, 4, batch_first=True, **options)  # type: ignore[arg-type]
        self.act, self.head = nn.Tanh(), nn.Linear(8 if options.get("bidirectional") else 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.recurrent(x)[0][:, -1]))


class Packed(nn.Module):
    """Sequences of unequal lengths, packed."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        outputs, _ = pad_packed_sequence(self.recurrent(packed)[0], batch_first=True)
        last = outputs[torch.arange(len(x)), lengths - 1]
        return self.head(last)


def packed() -> list[Batch]:
    return [
        ((torch.randn(n, 5, 3), torch.randint(2, 6, (n,)).index_fill(0, torch.tensor(0), 5)), torch.randint(3, (n,)))
        for n in (5, 3)
    ]


class Cells(nn.Module):
    """A loop over a cell, as in hand-written decoders."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = state = x.new_zeros(len(x), 4)
        for step in x.unbind(1):
            hidden, state = self.cell(step, (hidden, state))
        return self.head(hidden)


class Bag(nn.Module):
    """Mean of the embeddings of tokens."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4, **options)  # type: ignore[arg-type]
        self.act, self.head = nn.Tanh(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.embed(x)).mean(1))


class BagLayer(nn.Module):
    """The same by ``EmbeddingBag``."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.embed, self.act, self.head = nn.EmbeddingBag(11, 4, **options), nn.Tanh(), nn.Linear(4, 3)  # type: ignore

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.embed(x)))


class Tied(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.act = nn.Embedding(11, 4), nn.Linear(4, 4), nn.Tanh()
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.body(self.embed(x))))


def next_token(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs[:, :-1].flatten(0, 1), targets[:, 1:].flatten())


def language(*sizes: int) -> list[Batch]:
    drawn = [torch.randint(11, (n, 5)) for n in sizes]
    return [(tokens, tokens) for tokens in drawn]


class SelfAttention(nn.Module):
    """One attention layer, by nn.MultiheadAttention."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.attend, self.head = (
            nn.Linear(3, 4),
            nn.MultiheadAttention(4, 2, batch_first=True),
            nn.Linear(4, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        return self.head((up + self.attend(up, up, up, need_weights=False)[0]).mean(1))


class Causal(nn.Module):
    """Attention by the functional, causal, with the mask kept from the longest sequence so far."""

    def __init__(self, mask: bool) -> None:
        super().__init__()
        self.up, self.qkv, self.head = nn.Linear(3, 4), nn.Linear(4, 12), nn.Linear(4, 3)
        self.wants_mask, self.mask = mask, None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.up(x)).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        if not self.wants_mask:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            if self.mask is None:
                self.mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
        return self.head(out.transpose(1, 2).flatten(2).mean(1))


class Padded(nn.Module):
    """A transformer encoder over padded tokens."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, batch_first=True, activation="gelu")
        self.embed, self.encode, self.head = nn.Embedding(11, 4), nn.TransformerEncoder(layer, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        padding = x == 0
        hidden = self.encode(self.embed(x), src_key_padding_mask=padding)
        kept = (~padding)[..., None].to(hidden.dtype)
        return self.head((hidden * kept).sum(1) / kept.sum(1).clamp_min(1))


def padded() -> list[Batch]:
    batches = []
    for n in (5, 3):
        x = torch.randint(1, 11, (n, 5))
        x[1:, 3:] = 0
        batches.append((x, torch.randint(3, (n,))))
    return batches


class Rotary(nn.Module):
    """Queries and keys turned by complex phases, which are kept as a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.head = nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)
        self.register_buffer(
            "phases", torch.polar(torch.ones(5, 2), torch.outer(torch.arange(5.0), torch.tensor([0.3, 0.7])))
        )

    def forward(self, x: Tensor) -> Tensor:
        turned = torch.view_as_complex(self.up(x).unflatten(-1, (2, 2))) * self.phases
        return self.head(self.act(torch.view_as_real(turned).flatten(2)).mean(1))


class Fourier(nn.Module):
    """A Fourier layer with complex weights."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(1, 3), nn.GELU(), nn.Linear(3, 1)
        self.weight = nn.Parameter(0.3 * torch.randn(3, 3, 2, dtype=torch.cfloat))

    def forward(self, u: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(self.up(u[..., None]).transpose(1, 2))
        out = torch.zeros_like(spectrum)
        out[:, :, :2] = torch.einsum("bim,iom->bom", spectrum[:, :, :2], self.weight)
        return self.down(self.act(torch.fft.irfft(out, n=u.shape[-1])).transpose(1, 2))[..., 0]


def waves() -> list[Batch]:
    return [(u, torch.cumsum(u, 1) / 4) for u in (torch.randn(5, 8), torch.randn(3, 8))]


RECURRENT, EMBEDDED, ATTENTION, COMPLEX = "recurrent networks", "embeddings", "attention", "complex numbers"
SILENT = ("saturation",)  # no activation modules

ENTRIES = [
    Entry(RECURRENT, "LSTM", lambda: Last(nn.LSTM), sequences(5, 3)),
    Entry(RECURRENT, "GRU, bidirectional", lambda: Last(nn.GRU, bidirectional=True), sequences(5, 3), slow=True),
    Entry(RECURRENT, "GRU, packed", Packed, packed, not_for=SILENT),
    Entry(RECURRENT, "loop over LSTMCell", Cells, sequences(5, 3), not_for=SILENT, slow=True),
    Entry(EMBEDDED, "Embedding with padding_idx", lambda: Bag(padding_idx=0), tokens(5, 3)),
    Entry(EMBEDDED, "Embedding, sparse", lambda: Bag(sparse=True), tokens(5, 3)),
    Entry(EMBEDDED, "EmbeddingBag", BagLayer, tokens(5, 3), differences=True, tolerance=DIFFERENCES),
    Entry(
        EMBEDDED, "tied to the head", Tied, lambda: language(5, 3), next_token, classes=partial(torch.argmax, dim=-1)
    ),
    Entry(ATTENTION, "MultiheadAttention", SelfAttention, sequences(5, 3), not_for=SILENT),
    Entry(ATTENTION, "TransformerEncoder with padding", Padded, padded, not_for=SILENT, slow=True),
    Entry(ATTENTION, "scaled_dot_product_attention", lambda: Causal(mask=False), sequences(5, 3), not_for=SILENT),
    Entry(ATTENTION, "causal mask kept on the module", lambda: Causal(mask=True), sequences(5, 3), not_for=SILENT),
    Entry(COMPLEX, "rotary phases", Rotary, sequences(5, 3)),
    Entry(COMPLEX, "Fourier layer", Fourier, waves, F.mse_loss),
]
