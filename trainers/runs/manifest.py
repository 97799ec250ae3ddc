"""What a run's manifest records in addition to its configuration."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from pnanalysis.errors import USER_ERRORS, DivergenceError, PnError, ProcessLost, reason
from pnanalysis.io.hardware import cpu_name
from pnanalysis.io.writer import RunWriter
from pnanalysis.schema import provenance
from trainers.recipes import Config

_PACKAGES = ("pnanalysis", "torch", "torchvision", "numpy", "xarray")


def describe(config: Config, device: torch.device, **entries: Any) -> dict[str, Any]:
    """The manifest of a new run: identity, configuration, versions, machine and time of its start."""
    started = now()
    text = json.dumps([config.to_dict(), started], sort_keys=True)
    return {
        "id": hashlib.sha256(text.encode()).hexdigest()[:12],
        "recipe": config.recipe,
        "strategy": config.strategy,
        "config": config.to_dict(),
        "model": {"name": config.model, "options": config.model_options},
        "loss": config.loss,
        "seeds": {"run": config.seed, "split": config.split_seed},
        "versions": {name: metadata.version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "git_revision": git_revision(),
        "command": provenance()["command"],
        "started": started,
        "ended": None,
        "status": "running",
        "ends": [],
        "champion": None,
        **entries,
    }


def mark_unfinished(writer: RunWriter, error: BaseException) -> None:
    """Record why a run did not finish, if the disk allows: ``error`` itself matters more than that."""
    status = "diverged" if isinstance(error, DivergenceError) else "failed"
    with suppress(PnError):
        if isinstance(error, USER_ERRORS) and not isinstance(error, ProcessLost):
            writer.update(status=status, failure=failure_of(error))
        else:  # a signal, to this process or to one that it trains with
            writer.update(status="interrupted", failure=None)


def failure_of(error: BaseException) -> str:
    """The error that ended a run, as text for its manifest."""
    return str(error) if isinstance(error, PnError) else reason(error)


def now() -> str:
    """The time, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def git_revision() -> str | None:
    """The revision of this source tree, marked if it has uncommitted changes; ``None`` for an installed package."""
    here = Path(__file__).resolve().parent
    try:
        described = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None
