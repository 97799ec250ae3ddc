"""Networks of transformers, unwrapped, and low-rank adapters of peft."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo.entry import SINGLE_INSIDE, Batch, Entry, images

SIZES = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}


def bert(**options: Any) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**SIZES, max_position_embeddings=8, num_labels=3, **options))


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    shape = {name: value for name, value in SIZES.items() if name != "vocab_size"}
    return ViTForImageClassification(ViTConfig(**shape, image_size=8, patch_size=4, num_labels=3))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1, max_position_embeddings=8))


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )


def lora() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"])
    return get_peft_model(bert(), settings)


def padded(n: int) -> tuple[Tensor, Tensor]:
    """Tokens and their mask."""
    tokens, mask = torch.randint(1, 20, (n, 6)), torch.ones(n, 6, dtype=torch.long)
    mask[1:, 4:] = 0
    return tokens * mask, mask


def sentences() -> list[Batch]:
    return [
        ({"input_ids": tokens, "attention_mask": mask}, torch.randint(3, (len(tokens),)))
        for tokens, mask in (padded(4), padded(2))
    ]


def with_labels() -> list[Batch]:
    return [({**inputs, "labels": labels}, labels) for inputs, labels in sentences()]


def texts() -> list[Batch]:
    drawn = [torch.randint(20, (n, 6)) for n in (4, 2)]
    return [({"input_ids": tokens}, tokens) for tokens in drawn]


def translations() -> list[Batch]:
    drawn = [(torch.randint(1, 20, (n, 6)), torch.randint(1, 20, (n, 4))) for n in (4, 2)]
    return [({"input_ids": tokens, "labels": labels}, labels) for tokens, labels in drawn]


def logits(outputs: Any, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.logits, targets)


def next_token(outputs: Any, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())


def each_token(outputs: Any, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.logits.flatten(0, 1), targets.flatten())


def inside(outputs: Any, targets: Tensor) -> Tensor:
    """The loss that the network computes from the labels in its batch."""
    return outputs.loss


def last(outputs: Tensor) -> Tensor:
    return outputs.argmax(-1)


def entry(name: str, make: Callable[[], nn.Module], data: Callable[[], list[Batch]], loss: Any, **more: Any) -> Entry:
    packages = more.pop("packages", ("transformers",))
    return Entry(more.pop("family", "transformers"), name, make, data, loss, packages=packages, **more)


#: The loss is one of the outputs, a number for all examples together: there is no matrix of what it is computed from.
INSIDE = {"Gauss-Newton": "loss"}

ENTRIES = [
    entry("BERT", bert, sentences, logits),
    entry("BERT, labels in the batch", bert, with_labels, inside, refused=INSIDE),
    entry("ViT of transformers", vit, images(3, 2, channels=3, width=8), logits),
    entry("GPT-2", gpt2, texts, next_token, classes=last),
    entry("Llama", llama, texts, next_token, classes=last, tolerance=SINGLE_INSIDE),
    entry("T5", t5, translations, each_token, classes=last, tolerance=SINGLE_INSIDE),
    entry("LoRA", lora, sentences, logits, family="peft", packages=("transformers", "peft")),
]
