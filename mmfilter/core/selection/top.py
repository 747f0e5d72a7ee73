"""How much `--top` keeps."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from mmfilter.errors import SelectionError


@dataclass(frozen=True)
class Top:
    """How many rows to keep: a fraction of the candidates, or a count."""

    fraction: Fraction | None = None
    count: int | None = None

    @classmethod
    def parse(cls, text: str) -> Top:
        """`20%`, `33.3%` (exact decimals) or `5000`."""
        text = text.strip()
        if match := re.fullmatch(r"(\d{1,3}(?:\.\d{1,30})?)\s*%", text, re.ASCII):
            fraction = Fraction(match[1]) / 100
            if 0 < fraction <= 1:
                return cls(fraction=fraction)
        elif re.fullmatch(r"\d{1,18}", text, re.ASCII) and int(text) > 0:
            return cls(count=int(text))
        raise SelectionError(f"--top {text!r} is neither a percentage up to 100% nor a count from 1; write 20% or 5000")

    def of(self, candidates: int) -> int:
        """Rows to keep: floor(n·fraction + 1/2), or the count."""
        if self.count is not None:
            return self.count
        assert self.fraction is not None  # one of both is given
        return int(candidates * self.fraction + Fraction(1, 2))
