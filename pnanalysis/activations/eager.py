"""Forward passes as Python sees them: no compiled code, no fused layers that hide what they compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.backends import mha

from pnanalysis.torch_internals import compiler_is_loaded


@contextmanager
def eager() -> Iterator[None]:
    """Within the body, every layer runs as its own Python code, whether compiled or not."""
    with without_fast_path():
        if compiler_is_loaded():
            with torch.compiler.set_stance("force_eager"):
                yield
        else:  # nothing can have been compiled, and importing the compiler takes seconds
            yield


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Within the body, transformer encoders compute without gradients what they compute with them.

    Their fast path fuses a layer into one operation, without second derivatives, and packs padded sequences into nested
    tensors, on which hooks and vmap fail.
    """
    before = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        mha.set_fastpath_enabled(before)
