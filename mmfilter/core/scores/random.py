"""The control that no score may lose to."""

from __future__ import annotations

import hashlib


def random_score(seed: int, key: str, row: int) -> float:
    """A seeded uniform number in [0, 1) that depends on the sample alone: the control to beat."""
    digest = hashlib.sha256(f"{seed}\0{key}\0{row}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:3], "big") / 2**24
