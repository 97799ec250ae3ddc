"""Networks and tokenizers from folders that Hugging Face's ``save_pretrained`` wrote, without fetching or running code.

transformers is imported only here, and only when such a folder is asked for.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pnanalysis.errors import DataError, ModelError, PnError, reason
from pnanalysis.io.files import read_regular
from pnanalysis.io.weights import is_index, shards

#: What stands before a folder where a model is named.
PREFIX = "hf:"
#: Any of these means that the folder holds a tokenizer.
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
_LARGEST_CONFIG = 2**24  # bytes
_SAFE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
#: A config may name kernels that are fetched, and the fast ones that are not have no second derivative.
_PLAIN: dict[str, Any] = {"attn_implementation": "eager", "experts_implementation": "eager"}
_SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def folder_of(item: Any) -> Path | None:
    """The folder in ``hf:DIR``; ``None`` for everything else."""
    text = os.fspath(item) if isinstance(item, str | os.PathLike) else ""
    return Path(text.removeprefix(PREFIX)) if text.startswith(PREFIX) else None


def pretrained(folder: Path) -> nn.Module:
    """The network in a folder, with its weights, in eval mode, in float32 unless it was saved in float64.

    It returns its logits alone, with the classes along dim 1: ``(N, C)``, or ``(N, C, T)`` for sequences, as torch's
    cross-entropy takes them. The attributes ``config`` and ``tokenizer_folder`` say what text it reads.

    Parameters
    ----------
    folder : Path
        With config.json and safetensors, in one file or in shards with an index.

    Raises
    ------
    ModelError
        If it is no such folder, asks for code of its own, or its weights do not fit its config; if transformers is
        missing.
    """
    config = _checked_config(folder)
    transformers = _transformers(ModelError)
    kind = _network_class(transformers, config, folder)
    dtype = torch.float64 if config.get("dtype", config.get("torch_dtype")) == "float64" else torch.float32
    with _offline(), _quiet(transformers):
        try:
            network, report = kind.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **_PLAIN, **_SAFE
            )
        except Exception as error:  # transformers raises errors of many types on what it cannot read
            raise ModelError(f"{folder}: transformers cannot read it ({reason(error)}); save it again") from error
    for what, verb in (("missing_keys", "lacks"), ("mismatched_keys", "has another shape of"), ("unexpected_keys", "")):
        names = sorted(str(name) for name in report.get(what, ()))
        if names:
            wrong = f"{verb or 'holds'} {names[0]!r}"
            raise ModelError(
                f"{folder}: {wrong}, so its weights do not belong to the {kind.__name__} of its config.json"
            )
    network.config.use_cache = False
    network.tokenizer_folder = folder if any((folder / name).is_file() for name in _TOKENIZERS) else None
    network.register_forward_hook(_logits)
    result: nn.Module = network.eval()
    return result


def encoded(folder: Path, text: str) -> list[int]:
    """A text as tokens, by the tokenizer in a folder, without special tokens.

    Raises
    ------
    DataError
        If there is none, or it asks for code of its own; if transformers is missing.
    """
    settings = _json(folder / "tokenizer_config.json", DataError) if (folder / "tokenizer_config.json").exists() else {}
    if "auto_map" in settings:
        raise DataError(f"{folder}: its tokenizer is code of its own (auto_map), which is not run; give token ids")
    transformers = _transformers(DataError)
    with _offline(), _quiet(transformers):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **_SAFE)
            return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        except Exception as error:  # the same as above
            raise DataError(f"{folder}: its tokenizer cannot be used ({reason(error)}); save it again") from error


@contextmanager
def masks_without_values() -> Iterator[None]:
    """Within the body, transformers builds attention masks that do not depend on values of tensors.

    It does so by itself where it notices a tracer, but does not notice those that work below torch.func's transforms.
    """
    module: Any = sys.modules.get("transformers.masking_utils")
    before = getattr(module, "is_tracing", None)
    if before is None:  # not in use, or arranged in another way
        yield
        return
    module.is_tracing = lambda tensor=None: True
    try:
        yield
    finally:
        module.is_tracing = before


def _logits(network: nn.Module, arguments: Any, outputs: Any) -> Tensor:
    """Hook: the logits in place of all that the network returns."""
    logits = getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor):
        raise ModelError(f"a {type(network).__name__} returns no logits; give one with a head, such as ...ForCausalLM")
    return logits.transpose(1, 2) if logits.ndim == 3 else logits


def _checked_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder; nothing is fetched, so save the model there by save_pretrained")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: holds no config.json; give the folder that save_pretrained wrote")
    config = _json(folder / "config.json", ModelError)
    if "auto_map" in config:
        raise ModelError(
            f"{folder}: its config asks for code of its own (auto_map), which is not run; build the network yourself "
            "and give it as module:factory"
        )
    if "quantization_config" in config:
        raise ModelError(
            f"{folder}: holds quantised weights, which have no derivatives; give those before quantisation"
        )
    if not any((folder / name).is_file() for name in _SAFETENSORS):
        raise ModelError(f"{folder}: holds no safetensors ({' or '.join(_SAFETENSORS)}); save it by save_pretrained")
    for path in (folder / name for name in _SAFETENSORS):
        if path.is_file() and is_index(path):
            shards(path)  # for its checks: all are there, and none is elsewhere
    return config


def _json(path: Path, error: type[PnError]) -> dict[str, Any]:
    try:
        content = json.loads(read_regular(path, _LARGEST_CONFIG, error))
    except (ValueError, RecursionError) as cause:
        if isinstance(cause, PnError):
            raise
        raise error(f"{path}: is not JSON ({reason(cause)}); copy it again") from cause
    if not isinstance(content, dict):
        raise error(f"{path}: holds no settings by name; copy it again")
    return content


def _network_class(transformers: Any, config: dict[str, Any], folder: Path) -> Any:
    """The class that the config names, if it is one of transformers' own networks."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    kind = getattr(transformers, name, None) if name.isidentifier() else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ModelError(f"{folder}: its config.json names no network of transformers ({name or 'no architectures'})")
    return kind


def _transformers(error: type[PnError]) -> Any:
    with _offline():
        try:
            return importlib.import_module("transformers")
        except ImportError as cause:
            raise error("hf: needs transformers: pip install 'transformers>=5,<6'") from cause


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without bars and remarks of transformers: what matters in them is checked here."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _offline() -> Iterator[None]:
    """Nothing is fetched in the body, by the switches that these libraries ask, beside what each call is told."""
    try:
        hub: Any = importlib.import_module("huggingface_hub.constants")  # before the switches, which it reads only now
    except ImportError:
        yield
        return
    before, offline = {name: os.environ.get(name) for name in _SWITCHES}, hub.HF_HUB_OFFLINE
    os.environ.update(dict.fromkeys(_SWITCHES, "1"))
    hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = offline
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
