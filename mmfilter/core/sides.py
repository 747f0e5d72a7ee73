"""The two sides of a pair."""

from __future__ import annotations

IMAGE, TEXT = 0, 1
"""The sides as indices."""

SIDES = ("image", "text")
"""Their names, in that order."""
