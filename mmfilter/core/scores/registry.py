"""Every score: its name, what it is, and where its formula stands.

The one list that the score table, the displays and the pass over the model share. It knows formulas by the place of
their functions, so that what only asks for names (`search`, `select`) imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from mmfilter.core.scores.pooled_pairs import PooledPairs

HEADLINES = 3
"""Scores that a person sees of a single sample"""


@dataclass(frozen=True)
class Score:
    """One column of the score table."""

    name: str
    summary: str
    formula: str | None
    """`MODULE:FUNCTION` from a batch of pairs to (samples,); None where it is not of the pair's codes and states"""
    prominence: int | None = None
    """Place among those that a person is shown, the first is 1; None: in tables and JSON only"""


_HERE = "mmfilter.core.scores"

SCORES: Mapping[str, Score] = {
    score.name: score
    for score in (
        Score("saev", "cross-modal weights of the features on both sides, summed (SAE-V)", f"{_HERE}.saev:saev", 3),
        Score("cooccurrence", "number of features on both sides (SAE-V)", f"{_HERE}.saev:cooccurrence", 4),
        Score("l0", "active features a token (SAE-V)", f"{_HERE}.sparsity:l0", 5),
        Score("l0_image", "active features an image token", f"{_HERE}.sparsity:l0_image"),
        Score("l0_text", "active features a caption token", f"{_HERE}.sparsity:l0_text"),
        Score("l1", "sum of activations a token", f"{_HERE}.sparsity:l1", 6),
        Score("l1_image", "sum of activations an image token", f"{_HERE}.sparsity:l1_image"),
        Score("l1_text", "sum of activations a caption token", f"{_HERE}.sparsity:l1_text"),
        Score(
            "similarity",
            "cosine of the mean codes of both sides, rare features first",
            f"{_HERE}.similarity:similarity",
            1,
        ),
        Score("support", "share of the caption's activation that the image has too", f"{_HERE}.support:support", 2),
        Score("raw", "cosine of the mean states of both sides, without an SAE: the baseline", f"{_HERE}.raw:raw", 7),
        Score("random", "a seeded number of the sample's key: the control", None, 8),
    )
}
"""Name -> score, in the order of the score table's columns"""


def formulas() -> dict[str, Callable[[PooledPairs], torch.Tensor]]:
    """Name -> function from a batch of pairs to (samples,), of all scores that have one."""
    return {score.name: _formula(score.formula) for score in SCORES.values() if score.formula is not None}


def shown(at_most: int | None = None) -> tuple[str, ...]:
    """Names of the scores that a person is shown, the most prominent first."""
    ranked = sorted((score.prominence, score.name) for score in SCORES.values() if score.prominence is not None)
    return tuple(name for _, name in ranked[:at_most])


@cache
def _formula(place: str) -> Callable[[PooledPairs], torch.Tensor]:
    module, _, name = place.partition(":")
    function: Callable[[PooledPairs], torch.Tensor] = getattr(import_module(module), name)
    return function
