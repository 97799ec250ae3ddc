"""Settings of a training that are chosen by name. Does not import torch, so that the command line starts quickly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from pnanalysis.errors import TrainingError

Strategy = Literal["plain", "persistent", "partial", "restart"]
Form = Literal["absolute", "squared", "cosine"]
Origin = Literal["zero", "start"]
Optimizer = Literal["adam", "sgd"]
Augmentation = Literal["crop", "flip"]
Amp = Literal["no", "bf16"]

#: The allowed values of each setting.
CHOICES: dict[str, tuple[str, ...]] = {
    "strategy": get_args(Strategy),
    "penalty": get_args(Form),
    "origin": get_args(Origin),
    "optimizer": get_args(Optimizer),
    "augment": get_args(Augmentation),
    "amp": get_args(Amp),
}


def check_choice(setting: str, chosen: str | Sequence[str]) -> None:
    """Check that a value, or each of several, is allowed for a setting.

    Raises
    ------
    TrainingError
        If it is not; the message lists the allowed ones.
    """
    for value in [chosen] if isinstance(chosen, str) else chosen:
        if value not in CHOICES[setting]:
            raise TrainingError(f"unknown {setting} {value!r}; there are {', '.join(CHOICES[setting])}")
