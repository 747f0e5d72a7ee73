"""What a comparison of true with shuffled pairs says of a score, and what of all of them in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from mmfilter.core.evaluation.auc import auc, bootstrap_aucs, interval, rank_correlation
from mmfilter.core.evaluation.fidelity import Fidelity
from mmfilter.core.scores.registry import formulas

DEFAULT = "similarity"
"""What `select` ranks by unless told otherwise; recommended when no score is clearly better."""
RAW = "raw"
LENGTH_GOES_ALONG = 0.5
"""Rank correlation with caption length from which the verdict warns."""
DEGREES = ((0.6, "barely"), (0.75, "somewhat"), (0.9, "well"), (np.inf, "very well"))
"""AUC below which a score does it this well."""
AGAINST = {"better": "better than", "level": "no better than", "worse": "worse than"}


@dataclass(frozen=True)
class Difference:
    """How far a score's AUC is above another's on the same pairs, with the 95 % interval of the paired bootstrap."""

    auc: float
    """AUC of the other"""
    low: float
    high: float

    @property
    def word(self) -> str:
        """`better` or `worse` where the interval leaves out 0, else `level`."""
        return "better" if self.low > 0 else "worse" if self.high < 0 else "level"


@dataclass(frozen=True, eq=False)
class Evidence:
    """How well one score tells true pairs from shuffled ones."""

    name: str
    auc: float
    draws: np.ndarray = field(repr=False)
    """(draws,) AUCs of the bootstrap; every score has the same draws of pairs"""
    length_correlation: float
    """Rank correlation with the number of caption tokens, over the true pairs; NaN where the score is constant"""
    random: Evidence | None = None
    """The same score through the random SAE; None where no SAE takes part"""

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the AUC."""
        return interval(self.draws)

    @property
    def above_chance(self) -> bool:
        """Whether the interval is above 0.5, widened so that one of all scores looked at passes by luck in 5 % of cases
        at most."""
        return interval(self.draws, 1 - 0.05 / len(formulas()))[0] > 0.5

    def against(self, other: Evidence) -> Difference:
        """This score beside another one."""
        return Difference(other.auc, *interval(self.draws - other.draws))


Columns = Mapping[str, np.ndarray]
"""Name -> (2, pairs): scores of the true and of the shuffled pairs, all finite"""


def weigh(columns: Columns, random: Columns, lengths: np.ndarray, *, draws: int, seed: int) -> dict[str, Evidence]:
    """Evidence on each of `columns`; `random` holds scores of the same names through the random SAE, `lengths` (pairs,)
    caption tokens."""
    every = [*columns.values(), *random.values()]
    true, shuffled = (np.stack([column[side] for column in every]) for side in (0, 1))
    drawn = bootstrap_aucs(true, shuffled, draws=draws, seed=seed)
    found = [(auc(t, s), d, rank_correlation(t, lengths)) for t, s, d in zip(true, shuffled, drawn, strict=True)]
    twins = {name: Evidence(name, *values) for name, values in zip(random, found[len(columns) :], strict=True)}
    return {name: Evidence(name, *values, random=twins.get(name)) for name, values in zip(columns, found, strict=False)}


@dataclass(frozen=True)
class Judgement:
    """What the evidence on all scores comes to."""

    scores: Mapping[str, Evidence]
    """All of `formulas`, and controls"""
    fidelity: Fidelity

    @property
    def best(self) -> Evidence:
        """The score with the highest AUC, above chance or not."""
        return max((self.scores[name] for name in formulas()), key=lambda score: score.auc)

    @property
    def recommended(self) -> str | None:
        """The column to rank by: the default if no score is clearly better, else the best; None when none is above
        chance."""
        best, default = self.best, self.scores[DEFAULT]
        if default.above_chance and best.against(default).word != "better":
            return DEFAULT
        telling = [self.scores[name] for name in formulas() if self.scores[name].above_chance]
        return max(telling, key=lambda score: score.auc).name if telling else None

    @property
    def verdict(self) -> str:
        """The whole in one sentence."""
        by = self.recommended
        if by is None:
            best = self.best
            said = (
                f"no score tells true captions from shuffled ones here (best: {best.name}, AUC {best.auc:.3f}; 0.5 is "
                "chance): do not rank by them"
            )
            clauses = [said, self._reconstruction()]
        else:
            clauses = [self._telling(by), self._length(by), self._reconstruction(), f"rank with --by {by}"]
        said = "; ".join(clause for clause in clauses if clause)
        return f"{said[0].upper()}{said[1:]}." if by is None else f"{said}."

    def _telling(self, by: str) -> str:
        score = self.scores[by]
        degree = next(word for limit, word in DEGREES if score.auc < limit)
        said = f"{by} tells true captions from shuffled ones {degree} (AUC {score.auc:.3f})"
        through_sae = max(
            (self.scores[name] for name in formulas() if self.scores[name].random is not None), key=lambda s: s.auc
        )
        if score.random is None:
            if not through_sae.above_chance:
                return f"{said}, while no score through the SAE does (best: {through_sae.name}, {through_sae.auc:.3f})"
            beside = (
                f"{said}, {AGAINST[score.against(through_sae).word]} the best score through the SAE "
                f"({through_sae.name}, {through_sae.auc:.3f})"
            )
            return f"{beside}; that one is {_beside_random(through_sae)}"
        raw = score.against(self.scores[RAW])
        return f"{said}, {AGAINST[raw.word]} the raw states without an SAE ({raw.auc:.3f}) and {_beside_random(score)}"

    def _length(self, by: str) -> str:
        correlation = self.scores[by].length_correlation
        if not abs(correlation) >= LENGTH_GOES_ALONG:
            return ""
        return (
            f"it goes with caption length (rank correlation {correlation:.2f}), so it will favour "
            f"{'long' if correlation > 0 else 'short'} captions"
        )

    def _reconstruction(self) -> str:
        sides = self.fidelity.hardly_reconstructed
        if not sides:
            return ""
        levels = ", ".join(f"{self.fidelity.sides[side].fvu:.2f}" for side in sides)
        return (
            f"the SAE hardly reconstructs {' and '.join(sides)} tokens (FVU {levels}), so look for one trained on this "
            "model and layer"
        )


def _beside_random(score: Evidence) -> str:
    if score.random is None:
        raise AssertionError(f"{score.name} has no random SAE beside it")
    difference = score.against(score.random)
    meaning = (
        "the trained features add to it" if difference.word == "better" else "the trained features add nothing to it"
    )
    return f"{AGAINST[difference.word]} through a random SAE ({difference.auc:.3f}): {meaning}"
