"""Forward passes as Python sees them: no compiled code, no fused layers that hide what they compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pnanalysis.torch_internals import compiler_is_loaded


@contextmanager
def eager() -> Iterator[None]:
    """Within the body, every layer runs as its own Python code, whether compiled or not.

    Compiled code runs uncompiled, and transformer encoders and attention do not take their fast path, which fuses a
    layer into one operation and drops padded positions.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        if compiler_is_loaded():
            with torch.compiler.set_stance("force_eager"):
                yield
        else:  # nothing can have been compiled, and importing the compiler takes seconds
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
