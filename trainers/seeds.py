"""Independent seeds derived from one."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, purpose: str, index: int = 0) -> int:
    """A 63-bit seed for one purpose, independent of those for other purposes and indices."""
    # A hash, not seed + index: sums would give neighbouring runs the same seeds for different purposes.
    digest = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # torch takes seeds below 2^63
