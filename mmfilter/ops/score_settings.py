"""What a scoring is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mmfilter.core.pipeline.pass_settings import PassSettings
from mmfilter.core.typed import check_fields, setting, share
from mmfilter.errors import MMFilterError

DEFAULT_RUN = Path("mmfilter-run")


@dataclass(frozen=True)
class RunSettings:
    """Where a run is kept, and how much of the input goes into it."""

    GROUP: ClassVar[str] = "Run"

    run: str | Path = setting(DEFAULT_RUN, key="directory")
    """Run directory to write, or to continue"""
    limit: int | None = setting(None, least=1)
    """Score only the first N samples of the input"""
    seed: int = 0
    """Seed of the score 'random'"""
    max_bad: float = setting(0.1, parse=share, expected="a share such as 10% or 0.1", shown="10%", metavar="SHARE")
    """Share of samples without a score up to which the exit code is 0"""

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.max_bad <= 1:
            raise MMFilterError(f"--max-bad is {self.max_bad}; expected a share from 0 to 1, such as 10% or 0.1")

    def problem(self, rows: int, ok: int, *, name: str = "--max-bad") -> str | None:
        """Why a run with so many samples, of which so many have scores, is not a success; `name` is the setting's."""
        if not rows:
            return "the shards hold no samples: nothing to score"
        if 1 - ok / rows > self.max_bad:
            return (
                f"{1 - ok / rows:.1%} of the samples have no score, more than {name} {100 * self.max_bad:g}% allows; "
                f"the column 'reason' of {self.run}/scores/*.parquet says why for each"
            )
        return None


@dataclass(frozen=True)
class ScoreSettings(RunSettings, PassSettings):
    """How to score. What changes a score is stored in the run and may not differ when it is continued."""

    def __post_init__(self) -> None:
        RunSettings.__post_init__(self)
        PassSettings.__post_init__(self)
